//! Which rails serve which memory: the topology's answer in devices, turned into rails.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::error::Result;
use crate::fabric::{Device, MemoryRange};
use crate::topology::{Machine, RailDevice, RailMap, SelectOptions, numa_nodes_of};
use crate::types::{Desc, MemKind, PciAddress, RailId};

/// Rails by memory.
#[derive(Debug)]
pub(super) struct Placement {
    map: RailMap,
    /// Rails of each device, by the device's place in the map.
    rails: Vec<Vec<RailId>>,
    /// Where the machine's description comes from, and what is to be said about it.
    pub origin: String,
}

impl Placement {
    /// Places rails, given by the device that each is on. Rails of one device stand together.
    pub fn new<'a>(rails: impl Iterator<Item = (RailId, &'a Device)>, config: &Config) -> Result<Self> {
        let mut devices: Vec<RailDevice> = Vec::new();
        let mut by_device: Vec<Vec<RailId>> = Vec::new();
        for (rail, device) in rails {
            let described = describe(device);
            if devices.last() != Some(&described) {
                devices.push(described);
                by_device.push(Vec::new());
            }
            by_device.last_mut().expect("a device was just pushed").push(rail);
        }
        let machine = Machine::here();
        let options = SelectOptions {
            max_bw_per_dram_seg_gbps: Some(config.max_bw_per_dram_seg_gbps).filter(|gbps| *gbps > 0),
            gpu_devices: config.gpu_devices.clone(),
        };
        Ok(Self {
            map: RailMap::build(machine, &devices, &options)?,
            rails: by_device,
            origin: machine.origin().to_string(),
        })
    }

    /// Rails for a host buffer, nearest first. Buffers that could use the same ones take turns.
    pub fn rails_for_host(&self, range: MemoryRange, turn: u64) -> Vec<RailId> {
        self.rails_of(&self.map.for_host(&numa_nodes_of(range.addr(), range.len()), turn))
    }

    /// NUMA node that a rail's device is near, where the machine says so; the first of several.
    pub fn numa_node(&self, rail: RailId) -> Option<u32> {
        let device = self.rails.iter().position(|rails| rails.contains(&rail))?;
        Machine::here().near(self.map.place(device)?).first().copied()
    }

    /// Rails for memory of an accelerator, nearest first.
    pub fn rails_for_accelerator(&self, pci: Option<PciAddress>) -> Vec<RailId> {
        self.rails_of(&self.map.for_accelerator(pci))
    }

    fn rails_of(&self, devices: &[usize]) -> Vec<RailId> {
        devices.iter().flat_map(|&device| self.rails[device].iter().copied()).collect()
    }

    /// Attributes of a range of host memory; `None` if it cannot be registered.
    pub fn describe_host(&self, desc: &Desc) -> Option<BTreeMap<String, String>> {
        if desc.len == 0 || desc.addr.checked_add(desc.len).is_none() {
            return None;
        }
        let nodes = numa_nodes_of(desc.addr, desc.len);
        let rails = self.rails_of(&self.map.for_host(&nodes, 0));
        let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(",");
        Some(BTreeMap::from([
            ("mem".to_owned(), MemKind::Dram.to_string()),
            ("numa_nodes".to_owned(), list(&mut nodes.iter().map(|(node, _)| node.to_string()))),
            ("rails".to_owned(), list(&mut rails.iter().map(ToString::to_string))),
        ]))
    }
}

/// A device as the topology wants it told.
pub(super) fn describe(device: &Device) -> RailDevice {
    let nic = device.nic();
    RailDevice {
        name: device.domain_name().to_owned(),
        device: nic.map(|nic| nic.name.clone()).filter(|name| !name.is_empty()),
        pci: nic.and_then(|nic| nic.pci),
        speed_bps: nic.map_or(0, |nic| nic.speed_bps),
    }
}
