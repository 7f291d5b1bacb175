//! Memory of a GPU that is not there: the stand-in driver's, hidden, so that nothing but a copy by CUDA reaches it.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Kinds of memory, as the stand-in numbers them.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum Kind {
    Device = 0,
    Async = 2,
    Vmm = 3,
    Managed = 4,
    Host = 5,
}

type Map = unsafe extern "C" fn(c_int, *const usize, *const c_int, c_int, usize) -> u64;

/// The stand-in, loaded as the program's driver.
pub struct Gpu {
    library: usize,
    context: usize,
}

impl Gpu {
    /// The driver of this process, built and loaded when first asked for.
    pub fn get() -> &'static Self {
        static GPU: OnceLock<Gpu> = OnceLock::new();
        GPU.get_or_init(Self::load)
    }

    fn load() -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda-standin/cuda.c");
        let library =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libcuda-{}.so", std::process::id()));
        let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
            .args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-o"])
            .args([&library, &source])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "building {}", source.display());
        let name = CString::new(library.as_os_str().as_encoded_bytes()).expect("path");
        // SAFETY: a library of ours, whose constructors do no harm.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "{}", library.display());
        std::fs::remove_file(library).expect("remove");
        let mut gpu = Self { library: handle as usize, context: 0 };
        // SAFETY: the stand-in defines these so.
        unsafe {
            let option: unsafe extern "C" fn(*const c_char, c_int) = gpu.symbol("standin_option");
            option(c"hidden".as_ptr(), 1);
            let init: unsafe extern "C" fn(c_uint) -> c_uint = gpu.symbol("cuInit");
            assert_eq!(init(0), 0);
            let uses: unsafe extern "C" fn(c_int) -> usize = gpu.symbol("standin_app_uses");
            gpu.context = uses(0);
        }
        gpu
    }

    /// # Safety
    /// `F` is the type that the stand-in gives the function.
    unsafe fn symbol<F: Copy>(&self, name: &str) -> F {
        let name = CString::new(name).expect("name");
        // SAFETY: an open library and a C string.
        let symbol = unsafe { libc::dlsym(self.library as *mut c_void, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?}");
        // SAFETY: the caller's word; a function pointer has the size of any.
        unsafe { std::mem::transmute_copy(&symbol) }
    }

    /// Memory of a kind, in consecutive handles.
    pub fn memory(&self, kind: Kind, handles: &[usize]) -> u64 {
        let context = if matches!(kind, Kind::Device | Kind::Managed) { self.context } else { 0 };
        let devices = vec![0; handles.len()];
        // SAFETY: as above; both arrays have the given length.
        let address = unsafe {
            let map: Map = self.symbol("standin_map");
            map(kind as c_int, handles.as_ptr(), devices.as_ptr(), handles.len() as c_int, context)
        };
        assert_ne!(address, 0);
        address
    }

    /// Frees memory of one handle.
    pub fn free(&self, address: u64) {
        // SAFETY: as above.
        let freed = unsafe { self.symbol::<unsafe extern "C" fn(u64) -> c_int>("standin_unmap")(address) };
        assert_eq!(freed, 1);
    }

    /// What an application's copy does.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.copy(address, data.as_ptr() as u64, data.len());
    }

    /// The same, the other way.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.copy(data.as_mut_ptr() as u64, address, length);
        data
    }

    fn copy(&self, to: u64, from: u64, length: usize) {
        // SAFETY: as above; one side is a slice of that length, the other memory that the stand-in made.
        unsafe { self.symbol::<unsafe extern "C" fn(u64, u64, usize)>("standin_copy")(to, from, length) };
    }

    /// How many contexts are on this thread's stack.
    pub fn depth(&self) -> i32 {
        // SAFETY: as above.
        unsafe { self.symbol::<unsafe extern "C" fn() -> c_int>("standin_depth")() }
    }

    /// Fails the nth call of this name from now on; 0 is none.
    pub fn fail(&self, call: &str, nth: i32) {
        let call = CString::new(call).expect("name");
        // SAFETY: as above.
        unsafe {
            let fail: unsafe extern "C" fn(*const c_char, c_int, c_uint) = self.symbol("standin_fail");
            fail(call.as_ptr(), nth, 700);
        }
    }
}
