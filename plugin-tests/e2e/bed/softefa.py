"""Hosts with software EFA devices: libfabric's real efa provider above them. See plugin-tests/softefa/README.md."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from bed.places import TARGET

PROGRAM = Path(os.environ.get("SOFTEFA_ENV", TARGET / "release" / "softefa-env"))
# Devices look at the control file, and write their counters, every 50 ms; nothing tells that they did.
LOOK_S = 0.2


class SoftHost:
    """One host: the processes on it share its devices."""

    def __init__(self, network, name, devices):
        self.network, self.name, self.devices = network, name, devices

    def _command(self):
        network = self.network
        return [
            str(PROGRAM), "--dir", str(network.folder), "--topology", network.topology, "--host", self.name,
            "--devices", str(self.devices), "--seed", str(network.seed),
            *(["--trace"] if network.trace else []), *(["--shm"] if network.shm else []),
        ]

    def enter(self):
        """The command line that runs what follows it on this host."""
        # The loader may not take the variables of the host for those of the programs on the way.
        return ["env", f"NIXL_LIBFABRIC_FABRIC={self.network.fabric}", *self._command(), "--hwloc", "--"]

    def counters(self):
        """The devices' counters as of now: {device: {name: value}}."""
        text = subprocess.run([*self._command(), "counters"], check=True, capture_output=True, text=True).stdout
        table = {}
        for line in text.splitlines():
            device, name, value = line.split()
            table.setdefault(device, {})[name] = int(value)
        return table


class SoftEfa:
    """A network in which each agent is on a host of its own: h0, h1, ... unless `hosts` limits them."""

    links = 0

    def __init__(self, devices=4, fabric="efa", topology="p5.48xlarge", seed=1, hosts=None, trace=False, shm=False):
        self.fabric, self.topology, self.seed, self.trace = fabric, topology, seed, trace
        self.devices, self.hosts, self.shm = devices, hosts, shm
        self.folder = Path(tempfile.mkdtemp(prefix="softefa-", dir="/dev/shm"))

    @property
    def writes(self):
        """Whether the devices have RDMA write. A p4d's have not: libfabric lets the target read what is written."""
        return not self.topology.startswith("p4d")

    def host(self, index, devices=None):
        return SoftHost(self, f"h{index}", devices or self.devices)

    def space(self, index):
        return self.host(index % self.hosts if self.hosts else index)

    def control(self, *lines):
        """Replaces the faults; without lines there are none."""
        following = self.folder / ".control"
        following.write_text("".join(f"{line}\n" for line in lines))
        following.rename(self.folder / "control")
        time.sleep(LOOK_S)

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)
