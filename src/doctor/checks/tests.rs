//! What no bed can show: GPUs that NICs reach or not, traffic, two copies of one file. All checks on facts made by hand.

use super::judge;
use crate::doctor::facts::{Cuda, Facts, Loaded};
use crate::doctor::files::{Access, Counters, RdmaDevice};
use crate::doctor::finding::{Finding, Verdict};

fn device(name: &str) -> RdmaDevice {
    RdmaDevice {
        name: name.to_owned(),
        efa: true,
        state: "4: ACTIVE".to_owned(),
        file: Some("uverbs0".to_owned()),
        access: Access::Open,
    }
}

/// A p5's pod with one GPU and one device, well in every respect.
fn well() -> Facts {
    let offer = vec![("efa".to_owned(), "rdmap79s0-rdm".to_owned())];
    let counters = |value: u64| -> Vec<(String, Counters)> {
        let names = ["tx_pkts", "rx_pkts", "rx_drops", "unresponsive_remote_events"];
        vec![("rdmap79s0".to_owned(), names.map(|name| (name.to_owned(), value)).to_vec())]
    };
    let mut facts = Facts {
        libfabric: Some(Ok(Loaded {
            origin: "/opt/amazon/efa/lib/libfabric.so.1".to_owned(),
            version: (2, 1),
            offers: offer.clone(),
            accelerator_offers: offer,
        })),
        rdma: vec![device("rdmap79s0")],
        efa_functions: vec!["0000:4f:00.0".to_owned()],
        locked_memory: Some(Ok(None)),
        machine: "hwloc 2.9".to_owned(),
        accelerator: true,
        cuda: Some(Ok(Cuda {
            driver: "12.8".to_owned(),
            gpus: vec![("0000:53:00.0".to_owned(), true, true)],
        })),
        gpu_map: vec![("0000:53:00.0".to_owned(), vec!["rdmap79s0".to_owned()])],
        counters: [counters(7), counters(7)],
        ..Facts::default()
    };
    facts.huge_pages.total = 10;
    facts.huge_pages.free = 10;
    facts
}

fn found(facts: &Facts, check: &str) -> Finding {
    let mut findings = judge(facts);
    findings.retain(|finding| finding.check == check);
    assert_eq!(findings.len(), 1, "{check}: {findings:?}");
    findings.remove(0)
}

#[test]
fn a_machine_that_is_well_has_no_complaint() {
    let bad: Vec<Finding> =
        judge(&well()).into_iter().filter(|finding| finding.verdict > Verdict::Ok).collect();
    assert_eq!(bad, []);
}

#[test]
fn whatever_is_wrong_has_a_remedy() {
    let mut facts = Facts { accelerator: true, ..Facts::default() };
    facts.libfabric = Some(Err("gone".to_owned()));
    facts.cuda = Some(Err("gone".to_owned()));
    facts.efa_functions = vec!["0000:4f:00.0".to_owned()];
    facts.rdma = vec![RdmaDevice { state: "1: DOWN".to_owned(), access: Access::Missing, ..device("x") }];
    facts.locked_memory = Some(Ok(Some(0)));
    for finding in judge(&facts).iter().filter(|finding| finding.verdict > Verdict::Ok) {
        assert!(!finding.remedy.is_empty(), "{finding:?}");
    }
}

#[test]
fn gpu_memory_wants_a_way_to_the_nic() {
    let mut facts = well();
    let mut without_dmabuf = |peer_memory, version| {
        facts.peer_memory = peer_memory;
        if let Some(Ok(loaded)) = &mut facts.libfabric {
            loaded.version = version;
        }
        found(&facts, "gpu-memory").verdict
    };
    assert_eq!(without_dmabuf(false, (1, 19)), Verdict::Fail, "libfabric knows no dmabuf before 1.20");
    assert_eq!(without_dmabuf(true, (1, 19)), Verdict::Ok);
    assert_eq!(without_dmabuf(false, (1, 20)), Verdict::Ok);
    facts.cuda = Some(Ok(Cuda { gpus: vec![("0000:53:00.0".to_owned(), false, false)], ..Cuda::default() }));
    assert_eq!(found(&facts, "gpu-memory").verdict, Verdict::Fail, "the driver exports none");
}

