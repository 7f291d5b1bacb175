//! Accelerator memory: whether this engine can register it, and how.
//!
//! Libraries below us call CUDA by themselves: efa when it registers, shm when it copies. They do so in whatever context
//! is current and make one on device 0 if none is. So they are always called in a context that the application has.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::discover::{Found, names};
use super::placement::Placement;
use crate::cuda::neuron::Neuron;
use crate::cuda::{Allocation, Context, Cuda, DmaBuf, Kind, Lent, Runtime};
use crate::error::{Error, Result, Status};
use crate::fabric::{Dmabuf, Hmem, MemoryRange, RegisteredBuffer, Version, next_key};
use crate::memory::{Memory, Registration};
use crate::rail::Rail;
use crate::sys::cudart::Cudart;
use crate::types::{AgentName, Desc, MemKind, PciAddress, RailId};

/// The libfabric API that takes a dmabuf (`FI_MR_DMABUF`, `fi_mr(3)`).
const DMABUF_API: Version = Version::new(1, 20);

/// Bytes registered to find out whether a provider knows CUDA at all.
const PROBE_BYTES: usize = 4096;

/// How a provider came to know accelerator memory, as far as the log tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Dmabuf,
    Address,
    /// The provider copies it by CUDA, which does not tell it when a copy is over.
    Unordered,
}

/// What an operator does where the provider cannot take GPU memory.
const STAGING_HELP: &str = "set vram_staging=true (in the environment: NIXL_LIBFABRIC_VRAM_STAGING=true) for each agent \
                            whose GPU memory is to be reached, or copy it to host memory";

/// What the engine does with accelerator memory.
pub(super) struct Vram {
    agent: AgentName,
    /// Whose memory it is, or why there is none to register.
    runtime: Result<Runtime>,
    /// No rail reaches it: it moves by way of host memory, as the user wants.
    staged: Option<&'static Cuda>,
    /// A NIC moves the data; otherwise the provider does, with copies of CUDA's.
    by_nic: bool,
    /// Whether agents of this host may map it.
    lends: bool,
    /// Where copies to and from host memory run, once GPU memory is registered.
    own: OnceLock<Context>,
    /// Devices of which the log has told how they are registered.
    told: Mutex<BTreeSet<(i32, Way)>>,
    /// Current while rails are driven, once GPU memory is registered: providers copy then.
    context: OnceLock<Context>,
}

/// Runs `work`, which may make libfabric call CUDA, in a context that the application has, if it has one.
///
/// efa finds out whether its NIC can reach GPU memory by allocating a page of it, on device 0 unless a context is current.
pub(super) fn in_application_context<R>(work: impl FnOnce() -> R) -> R {
    let cuda = if Runtime::is_likely() { Cuda::get().ok() } else { None };
    match cuda.and_then(Cuda::any_active_context) {
        Some(context) => context.with_any(work),
        None => work(),
    }
}

/// Puts the CUDA runtime library in libfabric's way, which looks for it once, when it is first asked for devices.
pub(super) fn lead_to_cudart() {
    if Runtime::is_likely()
        && Cuda::get().is_ok()
        && let Cudart::Led(name) = Cudart::provide()
    {
        log::info!("libfabric is led to {name}, for it looks for libcudart.so");
    }
}

impl Vram {
    /// Finds out what can be done on these rails.
    /// Agents of this host may map it if it `lends`.
    pub fn find(rails: &[Arc<Rail>], found: &Found, staging: bool, lends: bool, agent: &AgentName) -> Self {
        let mut runtime = usable_runtime(rails, found);
        let cuda = if Runtime::is_likely() { Cuda::get().ok() } else { None };
        let staged = cuda.filter(|_| staging && runtime.is_err());
        if cuda.is_some() && staged.is_none() {
            runtime = runtime.map_err(|why| Error::new(why.status(), format!("{why}; {STAGING_HELP}")));
        }
        match (&runtime, staged) {
            (Ok(runtime), _) => log::debug!("agent {agent}: VRAM is {}", describe_runtime(*runtime)),
            (Err(why), Some(_)) => {
                log::info!("agent {agent}: VRAM moves through host memory (vram_staging), because {why}");
            }
            (Err(why), None) if wants_cudart() => log::warn!("agent {agent}: no VRAM: {why}"),
            (Err(why), None) => log::debug!("agent {agent}: no VRAM: {why}"),
        }
        let (agent, told, context) = (agent.clone(), Mutex::default(), OnceLock::new());
        let vram = Self {
            agent,
            runtime,
            staged,
            by_nic: !found.software,
            lends,
            own: OnceLock::new(),
            told,
            context,
        };
        // shm page-locks its peers' memory by CUDA as soon as it meets them.
        if let (Ok(Runtime::Cuda(cuda)), false) = (&vram.runtime, vram.by_nic)
            && let Some(context) = cuda.any_active_context()
        {
            vram.context.get_or_init(|| context);
        }
        vram
    }

