"""Pictures: those in docs/pictures are XML that a page may show; the benches' plots stand where their numbers say."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from markdown import ROOT

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = sorted((ROOT / "docs/pictures").glob("*.svg"))
# Of Helvetica and what stands in for it, on the average.
EM_PER_CHARACTER = 0.56
FONT_PX = {"title": 16, "small": 11, "least": 10, "detail": 11}
ABOUT = {
    "time": "2026-01-01", "processor": "A & B", "cores": 2, "kernel": "6", "nixl": "1", "libfabric": "2", "network": "efa:4", "rounds": 1,
    "plugins": ["ours", "stock", "before"], "load_at_start": 0,
}
SHAPES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "4096 x 16 KiB": 64 << 20}


def texts(root):
    """Words, with left end, right end and base line."""
    for element in root.iter(f"{SVG}text"):
        looks = element.get("class", "").split()
        width = len(element.text) * EM_PER_CHARACTER * next((FONT_PX[look] for look in looks if look in FONT_PX), 12)
        x = float(element.get("x")) - {"middle": width / 2, "end": width}.get(element.get("text-anchor"), 0)
        yield element.text, x, x + width, float(element.get("y"))


@pytest.fixture
def drawn(tmp_path):
    """Two plots of made-up samples: a plugin's time for a byte is its place in the list, in ns."""
    samples = []
    for nanoseconds, plugin in enumerate(ABOUT["plugins"], 1):
        for shape, size in SHAPES.items():
            samples.append({"key": [plugin, False, "WRITE", shape], "values": [size * nanoseconds / 1e9] * 3})
        samples.append({"key": [plugin, True, "processor", "READ", "4096 x 16 KiB"], "values": [[nanoseconds / 1e6, 2 * nanoseconds / 1e6]]})
    path = tmp_path / "compare-efa-4.json"
    path.write_text(json.dumps({"about": ABOUT, "samples": samples}))

    def draw():
        subprocess.run([sys.executable, ROOT / "benches/plots.py", path], check=True, timeout=60)
        return [(tmp_path / f"compare-efa-4-{what}.svg").read_text() for what in ("bandwidth", "processor")]

    return draw


def check(text):
    """That a page may show it, and that its words can be read."""
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    assert width <= 1200
    assert next(root.iter(f"{SVG}rect")).get("width") == root.get("width"), "no background: it must be readable on a dark page, too"
    assert not re.search(r"<script|href=|url\(|@import", text), "it loads something, which pages forbid"
    placed = sorted(texts(root), key=lambda word: (word[3], word[1]))
    for words, left, right, base in placed:
        assert 0 <= left and right <= width and 0 <= base <= height, f"`{words}` leaves the picture"
    for (words, _, right, base), (others, left, _, other_base) in zip(placed, placed[1:]):
        assert base != other_base or right <= left, f"`{words}` runs into `{others}`"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_can_be_shown_and_read(picture):
    check(picture.read_text())


def test_plots_can_be_shown_and_read(drawn):
    for text in drawn():
        check(text)


def test_marks_stand_where_the_numbers_say(drawn):
    root = ElementTree.fromstring(drawn()[0])
    places = {}
    for mark in (*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}polygon")):
        if (title := mark.find(f"{SVG}title")) is not None:
            corners = [point.split(",") for point in mark.get("points", "").split()]
            x = mark.get("cx") or sum(float(x) for x, _ in corners) / len(corners)
            y = mark.get("cy") or (min(float(y) for _, y in corners) + max(float(y) for _, y in corners)) / 2
            places[tuple(re.split(", |: ", title.text))] = float(x), float(y)
    found = {(plugin, shape): figure for plugin, shape, figure in places}
    speeds = {"ours": "1 GB/s", "stock": "0.5 GB/s", "before": "0.333 GB/s"}
    assert found == {(plugin, shape): figure for plugin, figure in speeds.items() for shape in SHAPES}
    y = {plugin: {places[plugin, shape, figure][1] for shape in SHAPES} for plugin, figure in speeds.items()}
    assert all(max(values) - min(values) < 0.3 for values in y.values()), "the same figure, the same height"
    of = {plugin: min(values) for plugin, values in y.items()}
    assert (of["before"] - of["ours"]) / (of["stock"] - of["ours"]) == pytest.approx(math.log(3) / math.log(2), rel=0.05)


def test_bars_are_as_tall_as_the_numbers(drawn):
    root = ElementTree.fromstring(drawn()[1])
    tall = {title.text: float(bar.get("height")) for bar in root.iter(f"{SVG}rect") if (title := bar.find(f"{SVG}title")) is not None}
    unit = tall["ours, READ 4096 x 16 KiB, near: 1 us"]
    assert unit > 5
    for times, plugin in enumerate(ABOUT["plugins"], 1):
        for far, side in ((1, "near"), (2, "far")):
            assert tall[f"{plugin}, READ 4096 x 16 KiB, {side}: {times * far} us"] == pytest.approx(unit * times * far, abs=0.2)
    assert len(tall) == 6


def test_plots_are_the_same_each_time(drawn):
    assert drawn() == drawn()