#[test]
fn what_shared_memory_takes_does_not_count() {
    let mut facts = well();
    if let Some(Ok(loaded)) = &mut facts.libfabric {
        loaded.accelerator_offers = vec![("shm".to_owned(), "shm".to_owned())];
    }
    facts.cudart = Some("libcudart.so: cannot open shared object file".to_owned());
    let finding = found(&facts, "gpu-memory");
    assert!(finding.verdict == Verdict::Warn && finding.remedy.contains("libcudart.so.12"), "{finding:?}");
}

#[test]
fn a_gpu_without_a_device_is_named() {
    let mut facts = well();
    facts.gpu_map.clear();
    let finding = found(&facts, "gpu-nic-map");
    assert!(finding.verdict == Verdict::Warn && finding.seen.contains("0000:53:00.0"), "{finding:?}");
}

/// The verdict on counters after these have grown.
fn after(growth: &[(&str, u64)]) -> Finding {
    let mut facts = well();
    for (name, value) in &mut facts.counters[1][0].1 {
        *value += growth.iter().find(|(grown, _)| grown == name).map_or(0, |(_, by)| *by);
    }
    found(&facts, "counters")
}

#[test]
fn packets_that_leave_and_none_that_comes_are_suspicious() {
    assert_eq!(after(&[]).verdict, Verdict::Ok);
    assert_eq!(after(&[("tx_pkts", 9), ("rx_pkts", 9)]).verdict, Verdict::Ok);
    let silent = after(&[("tx_pkts", 9)]);
    assert!(
        silent.verdict == Verdict::Warn && silent.remedy.contains("aws ec2 describe-security-groups"),
        "{silent:?}"
    );
    let given_up = after(&[("tx_pkts", 9), ("unresponsive_remote_events", 2)]);
    assert!(
        given_up.verdict == Verdict::Fail && given_up.seen.contains("2 operations given up"),
        "{given_up:?}"
    );
    assert_eq!(after(&[("tx_pkts", 9), ("rx_pkts", 9), ("rx_drops", 1)]).verdict, Verdict::Warn);
}

#[test]
fn one_file_by_two_names_is_one_libfabric() {
    let mut facts = well();
    let file = std::env::current_exe().unwrap();
    let (folder, name) = (file.parent().unwrap(), file.file_name().unwrap());
    if let Some(Ok(loaded)) = &mut facts.libfabric {
        loaded.origin = file.display().to_string();
    }
    let roundabout = folder.join(".").join(name).display().to_string();
    facts.nccl = vec![("libnccl-net.so".into(), Ok(vec![roundabout]))];
    assert_eq!(found(&facts, "second-libfabric").verdict, Verdict::Ok);
    facts.nccl = vec![("libnccl-net.so".into(), Ok(vec!["/other/libfabric.so.1".to_owned()]))];
    assert_eq!(found(&facts, "second-libfabric").verdict, Verdict::Warn);
    facts.nccl = vec![("/opt/libnccl-net.so".into(), Err("symbol lookup error".to_owned()))];
    assert_eq!(found(&facts, "second-libfabric").verdict, Verdict::Warn);
}

#[test]
fn an_excluded_provider_is_one_that_the_variable_names() {
    for (value, expected) in
        [("tcp", 1), ("efa", 0), ("^efa", 1), ("^tcp", 0), ("tcp,efa", 0), ("^tcp,efa", 1)]
    {
        let mut facts = well();
        facts.environment.insert("FI_PROVIDER".to_owned(), value.to_owned());
        let named = judge(&facts)
            .iter()
            .filter(|finding| finding.seen.starts_with("FI_PROVIDER=") && finding.verdict == Verdict::Warn)
            .count();
        assert_eq!(named, expected, "{value}");
    }
}

#[test]
fn a_nixl_that_calls_otherwise_is_refused() {
    let mut facts = well();
    facts.plugins.nixl = Some("/site/.nixl_cu12.mesonpy.libs".into());
    facts.plugins.nixl_version = Some("1.6.0".to_owned());
    assert_eq!(found(&facts, "nixl").verdict, Verdict::Warn, "newer, and the interface is the same");
    facts.plugins.interface = Some(Err("it calls newFunction".to_owned()));
    let finding = found(&facts, "nixl");
    assert!(finding.verdict == Verdict::Fail && finding.seen.contains("newFunction"), "{finding:?}");
}

#[test]
fn an_ec2_instance_without_efa_is_told() {
    let mut facts = Facts::default();
    assert_eq!(found(&facts, "rdma-devices").verdict, Verdict::Skip);
    facts.metadata = Some(Err("no answer".to_owned()));
    assert_eq!(found(&facts, "rdma-devices").verdict, Verdict::Warn);
}
