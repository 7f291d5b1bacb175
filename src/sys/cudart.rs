//! The CUDA runtime library under the one name by which libfabric looks for it.
//!
//! libfabric opens `libcudart.so` (`cuda_hmem_dl_init`, 1.22 to 2.6), a name that comes with CUDA's development files.
//! Runtime images and Python wheels have `libcudart.so.12` or `.13` alone, and then its providers cannot take GPU memory.
//! The loader takes a library that is in the process for every name that it has, and its SONAME is one. So a library of
//! ours, without code and with that SONAME, is loaded, which needs the one that is there: symbols that are looked up in
//! it are found in what it needs. It lies in anonymous memory; nobody's files are touched.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;

use super::dl;

/// The name that libfabric opens.
const WANTED: &str = "libcudart.so";

/// Names under which the runtime library is installed, the newest first.
const VERSIONED: [&str; 3] = ["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"];

/// Whether libfabric finds the CUDA runtime library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cudart {
    /// As it looks for it.
    Found,
    /// Under this name, by a library of ours in between.
    Led(&'static str),
    /// It does not, for this reason.
    Missing(String),
}

impl Cudart {
    /// Sees to it that libfabric finds the library, where that can be. To be called before libfabric first looks, which
    /// is when it is first asked for devices; what it did not find then it will not look for again.
    pub fn provide() -> &'static Self {
        static ANSWER: OnceLock<Cudart> = OnceLock::new();
        ANSWER.get_or_init(|| lead(WANTED, &VERSIONED))
    }
}

/// Makes `wanted` lead to the first of `names` that is in the process, else to the first that can be loaded.
fn lead(wanted: &str, names: &[&'static str]) -> Cudart {
    let open = |name: &str, flags| dl::dlopen(OsStr::new(name), flags);
    if open(wanted, 0).is_ok() {
        return Cudart::Found;
    }
    let there = names.iter().find(|name| open(name, libc::RTLD_NOLOAD).is_ok());
    let Some(name) = there.or_else(|| names.iter().find(|name| open(name, 0).is_ok())) else {
        return Cudart::Missing(format!(
            "neither {wanted} nor {} is installed where it is looked for",
            names.join(", ")
        ));
    };
    match load(&library(wanted, name)).and_then(|()| open(wanted, libc::RTLD_NOLOAD)) {
        Ok(_) => Cudart::Led(name),
        Err(reason) => {
            Cudart::Missing(format!("{name} is there, but not under the name {wanted} ({reason})"))
        }
    }
}

/// Loads a library from its bytes, for good.
fn load(bytes: &[u8]) -> Result<(), String> {
    let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
    let name = CString::default();
    // SAFETY: the name is a C string; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(failed("memfd_create"));
    }
    // SAFETY: `fd` was just opened and nothing else owns it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(bytes).map_err(|e| format!("memfd: {e}"))?;
    dl::dlopen(OsStr::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), 0)?;
    // The loader keeps that path as the library's name: it stays true.
    let _ = file.into_raw_fd();
    Ok(())
}

