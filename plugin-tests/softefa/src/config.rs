//! What a process is told by its environment. `softefa-env` prints these variables.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::abi::verbs::ibv_gid;
use crate::topology::{self, Pci, Topology};

/// The network that this process is on and the host that it plays.
#[derive(Debug)]
pub struct Config {
    /// `SOFTEFA_DIR`: the network; processes with the same directory reach each other.
    pub dir: PathBuf,
    /// `SOFTEFA_HOST`: name of the host; processes with the same name share its devices.
    pub host: String,
    /// `SOFTEFA_TOPOLOGY`, as given.
    pub topology_name: String,
    /// The instance type.
    pub topology: Topology,
    /// The devices, after `SOFTEFA_DEVICES`.
    pub devices: Vec<Device>,
    /// `SOFTEFA_CONTROL`: the file with faults; it need not exist.
    pub control: PathBuf,
    /// `SOFTEFA_SEED`: decides order and faults, unless the control file has a seed.
    pub seed: u64,
    /// `SOFTEFA_TRACE`: keep a trace ring in the directory.
    pub trace: bool,
    /// `SOFTEFA_GPU`: how this host's kernel lets the device reach GPU memory.
    pub gpu: GpuAccess,
}

/// The ways in which GPU memory can be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuAccess {
    /// By dmabuf, as a kernel with `ib_umem_dmabuf` does.
    pub dmabuf: bool,
    /// By address, as a kernel with the module `nvidia_peermem` does.
    pub pointer: bool,
}

impl GpuAccess {
    fn parse(text: &str) -> Option<Self> {
        let (dmabuf, pointer) = match text {
            "all" => (true, true),
            "dmabuf" => (true, false),
            "pointer" => (false, true),
            "none" => (false, false),
            _ => return None,
        };
        Some(Self { dmabuf, pointer })
    }

    /// The name that is parsed.
    pub fn name(self) -> &'static str {
        match (self.dmabuf, self.pointer) {
            (true, true) => "all",
            (true, false) => "dmabuf",
            (false, true) => "pointer",
            (false, false) => "none",
        }
    }
}

/// One device of this host.
#[derive(Clone, Debug)]
pub struct Device {
    /// Where it is.
    pub pci: Pci,
    /// Its NUMA node.
    pub numa: u32,
    /// `rdmap79s0`.
    pub name: String,
    /// Its only GID.
    pub gid: ibv_gid,
}

impl Config {
    /// The configuration of this process, read once; a bad variable is said on stderr and leaves no devices.
    pub fn get() -> Option<&'static Self> {
        static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
        let read = || {
            Self::from_variables(|name| env::var(name).ok()).map_err(|error| eprintln!("softefa: {error}"))
        };
        CONFIG.get_or_init(|| read().ok()).as_ref()
    }

    /// Builds a configuration from `variable`, which looks a name up.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let dir = set("SOFTEFA_DIR").map_or_else(default_dir, PathBuf::from);
        let host = set("SOFTEFA_HOST").unwrap_or_else(|| "a".to_owned());
        if host.len() > 32
            || !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
        {
            return Err(format!("SOFTEFA_HOST={host}: at most 32 letters, digits, '-' and '.'"));
        }
        let topology_name = set("SOFTEFA_TOPOLOGY").unwrap_or_else(|| "p5.48xlarge".to_owned());
        let topology = Topology::load(&topology_name)?;
        let all = topology.devices().into_iter().map(|(pci, numa)| Device {
            pci,
            numa,
            name: pci.efa_name(),
            gid: topology::gid(&host, pci),
        });
        let devices = select(all.collect(), set("SOFTEFA_DEVICES").as_deref())?;
        let seed = set("SOFTEFA_SEED").unwrap_or_else(|| "1".to_owned());
        let seed = seed.parse().map_err(|_| format!("SOFTEFA_SEED={seed}: not a number"))?;
        let control = set("SOFTEFA_CONTROL").map_or_else(|| dir.join("control"), PathBuf::from);
        let trace = set("SOFTEFA_TRACE").is_some_and(|value| value != "0");
        let gpu = set("SOFTEFA_GPU").unwrap_or_else(|| "all".to_owned());
        let gpu = GpuAccess::parse(&gpu)
            .ok_or_else(|| format!("SOFTEFA_GPU={gpu}: not all, dmabuf, pointer or none"))?;
        Ok(Self { dir, host, topology_name, topology, devices, control, seed, trace, gpu })
    }

    /// Root of the host's own sysfs tree.
    pub fn sysfs(&self) -> PathBuf {
        self.dir.join("hosts").join(&self.host).join("sys")
    }
}

fn default_dir() -> PathBuf {
    // SAFETY: getuid has no preconditions and cannot fail.
    let uid = unsafe { libc::getuid() };
    PathBuf::from(format!("/dev/shm/softefa-{uid}"))
}

/// `SOFTEFA_DEVICES`: a count, or names with commas, as a container that is given only some devices of its host.
fn select(all: Vec<Device>, wanted: Option<&str>) -> Result<Vec<Device>, String> {
    let Some(wanted) = wanted else { return Ok(all) };
    if let Ok(count) = wanted.parse::<usize>() {
        return Ok(all.into_iter().take(count).collect());
    }
    let find = |name: &str| {
        let found = all.iter().find(|device| device.name == name).cloned();
        found.ok_or_else(|| format!("SOFTEFA_DEVICES={wanted}: this host has no {name}"))
    };
    wanted.split(',').map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<Config, String> {
        Config::from_variables(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn devices_by_count_and_by_name() {
        assert_eq!(with(&[]).expect("defaults").devices.len(), 32);
        assert_eq!(with(&[("SOFTEFA_DEVICES", "4")]).expect("count").devices.len(), 4);
        let named = with(&[("SOFTEFA_DEVICES", "rdmap96s0,rdmap79s0")]).expect("names").devices;
        assert_eq!(
            named.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(),
            ["rdmap96s0", "rdmap79s0"]
        );
    }

    #[test]
    fn ways_to_gpu_memory_by_name() {
        assert_eq!(with(&[]).expect("defaults").gpu, GpuAccess { dmabuf: true, pointer: true });
        for name in ["all", "dmabuf", "pointer", "none"] {
            assert_eq!(with(&[("SOFTEFA_GPU", name)]).expect(name).gpu.name(), name);
        }
    }

    #[test]
    fn bad_values_are_named() {
        for (name, value) in [
            ("SOFTEFA_SEED", "x"),
            ("SOFTEFA_HOST", "a/b"),
            ("SOFTEFA_DEVICES", "mlx5_0"),
            ("SOFTEFA_TOPOLOGY", "p9"),
            ("SOFTEFA_GPU", "peermem"),
        ] {
            let error = with(&[(name, value)]).expect_err("bad value");
            assert!(error.contains(value), "{error}");
        }
    }
}
