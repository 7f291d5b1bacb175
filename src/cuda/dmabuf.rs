//! Export of GPU memory as dmabuf file descriptors, for `FI_MR_DMABUF`.

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};

use super::context::with_context;
use super::{Allocation, Cuda, Segment};
use crate::error::{Error, Result};
use crate::sys::cuda as sys;
use crate::sys::page::page_bytes;

/// A range to export: what is asked of the driver, and where the range lies in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// First address of the range.
    pub addr: u64,
    /// Length of the range in bytes.
    pub len: u64,
    /// First address exported: `addr` rounded down to a page.
    pub base: u64,
    /// Bytes exported: whole pages.
    pub size: u64,
}

impl Export {
    /// The pages that hold `len` bytes at `addr`. The driver asks for alignment to the host's page (cuda.h,
    /// `cuMemGetHandleForAddressRange`), `page_bytes`, a power of two.
    fn pages(addr: u64, len: u64, page_bytes: u64) -> Result<Self> {
        let wraps = || Error::invalid(format!("{addr:#x}+{len:#x} is empty or wraps"));
        let end = addr.checked_add(len).filter(|end| *end > addr).ok_or_else(wraps)?;
        let base = addr & !(page_bytes - 1);
        let end = end.checked_next_multiple_of(page_bytes).ok_or_else(wraps)?;
        Ok(Self { addr, len, base, size: end - base })
    }

    /// Offset in bytes of the range within what is exported.
    pub fn offset(&self) -> u64 {
        self.addr - self.base
    }
}

/// Splits a range where one driver handle ends and the next begins: one export, and so one registration, for each.
///
/// `segments` are the handles behind the range, in order and without gaps, as in [`Allocation::segments`].
pub fn plan_exports(addr: u64, len: u64, segments: &[Segment], page_bytes: u64) -> Result<Vec<Export>> {
    let whole = Export::pages(addr, len, page_bytes)?;
    let end = addr + len;
    if segments.len() == 1 && segments[0].base <= addr && end <= segments[0].end() {
        // Within one handle the pages may reach beyond the range, and even beyond a small cuMemAlloc: it is aligned to
        // 256 bytes, but cut from device pages that are larger than the host's.
        return Ok(vec![whole]);
    }
    let mut exports = Vec::with_capacity(segments.len());
    let mut at = addr;
    for segment in segments.iter().filter(|s| s.end() > addr && s.base < end) {
        if segment.base > at || segment.end() <= at {
            return Err(Error::invalid(format!("no handle backs {at:#x}")));
        }
        let stop = segment.end().min(end);
        let export = Export::pages(at, stop - at, page_bytes)?;
        if export.base < segment.base || export.base + export.size > segment.end() {
            return Err(Error::not_supported(format!(
                "the handle at {:#x}+{:#x} does not begin and end at pages of {page_bytes} bytes",
                segment.base, segment.size
            )));
        }
        exports.push(export);
        at = stop;
    }
    if at < end {
        return Err(Error::invalid(format!("no handle backs {at:#x}")));
    }
    Ok(exports)
}

/// A range exported as a file descriptor, which is closed when this is dropped.
#[derive(Debug)]
pub struct DmaBuf {
    /// The dmabuf.
    pub fd: OwnedFd,
    /// Offset in bytes of the range within the dmabuf.
    pub offset: u64,
    /// First address of the range.
    pub addr: u64,
    /// Length of the range in bytes.
    pub len: u64,
}

impl Cuda {
    /// Exports the `len` bytes at `addr`, which lie in `allocation`.
    ///
    /// One dmabuf where the driver gives one: it does so across the handles of VMM memory that have the same properties.
    /// Else one for each handle, in order; each then needs a registration of its own.
    pub fn export(&self, allocation: &Allocation, addr: u64, len: u64) -> Result<Vec<DmaBuf>> {
        let at =
            |e: Error| e.context(format!("dmabuf of VRAM {addr:#x}+{len:#x} on {}", allocation.device.pci));
        if !allocation.dmabuf_supported {
            let what = format!("the driver cannot export {} of this device", allocation.kind);
            return Err(at(Error::not_supported(what)));
        }
        let inside = addr >= allocation.base
            && addr.checked_add(len).is_some_and(|end| end - allocation.base <= allocation.size);
        if !inside {
            return Err(at(Error::invalid("the range leaves its allocation")));
        }
        let page_bytes = page_bytes();
        with_context(self, allocation.context.as_ref(), || {
            let whole = Export::pages(addr, len, page_bytes).and_then(|whole| self.export_one(&whole));
            match whole {
                Ok(dmabuf) => Ok(vec![dmabuf]),
                Err(why) if allocation.segments.len() < 2 => Err(why),
                Err(why) => {
                    log::debug!("VRAM {addr:#x}+{len:#x}: no single dmabuf ({why}); one for each VMM handle");
                    let plan = plan_exports(addr, len, &allocation.segments, page_bytes)?;
                    plan.iter().map(|export| self.export_one(export)).collect()
                }
            }
        })
        .and_then(|exported| exported)
        .map_err(at)
    }