    /// Memory kinds that can be registered.
    pub fn mems(&self) -> Vec<MemKind> {
        if self.runtime.is_ok() || self.is_staged() {
            vec![MemKind::Dram, MemKind::Vram]
        } else {
            vec![MemKind::Dram]
        }
    }

    /// Whether VRAM moves by way of host memory.
    pub fn is_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// A context in which GPU memory of this agent is, if it has registered some.
    pub fn own_context(&self) -> Option<&Context> {
        self.own.get()
    }

    /// What is to be registered of a GPU.
    fn memory(
        &self,
        cuda: &Cuda,
        allocation: &Allocation,
        range: MemoryRange,
        dev_id: u64,
        ipc: bool,
    ) -> Memory {
        if let Some(context) = &allocation.context {
            self.own.get_or_init(|| context.clone());
        }
        let hmem = Hmem::Cuda { device: allocation.device.ordinal as i32, ipc };
        Memory {
            context: allocation.context.clone(),
            kernels_reach: cuda.kernels_reach(allocation),
            lent: self.lend(cuda, allocation, range),
            ..Memory::new(range, MemKind::Vram, dev_id, hmem)
        }
    }

    fn lend(&self, cuda: &Cuda, allocation: &Allocation, range: MemoryRange) -> Option<Arc<Lent>> {
        if !self.lends {
            return None;
        }
        match cuda.lend(allocation) {
            Ok(lent) => Some(Arc::new(lent)),
            Err(why) => {
                log::debug!(
                    "VRAM {:#x}+{} is not lent to agents of this host: {why}",
                    range.addr(),
                    range.len()
                );
                None
            }
        }
    }

    /// Runs `work`, which drives rails.
    pub fn within<R>(&self, work: impl FnOnce() -> R) -> R {
        match self.context.get() {
            Some(context) => context.with_any(work),
            None => work(),
        }
    }

    /// Registers memory of an accelerator on the rails that are near it.
    pub fn register(
        &self,
        rails: &[Arc<Rail>],
        placement: &Placement,
        range: MemoryRange,
        dev_id: u64,
    ) -> Result<Registration> {
        let what =
            || format!("VRAM {:#x}+{} (device {dev_id}) cannot be registered", range.addr(), range.len());
        match &self.runtime {
            Ok(Runtime::Cuda(cuda)) => self.register_cuda(cuda, rails, placement, range, dev_id),
            Ok(Runtime::Neuron(neuron)) => self.register_neuron(neuron, rails, placement, range, dev_id),
            Err(why) => match self.staged {
                Some(cuda) => self.register_staged(cuda, rails, range, dev_id),
                None => Err(why.clone()),
            },
        }
        .map_err(|e| e.context(what()))
    }

    fn register_cuda(
        &self,
        cuda: &Cuda,
        rails: &[Arc<Rail>],
        placement: &Placement,
        range: MemoryRange,
        dev_id: u64,
    ) -> Result<Registration> {
        let allocation = cuda.inspect(range.addr(), range.len())?;
        allocation.require_vram()?;
        let device = &allocation.device;
        if u64::from(device.ordinal) != dev_id {
            log::debug!(
                "VRAM {:#x}+{} was given as of device {dev_id} and is on {}",
                range.addr(),
                range.len(),
                device.ordinal
            );
        }
        let ipc = !self.by_nic && allocation.kind == Kind::Device;
        let memory = self.memory(cuda, &allocation, range, dev_id, ipc);
        let near = placement.rails_for_accelerator(Some(device.pci));
        // For providers that copy by CUDA, too: a copy within a GPU returns before it is over, and its operation would be
        // completed before the data has arrived.
        let in_sync = cuda.set_sync_memops(&allocation)?;
        let exported =
            self.export(rails, &near, || one(cuda.export(&allocation, range.addr(), range.len())?));
        // Before there is a region, so that whoever drives next is in it.
        if let Some(context) = &allocation.context {
            self.context.get_or_init(|| context.clone());
        }
        if !self.by_nic && !in_sync && self.is_news(&memory, Way::Unordered) {
            log::warn!(
                "agent {}: CUDA {}: CUDA does not let the provider wait for its copies of {}, so a transfer may be done before its last \
                 copy is; allocate with cudaMalloc where that matters",
                self.agent,
                device.ordinal,
                allocation.kind
            );
        }
        self.register_either_way(rails, near, &memory, exported).map_err(|e| {
            if self.by_nic && !allocation.gdr_supported {
                return e.context(
                    "this memory is not made for access by NICs (GPU Direct RDMA), or another process exported it and must \
                     register it",
                );
            }
            e
        })
    }

