//! Memory files without a place in any folder: their names are seen in `/proc/<pid>/fd`, and end with the process.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// An empty memory file of this name (`memfd_create(2)`), which no program that is started inherits.
pub fn named(name: &str) -> io::Result<OwnedFd> {
    create(name, libc::MFD_CLOEXEC)
}

fn create(name: &str, flags: libc::c_uint) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that lives across the call; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What keeps a mapping of a file whole, whatever others do who have the file: its size stays.
const SIZE_STAYS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// Words that processes share: a memory file of a size that nobody can change, mapped. They are atomics because anybody who has
/// the file may write them at any time, whatever they please.
#[derive(Debug)]
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: it owns a mapping that is not bound to a thread, and gives out nothing but atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// A new file with so many words, all 0, and a mapping of it. Their memory is taken now, so that none is missing later.
    pub fn create(name: &str, len: usize) -> io::Result<(OwnedFd, Self)> {
        let fd = create(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)?;
        let raw = fd.as_raw_fd();
        // SAFETY: the descriptor is ours; no pointers are passed.
        let sealed = unsafe {
            libc::ftruncate(raw, (len * size_of::<u64>()) as libc::off_t) == 0
                && libc::fallocate(raw, 0, 0, (len * size_of::<u64>()) as libc::off_t) == 0
                && libc::fcntl(raw, libc::F_ADD_SEALS, SIZE_STAYS | libc::F_SEAL_SEAL) == 0
        };
        if !sealed {
            return Err(io::Error::last_os_error());
        }
        let words = Self::map(&fd, len)?;
        Ok((fd, words))
    }

    /// A mapping of a file that [`create`](Self::create) made, here or in another process. Anything else is refused: a file that
    /// can shrink would end whoever looks at it behind its end (SIGBUS).
    pub fn map(fd: &OwnedFd, len: usize) -> io::Result<Self> {
        let bytes = len * size_of::<u64>();
        // SAFETY: asks a number of the descriptor, which is borrowed for the call.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & SIZE_STAYS != SIZE_STAYS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no memory file of a fixed size"));
        }
        let size = File::from(fd.try_clone()?).metadata()?.len();
        if size != bytes as u64 {
            let what = format!("it has {size} bytes, not {bytes}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let base = unsafe {
            let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), bytes, access, shared, fd.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("it is mapped at 0"))?;
        Ok(Self { base, len })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `len` words, aligned to a page, until `self` is dropped; the file cannot shrink below it.
        // Whoever writes them, here or in another process, finds atomics here, and every value of a word is valid.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made with this size, and every reference to it borrows `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_are_shared_and_their_file_keeps_its_size() {
        let (fd, words) = SharedWords::create("words", 100).unwrap();
        let again = SharedWords::map(&fd, 100).unwrap();
        words[99].store(7, Ordering::Relaxed);
        assert_eq!((again.len(), again[99].load(Ordering::Relaxed)), (100, 7));
        assert!(File::from(fd.try_clone().unwrap()).set_len(8).is_err(), "it shrinks under its readers");
        assert!(SharedWords::map(&fd, 101).is_err(), "longer than the file");
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let plain = named("plain").unwrap();
        File::from(plain.try_clone().unwrap()).set_len(800).unwrap();
        assert!(SharedWords::map(&plain, 100).is_err());
        let other = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(SharedWords::map(&other, 100).is_err());
    }
}
