//! What can be seen of this machine, this container and this process' environment. Nothing is judged here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::{self, Counters, HugePages, RdmaDevice};
use super::metadata::{self, Metadata};
use super::probe::{self, Question};
use crate::abi::layout;
use crate::cuda::Runtime;
use crate::topology::{DeviceFilter, Machine, RailDevice, RailMap, SelectOptions, rail_devices_from_sysfs};

/// File names under which NIXL looks for this plugin.
pub(super) const PLUGIN_FILES: [&str; 2] = ["libplugin_LIBFABRIC.so", "libplugin_Libfabric.so"];
/// Kernel modules that let a NIC register GPU memory by its address.
const PEER_MEMORY: [&str; 3] = ["nvidia_peermem", "nv_peer_mem", "efa_nv_peermem"];

/// How to look.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where `/sys`, `/proc` and `/dev` are found.
    pub root: PathBuf,
    /// The folder of a NIXL's libraries, with `plugins` in it.
    pub nixl: Option<PathBuf>,
    /// The folder that NIXL would be given where `NIXL_PLUGIN_DIR` is not set.
    pub plugin_dir: Option<PathBuf>,
    /// How long the counters are watched.
    pub watch: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { root: "/".into(), nixl: None, plugin_dir: None, watch: Duration::from_secs(2) }
    }
}

/// Everything that the checks judge.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The libfabric that the plugin would load; the error if it would find none.
    pub libfabric: Option<Result<Loaded, String>>,
    /// Libraries for NCCL, each with the libfabric files that it brings into a process, or why it does not load.
    pub nccl: Vec<(PathBuf, Result<Vec<String>, String>)>,
    /// RDMA devices of the kernel.
    pub rdma: Vec<RdmaDevice>,
    /// PCI addresses of EFA devices.
    pub efa_functions: Vec<String>,
    /// Locked-memory limit in bytes; `None` inside for no limit.
    pub locked_memory: Option<Result<Option<u64>, String>>,
    /// Huge pages.
    pub huge_pages: HugePages,
    /// How the machine was read, as `hwloc 2.9`.
    pub machine: String,
    /// Whether the machine looks as if it had an accelerator.
    pub accelerator: bool,
    /// The GPU driver and its devices.
    pub cuda: Option<Result<Cuda, String>>,
    /// Why `libcudart.so` is not found; `None` where it is, or nobody asked.
    pub cudart: Option<String>,
    /// Whether a module for GPU memory by address is loaded.
    pub peer_memory: bool,
    /// Each GPU with the network devices that serve it.
    pub gpu_map: Vec<(String, Vec<String>)>,
    /// Variables of libfabric, NIXL, vLLM and this plugin.
    pub environment: BTreeMap<String, String>,
    /// Where NIXL looks for plugins.
    pub plugins: Plugins,
    /// What EC2 says of the network; `None` where nobody asked.
    pub metadata: Option<Result<Metadata, String>>,
    /// Counters before and after the time of watching.
    pub counters: [Vec<(String, Counters)>; 2],
    /// How long that was.
    pub watch: Duration,
}

/// A libfabric and what it offers.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// Its file.
    pub origin: String,
    /// Its version.
    pub version: (u32, u32),
    /// Provider and domain of each device that fits.
    pub offers: Vec<(String, String)>,
    /// The same, of those that take accelerator memory.
    pub accelerator_offers: Vec<(String, String)>,
}

/// A GPU driver and its devices.
#[derive(Debug, Clone, Default)]
pub struct Cuda {
    /// CUDA version that the driver serves.
    pub driver: String,
    /// Each GPU: PCI address, whether it exports dmabufs, whether NICs reach it.
    pub gpus: Vec<(String, bool, bool)>,
}

