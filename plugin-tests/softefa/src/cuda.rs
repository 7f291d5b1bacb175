//! Memory of GPUs: told apart, and copied, by the CUDA driver library that the program itself uses.
//!
//! The library is not loaded from here: a program with GPU memory has it already. Copies go over a stream of this
//! module's own for each context, so that they wait for no work of the program's and the program's for none of theirs,
//! and are over when the call returns.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

type CuResult = c_uint;
type Handle = *mut c_void;

const SUCCESS: CuResult = 0;
/// `CU_POINTER_ATTRIBUTE_…`.
const ATTRIBUTE_CONTEXT: c_uint = 1;
const ATTRIBUTE_MEMORY_TYPE: c_uint = 2;
const ATTRIBUTE_IS_MANAGED: c_uint = 8;
const ATTRIBUTE_DEVICE_ORDINAL: c_uint = 9;
/// `CU_MEMORYTYPE_DEVICE`.
const MEMORY_TYPE_DEVICE: u64 = 2;
/// `CU_STREAM_NON_BLOCKING`.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`: a capture elsewhere in the program is none of ours to end.
const CAPTURE_MODE_RELAXED: c_uint = 2;

/// What is used of the driver, by its names in the library.
struct Api {
    pointer_get_attribute: unsafe extern "C" fn(*mut c_void, c_uint, u64) -> CuResult,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> CuResult,
    primary_context_retain: unsafe extern "C" fn(*mut Handle, c_int) -> CuResult,
    push_current: unsafe extern "C" fn(Handle) -> CuResult,
    pop_current: unsafe extern "C" fn(*mut Handle) -> CuResult,
    exchange_capture_mode: unsafe extern "C" fn(*mut c_uint) -> CuResult,
    stream_create: unsafe extern "C" fn(*mut Handle, c_uint) -> CuResult,
    stream_synchronize: unsafe extern "C" fn(Handle) -> CuResult,
    copy_to_device: unsafe extern "C" fn(u64, *const c_void, usize, Handle) -> CuResult,
    copy_to_host: unsafe extern "C" fn(*mut c_void, u64, usize, Handle) -> CuResult,
    known: Mutex<Known>,
}

/// What was made and is kept, by context and by device; as numbers, since a handle is good on any thread.
#[derive(Default)]
struct Known {
    streams: HashMap<usize, usize>,
    primary_contexts: HashMap<c_int, usize>,
}

/// Which way a copy goes.
#[derive(Clone, Copy)]
enum Copy {
    In { to: u64, from: *const c_void },
    Out { to: *mut c_void, from: u64 },
}

/// Whether an address is that of GPU memory which a NIC could reach: device memory, and not managed, which moves.
pub fn is_device(address: u64) -> bool {
    let Some(api) = Api::get() else { return false };
    api.attribute(ATTRIBUTE_MEMORY_TYPE, address) == Some(MEMORY_TYPE_DEVICE)
        && api.attribute(ATTRIBUTE_IS_MANAGED, address) == Some(0)
}

/// Copies `from` into GPU memory; it is there when this returns.
pub fn copy_in(to: u64, from: &[u8]) -> io::Result<()> {
    copy(Copy::In { to, from: from.as_ptr().cast() }, to, from.len())
}

/// Copies GPU memory into `to`.
pub fn copy_out(to: &mut [u8], from: u64) -> io::Result<()> {
    copy(Copy::Out { to: to.as_mut_ptr().cast(), from }, from, to.len())
}

fn copy(copy: Copy, device_address: u64, length: usize) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let api = Api::get().ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
    let context = api.context_of(device_address)?;
    let _current = Current::enter(api, context)?;
    let stream = api.stream_of(context)?;
    // SAFETY: the host side is a slice that lives through this function, which waits for the copy before it returns; the
    // driver checks the device side. Context and stream belong together.
    unsafe {
        check(
            "cuMemcpyAsync",
            match copy {
                Copy::In { to, from } => (api.copy_to_device)(to, from, length, stream),
                Copy::Out { to, from } => (api.copy_to_host)(to, from, length, stream),
            },
        )?;
        check("cuStreamSynchronize", (api.stream_synchronize)(stream))
    }
}

