//! A bed for tests without a GPU: the stand-in driver, one copy of it (so one state) for each [`Bed`].
#![allow(dead_code)] // Each test crate uses a part.

pub mod stage;

use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nixl_libfabric::cuda::{Cuda, Span};
use nixl_libfabric::fabric::MemoryRange;

/// Kinds of memory, as `cuda.c` numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Memory {
    Device = 0,
    Imported,
    Async,
    Vmm,
    Managed,
    Host,
    VmmOnHost,
}

/// A context of the stand-in; 0 is none.
pub type Ctx = usize;

/// Builds a stand-in library from `source` once; returns its path.
pub fn build(source: &str, output: &str, flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin-tests/cuda-standin").join(source);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = dir.join(output);
    // Test crates build at the same time: each writes its own file and puts it in place whole.
    let fresh = dir.join(format!("{output}.{}", std::process::id()));
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let status = Command::new(&compiler)
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-shared", "-pthread"])
        .args(flags)
        .arg("-o")
        .arg(&fresh)
        .arg(&source)
        .status()
        .unwrap_or_else(|why| panic!("running {compiler}: {why}"));
    assert!(status.success(), "{compiler} on {}", source.display());
    std::fs::rename(&fresh, &library).unwrap();
    library
}

/// The stand-in driver's file.
pub fn driver() -> &'static Path {
    static DRIVER: OnceLock<PathBuf> = OnceLock::new();
    DRIVER.get_or_init(|| build("cuda.c", "libcuda-standin.so", &[]))
}

/// A copy of the stand-in of its own, with two devices, and the library under test on it.
pub struct Bed {
    pub cuda: Cuda,
    handle: *mut c_void,
}

impl Bed {
    pub fn new() -> Self {
        let (handle, path) = Self::open();
        let cuda = Cuda::load(Some(&path)).unwrap();
        std::fs::remove_file(path).unwrap();
        let bed = Self { cuda, handle };
        bed.take_log();
        bed
    }

    /// The stand-in at `path`, which the library under test has loaded or will.
    pub fn on(path: &Path) -> Self {
        Self { cuda: Cuda::load(Some(path)).unwrap(), handle: open_library(path) }
    }

    /// The stand-in opened, and where it lies. The file may go once the library under test has loaded it.
    pub fn open() -> (*mut c_void, PathBuf) {
        static COPIES: AtomicU32 = AtomicU32::new(0);
        let copy = COPIES.fetch_add(1, Ordering::Relaxed);
        let path = driver().with_extension(format!("{}-{copy}.so", std::process::id()));
        std::fs::copy(driver(), &path).unwrap();
        (open_library(&path), path)
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let c_name = CString::new(name).unwrap();
        // SAFETY: an open handle and a C string.
        let symbol = unsafe { libc::dlsym(self.handle, c_name.as_ptr()) };
        assert!(!symbol.is_null(), "{name}");
        symbol
    }

