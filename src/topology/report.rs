//! The machine and the choices on it in words, for the command and for the log.

use std::fmt::{self, Write};

use crate::error::{Error, Result};
use crate::types::PciAddress;

use super::json::Json;
use super::model::{Machine, PciDevice, PlaceId, PlaceKind, Role};
use super::select::{RailDevice, RailMap};

/// Turns shown for host memory: enough to see that they differ.
const TURNS_SHOWN: u64 = 2;

/// A buffer that somebody asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// Host memory on a NUMA node.
    Host(u32),
    /// Memory of the accelerator at a PCI address.
    Accelerator(PciAddress),
}

/// Reads `numa:0` or `gpu:0000:53:00.0`.
pub fn parse_buffer(text: &str) -> Result<Buffer> {
    let parsed = match text.split_once(':') {
        Some(("numa", node)) => node.parse().ok().map(Buffer::Host),
        Some(("gpu", pci)) => pci.parse().ok().map(Buffer::Accelerator),
        _ => None,
    };
    parsed.ok_or_else(|| Error::invalid(format!("buffer `{text}`: want numa:NODE or gpu:PCI-ADDRESS")))
}

/// A machine, libfabric's devices on it, and the map between memory and devices.
pub struct Report<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// The devices.
    pub devices: &'a [RailDevice],
    /// The choices.
    pub map: &'a RailMap,
    /// Buffers to answer for on top.
    pub buffers: &'a [Buffer],
}

