//! GPU memory lent to other processes of this host, and theirs mapped here.
//!
//! What `cuMemAlloc` gave (`cudaMalloc`, `PyTorch`'s default) is lent by a handle of 64 bytes, whole. What was made of VMM handles
//! (`PyTorch`'s expandable segments) is lent by a file descriptor for each, if it was made to be exported. Other memory is not lent:
//! pools of `cudaMallocAsync`, unless made to be shared, cannot be exported.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Span;
use super::{Allocation, Context, Cuda, Kind, check};
use crate::error::{Error, Result};
use crate::sys::cuda::{self as sys, CUipcMemHandle, CUmemAccessDesc, CUmemHandle, CUmemLocation};
use crate::sys::files::open_files_max;
use crate::wire::gpu::{FILES_MAX, HANDLE_BYTES, Handle, Shareable};

/// Descriptors that this process lends memory by.
static FILES_LENT: AtomicUsize = AtomicUsize::new(0);

/// Memory lent, for as long as this is kept; mappings made meanwhile stay.
#[derive(Debug)]
pub struct Lent {
    shareable: Shareable,
    _files: Files,
}

/// Descriptors that count against what the process may open.
#[derive(Debug, Default)]
struct Files {
    files: Vec<OwnedFd>,
    reserved: usize,
}

impl Files {
    /// Room for so many: a quarter of what the process may open (`RLIMIT_NOFILE`) is lent at most, the rest is the application's.
    fn reserve(count: usize) -> Result<Self> {
        let most = open_files_max() / 4;
        let take = |lent: usize| Some(lent + count).filter(|lent| *lent <= most && count <= FILES_MAX);
        match FILES_LENT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(Self { files: Vec::with_capacity(count), reserved: count }),
            Err(lent) => Err(Error::not_supported(format!(
                "it is made of {count} VMM handles, each of which takes a file descriptor to be lent: {FILES_MAX} for one range \
                 and {most} in all are the most (a quarter of ulimit -n), and {lent} are lent"
            ))),
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        FILES_LENT.fetch_sub(self.reserved, Ordering::Relaxed);
    }
}

impl Lent {
    /// What the other process needs.
    pub fn shareable(&self) -> &Shareable {
        &self.shareable
    }
}

impl Cuda {
    /// Lends an allocation. `NotSupported`, in words, for what the driver does not export.
    pub fn lend(&self, allocation: &Allocation) -> Result<Lent> {
        let id = self.buffer_id(allocation.base)?;
        let (handle, files) = match allocation.kind {
            Kind::Device => (Handle::Ipc(self.ipc_handle(allocation)?), Files::default()),
            Kind::Vmm => self.export_files(allocation)?,
            Kind::Async => {
                return Err(Error::not_supported(
                    "memory of cudaMallocAsync's pools is not lent to other processes; allocate with cudaMalloc",
                ));
            }
            kind => return Err(Error::not_supported(format!("{kind} is not lent to other processes"))),
        };
        let shareable = Shareable { base: allocation.base, size: allocation.size, id, handle };
        Ok(Lent { shareable, _files: files })
    }

    fn ipc_handle(&self, allocation: &Allocation) -> Result<[u8; HANDLE_BYTES]> {
        let get = self.api().ipc_get_mem_handle.ok_or_else(|| missing("cuIpcGetMemHandle"))?;
        let mut handle = CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: writes one handle; the address is looked up, not accessed.
        let rc = allocation.with_context(self, || unsafe { get(&raw mut handle, allocation.base) })?;
        self.check("cuIpcGetMemHandle", rc)?;
        Ok(handle.reserved)
    }

    fn export_files(&self, allocation: &Allocation) -> Result<(Handle, Files)> {
        let mut files = Files::reserve(allocation.segments.len())?;
        let mut numbers = Vec::with_capacity(allocation.segments.len());
        for segment in &allocation.segments {
            let file = self.export_file(segment.base)?;
            numbers.push((file.as_raw_fd() as u32, segment.size));
            files.files.push(file);
        }
        Ok((Handle::Files(numbers), files))
    }

