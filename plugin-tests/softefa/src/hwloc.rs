//! The machine of an instance type as hwloc's XML, so that topology code sees the PCI tree that goes with the devices.

use std::fmt::Write as _;

use crate::topology::{Group, Pci, Topology};

/// CPUs of each NUMA node in the picture.
const CPUS_PER_NODE: u32 = 4;
/// PCI classes: network controller, 3D controller, bridge.
const NETWORK: u32 = 0x0200;
const CONTROLLER_3D: u32 = 0x0302;
const NVIDIA_H100: u32 = 0x2330;

/// hwloc 2 XML: packages with a NUMA node and cores each, and below them the groups' bridges, EFA devices and GPUs.
pub fn xml(topology: &Topology) -> String {
    let mut out = Writer { text: String::new(), index: 0 };
    let all = mask(0, topology.numa_nodes * CPUS_PER_NODE);
    let nodes = mask(0, topology.numa_nodes);
    out.text.push_str(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n<topology version=\"2.0\">\n",
    );
    out.open("Machine", &format!("os_index=\"0\" {}", sets(&all, &nodes)));
    for node in 0..topology.numa_nodes {
        let cpus = mask(node * CPUS_PER_NODE, CPUS_PER_NODE);
        let sets_here = sets(&cpus, &mask(node, 1));
        out.open("Package", &format!("os_index=\"{node}\" {sets_here}"));
        out.leaf("NUMANode", &format!("os_index=\"{node}\" {sets_here} local_memory=\"{}\"", 1_u64 << 40));
        for cpu in node * CPUS_PER_NODE..(node + 1) * CPUS_PER_NODE {
            let sets = sets(&mask(cpu, 1), &mask(node, 1));
            out.open("Core", &format!("os_index=\"{cpu}\" {sets}"));
            out.leaf("PU", &format!("os_index=\"{cpu}\" {sets}"));
            out.close();
        }
        for group in topology.groups.iter().filter(|group| group.numa == node) {
            out.group(group, topology.device_id);
        }
        out.close();
    }
    out.close();
    out.text.push_str("</topology>\n");
    out.text
}

struct Writer {
    text: String,
    index: u32,
}

impl Writer {
    fn open(&mut self, kind: &str, attributes: &str) {
        self.index += 1;
        writeln!(self.text, "<object type=\"{kind}\" gp_index=\"{}\" {attributes}>", self.index)
            .expect("string");
    }

    fn close(&mut self) {
        self.text.push_str("</object>\n");
    }

    fn leaf(&mut self, kind: &str, attributes: &str) {
        self.open(kind, attributes);
        self.close();
    }

    fn group(&mut self, group: &Group, efa_id: u32) {
        let mut buses: Vec<u8> = group.efa.iter().chain(&group.gpus).map(|pci| pci.bus).collect();
        buses.sort_unstable();
        let (first, last) = (buses.first().copied().unwrap_or(0), buses.last().copied().unwrap_or(0));
        // The host bridge; below it a PCI bridge where the instance type shows one.
        let top = group.bridge.map_or(first, |bridge| bridge.bus);
        self.open(
            "Bridge",
            &format!("bridge_type=\"0-1\" depth=\"0\" bridge_pci=\"0000:[{top:02x}-{last:02x}]\""),
        );
        if let Some(bridge) = group.bridge {
            let busid = pci(bridge, 0x0604, 0x1d0f, 0x0200);
            let below = format!(
                "bridge_type=\"1-1\" depth=\"1\" bridge_pci=\"0000:[{first:02x}-{last:02x}]\" {busid}"
            );
            self.open("Bridge", &below);
        }
        for efa in &group.efa {
            self.open("PCIDev", &pci(*efa, NETWORK, 0x1d0f, efa_id));
            self.leaf("OSDev", &format!("name=\"{}\" osdev_type=\"3\"", efa.efa_name()));
            self.close();
        }
        for gpu in &group.gpus {
            self.leaf("PCIDev", &pci(*gpu, CONTROLLER_3D, 0x10de, NVIDIA_H100));
        }
        if group.bridge.is_some() {
            self.close();
        }
        self.close();
    }
}

fn pci(at: Pci, class: u32, vendor: u32, device: u32) -> String {
    format!(
        "pci_busid=\"{at}\" pci_type=\"{class:04x} [{vendor:04x}:{device:04x}] [0000:0000] 00\" pci_link_speed=\"31.507692\""
    )
}

/// A bitmap with `count` bits from `first`, as hwloc writes one of at most 32 bits.
fn mask(first: u32, count: u32) -> String {
    format!("0x{:08x}", ((1_u64 << count) - 1) << first)
}

fn sets(cpus: &str, nodes: &str) -> String {
    format!(
        "cpuset=\"{cpus}\" complete_cpuset=\"{cpus}\" allowed_cpuset=\"{cpus}\" nodeset=\"{nodes}\" \
         complete_nodeset=\"{nodes}\" allowed_nodeset=\"{nodes}\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_is_in_the_picture_and_objects_close() {
        for name in ["p4d.24xlarge", "p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge", "g5.48xlarge"] {
            let topology = Topology::load(name).expect(name);
            let xml = xml(&topology);
            for (pci, _) in topology.devices() {
                assert!(xml.contains(&format!("pci_busid=\"{pci}\"")), "{name} {pci}");
            }
            assert_eq!(xml.matches("<object").count(), xml.matches("</object>").count(), "{name}");
        }
    }
}
