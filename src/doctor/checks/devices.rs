//! The RDMA devices: driver, files, limits, counters.

use super::few;
use crate::doctor::facts::Facts;
use crate::doctor::files::{Access, Counters};
use crate::doctor::finding::Finding;

/// Least locked memory with which the efa provider's own buffers of one device fit: 4,096 entries of a rail register 37 MB.
const LOCKED_MEMORY_BYTES_MIN: u64 = 64 << 20;

/// What lets packets vanish on EC2, and how to see it.
pub(in crate::doctor) const SILENT_DROP: &str = "EFA drops without an error what it may not deliver. The security group needs a rule for all traffic from \
     itself and one for all traffic to itself (0.0.0.0/0 is not enough): aws ec2 describe-security-groups --group-ids GROUP \
     --query 'SecurityGroups[0].[IpPermissions,IpPermissionsEgress][].UserIdGroupPairs[].GroupId' must print the group twice. EFA \
     also needs both hosts in one availability zone, and in the VPC's primary CIDR block";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![driver(facts)];
    if facts.rdma.is_empty() {
        return findings;
    }
    findings.push(files(facts));
    findings.push(ports(facts));
    findings.push(locked_memory(facts));
    findings.extend(huge_pages(facts));
    findings.push(counters(facts));
    findings
}

fn driver(facts: &Facts) -> Finding {
    let efa = facts.rdma.iter().filter(|device| device.efa).count();
    let missing = facts.efa_functions.len().saturating_sub(efa);
    if missing > 0 {
        return Finding::fail(
            "rdma-devices",
            format!("{} EFA devices on PCI, and {efa} RDMA devices of them", facts.efa_functions.len()),
            "the efa driver is not loaded, or does not know this device: `modprobe efa` on the host, or the EFA installer for a newer \
             one. Containers use the host's",
        );
    }
    if facts.rdma.is_empty() && facts.metadata.is_some() {
        return Finding::warn(
            "rdma-devices",
            "an EC2 instance without EFA device: data will go through the kernel, over tcp",
            "the instance needs a network interface of type EFA, which its type must support; a container may be kept from seeing it",
        );
    }
    if facts.rdma.is_empty() {
        return Finding::skip(
            "rdma-devices",
            "the kernel has no RDMA device: data will go through the kernel, over tcp",
        );
    }
    let kind = if efa > 0 { "EFA" } else { "RDMA" };
    Finding::ok(
        "rdma-devices",
        format!("{} {kind}: {}", facts.rdma.len(), few(facts.rdma.iter().map(|device| &device.name))),
    )
}

fn files(facts: &Facts) -> Finding {
    let given: Vec<&str> = of(facts, |access| *access == Access::Open);
    let missing = of(facts, |access| *access == Access::Missing);
    let refused: Vec<String> = facts
        .rdma
        .iter()
        .filter_map(|device| match &device.access {
            Access::Refused(reason) => Some(format!(
                "{} (/dev/infiniband/{}: {reason})",
                device.name,
                device.file.as_deref().unwrap_or("?")
            )),
            _ => None,
        })
        .collect();
    let remedy_missing = "in Kubernetes ask for vpc.amazonaws.com/efa, as many as the pod shall have; with Docker give --device=/dev/infiniband/uverbsN \
         for each";
    if !refused.is_empty() {
        return Finding::fail(
            "device-files",
            format!("not allowed to open {}", few(refused)),
            "the file's mode (udev gives 0666), the user, or the container's device list forbid it: --device, or a privileged container",
        );
    }
    match (given.is_empty(), missing.is_empty()) {
        (true, _) => {
            Finding::fail("device-files", "no file in /dev/infiniband for any device", remedy_missing)
        }
        (false, true) => Finding::ok("device-files", format!("all {} can be opened", given.len())),
        (false, false) => Finding::warn(
            "device-files",
            format!("{} of {} devices are here, without {}", given.len(), facts.rdma.len(), few(missing)),
            format!("this is as it should be if the container was given no more; else {remedy_missing}"),
        ),
    }
}

fn of(facts: &Facts, is: impl Fn(&Access) -> bool) -> Vec<&str> {
    facts.rdma.iter().filter(|device| is(&device.access)).map(|device| device.name.as_str()).collect()
}

