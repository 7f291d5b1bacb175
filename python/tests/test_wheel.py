"""The wheel installed beside NIXL and nothing else, in environments as users have them. Run by `make test-wheel`."""

import email
import json
import os
import subprocess
import textwrap
import zipfile

import pytest
from packaging.metadata import Metadata

from conftest import LIBFABRIC, NIXL

# What vLLM's load_general_plugins and SGLang's load_plugins do with their groups, in every process that they start.
LOAD = """
from importlib.metadata import entry_points
for entry in entry_points(group="{group}"):
    entry.load()()
"""
# An agent with both backends, and the plugin files that NIXL then has loaded.
AGENT = """
import os, sys
from {package} import nixl_agent, nixl_agent_config
agent = nixl_agent("here", nixl_agent_config(backends=[]))
for backend in ("LIBFABRIC", "UCX"):
    agent.create_backend(backend)
paths = {{line.split()[-1] for line in open("/proc/self/maps") if "libplugin_" in line}}
print(*sorted(os.path.realpath(path) for path in paths), flush=True)
os._exit(0)  # the libraries that UCX brings crash at an orderly exit
"""
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")
# Root may write where the mode forbids it; a mount that is read-only stops root, too.
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
# Agents talk over loopback, in a network of their own.
ALONE = ["unshare", "--net", "--map-root-user", "--user", "sh", "-c", 'ip link set lo up && exec "$@"', "alone"]


def read_only(folder):
    return ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", READ_ONLY, "read-only", str(folder)]


def test_the_wheel_holds_the_plugin_under_both_names_and_no_libfabric(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
    shared = {name for name in files if ".so" in name}
    assert shared == {f"nixl_libfabric/plugins/libplugin_{name}.so" for name in ("LIBFABRIC", "Libfabric")}
    assert files["nixl_libfabric/bin/nixl-libfabric"].external_attr >> 16 & 0o111
    assert wheel.stat().st_size < 4_000_000
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")


def test_what_is_compiled_needs_the_old_glibc_and_the_compilers_libraries_only(wheel, tmp_path):
    """build.py lets auditwheel look at the symbol versions; this at the libraries, and at who unwinds."""
    allowed = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if "/plugins/" in name or "/bin/" in name]
        for name in compiled:
            path = archive.extract(name, tmp_path)
            needed = subprocess.run(["readelf", "--dynamic", path], check=True, capture_output=True, text=True).stdout
            assert {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line} <= allowed
            symbols = subprocess.run(["nm", "--dynamic", path], check=True, capture_output=True, text=True).stdout
            # One unwinder in the process, the one that libstdc++ throws with.
            assert "_Unwind_RaiseException@GCC_3.0" in symbols
            glibc = {tuple(map(int, word.split("GLIBC_")[1].split("."))) for word in symbols.split() if "@GLIBC_" in word}
            assert max(glibc) <= (2, 28)
    assert len(compiled) == 3


def test_metadata_is_as_package_indexes_want_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name)
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.name == "nixl-libfabric" and str(metadata.version) == wheel.name.split("-")[1]
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert not metadata.requires_dist and metadata.description_content_type == "text/markdown"
    assert email.message_from_bytes(text).get_payload().startswith("# nixl-libfabric")


@pytest.mark.parametrize("group", GROUPS)
def test_frameworks_find_ours_and_keep_ucx(cu12, group):
    loaded = cu12.code(LOAD.format(group=group) + AGENT.format(package="nixl_cu12"), wrap=ALONE).splitlines()[-1].split()
    assert str(cu12.site / "nixl_libfabric/plugins/libplugin_LIBFABRIC.so") in loaded
    assert str(cu12.site / ".nixl_cu12.mesonpy.libs/plugins/libplugin_UCX.so") in loaded
    assert not any(path.endswith("libs/plugins/libplugin_LIBFABRIC.so") for path in loaded)


def test_without_an_entry_point_nothing_happens(cu12):
    assert "nixl_libfabric" not in cu12.code("import os, nixl_cu12; print(os.environ.get('NIXL_PLUGIN_DIR'))")


