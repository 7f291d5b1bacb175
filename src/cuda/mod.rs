//! GPU memory: where a pointer lives, the context to work on it, dmabuf export, copies.
//!
//! The plugin is a guest in a process that uses CUDA for itself, so everything here keeps three promises:
//!
//! - The calling thread's current context is the same after each call as before it, whatever fails ([`Context::with`]).
//! - No context comes into being: a primary context is retained only where the application has it active already.
//! - A stream capture of the application (CUDA graphs) on another thread is not disturbed: calls run in relaxed
//!   capture mode.
//!
//! Addresses are plain numbers, as in a NIC's work request. Nothing here makes a reference of them; that they belong to
//! memory the user registered is the promise of whoever makes a [`MemoryRange`](crate::fabric::MemoryRange).

mod context;
mod copy;
mod dmabuf;
mod kernel;
pub mod neuron;
mod pinned;
mod pointer;
mod share;
mod span;

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result, Status};
use crate::sys::cuda::{self as sys, Api, CUdevice, CUresult};
use crate::types::PciAddress;
pub use crate::wire::gpu::{Handle, Shareable};

pub use context::Context;
pub use copy::{InFlight, Stream, Streams};
pub use dmabuf::{DmaBuf, Export, plan_exports};
pub use pinned::{PINNED_BYTES_MAX, Pinned};
pub use pointer::{Allocation, Kind, SEGMENTS_MAX, Segment};
pub use share::{Lent, Mapping};
pub use span::{Batch, Owner, Span};

/// Environment variable that names the CUDA driver library, in place of the search for `libcuda.so.1`.
pub const LIBRARY_ENV: &str = "NIXL_LIBFABRIC_LIBCUDA";

/// Longest device name and PCI address asked of the driver, in bytes with the NUL.
const TEXT_BYTES_MAX: usize = 256;

/// The CUDA driver of this process and its devices. Cheap to clone.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

struct Inner {
    api: Api,
    driver_version: u32,
    devices: Vec<Device>,
}

/// A GPU that the process sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Ordinal within the process, after `CUDA_VISIBLE_DEVICES`.
    pub ordinal: u32,
    /// Name of the product.
    pub name: String,
    /// PCI address: what tells the GPU to the rest of the machine.
    pub pci: PciAddress,
    /// Whether kernel and driver can export its memory as dmabuf.
    pub dmabuf: bool,
    /// Whether a NIC can reach its memory (GPU Direct RDMA).
    pub gdr: bool,
    handle: CUdevice,
}

/// Whose memory `VRAM_SEG` is on this machine.
#[derive(Clone, Copy)]
pub enum Runtime {
    /// NVIDIA GPUs.
    Cuda(&'static Cuda),
    /// AWS Neuron devices.
    Neuron(&'static neuron::Neuron),
}

impl Runtime {
    /// Whether the machine looks as if it had an accelerator, found out without touching a driver: a process that has
    /// called `cuInit` cannot use CUDA in its forked children, and asking what a plugin could do must not cost that.
    pub fn is_likely() -> bool {
        let named = |variable| std::env::var_os(variable).is_some_and(|value| !value.is_empty());
        named(LIBRARY_ENV) || named(neuron::LIBRARY_ENV) || has_device_file(Path::new("/dev"))
    }

    /// The runtime that has devices here; CUDA if both have. The error, `NotSupported`, says why neither.
    pub fn get() -> Result<Self> {
        let no_cuda = match Cuda::get() {
            Ok(cuda) => return Ok(Self::Cuda(cuda)),
            Err(why) => why,
        };
        neuron::Neuron::get()
            .map(Self::Neuron)
            .map_err(|no_neuron| Error::not_supported(format!("no accelerator: {no_cuda}; {no_neuron}")))
    }
}

impl Cuda {
    /// The driver of this process, loaded at the first call; success or the reason of failure is remembered.
    ///
    /// [`LIBRARY_ENV`] names another library. Creates no context.
    pub fn get() -> Result<&'static Self> {
        static CUDA: OnceLock<Result<Cuda>> = OnceLock::new();
        CUDA.get_or_init(|| {
            let path = std::env::var_os(LIBRARY_ENV).filter(|v| !v.is_empty()).map(PathBuf::from);
            Self::load(path.as_deref())
        })
        .as_ref()
        .map_err(Clone::clone)
    }

    /// Loads the driver library at `path`, or `libcuda.so.1` (the copy already in the process if there is one),
    /// and lists its devices.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        Api::load(path)
            .map_err(|why| {
                Error::not_supported(format!("CUDA driver library: {why}; VRAM needs the NVIDIA driver"))
            })
            .and_then(Self::from_api)
    }

    /// Initialises a driver already loaded and lists its devices.
    pub fn from_api(api: Api) -> Result<Self> {
        // SAFETY: cuInit takes no pointers; it may be called again and from any thread.
        let rc = unsafe { (api.init)(0) };
        if rc != sys::SUCCESS {
            let hint = match rc {
                sys::ERROR_STUB_LIBRARY => {
                    "this is the toolkit's stub: take its directory out of LD_LIBRARY_PATH"
                }
                sys::ERROR_NO_DEVICE => "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
                sys::ERROR_SYSTEM_DRIVER_MISMATCH => "kernel module and library differ in version",
                _ => "see nvidia-smi",
            };
            let what = describe(&api, rc);
            return Err(Error::not_supported(format!("{}: cuInit: {what}; {hint}", api.library_name())));
        }
        let (mut version, mut count) = (0, 0);
        // SAFETY: both calls write one int each.
        unsafe {
            check(&api, "cuDriverGetVersion", (api.driver_get_version)(&raw mut version))?;
            check(&api, "cuDeviceGetCount", (api.device_get_count)(&raw mut count))?;
        }
        if count < 1 {
            return Err(Error::not_supported(
                "CUDA reports no device: see nvidia-smi and CUDA_VISIBLE_DEVICES",
            ));
        }
        let devices = (0..count).map(|ordinal| device(&api, ordinal)).collect::<Result<Vec<_>>>()?;
        Ok(Self(Arc::new(Inner { api, driver_version: version as u32, devices })))
    }

