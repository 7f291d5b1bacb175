//! AWS Neuron devices behind the same questions: which NIC is near, and a dmabuf of the memory.
//!
//! Written from the Neuron SDK's public headers and tested against a stand-in library alone: no machine with a Neuron
//! device has run it.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::DmaBuf;
use crate::error::{Error, Result};
use crate::sys::nrt::{self as sys, Api, NrtStatus};
use crate::types::PciAddress;

/// Environment variable that names the Neuron runtime library, in place of the search for `libnrt.so.1`.
pub const LIBRARY_ENV: &str = "NIXL_LIBFABRIC_LIBNRT";

/// Bytes offered for a PCI address as text; `0000:00:00.0` with its NUL takes 13.
const BDF_BYTES_MAX: usize = 64;

/// The Neuron runtime of this process.
pub struct Neuron {
    api: Api,
    cores: u32,
}

impl Neuron {
    /// The runtime of this process, loaded at the first call; success or the reason of failure is remembered.
    pub fn get() -> Result<&'static Self> {
        static NEURON: OnceLock<Result<Neuron>> = OnceLock::new();
        NEURON
            .get_or_init(|| {
                let path = std::env::var_os(LIBRARY_ENV).filter(|v| !v.is_empty()).map(PathBuf::from);
                Self::load(path.as_deref())
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// Loads the runtime library at `path`, or `libnrt.so.1`. An error if the machine has no `NeuronCore`.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let api =
            Api::load(path).map_err(|why| Error::not_supported(format!("Neuron runtime library: {why}")))?;
        let mut cores = 0;
        // SAFETY: writes one unsigned int; nrt.h allows the call before nrt_init.
        check("nrt_get_total_nc_count", unsafe { (api.get_total_nc_count)(&raw mut cores) })?;
        if cores == 0 {
            return Err(Error::not_supported("the Neuron runtime reports no NeuronCore: see neuron-ls"));
        }
        Ok(Self { api, cores })
    }

    /// Number of `NeuronCores` of the machine.
    pub fn cores(&self) -> u32 {
        self.cores
    }

    /// PCI address of the EFA device attached to the Neuron device that holds `addr`. `NotSupported` where the runtime
    /// is too old to say (Neuron SDK 2.29 is the first): then every rail is equally near.
    pub fn attached_efa(&self, addr: u64) -> Result<PciAddress> {
        let Some(query) = self.api.get_attached_efa_bdf else {
            return Err(Error::not_supported(
                "the Neuron runtime has no nrt_get_attached_efa_bdf (Neuron SDK 2.29)",
            ));
        };
        let mut text = [0_u8; BDF_BYTES_MAX];
        let mut len = BDF_BYTES_MAX - 1;
        // SAFETY: the runtime writes at most `len` bytes with the NUL, and the length; one byte less is offered, so that
        // the last one stays a NUL. The address is looked up, not accessed.
        let rc = unsafe { query(addr as *const c_void, text.as_mut_ptr().cast(), &raw mut len) };
        check("nrt_get_attached_efa_bdf", rc).map_err(|e| e.context(format!("Neuron memory {addr:#x}")))?;
        let text = CStr::from_bytes_until_nul(&text).map_or_else(|_| "".into(), CStr::to_string_lossy);
        text.parse().map_err(|why: String| Error::backend(format!("nrt_get_attached_efa_bdf: {why}")))
    }

    /// Exports the `len` bytes at `addr` as a dmabuf. `NotSupported` where the runtime cannot.
    pub fn export(&self, addr: u64, len: u64) -> Result<DmaBuf> {
        let (mut fd, mut offset): (c_int, u64) = (-1, 0);
        let rc = match (self.api.get_dmabuf_fd_v2, self.api.get_dmabuf_fd) {
            // SAFETY: writes one int and one 64-bit offset; the range is looked up, not accessed.
            (Some(export), _) => unsafe { export(addr, len, &raw mut fd, &raw mut offset) },
            // SAFETY: writes one int. This older call takes the start of a buffer alone, so the offset is 0.
            (None, Some(export)) => unsafe { export(addr, len, &raw mut fd) },
            (None, None) => return Err(Error::not_supported("the Neuron runtime exports no dmabuf")),
        };
        check("nrt_get_dmabuf_fd", rc).map_err(|e| e.context(format!("Neuron memory {addr:#x}+{len:#x}")))?;
        if fd < 0 {
            return Err(Error::backend("nrt_get_dmabuf_fd succeeded without a file descriptor"));
        }
        // SAFETY: the runtime made the descriptor for us; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf { fd, offset, addr, len })
    }
}

fn check(call: &str, rc: NrtStatus) -> Result<()> {
    if rc == sys::SUCCESS {
        return Ok(());
    }
    Err(Error::backend(format!("{call}: NRT_STATUS {rc}")))
}
