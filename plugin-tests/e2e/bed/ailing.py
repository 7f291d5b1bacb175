"""A machine for the doctor: four software EFA devices and files like a healthy instance's, which a test then spoils."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

from bed.places import TARGET, VERSIONS

DOCTOR = Path(os.environ.get("DOCTOR", TARGET / "release" / "nixl-libfabric"))
DEVICES = 4
NIXL = TARGET / "nixl" / "1.5.0" / ".nixl_cu12.mesonpy.libs"
DEADLINE_S = 90


class Metadata(contextlib.AbstractContextManager):
    """The instance metadata service of an instance with one interface, on loopback."""

    def __init__(self, subnet="10.0.1.0/24", primary="10.0.0.0/16"):
        mac = "/latest/meta-data/network/interfaces/macs/"
        answers = {
            mac: "02:00:00:00:00:01/",
            f"{mac}02:00:00:00:00:01/subnet-ipv4-cidr-block": subnet,
            f"{mac}02:00:00:00:00:01/vpc-ipv4-cidr-block": primary,
            f"{mac}02:00:00:00:00:01/security-group-ids": "sg-0123456789abcdef0",
            "/latest/meta-data/instance-type": "p5.48xlarge",
        }

        class Service(http.server.BaseHTTPRequestHandler):
            def do_PUT(self):
                known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer("a-token" if known else None)

            def do_GET(self):
                known = self.headers["X-aws-ec2-metadata-token"] == "a-token"
                self.answer(answers.get(self.path) if known else None)

            def answer(self, text):
                self.send_response(200 if text else 404)
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Ailing:
    """What a test may spoil: files below `root`, `variables`, `prefix` (a command before the doctor's) and `options`."""

    def __init__(self, network, folder, metadata, host=0):
        self.host, self.root, self.folder = network.host(host, DEVICES), folder / "root", folder
        described = subprocess.run([*self.host.enter(), "env"], check=True, capture_output=True, text=True).stdout
        described = dict(line.split("=", 1) for line in described.splitlines() if "=" in line)
        self.sysfs = Path(described["SYSFS_PATH"])
        libfabric = TARGET / "libfabric" / list(VERSIONS["libfabric"])[-1]
        plugins = folder / "plugins"
        shutil.copytree(os.environ.get("PLUGIN_DIR", TARGET / "plugins"), plugins)
        self.variables = {
            "LD_LIBRARY_PATH": str(libfabric),
            "NIXL_PLUGIN_DIR": str(plugins),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.endpoint,
        }
        self.plugins, self.prefix, self.options = plugins, [], []
        self._files()

    def _files(self):
        root = self.root
        (root / "sys").mkdir(parents=True)
        self.write("proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax locked memory  unlimited  unlimited  bytes\n")
        for index in range(DEVICES):
            self.write(f"dev/infiniband/uverbs{index}", "")
            self.write(f"sys/class/infiniband_verbs/uverbs{index}/ibdev", sorted(os.listdir(self.sysfs / "class/infiniband"))[index])
        (root / "sys/class/infiniband").symlink_to(self.sysfs / "class/infiniband")
        (root / "sys/bus").symlink_to(self.sysfs / "bus")
        self.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "5120")
        self.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "5000")
        (root / "sys/module/nvidia_peermem").mkdir(parents=True)

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def command(self, *arguments):
        return [*self.host.enter(), *self.prefix, str(DOCTOR), "doctor", *arguments]

    def environment(self):
        foreign = ("NIXL_", "FI_", "VLLM_", "SGLANG_", "NCCL_", "AWS_", "LD_")
        return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | self.variables

    def start(self, *arguments):
        """A doctor that goes on while the test does."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*arguments), env=self.environment(), stdout=pipe, stderr=pipe, text=True)

    def examine(self, watch=0):
        """The findings, as {check: [finding, ...]}, and the exit status."""
        done = subprocess.run(
            self.command("--json", "--watch", str(watch), "--root", str(self.root), "--nixl", str(NIXL), *self.options),
            env=self.environment(), capture_output=True, text=True, timeout=DEADLINE_S,
        )
        assert done.returncode in (0, 1), done.stderr
        findings = {}
        for finding in json.loads(done.stdout)["findings"]:
            findings.setdefault(finding["check"], []).append(finding)
        return findings, done.returncode