    fn export_one(&self, export: &Export) -> Result<DmaBuf> {
        let Some(export_range) = self.api().mem_get_handle_for_address_range else {
            return Err(Error::not_supported("the driver is older than CUDA 11.7"));
        };
        let mut fd: c_int = -1;
        let mut ask = |flags| {
            // SAFETY: for this handle type the driver writes one int; the range is looked up, not accessed.
            unsafe {
                export_range(
                    (&raw mut fd).cast(),
                    export.base,
                    export.size as usize,
                    sys::RANGE_HANDLE_DMA_BUF_FD,
                    flags,
                )
            }
        };
        // A NIC is a PCIe device, so the PCIe mapping is the right one where there is a choice; older drivers
        // and machines without the choice refuse the flag.
        let mut rc = ask(u64::from(sys::RANGE_FLAG_PCIE));
        if rc == sys::ERROR_INVALID_VALUE || rc == sys::ERROR_NOT_SUPPORTED {
            rc = ask(0);
        }
        self.check("cuMemGetHandleForAddressRange", rc)?;
        if fd < 0 {
            return Err(Error::backend("cuMemGetHandleForAddressRange succeeded without a file descriptor"));
        }
        // SAFETY: the driver made the descriptor for us; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf { fd, offset: export.offset(), addr: export.addr, len: export.len })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;
    const BASE: u64 = 0x7f00_0000_0000;

    fn laid_out(pages: &[u64]) -> Vec<Segment> {
        let mut base = BASE;
        let segment = |pages: &u64| {
            let segment = Segment { base, size: pages * PAGE };
            base = segment.end();
            segment
        };
        pages.iter().map(segment).collect()
    }

    proptest! {
        #[test]
        fn exports_cover_the_range_once_and_stay_in_their_handles(
            pages in prop::collection::vec(1_u64..64, 1..12),
            from in 0_u64..1 << 20,
            len in 1_u64..1 << 20,
        ) {
            let segments = laid_out(&pages);
            let total = pages.iter().sum::<u64>() * PAGE;
            let (addr, len) = (BASE + from % total, len.min(total - from % total));
            let exports = plan_exports(addr, len, &segments, PAGE).unwrap();
            let mut at = addr;
            for export in &exports {
                prop_assert_eq!(export.addr, at);
                prop_assert_eq!(export.base % PAGE, 0);
                prop_assert_eq!(export.size % PAGE, 0);
                prop_assert!(export.offset() < PAGE && export.offset() + export.len <= export.size);
                let home = segments.iter().filter(|s| s.base <= export.base && export.base + export.size <= s.end());
                prop_assert_eq!(home.count(), 1);
                at += export.len;
            }
            prop_assert_eq!(at, addr + len);
        }

        #[test]
        fn a_range_that_is_not_backed_is_refused(
            pages in prop::collection::vec(1_u64..8, 1..5),
            before in 0_u64..4,
            after in 0_u64..4,
        ) {
            prop_assume!(before + after > 0);
            let segments = laid_out(&pages);
            let len = (pages.iter().sum::<u64>() + before + after) * PAGE;
            prop_assert!(plan_exports(BASE - before * PAGE, len, &segments, PAGE).is_err());
        }
    }

    #[test]
    fn a_small_allocation_is_exported_by_the_page_around_it() {
        let segments = [Segment { base: BASE + 512, size: 512 }];
        let exports = plan_exports(BASE + 600, 100, &segments, PAGE).unwrap();
        assert_eq!(exports, [Export { addr: BASE + 600, len: 100, base: BASE, size: PAGE }]);
        assert_eq!(exports[0].offset(), 600);
    }

    #[test]
    fn a_hole_between_handles_is_refused() {
        let mut segments = laid_out(&[2, 2, 2]);
        segments.remove(1);
        assert!(plan_exports(BASE, 6 * PAGE, &segments, PAGE).is_err());
    }

    #[test]
    fn handles_that_share_a_page_are_refused() {
        let segments = [Segment { base: BASE, size: 6000 }, Segment { base: BASE + 6000, size: 6000 }];
        assert!(plan_exports(BASE, 12000, &segments, PAGE).is_err());
    }

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        for (addr, len) in [(BASE, 0), (u64::MAX - 10, 100), (u64::MAX - 10, 5)] {
            assert!(plan_exports(addr, len, &[], PAGE).is_err(), "{addr:#x}+{len:#x}");
        }
    }
}
