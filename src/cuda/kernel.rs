//! A kernel of our own that copies many pieces in one launch.
//!
//! The driver queues one copy for each piece: thousands of small ones keep a processor and the GPU's front end busy for
//! milliseconds, while the GPU's memory could take them in a tenth of that. `copy.ptx` is text that the driver compiles for the
//! GPU at hand (ten milliseconds, once; it keeps the result in its cache).

use std::ffi::{CString, c_uint, c_void};

use super::{Context, Pinned};
use crate::error::{Error, Result};
use crate::sys::cuda::{CUfunction, CUmodule, CUstream};

const PTX: &str = include_str!("copy.ptx");
const NAME: &std::ffi::CStr = c"nixl_libfabric_copy";
/// Threads of a block: `copy.ptx` is made for this number.
const THREADS: c_uint = 256;

/// Bytes of an entry of the table.
const ENTRY_BYTES: usize = 32;
/// Units that one launch copies at most: a table of 512 KiB.
pub const UNITS_MAX: usize = 16 << 10;

/// A unit is a block's work. On an H200 shorter ones are slower, also where they are so few that not every multiprocessor gets one, and
/// longer ones hardly faster (`plugin-tests/gpu`, `cases.py sweep`). A multiple of 16, so that what is aligned stays so.
const UNIT_BYTES: u64 = 64 << 10;

/// The kernel, loaded into a context.
pub struct Kernel {
    context: Context,
    module: CUmodule,
    function: CUfunction,
}

impl Kernel {
    /// Compiles and loads it.
    pub fn load(context: &Context) -> Result<Self> {
        let cuda = context.cuda();
        let (Some(load), Some(get), Some(_), Some(_)) = (
            cuda.api().module_load_data,
            cuda.api().module_get_function,
            cuda.api().module_unload,
            cuda.api().launch_kernel,
        ) else {
            return Err(Error::not_supported("the driver library has no calls for kernels"));
        };
        let text = CString::new(PTX).map_err(|_| Error::backend("the kernel's text has a NUL"))?;
        let mut module = CUmodule::NULL;
        // SAFETY: writes one handle; the image is a C string of PTX, which the driver reads within the call.
        let rc = context.with(|| unsafe { load(&raw mut module, text.as_ptr().cast()) })?;
        cuda.check("cuModuleLoadData", rc)?;
        // Owned from here on, so that it is unloaded whatever comes.
        let mut kernel = Self { context: context.clone(), module, function: CUfunction::NULL };
        // SAFETY: writes one handle; the module is live, the name a C string.
        let rc = context.with(|| unsafe { get(&raw mut kernel.function, module, NAME.as_ptr()) })?;
        cuda.check("cuModuleGetFunction", rc)?;
        Ok(kernel)
    }

    /// Queues the copying of the table's units on a stream of the context, which is current.
    ///
    /// # Safety
    /// Table and units stay allocated until the stream has done this, and kernels of the context reach all of the units.
    pub unsafe fn launch(&self, stream: CUstream, table: &Table) -> Result<()> {
        let cuda = self.context.cuda();
        let launch = cuda.api().launch_kernel.ok_or_else(|| Error::not_supported("no cuLaunchKernel"))?;
        let mut address = table.memory.span().addr();
        let mut arguments = [(&raw mut address).cast::<c_void>()];
        // SAFETY: function and stream are live and of the current context. The kernel has one argument of eight bytes, which the
        // driver copies within the call; it touches the table's first entries, one for each block, and the units, of which
        // the caller promises.
        let rc = unsafe {
            launch(
                self.function,
                table.units as c_uint,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        cuda.check("cuLaunchKernel", rc)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let cuda = self.context.cuda();
        let Some(unload) = cuda.api().module_unload else { return };
        // SAFETY: the module is ours, live, and given up here; the stream that launched it was drained.
        let outcome = self.context.with(|| unsafe { unload(self.module) });
        if let Err(why) = outcome.and_then(|rc| cuda.check("cuModuleUnload", rc)) {
            log::debug!("the copy kernel of CUDA device {}: {why}", self.context.device().ordinal);
        }
    }
}

/// What one launch copies, in page-locked memory that the GPU reads.
pub struct Table {
    memory: Pinned,
    entries: Vec<u8>,
    units: usize,
}

impl Table {
    /// An empty one.
    pub fn new(context: &Context) -> Result<Self> {
        let memory = Pinned::new(context, UNITS_MAX * ENTRY_BYTES)?;
        Ok(Self { memory, entries: Vec::new(), units: 0 })
    }

    /// Takes in as much of a piece as there is room for; returns how much.
    pub fn add(&mut self, to: u64, from: u64, len: u64) -> u64 {
        let mut done = 0;
        while done < len && self.units < UNITS_MAX {
            let unit = UNIT_BYTES.min(len - done);
            for word in [to + done, from + done, unit, 0] {
                self.entries.extend_from_slice(&word.to_ne_bytes());
            }
            self.units += 1;
            done += unit;
        }
        done
    }

    /// Puts what was taken in where the GPU sees it. No launch that reads the table is under way.
    pub fn publish(&mut self) -> Result<()> {
        self.memory.write(0, &self.entries)
    }

    /// Forgets everything, to be used again.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.units = 0;
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a table of {} units", self.units)
    }
}