    /// The devices, by ordinal. Never empty.
    pub fn devices(&self) -> &[Device] {
        &self.0.devices
    }

    /// The device with this ordinal.
    pub fn device(&self, ordinal: u32) -> Result<&Device> {
        self.devices().get(ordinal as usize).ok_or_else(|| {
            Error::not_found(format!("CUDA device {ordinal}: the process sees {}", self.devices().len()))
        })
    }

    /// Version of the driver API as (major, minor).
    pub fn driver_version(&self) -> (u32, u32) {
        (self.0.driver_version / 1000, self.0.driver_version % 1000 / 10)
    }

    /// Path or name by which the library was opened.
    pub fn library_name(&self) -> &str {
        self.0.api.library_name()
    }

    fn api(&self) -> &Api {
        &self.0.api
    }

    fn check(&self, call: &str, rc: CUresult) -> Result<()> {
        check(self.api(), call, rc)
    }
}

/// Whether the folder holds an accelerator's device file: `nvidia0` or `neuron0`, with any number.
fn has_device_file(folder: &Path) -> bool {
    let is_one = |name: &str| {
        let number = name.strip_prefix("nvidia").or_else(|| name.strip_prefix("neuron"));
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    std::fs::read_dir(folder)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_one)))
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda")
            .field("library", &self.library_name())
            .field("devices", &self.devices())
            .finish()
    }
}

fn check(api: &Api, call: &str, rc: CUresult) -> Result<()> {
    if rc == sys::SUCCESS {
        return Ok(());
    }
    let status = if rc == sys::ERROR_NOT_SUPPORTED { Status::NotSupported } else { Status::Backend };
    Err(Error::new(status, format!("{call}: {}", describe(api, rc))))
}

/// The driver's own words for a result.
fn describe(api: &Api, rc: CUresult) -> String {
    let text = |get: unsafe extern "C" fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the call writes one pointer: NULL, or a string constant of the library, which stays loaded.
        let known = unsafe { get(rc, &raw mut text) } == sys::SUCCESS && !text.is_null();
        // SAFETY: see above.
        known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
    };
    match (text(api.get_error_name), text(api.get_error_string)) {
        (Some(name), Some(words)) => format!("{name} ({words})"),
        (Some(name), None) => name.into_owned(),
        _ => format!("CUDA error {rc}"),
    }
}

fn device(api: &Api, ordinal: c_int) -> Result<Device> {
    let at = |e: Error| e.context(format!("CUDA device {ordinal}"));
    let mut handle = 0;
    // SAFETY: writes one int.
    check(api, "cuDeviceGet", unsafe { (api.device_get)(&raw mut handle, ordinal) }).map_err(at)?;
    let name = text("cuDeviceGetName", api, handle, api.device_get_name).map_err(at)?;
    let pci = text("cuDeviceGetPCIBusId", api, handle, api.device_get_pci_bus_id).map_err(at)?;
    let pci = pci.parse().map_err(|why: String| at(Error::backend(format!("cuDeviceGetPCIBusId: {why}"))))?;
    let has = |attribute: c_uint| {
        let mut value = 0;
        // SAFETY: writes one int. A driver too old for the attribute refuses it: then the device cannot do it.
        unsafe { (api.device_get_attribute)(&raw mut value, attribute, handle) == sys::SUCCESS && value != 0 }
    };
    Ok(Device {
        ordinal: ordinal as u32,
        name,
        pci,
        dmabuf: has(sys::DEVICE_DMA_BUF_SUPPORTED) && api.mem_get_handle_for_address_range.is_some(),
        gdr: has(sys::DEVICE_GDR_SUPPORTED),
        handle,
    })
}

fn text(
    call: &str,
    api: &Api,
    device: CUdevice,
    get: unsafe extern "C" fn(*mut c_char, c_int, CUdevice) -> CUresult,
) -> Result<String> {
    let mut buffer = [0_u8; TEXT_BYTES_MAX];
    // SAFETY: the driver writes at most the given number of bytes with the NUL; one byte less is offered, so that the
    // last one stays a NUL whatever it does.
    check(api, call, unsafe { get(buffer.as_mut_ptr().cast(), TEXT_BYTES_MAX as c_int - 1, device) })?;
    let text = CStr::from_bytes_until_nul(&buffer)
        .map_err(|_| Error::backend(format!("{call}: text without end")))?;
    Ok(text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::has_device_file;

    #[test]
    fn device_files_are_told_from_their_neighbours() {
        let folder = std::env::temp_dir().join(format!("nixl-libfabric-dev-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let mut seen = Vec::new();
        for name in ["null", "nvidiactl", "nvidia-uvm", "nvidia", "neuron12"] {
            std::fs::write(folder.join(name), "").unwrap();
            seen.push(has_device_file(&folder));
        }
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(seen, [false, false, false, false, true]);
        assert!(!has_device_file(&folder));
    }
}
