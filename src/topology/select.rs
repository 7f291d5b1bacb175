//! Selection: from the machine and libfabric's devices to the devices that serve a buffer. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Result;
use crate::types::PciAddress;

use super::filter::GpuDevices;
use super::host::HostPlan;
use super::model::{Machine, PciDevice, PlaceId, PlaceKind, Role};

/// A network device as libfabric offers it: one entry for each device, in libfabric's order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RailDevice {
    /// libfabric's domain name: `rdmap79s0-rdm`.
    pub name: String,
    /// Device name in `fi_info`'s nic attributes: `rdmap79s0`.
    pub device: Option<String>,
    /// PCI address in `fi_info`'s nic attributes.
    pub pci: Option<PciAddress>,
    /// Line speed in bits per second; 0 where unknown.
    pub speed_bps: u64,
}

impl RailDevice {
    /// The network devices of a machine as libfabric would offer them there: its EFA devices, else its RDMA devices,
    /// else its interfaces.
    pub fn all_of(machine: &Machine) -> Vec<Self> {
        let devices = machine.devices();
        let named = |names: fn(&PciDevice) -> &[String]| -> Vec<Self> {
            let networks = devices.iter().map(|(_, found)| found).filter(|found| found.role == Role::Network);
            let device = |pci: PciAddress, name: &String| Self {
                name: name.clone(),
                device: Some(name.clone()),
                pci: Some(pci),
                speed_bps: 0,
            };
            networks.flat_map(|found| names(found).iter().map(|name| device(found.address, name))).collect()
        };
        let efa = named(|found| if found.is_efa() { &found.rdma_names } else { &[] });
        let rdma = named(|found| &found.rdma_names);
        let interfaces = named(|found| &found.interfaces);
        [efa, rdma, interfaces].into_iter().find(|found| !found.is_empty()).unwrap_or_default()
    }

    /// The device's name without what libfabric adds to it for a kind of endpoint.
    pub fn short_name(&self) -> &str {
        let bare = ["-rdm", "-dgrm"].iter().find_map(|suffix| self.name.strip_suffix(suffix));
        self.device.as_deref().or(bare).unwrap_or(&self.name)
    }
}

/// What the user may say about selection.
#[derive(Debug, Clone, Default)]
pub struct SelectOptions {
    /// Bandwidth in Gb/s that one host buffer may use (`max_bw_per_dram_seg`). Without it the PCI links decide.
    pub max_bw_per_dram_seg_gbps: Option<u64>,
    /// Devices of accelerators, whatever the machine says (`gpu_devices`).
    pub gpu_devices: GpuDevices,
}

/// Which devices serve which memory. Every answer is a list of indices into the devices it was built from.
#[derive(Debug, Clone)]
pub struct RailMap {
    places: Vec<Option<PlaceId>>,
    accelerators: BTreeMap<PciAddress, Vec<usize>>,
    host: HostPlan,
}

impl RailMap {
    /// The map for `devices` on `machine`. Fails only on options that name what is not there.
    pub fn build(machine: &Machine, devices: &[RailDevice], options: &SelectOptions) -> Result<Self> {
        let places: Vec<_> = devices.iter().map(|device| place_of(machine, device)).collect();
        let mut accelerators = share_out(machine, devices, &places);
        let addresses: Vec<PciAddress> = accelerators.keys().copied().collect();
        accelerators.extend(options.gpu_devices.resolve(&addresses, devices)?);
        let host = HostPlan::new(machine, devices, &places, options.max_bw_per_dram_seg_gbps);
        Ok(Self { places, accelerators, host })
    }

    /// Devices for memory of the accelerator at `pci`, in PCI order. All devices where the address is unknown:
    /// never none if there is any.
    pub fn for_accelerator(&self, pci: Option<PciAddress>) -> Vec<usize> {
        match pci.and_then(|pci| self.accelerators.get(&pci)) {
            Some(devices) => devices.clone(),
            None => (0..self.places.len()).collect(),
        }
    }

    /// Devices for a host buffer that lies on `nodes`, given as (NUMA node, bytes); nearest first.
    ///
    /// An empty list means that nobody knows where it lies. Where a node has more devices than the PCI links above
    /// them can feed, each `turn` gets other ones: count turns by registration. Never none if there is any device.
    pub fn for_host(&self, nodes: &[(u32, u64)], turn: u64) -> Vec<usize> {
        self.host.select(nodes, turn)
    }

    /// Accelerators with their devices, in PCI order.
    pub fn accelerators(&self) -> impl Iterator<Item = (PciAddress, &[usize])> {
        self.accelerators.iter().map(|(&pci, devices)| (pci, devices.as_slice()))
    }

    /// Where a device stands in the machine; `None` for software devices and for what the machine does not list.
    pub fn place(&self, device: usize) -> Option<PlaceId> {
        self.places.get(device).copied().flatten()
    }

