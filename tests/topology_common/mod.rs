//! Fixtures of `plugin-tests/topology`, as the readers want them.

use std::fs;
use std::os::unix::fs::symlink;
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
            ["machine", of] => machine = of.to_owned(),
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

    /// The machine through the kernel's files.
    pub fn by_sysfs(&self) -> Machine {
        let root = Scratch::new(&format!("sysfs-{}", self.name));
        let listing = folder().join("fixtures").join(format!("{}.sysfs", self.machine));
        unpack(&fs::read_to_string(listing).unwrap(), root.path());
        Machine::from_sysfs(root.path())
    }
}

/// Writes the tree that a `.sysfs` listing describes.
fn unpack(listing: &str, root: &Path) {
    let write = |path: PathBuf, text: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    };
    let links = root.join("sys/bus/pci/devices");
    fs::create_dir_all(&links).unwrap();
    for line in listing.lines() {
        let words: Vec<&str> = line.splitn(9, ' ').collect();
        match words[..] {
            ["node", id, kib, distances] => {
                let node = root.join(format!("sys/devices/system/node/node{id}"));
                write(
                    node.join("meminfo"),
                    &format!("Node {id} MemTotal:       {kib} kB\nNode {id} MemFree: 1 kB"),
                );
                write(node.join("distance"), &distances.replace(',', " "));
            }
            ["pci", path, vendor, device, class, node, lanes, name, speed] => {
                let function = root.join("sys/devices").join(path);
                write(function.join("vendor"), vendor);
                write(function.join("device"), device);
                write(function.join("class"), class);
                write(function.join("numa_node"), node);
                write(function.join("current_link_width"), lanes);
                write(function.join("current_link_speed"), speed);
                let (kind, name) = name.split_once('=').unwrap();
                if name != "-" {
                    fs::create_dir_all(function.join(kind).join(name)).unwrap();
                }
                symlink(&function, links.join(function.file_name().unwrap())).unwrap();
            }
            _ => panic!("`{line}`"),
        }
    }
}

/// A directory that goes away with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nixl-libfabric-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
