//! What CUDA knows of an address: device, kind of allocation, extent.

use std::ffi::{c_uint, c_void};
use std::fmt;

use super::context::{Relaxed, with_context};
use super::{Context, Cuda, Device};
use crate::error::{Error, Result};
use crate::sys::cuda::{self as sys, CUcontext, CUmemAllocationProp, CUmemHandle};

/// Most VMM handles that one range may span: 256 GiB of `PyTorch`'s 2 MiB expandable segments.
pub const SEGMENTS_MAX: usize = 1 << 17;

/// How memory was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `cuMemAlloc`, `cudaMalloc`.
    Device,
    /// Like [`Kind::Device`], but CUDA will not export it by its older IPC calls: memory that another process exported
    /// to this one. A hint alone (a platform without IPC shows the same); it is treated as device memory. Driver 580 shows
    /// such memory as [`Kind::Vmm`] that was not made for GPU Direct RDMA, and exports no dmabuf of it.
    Imported,
    /// From a memory pool: `cuMemAllocAsync`, `cudaMallocAsync`. Has no context.
    Async,
    /// Mapped by `cuMemMap`: `cuMemCreate`, `PyTorch`'s expandable segments. Has no context, and may span several handles.
    Vmm,
    /// `cuMemAllocManaged`: moves between host and device. A NIC cannot use it as VRAM.
    Managed,
    /// Host memory that CUDA knows: `cuMemHostAlloc`, `cuMemHostRegister`, or VMM on a host node. It is not VRAM.
    Host,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device memory",
            Self::Imported => "device memory of another process",
            Self::Async => "stream-ordered device memory",
            Self::Vmm => "virtual-memory-managed device memory",
            Self::Managed => "managed memory",
            Self::Host => "page-locked host memory",
        })
    }
}

/// A piece of an allocation that one driver handle backs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Segment {
    /// The address behind the last byte.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// An allocation around a range of addresses, as [`Cuda::inspect`] found it.
#[derive(Debug, Clone)]
pub struct Allocation {
    /// Device that holds the memory.
    pub device: Device,
    /// How it was allocated.
    pub kind: Kind,
    /// Context to work in; none where the memory has none and the device's primary context is not active.
    pub context: Option<Context>,
    /// First address of what backs the range. For VMM memory, of the first segment that the range touches.
    pub base: u64,
    /// Bytes from `base` to the end of what backs the range.
    pub size: u64,
    /// The driver handles behind the range, in order, without gaps. One, except for VMM memory.
    pub segments: Vec<Segment>,
    /// Whether device and driver can export it as dmabuf.
    pub dmabuf_supported: bool,
    /// Whether GPU Direct RDMA takes it, as far as the driver says.
    pub gdr_supported: bool,
}

impl Allocation {
    /// Refuses, in words, the kinds that cannot be registered as VRAM.
    pub fn require_vram(&self) -> Result<()> {
        let advice = match self.kind {
            Kind::Device | Kind::Imported | Kind::Async | Kind::Vmm => return Ok(()),
            Kind::Managed => {
                "the driver moves it between host and device under a NIC; allocate with cudaMalloc"
            }
            Kind::Host => "register it as DRAM_SEG",
        };
        Err(Error::not_supported(format!("{:#x} is {}, not VRAM: {advice}", self.base, self.kind)))
    }

    /// Runs `work` with the allocation's context current, or, if it has none, in whatever is current.
    ///
    /// For registrations: a provider's CUDA calls find a context of the right device, and the caller's stays as it was.
    pub fn with_context<R>(&self, cuda: &Cuda, work: impl FnOnce() -> R) -> Result<R> {
        with_context(cuda, self.context.as_ref(), work)
    }
}

/// The attributes of a pointer that the driver returns in one call.
struct Basics {
    context: CUcontext,
    memory_type: c_uint,
    managed: bool,
    ordinal: i32,
}

impl Cuda {
    /// Finds the allocation that holds the `len` bytes at `addr`.
    ///
    /// Errors: `NotFound` where CUDA does not know the address or part of the range is not backed, `InvalidParam` for
    /// an empty or overflowing range, a range that leaves its allocation or spans devices.
    pub fn inspect(&self, addr: u64, len: u64) -> Result<Allocation> {
        let at = |e: Error| e.context(format!("VRAM {addr:#x}+{len:#x}"));
        let end = addr.checked_add(len).filter(|end| *end > addr);
        let end = end.ok_or_else(|| at(Error::invalid("the range is empty or wraps")))?;
        let _relaxed = Relaxed::enter(self.api());
        self.inspect_range(addr, end).map_err(at)
    }

