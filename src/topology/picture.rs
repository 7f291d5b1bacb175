//! The machine laid out as a picture: what stands where. [`svg`](super::svg) writes it down.
//!
//! Boxes in boxes are the tree of the machine. Accelerators stand in one column at the left, network devices in rows
//! at the right, so that nothing that leads from one to the other crosses a box: out to the right, up or down in
//! the gutter between them, along a lane above a row of devices, and down. Accelerators with the same devices
//! share that way. All figures are pixels.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::types::PciAddress;

use super::model::{Machine, PciDevice, PlaceId, PlaceKind, Role};
use super::report::{Report, Speed, plural};

/// The picture is as wide as its rows, which get as many devices as fit into the greatest width, and one at least.
const WIDTH_MIN: usize = 640;
const WIDTH_MAX: usize = 1200;
/// Around the picture, and between a frame and what is in it.
pub(super) const INSET: usize = 10;
/// Frames deeper in the tree than this are no further inset: it leaves room for the devices.
const DEPTH_MAX: usize = 8;
pub(super) const CHIP_WIDTH: usize = 150;
pub(super) const CHIP_HEIGHT: usize = 36;
const CHIP_GAP: usize = 8;
/// Between two lanes, and between two channels of the gutter.
const LANE: usize = 7;
/// Height of a frame's label, and of a line of text below the picture.
pub(super) const LABEL: usize = 19;
/// What a character takes at 12 px, on the average of a name or a line of text.
const CHARACTER_WIDTH: f64 = 6.6;
/// The same for addresses and speeds at 11 px: digits are 0.556 em wide in Helvetica, Arial and what stands in for them.
const DETAIL_WIDTH: f64 = 6.0;

/// All of it.
pub(super) struct Picture {
    pub width: usize,
    pub height: usize,
    /// Outer ones before those in them.
    pub frames: Vec<Frame>,
    pub ways: Vec<Way>,
    /// One for each network device of each way, in the ways' order.
    pub ends: Vec<End>,
    /// Lines of text, and where the first stands.
    pub notes: Vec<String>,
    pub notes_y: usize,
}

/// A part of the machine that holds devices or other parts: a NUMA node, a host bridge, a switch.
pub(super) struct Frame {
    pub depth: usize,
    pub label: String,
    pub accelerators: Vec<Chip>,
    pub networks: Vec<Chip>,
    pub y: usize,
    pub height: usize,
}

/// A device.
#[derive(Default)]
pub(super) struct Chip {
    /// PCI address; the name of a device without one.
    pub id: String,
    pub name: String,
    pub detail: String,
    /// Everything that is known of it.
    pub title: String,
    /// The way that an accelerator takes; that of the first accelerator which uses a network device.
    pub way: Option<usize>,
    /// Libfabric's devices on it, by position in the report.
    pub rails: Vec<usize>,
    pub x: usize,
    pub y: usize,
}

/// From accelerators to the devices that they all use.
pub(super) struct Way {
    rails: Vec<usize>,
    /// Where it goes up and down.
    pub channel_x: usize,
}

/// Where a way ends at a network device.
pub(super) struct End {
    pub way: usize,
    pub network: String,
    pub lane_y: usize,
    pub x: usize,
    pub y: usize,
}

impl Way {
    fn uses(&self, network: &Chip) -> bool {
        network.rails.iter().any(|rail| self.rails.contains(rail))
    }
}

impl Frame {
    pub fn inset(&self) -> usize {
        INSET + INSET * self.depth.min(DEPTH_MAX)
    }
}