    /// How many devices a host buffer gets at most, where `max_bw_per_dram_seg` says so.
    pub fn host_devices_max(&self) -> Option<usize> {
        self.host.devices_max()
    }
}

/// The place of a libfabric device: by its PCI address, else by a name that holds bus and device number.
fn place_of(machine: &Machine, device: &RailDevice) -> Option<PlaceId> {
    let networks = || machine.devices().into_iter().filter(|(_, found)| found.role == Role::Network);
    if let Some(pci) = device.pci {
        return networks().find(|(_, found)| found.address == pci).map(|(place, _)| place);
    }
    let name = device.short_name();
    let by_name = networks().find(|(_, found)| found.rdma_names.iter().any(|known| known == name));
    if let Some((place, _)) = by_name {
        return Some(place);
    }
    let wanted = address_in_name(name)?;
    let mut matching = networks().filter(|(_, found)| {
        let at = found.address;
        (at.bus, at.device, at.function) == (wanted.bus, wanted.device, wanted.function)
            && (wanted.domain == 0 || at.domain == wanted.domain)
    });
    match (matching.next(), matching.next()) {
        (Some((place, _)), None) => Some(place),
        // Two domains have a device there and the name does not say which: no place is better than a wrong one.
        _ => None,
    }
}

/// The PCI address in a name that rdma-core makes from it: `rdma[P<domain>]p<bus>s<device>[f<function>]`, numbers in decimal.
fn address_in_name(name: &str) -> Option<PciAddress> {
    fn number(text: &str, mark: char) -> Option<(u32, &str)> {
        let digits = text.strip_prefix(mark)?;
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        Some((digits[..end].parse().ok()?, &digits[end..]))
    }
    let rest = name.strip_prefix("rdma")?;
    let (domain, rest) = number(rest, 'P').unwrap_or((0, rest));
    let (bus, rest) = number(rest, 'p')?;
    let (device, rest) = number(rest, 's')?;
    let (function, rest) = number(rest, 'f').unwrap_or((0, rest));
    let small = |value: u32| u8::try_from(value).ok();
    rest.is_empty().then_some(PciAddress {
        domain,
        bus: small(bus)?,
        device: small(device)?,
        function: small(function)?,
    })
}

/// Gives each accelerator its devices.
///
/// An accelerator belongs to the innermost place around it that also holds a device; a device to the innermost
/// place around it that accelerators belong to. There the devices are divided among the accelerators in PCI order,
/// or shared where they are fewer. An accelerator that this leaves with nothing takes the nearest devices it can see.
fn share_out(
    machine: &Machine,
    devices: &[RailDevice],
    places: &[Option<PlaceId>],
) -> BTreeMap<PciAddress, Vec<usize>> {
    let accelerators = machine.accelerators();
    let located = in_pci_order(machine, devices, places);
    if located.is_empty() {
        let all: Vec<usize> = (0..devices.len()).collect();
        return accelerators.iter().map(|(_, found)| (found.address, all.clone())).collect();
    }

    let holds_device: BTreeSet<PlaceId> =
        located.iter().flat_map(|&(place, _)| machine.ancestry(place)).collect();
    let mut meetings: BTreeMap<PlaceId, Meeting> = BTreeMap::new();
    for &(place, found) in &accelerators {
        let at = machine.ancestry(place).find(|at| holds_device.contains(at)).unwrap_or(Machine::ROOT);
        meetings.entry(at).or_default().accelerators.push((place, found.address));
    }
    for &(place, device) in &located {
        if let Some(at) = machine.ancestry(place).find(|at| meetings.contains_key(at)) {
            meetings.entry(at).or_default().devices.push(device);
        }
    }

    let mut map = BTreeMap::new();
    for (&at, meeting) in &meetings {
        let parts = meeting.divide(is_flat(machine, at, &located));
        for (&(place, address), part) in meeting.accelerators.iter().zip(parts) {
            let part = if part.is_empty() { nearest(machine, place, at, &located) } else { part };
            map.insert(address, part);
        }
    }
    map
}

/// Accelerators and devices that belong to one place.
#[derive(Default)]
struct Meeting {
    accelerators: Vec<(PlaceId, PciAddress)>,
    devices: Vec<usize>,
}

impl Meeting {
    /// One list of devices for each accelerator, in order.
    fn divide(&self, flat: bool) -> Vec<Vec<usize>> {
        let count = self.accelerators.len();
        if flat || self.devices.len() < count {
            return vec![self.devices.clone(); count];
        }
        let (each, extra) = (self.devices.len() / count, self.devices.len() % count);
        let mut rest = self.devices.as_slice();
        (0..count)
            .map(|at| {
                let (part, tail) = rest.split_at(each + usize::from(at < extra));
                rest = tail;
                part.to_vec()
            })
            .collect()
    }
}

