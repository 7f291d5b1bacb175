#!/usr/bin/env python3
"""Checks pictures of machines: FOLDER has NAME.svg and NAME.json of the same machine, by `nixl-libfabric topology`.

Each picture is XML; every accelerator and network device stands in it once; there is a line for each device that an
accelerator uses and no other; lines begin and end at their boxes and cross none; nothing covers anything else.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import combinations
from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"
WIDTH_MAX = 1200
ACCELERATORS = ("GPU", "Neuron")


def leaves(place):
    for child in place.get("children", ()):
        yield from leaves(child)
    if "names" in place:
        yield place


def wanted(report):
    """Accelerators, network devices, and pairs of the two, by what the picture calls them."""
    found = list(leaves(report["tree"]))
    accelerators = [leaf["pci"] for leaf in found if leaf["type"] in ACCELERATORS]
    networks = [leaf["pci"] for leaf in found if leaf["type"] not in ACCELERATORS]
    by_name = {name: leaf["pci"] for leaf in found for name in leaf["names"]}
    ids = {}
    for device in report["devices"]:
        name = device["name"]
        ids[name] = device["pci"] if device["pci"] in networks else by_name.get(name, name)
    networks += [place for place in dict.fromkeys(ids.values()) if place not in networks]
    pairs = {(one["pci"], ids[name]) for one in report["accelerators"] for name in one["devices"]}
    return Counter(accelerators), Counter(networks), Counter(pairs)


def box(rect):
    x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def inside(one, other):
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


def points(path):
    """The corners of `M x y`, then `H x` and `V y` in turn."""
    commands = re.findall(r"([MHV])([\d. ]+)", path)
    assert commands[0][0] == "M" and all(command != "M" for command, _ in commands[1:]), path
    x, y = (float(number) for number in commands[0][1].split())
    yield x, y
    for command, number in commands[1:]:
        x, y = (float(number), y) if command == "H" else (x, float(number))
        yield x, y


def segments(path):
    corners = list(points(path))
    for (x, y), (to_x, to_y) in zip(corners, corners[1:]):
        yield min(x, to_x), min(y, to_y), max(x, to_x), max(y, to_y)


def chips(root, kind):
    for group in root.iter(f"{SVG}g"):
        if group.get("class").split()[0] == kind:
            yield group.get("data-id"), box(group.find(f"{SVG}rect"))


def check(svg, report):
    root = ElementTree.fromstring(svg)
    view = (0, 0, float(root.get("width")), float(root.get("height")))
    assert view[2] <= WIDTH_MAX, f"{view[2]} wide"
    accelerators, networks = (list(chips(root, kind)) for kind in ("accelerator", "network"))
    paths = [path for path in root.iter(f"{SVG}path") if path.get("class") == "use"]
    drawn = (Counter(name for name, _ in accelerators), Counter(name for name, _ in networks),
             Counter((path.get("data-from"), path.get("data-to")) for path in paths))
    for what, have, want in zip(("accelerators", "network devices", "lines"), drawn, wanted(report)):
        assert have == want, f"{what}: more than wanted {have - want}, missing {want - have}"

    boxes = dict(accelerators) | dict(networks)
    frames = [box(rect) for rect in root.iter(f"{SVG}rect") if rect.get("class") == "frame"]
    for one, other in combinations(boxes.items(), 2):
        assert not overlap(one[1], other[1]), f"{one[0]} covers {other[0]}"
    for name, place in boxes.items():
        assert inside(place, frames[0]) and inside(place, view), f"{name} is outside"
        assert all(inside(place, frame) or not overlap(place, frame) for frame in frames), f"{name} crosses a frame"
    for one, other in combinations(frames, 2):
        assert inside(one, other) or inside(other, one) or not overlap(one, other), f"frames cross at {one}"

    for path in paths:
        ends = list(points(path.get("d")))
        start, end = boxes[path.get("data-from")], boxes[path.get("data-to")]
        assert ends[0][0] == start[2] and start[1] < ends[0][1] < start[3], f"{path.get('d')} does not begin at its box"
        assert ends[-1][1] == end[1] and end[0] < ends[-1][0] < end[2], f"{path.get('d')} does not end at its box"
        for segment in segments(path.get("d")):
            for name, place in boxes.items():
                assert not overlap(segment, place), f"{path.get('d')} crosses {name}"
    lines = {(path.get("stroke"), segment) for path in paths for segment in segments(path.get("d"))}
    for (colour, one), (other_colour, other) in combinations(sorted(lines), 2):
        # Wider by half a pixel each: two lines side by side that nobody could tell apart.
        near = overlap([one[0] - .5, one[1] - .5, one[2] + .5, one[3] + .5], other)
        along = (one[0] == one[2]) == (other[0] == other[2])
        assert colour == other_colour or not (near and along), f"lines of two colours cover one another: {one}, {other}"


def main():
    pictures = sorted(Path(sys.argv[1]).glob("*.svg"))
    assert pictures, f"no pictures in {sys.argv[1]}"
    for picture in pictures:
        try:
            check(picture.read_text(), json.loads(picture.with_suffix(".json").read_text()))
        except (AssertionError, KeyError, ElementTree.ParseError) as error:
            raise SystemExit(f"{picture.name}: {error!r}") from error


if __name__ == "__main__":
    main()
