//! Fixtures of `plugin-tests/topology`, as the readers want them.

use std::fs;
use std::path::{Path, PathBuf};

use nixl_libfabric::topology::{Machine, RailDevice};

/// A machine as libfabric sees it: all of its devices, or those that a pod was given.
pub struct Case {
    /// Name of the case.
    pub name: String,
    /// Name of its machine.
    pub machine: String,
    /// What libfabric offers.
    pub devices: Vec<RailDevice>,
}

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin-tests/topology")
}

/// Every case, by name.
pub fn cases() -> Vec<Case> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder().join("fixtures")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "devices"));
    files.sort();
    assert!(files.len() >= 13, "fixtures are missing: run plugin-tests/topology/generate.py");
    files.iter().map(|path| case(path)).collect()
}

fn case(path: &Path) -> Case {
    let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
    let text = fs::read_to_string(path).unwrap();
    let mut machine = name.clone();
    let mut devices = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["machine", of] => of.clone_into(&mut machine),
            [name, pci, gbps] => devices.push(RailDevice {
                name: name.to_owned(),
                device: None,
                pci: pci.parse().ok(),
                speed_bps: gbps.parse::<u64>().unwrap() * 1_000_000_000,
            }),
            _ => panic!("{}: `{line}`", path.display()),
        }
    }
    Case { name, machine, devices }
}

impl Case {
    pub fn xml(&self) -> PathBuf {
        folder().join("fixtures").join(format!("{}.xml", self.machine))
    }

    /// The machine through hwloc; `None`, with a word, where there is no libhwloc.
    pub fn by_hwloc(&self) -> Option<Machine> {
        match Machine::from_xml(&self.xml()) {
            Ok(machine) => Some(machine),
            Err(error) if error.to_string().contains("cannot open shared object file") => {
                eprintln!("skipped the hwloc reader: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }
}
