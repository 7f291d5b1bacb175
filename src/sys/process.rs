//! Other processes of this host: which one, whether it lives, and its memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

/// Ranges of one side that a call of [`Process::write`] or [`Process::read`] takes: `IOV_MAX`, `process_vm_readv(2)`.
pub const RANGES_MAX: usize = 1024;

/// A number that is another one after each boot of this host (`random/boot_id`, `proc_sys_kernel(5)`).
pub fn boot_id() -> io::Result<[u8; 16]> {
    read_uuid("/proc/sys/kernel/random/boot_id")
}

/// Random bytes, another time others (`random/uuid`, `proc_sys_kernel(5)`).
pub fn random_id() -> io::Result<[u8; 16]> {
    read_uuid("/proc/sys/kernel/random/uuid")
}

fn read_uuid(path: &str) -> io::Result<[u8; 16]> {
    let text = fs::read_to_string(path)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32);
    number.map(u128::to_be_bytes).ok_or_else(|| unreadable(path))
}

/// The namespace in which the numbers of processes count for this one (`pid_namespaces(7)`).
pub fn pid_namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/pid")?.ino())
}

/// When a process began, in clock ticks since the boot (`/proc/<pid>/stat`, `proc_pid_stat(5)`).
pub fn start_time(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path)?;
    // The second field is a name in parentheses, which may hold anything; what is wanted is the 22nd.
    let behind_name = text.rsplit_once(')').map(|(_, rest)| rest);
    let field = behind_name.and_then(|rest| rest.split_ascii_whitespace().nth(19));
    field.and_then(|field| field.parse().ok()).ok_or_else(|| unreadable(&path))
}

/// The effective user of a process (`/proc/<pid>/status`, `proc_pid_status(5)`), as this process' user namespace numbers it.
pub fn user(pid: u32) -> io::Result<u32> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"));
    let field = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    field.and_then(|field| field.parse().ok()).ok_or_else(|| unreadable(&path))
}

/// Lets any process of this user reach this one's memory where Yama's `ptrace_scope` is 1 (`PR_SET_PTRACER_ANY`, prctl(2)).
pub fn allow_any_tracer() -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    let rc = unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn unreadable(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not as expected"))
}

/// A range of memory of this process or another: address and length in bytes.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Range(libc::iovec);

impl Range {
    /// The `len` bytes at `addr`.
    pub fn new(addr: u64, len: u64) -> Self {
        Self(libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len as usize })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.0.iov_len as u64
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// What is behind its first `len` bytes.
    #[must_use]
    pub fn behind(&self, len: u64) -> Self {
        Self::new(self.0.iov_base as u64 + len, self.len() - len)
    }
}

/// A process of this host: never one that has its number after it.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    handle: OwnedFd,
}

impl Process {
    /// The process with this number that began then. `NotFound` if it has ended.
    pub fn open(pid: u32, began: u64) -> io::Result<Self> {
        // SAFETY: takes numbers only (pidfd_open(2), Linux 5.3); the result is checked before it is owned.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let e = io::Error::last_os_error();
            return Err(if e.raw_os_error() == Some(libc::ESRCH) { gone() } else { e });
        }
        // SAFETY: `fd` was just opened, close-on-exec, and nothing else owns it.
        let handle = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let process = Self { pid, handle };
        // Looked at through its number, which is its own for as long as it has not ended.
        let now = start_time(pid).map_err(|e| if process.has_ended() { gone() } else { e })?;
        if now != began || process.has_ended() { Err(gone()) } else { Ok(process) }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended: all of its threads have left the kernel.
    pub fn has_ended(&self) -> bool {
        let mut set = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer describes a local that lives across the call, which does not wait.
        let ready = unsafe { libc::poll(&raw mut set, 1, 0) };
        ready > 0 && set.revents & (libc::POLLIN | libc::POLLHUP) != 0
    }

