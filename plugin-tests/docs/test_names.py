"""What documents name exists: `make` targets, files, tests, and the lines of the log."""

import re
from functools import cache

import pytest
from markdown import ROOT, documents, tracked

# A code span that is a file or a folder of this repository; `{a,b}` and `*` as a shell reads them.
PATH = re.compile(r"(?:src|tests|plugin-tests|benches|docs|include|cmake|fuzz)/[\w./{},*-]*")
TEST = re.compile(r"(?:(test_\w+)\.py)?(?:::)?(test_\w+)?")
MAKE = re.compile(r"\bmake ((?:[a-z0-9-]+ ?)+)")
# vLLM's own tests are named, too: by what runs them.
FOREIGN = (ROOT / "plugin-tests/vllm/upstream.py").read_text()
# `.PHONY` lists every verb.
VERBS = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split())


def alternatives(path):
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    return [part for one in found.group(1).split(",")
            for part in alternatives(path[: found.start()] + one + path[found.end() :])]


def exists(path):
    """A path counts from the root or, as in `tests/laws.rs` of the simulator, from the folder of the crate that is spoken of."""
    pattern = re.compile(r"(?:.*/)?" + re.escape(path.rstrip("/")).replace(r"\*", "[^/]*") + r"(?:/.*)?")
    return any(pattern.fullmatch(name) for name in tracked())


@cache
def end_to_end():
    """Names of the functions in each file of end-to-end tests."""
    return {file.rpartition("/")[2].removesuffix(".py"): set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M))
            for file in tracked() if re.fullmatch(r"plugin-tests/e2e/test_\w+\.py", file)}


@pytest.mark.parametrize("file", documents())
def test_files_exist(file):
    failures = [f"{file}:{line}: `{span}`: no {path}"
                for line, span in documents()[file].spans if PATH.fullmatch(span)
                for path in alternatives(span) if not exists(path)]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("file", documents())
def test_tests_exist(file):
    failures = []
    for line, span in documents()[file].spans:
        found = TEST.fullmatch(span)
        if not found or not span:
            continue
        module, name = found.groups()
        if module and f"{module}.py" in FOREIGN:
            continue
        if module and module not in end_to_end():
            failures.append(f"{file}:{line}: no plugin-tests/e2e/{module}.py")
        elif name and name not in (end_to_end()[module] if module else set().union(*end_to_end().values())):
            failures.append(f"{file}:{line}: no test {span} in plugin-tests/e2e")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("file", documents())
def test_make_targets_exist(file):
    commands = [(line, span) for line, span in documents()[file].spans if span.startswith("make ")]
    commands += [(block.line, line.split("#")[0]) for block in documents()[file].blocks if block.language == "sh"
                 for line in block.text.splitlines()]
    failures = [f"{file}:{line}: no `make {verb}`"
                for line, command in commands for verbs in MAKE.findall(command)
                for verb in verbs.split() if verb not in VERBS]
    assert not failures, "\n".join(failures)


@cache
def said():
    """The plugin's source as one text, strings that go over several lines joined, what is filled in as `…`."""
    sources = "\n".join((ROOT / file).read_text() for file in sorted(tracked())
                        if file.startswith("src/") and file.endswith((".rs", ".cpp")))
    return re.sub(r"\{[^{}\n]*\}", "…", re.sub(r"\\\n\s*", "", sources))


def test_lines_of_the_log_exist():
    """The first column of the table in Troubleshooting; each piece between `…` is looked for."""
    table = (ROOT / "docs/troubleshooting.md").read_text().splitlines().index("## What the plugin says")
    failures = [f"docs/troubleshooting.md:{line}: nothing in src/ says `{piece}`"
                for line, spans in documents()["docs/troubleshooting.md"].first_cells if line > table
                for span in spans for piece in (part.strip(" :,.") for part in span.split("…"))
                if len(piece) > 3 and piece not in said()]
    assert not failures, "\n".join(failures)
