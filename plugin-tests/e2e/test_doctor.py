"""`nixl-libfabric doctor` names what is wrong: one fault at a time on a machine that is otherwise well."""

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from bed.ailing import DEVICES, NIXL, Ailing, Metadata
from bed.places import ROOT, TARGET
from bed.softefa import SoftEfa

pytestmark = [pytest.mark.ours]


@pytest.fixture(scope="module")
def soft():
    network = SoftEfa(DEVICES)
    yield network
    network.close()


@pytest.fixture(scope="module")
def metadata():
    with Metadata() as service:
        yield service


@pytest.fixture
def machine(soft, metadata, tmp_path):
    return Ailing(soft, tmp_path, metadata)


def compiled(folder, name, source, *flags):
    """A small shared library."""
    text = folder / f"{name}.c"
    text.write_text(textwrap.dedent(source))
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", folder / name, text, *flags], check=True)
    return folder / name


def no_libfabric(machine):
    machine.variables["NIXL_LIBFABRIC_LIBFABRIC_PATH"] = "/nowhere/libfabric.so.1"


def libfabric_too_old(machine):
    functions = "fi_getinfo@@FABRIC_1.3 fi_freeinfo@@FABRIC_1.3 fi_fabric@@FABRIC_1.1 fi_strerror@@FABRIC_1.0".split()
    source = "".join(f'__asm__(".symver old_{name.split("@")[0]}, {name}");\nint old_{name.split("@")[0]}(void) {{ return -61; }}\n' for name in functions)
    source += '__asm__(".symver old_fi_version, fi_version@@FABRIC_1.0");\nint old_fi_version(void) { return 1 << 16 | 10; }\n'
    (machine.folder / "old.map").write_text("FABRIC_1.0 { global: fi_*; local: *; };\nFABRIC_1.1 {} FABRIC_1.0;\nFABRIC_1.3 {} FABRIC_1.1;\n")
    old = compiled(machine.folder, "libfabric.so.1", source, f"-Wl,--version-script={machine.folder}/old.map")
    machine.variables["NIXL_LIBFABRIC_LIBFABRIC_PATH"] = str(old)


def libfabric_that_crashes(machine):
    crash = compiled(machine.folder, "libfabric.so.1", "__attribute__((constructor)) void start(void) { *(volatile int *)0 = 1; }")
    machine.variables["NIXL_LIBFABRIC_LIBFABRIC_PATH"] = str(crash)


def libfabric_without_efa(machine):
    """The library without the folder of its providers."""
    (machine.folder / "thin").mkdir()
    shutil.copy(Path(machine.variables["LD_LIBRARY_PATH"]) / "libfabric.so.1", machine.folder / "thin")
    machine.variables["LD_LIBRARY_PATH"] = str(machine.folder / "thin")


def second_libfabric(machine):
    """NCCL's plugin, linked with a libfabric of its own."""
    other = TARGET / "libfabric" / "2.4.0"
    flags = [f"-L{other}", "-l:libfabric.so.1", f"-Wl,-rpath,{other}", "-Wl,--disable-new-dtags", "-Wl,--no-as-needed"]
    flags = [flags[0], flags[4], flags[1], *flags[2:4]]
    net = compiled(machine.folder, "libnccl-net.so", "int ncclNetPlugin_v8;", *flags)
    machine.variables["LD_LIBRARY_PATH"] += f":{net.parent}"


def no_driver(machine):
    shutil.rmtree(machine.root / "sys/class/infiniband_verbs")
    (machine.root / "sys/class/infiniband").unlink()


def no_device_in_the_container(machine):
    shutil.rmtree(machine.root / "dev/infiniband")


def fewer_devices_in_the_container(machine):
    (machine.root / "dev/infiniband/uverbs3").unlink()


def forbidden_device(machine):
    # Root may open every file; a folder of that name nobody can open for writing.
    (machine.root / "dev/infiniband/uverbs2").unlink()
    (machine.root / "dev/infiniband/uverbs2").mkdir()


def port_down(machine):
    link = machine.root / "sys/class/infiniband"
    link.unlink()
    shutil.copytree(machine.sysfs / "class/infiniband", link, symlinks=True)
    device = sorted(os.listdir(link))[1]
    machine.write(f"sys/class/infiniband/{device}/ports/1/state", "1: DOWN\n")