/// Whether `at` is the one bus on which everything hangs side by side: then nothing is nearer than anything else.
fn is_flat(machine: &Machine, at: PlaceId, located: &[(PlaceId, usize)]) -> bool {
    let hangs_here = |place: PlaceId| machine.place(place).parent == Some(at);
    matches!(machine.place(at).kind, PlaceKind::HostBridge { .. })
        && machine.accelerators().iter().all(|&(place, _)| hangs_here(place))
        && located.iter().all(|&(place, _)| hangs_here(place))
}

/// The devices below `at` that are at the least NUMA distance from an accelerator.
fn nearest(machine: &Machine, accelerator: PlaceId, at: PlaceId, located: &[(PlaceId, usize)]) -> Vec<usize> {
    let distance = |place| {
        let pairs = machine
            .near(accelerator)
            .iter()
            .flat_map(|&from| machine.near(place).iter().map(move |&to| machine.distance(from, to)));
        pairs.min().unwrap_or(u32::MAX)
    };
    let below: Vec<(u32, usize)> = located
        .iter()
        .filter(|&&(place, _)| machine.ancestry(place).any(|above| above == at))
        .map(|&(place, device)| (distance(place), device))
        .collect();
    let least = below.iter().map(|&(distance, _)| distance).min();
    below.into_iter().filter(|&(distance, _)| Some(distance) == least).map(|(_, device)| device).collect()
}

/// The devices that have a place, in PCI order, whatever the order of the list.
pub(super) fn in_pci_order(
    machine: &Machine,
    devices: &[RailDevice],
    places: &[Option<PlaceId>],
) -> Vec<(PlaceId, usize)> {
    let address = |place| match &machine.place(place).kind {
        PlaceKind::Device(device) => Some(device.address),
        _ => None,
    };
    let mut located: Vec<(PlaceId, usize)> =
        places.iter().enumerate().filter_map(|(device, place)| Some(((*place)?, device))).collect();
    located.sort_by_key(|&(place, device)| (address(place), &devices[device].name, device));
    located
}

/// At most `max` of the devices, spread evenly over the machine: each bridge before a second device below the
/// same one, and NUMA nodes in turn. Indices in ascending order.
pub fn spread(machine: &Machine, devices: &[RailDevice], max: usize) -> Vec<usize> {
    let places: Vec<_> = devices.iter().map(|device| place_of(machine, device)).collect();
    let mut by_node: BTreeMap<&[u32], BTreeMap<Option<PlaceId>, Vec<usize>>> = BTreeMap::new();
    for (place, device) in in_pci_order(machine, devices, &places) {
        let node = by_node.entry(machine.near(place)).or_default();
        node.entry(uplink(machine, place)).or_default().push(device);
    }
    let nodes: Vec<Vec<Vec<usize>>> =
        by_node.into_values().map(|groups| groups.into_values().collect()).collect();
    let mut order = interleave(&interleave(&nodes));
    order.extend((0..devices.len()).filter(|&device| places[device].is_none()));
    order.truncate(max);
    order.sort_unstable();
    order
}

/// The outermost PCI bridge above a device, or the host bridge where there is none: what it shares with others.
pub(super) fn uplink(machine: &Machine, place: PlaceId) -> Option<PlaceId> {
    let is_pci = |at: &PlaceId| matches!(machine.place(*at).kind, PlaceKind::Bridge { .. });
    let above: Vec<PlaceId> = machine.ancestry(place).skip(1).collect();
    above.iter().rev().find(|at| is_pci(at)).or(above.first()).copied()
}

/// First of each list, then the second of each, and so on.
pub(super) fn interleave<T: Clone>(lists: &[Vec<T>]) -> Vec<T> {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest).flat_map(|at| lists.iter().filter_map(move |list| list.get(at).cloned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_addresses() {
        for (name, address) in [
            ("rdmap79s0", "0000:4f:00.0"),
            ("rdmap16s27", "0000:10:1b.0"),
            ("rdmap3s0f1", "0000:03:00.1"),
            ("rdmaP8p3s0f0", "0008:03:00.0"),
        ] {
            assert_eq!(address_in_name(name), address.parse().ok(), "{name}");
        }
        for name in
            ["", "rdma", "rdmap79", "rdmap300s0", "rdmap79s0x", "rdmaps0", "mlx5_0", "eth0", "rdmap79s0-rdm"]
        {
            assert_eq!(address_in_name(name), None, "{name}");
        }
    }

    #[test]
    fn short_names_lose_what_libfabric_adds() {
        let short = |name: &str| {
            RailDevice { name: name.to_owned(), ..RailDevice::default() }.short_name().to_owned()
        };
        assert_eq!(short("rdmap79s0-rdm"), "rdmap79s0");
        assert_eq!(short("rdmap79s0-dgrm"), "rdmap79s0");
        assert_eq!(short("eth0"), "eth0");
    }
}