fn ports(facts: &Facts) -> Finding {
    let down =
        facts.rdma.iter().filter(|device| !device.state.is_empty() && !device.state.contains("ACTIVE"));
    let down: Vec<String> = down.map(|device| format!("{} ({})", device.name, device.state)).collect();
    if down.is_empty() {
        return Finding::ok("ports", "all active");
    }
    Finding::fail(
        "ports",
        format!("not active: {}", few(down)),
        "the link is down: look at the host's `dmesg` and `rdma link`",
    )
}

fn locked_memory(facts: &Facts) -> Finding {
    const REMEDY: &str = "registered memory is locked: unlimited, by `ulimit -l unlimited`, LimitMEMLOCK=infinity of the container \
         runtime, `docker run --ulimit memlock=-1`, or the capability IPC_LOCK";
    match &facts.locked_memory {
        None => Finding::skip("locked-memory", "not looked at"),
        Some(Err(reason)) => Finding::skip("locked-memory", reason.clone()),
        Some(Ok(None)) => Finding::ok("locked-memory", "unlimited"),
        Some(Ok(Some(bytes))) if *bytes < LOCKED_MEMORY_BYTES_MIN => Finding::fail(
            "locked-memory",
            format!("limited to {} KiB: not even the provider's own buffers fit", bytes >> 10),
            REMEDY,
        ),
        Some(Ok(Some(bytes))) => Finding::warn(
            "locked-memory",
            format!("limited to {} MiB: nothing beyond that can be registered", bytes >> 20),
            REMEDY,
        ),
    }
}

/// The efa provider takes huge pages where it gets them, and ordinary ones elsewhere. A container's limit shows only when a
/// page is touched: by a signal that ends the process.
fn huge_pages(facts: &Facts) -> Option<Finding> {
    if !facts.has_efa() {
        return None;
    }
    let pages = &facts.huge_pages;
    let seen = format!("{} of {} huge pages of 2 MiB are free", pages.free, pages.total);
    Some(match pages.container_bytes {
        Some(0) if pages.free > 0 => Finding::fail(
            "huge-pages",
            format!(
                "{seen}, and this container may use none: the provider takes some, and the process ends by SIGBUS"
            ),
            "give the container huge pages (in Kubernetes the resource hugepages-2Mi), or set FI_EFA_USE_HUGE_PAGE=0",
        ),
        _ if pages.free == 0 => Finding::warn(
            "huge-pages",
            format!("{seen}: the provider uses ordinary pages"),
            "some thousand on the host (vm.nr_hugepages, as the EFA installer sets it) spare the NIC translations; in Kubernetes ask \
             for hugepages-2Mi, too",
        ),
        _ => Finding::ok("huge-pages", seen),
    })
}

fn counters(facts: &Facts) -> Finding {
    let [before, after] = &facts.counters;
    let grown = |name: &str| -> u64 { sum(after, name).saturating_sub(sum(before, name)) };
    let (sent, received) = (grown("tx_pkts"), grown("rx_pkts"));
    let given_up = grown("unresponsive_remote_events");
    let seen = format!("in {:.1} s {sent} packets sent, {received} received", facts.watch.as_secs_f64());
    if after.iter().all(|(_, counters)| counters.is_empty()) {
        return Finding::skip("counters", "the devices have no hw_counters that can be read here");
    }
    if given_up > 0 {
        return Finding::fail(
            "counters",
            format!("{seen}, {given_up} operations given up, as the other side did not answer"),
            SILENT_DROP,
        );
    }
    if sent > 0 && received == 0 {
        return Finding::warn(
            "counters",
            format!("{seen}: what leaves here may not arrive"),
            format!(
                "see whether rx_pkts rises at the other side at the same time (doctor there). If not: {SILENT_DROP}"
            ),
        );
    }
    if grown("rx_drops") > 0 {
        return Finding::warn(
            "counters",
            format!("{seen}, {} dropped for want of a posted receive", grown("rx_drops")),
            "the receiving program does not keep up: is its progress thread on? See the option control_recv_buffers",
        );
    }
    let ever = sum(after, "unresponsive_remote_events");
    let ever = if ever > 0 {
        format!("; {ever} operations were given up since the start of the machine")
    } else {
        String::new()
    };
    Finding::ok("counters", seen + &ever)
}

fn sum(counters: &[(String, Counters)], name: &str) -> u64 {
    let of = |(_, counters): &(String, Counters)| {
        counters.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value)
    };
    counters.iter().map(of).sum()
}