    /// A descriptor of the VMM handle behind an address.
    fn export_file(&self, addr: u64) -> Result<OwnedFd> {
        let api = self.api();
        let (Some(retain), Some(properties), Some(release), Some(export)) = (
            api.mem_retain_allocation_handle,
            api.mem_get_allocation_properties,
            api.mem_release,
            api.mem_export,
        ) else {
            return Err(missing("cuMemExportToShareableHandle"));
        };
        let mut handle = CUmemHandle::NULL;
        // SAFETY: writes one handle; the address is looked up, not accessed.
        self.check("cuMemRetainAllocationHandle", unsafe { retain(&raw mut handle, addr as *mut c_void) })?;
        let mut made = sys::CUmemAllocationProp::default();
        // SAFETY: the handle was retained above; the struct has the layout of cuda.h.
        let rc = unsafe { properties(&raw mut made, handle) };
        let exported = self.check("cuMemGetAllocationPropertiesFromHandle", rc).and_then(|()| {
            if made.handle_types & sys::HANDLE_FILE == 0 {
                return Err(Error::not_supported(
                    "its VMM handles were not made to be exported as file descriptors (requestedHandleTypes)",
                ));
            }
            let mut fd: c_int = -1;
            // SAFETY: writes one int, as the type of the handle says.
            let rc = unsafe { export((&raw mut fd).cast(), handle, sys::HANDLE_FILE, 0) };
            self.check("cuMemExportToShareableHandle", rc)?;
            // SAFETY: the driver has just opened it for us, and nothing else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        // SAFETY: gives back what was retained above, once.
        let rc = unsafe { release(handle) };
        if let Err(why) = self.check("cuMemRelease", rc) {
            log::warn!("VRAM {addr:#x}: {why}");
        }
        exported
    }

    /// Whether kernels that run on the allocation's device may touch it. Not so where another process has exported it, or where
    /// the application has not given the device access to what it mapped: a kernel that touches it would end the context.
    pub fn kernels_reach(&self, allocation: &Allocation) -> bool {
        match allocation.kind {
            Kind::Device | Kind::Async => true,
            Kind::Vmm => allocation.segments.iter().all(|s| self.has_access(s.base, &allocation.device)),
            Kind::Imported | Kind::Managed | Kind::Host => false,
        }
    }

    fn has_access(&self, addr: u64, device: &super::Device) -> bool {
        let Some(get) = self.api().mem_get_access else { return false };
        let place = CUmemLocation { kind: sys::LOCATION_DEVICE, id: device.ordinal as c_int };
        let mut flags = 0;
        // SAFETY: writes one number and reads one struct; the address is looked up, not accessed.
        let rc = unsafe { get(&raw mut flags, &raw const place, addr) };
        rc == sys::SUCCESS && flags == u64::from(sys::ACCESS_READ_WRITE)
    }
}

/// Another process's memory, mapped for a context of this one. It stays, whatever becomes of the other process, until this is
/// dropped: so it is kept no longer than it must be.
pub struct Mapping {
    context: Context,
    there: u64,
    here: u64,
    size: u64,
    end: End,
}

/// How a mapping ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// By `cuIpcCloseMemHandle`.
    Close,
    /// Addresses were reserved, and so many bytes of them mapped.
    Unmap { mapped: u64 },
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x} of another process at {:#x}", self.there, self.size, self.here)
    }
}

impl Mapping {
    /// Maps what another process lends, for a context; `files` are the descriptors of [`Handle::Files`], in their order.
    ///
    /// The memory may be of a device that this process does not see (`CUDA_VISIBLE_DEVICES`): what is not possible, the driver
    /// refuses.
    pub fn open(context: &Context, what: &Shareable, files: Vec<OwnedFd>) -> Result<Self> {
        let wraps = what.size == 0 || what.base.checked_add(what.size).is_none();
        if wraps || what.base == 0 {
            return Err(Error::invalid(format!("{:#x}+{:#x} is no range of memory", what.base, what.size)));
        }
        let at =
            |e: Error| e.context(format_args!("mapping GPU memory of another process ({} bytes)", what.size));
        let opened = match &what.handle {
            Handle::Ipc(handle) => context.with(|| Self::open_ipc(context, what, handle)),
            Handle::Files(pieces) => context.with(|| Self::open_files(context, what, pieces, files)),
        };
        opened.and_then(|opened| opened).map_err(at)
    }

    fn open_ipc(context: &Context, what: &Shareable, handle: &[u8; HANDLE_BYTES]) -> Result<Self> {
        let api = context.cuda().api();
        let open = api.ipc_open_mem_handle.ok_or_else(|| missing("cuIpcOpenMemHandle"))?;
        api.ipc_close_mem_handle.ok_or_else(|| missing("cuIpcCloseMemHandle"))?;
        let mut here = 0;
        let handle = CUipcMemHandle { reserved: *handle };
        // SAFETY: writes one address; the driver checks the handle, which is bytes of its own making.
        let rc = unsafe { open(&raw mut here, handle, sys::IPC_ENABLE_PEER) };
        check(api, "cuIpcOpenMemHandle", rc)?;
        let mapping =
            Self { context: context.clone(), there: what.base, here, size: what.size, end: End::Close };
        // The other process says how long it is; who believed it would have the GPU run beyond the mapping.
        let (mut base, mut size) = (0, 0_usize);
        // SAFETY: writes an address and a length; the address is looked up, not accessed.
        let rc = unsafe { (api.mem_get_address_range)(&raw mut base, &raw mut size, here) };
        check(api, "cuMemGetAddressRange", rc)?;
        if here < base || here.saturating_add(what.size) > base.saturating_add(size as u64) {
            return Err(Error::invalid(format!(
                "it has {size} bytes from {base:#x} on, mapped at {here:#x}"
            )));
        }
        Ok(mapping)
    }

