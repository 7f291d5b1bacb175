#!/usr/bin/env python3
"""Makes the topology fixtures of machines.json.

For each machine: NAME.xml as hwloc 2 exports it, NAME.sysfs, the same machine as the kernel's files (one line for
each NUMA node and PCI function; tests unpack it into a directory), and NAME.devices, what libfabric offers there
(name, PCI address or -, line speed in Gb/s). A pod has a list of devices of its own and its machine's other files.

    generate.py            writes fixtures/
    generate.py --check    says which files are stale, and fails if any is

hwloc built without libxml2 reads XML with a parser that takes only what hwloc itself writes: one attribute style,
no comments. Hence the form.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUS_PER_NODE = 4


class Address:
    """A PCI address."""

    def __init__(self, text):
        self.domain, self.bus, self.device, self.function = (
            int(part, 16) for part in re.fullmatch(r"(\w{4}):(\w\w):(\w\w)\.(\w)", text).groups()
        )
        self.text = text


def link_gbytes(link):
    """Speed of a link in GB/s, as hwloc computes it from the kernel's words."""
    if link is None:
        return 0.0
    rate, lanes = link
    return rate * lanes * (8 / 10 if rate <= 5 else 128 / 130) / 8


def link_words(link):
    """current_link_speed and current_link_width."""
    return ("Unknown", 0) if link is None else (f"{float(link[0])} GT/s PCIe", link[1])


def rdma_name(address):
    """The name that rdma-core gives an RDMA device by its place."""
    domain = f"P{address.domain}" if address.domain else ""
    function = f"f{address.function}" if address.function else ""
    return f"rdma{domain}p{address.bus}s{address.device}{function}"


def devices_of(root, machine, kinds):
    """Devices of a root in PCI order, with kind, link and name."""
    found = []
    for entry in root["devices"]:
        name, link = None, machine.get("links", {}).get(entry[0])
        for extra in entry[2:]:
            if isinstance(extra, str):
                name = extra
            else:
                link = extra
        kind, address = kinds[entry[0]], Address(entry[1])
        if name is None and kind.get("rdma"):
            name = rdma_name(address)
        found.append({"of": entry[0], "kind": kind, "address": address, "link": link, "name": name})
    return found


def bridges_of(root, devices):
    """Chain of bridges above all devices of a root, then the port of each device: (address, link, buses)."""
    domain, bus = root["bus"][:4], int(root["bus"][5:], 16)
    last = max(device["address"].bus for device in devices)
    if "switch" in root:
        chain = [(f"{domain}:{bus + at:02x}:00.0", root["switch"], (bus + at + 1, last)) for at in range(2)]
        ports = [f"{domain}:{bus + 2:02x}:{index // 8:02x}.{index % 8}" for index in range(len(devices))]
    elif "port" in root:
        chain = []
        ports = [f"{domain}:{bus:02x}:{index // 8:02x}.{index % 8}" for index in range(len(devices))]
    else:
        return [], [None] * len(devices)
    below = [device["address"].bus for device in devices]
    return chain, [(port, device["link"], (at, at)) for port, device, at in zip(ports, devices, below)]


class Xml:
    """Writes hwloc's XML."""

    def __init__(self):
        self.lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<!DOCTYPE topology SYSTEM "hwloc2.dtd">', '<topology version="2.0">']
        self.depth, self.index = 1, 0

    def open(self, what, /, close=False, **attributes):
        self.index += 1
        attributes["gp_index"] = self.index
        words = "".join(f' {name}="{value}"' for name, value in attributes.items())
        self.lines.append(f'{"  " * self.depth}<object type="{what}"{words}{"/" if close else ""}>')
        if not close:
            self.depth += 1

    def close(self):
        self.depth -= 1
        self.lines.append(f'{"  " * self.depth}</object>')

    def text(self):
        return "\n".join(self.lines + ["</topology>", ""])


def mask(bits):
    """hwloc's notation of a set."""
    value = sum(1 << bit for bit in bits)
    words = []
    while True:
        words.append(f"0x{value & 0xffffffff:08x}")
        value >>= 32
        if not value:
            return ",".join(reversed(words))


def sets(machine, ids):
    """cpuset and nodeset attributes of a part of the machine that holds these nodes and what is beside them."""
    homes = [node["id"] for node in machine["nodes"] if "beside" not in node]
    cpus = [homes.index(id) * CPUS_PER_NODE + cpu for id in ids for cpu in range(CPUS_PER_NODE)]
    nodes = [node["id"] for node in machine["nodes"] if node["id"] in ids or node.get("beside") in ids]
    cpuset, nodeset = mask(cpus), mask(nodes)
    return {"cpuset": cpuset, "complete_cpuset": cpuset, "nodeset": nodeset, "complete_nodeset": nodeset}


def write_root(xml, root, machine, kinds):
    devices = devices_of(root, machine, kinds)
    chain, ports = bridges_of(root, devices)
    domain, bus = root["bus"].split(":")
    last = max(device["address"].bus for device in devices)

    def bridge(port, depth):
        address, link, (first, final) = port
        xml.open("Bridge", bridge_type="1-1", depth=depth, bridge_pci=f"{address[:4]}:[{first:02x}-{final:02x}]",
                 pci_busid=address, pci_type="0604 [1d0f:0200] [1d0f:0200] 00", pci_link_speed=f"{link_gbytes(link):.6f}")

    xml.open("Bridge", bridge_type="0-1", depth=0, bridge_pci=f"{domain}:[{bus}-{last:02x}]")
    for depth, port in enumerate(chain):
        bridge(port, depth + 1)
    for device, port in zip(devices, ports):
        if port:
            bridge(port, len(chain) + 1)
        kind = device["kind"]
        xml.open("PCIDev", close=not device["name"], pci_busid=device["address"].text,
                 pci_type=f"{kind['class']} [{kind['id']}] [0000:0000] 00", pci_link_speed=f"{link_gbytes(device['link']):.6f}")
        if device["name"]:
            xml.open("OSDev", close=True, name=device["name"], osdev_type=3 if kind["rdma"] else 2)
            xml.close()
        if port:
            xml.close()
    for _ in chain:
        xml.close()
    xml.close()


