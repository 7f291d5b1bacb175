//! Registered memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::MemoryRange;
use super::domain::Domain;
use super::efa;
use super::endpoint::Endpoint;
use super::error::{FabricError, registration_hint};
use super::handle::Handle;
use crate::error::Result;
use crate::sys::libfabric as sys;
use crate::sys::page::page_bytes;

/// Everything that a peer or we may do with a registration.
const ACCESS_ALL: u64 =
    sys::FI_SEND | sys::FI_RECV | sys::FI_READ | sys::FI_WRITE | sys::FI_REMOTE_READ | sys::FI_REMOTE_WRITE;

/// Kind of memory that is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hmem {
    /// Host memory.
    System,
    /// Memory of a CUDA device.
    Cuda {
        /// CUDA's ordinal of the device.
        device: i32,
        /// Whether the provider may pass the memory to another process by CUDA IPC. shm then moves it directly; where
        /// CUDA cannot export the memory, transfers would fail.
        ipc: bool,
    },
    /// Memory of a Neuron device.
    Neuron {
        /// Index of the device.
        device: i32,
    },
}

/// A dmabuf that stands for the memory to register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dmabuf {
    /// File descriptor; libfabric does not close it.
    pub fd: RawFd,
    /// Offset of the range in the dmabuf, in bytes.
    pub offset: u64,
    /// Length of the range in bytes.
    pub len: u64,
    /// Address at which the dmabuf begins in the process.
    pub base: u64,
}

/// Memory that stays where it is and allocated for as long as the value lives.
///
/// # Safety
/// The `len` bytes at `addr` must be memory that tolerates concurrent access by devices, and both must stay the same,
/// until the value is dropped.
pub unsafe trait KeptMemory: Send + Sync {
    /// First byte.
    fn addr(&self) -> u64;
    /// Length in bytes.
    fn len(&self) -> u64;
    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Memory that a registration keeps.
enum Backing {
    Own(Allocation),
    Kept { _memory: Arc<dyn KeptMemory> },
}

/// A registered range of memory. Copies stand for the same registration, which is closed with the last of them and
/// the last operation in flight that uses it.
#[derive(Clone)]
pub struct MemoryRegion {
    inner: Arc<Registration>,
}

/// The registration itself. Operations in flight hold it.
pub(super) struct Registration {
    /// Closed by `drop`, so before its domain, and before our own memory behind it is freed.
    handle: Handle<sys::fid_mr>,
    domain: Arc<Domain>,
    backing: Option<Backing>,
    descriptor: *mut std::ffi::c_void,
    key: u64,
    addr: u64,
    len: u64,
}

// SAFETY: after opening (and binding) it is only read; `descriptor` is the provider's token, never dereferenced here.
unsafe impl Send for Registration {}
// SAFETY: as above; closing happens once, by the last holder.
unsafe impl Sync for Registration {}

impl Domain {
    /// Registers a range for all local and remote accesses.
    ///
    /// `requested_key` counts where the provider does not choose keys itself ([`super::Device::mr_prov_key`]); it must
    /// then be unused in this domain. Where [`super::Device::mr_endpoint`] is set, the region works after
    /// [`MemoryRegion::bind`].
    pub fn register(
        self: &Arc<Self>,
        range: MemoryRange,
        hmem: Hmem,
        dmabuf: Option<&Dmabuf>,
        requested_key: u64,
    ) -> std::result::Result<MemoryRegion, FabricError> {
        let inner = self.register_backed(range, hmem, dmabuf, requested_key, None)?;
        Ok(MemoryRegion { inner: Arc::new(inner) })
    }

    /// Registers host memory, which lives at least as long as the region.
    pub fn register_kept(
        self: &Arc<Self>,
        memory: Arc<dyn KeptMemory>,
        requested_key: u64,
    ) -> std::result::Result<MemoryRegion, FabricError> {
        // SAFETY: the promise of `KeptMemory`; the registration keeps it until it is closed, and where it cannot be
        // closed, for ever (`Registration::drop`).
        let range = unsafe { MemoryRange::assume_registered(memory.addr(), memory.len()) };
        let backing = Some(Backing::Kept { _memory: memory });
        let inner = self.register_backed(range, Hmem::System, None, requested_key, backing)?;
        Ok(MemoryRegion { inner: Arc::new(inner) })
    }

