//! The boundary to NIXL's core, which is C++. The only place that knows that C++ exists.
//!
//! NIXL loads the plugin and calls [`nixl_plugin_init`]. That hands a table of Rust functions ([`types::EngineOps`]) to the shim
//! (`shim.cpp`), whose engine class has the virtual functions that NIXL expects and forwards each to one entry of the table
//! ([`calls`]). Everything runs behind a [`guard`]: no panic gets into C++, and an engine that panicked does no more work.

pub mod calls;
pub mod guard;
pub mod types;

use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use crate::types::MemKind;

/// The first thing that NIXL calls. Returns its `nixlBackendPlugin`, valid for the life of the process.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_init() -> *const c_void {
    if let Err(message) = guard::catch(crate::logging::init) {
        // The log is what just failed.
        eprintln!("nixl_plugin_init: no log, it panicked ({message})");
    }
    // SAFETY: the table is static.
    unsafe { types::nlf_shim_plugin(&raw const calls::OPS) }
}

/// The last thing that NIXL calls, and not always the last: it loads a plugin to ask for its options, unloads it, and loads it
/// again. Engines are gone by then and took their threads along, so that nothing is left to do.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_fini() {}

/// Memory kinds that an engine made on this machine would support, found out without making one.
// TODO(engine): ask the engine, which knows whether CUDA is there.
fn available_mems() -> Vec<MemKind> {
    vec![MemKind::Dram]
}

/// The name under which the documentation of NIXL knows the plugin.
const DEFAULT_NAME: &CStr = c"LIBFABRIC";

/// The name of the plugin is the name of its file: `libplugin_LIBFABRIC.so` and `libplugin_Libfabric.so` are the same.
unsafe extern "C" fn plugin_name() -> *const c_char {
    static NAME: OnceLock<CString> = OnceLock::new();
    let find = || own_path().and_then(|path| name_in_path(&path)).unwrap_or_else(|| DEFAULT_NAME.to_owned());
    guard::catch(|| NAME.get_or_init(find).as_ptr()).unwrap_or(DEFAULT_NAME.as_ptr())
}

unsafe extern "C" fn plugin_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The path under which the dynamic linker loaded this library.
fn own_path() -> Option<CString> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    let own_address = (&raw const calls::OPS).cast();
    // SAFETY: any address may be asked for, and `info` is valid for the write.
    if unsafe { libc::dladdr(own_address, info.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: all zero is a valid `Dl_info`, and dladdr succeeded.
    let name = unsafe { info.assume_init() }.dli_fname;
    // SAFETY: a name that is not null is a C string owned by the linker, which keeps it while the library is loaded.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_owned())
}

fn name_in_path(path: &CStr) -> Option<CString> {
    let file = Path::new(OsStr::from_bytes(path.to_bytes())).file_name()?.as_bytes();
    let name = file.strip_prefix(b"libplugin_")?.strip_suffix(b".so")?;
    CString::new(name).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::name_in_path;

    #[test]
    fn the_plugin_is_named_after_its_file() {
        let name = |path| name_in_path(path).map(|name| name.into_string().unwrap());
        assert_eq!(name(c"/opt/nixl/plugins/libplugin_LIBFABRIC.so").as_deref(), Some("LIBFABRIC"));
        assert_eq!(name(c"libplugin_Libfabric.so").as_deref(), Some("Libfabric"));
        for path in [c"/usr/bin/python3", c"", c"/", c"libplugin_.so", c"/x/libnixl_libfabric.so"] {
            assert_eq!(name(path), None, "{path:?}");
        }
    }
}
