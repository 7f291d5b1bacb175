//! Engines with GPU memory: on a stand-in driver, and on a stand-in for a libfabric that takes GPU memory.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nixl_libfabric::cuda::LIBRARY_ENV;
use nixl_libfabric::engine::{Engine, InitParams, Metadata, Request, XferDesc};
use nixl_libfabric::error::{Result, Status};
use nixl_libfabric::fabric::MemoryRange;
use nixl_libfabric::types::{Desc, MemKind};

use super::{Bed, Memory, build, open_library};

pub const MIB: usize = 1 << 20;
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The process has one CUDA driver and one libfabric, so the tests take turns.
pub struct Stage {
    pub bed: Bed,
    fabric: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    pub fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARIES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (driver, fabric) = LIBRARIES.get_or_init(|| {
            let map = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin-tests/cuda-standin/fabric.map");
            let fabric = build(
                "fabric.c",
                "libfabric-standin.so",
                &["-DREAL_LIBFABRIC=\"libfabric.so.1\"", &format!("-Wl,--version-script={}", map.display())],
            );
            let (_, driver) = Bed::open();
            // SAFETY: no other thread reads or writes the environment: every test begins here, and takes turns.
            unsafe { std::env::set_var(LIBRARY_ENV, &driver) };
            (driver, fabric)
        });
        let stage = Self { bed: Bed::on(driver), fabric: fabric.clone(), _turn: turn };
        for (key, value) in [("nic", 1), ("hmem", 1), ("dmabuf", 1), ("cuda", 1)] {
            stage.fabric_option(key, value);
        }
        for (key, value) in [("dmabuf", 1), ("dmabuf_across", 1), ("polls", 3)] {
            stage.bed.option(key, value);
        }
        stage.bed.fail("", 0, 0);
        stage.bed.app_current(0);
        stage.bed.take_log();
        stage
    }

    pub fn fabric_option(&self, key: &str, value: i32) {
        let library = open_library(&self.fabric);
        let key = CString::new(key).unwrap();
        // SAFETY: fabric.c defines the function so.
        unsafe {
            let symbol = libc::dlsym(library, c"standin_fabric_option".as_ptr());
            assert!(!symbol.is_null());
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, c_int)>(symbol)(
                key.as_ptr(),
                value,
            );
        }
    }

    pub fn engine(&self, name: &str, progress_thread: bool) -> Engine {
        self.engine_with(name, progress_thread, &[])
    }

    pub fn engine_with(&self, name: &str, progress_thread: bool, options: &[(&str, &str)]) -> Engine {
        let fabric = self.fabric.to_str().unwrap();
        let always = [("libfabric_path", fabric), ("devices", "lo"), ("same_host", "off")];
        let params = always.iter().chain(options);
        Engine::create(InitParams {
            local_agent: name.into(),
            params: params.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            progress_thread,
            progress_delay: Duration::ZERO,
            poison: Arc::default(),
        })
        .unwrap()
    }

    /// GPU memory of the application, filled with a byte.
    pub fn gpu(&self, device: i32, bytes: usize, fill: u8) -> u64 {
        let addr = self.bed.memory(Memory::Device, device, bytes, self.bed.app_uses(device));
        fill_at(addr, bytes, fill);
        addr
    }

    /// What was called, as far as it is about contexts and registrations.
    pub fn story(&self) -> Vec<String> {
        let told = ["cuCtxPush", "cuCtxPop", "fi_"];
        let log = self.bed.take_log();
        log.into_iter().filter(|line| told.iter().any(|call| line.starts_with(call))).collect()
    }
}

pub fn fill_at(addr: u64, bytes: usize, fill: u8) {
    // SAFETY: the stand-in's memory is host memory of that length.
    unsafe { std::ptr::write_bytes(addr as *mut u8, fill, bytes) };
}

pub fn register(
    engine: &Engine,
    kind: MemKind,
    addr: u64,
    bytes: usize,
    device: u64,
) -> Result<Arc<Metadata>> {
    // SAFETY: the memory of the stand-in, and that of the tests, outlives its engine.
    engine.register_mem(unsafe { MemoryRange::assume_registered(addr, bytes as u64) }, device, kind)
}

pub fn vram(engine: &Engine, addr: u64, bytes: usize, device: u64) -> Result<Arc<Metadata>> {
    register(engine, MemKind::Vram, addr, bytes, device)
}

pub fn desc(metadata: &Arc<Metadata>, addr: u64, bytes: usize) -> XferDesc<'_> {
    XferDesc { desc: Desc { addr, len: bytes as u64, dev_id: 0 }, metadata }
}

pub fn wait(engines: &[&Engine], request: &Request) -> Result<Status> {
    wait_for(engines, request, &mut 0)
}

/// Waits, and counts the notifications that the other engines get meanwhile.
pub fn wait_for(engines: &[&Engine], request: &Request, notifications: &mut usize) -> Result<Status> {
    let start = Instant::now();
    loop {
        let status = engines[0].check_xfer(request)?;
        if status != Status::InProgress {
            return Ok(status);
        }
        assert!(start.elapsed() < DEADLINE, "the transfer does not end");
        for engine in &engines[1..] {
            *notifications += engine.take_notifications().unwrap().len();
        }
    }
}