/// Where NIXL looks for plugins.
#[derive(Debug, Clone, Default)]
pub struct Plugins {
    /// Folder of the NIXL that was named.
    pub nixl: Option<PathBuf>,
    /// Its version.
    pub nixl_version: Option<String>,
    /// Whether it calls a backend's functions in an order that this plugin serves; the error says what differs.
    pub interface: Option<Result<(), String>>,
    /// The folder that NIXL looks into, and who says so.
    pub folder: Option<(PathBuf, &'static str)>,
    /// The plugin's file there: path, whether it is ours, and what it says of itself or why it does not load.
    pub files: Vec<PluginFile>,
}

/// A plugin's file.
#[derive(Debug, Clone)]
pub struct PluginFile {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it is this plugin; `None` where it cannot be read.
    pub ours: Option<bool>,
    /// Interface version and version, or why it does not load.
    pub loaded: Result<(i32, String), String>,
}

impl Facts {
    /// Looks at everything; takes as long as the counters are watched, and the time that libraries take to load.
    pub fn collect(options: &Options) -> Self {
        let root = options.root.as_path();
        let before = files::counters(root);
        let started = std::time::Instant::now();
        let environment = environment();
        let libfabric = libfabric(environment.get("NIXL_LIBFABRIC_LIBFABRIC_PATH").map(PathBuf::from));
        let nccl = nccl(root, environment.get("NCCL_NET_PLUGIN"));
        let accelerator = Runtime::is_likely();
        let (machine, gpu_map) = topology(root);
        let mut facts = Self {
            libfabric: Some(libfabric),
            nccl,
            rdma: files::rdma_devices(root),
            efa_functions: files::efa_functions(root),
            locked_memory: Some(files::locked_memory_limit(root)),
            huge_pages: files::huge_pages(root),
            machine,
            accelerator,
            cuda: accelerator.then(cuda),
            cudart: accelerator
                .then(|| probe::ask(&Question::Library("libcudart.so".to_owned())).err())
                .flatten(),
            peer_memory: files::has_module(root, &PEER_MEMORY),
            gpu_map,
            plugins: plugins(options, &environment),
            metadata: metadata(root, environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")),
            environment,
            ..Self::default()
        };
        if !before.is_empty() {
            std::thread::sleep(options.watch.saturating_sub(started.elapsed()));
        }
        facts.watch = started.elapsed();
        facts.counters = [before, files::counters(root)];
        facts
    }

    /// Whether the machine has EFA devices.
    pub fn has_efa(&self) -> bool {
        !self.efa_functions.is_empty() || self.rdma.iter().any(|device| device.efa)
    }
}

/// Variables that somebody may have set for what is checked here.
fn environment() -> BTreeMap<String, String> {
    const PREFIXES: [&str; 7] = ["FI_", "NIXL_", "VLLM_", "SGLANG_", "NCCL_NET", "OFI_NCCL_", "RDMAV_"];
    const NAMES: [&str; 4] =
        ["LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "AWS_EC2_METADATA_SERVICE_ENDPOINT"];
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, value)| {
            let known =
                NAMES.contains(&name.as_str()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
            known && !value.is_empty()
        })
        .collect()
}

fn libfabric(path: Option<PathBuf>) -> Result<Loaded, String> {
    let mut loaded = Loaded::default();
    for line in probe::ask(&Question::Libfabric(path))? {
        match line.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["library", origin, major, minor] => {
                origin.clone_into(&mut loaded.origin);
                loaded.version = (major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
            }
            ["host", provider, domain] => loaded.offers.push((provider.to_owned(), domain.to_owned())),
            ["accelerator", provider, domain] => {
                loaded.accelerator_offers.push((provider.to_owned(), domain.to_owned()));
            }
            _ => {}
        }
    }
    Ok(loaded)
}

/// NCCL's plugins for libfabric that would be loaded, one for each name that NCCL tries.
fn nccl(root: &Path, named: Option<&String>) -> Vec<(PathBuf, Result<Vec<String>, String>)> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    if let Some(name) = named {
        // NCCL takes a path, a file name, or what stands between `libnccl-net-` and `.so`.
        let file = if name.contains(".so") { name.clone() } else { format!("libnccl-net-{name}.so") };
        candidates.push(file.into());
    }
    candidates.extend(["libnccl-net.so", "libnccl-net-ofi.so"].map(PathBuf::from));
    candidates.extend(files::nccl_plugins(root));
    let mut found: Vec<(PathBuf, Result<Vec<String>, String>)> = Vec::new();
    for path in candidates {
        let answer = probe::ask(&Question::LibfabricOf(path.clone()));
        let answer =
            answer.map(|lines| lines.into_iter().filter_map(|line| line.into_iter().nth(1)).collect());
        // Of the names that are only tried, those that are not there are of no interest.
        if answer.is_ok() || path.is_absolute() {
            found.push((path, answer));
        }
    }
    found
}

fn cuda() -> Result<Cuda, String> {
    let mut cuda = Cuda::default();
    for line in probe::ask(&Question::Cuda)? {
        match line.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["driver", version, _] => version.clone_into(&mut cuda.driver),
            ["gpu", pci, dmabuf, gdr, _] => cuda.gpus.push((pci.to_owned(), dmabuf == "yes", gdr == "yes")),
            _ => {}
        }
    }
    Ok(cuda)
}