impl Picture {
    pub fn new(report: &Report) -> Self {
        let mut ways: Vec<Way> = Vec::new();
        let mut way_of = BTreeMap::new();
        for (pci, rails) in report.map.accelerators().filter(|(_, rails)| !rails.is_empty()) {
            let mut rails = rails.to_vec();
            rails.sort_unstable();
            let known = ways.iter().position(|way| way.rails == rails).unwrap_or(ways.len());
            if known == ways.len() {
                ways.push(Way { rails, channel_x: 0 });
            }
            way_of.insert(pci, known);
        }
        let mut tree = Tree { report, ways: &ways, way_of, frames: Vec::new() };
        tree.part(Machine::ROOT, 0, report.counts());
        tree.outside();
        let mut frames = tree.frames;
        let channels = channels(&frames, &ways);
        let notes = notes(report, &ways);
        let columns = Columns::new(&frames, &notes, channels.iter().max().map_or(0, |last| last + 1));
        for (way, channel) in ways.iter_mut().zip(channels) {
            way.channel_x = columns.gutter + channel * LANE;
        }
        let (ends, bottom) = place(&mut frames, &ways, &columns);
        let notes_y = bottom + INSET;
        let height = notes_y + LABEL * notes.len() + INSET;
        Self { width: columns.width, height, frames, ways, ends, notes, notes_y }
    }

    pub fn accelerators(&self) -> impl Iterator<Item = &Chip> {
        self.frames.iter().flat_map(|frame| &frame.accelerators)
    }

    pub fn networks(&self) -> impl Iterator<Item = &Chip> {
        self.frames.iter().flat_map(|frame| &frame.networks)
    }
}

/// Makes frames of the machine's tree.
struct Tree<'a> {
    report: &'a Report<'a>,
    ways: &'a [Way],
    way_of: BTreeMap<PciAddress, usize>,
    frames: Vec<Frame>,
}

impl Tree<'_> {
    fn part(&mut self, at: PlaceId, depth: usize, label: String) {
        let mut frame =
            Frame { depth, label, accelerators: Vec::new(), networks: Vec::new(), y: 0, height: 0 };
        let mut inner = Vec::new();
        for &child in &self.report.machine.place(at).children {
            match leaf(self.report.machine, child) {
                Some((place, device)) if device.role == Role::Network => {
                    frame.networks.push(self.network(place, device));
                }
                Some((place, device)) => frame.accelerators.push(self.accelerator(place, device)),
                None => inner.push(child),
            }
        }
        self.frames.push(frame);
        for child in inner {
            let (end, label) = self.chain(child);
            self.part(end, depth + 1, label);
        }
    }

    /// Bridges that lead to one bridge only are one frame.
    fn chain(&self, at: PlaceId) -> (PlaceId, String) {
        let machine = self.report.machine;
        let (mut end, mut label) = (at, self.report.label(at));
        while !matches!(machine.place(end).kind, PlaceKind::Domain(_))
            && let [only] = machine.place(end).children[..]
            && leaf(machine, only).is_none()
        {
            end = only;
            let _ = write!(label, " > {}", self.report.label(end));
        }
        (end, label)
    }

    fn accelerator(&self, place: PlaceId, device: &PciDevice) -> Chip {
        let way = self.way_of.get(&device.address).copied();
        let count = way.map_or(0, |way| self.ways[way].rails.len());
        Chip {
            id: device.address.to_string(),
            name: format!("{} {}", device.kind_name(), device.address),
            detail: format!("{}, {count} device{}", Speed(device.link_mbps), plural(count)),
            title: self.report.label(place),
            way,
            ..Chip::default()
        }
    }

    fn network(&self, place: PlaceId, device: &PciDevice) -> Chip {
        let rails: Vec<usize> = (0..self.report.devices.len())
            .filter(|&rail| match self.report.map.place(rail) {
                Some(at) => at == place,
                // Selection has no place for a software provider's device; the picture has its interface.
                None => device.interfaces.iter().any(|name| name == self.report.devices[rail].short_name()),
            })
            .collect();
        let name = match rails[..] {
            [] => device.rdma_names.first().or(device.interfaces.first()).cloned().unwrap_or_default(),
            _ => self.report.names(&rails),
        };
        Chip {
            id: device.address.to_string(),
            name: format!("{} {name}", device.kind_name()),
            detail: format!("{}, {}", device.address, Speed(device.link_mbps)),
            title: self.report.label(place),
            way: self.first_way(&rails),
            rails,
            ..Chip::default()
        }
    }

    fn first_way(&self, rails: &[usize]) -> Option<usize> {
        self.ways.iter().position(|way| way.rails.iter().any(|rail| rails.contains(rail)))
    }

    /// A frame for libfabric's devices that the machine does not list.
    fn outside(&mut self) {
        let inside: Vec<usize> = self
            .frames
            .iter()
            .flat_map(|frame| &frame.networks)
            .flat_map(|chip| chip.rails.clone())
            .collect();
        let outside: Vec<Chip> = self
            .report
            .devices
            .iter()
            .enumerate()
            .filter(|(rail, _)| !inside.contains(rail))
            .map(|(rail, device)| Chip {
                id: device.short_name().to_owned(),
                name: device.short_name().to_owned(),
                detail: "no PCI device".to_owned(),
                title: device.name.clone(),
                way: self.first_way(&[rail]),
                rails: vec![rail],
                ..Chip::default()
            })
            .collect();
        if !outside.is_empty() {
            let label = "outside the PCI tree".to_owned();
            let (accelerators, networks) = (Vec::new(), outside);
            self.frames.push(Frame { depth: 1, label, accelerators, networks, y: 0, height: 0 });
        }
    }
}