impl Report<'_> {
    /// All of it, for people: the tree, then the tables.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "read from {}\n{}", self.machine.origin(), self.counts());
        out.push_str("\nMachine\n");
        self.tree(&mut out, Machine::ROOT, "");
        out.push('\n');
        out.push_str(&self.tables());
        out
    }

    /// The tables alone: devices, accelerators, host memory, buffers.
    pub fn tables(&self) -> String {
        let devices = self.devices.iter().enumerate().map(|(at, device)| {
            let found = self.place(at);
            let pci = found.map(|(_, found)| found.address).or(device.pci);
            vec![
                at.to_string(),
                device.short_name().to_owned(),
                pci.map_or("no PCI".to_owned(), |pci| pci.to_string()),
                self.near(found.map(|(place, _)| place)),
                format!("line {}", Speed(device.speed_bps / 1_000_000)),
                format!("PCIe {}", Speed(found.map_or(0, |(_, found)| found.link_mbps))),
            ]
        });
        let accelerators = self.map.accelerators().map(|(pci, devices)| {
            let found = self.accelerator(pci);
            let kind = found.map_or("GPU", |(_, found)| found.kind_name());
            vec![format!("{kind} {pci}"), self.near(found.map(|(place, _)| place)), self.names(devices)]
        });
        let host = self.host_rows().into_iter().flat_map(|(name, nodes)| {
            (0..TURNS_SHOWN).map(move |turn| {
                let name = if turn == 0 { name.clone() } else { String::new() };
                vec![name, format!("turn {turn}"), self.names(&self.map.for_host(&nodes, turn))]
            })
        });
        let mut out = table("Devices", devices);
        out.push_str(&table("\nAccelerator memory", accelerators));
        out.push_str(&table(&format!("\n{}", self.host_heading()), host));
        for buffer in self.buffers {
            let (name, devices) = self.answer(*buffer);
            let _ = writeln!(out, "\nBuffer {name}\n  {}", self.names(&devices));
        }
        out
    }

    /// All of it, for programs.
    pub fn json(&self) -> String {
        let names = |devices: &[usize]| Json::list(devices, |&at| Json::text(self.devices[at].short_name()));
        let nodes = Json::list(self.machine.nodes(), |node| {
            let others = self.machine.nodes().iter();
            Json::Object(vec![
                ("node", Json::Number(node.id.into())),
                ("memory_bytes", Json::Number(node.memory_bytes)),
                (
                    "distances",
                    Json::list(others, |to| Json::Number(self.machine.distance(node.id, to.id).into())),
                ),
            ])
        });
        let devices = Json::list(self.devices.iter().enumerate(), |(at, device)| {
            let found = self.place(at);
            let pci = found.map(|(_, found)| found.address).or(device.pci);
            Json::Object(vec![
                ("name", Json::text(device.short_name())),
                ("pci", pci.map_or(Json::Null, |pci| Json::text(&pci))),
                ("numa", self.near_json(found.map(|(place, _)| place))),
                ("speed_mbps", Json::Number(device.speed_bps / 1_000_000)),
                ("link_mbps", Json::Number(found.map_or(0, |(_, found)| found.link_mbps))),
            ])
        });
        let accelerators = Json::list(self.map.accelerators(), |(pci, devices)| {
            let found = self.accelerator(pci);
            Json::Object(vec![
                ("kind", found.map_or(Json::Null, |(_, found)| Json::text(found.kind_name()))),
                ("pci", Json::text(&pci)),
                ("numa", self.near_json(found.map(|(place, _)| place))),
                ("devices", names(devices)),
            ])
        });
        let host = Json::list(self.host_rows(), |(_, nodes)| {
            let turns = Json::list(0..TURNS_SHOWN, |turn| names(&self.map.for_host(&nodes, turn)));
            let node = nodes.first().map_or(Json::Null, |&(node, _)| Json::Number(node.into()));
            Json::Object(vec![("node", node), ("turns", turns)])
        });
        let buffers = Json::list(self.buffers, |&buffer| {
            let (name, devices) = self.answer(buffer);
            Json::Object(vec![("buffer", Json::text(&name)), ("devices", names(&devices))])
        });
        let report = Json::Object(vec![
            ("origin", Json::text(self.machine.origin())),
            ("nodes", nodes),
            ("tree", self.tree_json(Machine::ROOT)),
            ("devices", devices),
            ("accelerators", accelerators),
            ("host", host),
            ("buffers", buffers),
        ]);
        format!("{report}\n")
    }

    /// How much of what there is.
    pub(super) fn counts(&self) -> String {
        let nodes = self.machine.nodes().len();
        let accelerators = self.machine.accelerators().len();
        let networks = self.machine.devices().len() - accelerators;
        format!(
            "{nodes} NUMA node{}, {accelerators} accelerator{}, {networks} network device{}; {} usable here",
            plural(nodes),
            plural(accelerators),
            plural(networks),
            self.devices.len()
        )
    }

    pub(super) fn host_heading(&self) -> String {
        match self.map.host_devices_max() {
            Some(max) => format!("Host memory, at most {max}, by max_bw_per_dram_seg"),
            None => "Host memory, as many as the PCIe links feed".to_owned(),
        }
    }

    fn tree(&self, out: &mut String, at: PlaceId, indent: &str) {
        let children = &self.machine.place(at).children;
        for (index, &child) in children.iter().enumerate() {
            let last = index + 1 == children.len();
            let mut label = self.label(child);
            let mut end = child;
            // Switch ports with one device below take a line together with it.
            while let (PlaceKind::Bridge { .. }, [only]) =
                (&self.machine.place(end).kind, &self.machine.place(end).children[..])
            {
                end = *only;
                let _ = write!(label, " > {}", self.label(end));
            }
            let _ = writeln!(out, "{indent}{} {label}", if last { "`-" } else { "|-" });
            self.tree(out, end, &format!("{indent}{}", if last { "   " } else { "|  " }));
        }
    }

    pub(super) fn label(&self, at: PlaceId) -> String {
        match &self.machine.place(at).kind {
            PlaceKind::Machine => "Machine".to_owned(),
            PlaceKind::Domain(nodes) => {
                let memory = |node: &&super::model::NumaNode| nodes.contains(&node.id);
                let bytes: u64 =
                    self.machine.nodes().iter().filter(memory).map(|node| node.memory_bytes).sum();
                format!("NUMA {} ({} GiB)", list(nodes), bytes >> 30)
            }
            PlaceKind::HostBridge { domain, bus } => format!("host bridge {domain:04x}:{bus:02x}"),
            PlaceKind::Bridge { address, link_mbps } => format!("bridge {address} {}", Speed(*link_mbps)),
            PlaceKind::Device(device) => self.device_label(at, device),
        }
    }

    fn device_label(&self, at: PlaceId, device: &PciDevice) -> String {
        let mut label = format!("{} {}", device.kind_name(), device.address);
        for name in device.rdma_names.iter().chain(&device.interfaces) {
            let _ = write!(label, " {name}");
        }
        let _ = write!(label, " {}", Speed(device.link_mbps));
        let rails: Vec<usize> =
            (0..self.devices.len()).filter(|&rail| self.map.place(rail) == Some(at)).collect();
        for rail in &rails {
            let _ = write!(label, " [device {rail}]");
        }
        if rails.is_empty() && device.role == Role::Network && !device.rdma_names.is_empty() {
            label.push_str(" [not usable here]");
        }
        label
    }

    fn tree_json(&self, at: PlaceId) -> Json {
        let place = self.machine.place(at);
        let mut members = match &place.kind {
            PlaceKind::Machine => vec![("type", Json::text("machine"))],
            PlaceKind::Domain(nodes) => {
                vec![
                    ("type", Json::text("numa")),
                    ("nodes", Json::list(nodes, |&node| Json::Number(node.into()))),
                ]
            }
            PlaceKind::HostBridge { domain, bus } => {
                vec![
                    ("type", Json::text("host bridge")),
                    ("bus", Json::text(&format!("{domain:04x}:{bus:02x}"))),
                ]
            }
            PlaceKind::Bridge { address, link_mbps } => vec![
                ("type", Json::text("bridge")),
                ("pci", Json::text(address)),
                ("link_mbps", Json::Number(*link_mbps)),
            ],
            PlaceKind::Device(device) => vec![
                ("type", Json::text(device.kind_name())),
                ("pci", Json::text(&device.address)),
                ("id", Json::text(&format!("{:04x}:{:04x}", device.vendor, device.id))),
                ("link_mbps", Json::Number(device.link_mbps)),
                ("names", Json::list(device.rdma_names.iter().chain(&device.interfaces), Json::text)),
            ],
        };
        if !place.children.is_empty() {
            members.push(("children", Json::list(&place.children, |&child| self.tree_json(child))));
        }
        Json::Object(members)
    }

    fn place(&self, device: usize) -> Option<(PlaceId, &PciDevice)> {
        let place = self.map.place(device)?;
        match &self.machine.place(place).kind {
            PlaceKind::Device(found) => Some((place, found)),
            _ => None,
        }
    }

    fn accelerator(&self, pci: PciAddress) -> Option<(PlaceId, &PciDevice)> {
        self.machine.accelerators().into_iter().find(|(_, found)| found.address == pci)
    }

    /// One row for each NUMA node, or one for memory that nobody can place.
    pub(super) fn host_rows(&self) -> Vec<(String, Vec<(u32, u64)>)> {
        let row = |id: u32| (format!("NUMA {id}"), vec![(id, 1)]);
        let rows: Vec<_> = self.machine.nodes().iter().map(|node| row(node.id)).collect();
        if rows.is_empty() { vec![("any".to_owned(), Vec::new())] } else { rows }
    }

    fn answer(&self, buffer: Buffer) -> (String, Vec<usize>) {
        match buffer {
            Buffer::Host(node) => (format!("numa:{node}"), self.map.for_host(&[(node, 1)], 0)),
            Buffer::Accelerator(pci) => (format!("gpu:{pci}"), self.map.for_accelerator(Some(pci))),
        }
    }

    pub(super) fn names(&self, devices: &[usize]) -> String {
        let names: Vec<&str> = devices.iter().map(|&at| self.devices[at].short_name()).collect();
        if names.is_empty() { "no device".to_owned() } else { names.join(" ") }
    }

    fn near(&self, place: Option<PlaceId>) -> String {
        match self.machine.near(place.unwrap_or(Machine::ROOT)) {
            [] => "NUMA ?".to_owned(),
            nodes => format!("NUMA {}", list(nodes)),
        }
    }

    fn near_json(&self, place: Option<PlaceId>) -> Json {
        Json::list(self.machine.near(place.unwrap_or(Machine::ROOT)), |&node| Json::Number(node.into()))
    }
}

/// A heading, and rows with their columns aligned.
fn table(heading: &str, rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    let mut out = format!("{heading}\n");
    if rows.is_empty() {
        out.push_str("  none\n");
    }
    for row in &rows {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let width = rows.iter().filter_map(|row| row.get(at)).map(String::len).max().unwrap_or(0);
            let _ = write!(line, "  {cell:<width$}");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A speed in Mb/s, written in Gb/s.
pub(super) struct Speed(pub(super) u64);

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("? Gb/s"),
            mbps if mbps < 10_000 => write!(f, "{:.1} Gb/s", mbps as f64 / 1000.0),
            mbps => write!(f, "{} Gb/s", mbps / 1000),
        }
    }
}

fn list(nodes: &[u32]) -> String {
    nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

pub(super) fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}
