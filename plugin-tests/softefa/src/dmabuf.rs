//! What a kernel checks of a dmabuf before it lets a device have its pages.

use std::ffi::c_int;
use std::fs;

/// Granularity in which a device reaches memory.
const PAGE_BYTES: u64 = 4096;
/// `DMA_BUF_MAGIC` of linux/magic.h: the file system whose files dmabufs are.
const DMABUF_MAGIC: i64 = 0x444d_4142;
/// A memfd of this name stands for a dmabuf in tests without a GPU.
const STANDIN_NAME: &str = "/memfd:dmabuf";

/// Checks that `length` bytes at `offset` of `fd` can be registered at `iova`; the error is an `errno`, as of Linux'
/// `ib_umem_dmabuf_get` and `REG_DMABUF_MR`.
pub fn check(fd: c_int, offset: u64, length: u64, iova: u64) -> Result<(), c_int> {
    if length == 0 || offset % PAGE_BYTES != iova % PAGE_BYTES {
        return Err(libc::EINVAL);
    }
    if !is_dmabuf(fd)? {
        return Err(libc::EINVAL);
    }
    // SAFETY: takes no pointers. A dmabuf has no position that this could disturb.
    let size = unsafe { libc::lseek(fd, 0, libc::SEEK_END) };
    let size = u64::try_from(size).map_err(|_| libc::EINVAL)?;
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(libc::EINVAL),
    }
}

fn is_dmabuf(fd: c_int) -> Result<bool, c_int> {
    let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `about` has room for the answer.
    if unsafe { libc::fstatfs(fd, about.as_mut_ptr()) } != 0 {
        return Err(libc::EBADF);
    }
    // SAFETY: filled by the successful call.
    let kind = unsafe { about.assume_init() }.f_type;
    let standin = || {
        fs::read_link(format!("/proc/self/fd/{fd}"))
            .is_ok_and(|name| name.to_string_lossy().starts_with(STANDIN_NAME))
    };
    Ok(kind == DMABUF_MAGIC || standin())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use proptest::prelude::*;

    use super::*;

    fn memfd(name: &std::ffi::CStr, size: u64) -> OwnedFd {
        // SAFETY: a C string; the descriptor is new and this one's.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC)) };
        // SAFETY: takes no pointers.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) }, 0);
        fd
    }

    #[test]
    fn only_a_dmabuf_is_one() {
        let (dmabuf, other) = (memfd(c"dmabuf", PAGE_BYTES), memfd(c"other", PAGE_BYTES));
        assert_eq!(check(dmabuf.as_raw_fd(), 0, PAGE_BYTES, 0), Ok(()));
        assert_eq!(check(other.as_raw_fd(), 0, PAGE_BYTES, 0), Err(libc::EINVAL));
        let file = fs::File::open("/proc/self/exe").expect("this program");
        assert_eq!(check(file.as_raw_fd(), 0, PAGE_BYTES, 0), Err(libc::EINVAL));
        let closed = c_int::MAX;
        assert_eq!(check(closed, 0, PAGE_BYTES, 0), Err(libc::EBADF));
        assert_eq!(check(-1, 0, PAGE_BYTES, 0), Err(libc::EBADF));
    }

    proptest! {
        #[test]
        fn what_lies_inside_at_its_place_in_the_page_is_taken(
            pages in 0..4_u64, offset: u64, length: u64, near in any::<bool>(), skew in 0..2_u64,
        ) {
            let fd = memfd(c"dmabuf", pages * PAGE_BYTES);
            let (offset, length) = if near { (offset % 20_000, length % 20_000) } else { (offset, length) };
            let iova = (7 * PAGE_BYTES + offset % PAGE_BYTES) ^ skew;
            let inside = u128::from(offset) + u128::from(length) <= u128::from(pages * PAGE_BYTES);
            let good = skew == 0 && length > 0 && inside;
            let result = check(fd.as_raw_fd(), offset, length, iova);
            prop_assert_eq!(result, if good { Ok(()) } else { Err(libc::EINVAL) });
        }
    }
}