/// The device that a place is, or that alone hangs below it.
fn leaf(machine: &Machine, at: PlaceId) -> Option<(PlaceId, &PciDevice)> {
    let place = machine.place(at);
    match (&place.kind, &place.children[..]) {
        (PlaceKind::Device(device), _) => Some((at, device)),
        (PlaceKind::Bridge { .. }, &[only]) => leaf(machine, only),
        _ => None,
    }
}

/// For each way a channel of the gutter that no other takes beside the same frames.
fn channels(frames: &[Frame], ways: &[Way]) -> Vec<usize> {
    // The last frame that each channel is taken for.
    let mut taken: Vec<usize> = Vec::new();
    let spans: Vec<(usize, usize)> = (0..ways.len())
        .map(|way| {
            let touches = |frame: &Frame| {
                frame.accelerators.iter().any(|chip| chip.way == Some(way))
                    || frame.networks.iter().any(|chip| ways[way].uses(chip))
            };
            let first = frames.iter().position(touches).unwrap_or(0);
            (first, frames.iter().rposition(touches).unwrap_or(0))
        })
        .collect();
    let mut order: Vec<usize> = (0..ways.len()).collect();
    order.sort_by_key(|&way| spans[way]);
    let mut channels = vec![0; ways.len()];
    for way in order {
        let (first, last) = spans[way];
        let channel = taken.iter().position(|&until| until < first).unwrap_or(taken.len());
        if channel == taken.len() {
            taken.push(last);
        }
        taken[channel] = last;
        channels[way] = channel;
    }
    channels
}

/// What stands where from left to right.
struct Columns {
    accelerators: usize,
    gutter: usize,
    networks: usize,
    /// Network devices in a row.
    per_row: usize,
    width: usize,
}

impl Columns {
    fn new(frames: &[Frame], notes: &[String], channels: usize) -> Self {
        let innermost = frames.iter().map(Frame::inset).max().unwrap_or(INSET);
        let accelerators = innermost + INSET;
        let has_accelerators = frames.iter().any(|frame| !frame.accelerators.is_empty());
        let gutter = accelerators + if has_accelerators { CHIP_WIDTH + 2 * CHIP_GAP } else { 0 };
        let networks = gutter + if has_accelerators { channels * LANE + CHIP_GAP } else { 0 };
        let span = |count: usize| count * (CHIP_WIDTH + CHIP_GAP) - CHIP_GAP;
        let most = frames.iter().map(|frame| frame.networks.len()).max().unwrap_or(0).max(1);
        let room = WIDTH_MAX.saturating_sub(networks + accelerators);
        let per_row = (1..=most).rev().find(|&count| span(count) <= room).unwrap_or(1);
        let texts = frames.iter().map(|frame| (frame.inset(), &frame.label));
        let texts = texts.chain(notes.iter().map(|note| (0, note)));
        let widest = texts.map(|(inset, text)| 2 * (inset + INSET) + text_width(text)).max().unwrap_or(0);
        let width = (networks + span(per_row) + accelerators).max(widest.clamp(WIDTH_MIN, WIDTH_MAX));
        Self { accelerators, gutter, networks, per_row, width }
    }
}