    fn inspect_range(&self, addr: u64, end: u64) -> Result<Allocation> {
        let basics = self.basics(addr)?;
        if basics.memory_type == 0 {
            let advice = "CUDA does not know the address: it is ordinary host memory, or was freed";
            return Err(Error::not_found(advice));
        }
        let ordinal = u32::try_from(basics.ordinal);
        let ordinal = ordinal
            .map_err(|_| Error::not_supported("the memory belongs to no GPU; register it as DRAM_SEG"))?;
        let device = self.device(ordinal)?.clone();
        let (kind, vmm_gdr) = self.kind(addr, &basics);
        let context = self.context_of(&device, basics.context)?;
        let segments = if matches!(kind, Kind::Managed | Kind::Host) {
            vec![Segment { base: addr, size: end - addr }]
        } else {
            with_context(self, context.as_ref(), || self.segments(addr, end, kind, ordinal))??
        };
        let base = segments.first().map_or(addr, |s| s.base);
        let size = segments.last().map_or(end, Segment::end) - base;
        let is_vram = !matches!(kind, Kind::Managed | Kind::Host);
        let gdr = self.attribute(addr, sys::POINTER_IS_GDR_CAPABLE).is_none_or(|v| v != 0);
        Ok(Allocation {
            dmabuf_supported: device.dmabuf && is_vram,
            gdr_supported: device.gdr && gdr && vmm_gdr && is_vram,
            device,
            kind,
            context,
            base,
            size,
            segments,
        })
    }

    /// One call for what every driver knows; it returns zeroes, not an error, for an address that is not CUDA's.
    fn basics(&self, addr: u64) -> Result<Basics> {
        const ASKED: [c_uint; 4] = [
            sys::POINTER_CONTEXT,
            sys::POINTER_MEMORY_TYPE,
            sys::POINTER_IS_MANAGED,
            sys::POINTER_DEVICE_ORDINAL,
        ];
        let mut asked = ASKED;
        // The driver writes 1, 4 or 8 bytes into each: zeroed words hold any of them on a little-endian machine.
        let mut values = [0_u64; ASKED.len()];
        let mut slots: [*mut c_void; ASKED.len()] = std::array::from_fn(|_| std::ptr::null_mut());
        for (slot, value) in slots.iter_mut().zip(&mut values) {
            *slot = (&raw mut *value).cast();
        }
        // SAFETY: both arrays hold as many entries as the count says; each slot points to 8 bytes, the largest of these
        // attributes. The address is looked up, not accessed.
        self.check("cuPointerGetAttributes", unsafe {
            (self.api().pointer_get_attributes)(
                ASKED.len() as c_uint,
                asked.as_mut_ptr(),
                slots.as_mut_ptr(),
                addr,
            )
        })?;
        let [context, memory_type, managed, ordinal] = values;
        Ok(Basics {
            context: CUcontext(context as usize),
            memory_type: memory_type as c_uint,
            managed: managed != 0,
            ordinal: ordinal as i32,
        })
    }

    /// One attribute of at most 8 bytes; none where the driver does not know it, or not for this memory.
    fn attribute(&self, addr: u64, attribute: c_uint) -> Option<u64> {
        let mut value = 0_u64;
        // SAFETY: the attributes asked for take at most the 8 bytes given; the address is looked up, not accessed.
        let rc = unsafe { (self.api().pointer_get_attribute)((&raw mut value).cast(), attribute, addr) };
        (rc == sys::SUCCESS).then_some(value)
    }

    /// A number of the allocation that the process never gives to another one.
    pub(super) fn buffer_id(&self, addr: u64) -> Result<u64> {
        let id = self.attribute(addr, sys::POINTER_BUFFER_ID);
        id.ok_or_else(|| {
            Error::not_supported(format!("the driver has no number for the allocation at {addr:#x}"))
        })
    }

    /// The kind of allocation, and whether a VMM handle allows GPU Direct RDMA (true for the others).
    fn kind(&self, addr: u64, basics: &Basics) -> (Kind, bool) {
        if basics.managed {
            return (Kind::Managed, true);
        }
        if basics.memory_type != sys::MEMORYTYPE_DEVICE {
            return (Kind::Host, true);
        }
        // Only memory that belongs to no context is asked about further: the questions fail for other memory, and a
        // failed call is what an application's debugging tools report.
        if basics.context.is_null() {
            return self.kind_without_context(addr);
        }
        match self.attribute(addr, sys::POINTER_IS_LEGACY_IPC_CAPABLE) {
            Some(0) => (Kind::Imported, true),
            _ => (Kind::Device, true),
        }
    }

    fn kind_without_context(&self, addr: u64) -> (Kind, bool) {
        if self.attribute(addr, sys::POINTER_MEMPOOL_HANDLE).is_some_and(|pool| pool != 0) {
            return (Kind::Async, true);
        }
        match self.vmm_properties(addr) {
            Some(made) if made.location_type == sys::LOCATION_DEVICE => (Kind::Vmm, made.gdr_capable != 0),
            Some(_) => (Kind::Host, true),
            // A driver that can neither name the pool nor the VMM handle. Walking the range is right for both.
            None => (Kind::Vmm, true),
        }
    }

