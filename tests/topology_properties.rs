//! What holds for selection on any machine.

use std::collections::BTreeSet;

use proptest::prelude::*;

use nixl_libfabric::topology::{
    AcceleratorKind, DeviceFilter, Machine, NumaNode, PciDevice, PlaceId, PlaceKind, RailDevice, RailMap,
    Report, Role, SelectOptions, spread,
};
use nixl_libfabric::types::PciAddress;

const SPEED_MBPS: u64 = 100_000;

/// Where PCI begins on a made-up machine, and what hangs there.
#[derive(Debug, Clone)]
struct Root {
    /// NUMA node, modulo how many there are; `None` where the machine does not say.
    node: Option<usize>,
    /// Link of the bridge above the devices in Mb/s, 0 for unknown; none for a flat bus.
    bridge_mbps: Option<u64>,
    accelerators: usize,
    networks: usize,
}

#[derive(Debug, Clone)]
struct Setup {
    nodes: usize,
    distances: Vec<u32>,
    roots: Vec<Root>,
    /// Which network devices libfabric offers, by position; the others are for other containers.
    offered: Vec<bool>,
    /// Devices without a PCI address.
    software: usize,
    /// Decides the order of the list.
    shuffle: u64,
}

fn setups() -> impl Strategy<Value = Setup> {
    let root = (
        prop::option::weighted(0.8, 0..4usize),
        prop::option::weighted(0.8, prop::sample::select(vec![0, 50_000, 126_031, 252_062, 504_123])),
        0..4usize,
        0..5usize,
    )
        .prop_map(|(node, bridge_mbps, accelerators, networks)| Root {
            node,
            bridge_mbps,
            accelerators,
            networks,
        });
    (
        1..5usize,
        prop::collection::vec(11..60u32, 6),
        prop::collection::vec(root, 1..6),
        prop::collection::vec(prop::bool::weighted(0.7), 25),
        0..3usize,
        any::<u64>(),
    )
        .prop_map(|(nodes, distances, roots, offered, software, shuffle)| Setup {
            nodes,
            distances,
            roots,
            offered,
            software,
            shuffle,
        })
}

impl Setup {
    fn machine(&self) -> Machine {
        let mut machine = Machine::empty("made up");
        let nodes = (0..self.nodes).map(|id| NumaNode { id: id as u32, memory_bytes: 1 << 30 }).collect();
        let distance = |a: usize, b: usize| {
            let (low, high) = (a.min(b), a.max(b));
            if a == b { 10 } else { self.distances[high * (high - 1) / 2 + low] }
        };
        let rows: Vec<Vec<u32>> =
            (0..self.nodes).map(|a| (0..self.nodes).map(|b| distance(a, b)).collect()).collect();
        machine.set_numa(nodes, &rows);
        for (at, root) in self.roots.iter().enumerate() {
            add_root(&mut machine, at as u8 * 16, root, self.nodes);
        }
        machine
    }

    fn devices(&self, machine: &Machine) -> Vec<RailDevice> {
        let mut networks = RailDevice::all_of(machine);
        for device in &mut networks {
            device.speed_bps = SPEED_MBPS * 1_000_000;
        }
        let mut devices: Vec<RailDevice> = networks
            .into_iter()
            .zip(&self.offered)
            .filter(|(_, offered)| **offered)
            .map(|(device, _)| device)
            .collect();
        devices.extend((0..self.software).map(|at| RailDevice {
            name: format!("eth{at}"),
            speed_bps: SPEED_MBPS * 1_000_000,
            ..RailDevice::default()
        }));
        devices
    }

    /// The same devices in another order.
    fn shuffled(&self, devices: &[RailDevice]) -> Vec<RailDevice> {
        let mut devices = devices.to_vec();
        let mut state = self.shuffle | 1;
        for at in (1..devices.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            devices.swap(at, (state >> 33) as usize % (at + 1));
        }
        devices
    }
}

fn add_root(machine: &mut Machine, bus: u8, root: &Root, nodes: usize) {
    let mut at = Machine::ROOT;
    if let Some(node) = root.node
        && nodes > 1
    {
        at = machine.add(at, PlaceKind::Domain(vec![(node % nodes) as u32]));
    }
    at = machine.add(at, PlaceKind::HostBridge { domain: 0, bus });
    let address = |bus, device: usize| PciAddress { domain: 0, bus, device: device as u8, function: 0 };
    if let Some(link_mbps) = root.bridge_mbps {
        at = machine.add(at, PlaceKind::Bridge { address: address(bus, 31), link_mbps });
    }
    let below = if root.bridge_mbps.is_some() { bus + 1 } else { bus };
    let add = |machine: &mut Machine, device: usize, role| {
        let address = address(below, device);
        let rdma_names = vec![format!("rdmap{}s{}", address.bus, address.device)];
        let network = role == Role::Network;
        machine.add(
            at,
            PlaceKind::Device(PciDevice {
                address,
                vendor: 0x1d0f,
                id: if network { 0xefa1 } else { 0 },
                role,
                link_mbps: 0,
                rdma_names: if network { rdma_names } else { Vec::new() },
                interfaces: Vec::new(),
            }),
        );
    };
    for device in 0..root.networks {
        add(machine, device, Role::Network);
    }
    for device in 0..root.accelerators {
        add(machine, 16 + device, Role::Accelerator(AcceleratorKind::Nvidia));
    }
}

