//! Which interfaces of a software provider reach other hosts, best first.
//!
//! libfabric lists the addresses of all interfaces: of container engines' bridges and pairs, of tunnels, of links without a peer.
//! Which of them leads to a peer is not known here, but some cannot, and the default route's most often does.

use std::net::IpAddr;

use crate::fabric::{AddrFormat, Device};
use crate::sys::net;

/// What the system says about its interfaces, by name.
pub(super) struct Interfaces {
    running: Vec<String>,
    default_routes: Vec<String>,
}

impl Interfaces {
    /// Of this network namespace.
    pub fn here() -> Self {
        let table = |name| std::fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
        let default_routes = [default_route_v4(&table("route")), default_route_v6(&table("ipv6_route"))];
        Self {
            running: net::running_interfaces(),
            default_routes: default_routes.into_iter().flatten().collect(),
        }
    }

    /// Lower is better. Devices that are no interfaces are all the same.
    pub fn rank(&self, device: &Device) -> impl Ord + use<> {
        let name = device.domain_name();
        let has = |names: &[String]| names.iter().any(|known| known == name);
        let (link_local, v6) = address_rank(device);
        (device.loopback(), !has(&self.running), link_local, !has(&self.default_routes), v6)
    }
}

/// Lower is better: an address that only neighbours on the same link can use comes after one for everybody, IPv6 after IPv4.
pub(super) fn address_rank(device: &Device) -> (bool, bool) {
    let link_local = match device.source_ip() {
        Some(IpAddr::V4(address)) => address.is_link_local(),
        Some(IpAddr::V6(address)) => address.is_unicast_link_local(),
        None => false,
    };
    (link_local, device.addr_format() == AddrFormat::SockIn6)
}

/// The interface of the IPv4 default route with the lowest metric, from the text of `/proc/net/route`.
fn default_route_v4(table: &str) -> Option<String> {
    let default = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Interface, destination, gateway, flags, reference count, use, metric, mask.
        let [interface, "00000000", _, _, _, _, metric, "00000000", ..] = fields[..] else { return None };
        Some((metric.parse::<u64>().ok()?, interface.to_owned()))
    };
    Some(table.lines().filter_map(default).min()?.1)
}

/// The interface of the IPv6 default route with the lowest metric, from the text of `/proc/net/ipv6_route`.
fn default_route_v6(table: &str) -> Option<String> {
    let default = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Destination, its prefix, source, its prefix, next hop, metric, reference count, use, flags, interface. The kernel's own
        // "unreachable" stands on lo.
        let [destination, "00", _, _, _, metric, _, _, _, interface] = fields[..] else { return None };
        let is_default = destination.bytes().all(|digit| digit == b'0') && interface != "lo";
        is_default.then_some((u64::from_str_radix(metric, 16).ok()?, interface.to_owned()))
    };
    Some(table.lines().filter_map(default).min()?.1)
}

#[cfg(test)]
mod tests {
    use super::{default_route_v4, default_route_v6};

    #[test]
    fn the_default_route_of_ipv4_is_the_one_with_the_lowest_metric() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                     eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                     docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
                     tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n";
        assert_eq!(default_route_v4(table).as_deref(), Some("eth0"));
        for none in ["", "Iface\tDestination", "eth0\t00000000\t0\t3\t0\t0\tx\t00000000"] {
            assert_eq!(default_route_v4(none), None);
        }
    }

    #[test]
    fn the_default_route_of_ipv6_is_not_the_unreachable_one_of_lo() {
        let zero = "0".repeat(32);
        let line = |destination: &str, prefix, metric, interface| {
            format!(
                "{destination} {prefix} {zero} 00 {zero} {metric} 00000001 00000000 00000003 {interface}\n"
            )
        };
        let table = [
            line(&"fe80".repeat(8), "40", "00000100", "eth1"),
            line(&zero, "00", "00000400", "eth1"),
            line(&zero, "00", "00000064", "eth0"),
            line(&zero, "00", "00000000", "lo"),
        ];
        assert_eq!(default_route_v6(&table.concat()).as_deref(), Some("eth0"));
        assert_eq!(default_route_v6(&table[3]), None);
        assert_eq!(default_route_v6(""), None);
    }
}
