//! Which devices become rails.

mod reach;

use std::collections::VecDeque;

use self::reach::{Interfaces, address_rank};
use super::placement::describe;
use crate::config::{Config, Fabric};
use crate::cuda::Runtime;
use crate::error::{Error, Result};
use crate::fabric::{Device, Libfabric, Query, efa};
use crate::topology::{DeviceFilter, Machine, spread};
use crate::types::MemKind;

/// Core providers that move data through the kernel or the processor, best first. Utility providers stand behind
/// them after a semicolon (`tcp;ofi_rxm`). All others are taken for hardware.
const SOFTWARE: &[&str] = &["tcp", "net", "sockets", "udp", "shm", "sm2"];
/// Software providers that are only used when they are asked for: they do not reach another host.
const ON_REQUEST_ONLY: &[&str] = &["shm", "sm2"];

fn core_name(provider: &str) -> &str {
    provider.split(';').next().unwrap_or(provider)
}

/// Devices of one provider, each once.
#[derive(Debug)]
pub(crate) struct Found {
    pub devices: Vec<Device>,
    /// What is tried, one after the other, when none of them can be opened.
    pub spares: VecDeque<Device>,
    pub software: bool,
}

/// Memory kinds that an engine on this machine could register, for NIXL's plugin list. Nothing is loaded or initialised
/// to find out; whether the provider can register VRAM is known when there is an engine.
pub fn available_mems() -> Vec<MemKind> {
    if Runtime::is_likely() { vec![MemKind::Dram, MemKind::Vram] } else { vec![MemKind::Dram] }
}

/// Finds the devices that the configuration and the environment let us use.
pub(crate) fn find(library: &Libfabric, config: &Config) -> Result<Found> {
    let query = Query {
        provider: Some(config.provider.clone()).filter(|name| !name.is_empty()),
        fabric: match config.fabric {
            Fabric::Any => None,
            Fabric::Efa => Some("efa".to_owned()),
            Fabric::EfaDirect => Some("efa-direct".to_owned()),
        },
        delivery_complete: true,
        ..Query::default()
    };
    let offered = library.discover(&query)?;
    let asked =
        query.provider.clone().or_else(|| std::env::var("FI_PROVIDER").ok().filter(|name| !name.is_empty()));
    let chosen = choose_provider(offered.iter().map(Device::provider), asked.is_some())
        .ok_or_else(|| nothing_found(library, &query, asked.as_deref()))?
        .to_owned();
    let software = is_software(&chosen);
    if software && config.require_rdma {
        return Err(Error::not_supported(format!(
            "only the software provider {chosen} was found, and require_rdma is set. Is there an EFA device in this \
             container (/dev/infiniband, vpc.amazonaws.com/efa), and has libfabric the efa provider (fi_info -p efa)? \
             libfabric in use: {}",
            library.origin()
        )));
    }
    let offered = for_accelerators(library, &query, &chosen).unwrap_or(offered);
    let devices = once_each(offered.into_iter().filter(|device| device.provider() == chosen), config.fabric);
    let devices = allowed(&devices, config)?;
    let (devices, spares) = if software {
        best_interfaces(devices, config)
    } else {
        (spread_out(devices, config), VecDeque::new())
    };
    if software && asked.is_none() {
        log::warn!(
            "no RDMA device was found: data goes through the kernel over {chosen} on {}. Set require_rdma to refuse \
             that, or FI_PROVIDER={} to be silent about it",
            names(&devices),
            core_name(&chosen)
        );
    }
    Ok(Found { devices, spares, software })
}

/// The devices of the chosen provider that can register accelerator memory, if there is an accelerator and they can.
fn for_accelerators(library: &Libfabric, query: &Query, chosen: &str) -> Option<Vec<Device>> {
    if !Runtime::is_likely() {
        return None;
    }
    let query = Query { hmem: true, provider: Some(chosen.to_owned()), ..query.clone() };
    let offered = library.discover(&query).inspect_err(|e| log::debug!("asking for FI_HMEM: {e}")).ok()?;
    Some(offered)
        .filter(|offered| offered.iter().any(|device| device.provider() == chosen && device.has_hmem()))
}

pub(crate) fn is_software(provider: &str) -> bool {
    SOFTWARE.contains(&core_name(provider))
}

/// efa first, then other hardware in libfabric's order, then software.
fn choose_provider<'a>(offered: impl Iterator<Item = &'a str>, asked: bool) -> Option<&'a str> {
    let rank = |provider: &str| {
        if efa::is_efa(provider) {
            return 0;
        }
        SOFTWARE.iter().position(|name| *name == core_name(provider)).map_or(1, |place| 2 + place)
    };
    offered
        .filter(|provider| asked || !ON_REQUEST_ONLY.contains(&core_name(provider)))
        .min_by_key(|provider| rank(provider))
}

