//! Reader of the machine through libhwloc. Nothing of hwloc is visible outside this file.

use std::fmt::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::hwloc::{Kind, Object, Pci, Topology};
use crate::types::PciAddress;

use super::model::{Machine, NumaNode, PciDevice, PlaceId, PlaceKind, Role};

/// Megabits per second in a gigabyte per second, the unit of hwloc's link speeds.
const MBPS_PER_GBYTES: f64 = 8000.0;

/// Longest chain of objects from a device to the root. Real ones have about ten.
const DEPTH_MAX: usize = 64;

pub(super) fn read_this_machine() -> std::result::Result<Machine, String> {
    let topology = Topology::of_this_machine()?;
    let mut origin = format!("hwloc {}", topology.library_version());
    // hwloc's own ways to look at another machine: worth a word in a report.
    for name in ["HWLOC_XMLFILE", "HWLOC_FSROOT", "HWLOC_SYNTHETIC"] {
        if let Some(value) = std::env::var_os(name) {
            let _ = write!(origin, ", with {name}={}", value.display());
        }
    }
    Ok(read(&topology, origin))
}

pub(super) fn read_xml(path: &Path) -> Result<Machine> {
    let topology = Topology::of_xml(path).map_err(|why| {
        Error::invalid(format!(
            "{}: cannot be read as a machine: {why}; want the output of `lstopo --of xml` and libhwloc.so.15 to read it",
            path.display()
        ))
    })?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    Ok(read(&topology, format!("{name}, hwloc {}", topology.library_version())))
}

fn read(topology: &Topology, origin: String) -> Machine {
    let mut machine = Machine::empty(origin);
    let nodes: Vec<NumaNode> = topology
        .numa_nodes()
        .map(|node| NumaNode { id: node.os_index(), memory_bytes: node.memory_bytes() })
        .collect();
    let all: Vec<u32> = nodes.iter().map(|node| node.id).collect();
    let known = topology.numa_distances();
    let distance =
        |from, to| known.iter().find(|known| (known.0, known.1) == (from, to)).map(|known| known.2);
    let row = |&from: &u32| all.iter().map(|&to| distance(from, to)).collect::<Option<Vec<u32>>>();
    let distances: Option<Vec<_>> = all.iter().map(row).collect();
    machine.set_numa(nodes, &distances.unwrap_or_default());

    for object in topology.pci_devices() {
        let Kind::PciDevice(pci) = object.kind() else { continue };
        let Some(role) = Role::of(pci.vendor, pci.id, pci.class) else { continue };
        let parent = add_path(&mut machine, &object, all.len());
        machine.add(parent, PlaceKind::Device(device(&object, pci, role)));
    }
    machine
}

/// Adds what is above a device, from the root down, and gives the innermost.
fn add_path(machine: &mut Machine, device: &Object<'_>, nodes_total: usize) -> PlaceId {
    let above: Vec<Object<'_>> =
        std::iter::successors(device.parent(), Object::parent).take(DEPTH_MAX).collect();
    let mut at = Machine::ROOT;
    let mut outer: Option<Vec<u32>> = None;
    for object in above.iter().rev() {
        let kind = match object.kind() {
            Kind::PciBridge { pci } => PlaceKind::Bridge { address: address(pci), link_mbps: link_mbps(pci) },
            Kind::HostBridge { domain, bus } => PlaceKind::HostBridge { domain, bus },
            _ => {
                // Sockets, dies, groups: all that matters is which nodes are near, and only where it is not all.
                let Some(nodes) = object.nodeset() else { continue };
                if nodes.is_empty() || nodes.len() >= nodes_total || outer.as_ref() == Some(&nodes) {
                    continue;
                }
                outer = Some(nodes.clone());
                PlaceKind::Domain(nodes)
            }
        };
        at = machine.add(at, kind);
    }
    at
}

fn device(object: &Object<'_>, pci: Pci, role: Role) -> PciDevice {
    let mut device = PciDevice {
        address: address(pci),
        vendor: pci.vendor,
        id: pci.id,
        role,
        link_mbps: link_mbps(pci),
        rdma_names: Vec::new(),
        interfaces: Vec::new(),
    };
    for child in object.io_children() {
        let names = match child.kind() {
            Kind::Rdma => &mut device.rdma_names,
            Kind::Interface => &mut device.interfaces,
            _ => continue,
        };
        names.extend(child.name());
    }
    device.rdma_names.sort();
    device.interfaces.sort();
    device
}

fn address(pci: Pci) -> PciAddress {
    let (domain, bus, device, function) = pci.at;
    PciAddress { domain, bus, device, function }
}

fn link_mbps(pci: Pci) -> u64 {
    (f64::from(pci.link_gbytes) * MBPS_PER_GBYTES).round() as u64
}
