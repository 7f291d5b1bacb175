//! The machine as selection sees it: a tree of places, with NUMA distances beside it.

use std::path::Path;
use std::sync::OnceLock;

use crate::error::Result;
use crate::types::PciAddress;

use super::{hwloc, sysfs};

/// Distance of a node to itself in the ACPI SLIT, and the unit of every other distance.
const DISTANCE_LOCAL: u32 = 10;
/// Distance taken for two different nodes where the firmware says nothing: the kernel's `REMOTE_DISTANCE`.
const DISTANCE_REMOTE: u32 = 20;

/// PCI vendor numbers.
const NVIDIA: u16 = 0x10de;
const AMAZON: u16 = 0x1d0f;

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaNode {
    /// Number that the kernel gives it.
    pub id: u32,
    /// Memory, in bytes; 0 where unknown.
    pub memory_bytes: u64,
}

/// Family of an accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceleratorKind {
    /// NVIDIA GPU.
    Nvidia,
    /// AWS Inferentia or Trainium.
    Neuron,
}

impl AcceleratorKind {
    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvidia => "GPU",
            Self::Neuron => "Neuron",
        }
    }
}

/// Why a PCI device is in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Holds memory that transfers may name.
    Accelerator(AcceleratorKind),
    /// Moves data over a network.
    Network,
}

impl Role {
    /// Role of a PCI device by its vendor, device and class numbers; `None` for everything that selection
    /// has no use for.
    ///
    /// Vendor 10de with a display class (03xx) is an NVIDIA GPU: its switches and network devices have
    /// other classes. Neuron devices have no class of their own and are known by the numbers in AWS's driver.
    pub fn of(vendor: u16, id: u16, class: u16) -> Option<Self> {
        // Inf1, Trn1, Inf2, Trn2, Trn3.
        const NEURON: [u16; 9] = [0x7064, 0x7065, 0x7066, 0x7067, 0x7164, 0x7264, 0x7364, 0x7564, 0x7565];
        match (vendor, class >> 8) {
            (NVIDIA, 0x03) => Some(Self::Accelerator(AcceleratorKind::Nvidia)),
            (AMAZON, _) if NEURON.contains(&id) => Some(Self::Accelerator(AcceleratorKind::Neuron)),
            (_, 0x02) => Some(Self::Network),
            _ => None,
        }
    }
}

/// A PCI function that selection cares about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    /// Where it is.
    pub address: PciAddress,
    /// Vendor number.
    pub vendor: u16,
    /// Device number of that vendor.
    pub id: u16,
    /// What it is for.
    pub role: Role,
    /// Speed of its own PCI link in Mb/s; 0 where the machine does not say, as in many virtual machines.
    pub link_mbps: u64,
    /// Names under `/sys/class/infiniband`.
    pub rdma_names: Vec<String>,
    /// Names under `/sys/class/net`.
    pub interfaces: Vec<String>,
}

impl PciDevice {
    /// Whether it is an Elastic Fabric Adapter: numbers efa0 to efa3 of Amazon, one for each generation.
    pub fn is_efa(&self) -> bool {
        self.vendor == AMAZON && self.id & 0xfff0 == 0xefa0
    }

    /// What a person calls the kind of device.
    pub fn kind_name(&self) -> &'static str {
        match self.role {
            Role::Accelerator(kind) => kind.name(),
            Role::Network if self.is_efa() => "EFA",
            Role::Network => "NIC",
        }
    }
}

/// What stands at a place of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlaceKind {
    /// The root.
    Machine,
    /// A part of the machine that is near these NUMA nodes: a node, a socket.
    Domain(Vec<u32>),
    /// Where PCI begins.
    HostBridge {
        /// PCI domain.
        domain: u32,
        /// Root bus.
        bus: u8,
    },
    /// A PCI-to-PCI bridge: a root port, or a port of a switch.
    Bridge {
        /// Where it is.
        address: PciAddress,
        /// Speed of its upstream link in Mb/s; 0 where unknown.
        link_mbps: u64,
    },
    /// A device.
    Device(PciDevice),
}

impl PlaceKind {
    /// What makes a place itself among its siblings, and the order of siblings.
    fn key(&self) -> (u8, Vec<u32>, Option<PciAddress>) {
        let at = |domain, bus| PciAddress { domain, bus, device: 0, function: 0 };
        match self {
            Self::Machine => (0, Vec::new(), None),
            Self::Domain(nodes) => (1, nodes.clone(), None),
            Self::HostBridge { domain, bus } => (2, Vec::new(), Some(at(*domain, *bus))),
            Self::Bridge { address, .. } => (3, Vec::new(), Some(*address)),
            Self::Device(device) => (3, Vec::new(), Some(device.address)),
        }
    }
}

/// Index of a [`Place`] in its [`Machine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlaceId(usize);

/// A place of the tree.
#[derive(Debug, Clone)]
pub struct Place {
    /// What it is.
    pub kind: PlaceKind,
    /// The place that it is part of; none for the root.
    pub parent: Option<PlaceId>,
    /// Its parts, in PCI order.
    pub children: Vec<PlaceId>,
}

