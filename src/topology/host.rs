//! Devices for host memory: those of the buffer's NUMA node, as many as the PCI links above them can feed.
//!
//! A p5 has sixteen devices of 100 Gb/s on each node, but the four links above them carry 126 Gb/s each: four devices
//! use them up, and more would only wait for each other. Where the machine says nothing of its links, all devices
//! of the node serve it; devices of other nodes only where `max_bw_per_dram_seg` asks for them.

use std::collections::BTreeMap;

use super::model::{Machine, PlaceId, PlaceKind};
use super::select::{RailDevice, in_pci_order, interleave, uplink};

/// Megabits per second in a gigabit per second.
const MBPS_PER_GBPS: u64 = 1000;

/// Part of a link's speed by which devices may exceed it: the figures of links are rounded, and two devices of
/// 252.06 Gb/s must fit a link of 504.12.
const LINK_TOLERANCE_PERCENT: u64 = 1;

/// What selection for host memory needs, computed once.
#[derive(Debug, Clone)]
pub(super) struct HostPlan {
    /// By position in the caller's list.
    rails: Vec<Rail>,
    /// One for each NUMA node; one for all where no node is known.
    plans: Vec<NodePlan>,
    devices_max: Option<usize>,
}

/// A device, and the links that it shares.
#[derive(Debug, Clone, Default)]
struct Rail {
    /// Bandwidth that it takes in Mb/s; 0 where unknown.
    need_mbps: u64,
    /// Bridges above it whose speed is known, with that speed in Mb/s.
    feeds: Vec<(PlaceId, u64)>,
}

/// All devices as seen from one node: nearest first.
#[derive(Debug, Clone)]
struct NodePlan {
    node: u32,
    tiers: Vec<Tier>,
}

/// Devices at one distance, grouped by the link that they share.
#[derive(Debug, Clone)]
struct Tier {
    groups: Vec<Vec<usize>>,
}

impl HostPlan {
    pub(super) fn new(
        machine: &Machine,
        devices: &[RailDevice],
        places: &[Option<PlaceId>],
        max_gbps: Option<u64>,
    ) -> Self {
        let located = in_pci_order(machine, devices, places);
        let rails = rails(machine, devices, &located);
        let mut order: Vec<(Option<PlaceId>, usize)> =
            located.iter().map(|&(place, device)| (Some(place), device)).collect();
        let mut rest: Vec<usize> = (0..devices.len()).filter(|&device| places[device].is_none()).collect();
        rest.sort_by_key(|&device| (&devices[device].name, device));
        order.extend(rest.into_iter().map(|device| (None, device)));

        let mut nodes: Vec<u32> = machine.nodes().iter().map(|node| node.id).collect();
        if nodes.is_empty() {
            nodes.push(0);
        }
        let plans =
            nodes.into_iter().map(|node| NodePlan { node, tiers: tiers(machine, node, &order) }).collect();
        let devices_max = max_gbps.map(|gbps| devices_for(gbps, &rails));
        Self { rails, plans, devices_max }
    }

    pub(super) fn devices_max(&self) -> Option<usize> {
        self.devices_max
    }

    pub(super) fn select(&self, nodes: &[(u32, u64)], turn: u64) -> Vec<usize> {
        let homes = self.homes(nodes);
        let mut chosen: Vec<usize> = Vec::new();
        let mut add = |devices: Vec<usize>| {
            for device in devices {
                if !chosen.contains(&device) {
                    chosen.push(device);
                }
            }
            chosen.len()
        };
        let Some(max) = self.devices_max else {
            for home in homes {
                add(self.of_node(home, None, turn));
            }
            return chosen;
        };
        let (each, extra) = (max / homes.len(), max % homes.len());
        let mut have = 0;
        for (at, home) in homes.iter().enumerate() {
            have = add(self.of_node(home, Some(each + usize::from(at < extra)), turn));
        }
        if have < max {
            // Two nodes share their nearest devices: fill up from what is next.
            add(self.of_node(homes[0], Some(max), turn));
            chosen.truncate(max);
        }
        chosen
    }