def little_locked_memory(machine):
    """The doctor's own limit, as the kernel says it."""
    shutil.rmtree(machine.root / "proc")
    (machine.root / "proc").symlink_to("/proc")
    machine.prefix = ["prlimit", f"--memlock={64 << 10}"]


def some_locked_memory(machine):
    machine.write("proc/self/limits", f"Max locked memory  {8 << 30}  {8 << 30}  bytes\n")


def huge_pages_forbidden(machine):
    machine.write("sys/fs/cgroup/hugetlb.2MB.max", "0\n")


def no_huge_pages(machine):
    machine.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n")


def set_to(name, value):
    return lambda machine: machine.variables.__setitem__(name, value)


def no_plugin(machine):
    shutil.rmtree(machine.plugins)


def stock_plugin(machine):
    machine.variables["NIXL_PLUGIN_DIR"] = ""


def damaged_plugin(machine):
    path = machine.plugins / "libplugin_LIBFABRIC.so"
    path.write_bytes(path.read_bytes()[:200_000])


def plugin_of_an_uninstalled_package(machine):
    (machine.plugins / "libplugin_LIBFABRIC.so").unlink()
    (machine.plugins / "libplugin_LIBFABRIC.so").symlink_to("/nowhere/libplugin_LIBFABRIC.so")


def plugin_of_another_interface(machine):
    source = 'const char marker[] = "NIXL_LIBFABRIC_"; static int table[16] = {2}; void *nixl_plugin_init(void) { return table; }'
    built = compiled(machine.folder, "other.so", source)
    shutil.copy(built, machine.plugins / "libplugin_LIBFABRIC.so")


def newer_nixl(machine):
    core = machine.folder / "site" / ".nixl_cu12.mesonpy.libs"
    core.mkdir(parents=True)
    (machine.folder / "site" / "nixl_cu12-2.0.0.dist-info").mkdir()
    machine.options = ["--nixl", str(core)]


def gpus_without_cuda_in_libfabric(machine):
    """Two GPUs of the stand-in for CUDA; the libfabric here is built without it, and libcudart.so has no such link."""
    subprocess.run(["sh", ROOT / "plugin-tests/cuda-standin/build.sh", machine.folder / "cuda"], check=True)
    (machine.folder / "cuda" / "libcudart.so").unlink()
    machine.variables |= {"NIXL_LIBFABRIC_LIBCUDA": str(machine.folder / "cuda" / "libcuda.so.1"), "CUDA_STANDIN_DEVICES": "2"}


def driver_without_gpu(machine):
    gpus_without_cuda_in_libfabric(machine)
    machine.variables["CUDA_STANDIN_FAIL"] = "cuInit:1:100"


