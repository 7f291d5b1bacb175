//! Limits on open files.

/// Most descriptors that this process may have open now (`RLIMIT_NOFILE`, getrlimit(2)).
pub fn open_files_max() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one struct, which lives across the call.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if rc < 0 { 0 } else { usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX) }
}
