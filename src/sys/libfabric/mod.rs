//! libfabric's C interface, as far as this plugin uses it.
//!
//! Layouts are those of libfabric 1.17 (ABI FABRIC_1.3 to 1.6), which every later 1.x and 2.x release still accepts
//! under the symbol versions that [`Api::load`] asks for. Structures that grow at their end in later releases, and
//! that we hand in, have a zeroed tail here, so that a newer library reads zeroes ("default") and never past the end.
//! `tests/libfabric_layout.rs` compares every structure, field and constant with the installed headers.

#![allow(non_camel_case_types)]
// The C headers document these.
#![allow(missing_docs, clippy::doc_markdown)]

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;

use super::dl::{self, Library};

mod constants;
mod types;

pub use constants::*;
pub use types::*;

/// A structure's name, its size, and its fields with their offsets, for the layout test.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub name: &'static str,
    pub size: usize,
    pub fields: &'static [(&'static str, usize)],
}

/// The functions that libfabric exports and we call; everything else goes through the tables of its objects.
///
/// A test can fill it with functions of its own and be the fabric.
#[derive(Debug, Clone, Copy)]
pub struct Api {
    pub getinfo: unsafe extern "C" fn(
        version: u32,
        node: *const c_char,
        service: *const c_char,
        flags: u64,
        hints: *const fi_info,
        info: *mut *mut fi_info,
    ) -> c_int,
    pub freeinfo: unsafe extern "C" fn(info: *mut fi_info),
    pub fabric: unsafe extern "C" fn(
        attr: *mut fi_fabric_attr,
        fabric: *mut *mut fid_fabric,
        context: *mut c_void,
    ) -> c_int,
    pub version: unsafe extern "C" fn() -> u32,
    pub strerror: unsafe extern "C" fn(errnum: c_int) -> *const c_char,
}

/// File names tried when no libfabric is in the process yet. The EFA installer puts its own into `/opt/amazon/efa`.
const FILE_NAMES: [&str; 3] =
    ["libfabric.so.1", "/opt/amazon/efa/lib/libfabric.so.1", "/opt/amazon/efa/lib64/libfabric.so.1"];

impl Api {
    /// Resolves the functions, and says from which file they came.
    pub fn load(path: Option<&Path>) -> Result<(Self, String), String> {
        let library = Library::open("libfabric", path, &FILE_NAMES)?;
        let getinfo = library.versioned_symbol(c"fi_getinfo", c"FABRIC_1.3")?;
        let freeinfo = library.versioned_symbol(c"fi_freeinfo", c"FABRIC_1.3")?;
        let fabric = library.versioned_symbol(c"fi_fabric", c"FABRIC_1.1")?;
        let version = library.versioned_symbol(c"fi_version", c"FABRIC_1.0")?;
        let strerror = library.versioned_symbol(c"fi_strerror", c"FABRIC_1.0")?;
        let origin = dl::file_of(getinfo as usize)
            .map_or_else(|| library.origin().to_owned(), |path| path.to_string_lossy().into_owned());
        // SAFETY: under these symbol versions the functions have the signatures declared above (rdma/fabric.h), and
        // the library is never unloaded, so that the pointers stay good.
        let api = unsafe {
            use std::mem::transmute;
            Self {
                getinfo: transmute::<*mut c_void, unsafe extern "C" fn(_, _, _, _, _, _) -> _>(getinfo),
                freeinfo: transmute::<*mut c_void, unsafe extern "C" fn(_)>(freeinfo),
                fabric: transmute::<*mut c_void, unsafe extern "C" fn(_, _, _) -> _>(fabric),
                version: transmute::<*mut c_void, unsafe extern "C" fn() -> _>(version),
                strerror: transmute::<*mut c_void, unsafe extern "C" fn(_) -> _>(strerror),
            }
        };
        Ok((api, origin))
    }
}