# The fault; the check that names it, how bad it is, and words of what is seen and of the remedy.
FAULTS = {
    "no libfabric": (no_libfabric, "libfabric", "FAIL", "/nowhere/libfabric.so.1", "EFA installer"),
    "libfabric too old": (libfabric_too_old, "libfabric", "FAIL", "libfabric 1.10, the oldest that works is 1.17", ""),
    "libfabric that crashes": (libfabric_that_crashes, "libfabric", "FAIL", "signal: 11", ""),
    "libfabric without efa": (libfabric_without_efa, "provider", "FAIL", "offers none of them", "/opt/amazon/efa"),
    "a second libfabric": (second_libfabric, "second-libfabric", "WARN", "libfabric/2.4.0/", "NIXL_LIBFABRIC_LIBFABRIC_PATH="),
    "no efa driver": (no_driver, "rdma-devices", "FAIL", "4 EFA devices on PCI, and 0", "modprobe efa"),
    "no device in the container": (no_device_in_the_container, "device-files", "FAIL", "no file", "vpc.amazonaws.com/efa"),
    "fewer devices in the container": (fewer_devices_in_the_container, "device-files", "WARN", "3 of 4", "vpc.amazonaws.com/efa"),
    "a device that may not be opened": (forbidden_device, "device-files", "FAIL", "uverbs2", "--device"),
    "a port that is down": (port_down, "ports", "FAIL", "DOWN", "rdma link"),
    "locked memory of 64 KiB": (little_locked_memory, "locked-memory", "FAIL", "64 KiB", "memlock"),
    "locked memory of 8 GiB": (some_locked_memory, "locked-memory", "WARN", "8192 MiB", "unlimited"),
    "huge pages forbidden": (huge_pages_forbidden, "huge-pages", "FAIL", "SIGBUS", "hugepages-2Mi"),
    "no huge pages": (no_huge_pages, "huge-pages", "WARN", "0 of 5120", "hugepages-2Mi"),
    "FI_PROVIDER excludes efa": (set_to("FI_PROVIDER", "tcp"), "environment", "WARN", "FI_PROVIDER=tcp", "unset"),
    "RDMA turned off": (set_to("FI_EFA_USE_DEVICE_RDMA", "0"), "environment", "WARN", "FI_EFA_USE_DEVICE_RDMA", "unset"),
    "an option misspelt": (
        set_to("NIXL_LIBFABRIC_REQUIRE_RMDA", "true"), "environment", "WARN", "REQUIRE_RMDA", "NIXL_LIBFABRIC_REQUIRE_RDMA?"),
    "an option out of range": (set_to("NIXL_LIBFABRIC_MAX_RAILS", "many"), "environment", "FAIL", "many", "unset"),
    "not among vLLM's plugins": (set_to("VLLM_PLUGINS", "other"), "environment", "WARN", "VLLM_PLUGINS", "plugin-dir"),
    "no plugin in the folder": (no_plugin, "plugin", "FAIL", "no libplugin_LIBFABRIC.so", "NIXL looks nowhere else"),
    "NIXL's own plugin": (stock_plugin, "plugin", "FAIL", "is not this plugin", "NIXL_PLUGIN_DIR"),
    "a damaged plugin": (damaged_plugin, "plugin", "FAIL", "does not load", "anew"),
    "an uninstalled plugin": (plugin_of_an_uninstalled_package, "plugin", "FAIL", "No such file", "a link that leads nowhere"),
    "a plugin of another interface": (plugin_of_another_interface, "plugin", "FAIL", "interface version 2", ""),
    "a newer NIXL": (newer_nixl, "nixl", "WARN", "2.0.0", "newer plugin"),
    "a driver without GPU": (driver_without_gpu, "gpu-driver", "FAIL", "no GPU is visible", "nvidia-smi"),
    "libfabric without CUDA": (gpus_without_cuda_in_libfabric, "gpu-memory", "WARN", "FI_HMEM", "libcudart.so"),
}