    /// The nodes that count for a buffer, the one with most bytes first: those with at least half of an even
    /// share, so that a few stray pages on another node do not double the rails. All nodes where none is known.
    fn homes(&self, nodes: &[(u32, u64)]) -> Vec<&NodePlan> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for &(node, len) in nodes {
            let sum = bytes.entry(node).or_default();
            *sum = sum.saturating_add(len);
        }
        bytes.retain(|_, len| *len > 0);
        let total: u128 = bytes.values().map(|&len| u128::from(len)).sum();
        let count = bytes.len() as u128;
        let mut homes: Vec<(u64, &NodePlan)> = self
            .plans
            .iter()
            .filter_map(|plan| Some((*bytes.get(&plan.node)?, plan)))
            .filter(|&(len, _)| u128::from(len) * 2 * count >= total)
            .collect();
        homes.sort_by_key(|&(len, plan)| (std::cmp::Reverse(len), plan.node));
        if homes.is_empty() {
            return self.plans.iter().collect();
        }
        homes.into_iter().map(|(_, plan)| plan).collect()
    }

    /// Devices for memory of one node: `max` of them, else what the links of the nearest can feed.
    fn of_node(&self, plan: &NodePlan, max: Option<usize>, turn: u64) -> Vec<usize> {
        let Some(max) = max else {
            return plan.tiers.first().map(|tier| self.of_tier(tier, None, turn)).unwrap_or_default();
        };
        let mut chosen = Vec::new();
        for tier in &plan.tiers {
            let left = max - chosen.len();
            if left == 0 {
                break;
            }
            chosen.extend(self.of_tier(tier, Some(left), turn));
        }
        chosen
    }

    /// Devices of one tier. Each turn goes on where the turn before stopped, in every group, so that over the turns
    /// all devices are used alike.
    fn of_tier(&self, tier: &Tier, max: Option<usize>, turn: u64) -> Vec<usize> {
        let first = self.take(&tier.order(&[], 0), max);
        let (count, groups) = (first.len(), tier.groups.len());
        if count < groups {
            // Fewer than one for each link: the links take turns too.
            let pick = |at: usize| {
                let pick = turn.wrapping_mul(count as u64).wrapping_add(at as u64);
                let group = &tier.groups[(pick % groups as u64) as usize];
                group[(pick / groups as u64 % group.len() as u64) as usize]
            };
            return (0..count).map(pick).collect();
        }
        let shares: Vec<usize> = tier
            .groups
            .iter()
            .map(|group| group.iter().filter(|device| first.contains(device)).count())
            .collect();
        self.take(&tier.order(&shares, turn), max)
    }

    /// From `order`, every device that the links above still feed, a link always feeding one; up to `max`. Where a
    /// `max` asks for more than the links feed, the next in order come on top: the user has the last word.
    fn take(&self, order: &[usize], max: Option<usize>) -> Vec<usize> {
        let limit = max.unwrap_or(usize::MAX);
        let mut used: BTreeMap<PlaceId, u64> = BTreeMap::new();
        let mut chosen = Vec::new();
        for &device in order {
            if chosen.len() == limit {
                return chosen;
            }
            let rail = &self.rails[device];
            let fits = |&(bridge, mbps): &(PlaceId, u64)| {
                let fed = mbps.saturating_add(mbps / 100 * LINK_TOLERANCE_PERCENT);
                used.get(&bridge).is_none_or(|used| used.saturating_add(rail.need_mbps) <= fed)
            };
            if rail.feeds.iter().all(fits) {
                for &(bridge, _) in &rail.feeds {
                    let used = used.entry(bridge).or_default();
                    *used = used.saturating_add(rail.need_mbps);
                }
                chosen.push(device);
            }
        }
        if max.is_some() {
            let more: Vec<usize> = order.iter().copied().filter(|device| !chosen.contains(device)).collect();
            chosen.extend(more.into_iter().take(limit - chosen.len()));
        }
        chosen
    }
}