def test_a_folder_that_the_user_has_set_stays(cu12, tmp_path):
    text = LOAD.format(group=GROUPS[0]) + "import os, nixl_cu12; print(os.environ['NIXL_PLUGIN_DIR'])"
    assert cu12.code(text, NIXL_PLUGIN_DIR=str(tmp_path)) == str(tmp_path)


def test_the_folder_holds_all_plugins_of_that_nixl(cu12):
    folder = cu12.run(cu12.python, "-m", "nixl_libfabric", "plugin-dir")
    theirs = set(os.listdir(cu12.site / ".nixl_cu12.mesonpy.libs/plugins"))
    assert set(os.listdir(folder)) == theirs | {"libplugin_LIBFABRIC.so", "libplugin_Libfabric.so"}
    assert all(os.path.exists(os.path.join(folder, name)) for name in os.listdir(folder))
    assert cu12.run(cu12.program, "plugin-dir") == folder, "the same each time, by either command"
    assert folder.startswith(str(cu12.home / ".cache"))


@pytest.mark.parametrize("cuda, torch_cuda", [("13", None), ("12", "12.9"), ("13", "13.0")])
def test_two_nixls_as_import_nixl_chooses(both, tmp_path, cuda, torch_cuda):
    """That of torch's CUDA, else the newest. NIXL and we read torch's version without importing it."""
    if torch_cuda:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text("raise ImportError('not needed')")
        (tmp_path / "torch/version.py").write_text(f"cuda: Optional[str] = '{torch_cuda}'\n".replace("Optional[str]", "str"))
    text = LOAD.format(group=GROUPS[0]) + "import os; before = os.environ['NIXL_PLUGIN_DIR']\nimport sys\n" \
        + "import nixl\nprint(nixl._api.__name__, before == os.environ['NIXL_PLUGIN_DIR'], os.path.realpath(before + '/libplugin_UCX.so'))"
    module, same, ucx = both.code(text, PYTHONPATH=str(tmp_path)).split()
    assert module == f"nixl_cu{cuda}._api" and same == "True"
    assert ucx == str(both.site / f".nixl_cu{cuda}.mesonpy.libs/plugins/libplugin_UCX.so")


def test_two_nixls_and_the_other_one_is_imported(both):
    text = LOAD.format(group=GROUPS[0]) + AGENT.format(package="nixl_cu12")
    loaded = both.code(text, wrap=ALONE).splitlines()[-1]
    assert f"{both.site}/.nixl_cu12.mesonpy.libs/plugins/libplugin_UCX.so" in loaded and "cu13" not in loaded


def test_a_nixl_that_comes_later(both):
    """Without one, nothing is set and nothing fails; it is noticed when it is imported."""
    text = textwrap.dedent(f"""
        import os, sys
        site = {str(both.site)!r}
        sys.path.remove(site)
        sys.path.append({str(both.folder / "ours")!r})
        import nixl_libfabric
        nixl_libfabric.activate()
        assert "NIXL_PLUGIN_DIR" not in os.environ
        sys.path.append(site)
        import nixl_cu12
        print(os.path.realpath(os.environ["NIXL_PLUGIN_DIR"] + "/libplugin_UCX.so"))
    """)
    (both.folder / "ours").mkdir(exist_ok=True)
    if not (both.folder / "ours/nixl_libfabric").exists():
        (both.folder / "ours/nixl_libfabric").symlink_to(both.site / "nixl_libfabric")
    assert both.code(text) == str(both.site / ".nixl_cu12.mesonpy.libs/plugins/libplugin_UCX.so")


CHILDREN = """
import multiprocessing, os, subprocess, sys

def answer(pipe):
    import nixl_cu12
    pipe.send(os.environ.get("NIXL_PLUGIN_DIR"))

if __name__ == "__main__":
    import nixl_libfabric
    nixl_libfabric.activate()
    mine = os.environ["NIXL_PLUGIN_DIR"]
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        child = context.Process(target=answer, args=(there,))
        child.start()
        assert here.poll(60) and here.recv() == mine, method
        child.join()
    text = "import os, nixl_cu12; print(os.environ.get('NIXL_PLUGIN_DIR'))"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip() == mine
    print("all")
"""


