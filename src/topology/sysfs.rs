//! Reader of the machine from the kernel's files, for where libhwloc is absent.
//!
//! Sources: Documentation/ABI/testing/sysfs-bus-pci, sysfs-devices-node, sysfs-class-infiniband, sysfs-class-net.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::types::PciAddress;

use super::model::{Machine, NumaNode, PciDevice, PlaceKind, Role};
use super::select::RailDevice;

/// Most entries read of one directory: a machine has hundreds of PCI functions, not thousands.
const ENTRIES_MAX: usize = 16_384;

/// Reads `root/sys`. What is missing is left out.
pub(super) fn read(root: &Path, why: &str) -> Machine {
    let mut machine = Machine::empty(format!("{} ({why})", root.join("sys").display()));
    read_numa(&mut machine, root);
    for entry in entries(&root.join("sys/bus/pci/devices")) {
        let Some(function) = Function::read(&entry) else { continue };
        let Some(role) = Role::of(function.vendor, function.id, function.class) else { continue };
        add(&mut machine, &entry, &function, role);
    }
    machine
}

fn read_numa(machine: &mut Machine, root: &Path) {
    let mut found: Vec<(NumaNode, Vec<u32>)> = entries(&root.join("sys/devices/system/node"))
        .into_iter()
        .filter_map(|path| {
            let id: u32 = file_name(&path).strip_prefix("node")?.parse().ok()?;
            let kib = text(&path.join("meminfo")).lines().find_map(|line| {
                line.split_once("MemTotal:")?.1.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
            });
            let row =
                text(&path.join("distance")).split_whitespace().filter_map(|n| n.parse().ok()).collect();
            Some((NumaNode { id, memory_bytes: kib.unwrap_or(0) * 1024 }, row))
        })
        .collect();
    // The columns of a row are the nodes in ascending order.
    found.sort_by_key(|(node, _)| node.id);
    let (nodes, distances): (_, Vec<_>) = found.into_iter().unzip();
    machine.set_numa(nodes, &distances);
}

/// What the files of a PCI function say.
struct Function {
    address: PciAddress,
    vendor: u16,
    id: u16,
    class: u16,
    link_mbps: u64,
    node: Option<u32>,
}

impl Function {
    fn read(path: &Path) -> Option<Self> {
        let number = |name: &str| u32::from_str_radix(text(&path.join(name)).strip_prefix("0x")?, 16).ok();
        Some(Self {
            address: file_name(path).parse().ok()?,
            vendor: number("vendor")? as u16,
            id: number("device")? as u16,
            class: (number("class")? >> 8) as u16,
            link_mbps: link_mbps(
                &text(&path.join("current_link_speed")),
                &text(&path.join("current_link_width")),
            ),
            node: text(&path.join("numa_node")).parse().ok(),
        })
    }
}

fn add(machine: &mut Machine, path: &Path, function: &Function, role: Role) {
    let mut at = Machine::ROOT;
    if machine.nodes().len() > 1
        && let Some(node) = function.node
    {
        at = machine.add(at, PlaceKind::Domain(vec![node]));
    }
    // /sys/bus/pci/devices/X is a link to /sys/devices/[...]/pciDDDD:BB/[bridge/]*X: the path is the PCI tree.
    let mut above = fs::canonicalize(path).unwrap_or_default();
    above.pop();
    let mut ancestor = PathBuf::new();
    for component in above.components() {
        ancestor.push(component);
        let Component::Normal(name) = component else { continue };
        let name = name.to_string_lossy();
        if let Some((domain, bus)) = name.strip_prefix("pci").and_then(|rest| rest.split_once(':')) {
            if let (Ok(domain), Ok(bus)) = (u32::from_str_radix(domain, 16), u8::from_str_radix(bus, 16)) {
                at = machine.add(at, PlaceKind::HostBridge { domain, bus });
            }
        } else if let Ok(address) = name.parse() {
            let link_mbps = Function::read(&ancestor).map_or(0, |bridge| bridge.link_mbps);
            at = machine.add(at, PlaceKind::Bridge { address, link_mbps });
        }
    }
    let names = |class: &str| -> Vec<String> {
        entries(&path.join(class)).iter().map(|entry| file_name(entry)).collect()
    };
    let device = PciDevice {
        address: function.address,
        vendor: function.vendor,
        id: function.id,
        role,
        link_mbps: function.link_mbps,
        rdma_names: names("infiniband"),
        interfaces: names("net"),
    };
    machine.add(at, PlaceKind::Device(device));
}

