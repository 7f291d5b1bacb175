"""Every relative link of every Markdown file leads to a file of the repository, and its anchor to a heading there."""

import posixpath
import re
from urllib.parse import unquote, urlsplit

import pytest
from markdown import ROOT, documents, slug, tracked

# Package registries are named by what they are, never by their hosts. Lock files are cargo's. `[h]`: not to find itself.
REGISTRY_HOST = re.compile(r"crates\.io|docs\.rs|pypi\.(?:org|python)|python[h]osted|npmjs\.|proxy\.golang")


def broken(file, target):
    """Why a link does not lead anywhere, or None. Other hosts are not asked."""
    parts = urlsplit(target)
    if parts.scheme:
        return None if parts.scheme == "https" and parts.netloc else "not an https address"
    if target.startswith("/"):
        return "an absolute path"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), unquote(parts.path))) if parts.path else file
    if path not in tracked() and not any(name.startswith(f"{path}/") for name in tracked()):
        return f"no file {path} in the repository"
    if parts.fragment and path not in documents():
        return f"{path} is not a Markdown file and has no anchors"
    if parts.fragment and parts.fragment not in documents()[path].anchors:
        return f"no heading #{parts.fragment} in {path}"
    return None


@pytest.mark.parametrize("file", documents())
def test_links(file):
    failures = [f"{file}:{line}: {target}: {why}"
                for line, target in documents()[file].links if (why := broken(file, target))]
    assert not failures, "\n".join(failures)


def test_every_document_is_reachable_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        file = ahead.pop()
        if file in reached:
            continue
        reached.add(file)
        for _, target in documents()[file].links:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file), urlsplit(target).path))
            ahead += [path] if path in documents() else []
    lost = [file for file in documents() if file.startswith("docs/") and file not in reached]
    assert not lost, f"nothing leads from README.md to {', '.join(lost)}"


def test_no_registry_is_named_by_its_host():
    found = []
    for file in sorted(tracked()):
        if not file.endswith(".lock"):
            text = (ROOT / file).read_bytes().decode(errors="ignore")
            found += [f"{file}: {match.group()}" for match in REGISTRY_HOST.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("heading", "anchor"), [
    ("What fails today, and the test that shows it", "what-fails-today-and-the-test-that-shows-it"),
    ("Pages of 64 KiB", "pages-of-64-kib"),
    ("`FI_MORE` batches: no", "fi_more-batches-no"),
    ("One WRITE, one READ & more", "one-write-one-read--more"),
])
def test_slugs_are_those_of_the_hosting_platform(heading, anchor):
    assert slug(heading.replace("`", "")) == anchor


@pytest.mark.parametrize("target", ["nowhere.md", "README.md#nowhere", "#nowhere", "../outside.md", "/README.md", "http://a.b/c"])
def test_a_broken_link_is_seen(target):
    assert broken("README.md", target)
