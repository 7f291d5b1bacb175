//! The kernel's files that the doctor reads, below a root that tests and copies of a machine's files may name.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::topology::sysfs::{entries, file_name, text};

/// PCI vendor of EFA devices; their device ids begin with 0xefa.
const AMAZON: &str = "0x1d0f";

/// An RDMA device that the kernel lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaDevice {
    /// Its name, as `rdmap79s0`.
    pub name: String,
    /// Whether it is an EFA device.
    pub efa: bool,
    /// State of its port, as the kernel writes it (`4: ACTIVE`); empty where it says none.
    pub state: String,
    /// The file under /dev/infiniband by which programs use it, if the kernel has one.
    pub file: Option<String>,
    /// Whether this process may open that file.
    pub access: Access,
}

/// What opening a device's file came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// It can be opened.
    Open,
    /// It is not there.
    Missing,
    /// It is there and cannot be opened, with the reason.
    Refused(String),
}

/// Counters of one RDMA device, by name.
pub type Counters = Vec<(String, u64)>;

/// Names of a directory's entries, sorted; none where it cannot be read.
fn names(path: &Path) -> Vec<String> {
    entries(path).iter().map(|entry| file_name(entry)).collect()
}

fn number(path: &Path) -> Option<u64> {
    text(path).parse().ok()
}

fn is_efa(pci: &Path) -> bool {
    text(&pci.join("vendor")) == AMAZON && text(&pci.join("device")).starts_with("0xefa")
}

/// The RDMA devices of the kernel, each with its file and whether that can be opened.
pub(super) fn rdma_devices(root: &Path) -> Vec<RdmaDevice> {
    let class = root.join("sys/class");
    let verbs: Vec<(String, String)> = names(&class.join("infiniband_verbs"))
        .into_iter()
        .map(|file| (text(&class.join("infiniband_verbs").join(&file).join("ibdev")), file))
        .collect();
    let device = |name: String| {
        let at = class.join("infiniband").join(&name);
        let file = verbs.iter().find(|(device, _)| *device == name).map(|(_, file)| file.clone());
        let access =
            file.as_ref().map_or(Access::Missing, |file| access(&root.join("dev/infiniband").join(file)));
        RdmaDevice {
            efa: is_efa(&at.join("device")),
            state: text(&at.join("ports/1/state")),
            file,
            access,
            name,
        }
    };
    names(&class.join("infiniband")).into_iter().map(device).collect()
}

fn access(path: &Path) -> Access {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Access::Open,
        Err(error) if error.kind() == ErrorKind::NotFound => Access::Missing,
        Err(error) => Access::Refused(error.to_string()),
    }
}

/// PCI addresses of EFA devices, whether a driver has taken them or not.
pub(super) fn efa_functions(root: &Path) -> Vec<String> {
    let devices = root.join("sys/bus/pci/devices");
    names(&devices).into_iter().filter(|name| is_efa(&devices.join(name))).collect()
}

/// The hardware counters of each RDMA device's first port.
pub(super) fn counters(root: &Path) -> Vec<(String, Counters)> {
    let class = root.join("sys/class/infiniband");
    let read = |name: String| {
        let folder = class.join(&name).join("ports/1/hw_counters");
        let counter = |counter: String| Some((counter.clone(), number(&folder.join(&counter))?));
        (name, names(&folder).into_iter().filter_map(counter).collect())
    };
    names(&class).into_iter().map(read).collect()
}

/// The locked-memory limit of this process in bytes; `None` for no limit. The error says what could not be read.
pub(super) fn locked_memory_limit(root: &Path) -> Result<Option<u64>, String> {
    let path = root.join("proc/self/limits");
    let limits = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    match line.and_then(|line| line.split_whitespace().next()) {
        Some("unlimited") => Ok(None),
        Some(soft) => soft.parse().map(Some).map_err(|_| format!("{}: a limit of `{soft}`", path.display())),
        None => Err(format!("{}: no locked-memory limit in it", path.display())),
    }
}

/// Huge pages of 2 MiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugePages {
    /// How many the machine has set aside.
    pub total: u64,
    /// How many of them are free.
    pub free: u64,
    /// How many bytes of them this container may use; `None` for no limit, or none that can be seen.
    pub container_bytes: Option<u64>,
}

/// What is set aside, and what the container's control group allows (version 2; version 1 has the other name).
pub(super) fn huge_pages(root: &Path) -> HugePages {
    let of = |file| number(&root.join("sys/kernel/mm/hugepages/hugepages-2048kB").join(file)).unwrap_or(0);
    let limits = ["hugetlb.2MB.max", "hugetlb/hugetlb.2MB.limit_in_bytes"];
    let limit = limits.iter().find_map(|file| number(&root.join("sys/fs/cgroup").join(file)));
    // Version 1 writes no limit as the largest number of pages that there can be.
    HugePages {
        total: of("nr_hugepages"),
        free: of("free_hugepages"),
        container_bytes: limit.filter(|&bytes| bytes < 1 << 60),
    }
}

/// Whether one of these kernel modules is loaded, or built in.
pub(super) fn has_module(root: &Path, names: &[&str]) -> bool {
    names.iter().any(|name| root.join("sys/module").join(name).is_dir())
}

/// Whether the machine says that it is an EC2 instance.
pub(super) fn is_ec2(root: &Path) -> bool {
    text(&root.join("sys/class/dmi/id/sys_vendor")).contains("Amazon EC2") || !efa_functions(root).is_empty()
}

/// Version of the NIXL whose libraries are in this folder, as its package's metadata beside it say.
pub(super) fn nixl_version(core: &Path) -> Option<String> {
    let package = core.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(".mesonpy.libs")?;
    let version = |name: String| {
        let rest = name.strip_prefix(package)?.strip_prefix('-')?;
        Some(rest.strip_suffix(".dist-info")?.to_owned())
    };
    names(core.parent()?).into_iter().find_map(version)
}

/// What stands in every file of this plugin: the beginning of its options' variables.
const OURS: &[u8] = b"NIXL_LIBFABRIC_";

/// Whether a plugin's file is one of ours; `None` where it cannot be read.
pub(super) fn is_ours(path: &Path) -> Option<bool> {
    let bytes = fs::read(path).ok()?;
    Some(bytes.windows(OURS.len()).any(|window| window == OURS))
}

/// Other places where a plugin of NCCL for libfabric may lie: what the EFA installer and the NVIDIA images use.
pub(super) fn nccl_plugins(root: &Path) -> Vec<PathBuf> {
    let folders =
        ["opt/amazon/ofi-nccl/lib", "opt/amazon/ofi-nccl/lib64", "opt/amazon/ofi-nccl/lib/x86_64-linux-gnu"];
    let files = ["libnccl-net-ofi.so", "libnccl-net.so"];
    let paths = folders.iter().flat_map(|folder| files.map(|file| root.join(folder).join(file)));
    paths.filter(|path| path.exists()).collect()
}