def write_xml(machine, kinds):
    xml = Xml()
    homes = [node for node in machine["nodes"] if "beside" not in node]
    everything = sets(machine, [node["id"] for node in homes])
    xml.open("Machine", os_index=0, allowed_cpuset=everything["cpuset"], allowed_nodeset=everything["nodeset"], **everything)
    packages = {}
    for node in homes:
        packages.setdefault(node.get("package", node["id"]), []).append(node)
    for package, nodes in packages.items():
        xml.open("Package", os_index=package, **sets(machine, [node["id"] for node in nodes]))
        for node in nodes:
            part = sets(machine, [node["id"]])
            if len(nodes) > 1:
                xml.open("Group", kind=0, subkind=0, **part)
            for memory in machine["nodes"]:
                if node["id"] in (memory["id"], memory.get("beside")):
                    own = dict(part, nodeset=mask([memory["id"]]), complete_nodeset=mask([memory["id"]]))
                    xml.open("NUMANode", close=True, os_index=memory["id"], local_memory=memory["gib"] << 30, **own)
            for cpu in range(CPUS_PER_NODE):
                at = mask([homes.index(node) * CPUS_PER_NODE + cpu])
                own = dict(part, cpuset=at, complete_cpuset=at)
                xml.open("PU", close=True, os_index=homes.index(node) * CPUS_PER_NODE + cpu, **own)
            for root in machine["roots"]:
                if root["node"] == node["id"]:
                    write_root(xml, root, machine, kinds)
            if len(nodes) > 1:
                xml.close()
        xml.close()
    for root in machine["roots"]:
        if root["node"] is None:
            write_root(xml, root, machine, kinds)
    xml.close()
    if "distances" in machine:
        count = len(machine["nodes"])
        ids = "".join(f"{node['id']} " for node in machine["nodes"])
        values = "".join(f"{value} " for row in machine["distances"] for value in row)
        xml.lines.append(f'  <distances2 type="NUMANode" nbobjs="{count}" kind="5" name="NUMALatency" indexing="os">')
        xml.lines.append(f'    <indexes length="{len(ids)}">{ids}</indexes>')
        xml.lines.append(f'    <u64values length="{len(values)}">{values}</u64values>')
        xml.lines.append("  </distances2>")
    return xml.text()


def write_sysfs(machine, kinds):
    lines = []
    nodes = machine["nodes"]
    rows = machine.get("distances") or [[10 if a is b else 20 for b in nodes] for a in nodes]
    for node, row in zip(nodes, rows):
        lines.append(f"node {node['id']} {node['gib'] << 20} {','.join(map(str, row))}")

    def function(path, id, kind_class, node, link, name="-", rdma=False):
        speed, lanes = link_words(link)
        vendor, device = id.split(":")
        where = "infiniband" if rdma else "net"
        lines.append(f"pci {path} 0x{vendor} 0x{device} 0x{kind_class}00 {node} {lanes} {where}={name} {speed}")

    for root in machine["roots"]:
        node = -1 if root["node"] is None else root["node"]
        devices = devices_of(root, machine, kinds)
        chain, ports = bridges_of(root, devices)
        path = f"pci{root['bus']}"
        for address, link, _ in chain:
            path += f"/{address}"
            function(path, "1d0f:0200", "0604", node, link)
        for device, port in zip(devices, ports):
            own = path
            if port:
                own += f"/{port[0]}"
                function(own, "1d0f:0200", "0604", node, port[1])
            kind = device["kind"]
            function(f"{own}/{device['address'].text}", kind["id"], kind["class"], node, device["link"],
                     device["name"] or "-", kind.get("rdma", False))
    return "\n".join(lines) + "\n"


def write_devices(machine, kinds, wanted=None):
    offered = machine["libfabric"]
    lines = []
    for root in machine["roots"]:
        for device in devices_of(root, machine, kinds):
            if device["of"] != offered["kind"] or (wanted and device["address"].text not in wanted):
                continue
            software = offered.get("software", False)
            suffix = "-rdm" if offered["kind"].startswith("efa") else ""
            lines.append(f"{device['name']}{suffix} {'-' if software else device['address'].text} {offered['gbps']}")
    return "\n".join(lines) + "\n"


def fixtures():
    table = json.loads((HERE / "machines.json").read_text())
    kinds = table["kinds"]
    for machine in table["machines"]:
        name = machine["name"]
        yield f"{name}.xml", write_xml(machine, kinds)
        yield f"{name}.sysfs", write_sysfs(machine, kinds)
        yield f"{name}.devices", write_devices(machine, kinds)
        for pod in machine.get("pods", []):
            yield f"{pod['name']}.devices", f"machine {name}\n" + write_devices(machine, kinds, pod["devices"])


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    folder = HERE / "fixtures"
    folder.mkdir(exist_ok=True)
    wanted = dict(fixtures())
    stale = [path.name for path in folder.iterdir() if path.name not in wanted]
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if not check:
        print(f"{len(wanted)} files, {len(stale)} changed")
    elif stale:
        sys.exit("stale, run generate.py: " + ", ".join(sorted(stale)))


if __name__ == "__main__":
    main()
