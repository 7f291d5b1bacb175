"""SVG plots of what compare.py has measured: bandwidth against size, and processor time for each descriptor.

compare.py draws them at the end of a run; from its JSON they can be drawn again, with other plugins or elsewhere:

    python benches/plots.py target/bench/compare-efa-4.json --plugins ours,stock --out docs/pictures

The SVG is written here, in plain text: the pictures are few and simple, so that a plotting library would bring more megabytes to
every installation than this file has lines. They have a background of their own, for light pages and dark ones.
"""

import argparse
import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

import choices  # noqa: F401: where `bed` is
from pair import LONG_LISTS, OPERATIONS, SHAPES
from tables import median_us, on_or_off, processor_us

# Colour and mark of a plugin, the same in every picture; other builds take the rest in turn.
LOOKS = {"ours": ("#0969da", "circle"), "stock": ("#bc4c00", "square"), "ucx": ("#1a7f37", "triangle")}
MORE_LOOKS = [("#8250df", "diamond"), ("#6e7781", "circle"), ("#bf3989", "square"), ("#7d4e00", "triangle")]
STYLE = """
text{font-family:Helvetica,Arial,'Liberation Sans',sans-serif;font-size:12px;fill:#1f2328}
.title{font-size:16px;font-weight:bold}.head{font-weight:bold}.note,.tick{fill:#57606a}.small{font-size:11px}
.least{font-size:10px}
.grid{stroke:#d8dee4}.axis{stroke:#8c959f}.apart{stroke:#8c959f;stroke-dasharray:3 3}
"""
WIDTH = 960
EDGE, LEFT, RIGHT, GAP = 20, 64, 20, 56
PANEL_WIDTH = (WIDTH - LEFT - RIGHT - GAP) / 2
HEAD, FOOT, PANEL_HEAD = 62, 56, 26
LINES_HEIGHT, BARS_HEIGHT = 210, 230
# Below a panel, for the names of shapes in two lines.
SHAPES_HEIGHT = 44
MARK = 4
# Most decades of an axis that has room for lines between them.
DECADES_DIVIDED_MAX = 2.5
# What title and caption say of a network.
NETWORKS = {
    "tcp": ("tcp", "Two agents on one machine, over its loopback"),
    "efa": ("{rails} software EFA devices", "Software devices on one machine: threads that copy"),
}