/// The machine model.
///
/// Every leaf is an accelerator or a network device: the readers leave out what selection cannot use.
#[derive(Debug, Clone)]
pub struct Machine {
    origin: String,
    nodes: Vec<NumaNode>,
    /// Row and column by position in `nodes`; empty where unknown.
    distances: Vec<Vec<u32>>,
    /// What everything is near to where there is but one node.
    only_node: Vec<u32>,
    places: Vec<Place>,
}

impl Machine {
    /// The root place.
    pub const ROOT: PlaceId = PlaceId(0);

    /// The machine that this process runs on.
    ///
    /// Never fails: without libhwloc the kernel's files are read, and where those say nothing either, the
    /// result is a flat machine on which everything is equally near. [`Machine::origin`] says which it was.
    pub fn discover() -> Self {
        match hwloc::read_this_machine() {
            Ok(machine) => machine,
            Err(why) => sysfs::read(Path::new("/"), &format!("libhwloc not used: {why}")),
        }
    }

    /// [`discover`](Self::discover), once in a process: it costs hwloc about 0.3 s.
    pub fn here() -> &'static Self {
        static HERE: OnceLock<Machine> = OnceLock::new();
        HERE.get_or_init(Self::discover)
    }

    /// The machine that a file of `lstopo --of xml` describes. Needs libhwloc.
    pub fn from_xml(path: &Path) -> Result<Self> {
        hwloc::read_xml(path)
    }

    /// The machine whose `/sys` lies below `root`.
    pub fn from_sysfs(root: &Path) -> Self {
        sysfs::read(root, "as asked")
    }

    /// A machine with nothing in it.
    pub fn empty(origin: impl Into<String>) -> Self {
        let root = Place { kind: PlaceKind::Machine, parent: None, children: Vec::new() };
        Self {
            origin: origin.into(),
            nodes: Vec::new(),
            distances: Vec::new(),
            only_node: Vec::new(),
            places: vec![root],
        }
    }

    /// Says what is known of NUMA: the nodes, and their distances, row by row in the same order. A matrix of
    /// another shape is left out.
    pub fn set_numa(&mut self, mut nodes: Vec<NumaNode>, distances: &[Vec<u32>]) {
        let square = distances.len() == nodes.len() && distances.iter().all(|row| row.len() == nodes.len());
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.sort_by_key(|&at| nodes[at].id);
        self.distances = if square {
            order.iter().map(|&row| order.iter().map(|&column| distances[row][column]).collect()).collect()
        } else {
            Vec::new()
        };
        nodes.sort_by_key(|node| node.id);
        self.only_node = if let [node] = &nodes[..] { vec![node.id] } else { Vec::new() };
        self.nodes = nodes;
    }

    /// The part of `parent` that is `kind`, added if it is new.
    pub fn add(&mut self, parent: PlaceId, kind: PlaceKind) -> PlaceId {
        let key = kind.key();
        let children = &self.places[parent.0].children;
        let at = children.partition_point(|&child| self.place(child).kind.key() < key);
        if let Some(&child) = children.get(at)
            && self.place(child).kind.key() == key
        {
            return child;
        }
        let id = PlaceId(self.places.len());
        self.places.push(Place { kind, parent: Some(parent), children: Vec::new() });
        self.places[parent.0].children.insert(at, id);
        id
    }

    /// Who read the machine, and why.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The NUMA nodes, by number.
    pub fn nodes(&self) -> &[NumaNode] {
        &self.nodes
    }

    /// A place.
    pub fn place(&self, id: PlaceId) -> &Place {
        &self.places[id.0]
    }

    /// `id` and the places that it is part of, innermost first.
    pub fn ancestry(&self, id: PlaceId) -> impl Iterator<Item = PlaceId> + '_ {
        std::iter::successors(Some(id), |&at| self.place(at).parent)
    }

    /// The devices of the machine, in PCI order.
    pub fn devices(&self) -> Vec<(PlaceId, &PciDevice)> {
        let mut devices: Vec<_> = self
            .places
            .iter()
            .enumerate()
            .filter_map(|(at, place)| match &place.kind {
                PlaceKind::Device(device) => Some((PlaceId(at), device)),
                _ => None,
            })
            .collect();
        devices.sort_by_key(|(_, device)| device.address);
        devices
    }

    /// The accelerators of the machine, in PCI order.
    pub fn accelerators(&self) -> Vec<(PlaceId, &PciDevice)> {
        let mut devices = self.devices();
        devices.retain(|(_, device)| matches!(device.role, Role::Accelerator(_)));
        devices
    }

    /// The NUMA nodes that a place is near to; empty where the machine does not say.
    pub fn near(&self, id: PlaceId) -> &[u32] {
        self.ancestry(id)
            .find_map(|at| match &self.place(at).kind {
                PlaceKind::Domain(nodes) => Some(nodes.as_slice()),
                _ => None,
            })
            .unwrap_or(&self.only_node)
    }

    /// Distance between two NUMA nodes, in tenths of a local access as the firmware's SLIT counts it.
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        let at = |id| self.nodes.iter().position(|node| node.id == id);
        match (at(from), at(to)) {
            (Some(row), Some(column)) if !self.distances.is_empty() => self.distances[row][column],
            _ if from == to => DISTANCE_LOCAL,
            _ => DISTANCE_REMOTE,
        }
    }
}
