//! The part of the AWS Neuron runtime that this plugin uses, resolved at run time from `libnrt.so.1`.
//!
//! Prototypes are those of the public `nrt/nrt.h` and `nrt/nrt_experimental.h` of the Neuron SDK. No machine with a
//! Neuron device has run this: it is tested against a stand-in library alone.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;

use super::dl::Library;

/// `NRT_STATUS`.
pub type NrtStatus = c_int;

/// `NRT_SUCCESS`.
pub const SUCCESS: NrtStatus = 0;

type GetTotalNcCount = unsafe extern "C" fn(*mut u32) -> NrtStatus;
type GetAttachedEfaBdf = unsafe extern "C" fn(*const c_void, *mut c_char, *mut usize) -> NrtStatus;
type GetDmabufFdV2 = unsafe extern "C" fn(u64, u64, *mut c_int, *mut u64) -> NrtStatus;
type GetDmabufFd = unsafe extern "C" fn(u64, u64, *mut c_int) -> NrtStatus;

/// The runtime's entry points. Only [`Api::load`] makes one.
pub struct Api {
    /// Number of `NeuronCores`; may be called before `nrt_init`.
    pub get_total_nc_count: GetTotalNcCount,
    /// PCI address, as text, of the EFA device attached to the Neuron device that holds the address.
    /// Length in: of the buffer; out: of the text without its NUL. Neuron SDK 2.29.
    pub get_attached_efa_bdf: Option<GetAttachedEfaBdf>,
    /// Exports a range: file descriptor and the offset of the range within it.
    pub get_dmabuf_fd_v2: Option<GetDmabufFdV2>,
    /// Exports a range that starts where its buffer starts.
    pub get_dmabuf_fd: Option<GetDmabufFd>,
}

impl Api {
    /// Loads `path`, or without one `libnrt.so.1`. The error is a sentence.
    pub fn load(path: Option<&Path>) -> Result<Self, String> {
        let library = Library::load(path.unwrap_or(Path::new("libnrt.so.1")))?;
        // SAFETY: nrt.h and nrt_experimental.h declare the symbols with these prototypes.
        unsafe {
            Ok(Self {
                get_total_nc_count: library.function(c"nrt_get_total_nc_count")?,
                get_attached_efa_bdf: library.function(c"nrt_get_attached_efa_bdf").ok(),
                get_dmabuf_fd_v2: library.function(c"nrt_get_dmabuf_fd_v2").ok(),
                get_dmabuf_fd: library.function(c"nrt_get_dmabuf_fd").ok(),
            })
        }
    }
}