    /// Takes in GPU memory that no rail is to reach.
    fn register_staged(
        &self,
        cuda: &Cuda,
        rails: &[Arc<Rail>],
        range: MemoryRange,
        dev_id: u64,
    ) -> Result<Registration> {
        let allocation = cuda.inspect(range.addr(), range.len())?;
        allocation.require_vram()?;
        Registration::new(rails, Vec::new(), self.memory(cuda, &allocation, range, dev_id, false), None)
    }

    fn register_neuron(
        &self,
        neuron: &Neuron,
        rails: &[Arc<Rail>],
        placement: &Placement,
        range: MemoryRange,
        dev_id: u64,
    ) -> Result<Registration> {
        let device = i32::try_from(dev_id).map_err(|_| Error::invalid("there is no such Neuron device"))?;
        let memory = Memory::new(range, MemKind::Vram, dev_id, Hmem::Neuron { device });
        let near = match neuron.attached_efa(range.addr()) {
            Ok(nic) => rails_on(rails, nic),
            Err(why) => {
                log::debug!("Neuron device {device}: no word on which EFA device is near: {why}");
                Vec::new()
            }
        };
        let near = if near.is_empty() { placement.rails_for_accelerator(None) } else { near };
        let exported = self.export(rails, &near, || neuron.export(range.addr(), range.len()));
        self.register_either_way(rails, near, &memory, exported)
    }

    /// A dmabuf of the memory, where these rails take one.
    fn export(
        &self,
        rails: &[Arc<Rail>],
        near: &[RailId],
        export: impl FnOnce() -> Result<DmaBuf>,
    ) -> Result<DmaBuf> {
        if !self.by_nic {
            return Err(Error::not_supported("the provider copies with CUDA"));
        }
        if let Some(old) = near.iter().map(|rail| rails[rail.index()].device()).find(|d| !takes_dmabuf(d)) {
            let api = old.api_version();
            return Err(Error::not_supported(format!(
                "libfabric speaks {api}, dmabuf came with {DMABUF_API}"
            )));
        }
        export()
    }

    /// By dmabuf if there is one, else, or if that is refused, by address.
    fn register_either_way(
        &self,
        rails: &[Arc<Rail>],
        near: Vec<RailId>,
        memory: &Memory,
        exported: Result<DmaBuf>,
    ) -> Result<Registration> {
        let by_dmabuf = exported.and_then(|exported| {
            let dmabuf = Dmabuf {
                fd: exported.fd.as_raw_fd(),
                offset: exported.offset,
                len: exported.len,
                base: exported.addr - exported.offset,
            };
            Registration::new(rails, near.clone(), memory.clone(), Some(&dmabuf))
        });
        match by_dmabuf {
            Ok(registration) => {
                self.tell(memory, Way::Dmabuf, "by dmabuf");
                Ok(registration)
            }
            Err(no_dmabuf) => {
                let registration = Registration::new(rails, near, memory.clone(), None)
                    .map_err(|e| Error::new(e.status(), format!("{e}; by dmabuf: {no_dmabuf}")))?;
                self.tell(memory, Way::Address, &format!("by address (dmabuf: {no_dmabuf})"));
                Ok(registration)
            }
        }
    }

    /// Whether the log has not told this yet of a device.
    fn is_news(&self, memory: &Memory, way: Way) -> bool {
        let (Hmem::Cuda { device, .. } | Hmem::Neuron { device }) = memory.hmem else { return false };
        self.told.lock().unwrap_or_else(PoisonError::into_inner).insert((device, way))
    }

    /// Says once for each device how its memory is registered.
    fn tell(&self, memory: &Memory, way: Way, words: &str) {
        let (Hmem::Cuda { device, .. } | Hmem::Neuron { device }) = memory.hmem else { return };
        if self.is_news(memory, way) {
            log::info!(
                "agent {}: memory of {} {device} is registered {words}",
                self.agent,
                hmem_name(memory.hmem)
            );
        }
    }

