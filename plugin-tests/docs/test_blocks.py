"""The code blocks of the documents run as a reader would run them.

Blocks marked `sh` and `python` of one file run one after another in one shell, so that what one exports the next one has: from
the repository's root, with a `python` whose environment has NIXL, and nothing else set. A block that cannot run here says why
after its language (`sh not-run: needs an EFA device`), is only parsed, and is listed as skipped. `json` is parsed.
"""

import ast
import json
import os
import signal
import subprocess
import venv

import pytest
from markdown import ROOT, documents

TARGET = ROOT / "target"
# One file's blocks; they compile nothing that `make plugin` has not compiled.
DEADLINE_S = 300
LANGUAGES = {"sh", "python", "json", "yaml", "text", "dockerfile", "toml", "rust", "c"}

ALL = [block for document in documents().values() for block in document.blocks]
RUN = {file: blocks for file, document in documents().items()
       if (blocks := [block for block in document.blocks if block.language in ("sh", "python") and not block.reason])}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A user's environment: Python with NIXL in it, under the name that the package `nixl` gives it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    version = next(iter(sorted((TARGET / "nixl").glob("1.5.0"))), None)
    if version is None:
        pytest.skip("no NIXL under target/nixl: `make setup` installs it")
    for entry in version.iterdir():
        (site / entry.name).symlink_to(entry)
    (site / "nixl").symlink_to("nixl_cu12")
    (numpy,) = (TARGET / "venv").glob("lib/python3*/site-packages/numpy*/__init__.py")
    for entry in numpy.parent.parent.glob("numpy*"):
        (site / entry.name).symlink_to(entry)
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("NIXL_", "FI_", "UCX_", "MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    return kept | {"PATH": f"{folder}/bin:{kept['PATH']}"}


def script(blocks):
    """One shell script; before each block it says where it is."""
    parts = ["set -euo pipefail"]
    for block in blocks:
        text = block.text if block.language == "sh" else f"python - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON\n"
        parts.append(f"echo '== {block.place}'\n{text}")
    return "\n".join(parts)


@pytest.mark.parametrize("file", RUN)
def test_blocks_run(file, environment, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as output:
        # A session of its own, so that nothing of it outlives the deadline.
        process = subprocess.Popen(["bash", "-c", script(RUN[file])], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"none after {DEADLINE_S} s"
    assert code == 0, f"exit code {code} of a block of {file}; the last that began is named in\n{log.read_text()[-6000:]}"


@pytest.mark.parametrize("block", [block for block in ALL if block.reason], ids=lambda block: block.place)
def test_block_that_cannot_run_is_parsed(block):
    if block.language == "python":
        ast.parse(block.text)
    else:
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
    pytest.skip(block.reason)


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_block_has_a_known_language(block):
    assert block.language in LANGUAGES, f"{block.place}: a block of `{block.language}`; known: {', '.join(sorted(LANGUAGES))}"
    if block.reason:
        assert block.language in ("sh", "python"), f"{block.place}: only sh and python are run at all"
    if block.language == "json":
        json.loads(block.text)


def test_a_failing_command_in_the_middle_of_a_block_fails(environment):
    class Example:
        language, place, text = "sh", "here:1", "true | false | true\necho not reached\n"

    done = subprocess.run(["bash", "-c", script([Example])], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "not reached" not in done.stdout, done