    /// The application starts to use a device.
    pub fn app_uses(&self, device: i32) -> Ctx {
        // SAFETY: cuda.c defines it so, here and in each function below.
        unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> Ctx>(
                self.symbol("standin_app_uses"),
            )(device)
        }
    }

    /// The application makes a context of its own.
    pub fn app_context(&self, device: i32) -> Ctx {
        let symbol = self.symbol("standin_app_context");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> Ctx>(symbol)(device) }
    }

    /// The application makes a context the only one on this thread's stack.
    pub fn app_current(&self, ctx: Ctx) {
        let symbol = self.symbol("standin_app_current");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Ctx)>(symbol)(ctx) }
    }

    /// A careless library pushes a context within ours.
    pub fn push(&self, ctx: Ctx) {
        let symbol = self.symbol("cuCtxPushCurrent_v2");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Ctx) -> c_uint>(symbol)(ctx) };
    }

    /// A careless library sets another context within ours.
    pub fn set_current(&self, ctx: Ctx) {
        let symbol = self.symbol("cuCtxSetCurrent");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Ctx) -> c_uint>(symbol)(ctx) };
    }

    /// This thread's CUDA state: current context, depth of the stack, capture mode.
    pub fn thread_state(&self) -> (Ctx, i32, i32) {
        let (current, depth, mode) = (
            self.symbol("standin_current"),
            self.symbol("standin_depth"),
            self.symbol("standin_capture_mode"),
        );
        // SAFETY: see `app_uses`.
        unsafe {
            (
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> Ctx>(current)(),
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(depth)(),
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(mode)(),
            )
        }
    }

    /// Memory of one handle.
    pub fn memory(&self, kind: Memory, device: i32, bytes: usize, ctx: Ctx) -> u64 {
        self.map(kind, &[(bytes, device)], ctx)
    }

    /// The memory, or a part of it, for copies.
    #[allow(clippy::unused_self, reason = "it is the bed's memory")]
    pub fn span(&self, addr: u64, len: u64) -> Span {
        // SAFETY: tests free no memory that a copy names.
        let memory = unsafe { MemoryRange::assume_registered(addr, len) };
        Span::registered(memory, addr, len).expect("a range of memory")
    }

    /// Memory of consecutive handles, given as (bytes, device); device -1 leaves a hole.
    pub fn map(&self, kind: Memory, handles: &[(usize, i32)], ctx: Ctx) -> u64 {
        type Map = unsafe extern "C" fn(c_int, *const usize, *const c_int, c_int, Ctx) -> u64;
        let sizes: Vec<usize> = handles.iter().map(|h| h.0).collect();
        let devices: Vec<c_int> = handles.iter().map(|h| h.1).collect();
        let symbol = self.symbol("standin_map");
        // SAFETY: see `app_uses`; both arrays have the given length.
        let addr = unsafe {
            let map = std::mem::transmute::<*mut c_void, Map>(symbol);
            map(kind as c_int, sizes.as_ptr(), devices.as_ptr(), handles.len() as c_int, ctx)
        };
        assert_ne!(addr, 0);
        addr
    }

    /// Frees device memory of this address and allocates as much at it.
    pub fn again(&self, addr: u64, bytes: usize, ctx: Ctx) -> u64 {
        let symbol = self.symbol("standin_unmap");
        // SAFETY: see `app_uses`.
        let unmapped =
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(u64) -> c_int>(symbol)(addr) };
        assert_eq!(unmapped, 1);
        let symbol = self.symbol("standin_place");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(u64)>(symbol)(addr) };
        self.memory(Memory::Device, 0, bytes, ctx)
    }

    /// Drops all memory that is not the application's: what was mapped and could not be unmapped. Keeps what begins at `addr`.
    pub fn forget_mappings(&self, addr: u64) {
        let symbol = self.symbol("standin_forget_all_but");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(u64)>(symbol)(addr) };
    }

    /// Fails the nth call of this name from now on; "*" is any name, nth 0 none.
    pub fn fail(&self, call: &str, nth: i32, code: u32) {
        type Fail = unsafe extern "C" fn(*const c_char, c_int, c_uint);
        let call = CString::new(call).unwrap();
        let symbol = self.symbol("standin_fail");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, Fail>(symbol)(call.as_ptr(), nth, code) }
    }

    pub fn option(&self, key: &str, value: i32) {
        set_option(self.handle, key, value);
    }

    pub fn count(&self, what: &str) -> i64 {
        let what = CString::new(what).unwrap();
        let symbol = self.symbol("standin_count");
        // SAFETY: see `app_uses`.
        unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_long>(symbol)(
                what.as_ptr(),
            )
        }
    }

    /// Forgets what was let leak on purpose.
    pub fn reset_counts(&self) {
        let symbol = self.symbol("standin_reset_counts");
        // SAFETY: see `app_uses`.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn()>(symbol)() }
    }

    /// The calls since the last time, without the thread numbers.
    pub fn take_log(&self) -> Vec<String> {
        let symbol = self.symbol("standin_take_log");
        let mut text = vec![0_u8; 1 << 20];
        // SAFETY: see `app_uses`.
        let len = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut u8, usize) -> usize>(symbol)(
                text.as_mut_ptr(),
                text.len(),
            )
        };
        let text = String::from_utf8_lossy(&text[..len]).into_owned();
        text.lines().map(|line| line.split_once(' ').unwrap().1.trim_end().to_owned()).collect()
    }

    /// Open dmabufs of this bed in the process.
    pub fn open_dmabufs(&self) -> usize {
        let symbol = self.symbol("standin_tag");
        // SAFETY: see `app_uses`.
        let tag =
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const c_void>(symbol)() };
        let tag = format!("/memfd:dmabuf-cuda-standin-{tag:p} ");
        let open = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        open.filter(|target| target.to_string_lossy().starts_with(&tag)).count()
    }

    /// What must be gone when all that was made has been dropped: (streams, events, pinned buffers, handles, dmabufs).
    pub fn live(&self) -> (i64, i64, i64, i64, usize) {
        let count = |what| self.count(what);
        (count("streams"), count("events"), count("pinned"), count("handles"), self.open_dmabufs())
    }
}

/// Opens a library, for good.
pub fn open_library(path: &Path) -> *mut c_void {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a C string, and a library of ours whose constructors do no harm.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{}", path.display());
    handle
}

/// Sets an option before the library under test looks.
pub fn set_option(handle: *mut c_void, key: &str, value: i32) {
    let key = CString::new(key).unwrap();
    // SAFETY: an open handle of the stand-in, which defines the function so.
    unsafe {
        let symbol = libc::dlsym(handle, c"standin_option".as_ptr());
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, c_int)>(symbol)(
            key.as_ptr(),
            value,
        );
    }
}

/// The bytes at an address of the stand-in's memory.
pub fn bytes_at(addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: the stand-in's memory is host memory that stays mapped; nobody writes it meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, bytes.as_mut_ptr(), len) };
    bytes
}
