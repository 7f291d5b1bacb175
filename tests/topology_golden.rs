//! Devices of accelerators and of host memory on machines that cannot be had for a test.
//!
//! `golden/CASE.map` holds the answers, which both readers must give; `golden/MACHINE.txt` what the command draws, and
//! `docs/pictures` one machine's picture.
//! After a change that is meant: `NIXL_BLESS=1 cargo test --test topology_golden`, and read the difference.

#[path = "topology_common/mod.rs"]
mod common;
#[path = "topology_common/sysfs.rs"]
mod sysfs;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Case, cases, folder};
use nixl_libfabric::topology::{Machine, RailDevice, RailMap, Report, SelectOptions};

fn map(machine: &Machine, case: &Case, max_gbps: Option<u64>) -> RailMap {
    let options = SelectOptions { max_bw_per_dram_seg_gbps: max_gbps, ..SelectOptions::default() };
    RailMap::build(machine, &case.devices, &options).unwrap()
}

/// All answers for a case, a line each.
fn answers(machine: &Machine, case: &Case) -> String {
    let names = |devices: Vec<usize>| -> String {
        devices.iter().fold(String::new(), |text, &at| text + " " + case.devices[at].short_name())
    };
    let mut out = String::new();
    let automatic = map(machine, case, None);
    for (pci, devices) in automatic.accelerators() {
        writeln!(out, "accelerator {pci} ={}", names(devices.to_vec())).unwrap();
    }
    for node in machine.nodes() {
        for turn in 0..3 {
            writeln!(
                out,
                "node {} turn {turn} ={}",
                node.id,
                names(automatic.for_host(&[(node.id, 1)], turn))
            )
            .unwrap();
        }
    }
    for gbps in [100, 400, 800] {
        let limited = map(machine, case, Some(gbps));
        for node in machine.nodes() {
            writeln!(out, "node {} at {gbps} Gb/s ={}", node.id, names(limited.for_host(&[(node.id, 1)], 0)))
                .unwrap();
        }
    }
    let span: Vec<(u32, u64)> = machine.nodes().iter().map(|node| (node.id, 1)).collect();
    writeln!(out, "all nodes ={}", names(automatic.for_host(&span, 0))).unwrap();
    writeln!(out, "unknown node ={}", names(automatic.for_host(&[], 0))).unwrap();
    out
}

fn check(file: &str, found: &str) {
    check_file(&folder().join("golden").join(file), found);
}

fn check_file(path: &Path, found: &str) {
    if std::env::var_os("NIXL_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, found).unwrap();
    }
    let wanted = fs::read_to_string(path).unwrap_or_default();
    assert!(wanted == found, "{} differs; found:\n{found}\nwanted:\n{wanted}", path.display());
}

#[test]
fn both_readers_give_the_golden_answers() {
    for case in cases() {
        check(&format!("{}.map", case.name), &answers(&sysfs::read(&case), &case));
        if let Some(machine) = case.by_hwloc() {
            check(&format!("{}.map", case.name), &answers(&machine, &case));
        }
    }
}

#[test]
fn the_drawing_of_each_machine() {
    for case in cases() {
        let Some(machine) = case.by_hwloc() else { return };
        let map = map(&machine, &case, None);
        let report = Report { machine: &machine, devices: &case.devices, map: &map, buffers: &[] };
        // The first line names the version of hwloc.
        let text = report.text();
        check(&format!("{}.txt", case.name), text.split_once('\n').unwrap().1);
    }
}

#[test]
fn the_picture_of_each_machine_shows_what_was_chosen() {
    let written = std::env::temp_dir().join(format!("nixl-libfabric-pictures-{}", std::process::id()));
    fs::create_dir_all(&written).unwrap();
    for case in cases() {
        let machine = sysfs::read(&case);
        let map = map(&machine, &case, None);
        let report = Report { machine: &machine, devices: &case.devices, map: &map, buffers: &[] };
        fs::write(written.join(format!("{}.svg", case.name)), report.svg()).unwrap();
        fs::write(written.join(format!("{}.json", case.name)), report.json()).unwrap();
        if case.name == "p5.48xlarge" {
            let pictures = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pictures");
            check_file(&pictures.join("topology-p5.48xlarge.svg"), &report.svg());
        }
    }
    match Command::new("python3").arg(folder().join("check_svg.py")).arg(&written).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => eprintln!("skipped: python3: {error}"),
    }
    fs::remove_dir_all(&written).unwrap();
}

/// How many devices each accelerator has, and how many accelerators share each device.
fn sharing(name: &str) -> (Vec<usize>, Vec<usize>) {
    let case = cases().into_iter().find(|case| case.name == name).unwrap();
    let map = map(&sysfs::read(&case), &case, None);
    let mut users: BTreeMap<usize, usize> = (0..case.devices.len()).map(|device| (device, 0)).collect();
    let mut counts = Vec::new();
    for (_, devices) in map.accelerators() {
        counts.push(devices.len());
        for device in devices {
            *users.get_mut(device).unwrap() += 1;
        }
    }
    (counts, users.into_values().collect())
}

#[test]
fn the_grouping_that_users_know() {
    assert_eq!(sharing("p4d.24xlarge"), (vec![1; 8], vec![2; 4]), "two GPUs share one EFA");
    assert_eq!(sharing("p5.48xlarge"), (vec![4; 8], vec![1; 32]), "four EFA for each GPU");
    assert_eq!(sharing("p5en.48xlarge"), (vec![2; 8], vec![1; 16]), "two EFA for each GPU");
    assert_eq!(sharing("p6-b200.48xlarge"), (vec![1; 8], vec![1; 8]), "one EFA for each GPU");
    assert_eq!(sharing("g5.48xlarge"), (vec![1; 8], vec![8]), "all GPUs share the one EFA");
    assert_eq!(sharing("gb200-tray"), (vec![1; 4], vec![1; 4]), "a NIC for each GPU, across PCI domains");
    assert_eq!(
        sharing("p5.48xlarge-pod4"),
        (vec![4; 8], vec![8; 4]),
        "the four that a pod has, for every GPU"
    );
    assert_eq!(sharing("p5.48xlarge-pod1"), (vec![1; 8], vec![8]), "the one that a pod has, for every GPU");
}

#[test]
fn on_a_machine_that_says_nothing_all_devices_serve_all_memory() {
    let empty = sysfs::Scratch::new("nothing");
    let machine = Machine::from_sysfs(empty.path());
    let devices = ["eth0", "lo"].map(|name| RailDevice { name: name.to_owned(), ..RailDevice::default() });
    let map = RailMap::build(&machine, &devices, &SelectOptions::default()).unwrap();
    assert_eq!(map.for_accelerator("0000:00:06.0".parse().ok()), [0, 1]);
    assert_eq!(map.for_accelerator(None), [0, 1]);
    assert_eq!(map.for_host(&[(0, 4096)], 3), [0, 1]);
    assert_eq!(map.for_host(&[(7, 4096)], 3), [0, 1]);
    assert_eq!(map.for_host(&[], 3), [0, 1]);
    let none = RailMap::build(&machine, &[], &SelectOptions::default()).unwrap();
    assert!(none.for_accelerator(None).is_empty() && none.for_host(&[(0, 1)], 0).is_empty());
}

#[test]
fn devices_without_an_address_are_known_by_their_name() {
    let mut case = cases().into_iter().find(|case| case.name == "p5.48xlarge").unwrap();
    let machine = sysfs::read(&case);
    let wanted = answers(&machine, &case);
    case.devices.iter_mut().for_each(|device| device.pci = None);
    assert_eq!(answers(&machine, &case), wanted);
}