    fn register_backed(
        self: &Arc<Self>,
        range: MemoryRange,
        hmem: Hmem,
        dmabuf: Option<&Dmabuf>,
        requested_key: u64,
        backing: Option<Backing>,
    ) -> std::result::Result<Registration, FabricError> {
        const CALL: &str = "fi_mr_regattr";
        if range.is_empty() || range.addr().checked_add(range.len()).is_none() {
            return Err(FabricError::refused(CALL, "the range is empty or wraps around"));
        }
        if hmem != Hmem::System && !self.device().has_hmem() {
            return Err(FabricError::refused(CALL, "the provider cannot register accelerator memory"));
        }
        let iov = libc::iovec { iov_base: range.addr() as *mut _, iov_len: range.len() as usize };
        let dmabuf = match dmabuf {
            Some(dmabuf) => Some(self.dmabuf_argument(dmabuf, range)?),
            None => None,
        };
        // SAFETY: integers and raw pointers, for which zero is a value.
        let mut attr: sys::fi_mr_attr = unsafe { zeroed() };
        attr.mr_iov = dmabuf.as_ref().map_or((&raw const iov).cast(), |d| ptr::from_ref(d).cast());
        attr.iov_count = 1;
        attr.access = ACCESS_ALL;
        attr.requested_key = if self.device().mr_prov_key() { 0 } else { requested_key };
        (attr.iface, attr.device) = match hmem {
            Hmem::System => (sys::FI_HMEM_SYSTEM, 0),
            Hmem::Cuda { device, .. } => (sys::FI_HMEM_CUDA, u64::from(device as u32)),
            Hmem::Neuron { device } => (sys::FI_HMEM_NEURON, u64::from(device as u32)),
        };
        let flags = match (&dmabuf, hmem) {
            (Some(_), _) => sys::FI_MR_DMABUF,
            // shm takes it for leave to use CUDA IPC.
            (None, Hmem::Cuda { ipc: true, .. }) => sys::FI_HMEM_DEVICE_ONLY,
            _ => 0,
        };
        let mut mr = ptr::null_mut();
        // SAFETY: the domain is open and its tables are set; `attr` and what it points to live through the call. The
        // memory is valid until the registration closes: the promise behind `MemoryRange`.
        let handle = unsafe {
            let domain = self.handle().as_ptr();
            let status = match (*(*domain).mr).regattr {
                Some(register) => register(self.handle().fid(), &raw const attr, flags, &raw mut mr),
                None => -libc::ENOSYS,
            };
            Handle::from_open(CALL, status, mr)
        };
        let is_efa = efa::is_efa(self.device().provider());
        let handle = handle.map_err(|error| match registration_hint(is_efa, error.code) {
            Some(hint) => error.hint(hint),
            None => error,
        })?;
        // SAFETY: the registration is open; both members are set by the time that it is.
        let (descriptor, key) = unsafe { ((*handle.as_ptr()).mem_desc, (*handle.as_ptr()).key) };
        Ok(Registration {
            handle,
            domain: Arc::clone(self),
            backing,
            descriptor,
            key,
            addr: range.addr(),
            len: range.len(),
        })
    }

