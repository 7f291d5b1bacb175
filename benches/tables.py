"""The Markdown of compare.py. Samples are {(plugin, progress thread, what, ...): [values]}."""

import statistics

from pair import LONG_LISTS, OPERATIONS, SHAPES


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def on_or_off(progress):
    return "on" if progress else "off"


def percentile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


def median_us(samples, plugins, progress, operation, shape):
    """The median time of each plugin that was measured."""
    return {
        plugin: statistics.median(found) * 1e6
        for plugin in plugins if (found := samples.get((plugin, progress, operation, shape)))
    }


def processor_us(samples, plugins, progress, operation, shape):
    """Near and far processor time for each descriptor, of each plugin that was measured."""
    return {
        plugin: [statistics.median(values) * 1e6 for values in zip(*found)]
        for plugin in plugins if (found := samples.get((plugin, progress, "processor", operation, shape)))
    }


def compared_head(plugins, unit):
    others = [plugin for plugin in plugins if plugin != plugins[0]]
    return " | ".join([f"{plugin}, {unit}" for plugin in plugins] + [f"{plugin} / {plugins[0]}" for plugin in others])


def compared_cells(plugins, values, text=number):
    """The value of each plugin, and for each but the first how many times the first one's it is."""
    first = plugins[0]
    cells = [text(values[plugin]) if plugin in values else "-" for plugin in plugins]
    cells += [f"{values[plugin] / values[first]:.2f}" if {plugin, first} <= set(values) else "-" for plugin in plugins[1:]]
    return " | ".join(cells)


def times(samples, plugins, progress):
    yield f"| operation | shape | {compared_head(plugins, 'us')} |"
    yield "|---|---|" + "---:|" * (2 * len(plugins) - 1)
    for operation in OPERATIONS:
        for shape, *_ in SHAPES:
            if medians := median_us(samples, plugins, progress, operation, shape):
                yield f"| {operation} | {shape} | {compared_cells(plugins, medians)} |"


def notified(samples, plugins):
    yield "| progress thread | plugin | DONE, us: p50 | p99 | notification there, us: p50 | p99 |"
    yield "|---|---|---:|---:|---:|---:|"
    for progress in (False, True):
        for plugin in plugins:
            found = [samples.get((plugin, progress, "notified", until)) for until in ("done", "there")]
            if all(found):
                cells = (number(percentile(values, share) * 1e6) for values in found for share in (0.5, 0.99))
                yield f"| {on_or_off(progress)} | {plugin} | {' | '.join(cells)} |"


def processor(samples, plugins):
    """Near and far, and their sum compared."""
    yield f"| progress thread | operation | shape | {compared_head(plugins, 'near + far, us')} |"
    yield "|---|---|---|" + "---:|" * (2 * len(plugins) - 1)
    for progress in (False, True):
        for operation in OPERATIONS:
            for shape, *_ in LONG_LISTS:
                sides = processor_us(samples, plugins, progress, operation, shape)
                sums = {plugin: sum(values) for plugin, values in sides.items()}
                if sums:
                    words = {value: " + ".join(f"{side:.2f}" for side in sides[plugin]) for plugin, value in sums.items()}
                    yield f"| {on_or_off(progress)} | {operation} | {shape} | {compared_cells(plugins, sums, words.get)} |"


def idle(samples, plugins):
    yield "| plugin | processor, % of a core | notification to a sleeping agent, us (median) | 9 of 10 within, us |"
    yield "|---|---:|---:|---:|"
    for plugin in plugins:
        share, wakeups = samples.get((plugin, True, "idle")), samples.get((plugin, True, "wakeup"))
        if share and wakeups:
            cells = number(statistics.median(wakeups) * 1e6), number(percentile(wakeups, 0.9) * 1e6)
            yield f"| {plugin} | {statistics.median(share):.1f} | {' | '.join(cells)} |"


def report(samples, about):
    plugins = about["plugins"]
    yield (f"{about['time']}, {about['cores']} cores of {about['processor']}, Linux {about['kernel']}, nixl-cu12 {about['nixl']}, "
           f"libfabric {about['libfabric']}, network {about['network']}; medians of {about['rounds']} interleaved rounds; "
           f"load {about['load_at_start']:.1f} before they began.")
    for progress in (False, True):
        yield f"\n**Times, progress thread {on_or_off(progress)}**\n"
        yield from times(samples, plugins, progress)
    yield "\n**A WRITE of 4 KiB with a notification**\n"
    yield from notified(samples, plugins)
    yield "\n**Processor time for each descriptor**\n"
    yield from processor(samples, plugins)
    yield "\n**An idle agent with the progress thread on**\n"
    yield from idle(samples, plugins)