    /// Opens the file that the process has open as descriptor `fd`, which must be one that opening does nothing to.
    pub fn open_file(&self, fd: u32) -> io::Result<OwnedFd> {
        let path = PathBuf::from(format!("/proc/{}/fd/{fd}", self.pid));
        if !fs::metadata(&path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no plain file"));
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file: File = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        Ok(file.into())
    }

    /// A descriptor of our own for what the process has open as descriptor `fd` (`pidfd_getfd(2)`, Linux 5.6).
    pub fn take_file(&self, fd: u32) -> io::Result<OwnedFd> {
        // SAFETY: takes numbers only; the result is checked before it is owned.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.handle.as_raw_fd(), fd, 0) };
        if taken < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just opened, close-on-exec, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(taken as i32) })
    }

    /// Bytes of its memory.
    pub fn read_bytes<const N: usize>(&self, addr: u64) -> io::Result<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        let here = Range::new(bytes.as_mut_ptr() as u64, N as u64);
        // SAFETY: the local range is `bytes`, which nobody else uses.
        let copied = unsafe { self.read(&[here], &[Range::new(addr, N as u64)]) }?;
        if copied != N as u64 {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        // SAFETY: the kernel has written all of it.
        Ok(unsafe { bytes.assume_init() })
    }

    /// Copies from its memory into ours; returns how many bytes, in the order of the ranges. All have arrived when it returns. At
    /// most [`RANGES_MAX`] of each side. `NotFound` if it has ended, `PermissionDenied` if the kernel allows it to nobody or
    /// not to us, EFAULT if nothing could be copied because memory is not mapped.
    ///
    /// # Safety
    /// The local ranges must be memory that may be written, and that nothing in this process relies on meanwhile.
    pub unsafe fn read(&self, here: &[Range], there: &[Range]) -> io::Result<u64> {
        // SAFETY: what the call writes here is the caller's promise.
        unsafe { self.copy(libc::process_vm_readv, here, there) }
    }

    /// Copies from our memory into its; else as [`read`](Self::read).
    ///
    /// # Safety
    /// The local ranges must be memory that may be read.
    pub unsafe fn write(&self, here: &[Range], there: &[Range]) -> io::Result<u64> {
        // SAFETY: the call only reads memory of this process, which the caller says it may.
        unsafe { self.copy(libc::process_vm_writev, here, there) }
    }

    /// # Safety
    /// `call` must be one of the two, and the local ranges as it wants them.
    unsafe fn copy(&self, call: CopyCall, here: &[Range], there: &[Range]) -> io::Result<u64> {
        let (here_count, there_count) = (here.len() as libc::c_ulong, there.len() as libc::c_ulong);
        // SAFETY: both pointers and counts describe slices of `iovec`s, which `Range` is in memory, that live across the call. The
        // remote side is checked by the kernel; the local one is the caller's promise.
        let copied = unsafe {
            call(
                self.pid as libc::pid_t,
                here.as_ptr().cast(),
                here_count,
                there.as_ptr().cast(),
                there_count,
                0,
            )
        };
        u64::try_from(copied).map_err(|_| {
            let e = io::Error::last_os_error();
            if e.raw_os_error() == Some(libc::ESRCH) { gone() } else { e }
        })
    }
}

/// `process_vm_readv(2)` or `process_vm_writev(2)`.
type CopyCall = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> isize;

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process has ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_others_and_its_end_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let began = start_time(child.id()).unwrap();
        let process = Process::open(child.id(), began).unwrap();
        assert!(!process.has_ended());
        assert_eq!(Process::open(child.id(), began + 1).unwrap_err().kind(), io::ErrorKind::NotFound);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.has_ended());
        assert_eq!(process.read_bytes::<1>(4096).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(Process::open(child.id(), began).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_file_of_a_process_is_taken() {
        let pid = std::process::id();
        let own = Process::open(pid, start_time(pid).unwrap()).unwrap();
        let file = crate::sys::memfd::named("to be taken").unwrap();
        let taken = own.take_file(file.as_raw_fd() as u32).unwrap();
        let facts = |file: OwnedFd| File::from(file).metadata().unwrap().ino();
        assert_eq!(facts(taken), facts(file));
        assert_eq!(own.take_file(1 << 30).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn bytes_are_read_and_none_where_nothing_is_mapped() {
        let pid = std::process::id();
        let own = Process::open(pid, start_time(pid).unwrap()).unwrap();
        let bytes = *b"some bytes of ours";
        assert_eq!(own.read_bytes(bytes.as_ptr() as u64).unwrap(), bytes);
        assert_eq!(own.read_bytes::<8>(8).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn identities_differ_where_they_should() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert_ne!(random_id().unwrap(), random_id().unwrap());
        assert_ne!(pid_namespace().unwrap(), 0);
    }
}