    /// Attributes of a range that can be registered; `None` for one that cannot.
    pub fn describe(&self, placement: &Placement, desc: &Desc) -> Option<BTreeMap<String, String>> {
        let cuda = match &self.runtime {
            Ok(Runtime::Cuda(cuda)) => cuda,
            Ok(Runtime::Neuron(_)) => return None,
            Err(_) => self.staged?,
        };
        let allocation: Allocation = cuda.inspect(desc.addr, desc.len).ok()?;
        allocation.require_vram().ok()?;
        let rails = placement.rails_for_accelerator(Some(allocation.device.pci));
        Some(BTreeMap::from([
            ("mem".to_owned(), MemKind::Vram.to_string()),
            ("device".to_owned(), allocation.device.ordinal.to_string()),
            ("pci".to_owned(), allocation.device.pci.to_string()),
            ("allocation".to_owned(), allocation.kind.to_string()),
            ("rails".to_owned(), rails.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
        ]))
    }
}

/// The runtime whose memory can be registered on these rails, or why none.
fn usable_runtime(rails: &[Arc<Rail>], found: &Found) -> Result<Runtime> {
    if !Runtime::is_likely() {
        return Err(Error::not_supported("this machine has no GPU (there is no /dev/nvidia0)"));
    }
    if let Some(rail) = rails.iter().find(|rail| !rail.device().has_hmem()) {
        return Err(Error::not_supported(format!(
            "provider {} on {} cannot register accelerator memory (FI_HMEM){}",
            rail.device().provider(),
            names(&found.devices),
            cudart_hint(),
        )));
    }
    let runtime = Runtime::get()?;
    if let Some(rail) = rails.iter().find(|rail| !rail.reaches_gpus()) {
        return Err(Error::not_supported(format!(
            "the NIC {} cannot reach GPU memory: its kernel takes neither a dmabuf of it nor its address (nvidia_peermem); \
             libfabric would copy it piece by piece",
            rail.device().domain_name()
        )));
    }
    if found.software && !knows_interface(&rails[0], runtime) {
        return Err(Error::not_supported(format!(
            "libfabric at hand was built without {}, so its provider {} cannot register accelerator memory{}",
            if matches!(runtime, Runtime::Cuda(_)) { "CUDA" } else { "Neuron" },
            rails[0].device().provider(),
            cudart_hint(),
        )));
    }
    Ok(runtime)
}

/// Whether GPU memory may be missing for want of the CUDA runtime library alone.
fn wants_cudart() -> bool {
    Runtime::is_likely() && matches!(Cudart::provide(), Cudart::Missing(_))
}

/// What an operator does about that, as the end of a sentence.
fn cudart_hint() -> String {
    match Cudart::provide() {
        Cudart::Missing(why) if Runtime::is_likely() => format!(
            ". libfabric needs the CUDA runtime library for that, as libcudart.so, and {why}: install it, or put a link of \
             that name to it into a folder of LD_LIBRARY_PATH"
        ),
        _ => String::new(),
    }
}

/// Whether a software provider knows the runtime. They offer `FI_HMEM` whatever libfabric was built with, and refuse an
/// interface that is not there with ENOSYS before they look at the memory. Hardware providers do not offer it then, and
/// must not be tried with an address that is not the GPU's: efa draws conclusions from the failure.
fn knows_interface(rail: &Rail, runtime: Runtime) -> bool {
    let hmem = match runtime {
        Runtime::Cuda(_) => Hmem::Cuda { device: 0, ipc: false },
        Runtime::Neuron(_) => Hmem::Neuron { device: 0 },
    };
    RegisteredBuffer::new_as(rail.domain(), PROBE_BYTES, next_key(), hmem)
        .map_or_else(|error| error.status() != Status::NotSupported, |_| true)
}

/// Rails on the NIC at this PCI address.
fn rails_on(rails: &[Arc<Rail>], nic: PciAddress) -> Vec<RailId> {
    let is_there = |rail: &&Arc<Rail>| rail.device().nic().and_then(|nic| nic.pci) == Some(nic);
    rails.iter().filter(is_there).map(|rail| rail.id()).collect()
}

fn takes_dmabuf(device: &crate::fabric::Device) -> bool {
    device.api_version() >= DMABUF_API
}

/// The one dmabuf of a range. A registration has one key on each rail, so it cannot consist of several.
fn one(mut exported: Vec<DmaBuf>) -> Result<DmaBuf> {
    match (exported.pop(), exported.len()) {
        (Some(only), 0) => Ok(only),
        (_, others) => Err(Error::not_supported(format!(
            "the range is backed by {} handles that the driver does not export as one; register it in parts",
            others + 1
        ))),
    }
}

fn hmem_name(hmem: Hmem) -> &'static str {
    match hmem {
        Hmem::System => "host",
        Hmem::Cuda { .. } => "GPU",
        Hmem::Neuron { .. } => "Neuron device",
    }
}

fn describe_runtime(runtime: Runtime) -> String {
    match runtime {
        Runtime::Cuda(cuda) => {
            let (major, minor) = cuda.driver_version();
            let devices: Vec<_> = cuda.devices().iter().map(|d| format!("{} {}", d.name, d.pci)).collect();
            format!("CUDA {major}.{minor} ({}): {}", cuda.library_name(), devices.join(", "))
        }
        Runtime::Neuron(neuron) => format!("Neuron, {} cores", neuron.cores()),
    }
}
