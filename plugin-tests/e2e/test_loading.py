"""The plugin loads in every NIXL, on any machine, and says in words what is missing."""

import subprocess

import pytest

from bed.agent import Refused
from bed.places import NIXL_VERSIONS, ROOT, TARGET, Host

pytestmark = [pytest.mark.ours, pytest.mark.tcp]
NAMES = ["LIBFABRIC", "Libfabric"]
STOCK_OPTIONS = {"striping_threshold", "num_threads", "split_batch_size", "max_bw_per_dram_seg", "post_queue_size"}
# Run by `unshare --mount`: the system's library folder without the libraries that the plugin opens.
HIDE = """
set -e
real=$1; shift
folder=$(dirname "$(readlink -f "$(ldconfig -p | sed -n 's/.*libc.so.6 (.*x86-64.*=> //p' | head -1)")")
mkdir -p "$real/real" "$real/thin"
mount --bind "$folder" "$real/real"
ln -s "$real/real/"* "$real/thin/"
rm -f "$real/thin/"libfabric* "$real/thin/"libhwloc* "$real/thin/"libcuda* "$real/thin/"libibverbs* "$real/thin/"libefa*
mount --bind "$real/thin" "$folder"
exec "$@"
"""


def bare(folder):
    """A command prefix: a machine without libfabric, hwloc, CUDA and verbs."""
    return ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", HIDE, "hide", str(folder)]


@pytest.mark.parametrize("nixl", NIXL_VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_wheel(bed, nixl, name):
    """Both names, in every version of NIXL: options, memory kinds, and a transfer."""
    host = Host(nixl=nixl, libfabric=bed.host.libfabric)
    first, second = (bed.agent(who, host, backend=name, progress_thread=True) for who in ("first", "second"))
    assert name in first.call("plugins")
    options, kinds = first.call("plugin_facts", name)
    assert STOCK_OPTIONS <= set(options)
    assert {"DRAM", "VRAM"} & {str(kind).removesuffix("_SEG") for kind in kinds}
    first.knows(second), second.knows(first)
    source, target = first.buffer(100_000, seed=1), second.buffer(100_000)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"loaded")
    second.receives(b"loaded", sender=first)
    target.check(1)


@pytest.mark.parametrize("nixl", NIXL_VERSIONS)
def test_ucx_is_kept(bed, nixl, tmp_path):
    """The folder that `make install-plugins` makes: UCX still finds its libraries, and ours stands beside it."""
    script = ROOT / "plugin-tests" / "setup" / "install_plugins.sh"
    subprocess.run(["sh", script, TARGET / "nixl" / nixl, tmp_path / "kept"], cwd=ROOT, check=True)
    folder = ("NIXL_PLUGIN_DIR", str(tmp_path / "kept" / "nixl" / "plugins"))
    for backend in ("UCX", "LIBFABRIC"):
        host = Host(nixl=nixl, libfabric=bed.host.libfabric, extra=(folder,))
        first, second = (bed.agent(f"{who}-{backend}", host, backend=backend, progress_thread=True) for who in ("first", "second"))
        source, target = first.buffer(100_000, seed=1), second.buffer(100_000)
        first.knows(second)
        first.transfer("WRITE", [source[:]], [target[:]], second)
        target.check(1)
        if backend == "UCX":
            first.kill(), second.kill()  # the libraries that it brings crash at an orderly exit


@pytest.mark.parametrize("nixl", NIXL_VERSIONS)
def test_machine_with_nothing(bed, nixl, tmp_path):
    """Loads and lists what it can do; creating it says what is missing and how to get it, in one line."""
    agent = bed.process("bare", Host(nixl=nixl, libfabric="system"), wrap=bare(tmp_path))
    agent.create(backend=None)
    for name in NAMES:
        assert name in agent.call("plugins")
        options, kinds = agent.call("plugin_facts", name)
        assert STOCK_OPTIONS <= set(options) and kinds
    with pytest.raises(Refused):
        agent.call("create", "bare", "LIBFABRIC", {}, False, None)
    complaints = [line for line in agent.log_text().splitlines() if "libfabric.so.1" in line]
    assert len(complaints) == 1, agent.log_text()
    assert "ERROR" in complaints[0] and "install" in complaints[0].lower()


def test_libfabric_path_that_is_not_there(bed):
    agent = bed.process("lost")
    with pytest.raises(Refused):
        agent.create(libfabric_path="/nonexistent/libfabric.so.1")
    complaints = [line for line in agent.log_text().splitlines() if "ERROR" in line and "/nonexistent/libfabric.so.1" in line]
    assert len(complaints) == 1, agent.log_text()


@pytest.mark.parametrize("name", NAMES)
def test_needs_only_the_compilers_libraries(name):
    plugin = TARGET / "plugins" / f"libplugin_{name}.so"
    needed = subprocess.run(["readelf", "--dynamic", plugin], check=True, capture_output=True, text=True).stdout
    libraries = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line}
    allowed = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert libraries <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_exports_only_the_two_entry_points(name):
    plugin = TARGET / "plugins" / f"libplugin_{name}.so"
    table = subprocess.run(["nm", "--dynamic", "--defined-only", plugin], check=True, capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in table.splitlines()} == {"nixl_plugin_init", "nixl_plugin_fini"}
