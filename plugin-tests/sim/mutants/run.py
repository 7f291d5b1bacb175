#!/usr/bin/env python3
"""Breaks each law on purpose, in a copy of the tree, and expects the simulator to notice.

    plugin-tests/sim/mutants/run.py [word ...]      only mutants whose name holds one of the words
    plugin-tests/sim/mutants/run.py --check         builds nothing, says which no longer apply

Ends with 1 if a mutant lives, or no longer applies. The copy is kept under target/mutants, so that only the changed
crates are built again for each mutant. Needs Python 3.11 (tomllib).
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[3]
WORK = ROOT / "target" / "mutants"
TREE = WORK / "tree"
SEEDS = os.environ.get("SIM_SEEDS", "200")
TIMEOUT_S = 600
TESTS = ["schedules", "laws"]


def copy_tree():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = {name for name in listed.stdout.split("\0") if name}
    for name in names:
        source, target = ROOT / name, TREE / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    # What an earlier copy had, and the tree no longer has.
    for path in TREE.rglob("*"):
        if path.is_file() and str(path.relative_to(TREE)) not in names:
            path.unlink()


def cargo(*arguments):
    environment = os.environ | {
        "CARGO_TARGET_DIR": str(WORK / "build"),
        "SIM_SEEDS": SEEDS,
        "RUST_BACKTRACE": "0",
        # Mutants leave things unused.
        "RUSTFLAGS": "--cap-lints=allow",
    }
    command = ["cargo", "test", "-q", "-p", "nixl-libfabric-sim", *arguments]
    try:
        return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None


def misfit(mutant, tree):
    """Why a mutant does not apply, if it does not."""
    count = (tree / mutant["file"]).read_text().count(mutant["find"])
    return None if count == 1 else f"`find` stands {count} times in {mutant['file']}"


def verdict(mutant):
    """Whether the mutant was caught; and how, or why it lives."""
    if why := misfit(mutant, TREE):
        return False, why
    path = TREE / mutant["file"]
    original = path.read_text()
    try:
        path.write_text(original.replace(mutant["find"], mutant["replace"]))
        built = cargo("--no-run")
        if built is None or built.returncode != 0:
            return False, "does not build:\n" + (built.stderr[-2000:] if built else "timeout")
        for test in [mutant["test"]] if "test" in mutant else TESTS:
            done = cargo("--test", test)
            if done is None:
                return True, f"{test} did not end"
            if done.returncode != 0:
                lines = (done.stdout + done.stderr).splitlines()
                told = [line for line in lines if line.startswith("BROKEN") or "assertion" in line]
                return True, f"{test}: {told[0].strip() if told else lines[-1]}"
        return False, "lives"
    finally:
        path.write_text(original)


def main():
    mutants = tomllib.loads((ROOT / "plugin-tests/sim/mutants/mutants.toml").read_text())["mutant"]
    words = sys.argv[1:]
    if words == ["--check"]:
        unfit = [f"{mutant['name']}: {why}" for mutant in mutants if (why := misfit(mutant, ROOT))]
        print("\n".join(unfit) or f"mutants: all {len(mutants)} apply")
        return 1 if unfit else 0
    chosen = [m for m in mutants if not words or any(word in m["name"] for word in words)]
    copy_tree()
    failed = 0
    for mutant in chosen:
        begin = time.monotonic()
        caught, how = verdict(mutant)
        failed += not caught
        print(f"{'caught' if caught else 'LIVES '}  {mutant['name']} (law {mutant['law']}): {how}  [{time.monotonic() - begin:.0f} s]", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} mutants were caught")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
