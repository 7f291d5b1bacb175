"""The repository's Markdown files, read by markdown-it: headings, links, code spans and code blocks, with their lines."""

import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = "not-run:"
# Names that an HTML tag gives to a place.
HTML_NAME = re.compile(r"<\w+[^>]*\s(?:id|name)=[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    file: str
    line: int
    language: str
    # Why it cannot run here; empty: it can.
    reason: str
    text: str

    @property
    def place(self):
        return f"{self.file}:{self.line}"


@dataclass
class Document:
    """What the checks need of one file. Lines count from 1; those of links and spans are their paragraph's first."""

    file: str
    anchors: set = field(default_factory=set)
    links: list = field(default_factory=list)
    spans: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    # Rows of tables, each a list of the code spans of its first cell.
    first_cells: list = field(default_factory=list)


def slug(heading):
    """The anchor that GitHub gives to a heading: letters, digits, `_` and `-` stay, a blank is `-`, the rest goes."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def text_of(inline):
    return "".join(token.content for token in inline.children if token.type in ("text", "code_inline"))


def targets(inline):
    for token in inline.children:
        for name in ("href", "src"):
            if target := token.attrGet(name):
                yield target


@cache
def tracked():
    """All files of the repository that git knows or would take."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split("\n")
    return frozenset(name for name in listed if name and (ROOT / name).is_file())


@cache
def documents():
    return {file: read(file) for file in sorted(tracked()) if file.endswith(".md")}


def read(file):
    document = Document(file)
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / file).read_text())
    seen = {}
    # markdown-it gives no lines to what is inside a table's row.
    line = 0
    first_cell = False
    for before, token in zip([None, *tokens], tokens):
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            reason = rest.strip().removeprefix(NOT_RUN).strip() if rest.strip().startswith(NOT_RUN) else ""
            document.blocks.append(Block(file, line, language, reason, token.content))
        elif token.type == "tr_open":
            first_cell = True
        elif token.type == "html_block":
            document.anchors.update(HTML_NAME.findall(token.content))
        elif token.type == "inline":
            document.links += [(line, target) for target in targets(token)]
            spans = [child.content for child in token.children if child.type == "code_inline"]
            document.spans += [(line, span) for span in spans]
            document.anchors.update(HTML_NAME.findall(token.content))
            if before.type == "heading_open":
                name = slug(text_of(token))
                count = seen[name] = seen.get(name, -1) + 1
                document.anchors.add(f"{name}-{count}" if count else name)
            elif first_cell and before.type == "td_open":
                document.first_cells.append((line, spans))
                first_cell = False
    return document