    fn open_files(
        context: &Context,
        what: &Shareable,
        pieces: &[(u32, u64)],
        files: Vec<OwnedFd>,
    ) -> Result<Self> {
        let total = pieces.iter().try_fold(0_u64, |sum, (_, size)| sum.checked_add(*size));
        if pieces.len() != files.len() || total != Some(what.size) {
            return Err(Error::invalid("its parts are not as many bytes as the whole"));
        }
        let api = context.cuda().api();
        let (Some(reserve), Some(import), Some(map), Some(release), Some(set_access), Some(_), Some(_)) = (
            api.mem_address_reserve,
            api.mem_import,
            api.mem_map,
            api.mem_release,
            api.mem_set_access,
            api.mem_unmap,
            api.mem_address_free,
        ) else {
            return Err(missing("cuMemImportFromShareableHandle"));
        };
        let mut here = 0;
        // SAFETY: writes one address.
        check(api, "cuMemAddressReserve", unsafe { reserve(&raw mut here, what.size as usize, 0, 0, 0) })?;
        let end = End::Unmap { mapped: 0 };
        let mut mapping = Self { context: context.clone(), there: what.base, here, size: what.size, end };
        let mut mapped = 0;
        for ((_, size), file) in pieces.iter().zip(files) {
            let mut handle = CUmemHandle::NULL;
            // SAFETY: writes one handle. For this type the driver takes the descriptor's number as a pointer; it is ours and open.
            let rc = unsafe {
                import(&raw mut handle, file.as_raw_fd() as usize as *mut c_void, sys::HANDLE_FILE)
            };
            check(api, "cuMemImportFromShareableHandle", rc)?;
            // SAFETY: the addresses were reserved above and nothing is mapped there yet; the driver refuses more bytes than the
            // handle has.
            let rc = unsafe { map(here + mapped, *size as usize, 0, handle, 0) };
            // SAFETY: gives up the handle that was imported; what is mapped keeps the memory.
            let released = unsafe { release(handle) };
            check(api, "cuMemMap", rc)?;
            mapped += size;
            mapping.end = End::Unmap { mapped };
            check(api, "cuMemRelease", released)?;
        }
        let location = CUmemLocation { kind: sys::LOCATION_DEVICE, id: context.device().ordinal as c_int };
        let access = CUmemAccessDesc { location, flags: sys::ACCESS_READ_WRITE };
        // SAFETY: reads one struct; all of the range was mapped above.
        let rc = unsafe { set_access(here, what.size as usize, &raw const access, 1) };
        check(api, "cuMemSetAccess", rc)?;
        Ok(mapping)
    }

    /// The context for which it is mapped: copies run in it.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The `len` bytes that are at `addr` in the other process. `InvalidParam` if they are not all of this mapping. It stays while
    /// copies that name them are under way.
    pub fn span(self: &Arc<Self>, addr: u64, len: u64) -> Result<Span> {
        let offset = addr.checked_sub(self.there).filter(|offset| {
            let end = offset.checked_add(len);
            end.is_some_and(|end| end <= self.size)
        });
        let offset =
            offset.ok_or_else(|| Error::invalid(format!("{addr:#x}+{len:#x} is not in {self:?}")))?;
        Ok(Span::mapped(self, self.here + offset, len))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let api = self.context.cuda().api();
        let call = |call: &str, rc| check(api, call, rc);
        let closed = self.context.with(|| match self.end {
            End::Close => {
                let close = api.ipc_close_mem_handle.ok_or_else(|| missing("cuIpcCloseMemHandle"))?;
                // SAFETY: opened once, closed once: copies that name it keep it.
                call("cuIpcCloseMemHandle", unsafe { close(self.here) })
            }
            End::Unmap { mapped } => {
                let unmap = api.mem_unmap.ok_or_else(|| missing("cuMemUnmap"))?;
                let free = api.mem_address_free.ok_or_else(|| missing("cuMemAddressFree"))?;
                if mapped > 0 {
                    // SAFETY: all that was mapped, once; copies that name it keep it.
                    call("cuMemUnmap", unsafe { unmap(self.here, mapped as usize) })?;
                }
                // SAFETY: all that was reserved, once, with nothing mapped in it any more.
                call("cuMemAddressFree", unsafe { free(self.here, self.size as usize) })
            }
        });
        if let Err(why) = closed.and_then(|closed| closed) {
            log::debug!("unmapping {self:?}: {why}");
        }
    }
}

fn missing(call: &str) -> Error {
    Error::not_supported(format!("the driver library has no {call}"))
}