def test_a_healthy_machine_is_called_so(machine):
    findings, status = machine.examine()
    bad = [finding for group in findings.values() for finding in group if finding["verdict"] in ("WARN", "FAIL")]
    assert bad == [] and status == 0
    assert findings["provider"][0]["seen"].startswith("efa on rdmap79s0-rdm, rdmap80s0-rdm, rdmap81s0-rdm, rdmap82s0-rdm;")
    assert [finding["verdict"] for finding in findings["plugin"]] == ["OK", "OK"]
    assert findings["nixl"][0]["seen"].startswith("1.5.0 ")
    # The security group cannot be seen from the instance, so the command to look at it is given.
    assert "--group-ids sg-0123456789abcdef0" in findings["security-group"][0]["seen"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(machine, fault):
    spoil, check, verdict, seen, remedy = FAULTS[fault]
    spoil(machine)
    findings, status = machine.examine()
    named = [finding for finding in findings.get(check, []) if finding["verdict"] == verdict]
    assert named, findings
    assert any(seen in finding["seen"] and remedy in finding["remedy"] for finding in named), named
    assert status == any(finding["verdict"] == "FAIL" for group in findings.values() for finding in group)


def test_a_secondary_block_is_named(soft, tmp_path):
    with Metadata(subnet="100.64.1.0/24") as service:
        findings, status = Ailing(soft, tmp_path, service).examine()
    (finding,) = findings["vpc"]
    assert finding["verdict"] == "FAIL" and "100.64.1.0/24" in finding["seen"] and "primary" in finding["remedy"] and status == 1


def test_a_metadata_service_that_does_not_answer(soft, metadata, tmp_path):
    machine = Ailing(soft, tmp_path, metadata)
    machine.variables["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://127.0.0.1:1"
    findings, _ = machine.examine()
    assert findings["vpc"][0]["verdict"] == "SKIP" and "hop limit" in findings["vpc"][0]["seen"]


def test_the_words_for_people_are_the_same(machine):
    done = subprocess.run(
        machine.command("--watch", "0", "--root", str(machine.root), "--nixl", str(NIXL)),
        env=machine.environment(), capture_output=True, text=True, timeout=90,
    )
    assert "OK    libfabric       2.5 (" in done.stdout and done.stdout.rstrip().splitlines()[-1].endswith("FAIL")


class Pair:
    """Two hosts, each with a doctor that meets the other's; the connection between them goes over loopback."""

    def __init__(self, soft, tmp_path, metadata):
        self.listener, self.caller = Ailing(soft, tmp_path / "listener", metadata, 0), Ailing(soft, tmp_path / "caller", metadata, 1)

    def meet(self):
        """Both sides' findings, each with its exit status."""
        listener = self.listener.start("--listen", "--port", "0", "--json")
        try:
            port = listener.stderr.readline().split("port ")[1].split()[0]
            caller = self.caller.start("--to", "127.0.0.1", "--port", port, "--json")
            return [self.result(process) for process in (listener, caller)]
        finally:
            listener.kill()

    @staticmethod
    def result(process):
        out, complaints = process.communicate(timeout=90)
        assert process.returncode in (0, 1), complaints
        return json.loads(out)["findings"], process.returncode


@pytest.fixture
def pair(metadata, tmp_path):
    network = SoftEfa(DEVICES)
    yield Pair(network, tmp_path, metadata)
    network.close()


def test_two_hosts_move_bytes_by_every_pair_of_rails(pair):
    for findings, status in pair.meet():
        assert [finding["verdict"] for finding in findings] == ["OK"] and status == 0
        assert "4 by 4 rails: every pair" in findings[0]["seen"]


def test_the_pair_that_drops_is_named_by_both(pair):
    pair.caller.host.network.control("src=h1/rdmap80s0 dst=h0/rdmap82s0 drop_pct=100 unreachable_ms=never")
    (heard, heard_status), (called, called_status) = pair.meet()
    assert heard_status == called_status == 1
    lost, answers = "rdmap80s0-rdm {} to rdmap82s0-rdm {}: nothing arrives", "rdmap82s0-rdm {} to rdmap80s0-rdm {}: nothing arrives"
    there = "on 127.0.0.1"
    assert any(finding["seen"].startswith(lost.format("here", there)) for finding in called), called
    assert any(finding["seen"].startswith(lost.format(there, "here")) for finding in heard), heard
    # The efa provider's handshake wants both directions, so the way back fails, too; no other pair does.
    possible = {lost.format("here", there), lost.format(there, "here"), answers.format("here", there), answers.format(there, "here")}
    assert all(any(finding["seen"].startswith(words) for words in possible) for finding in heard + called), heard + called
    assert all("aws ec2 describe-security-groups" in finding["remedy"] for finding in heard + called)


def test_a_network_that_drops_shows_in_the_counters_of_the_sender(pair):
    """What a wrong security group does: packets leave, none arrives, and nobody is told for seconds."""
    pair.caller.host.network.control("dst=h0 drop_pct=100 unreachable_ms=1000")
    listener = pair.listener.start("--listen", "--port", "0")
    port = listener.stderr.readline().split("port ")[1].split()[0]
    caller = pair.caller.start("--to", "127.0.0.1", "--port", port)
    findings, _ = pair.caller.examine(watch=6)
    (finding,) = findings["counters"]
    for process in (listener, caller):
        process.kill(), process.communicate()
    assert finding["verdict"] == "FAIL" and "given up" in finding["seen"], finding
    assert "aws ec2 describe-security-groups" in finding["remedy"]


def test_hosts_that_do_not_meet_are_told(pair):
    pair.listener.prefix = ["env", "NIXL_LIBFABRIC_FABRIC=efa-direct"]
    for findings, status in pair.meet():
        assert status == 1 and "they do not meet" in findings[0]["seen"], findings


def test_nobody_listens(machine):
    done = subprocess.run(machine.command("--to", "127.0.0.1", "--port", "1"), env=machine.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "doctor --listen" in done.stderr