fn build(machine: &Machine, devices: &[RailDevice], gbps: Option<u64>) -> RailMap {
    let options = SelectOptions { max_bw_per_dram_seg_gbps: gbps, ..SelectOptions::default() };
    RailMap::build(machine, devices, &options).unwrap()
}

fn names(devices: &[RailDevice], chosen: &[usize]) -> Vec<String> {
    chosen.iter().map(|&at| devices[at].name.clone()).collect()
}

/// What an attribute is worth wherever it stands, in order.
fn values(svg: &str, attribute: &str) -> Vec<String> {
    let start = format!(" {attribute}=\"");
    let mut found: Vec<String> =
        svg.split(&start).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect();
    found.sort();
    found
}

fn distinct(chosen: &[usize]) -> bool {
    chosen.iter().collect::<BTreeSet<_>>().len() == chosen.len()
}

fn distance(machine: &Machine, node: u32, place: Option<PlaceId>) -> u32 {
    let near = machine.near(place.unwrap_or(Machine::ROOT));
    near.iter().map(|&to| machine.distance(node, to)).min().unwrap_or(u32::MAX)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_accelerator_has_a_device_if_there_is_any(setup in setups()) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, None);
        let accelerators = machine.accelerators();
        prop_assert_eq!(map.accelerators().count(), accelerators.len());
        for (_, accelerator) in accelerators {
            let chosen = map.for_accelerator(Some(accelerator.address));
            prop_assert_eq!(chosen.is_empty(), devices.is_empty());
            prop_assert!(distinct(&chosen) && chosen.iter().all(|&at| at < devices.len()));
        }
        prop_assert_eq!(map.for_accelerator(None).len(), devices.len());
    }

    #[test]
    fn the_order_of_the_list_does_not_matter(setup in setups(), gbps in prop::option::of(1..2000u64), turn in any::<u64>()) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let shuffled = setup.shuffled(&devices);
        let (one, other) = (build(&machine, &devices, gbps), build(&machine, &shuffled, gbps));
        for ((pci, a), (_, b)) in one.accelerators().zip(other.accelerators()) {
            let (mut a, mut b) = (names(&devices, a), names(&shuffled, b));
            if devices.iter().all(|device| device.pci.is_none()) {
                a.sort();
                b.sort();
            }
            prop_assert_eq!(a, b, "{}", pci);
        }
        for node in 0..=setup.nodes as u32 {
            let a = names(&devices, &one.for_host(&[(node, 1)], turn));
            let b = names(&shuffled, &other.for_host(&[(node, 1)], turn));
            prop_assert_eq!(a, b, "node {}", node);
        }
    }

    #[test]
    fn below_one_bridge_loads_differ_by_at_most_one(accelerators in 1..12usize, networks in 1..20usize, flat in any::<bool>()) {
        let root = Root { node: None, bridge_mbps: (!flat).then_some(0), accelerators: accelerators.min(15), networks: networks.min(15) };
        let mut machine = Machine::empty("made up");
        add_root(&mut machine, 0, &root, 1);
        let devices = RailDevice::all_of(&machine);
        let map = build(&machine, &devices, None);
        let lists: Vec<&[usize]> = map.accelerators().map(|(_, list)| list).collect();
        let lengths = || lists.iter().map(|list| list.len());
        prop_assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        let users = |device: usize| lists.iter().filter(|list| list.contains(&device)).count();
        let loads: Vec<usize> = (0..devices.len()).map(users).collect();
        prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{:?}", loads);
        if flat {
            prop_assert!(lengths().all(|length| length == devices.len()), "on one bus nothing is nearer");
        }
    }

    #[test]
    fn host_memory_gets_the_nearest_that_the_links_can_feed(setup in setups(), turn in any::<u64>()) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, None);
        for node in 0..setup.nodes as u32 {
            let chosen = map.for_host(&[(node, 4096)], turn);
            prop_assert_eq!(chosen.is_empty(), devices.is_empty());
            prop_assert!(distinct(&chosen));
            let least = (0..devices.len()).map(|at| distance(&machine, node, map.place(at))).min();
            for &at in &chosen {
                prop_assert_eq!(Some(distance(&machine, node, map.place(at))), least);
            }
            for &at in &chosen {
                let Some(bridge) = map.place(at).and_then(|place| machine.place(place).parent) else { continue };
                let PlaceKind::Bridge { link_mbps, .. } = machine.place(bridge).kind else { continue };
                let sharers = chosen.iter().filter(|&&other| map.place(other).is_some_and(|place| machine.place(place).parent == Some(bridge)));
                let count = sharers.count() as u64;
                prop_assert!(link_mbps == 0 || count == 1 || count * SPEED_MBPS <= link_mbps + link_mbps / 100);
            }
        }
    }

    #[test]
    fn over_the_turns_every_near_device_is_used(setup in setups(), gbps in prop::option::of(50..900u64), first in any::<u32>()) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, gbps);
        for node in 0..setup.nodes as u32 {
            let least = (0..devices.len()).map(|at| distance(&machine, node, map.place(at))).min();
            let near: BTreeSet<usize> =
                (0..devices.len()).filter(|&at| Some(distance(&machine, node, map.place(at))) == least).collect();
            let used: BTreeSet<usize> =
                (0..64).flat_map(|turn| map.for_host(&[(node, 1)], u64::from(first) + turn)).collect();
            prop_assert!(near.is_subset(&used), "node {}: near {:?} used {:?}", node, near, used);
        }
    }

    #[test]
    fn the_user_says_how_many_devices_a_host_buffer_gets(setup in setups(), gbps in 1..4000u64, turn in any::<u64>(), shares in prop::collection::vec(0..5u64, 0..5)) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, Some(gbps));
        let nodes: Vec<(u32, u64)> = shares.iter().enumerate().map(|(node, &bytes)| (node as u32, bytes)).collect();
        let chosen = map.for_host(&nodes, turn);
        let wanted = (gbps * 1000 / SPEED_MBPS).max(1) as usize;
        prop_assert_eq!(chosen.len(), wanted.min(devices.len()));
        prop_assert!(distinct(&chosen));
    }

    #[test]
    fn a_buffer_on_several_nodes_gets_the_devices_of_each(setup in setups(), turn in 0..100u64, bytes in 1..u64::MAX / 8) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, None);
        let of = |nodes: &[(u32, u64)]| map.for_host(nodes, turn).into_iter().collect::<BTreeSet<_>>();
        let all: Vec<(u32, u64)> = (0..setup.nodes as u32).map(|node| (node, bytes)).collect();
        let each: BTreeSet<usize> = all.iter().flat_map(|&node| of(&[node])).collect();
        prop_assert_eq!(of(&all), each.clone());
        prop_assert_eq!(of(&[]), each, "memory that nobody can place may be anywhere");
        if setup.nodes > 1 {
            prop_assert_eq!(of(&[(0, 100), (1, 10)]), of(&[(0, 100)]), "a few stray pages do not count");
        }
    }

    #[test]
    fn fewer_devices_are_spread_over_the_bridges(setup in setups(), max in 1..12usize) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let kept = spread(&machine, &devices, max);
        prop_assert_eq!(kept.len(), max.min(devices.len()));
        prop_assert!(kept.is_sorted() && distinct(&kept));
        let map = build(&machine, &devices, None);
        let bridge = |at: usize| map.place(at).and_then(|place| machine.place(place).parent);
        let bridges = |list: &mut dyn Iterator<Item = usize>| list.filter_map(bridge).collect::<BTreeSet<_>>().len();
        prop_assert_eq!(bridges(&mut kept.iter().copied()), bridges(&mut (0..devices.len())).min(max));
    }

    #[test]
    fn the_picture_has_every_device_once_and_a_line_for_each_choice(setup in setups()) {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        let map = build(&machine, &devices, None);
        let svg = Report { machine: &machine, devices: &devices, map: &map, buffers: &[] }.svg();
        let shown = |device: usize| map.place(device).map_or_else(
            || devices[device].name.clone(),
            |place| machine.devices().into_iter().find(|(at, _)| *at == place).unwrap().1.address.to_string(),
        );
        let mut known: Vec<String> = machine.devices().iter().map(|(_, device)| device.address.to_string()).collect();
        known.extend((0..devices.len()).filter(|&device| map.place(device).is_none()).map(shown));
        known.sort();
        prop_assert_eq!(values(&svg, "data-id"), known);
        let lines = map.accelerators().flat_map(|(pci, chosen)| chosen.iter().map(move |&device| (pci, device)));
        let (mut from, mut to): (Vec<String>, Vec<String>) = lines.map(|(pci, device)| (pci.to_string(), shown(device))).unzip();
        from.sort();
        to.sort();
        prop_assert_eq!(values(&svg, "data-from"), from);
        prop_assert_eq!(values(&svg, "data-to"), to);
    }

    #[test]
    fn filters_never_panic_and_never_invent(setup in setups(), text in "[rdmapeth0-9s*?!,:. ]{0,24}") {
        let machine = setup.machine();
        let devices = setup.devices(&machine);
        if let Ok(kept) = DeviceFilter::parse(&text).and_then(|filter| filter.apply(&devices)) {
            prop_assert!(kept.is_sorted() && distinct(&kept) && kept.iter().all(|&at| at < devices.len()));
            prop_assert_eq!(kept.is_empty(), devices.is_empty());
        }
    }
}