    /// How the VMM handle behind an address was made; none if there is no such handle.
    fn vmm_properties(&self, addr: u64) -> Option<CUmemAllocationProp> {
        let api = self.api();
        let retain = api.mem_retain_allocation_handle?;
        let (properties, release) = (api.mem_get_allocation_properties?, api.mem_release?);
        let mut handle = CUmemHandle::NULL;
        // SAFETY: writes one handle; the address is looked up, not accessed.
        if unsafe { retain(&raw mut handle, addr as *mut c_void) } != sys::SUCCESS {
            return None;
        }
        // A handle exists, so it is VMM memory, whatever the next call says; on a device unless it says otherwise.
        let mut made = CUmemAllocationProp::default();
        // SAFETY: the handle was retained above; the struct has the layout of cuda.h and is large enough.
        if unsafe { properties(&raw mut made, handle) } != sys::SUCCESS {
            made = CUmemAllocationProp {
                location_type: sys::LOCATION_DEVICE,
                gdr_capable: 1,
                ..Default::default()
            };
        }
        // SAFETY: gives back what was retained above, once.
        let rc = unsafe { release(handle) };
        if let Err(why) = self.check("cuMemRelease", rc) {
            log::warn!("VRAM {addr:#x}: {why}");
        }
        Some(made)
    }

    /// Walks the driver's handles from `addr` to `end`. Runs in the allocation's context.
    fn segments(&self, addr: u64, end: u64, kind: Kind, ordinal: u32) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut at = addr;
        while at < end {
            if segments.len() == SEGMENTS_MAX {
                return Err(Error::invalid(format!("the range spans more than {SEGMENTS_MAX} VMM handles")));
            }
            let segment = self.segment(at)?;
            if segment.base > at || segment.end() <= at {
                return Err(Error::backend(format!(
                    "cuMemGetAddressRange: {at:#x} is not in what it returned"
                )));
            }
            if at > addr {
                self.require_device(at, ordinal)?;
            }
            at = segment.end();
            segments.push(segment);
            if at < end && kind != Kind::Vmm {
                return Err(Error::invalid(format!("the allocation ends at {at:#x}, before the range does")));
            }
        }
        Ok(segments)
    }

    /// Refuses a range that goes on in the memory of another device.
    fn require_device(&self, at: u64, ordinal: u32) -> Result<()> {
        match self.attribute(at, sys::POINTER_DEVICE_ORDINAL) {
            Some(found) if found as u32 != ordinal => Err(Error::invalid(format!(
                "from {at:#x} on the memory is on device {}, before that on {ordinal}: register the parts one by one",
                found as u32
            ))),
            _ => Ok(()),
        }
    }

    /// What backs one address: `cuMemGetAddressRange`, or without a current context the mapping attributes.
    fn segment(&self, addr: u64) -> Result<Segment> {
        let (mut base, mut size) = (0, 0_usize);
        // SAFETY: writes an address and a length; the address is looked up, not accessed.
        let rc = unsafe { (self.api().mem_get_address_range)(&raw mut base, &raw mut size, addr) };
        match rc {
            sys::SUCCESS => return Ok(Segment { base, size: size as u64 }),
            sys::ERROR_NOT_FOUND | sys::ERROR_INVALID_VALUE => {
                return Err(Error::not_found(format!("nothing is mapped at {addr:#x}")));
            }
            sys::ERROR_INVALID_CONTEXT => {}
            _ => return self.check("cuMemGetAddressRange", rc).map(|()| Segment { base, size: 0 }),
        }
        let mapping = self
            .attribute(addr, sys::POINTER_MAPPING_BASE)
            .zip(self.attribute(addr, sys::POINTER_MAPPING_SIZE));
        let (base, size) = mapping.filter(|(_, size)| *size > 0).ok_or_else(|| {
            Error::not_supported(
                "no CUDA context is active on the device, and the driver cannot tell the extent of the \
                                  allocation without one: use the device (cudaSetDevice) before registering",
            )
        })?;
        Ok(Segment { base, size })
    }

    /// Asks that synchronous copies on the allocation be complete when they return, as GPU Direct RDMA needs.
    /// False where the kind of memory has no such switch (VMM and stream-ordered memory): the application orders its
    /// work before it posts, as it must for kernels anyway.
    pub fn set_sync_memops(&self, allocation: &Allocation) -> Result<bool> {
        if !matches!(allocation.kind, Kind::Device | Kind::Imported) {
            return Ok(false);
        }
        let on: c_uint = 1;
        let rc = with_context(self, allocation.context.as_ref(), || {
            // SAFETY: reads one unsigned int; the address is looked up, not accessed.
            unsafe {
                (self.api().pointer_set_attribute)(
                    (&raw const on).cast(),
                    sys::POINTER_SYNC_MEMOPS,
                    allocation.base,
                )
            }
        })?;
        match rc {
            sys::ERROR_INVALID_VALUE | sys::ERROR_NOT_SUPPORTED => Ok(false),
            _ => self.check("cuPointerSetAttribute", rc).map(|()| true),
        }
    }
}