/// How the machine was read, and the devices that serve each of its GPUs.
fn topology(root: &Path) -> (String, Vec<(String, Vec<String>)>) {
    let machine = Machine::discover();
    let devices = rail_devices_from_sysfs(root);
    let allowed = DeviceFilter::default().apply(&devices).unwrap_or_default();
    let devices: Vec<RailDevice> = allowed.into_iter().map(|at| devices[at].clone()).collect();
    let map = RailMap::build(&machine, &devices, &SelectOptions::default());
    let name = |&at: &usize| devices[at].short_name().to_owned();
    let gpus = map.map(|map| {
        map.accelerators()
            .map(|(pci, serving)| (pci.to_string(), serving.iter().map(name).collect()))
            .collect()
    });
    (machine.origin().to_owned(), gpus.unwrap_or_default())
}

fn plugins(options: &Options, environment: &BTreeMap<String, String>) -> Plugins {
    let own =
        options.nixl.as_ref().map(|core| (core.join("plugins"), "NIXL's own, as NIXL_PLUGIN_DIR is not set"));
    let told =
        options.plugin_dir.clone().map(|folder| (folder, "as vLLM, SGLang and `enable` set NIXL_PLUGIN_DIR"));
    let set = environment.get("NIXL_PLUGIN_DIR").map(|folder| (PathBuf::from(folder), "NIXL_PLUGIN_DIR"));
    let folder = set.or(told).or(own);
    let paths = folder.iter().flat_map(|(folder, _)| PLUGIN_FILES.map(|file| folder.join(file)));
    let file = |path: PathBuf| {
        let answer = probe::ask(&Question::Plugin(path.clone()));
        let loaded = answer.map(|lines| {
            let field = |at| lines.first().and_then(|line| line.get(at)).cloned().unwrap_or_default();
            (field(1).parse().unwrap_or(0), field(3))
        });
        PluginFile { ours: files::is_ours(&path), loaded, path }
    };
    Plugins {
        nixl: options.nixl.clone(),
        nixl_version: options.nixl.as_deref().and_then(files::nixl_version),
        interface: options.nixl.as_deref().map(|core| {
            let answer = layout::of_core(Some(&core.join("libnixl.so")), None);
            answer.map(|_| ()).map_err(|error| error.to_string())
        }),
        // A link that leads nowhere is there for NIXL, too: it tries to load it.
        files: paths.filter(|path| path.symlink_metadata().is_ok()).map(file).collect(),
        folder,
    }
}

/// Asks only where the machine says that it is EC2, or somebody has named an address: elsewhere nobody answers there.
fn metadata(root: &Path, endpoint: Option<&String>) -> Option<Result<Metadata, String>> {
    (endpoint.is_some() || files::is_ec2(root)).then(|| metadata::ask(endpoint.map(String::as_str)))
}