/// What the picture does not draw: how to read it, and the choices for host memory.
fn notes(report: &Report, ways: &[Way]) -> Vec<String> {
    let mut notes = Vec::new();
    if !ways.is_empty() {
        notes.push(
            "Lines: the network devices that memory of an accelerator uses. Dashed: not usable here."
                .to_owned(),
        );
    }
    notes.push(report.host_heading());
    notes.extend(report.host_rows().into_iter().map(|(name, nodes)| {
        let turn = |turn| report.names(&report.map.for_host(&nodes, turn));
        let (first, second) = (turn(0), turn(1));
        if first == second {
            format!("{name}: {first}")
        } else {
            format!("{name}: {first}, then {second}, \u{2026}")
        }
    }));
    notes
}

fn text_width(text: &str) -> usize {
    (text.chars().count() as f64 * CHARACTER_WIDTH) as usize
}

/// The text, with an ellipsis where it would be wider than `room`.
pub(super) fn fitting(text: &str, detail: bool, room: usize) -> String {
    let fits = (room as f64 / if detail { DETAIL_WIDTH } else { CHARACTER_WIDTH }) as usize;
    if text.chars().count() <= fits {
        return text.to_owned();
    }
    text.chars().take(fits.saturating_sub(1)).chain(['\u{2026}']).collect()
}

/// Places frames and devices from top to bottom; returns where ways end, and where the picture does.
fn place(frames: &mut [Frame], ways: &[Way], columns: &Columns) -> (Vec<End>, usize) {
    let (mut ends, mut y): (Vec<End>, usize) = (Vec::new(), INSET);
    let mut open: Vec<usize> = Vec::new();
    for at in 0..=frames.len() {
        let depth = frames.get(at).map(|frame| frame.depth);
        while let Some(&last) = open.last()
            && depth.is_none_or(|depth| frames[last].depth >= depth)
        {
            open.pop();
            frames[last].height = y - frames[last].y;
            y += INSET;
        }
        if let Some(frame) = frames.get_mut(at) {
            frame.y = y;
            y = place_devices(frame, ways, columns, &mut ends);
            open.push(at);
        }
    }
    ends.sort_by_key(|end| end.way);
    (ends, y - INSET)
}

/// Places the devices of a frame; returns where what comes next may begin.
fn place_devices(frame: &mut Frame, ways: &[Way], columns: &Columns, ends: &mut Vec<End>) -> usize {
    let top = frame.y + LABEL;
    let (mut y, mut first_y) = (top, top + LANE);
    for (row, chips) in frame.networks.chunks_mut(columns.per_row).enumerate() {
        let lanes: Vec<usize> =
            (0..ways.len()).filter(|&way| chips.iter().any(|chip| ways[way].uses(chip))).collect();
        let lane_y = |lane: usize| y + LANE * (lane + 1);
        let chips_y = lane_y(lanes.len());
        for (at, chip) in chips.iter_mut().enumerate() {
            (chip.x, chip.y) = (columns.networks + at * (CHIP_WIDTH + CHIP_GAP), chips_y);
            let used: Vec<usize> = (0..lanes.len()).filter(|&lane| ways[lanes[lane]].uses(chip)).collect();
            ends.extend(used.iter().enumerate().map(|(nth, &lane)| End {
                way: lanes[lane],
                network: chip.id.clone(),
                lane_y: lane_y(lane),
                x: chip.x + CHIP_WIDTH * (nth + 1) / (used.len() + 1),
                y: chips_y,
            }));
        }
        if row == 0 {
            first_y = chips_y;
        }
        y = chips_y + CHIP_HEIGHT + INSET;
    }
    for (at, chip) in frame.accelerators.iter_mut().enumerate() {
        (chip.x, chip.y) = (columns.accelerators, first_y + at * (CHIP_HEIGHT + CHIP_GAP));
        y = y.max(chip.y + CHIP_HEIGHT + INSET);
    }
    y
}