impl Api {
    /// The driver, if the program has loaded it by now.
    fn get() -> Option<&'static Self> {
        static API: OnceLock<Option<Api>> = OnceLock::new();
        if let Some(api) = API.get() {
            return api.as_ref();
        }
        // SAFETY: a C string; with RTLD_NOLOAD no code is loaded or run. The handle is kept for good.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
        if library.is_null() {
            return None;
        }
        API.get_or_init(|| {
            // SAFETY: a library that is open for good.
            let api = unsafe { Self::resolve(library) };
            if api.is_none() {
                eprintln!("softefa: libcuda.so.1 lacks a function: GPU memory is not told from other memory");
            }
            api
        })
        .as_ref()
    }

    /// # Safety
    /// `library` is a handle of dlopen that stays open.
    unsafe fn resolve(library: *mut c_void) -> Option<Self> {
        let symbol = |name: &CStr| {
            // SAFETY: an open handle and a C string.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        // SAFETY: the prototypes are those of cuda.h for these names.
        unsafe {
            use std::mem::transmute as as_function;
            Some(Self {
                pointer_get_attribute: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut c_void, c_uint, u64) -> CuResult,
                >(symbol(c"cuPointerGetAttribute")?),
                device_get: as_function::<*mut c_void, unsafe extern "C" fn(*mut c_int, c_int) -> CuResult>(
                    symbol(c"cuDeviceGet")?,
                ),
                primary_context_retain: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut Handle, c_int) -> CuResult,
                >(symbol(c"cuDevicePrimaryCtxRetain")?),
                push_current: as_function::<*mut c_void, unsafe extern "C" fn(Handle) -> CuResult>(symbol(
                    c"cuCtxPushCurrent_v2",
                )?),
                pop_current: as_function::<*mut c_void, unsafe extern "C" fn(*mut Handle) -> CuResult>(
                    symbol(c"cuCtxPopCurrent_v2")?,
                ),
                exchange_capture_mode: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut c_uint) -> CuResult,
                >(symbol(c"cuThreadExchangeStreamCaptureMode")?),
                stream_create: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut Handle, c_uint) -> CuResult,
                >(symbol(c"cuStreamCreate")?),
                stream_synchronize: as_function::<*mut c_void, unsafe extern "C" fn(Handle) -> CuResult>(
                    symbol(c"cuStreamSynchronize")?,
                ),
                copy_to_device: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(u64, *const c_void, usize, Handle) -> CuResult,
                >(symbol(c"cuMemcpyHtoDAsync_v2")?),
                copy_to_host: as_function::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut c_void, u64, usize, Handle) -> CuResult,
                >(symbol(c"cuMemcpyDtoHAsync_v2")?),
                known: Mutex::default(),
            })
        }
    }

    /// One attribute of a pointer; `None` where CUDA does not know the address, or is not initialised.
    ///
    /// The driver writes 1, 4 or 8 bytes; a zeroed word holds any of them on a little-endian machine.
    fn attribute(&self, attribute: c_uint, address: u64) -> Option<u64> {
        let mut value = 0_u64;
        // SAFETY: no attribute asked for has more than 8 bytes; the address is looked up, not accessed.
        let result = unsafe { (self.pointer_get_attribute)((&raw mut value).cast(), attribute, address) };
        (result == SUCCESS).then_some(value)
    }

    /// The context of an allocation, or, of one that has none (VMM, stream-ordered), the primary one of its device.
    fn context_of(&self, address: u64) -> io::Result<Handle> {
        if let Some(context) = self.attribute(ATTRIBUTE_CONTEXT, address).filter(|it| *it != 0) {
            return Ok(context as Handle);
        }
        let ordinal = self.attribute(ATTRIBUTE_DEVICE_ORDINAL, address);
        let ordinal = ordinal.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))? as c_int;
        match self.known.lock().unwrap_or_else(PoisonError::into_inner).primary_contexts.entry(ordinal) {
            Entry::Occupied(known) => Ok(*known.get() as Handle),
            Entry::Vacant(new) => {
                let (mut device, mut context) = (0, std::ptr::null_mut());
                // SAFETY: both calls write what their first argument points to.
                unsafe {
                    check("cuDeviceGet", (self.device_get)(&raw mut device, ordinal))?;
                    let result = (self.primary_context_retain)(&raw mut context, device);
                    check("cuDevicePrimaryCtxRetain", result)?;
                }
                Ok(*new.insert(context as usize) as Handle)
            }
        }
    }

    /// This module's stream in a context, which is current.
    fn stream_of(&self, context: Handle) -> io::Result<Handle> {
        match self.known.lock().unwrap_or_else(PoisonError::into_inner).streams.entry(context as usize) {
            Entry::Occupied(known) => Ok(*known.get() as Handle),
            Entry::Vacant(new) => {
                let mut stream = std::ptr::null_mut();
                // SAFETY: writes one handle.
                let result = unsafe { (self.stream_create)(&raw mut stream, STREAM_NON_BLOCKING) };
                check("cuStreamCreate", result)?;
                Ok(*new.insert(stream as usize) as Handle)
            }
        }
    }
}

/// A context on this thread's stack, with captures elsewhere left alone, until dropped.
struct Current {
    api: &'static Api,
    capture_mode: c_uint,
}

impl Current {
    fn enter(api: &'static Api, context: Handle) -> io::Result<Self> {
        // SAFETY: a context that the driver named.
        check("cuCtxPushCurrent", unsafe { (api.push_current)(context) })?;
        let mut capture_mode = CAPTURE_MODE_RELAXED;
        // SAFETY: swaps the mode with the thread's.
        unsafe { (api.exchange_capture_mode)(&raw mut capture_mode) };
        Ok(Self { api, capture_mode })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: both write what their argument points to.
        unsafe {
            (self.api.exchange_capture_mode)(&raw mut self.capture_mode);
            (self.api.pop_current)(&raw mut popped);
        }
    }
}

fn check(call: &str, result: CuResult) -> io::Result<()> {
    if result == SUCCESS { Ok(()) } else { Err(io::Error::other(format!("{call}: CUDA error {result}"))) }
}