fn nothing_found(library: &Libfabric, query: &Query, asked: Option<&str>) -> Error {
    let wanted = asked.map_or_else(|| "no provider".to_owned(), |name| format!("no provider `{name}`"));
    let unconfirmed = library.discover(&Query { delivery_complete: false, ..query.clone() });
    let unconfirmed: Vec<_> =
        unconfirmed.iter().flatten().map(Device::provider).filter(|_| asked.is_some()).collect();
    if let Some(provider) = unconfirmed.first() {
        return Error::not_supported(format!(
            "provider {provider} cannot confirm that a write has arrived (FI_DELIVERY_COMPLETE), so a transfer could be said to              be done, and its notification come, before its last bytes: use another one (efa, tcp)"
        ));
    }
    Error::not_found(format!(
        "{wanted} with reliable datagrams, RMA and confirmed writes (FI_EP_RDM, FI_MSG, FI_RMA, FI_DELIVERY_COMPLETE) was \
         found by libfabric {} ({}); compare with `fi_info`, and look at the options provider and fabric and at FI_PROVIDER",
        library.version(),
        library.origin()
    ))
}

/// A NIC stands in libfabric's answer several times: for each address, and for each fabric of efa. The efa fabric
/// comes before efa-direct, and of an interface's addresses the one that most can reach, IPv4 before IPv6.
fn once_each(devices: impl Iterator<Item = Device>, fabric: Fabric) -> Vec<Device> {
    let preferred = |device: &Device| (fabric == Fabric::Any && efa::is_direct(device), address_rank(device));
    let mut unique: Vec<Device> = Vec::new();
    for device in devices {
        match unique.iter_mut().find(|known| known.domain_name() == device.domain_name()) {
            Some(known) if preferred(&device) < preferred(known) => *known = device,
            Some(_) => {}
            None => unique.push(device),
        }
    }
    unique
}

fn allowed(devices: &[Device], config: &Config) -> Result<Vec<Device>> {
    let described: Vec<_> = devices.iter().map(describe).collect();
    let kept = config.devices.apply(&described)?;
    Ok(kept.into_iter().map(|i| devices[i].clone()).collect())
}

/// A software provider takes one interface unless the user names several: which of them reach the peer's
/// interfaces is not known here. Loopback serves where there is no other, or where it is named. What is not taken is a
/// spare.
fn best_interfaces(mut devices: Vec<Device>, config: &Config) -> (Vec<Device>, VecDeque<Device>) {
    let here = Interfaces::here();
    let is_wanted = |device: &Device| !device.loopback() || config.devices.names(&describe(device));
    devices.sort_by_cached_key(|device| (!is_wanted(device), here.rank(device)));
    let wanted = devices.iter().filter(|device| is_wanted(device)).count().max(1);
    let count = match config.max_rails as usize {
        0 if config.devices == DeviceFilter::default() => 1,
        0 => wanted,
        limit => limit.min(wanted),
    };
    let spares = devices.split_off(count.min(devices.len())).into();
    (devices, spares)
}

/// With fewer rails than devices, those that remain are spread over the machine.
fn spread_out(devices: Vec<Device>, config: &Config) -> Vec<Device> {
    let limit = config.max_rails as usize;
    if limit == 0 || devices.len() <= limit {
        return devices;
    }
    let described: Vec<_> = devices.iter().map(describe).collect();
    spread(Machine::here(), &described, limit).into_iter().map(|i| devices[i].clone()).collect()
}

/// Names of devices, for a log line.
pub(super) fn names(devices: &[Device]) -> String {
    devices.iter().map(Device::domain_name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::choose_provider;

    #[test]
    fn efa_comes_first_and_software_last() {
        let choose =
            |offered: &[&str], asked| choose_provider(offered.iter().copied(), asked).map(ToOwned::to_owned);
        assert_eq!(choose(&["shm", "tcp", "efa"], false).as_deref(), Some("efa"));
        assert_eq!(
            choose(&["sockets", "tcp;ofi_rxm", "verbs;ofi_rxm"], false).as_deref(),
            Some("verbs;ofi_rxm")
        );
        assert_eq!(choose(&["shm", "sockets", "tcp"], false).as_deref(), Some("tcp"));
        assert_eq!(choose(&["net;ofi_rxm", "tcp;ofi_rxm"], false).as_deref(), Some("tcp;ofi_rxm"));
        assert_eq!(choose(&["shm"], false), None);
        assert_eq!(choose(&["shm"], true).as_deref(), Some("shm"));
        assert_eq!(choose(&[], true), None);
    }
}