/// A shared library (ELF, 64 bits) that has a name and needs another, and nothing else.
fn library(soname: &str, needed: &str) -> Vec<u8> {
    const EHDR: u64 = 64;
    const PHDR: u64 = 56;
    const SYMBOL: u64 = 24;
    const HEADERS: u64 = 3;
    const ENTRIES: u64 = 8;
    const DYNAMIC: u64 = EHDR + HEADERS * PHDR;
    const SYMBOLS: u64 = DYNAMIC + ENTRIES * 16;
    const HASH: u64 = SYMBOLS + SYMBOL;
    const STRINGS: u64 = HASH + 16;
    let (soname_at, needed_at) = (1, 2 + soname.len() as u64);
    let strings = format!("\0{soname}\0{needed}\0");
    let total = STRINGS + strings.len() as u64;
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };

    let mut out = Vec::with_capacity(total as usize);
    // Header: 64 bits, little endian, version 1; a shared object (3).
    out.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend([3_u16.to_le_bytes(), machine.to_le_bytes()].concat());
    out.extend(1_u32.to_le_bytes());
    out.extend([0, EHDR, 0].map(u64::to_le_bytes).concat());
    out.extend(0_u32.to_le_bytes());
    out.extend([EHDR as u16, PHDR as u16, HEADERS as u16, 64, 0, 0].map(u16::to_le_bytes).concat());
    // Segments: all of it (PT_LOAD, as large as the largest page), the dynamic section, and a stack that is not executable.
    // Readable and writable: loaders write addresses into the dynamic section.
    for (kind, at, len, align) in
        [(1_u32, 0, total, 0x10000), (2, DYNAMIC, ENTRIES * 16, 8), (0x6474_e551, 0, 0, 16)]
    {
        out.extend([kind, 6].map(u32::to_le_bytes).concat());
        out.extend([at, at, at, len, len, align].map(u64::to_le_bytes).concat());
    }
    // SONAME, NEEDED, HASH, STRTAB, SYMTAB, STRSZ, SYMENT and the end.
    let dynamic = [
        (14, soname_at),
        (1, needed_at),
        (4, HASH),
        (5, STRINGS),
        (6, SYMBOLS),
        (10, strings.len() as u64),
        (11, SYMBOL),
        (0, 0),
    ];
    out.extend(
        dynamic.map(|(tag, value): (u64, u64)| [tag.to_le_bytes(), value.to_le_bytes()].concat()).concat(),
    );
    // The symbol that every table begins with, and a hash table of one empty bucket.
    out.extend([0; SYMBOL as usize]);
    out.extend([1_u32, 1, 0, 0].map(u32::to_le_bytes).concat());
    out.extend(strings.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sys::dl::Library;

    #[test]
    fn a_name_that_is_not_there_leads_to_one_that_is() {
        let wanted = "libnixl-of-this-test.so";
        assert!(dl::dlopen(OsStr::new(wanted), 0).is_err());
        assert_eq!(lead(wanted, &["libnowhere.so.9", "libm.so.6"]), Cudart::Led("libm.so.6"));
        let found = Library::load(Path::new(wanted)).unwrap();
        let symbol = found.symbol(c"cos").unwrap() as usize;
        assert!(
            dl::file_of(symbol).unwrap().to_string_lossy().contains("libm"),
            "its symbols are those of the other"
        );
        assert_eq!(lead(wanted, &[]), Cudart::Found);
    }

    /// The library of the Python wheel that the set-up installs, which has no other name.
    #[test]
    fn the_cuda_runtime_of_a_wheel_is_found_as_libfabric_looks_for_it() {
        let wheels = concat!(env!("CARGO_MANIFEST_DIR"), "/target/venv/lib");
        let folders = std::fs::read_dir(wheels).into_iter().flatten().flatten();
        let files =
            folders.map(|python| python.path().join("site-packages/nvidia/cuda_runtime/lib/libcudart.so.12"));
        let Some(file) = files.into_iter().find(|file| file.is_file()) else {
            eprintln!("skipped: no CUDA runtime in {wheels}; make setup brings one");
            return;
        };
        dl::dlopen(file.as_os_str(), 0).unwrap();
        assert_eq!(lead(WANTED, &VERSIONED), Cudart::Led("libcudart.so.12"));
        // What libfabric does.
        let library = Library::load(Path::new(WANTED)).unwrap();
        let symbol = library.symbol(c"cudaGetDeviceCount").unwrap() as usize;
        assert_eq!(dl::file_of(symbol).unwrap(), file);
    }

    #[test]
    fn what_is_nowhere_is_named() {
        let Cudart::Missing(why) = lead("libnowhere.so", &["libnowhere.so.13"]) else {
            panic!("it is there")
        };
        assert!(why.contains("libnowhere.so.13"), "{why}");
    }
}