def test_forked_spawned_and_started_children(cu12, tmp_path):
    (tmp_path / "children.py").write_text(CHILDREN)
    assert cu12.run(cu12.python, tmp_path / "children.py") == "all"


def test_a_worker_on_another_machine_sets_its_own(cu12):
    """Ray hands a worker the driver's environment: a folder that was made here, and is not there."""
    foreign = "/nowhere/.cache/nixl-libfabric-plugins/0123456789abcdef/nixl/plugins"
    text = LOAD.format(group=GROUPS[0]) + "import os; print(os.environ['NIXL_PLUGIN_DIR'])"
    assert cu12.code(text, NIXL_PLUGIN_DIR=foreign) == cu12.run(cu12.program, "plugin-dir")


def test_read_only_site_packages(cu12):
    text = LOAD.format(group=GROUPS[0]) + AGENT.format(package="nixl_cu12")
    loaded = cu12.code(text, wrap=[*ALONE, *read_only(cu12.folder / "venv")], XDG_CACHE_HOME=str(cu12.home / "other"))
    assert f"{cu12.site}/nixl_libfabric/plugins/libplugin_LIBFABRIC.so" in loaded


def test_enabling_a_read_only_environment_says_what_else_to_do(cu12):
    words = cu12.run(cu12.program, "enable", wrap=read_only(cu12.folder / "venv"), fails=True)
    assert str(cu12.site) in words and "NIXL_PLUGIN_DIR=$(" in words


def test_a_home_that_cannot_be_written(cu12, tmp_path):
    folder = cu12.run(cu12.program, "plugin-dir", HOME="/proc/nowhere", TMPDIR=str(tmp_path))
    assert folder.startswith(str(tmp_path)) and os.stat(folder.split("/nixl/plugins")[0]).st_mode & 0o077 == 0


def test_nowhere_to_write_is_a_warning_and_no_failure(cu12):
    text = "import logging, os, sys, tempfile\nlogging.basicConfig(stream=sys.stdout)\ntempfile.tempdir = '/proc/nowhere'\n" \
        "import nixl_libfabric\nnixl_libfabric.activate()\nprint(os.environ.get('NIXL_PLUGIN_DIR'))"
    warning, value = cu12.code(text, HOME="/proc/nowhere").splitlines()
    assert warning.startswith("WARNING") and "XDG_CACHE_HOME" in warning and value == "None"