impl Tier {
    /// Devices with the link that each hangs on; one without a link shares none.
    fn new(devices: &[(Option<PlaceId>, usize)]) -> Self {
        let mut links: Vec<Option<PlaceId>> = Vec::new();
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for &(link, device) in devices {
            if let Some(at) = links.iter().position(|&known| link.is_some() && known == link) {
                groups[at].push(device);
            } else {
                links.push(link);
                groups.push(vec![device]);
            }
        }
        Self { groups }
    }

    /// The devices, one of each group in turn. Group `g` starts `turn * shares[g]` places on.
    fn order(&self, shares: &[usize], turn: u64) -> Vec<usize> {
        let rotated = |(at, group): (usize, &Vec<usize>)| {
            let share = shares.get(at).copied().unwrap_or(0) as u64;
            let start = (turn % group.len() as u64 * share % group.len() as u64) as usize;
            [&group[start..], &group[..start]].concat()
        };
        interleave(&self.groups.iter().enumerate().map(rotated).collect::<Vec<_>>())
    }
}

fn rails(machine: &Machine, devices: &[RailDevice], located: &[(PlaceId, usize)]) -> Vec<Rail> {
    let own_link = |place| match &machine.place(place).kind {
        PlaceKind::Device(device) => device.link_mbps,
        _ => 0,
    };
    let mut rails: Vec<Rail> = devices
        .iter()
        .map(|device| Rail { need_mbps: device.speed_bps / 1_000_000, feeds: Vec::new() })
        .collect();
    // A bridge that claims to be slower than a device below it reports a link in power saving, or the figment of a
    // hypervisor (a GB200 instance of EC2 says 16 Gb/s above devices of 504): then its speed is unknown.
    let mut fastest_below: BTreeMap<PlaceId, u64> = BTreeMap::new();
    for &(place, _) in located {
        for above in machine.ancestry(place).skip(1) {
            let fastest = fastest_below.entry(above).or_default();
            *fastest = own_link(place).max(*fastest);
        }
    }
    for &(place, device) in located {
        let rail = &mut rails[device];
        if rail.need_mbps == 0 {
            rail.need_mbps = own_link(place);
        }
        rail.feeds = machine
            .ancestry(place)
            .filter_map(|at| match machine.place(at).kind {
                PlaceKind::Bridge { link_mbps, .. } if link_mbps > 0 && link_mbps >= fastest_below[&at] => {
                    Some((at, link_mbps))
                }
                _ => None,
            })
            .collect();
    }
    rails
}

/// Devices by distance from `node`, in each tier by the link that they share.
fn tiers(machine: &Machine, node: u32, order: &[(Option<PlaceId>, usize)]) -> Vec<Tier> {
    let mut by_distance: BTreeMap<u32, Vec<(Option<PlaceId>, usize)>> = BTreeMap::new();
    for &(place, device) in order {
        let near = machine.near(place.unwrap_or(Machine::ROOT));
        let distance = near.iter().map(|&to| machine.distance(node, to)).min().unwrap_or(u32::MAX);
        let link = place.and_then(|place| uplink(machine, place));
        by_distance.entry(distance).or_default().push((link, device));
    }
    by_distance.into_values().map(|devices| Tier::new(&devices)).collect()
}

/// How many devices `gbps` amounts to: at least one, all where no speed is known.
fn devices_for(gbps: u64, rails: &[Rail]) -> usize {
    let known: Vec<u64> = rails.iter().map(|rail| rail.need_mbps).filter(|&mbps| mbps > 0).collect();
    if known.is_empty() {
        return rails.len().max(1);
    }
    let mean = known.iter().sum::<u64>() / known.len() as u64;
    let count = gbps.saturating_mul(MBPS_PER_GBPS) / mean.max(1);
    usize::try_from(count).unwrap_or(usize::MAX).clamp(1, rails.len().max(1))
}