/// Speed of a PCI link in Mb/s from the kernel's words: `16.0 GT/s PCI` and the number of lanes. 0 where unknown.
///
/// Generations 1 and 2 carry 8 bits in 10, generations 3 to 5 128 in 130, and later ones 242 in 256: the figures
/// that hwloc takes, too.
fn link_mbps(speed: &str, lanes: &str) -> u64 {
    let rate = speed.split_whitespace().next().and_then(|number| number.parse::<f64>().ok());
    let (Some(rate), Ok(lanes)) = (rate, lanes.parse::<f64>()) else { return 0 };
    let payload = match rate {
        rate if rate <= 5.0 => 8.0 / 10.0,
        rate if rate < 64.0 => 128.0 / 130.0,
        _ => 242.0 / 256.0,
    };
    (rate * 1000.0 * lanes * payload).round() as u64
}

/// The machine's network devices as libfabric would offer them: EFA devices, else RDMA devices, else the
/// network interfaces.
///
/// For the command alone; the engine asks libfabric.
pub fn rail_devices(root: &Path) -> Vec<RailDevice> {
    let class = |name: &str| entries(&root.join("sys/class").join(name));
    let device = |path: &Path, speed_bps| RailDevice {
        name: file_name(path),
        device: Some(file_name(path)),
        pci: fs::canonicalize(path.join("device")).ok().and_then(|device| file_name(&device).parse().ok()),
        speed_bps,
    };
    let mut rdma = class("infiniband");
    let is_efa = |path: &PathBuf| {
        text(&path.join("device/vendor")) == "0x1d0f"
            && text(&path.join("device/device")).starts_with("0xefa")
    };
    if rdma.iter().any(is_efa) {
        rdma.retain(is_efa);
    }
    if !rdma.is_empty() {
        return rdma.iter().map(|path| device(path, rdma_speed_bps(path))).collect();
    }
    let mut interfaces = class("net");
    interfaces.retain(|path| file_name(path) != "lo");
    interfaces.iter().map(|path| device(path, interface_speed_bps(path))).collect()
}

/// Line speed of an interface; its `speed` is in Mb/s, and -1 or `u32::MAX` where the driver does not know.
fn interface_speed_bps(path: &Path) -> u64 {
    let mbps = text(&path.join("speed")).parse().ok().filter(|&mbps| mbps != u32::MAX);
    u64::from(mbps.unwrap_or(0)) * 1_000_000
}

/// Line speed of an RDMA device: the sum of its ports, whose `rate` reads `100 Gb/sec (4X EDR)`.
fn rdma_speed_bps(path: &Path) -> u64 {
    let gbps = |port: &PathBuf| {
        text(&port.join("rate"))
            .split_whitespace()
            .next()
            .and_then(|number| number.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    entries(&path.join("ports")).iter().map(|port| (gbps(port) * 1e9) as u64).sum()
}

/// What a directory holds, sorted; nothing where it cannot be read.
pub(crate) fn entries(path: &Path) -> Vec<PathBuf> {
    let Ok(read) = fs::read_dir(path) else { return Vec::new() };
    let mut found: Vec<PathBuf> =
        read.take(ENTRIES_MAX).filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

/// What a file holds, without white space around it; nothing where it cannot be read.
pub(crate) fn text(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::link_mbps;

    #[test]
    fn link_speeds_count_payload() {
        for (speed, lanes, mbps) in [
            ("2.5 GT/s PCIe", "1", 2_000),
            ("5 GT/s", "8", 32_000),
            ("8.0 GT/s PCIe", "16", 126_031),
            ("16.0 GT/s PCIe", "8", 126_031),
            ("32.0 GT/s PCIe", "16", 504_123),
            ("64.0 GT/s PCIe", "16", 968_000),
            ("Unknown", "255", 0),
            ("", "", 0),
        ] {
            assert_eq!(link_mbps(speed, lanes), mbps, "{speed} x{lanes}");
        }
    }
}
