//! The page, in which the kernel maps memory and NICs pin it: 4 KiB on x86-64, up to 64 KiB on arm64.

/// Size of a page, in bytes; a power of two.
pub fn page_bytes() -> u64 {
    // SAFETY: takes no pointers, reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}