def test_a_folder_that_others_can_write_is_refused(cu12, tmp_path):
    (tmp_path / "cache/nixl-libfabric-plugins").mkdir(parents=True)
    (tmp_path / "cache/nixl-libfabric-plugins").chmod(0o777)
    folder = cu12.run(cu12.program, "plugin-dir", XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    assert folder.startswith(f"{tmp_path}/nixl-libfabric-plugins-{os.geteuid()}/")


def test_a_damaged_folder_is_made_anew(cu12, tmp_path):
    first = cu12.run(cu12.program, "plugin-dir", XDG_CACHE_HOME=str(tmp_path))
    os.remove(os.path.join(first, "libplugin_UCX.so"))
    assert cu12.run(cu12.program, "plugin-dir", XDG_CACHE_HOME=str(tmp_path)) == first
    assert os.path.exists(os.path.join(first, "libplugin_UCX.so"))


def test_many_processes_make_one_folder(cu12, tmp_path):
    command = [cu12.program, "plugin-dir"]
    variables = cu12.variables(XDG_CACHE_HOME=str(tmp_path))
    running = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    folders = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(folders) == 1 and len(os.listdir(tmp_path / "nixl-libfabric-plugins")) == 1


PEER = """
import os, sys, time
import numpy
from nixl_cu12 import nixl_agent, nixl_agent_config

def agent(name):
    made = nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=["LIBFABRIC"]))
    memory = numpy.zeros(1 << 20, dtype=numpy.uint8)
    made.register_memory(made.get_reg_descs([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM"))
    return made, memory

first, source = agent("first")
second, target = agent("second")
first.add_remote_agent(second.get_agent_metadata())
source[:] = 7
descs = [first.get_xfer_descs([(memory.ctypes.data, memory.nbytes, 0)], "DRAM") for memory in (source, target)]
request = first.initialize_xfer("WRITE", *descs, "second", b"sent")
state = first.transfer(request)
deadline = time.monotonic() + 60
while state == "PROC" and time.monotonic() < deadline:
    state = first.check_xfer_state(request)
print(state, bool((target == 7).all()), any("nixl_libfabric/plugins" in line for line in open("/proc/self/maps")))
"""


def test_enable_moves_bytes_without_one_variable_and_disable_undoes_it(fresh):
    fresh.install("nixl-libfabric")
    assert fresh.run(fresh.program, "disable") == "it was not enabled"
    words = fresh.run(fresh.program, "enable")
    assert "nixl_libfabric_enabled.pth" in words
    assert fresh.code(PEER, wrap=ALONE).splitlines()[-1] == "DONE True True"
    assert "removed" in fresh.run(fresh.program, "disable")
    assert fresh.code("import os, nixl_cu12; print(os.environ.get('NIXL_PLUGIN_DIR'))").endswith("None")


def test_uninstalling_leaves_a_python_that_starts_in_silence(fresh):
    fresh.install("nixl-libfabric")
    fresh.run(fresh.program, "enable")
    folder = fresh.run(fresh.program, "plugin-dir")
    fresh.pip("uninstall", "--yes", "nixl-libfabric")
    assert not (fresh.site / "nixl_libfabric").exists(), "pip took all that it had brought"
    assert fresh.code("import os, nixl_cu12; print(os.environ.get('NIXL_PLUGIN_DIR'))").splitlines()[-1] == "None"
    # A folder that somebody still names leads nowhere for ours, and to UCX as before.
    assert not os.path.exists(f"{folder}/libplugin_LIBFABRIC.so") and os.path.exists(f"{folder}/libplugin_UCX.so")
    fresh.install("nixl-libfabric")
    assert "nixl-libfabric-plugins" in fresh.code("import os, nixl_cu12; print(os.environ.get('NIXL_PLUGIN_DIR'))")


def test_the_doctor_knows_the_nixl_of_its_python(cu12, tmp_path):
    """By the command and by -m; the folder is that which vLLM and SGLang would set."""
    for command in ([cu12.program], [cu12.python, "-m", "nixl_libfabric"]):
        report = json.loads(cu12.run(*command, "doctor", "--json", "--watch", "0"))
        findings = {finding["check"]: finding for finding in report["findings"]}
        assert findings["nixl"]["verdict"] == "OK" and findings["nixl"]["seen"].startswith(NIXL)
        assert findings["plugin"]["verdict"] == "OK" and cu12.run(cu12.program, "plugin-dir") in findings["plugin"]["seen"]
        assert findings["libfabric"]["verdict"] == "OK" and str(LIBFABRIC) in findings["libfabric"]["seen"]
    own = cu12.site / ".nixl_cu12.mesonpy.libs" / "plugins"
    words = cu12.run(cu12.program, "doctor", "--watch", "0", NIXL_PLUGIN_DIR=str(own), fails=True)
    assert "FAIL  plugin" in words and "is not this plugin" in words


def test_commands_say_what_is_wrong(fresh):
    fresh.install("nixl-libfabric")
    assert "takes no arguments" in fresh.run(fresh.program, "enable", "now", fails=True)
    assert "plugin-dir" in fresh.run(fresh.program, "--help") and "topology" in fresh.run(fresh.program, "--help")
    json.loads(fresh.run(fresh.program, "topology", "--json"))
    fresh.pip("uninstall", "--yes", "nixl-cu12")
    assert "pip install nixl-cu12" in fresh.run(fresh.program, "plugin-dir", fails=True)
