//! A sysfs tree of the host's own, with the entries that libfabric and operators' tools read.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use crate::config::{Config, Device};

/// `<tree>/class/infiniband/<device>`.
pub fn ibdev_path(config: &Config, device: &Device) -> PathBuf {
    config.sysfs().join("class/infiniband").join(&device.name)
}

/// `<tree>/class/infiniband_verbs/uverbs<index>`.
pub fn verbs_path(config: &Config, index: usize) -> PathBuf {
    config.sysfs().join("class/infiniband_verbs").join(format!("uverbs{index}"))
}

/// Writes the tree. Processes of one host write the same, so it does not matter who is first.
pub fn create(config: &Config) -> io::Result<()> {
    let root = config.sysfs();
    file(&root.join("class/infiniband_verbs/abi_version"), "6\n")?;
    let driver = root.join("bus/pci/drivers/efa");
    fs::create_dir_all(&driver)?;
    for (index, device) in config.devices.iter().enumerate() {
        let pci = device.pci;
        let at = root.join(format!("devices/pci{:04x}:{:02x}/{pci}", pci.domain, pci.bus));
        file(&at.join("vendor"), "0x1d0f\n")?;
        file(&at.join("device"), &format!("{:#06x}\n", config.topology.device_id))?;
        file(&at.join("class"), "0x020000\n")?;
        file(&at.join("numa_node"), &format!("{}\n", device.numa))?;
        link(&driver, &at.join("driver"))?;
        link(&at, &root.join("bus/pci/devices").join(pci.to_string()))?;
        let ibdev = ibdev_path(config, device);
        link(&at, &ibdev.join("device"))?;
        file(&ibdev.join("fw_ver"), "0.0.0.0\n")?;
        file(&ibdev.join("node_type"), "7: UNSPECIFIED\n")?;
        file(&ibdev.join("ports/1/state"), "4: ACTIVE\n")?;
        let gid: Vec<_> =
            device.gid.raw.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
        file(&ibdev.join("ports/1/gids/0"), &format!("{}\n", gid.join(":")))?;
        fs::create_dir_all(ibdev.join("ports/1/hw_counters"))?;
        fs::create_dir_all(verbs_path(config, index))?;
    }
    Ok(())
}

/// Writes the counters whose value is not that in `before`. They only grow, so a new value covers the old one and a
/// reader never sees a mixture.
pub fn write_counters(config: &Config, device: &Device, now: &[(&str, u64)], before: &[(&str, u64)]) {
    let dir = ibdev_path(config, device).join("ports/1/hw_counters");
    for (name, value) in now.iter().filter(|value| !before.contains(value)) {
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(dir.join(name));
        let written = file.and_then(|file| file.write_all_at(format!("{value}\n").as_bytes(), 0));
        if written.is_err() {
            // The directory was removed: the network is over.
            return;
        }
    }
}

fn file(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if fs::read_to_string(path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    fs::write(path, text)
}

fn link(target: &Path, path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match symlink(target, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}
