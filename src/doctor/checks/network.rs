//! What EC2 says of the network: EFA works within the VPC's primary block.

use std::net::Ipv4Addr;

use super::devices::SILENT_DROP;
use crate::doctor::facts::Facts;
use crate::doctor::finding::Finding;

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let metadata = match &facts.metadata {
        None => return vec![Finding::skip("vpc", "this is no EC2 instance")],
        Some(Err(reason)) => {
            return vec![Finding::skip(
                "vpc",
                format!(
                    "the instance metadata service does not answer ({reason}); from a container its hop limit must be 2"
                ),
            )];
        }
        Some(Ok(metadata)) => metadata,
    };
    let mut findings = Vec::new();
    for interface in &metadata.interfaces {
        match is_within(&interface.subnet, &interface.primary) {
            Some(true) => {}
            Some(false) => findings.push(Finding::fail(
                "vpc",
                format!(
                    "interface {} is in subnet {}, outside of the VPC's primary block {}: EFA traffic of a secondary block is dropped",
                    interface.mac, interface.subnet, interface.primary
                ),
                "put the instances into a subnet of the primary block",
            )),
            None => findings.push(Finding::skip(
                "vpc",
                format!("interface {}: no sense in `{}` and `{}`", interface.mac, interface.subnet, interface.primary),
            )),
        }
    }
    if findings.is_empty() {
        let mut groups: Vec<&str> =
            metadata.interfaces.iter().flat_map(|interface| &interface.groups).map(String::as_str).collect();
        groups.sort_unstable();
        groups.dedup();
        findings.push(Finding::ok(
            "vpc",
            format!(
                "{}, {} interfaces within the primary block; security groups {}",
                metadata.instance_type,
                metadata.interfaces.len(),
                groups.join(" ")
            ),
        ));
        if facts.has_efa() && !groups.is_empty() {
            findings.push(Finding::skip(
                "security-group",
                format!("cannot be seen from here. {}", SILENT_DROP.replace("GROUP", groups[0])),
            ));
        }
    }
    findings
}

/// Whether a block lies within another; `None` if one of them is no IPv4 block.
fn is_within(inner: &str, outer: &str) -> Option<bool> {
    let ((inner, inner_bits), (outer, outer_bits)) = (block(inner)?, block(outer)?);
    let mask = u32::MAX.checked_shl(32 - outer_bits).unwrap_or(0);
    Some(inner_bits >= outer_bits && inner & mask == outer & mask)
}

fn block(text: &str) -> Option<(u32, u32)> {
    let (address, bits) = text.split_once('/')?;
    let bits: u32 = bits.parse().ok().filter(|bits| *bits <= 32)?;
    Some((u32::from(address.parse::<Ipv4Addr>().ok()?), bits))
}

#[cfg(test)]
mod tests {
    use super::is_within;

    #[test]
    fn blocks_lie_within_others() {
        assert_eq!(is_within("10.0.3.0/24", "10.0.0.0/16"), Some(true));
        assert_eq!(is_within("100.64.0.0/24", "10.0.0.0/16"), Some(false));
        assert_eq!(is_within("10.0.0.0/8", "10.0.0.0/16"), Some(false));
        assert_eq!(is_within("1.2.3.4/32", "0.0.0.0/0"), Some(true));
        assert_eq!(is_within("1.2.3.4/33", "0.0.0.0/0"), None);
        assert_eq!(is_within("", "10.0.0.0/16"), None);
    }
}
