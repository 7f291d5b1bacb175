"""Virtual environments with NIXL and the wheel in them, and Python run there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "target" / "wheel"
NIXL = "1.5.0"
DOWNLOADS = OUT / "downloads" / NIXL
LIBFABRIC = ROOT / "target" / "libfabric" / "2.5.1"
# What decides, taken away from every process unless a test sets it.
DECIDING = ("NIXL_", "FI_", "UCX_", "XDG_", "PYTHON", "VIRTUAL_ENV")


class Environment:
    """A virtual environment, with a home folder of its own."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
        self.program = folder / "venv" / "bin" / "nixl-libfabric"

    def pip(self, *arguments):
        subprocess.run([self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)], check=True)

    def install(self, *names):
        """From the wheels that were downloaded for all tests, without what they depend on (torch, mostly)."""
        self.pip("install", "--no-index", "--no-deps", "--find-links", OUT / "dist", "--find-links", DOWNLOADS, *names)

    def variables(self, **changes):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(DECIDING)}
        kept |= {"HOME": str(self.home), "LD_LIBRARY_PATH": str(LIBFABRIC)}
        return {key: value for key, value in (kept | changes).items() if value is not None}

    def run(self, *command, wrap=(), fails=False, **variables):
        """Runs a command in the environment; returns its output, of one that is to fail also the complaints."""
        done = subprocess.run(
            [*wrap, *map(str, command)], env=self.variables(**variables), capture_output=True, text=True, timeout=120, cwd=self.home
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return (done.stdout + done.stderr if fails else done.stdout).strip()

    def code(self, text, **options):
        return self.run(self.python, "-c", text, **options)


def download(*requirements):
    """NIXL's wheels, once."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    if len(list(DOWNLOADS.glob("*.whl"))) < len(requirements):
        subprocess.run(
            [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps", "--only-binary", ":all:",
             "--dest", DOWNLOADS, *requirements],
            check=True,
        )


@pytest.fixture(scope="session")
def wheel():
    (path,) = (OUT / "dist").glob("*.whl")
    download(f"nixl=={NIXL}", f"nixl-cu12=={NIXL}", f"nixl-cu13=={NIXL}", "numpy==2.2.6")
    return path


@pytest.fixture(scope="session")
def cu12(wheel, tmp_path_factory):
    """nixl-cu12 and the wheel, nothing else. Tests leave it as it is."""
    environment = Environment(tmp_path_factory.mktemp("cu12"))
    environment.install(f"nixl-cu12=={NIXL}", "numpy", "nixl-libfabric")
    return environment


@pytest.fixture(scope="session")
def both(wheel, tmp_path_factory):
    """What `pip install nixl` brings: the package nixl, and NIXL for CUDA 12 and 13."""
    environment = Environment(tmp_path_factory.mktemp("both"))
    environment.install(f"nixl=={NIXL}", f"nixl-cu12=={NIXL}", f"nixl-cu13=={NIXL}", "numpy", "nixl-libfabric")
    return environment


@pytest.fixture
def fresh(wheel, tmp_path):
    """An environment that a test may change: NIXL without the wheel."""
    environment = Environment(tmp_path / "fresh")
    environment.install(f"nixl-cu12=={NIXL}", "numpy")
    return environment