class Picture:
    def __init__(self, title, height):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff" stroke="#d0d7de"/>',
        ]
        self.text(EDGE, 28, title, "title")

    def add(self, tag, title="", **attributes):
        words = " ".join(f'{name.replace("_", "-")}="{rounded(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {words}><title>{escape(title)}</title></{tag}>" if title else f"<{tag} {words}/>")

    def text(self, x, y, text, look="", anchor="start"):
        self.parts.append(f'<text class="{look}" x="{rounded(x)}" y="{rounded(y)}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x1, y1, x2, y2, look):
        self.add("line", **{"class": look, "x1": x1, "y1": y1, "x2": x2, "y2": y2})

    def mark(self, x, y, look, title=""):
        colour, shape = look
        corners = {
            "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1.2), (1.2, 1), (-1.2, 1)],
            "diamond": [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        }.get(shape)
        if corners:
            points = " ".join(f"{rounded(x + MARK * right)},{rounded(y + MARK * down)}" for right, down in corners)
            self.add("polygon", title, points=points, fill=colour)
        else:
            self.add("circle", title, cx=x, cy=y, r=MARK, fill=colour)

    def legend(self, plugins, looks, note=""):
        x = EDGE + MARK
        for plugin in plugins:
            self.mark(x, 46, looks[plugin])
            self.text(x + 10, 50, plugin)
            x += 34 + 7 * len(plugin)
        self.text(x, 50, note, "note")

    def write(self, path):
        path.write_text("\n".join([*self.parts, "</svg>", ""]))
        return path


def rounded(value):
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def looks_of(plugins):
    more = [look for look in LOOKS.values() if look not in [LOOKS.get(plugin) for plugin in plugins]]
    others = iter((MORE_LOOKS + more) * len(plugins))
    return {plugin: LOOKS.get(plugin) or next(others) for plugin in plugins}


def network_of(about):
    name, _, rails = about["network"].partition(":")
    title, note = NETWORKS.get(name, (name, ""))
    return title.format(rails=rails or 1), note


def caption(picture, about, height):
    lines = [
        f"{about['time']}, {about['cores']} cores of {about['processor']}, nixl-cu12 {about['nixl']}, libfabric {about['libfabric']}; "
        f"medians of {about['rounds']} interleaved rounds. Method: benches/README.md.",
        f"{network_of(about)[1]}. No NIC is in it: what means something is the ratio of one plugin to another, not the figures.",
    ]
    for line, text in enumerate(lines):
        picture.text(EDGE, height - 30 + 16 * line, text, "note small")


def bandwidths(samples, plugins, progress, operation):
    """GB/s by shape and plugin."""
    for name, count, size in SHAPES:
        found = median_us(samples, plugins, progress, operation, name)
        yield name, {plugin: count * size / us / 1e3 for plugin, us in found.items()}


def shape_places(x):
    """Where each shape stands: single blocks by the logarithm of their size, the lists beside them."""
    single = [(name, math.log2(size)) for name, count, size in SHAPES if count == 1]
    first, last = single[0][1], single[-1][1]
    lists = 70 * len(LONG_LISTS)
    scale = (PANEL_WIDTH - lists - 48) / (last - first)
    places = {name: x + 24 + (power - first) * scale for name, power in single}
    places |= {name: x + PANEL_WIDTH - lists + 70 * at + 38 for at, (name, *_) in enumerate(LONG_LISTS)}
    return places, x + PANEL_WIDTH - lists


def shape_name(picture, x, y, name):
    count, times, size = name.partition(" x ")
    for line, text in enumerate([f"{count} x", size] if times else name.split(" ")):
        picture.text(x, y + 16 + 13 * line, text, "tick small", "middle")


def log_axis(values):
    """Where an axis begins and ends, and where its lines are: at 1, 2 and 5 of each power of ten, if there is room."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = [step * 10.0 ** power for power in powers for step in (1, 2, 5)]
    first = max(step for step in steps if step <= low)
    last = min(step for step in steps if step >= high and step > first)
    divided = math.log10(last / first) <= DECADES_DIVIDED_MAX
    lines = steps if divided else [10.0 ** power for power in powers]
    return first, last, [line for line in lines if first <= line <= last]


def draw_bandwidths(panels, plugins, about, path):
    """`panels`: by progress thread and operation, each a list of (shape, {plugin: GB/s})."""
    row_height = PANEL_HEAD + LINES_HEIGHT + SHAPES_HEIGHT
    height = HEAD + 2 * row_height + FOOT
    title = f"Bandwidth against size, over {network_of(about)[0]}: higher is better"
    picture, looks = Picture(title, height), looks_of(plugins)
    picture.legend(plugins, looks, "left: one block; right: lists of blocks; axes are logarithmic")
    for (progress, operation), found in panels.items():
        x = LEFT + OPERATIONS.index(operation) * (PANEL_WIDTH + GAP)
        top = HEAD + progress * row_height + PANEL_HEAD
        picture.text(x, top - PANEL_HEAD + 16, f"{operation}, progress thread {on_or_off(progress)}: GB/s", "head")
        draw_lines(picture, x, top, found, plugins, looks)
    caption(picture, about, height)
    return picture.write(path)


def draw_lines(picture, x, top, found, plugins, looks):
    bottom = top + LINES_HEIGHT
    low, high, lines = log_axis([value for _, row in found for value in row.values()])

    def up(value):
        return top + LINES_HEIGHT * math.log(high / value) / math.log(high / low)

    for line in lines:
        picture.line(x, up(line), x + PANEL_WIDTH, up(line), "grid")
        picture.text(x - 8, up(line) + 4, f"{line:g}", "tick", "end")
    places, apart = shape_places(x)
    picture.line(apart, top, apart, bottom, "apart")
    picture.line(x, bottom, x + PANEL_WIDTH, bottom, "axis")
    for name, place in places.items():
        shape_name(picture, place, bottom, name)
    for plugin in reversed(plugins):  # the first on top
        points = [(places[name], up(row[plugin]), name, row[plugin]) for name, row in found if plugin in row]
        blocks = " ".join(f"{rounded(right)},{rounded(down)}" for right, down, name, _ in points if " x " not in name)
        picture.add("polyline", points=blocks, fill="none", stroke=looks[plugin][0], stroke_width=2)
        for right, down, name, value in points:
            picture.mark(right, down, looks[plugin], f"{plugin}, {name}: {value:.3g} GB/s")


def step_of(high):
    """A round step that divides an axis up to `high` into some five parts."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= high / 5)


def draw_processor(panels, plugins, about, path):
    """`panels`: by progress thread, each a list of (operation, shape, {plugin: (near, far)} in us)."""
    most = max(sum(sides) for found in panels.values() for *_, row in found for sides in row.values())
    step = step_of(most)
    high = step * math.ceil(1.05 * most / step)
    height = HEAD + PANEL_HEAD + BARS_HEIGHT + SHAPES_HEIGHT + 16 + FOOT
    title = f"Processor time for each descriptor of a list, over {network_of(about)[0]}: lower is better"
    picture, looks = Picture(title, height), looks_of(plugins)
    picture.legend(plugins, looks, "full colour: the agent that transfers; pale: its peer")
    for progress, found in panels.items():
        x, top = LEFT + progress * (PANEL_WIDTH + GAP), HEAD + PANEL_HEAD
        bottom = top + BARS_HEIGHT
        picture.text(x, HEAD + 16, f"Progress thread {on_or_off(progress)}: us", "head")
        for tick in range(round(high / step) + 1):
            y = bottom - BARS_HEIGHT * tick * step / high
            picture.line(x, y, x + PANEL_WIDTH, y, "grid")
            picture.text(x - 8, y + 4, f"{tick * step:g}", "tick", "end")
        room = PANEL_WIDTH / len(found)
        for group, (operation, shape, row) in enumerate(found):
            middle = x + room * (group + 0.5)
            picture.text(middle, bottom + 16, operation, "small", "middle")
            shape_name(picture, middle, bottom + 14, shape)
            width = min(34, 0.84 * room / len(plugins))
            for at, plugin in enumerate(plugins):
                if plugin in row:
                    left = middle + width * (at - len(plugins) / 2)
                    title = f"{plugin}, {operation} {shape}"
                    draw_bar(picture, left, bottom, width, row[plugin], BARS_HEIGHT / high, looks[plugin][0], title)
        picture.line(x, bottom, x + PANEL_WIDTH, bottom, "axis")
    caption(picture, about, height)
    return picture.write(path)


def draw_bar(picture, left, bottom, width, sides, scale, colour, title):
    """The near side's time in full colour, the far one's on top of it."""
    for side, opacity, name in zip(sides, (1, 0.4), ("near", "far")):
        tall = side * scale
        bottom -= tall
        place = {"x": left + 1, "y": bottom, "width": width - 2, "height": tall}
        picture.add("rect", **place, fill="#fff")
        picture.add("rect", f"{title}, {name}: {side:.3g} us", **place, fill=colour, fill_opacity=opacity)
    total = sum(sides)
    picture.text(left + width / 2, bottom - 4, f"{total:.0f}" if total >= 10 else f"{total:.1f}", "least", "middle")


def draw(samples, about, plugins, start):
    """Writes the pictures that there are samples for, with names that begin with `start`, and returns their paths."""
    written = []
    panels = {
        (progress, operation): [(name, row) for name, row in bandwidths(samples, plugins, progress, operation) if row]
        for progress in (False, True) for operation in OPERATIONS
    }
    if panels := {place: found for place, found in panels.items() if found}:
        written.append(draw_bandwidths(panels, plugins, about, start.with_name(f"{start.name}-bandwidth.svg")))
    bars = {
        progress: [(operation, shape, processor_us(samples, plugins, progress, operation, shape))
                   for operation in OPERATIONS for shape, *_ in LONG_LISTS]
        for progress in (False, True)
    }
    if any(row for found in bars.values() for *_, row in found):
        written.append(draw_processor(bars, plugins, about, start.with_name(f"{start.name}-processor.svg")))
    return written


def read(path):
    """What compare.py has written: {key: values} and what it says of the run."""
    try:
        found = json.loads(path.read_text())
        return {tuple(row["key"]): row["values"] for row in found["samples"]}, found["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"plots: {path}: want the JSON of benches/compare.py: {error!r}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+", help="target/bench/compare-NETWORK.json")
    parser.add_argument("--plugins", help="which of those that were measured (all)")
    parser.add_argument("--out", type=Path, help="folder (that of the JSON)")
    chosen = parser.parse_args()
    for path in chosen.measured:
        samples, about = read(path)
        plugins = chosen.plugins.split(",") if chosen.plugins else about["plugins"]
        if unknown := [plugin for plugin in plugins if plugin not in about["plugins"]]:
            raise SystemExit(f"plots: --plugins {','.join(unknown)}: {path} has {', '.join(about['plugins'])}")
        written = draw(samples, about, plugins, (chosen.out or path.parent) / path.stem)
        print("\n".join(str(picture) for picture in written) or f"plots: {path}: nothing to draw")


if __name__ == "__main__":
    main()
