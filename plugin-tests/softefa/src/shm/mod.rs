//! What processes share: files in the network's directory, mapped by whoever needs them.
//!
//! A file full of zeros is a valid empty one, so creating needs no lock and two creators do not disturb each other.
//! All shared words are atomics; there are no locks, so a process that dies leaves none behind. Every word that
//! another process can write is checked before it is used as an index.

pub mod channel;
pub mod device;
pub mod mailbox;
pub mod process;

use std::fs::OpenOptions;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// A type that may lie in shared memory.
///
/// # Safety
/// All bit patterns must be valid, zero must mean empty, and every field must be an atomic or inside an `UnsafeCell`
/// whose users agree on who writes when.
pub unsafe trait Shared {}

/// A shared file, mapped for as long as this lives.
#[derive(Debug)]
pub struct Mapping<T: Shared> {
    at: NonNull<T>,
    path: PathBuf,
    marker: PhantomData<T>,
}

// SAFETY: `T: Shared` is made of atomics and cells with their own protocol, so sharing it between threads is no more
// than sharing it between processes, which is what it is for.
unsafe impl<T: Shared> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for Mapping<T> {}

impl<T: Shared> Mapping<T> {
    /// Maps the file, making it if it is not there.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::map(path, true)
    }

    /// Maps the file if it is there and whole.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::map(path, false)
    }

    fn map(path: &Path, create: bool) -> io::Result<Self> {
        let size = size_of::<T>();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .mode(0o666)
            .open(path)?;
        if file.metadata()?.len() < size as u64 {
            if !create {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            file.set_len(size as u64)?;
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the length is the type's and the file has it.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, path: path.to_owned(), marker: PhantomData })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl<T: Shared> std::ops::Deref for Mapping<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is page aligned, has the size of `T` and lives as long as `self`; `Shared` promises
        // that any content is valid and that what others change lies in atomics or cells.
        unsafe { self.at.as_ref() }
    }
}

impl<T: Shared> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and references into it cannot outlive `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), size_of::<T>()) };
    }
}
