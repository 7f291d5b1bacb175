//! Which network devices are near which memory.
//!
//! [`Machine`] is the plain model of a machine: NUMA nodes, PCI bridges with the speed of their links,
//! accelerators and network devices. Two readers fill it: one over libhwloc, and one over sysfs where
//! libhwloc is absent. [`RailMap`] answers, from that model and the list of devices that libfabric offers, which devices
//! serve a buffer. Selection is pure: no input or output, no clock, the same answer for the same machine.
#![forbid(unsafe_code)]

mod filter;
mod host;
mod hwloc;
mod json;
mod model;
mod numa;
mod picture;
mod report;
mod select;
mod svg;
pub(crate) mod sysfs;

pub use filter::{DeviceFilter, GpuDevices};
pub use json::Json;
pub use model::{AcceleratorKind, Machine, NumaNode, PciDevice, Place, PlaceId, PlaceKind, Role};
pub use numa::{MemoryNodes, numa_nodes_of};
pub use report::{Buffer, Report, parse_buffer};
pub use select::{RailDevice, RailMap, SelectOptions, spread};
pub use sysfs::rail_devices as rail_devices_from_sysfs;
