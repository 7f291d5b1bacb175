//! Which EFA devices a host has, from a description of an EC2 instance type.

use std::path::Path;

use serde_json::Value;

use crate::abi::verbs::ibv_gid;

/// Instance types known by name.
const KNOWN: &str = include_str!("../topologies/ec2.json");

/// Most devices of one host that softefa offers; a p5.48xlarge has 32.
pub const DEVICES_MAX: usize = 64;

/// A PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pci {
    /// PCI domain, 0 on EC2.
    pub domain: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number on the bus.
    pub device: u8,
    /// Function of the device.
    pub function: u8,
}

impl Pci {
    /// Reads `0000:4f:00.0`.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, function) = text.split_once('.')?;
        let mut parts = rest.split(':');
        let address = Self {
            domain: u16::from_str_radix(parts.next()?, 16).ok()?,
            bus: u8::from_str_radix(parts.next()?, 16).ok()?,
            device: u8::from_str_radix(parts.next()?, 16).ok()?,
            function: function.parse().ok()?,
        };
        parts.next().is_none().then_some(address)
    }

    /// The name that udev gives an EFA device here, numbers in decimal: `rdmap79s0`.
    pub fn efa_name(self) -> String {
        format!("rdmap{}s{}", self.bus, self.device)
    }
}

impl std::fmt::Display for Pci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

/// Devices below one bridge (or, where none is visible, on one bus).
#[derive(Clone, Debug)]
pub struct Group {
    /// NUMA node number.
    pub numa: u32,
    /// The bridge above, where the instance type shows one.
    pub bridge: Option<Pci>,
    /// EFA devices.
    pub efa: Vec<Pci>,
    /// GPUs.
    pub gpus: Vec<Pci>,
}

/// An instance type.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Number of NUMA nodes.
    pub numa_nodes: u32,
    /// Speed of one EFA device in Gbit/s.
    pub gbps: u32,
    /// PCI device id, which is also the generation of EFA: 0xefa0, 0xefa1, 0xefa2.
    pub device_id: u32,
    /// Whether the devices offer RDMA write; the first generation does not.
    pub rdma_write: bool,
    /// Where the devices are.
    pub groups: Vec<Group>,
}

impl Topology {
    /// Loads a topology named by `spec`: a known instance type, `file.json#type`, or `file.json` with one type in it.
    pub fn load(spec: &str) -> Result<Self, String> {
        let (text, name) = match spec.split_once('#') {
            Some((path, name)) => (read(path)?, Some(name)),
            None if Path::new(spec).is_file() => (read(spec)?, None),
            None => (KNOWN.to_owned(), Some(spec)),
        };
        let all: Value = serde_json::from_str(&text).map_err(|error| format!("topology {spec}: {error}"))?;
        let found = match name {
            Some(name) => all.get(name),
            None => all.as_object().and_then(|map| map.values().find(|value| value.get("groups").is_some())),
        };
        let found = found
            .ok_or_else(|| format!("topology {spec}: no such instance type; known: {}", known_names()))?;
        parse(found)
            .ok_or_else(|| format!("topology {spec}: not in the expected form (see topologies/ec2.json)"))
    }

    /// Every EFA device with its NUMA node, in PCI order.
    pub fn devices(&self) -> Vec<(Pci, u32)> {
        let mut all: Vec<_> =
            self.groups.iter().flat_map(|group| group.efa.iter().map(|pci| (*pci, group.numa))).collect();
        all.sort_unstable();
        all.truncate(DEVICES_MAX);
        all
    }
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("topology {path}: {error}"))
}

/// Names of the instance types that need no file.
pub fn known_names() -> String {
    let all: Value = serde_json::from_str(KNOWN).unwrap_or_default();
    all.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

fn parse(value: &Value) -> Option<Topology> {
    let number = |key: &str| value.get(key).and_then(Value::as_u64).map(|number| number as u32);
    let id = value.get("efa_device_id").and_then(Value::as_str).unwrap_or("0xefa2");
    Some(Topology {
        numa_nodes: number("numa_nodes")?,
        gbps: number("efa_gbps")?,
        device_id: u32::from_str_radix(id.trim_start_matches("0x"), 16).ok()?,
        rdma_write: value.get("rdma_write").and_then(Value::as_bool).unwrap_or(true),
        groups: value.get("groups")?.as_array()?.iter().map(parse_group).collect::<Option<_>>()?,
    })
}

fn parse_group(value: &Value) -> Option<Group> {
    let list = |key: &str| -> Option<Vec<Pci>> {
        let Some(list) = value.get(key) else { return Some(Vec::new()) };
        list.as_array()?.iter().map(|text| Pci::parse(text.as_str()?)).collect()
    };
    let bridge = match value.get("bridge") {
        Some(text) => Some(Pci::parse(text.as_str()?)?),
        None => None,
    };
    Some(Group { numa: value.get("numa")?.as_u64()? as u32, bridge, efa: list("efa")?, gpus: list("gpus")? })
}

/// The part of a GID that stands for a host: a hash of its name.
pub fn host_number(name: &str) -> [u8; 4] {
    // FNV-1a, 32 bits.
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.to_be_bytes()
}

/// The GID of a device: link-local, then the host, then the PCI address.
pub fn gid(host: &str, pci: Pci) -> ibv_gid {
    let mut raw = [0; 16];
    raw[0] = 0xfe;
    raw[1] = 0x80;
    raw[8..12].copy_from_slice(&host_number(host));
    raw[12..14].copy_from_slice(&pci.domain.to_be_bytes());
    raw[14] = pci.bus;
    raw[15] = pci.device << 3 | pci.function;
    ibv_gid { raw }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_type_loads_with_its_devices() {
        for (name, count, first) in [
            ("p4d.24xlarge", 4, "rdmap16s27"),
            ("p5.48xlarge", 32, "rdmap79s0"),
            ("p5en.48xlarge", 16, "rdmap79s0"),
            ("p6-b200.48xlarge", 8, "rdmap79s0"),
            ("g5.48xlarge", 1, "rdmap0s21"),
        ] {
            let devices = Topology::load(name).expect(name).devices();
            assert_eq!(devices.len(), count, "{name}");
            assert_eq!(devices[0].0.efa_name(), first, "{name}");
        }
    }

    #[test]
    fn an_unknown_type_names_the_known_ones() {
        let error = Topology::load("p9.metal").expect_err("unknown");
        assert!(error.contains("p5.48xlarge"), "{error}");
    }

    #[test]
    fn devices_of_one_host_have_different_gids() {
        let devices = Topology::load("p5.48xlarge").expect("known").devices();
        let mut gids: Vec<_> = devices.iter().map(|(pci, _)| gid("a", *pci).raw).collect();
        gids.extend(devices.iter().map(|(pci, _)| gid("b", *pci).raw));
        gids.sort_unstable();
        gids.dedup();
        assert_eq!(gids.len(), 64);
    }
}
