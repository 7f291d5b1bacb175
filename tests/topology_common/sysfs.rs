//! Fixtures as the kernel's files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nixl_libfabric::topology::Machine;

use super::common::{Case, folder};

/// The machine of a case through the kernel's files.
pub fn read(case: &Case) -> Machine {
    let root = Scratch::new(&case.name);
    let listing = folder().join("fixtures").join(format!("{}.sysfs", case.machine));
    unpack(&fs::read_to_string(listing).unwrap(), root.path());
    Machine::from_sysfs(root.path())
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
        // Tests of one process run side by side.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        // Thousands of small files: in memory where there is such a place.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("nixl-libfabric-{}-{next}-{name}", std::process::id()));
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