    fn dmabuf_argument(
        &self,
        dmabuf: &Dmabuf,
        range: MemoryRange,
    ) -> std::result::Result<sys::fi_mr_dmabuf, FabricError> {
        const CALL: &str = "fi_mr_regattr(dmabuf)";
        let api = self.device().api_version();
        // An older API would take the dmabuf for an address range.
        if api < super::Version::new(1, 20) {
            return Err(FabricError {
                code: libc::ENOSYS,
                ..FabricError::refused(CALL, format!("libfabric 1.20 or newer is needed, this speaks {api}"))
            });
        }
        if dmabuf.base.checked_add(dmabuf.offset) != Some(range.addr()) || dmabuf.len != range.len() {
            return Err(FabricError::refused(CALL, "the dmabuf and the range are not the same memory"));
        }
        Ok(sys::fi_mr_dmabuf {
            fd: dmabuf.fd,
            offset: dmabuf.offset,
            len: dmabuf.len as usize,
            base_addr: dmabuf.base as *mut _,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Err(error) = self.handle.close() {
            log::error!(
                "deregistering {} bytes at {:#x} from {:?} failed, the NIC keeps access: {error}",
                self.len,
                self.addr,
                self.domain
            );
            self.handle.abandon();
            std::mem::forget(self.backing.take());
        }
    }
}

impl MemoryRegion {
    /// Key by which peers name it.
    pub fn key(&self) -> u64 {
        self.inner.key
    }

    /// First byte.
    pub fn addr(&self) -> u64 {
        self.inner.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Never: an empty range is not registered.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// What a peer names the first byte by: its address where the provider uses addresses, else 0.
    pub fn remote_base(&self) -> u64 {
        if self.domain().device().mr_virt_addr() { self.inner.addr } else { 0 }
    }

    /// Domain that it is registered in.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.inner.domain
    }

    /// Binds the region to an endpoint and enables it, where [`super::Device::mr_endpoint`] asks for that; elsewhere
    /// nothing is to do. A bound region must be closed before its endpoint can be.
    pub fn bind(&self, endpoint: &Endpoint) -> std::result::Result<(), FabricError> {
        if !self.domain().device().mr_endpoint() {
            return Ok(());
        }
        if !Arc::ptr_eq(self.domain(), endpoint.domain()) {
            return Err(FabricError::refused("fi_mr_bind", "the endpoint is of another domain"));
        }
        // SAFETY: libfabric refuses to close an endpoint while a region is bound to it, and what could not be closed
        // is leaked (`Endpoint::drop`): so the endpoint stays open for as long as the region.
        unsafe { self.inner.handle.bind(endpoint.fid(), 0)? };
        // SAFETY: FI_ENABLE takes no argument.
        unsafe { self.inner.handle.control("fi_mr_enable", sys::FI_ENABLE, ptr::null_mut()) }
    }

    /// Closes the registration, unless it has another holder: a copy of the region, or an operation in flight. Then
    /// it is given back.
    #[cfg(test)]
    pub fn close(self) -> std::result::Result<(), Self> {
        match Arc::try_unwrap(self.inner) {
            Ok(registration) => {
                drop(registration);
                Ok(())
            }
            Err(inner) => Err(Self { inner }),
        }
    }

    /// Whether `len` bytes at `addr` lie inside.
    pub fn contains(&self, addr: u64, len: usize) -> bool {
        addr.checked_sub(self.inner.addr)
            .and_then(|offset| offset.checked_add(len as u64))
            .is_some_and(|end| end <= self.inner.len)
    }

    pub(super) fn hold(&self) -> Arc<Registration> {
        Arc::clone(&self.inner)
    }

    pub(super) fn descriptor(&self) -> *mut std::ffi::c_void {
        self.inner.descriptor
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}, key {:#x}", self.len(), self.addr(), self.key())
    }
}

/// Zeroed memory of our own, aligned to a page: the unit in which NICs pin memory.
struct Allocation {
    memory: NonNull<u8>,
    layout: Layout,
}

impl Allocation {
    fn new(len: usize) -> std::result::Result<Self, FabricError> {
        let layout = usize::try_from(page_bytes())
            .ok()
            .and_then(|page| Layout::from_size_align(len, page).ok())
            .filter(|layout| layout.size() > 0)
            .ok_or_else(|| FabricError::refused("allocate buffer", "the size is 0 or too large"))?;
        // SAFETY: the size is not 0.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(memory) => Ok(Self { memory, layout }),
            None => handle_alloc_error(layout),
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once. Its registration is closed: `Registration` drops it last.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}

/// A page-aligned buffer of our own, registered. It lives until the last operation in flight is over.
#[derive(Debug)]
pub struct RegisteredBuffer {
    region: MemoryRegion,
}

impl RegisteredBuffer {
    /// Allocates and registers `len` bytes of host memory, zeroed.
    pub fn new(domain: &Arc<Domain>, len: usize, requested_key: u64) -> Result<Self> {
        Self::new_as(domain, len, requested_key, Hmem::System)
    }

    /// Like [`Self::new`], but calls the memory another kind, to find out whether the provider knows that kind.
    pub fn new_as(domain: &Arc<Domain>, len: usize, requested_key: u64, hmem: Hmem) -> Result<Self> {
        let memory = Allocation::new(len)?;
        // SAFETY: the allocation is handed to the registration, which frees it after it has closed.
        let range = unsafe { MemoryRange::assume_registered(memory.memory.as_ptr() as u64, len as u64) };
        let inner = domain.register_backed(range, hmem, None, requested_key, Some(Backing::Own(memory)))?;
        Ok(Self { region: MemoryRegion { inner: Arc::new(inner) } })
    }

    /// The registration.
    pub fn region(&self) -> &MemoryRegion {
        &self.region
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.region.len() as usize
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty()
    }

    /// Address of a byte, for an operation.
    pub fn addr_of(&self, offset: usize) -> u64 {
        self.region.addr() + offset as u64
    }

    /// Copies bytes into the buffer.
    ///
    /// # Panics
    /// If they do not fit. What an operation in flight on the same bytes carries is undetermined.
    pub fn copy_in(&mut self, offset: usize, data: &[u8]) {
        let target = self.at(offset, data.len());
        // SAFETY: in bounds by `at`; our own memory cannot overlap a slice that safe code holds, since no reference
        // to it is ever made.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) };
    }

    /// Copies bytes out of the buffer.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn copy_out(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.copy_to(offset, &mut data);
        data
    }

    /// Copies bytes out of the buffer into a slice.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn copy_to(&self, offset: usize, data: &mut [u8]) {
        let source = self.at(offset, data.len());
        // SAFETY: as in `copy_in`, the other way round.
        unsafe { ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len()) };
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} are outside a buffer of {}",
            self.len()
        );
        let Some(Backing::Own(Allocation { memory, .. })) = &self.region.inner.backing else {
            unreachable!("made by `new` with its memory");
        };
        // SAFETY: `offset` is within the allocation, checked above.
        unsafe { memory.as_ptr().add(offset) }
    }
}
