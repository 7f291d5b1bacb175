//! What a NIXL plugin's file says of itself, asked as NIXL asks it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use crate::sys::dl::Library;

/// The interface version that NIXL 1.x takes (`nixl_backend_abi.h`).
pub const API_VERSION: i32 = 1;

/// A plugin's own words.
#[derive(Debug, Clone)]
pub struct PluginFacts {
    /// Version of the interface that it speaks.
    pub api_version: i32,
    /// Name of the backend.
    pub name: String,
    /// Version of the plugin.
    pub version: String,
}

/// The beginning of NIXL's `nixlBackendPlugin`, whose layout `include/nixl_backend_abi.h` asserts.
#[repr(C)]
struct Plugin {
    api_version: c_int,
    create_engine: *const c_void,
    destroy_engine: *const c_void,
    name: Option<unsafe extern "C" fn() -> *const c_char>,
    version: Option<unsafe extern "C" fn() -> *const c_char>,
}

const _: () =
    assert!(std::mem::offset_of!(Plugin, name) == 24 && std::mem::offset_of!(Plugin, version) == 32);

/// Loads a plugin and calls its `nixl_plugin_init`. In a process that can be spared: the file may be anything.
///
/// The error is what the loader said, or what is missing.
pub fn plugin_facts(path: &Path) -> Result<PluginFacts, String> {
    let library = Library::load(path)?;
    let init = library.symbol(c"nixl_plugin_init")?;
    // SAFETY: in a NIXL plugin the symbol is a function without arguments that returns its table, or null.
    let plugin = unsafe {
        let init = std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const Plugin>(init);
        init()
    };
    if plugin.is_null() {
        return Err("nixl_plugin_init returned nothing".to_owned());
    }
    // SAFETY: a table that a plugin returns stays valid, and begins with these members in every version of the interface.
    let Plugin { api_version, name, version, .. } = unsafe { plugin.read() };
    if api_version != API_VERSION {
        return Ok(PluginFacts { api_version, name: String::new(), version: String::new() });
    }
    // SAFETY: functions of that table without arguments, which return C strings of the plugin's.
    let text = |function: Option<unsafe extern "C" fn() -> *const c_char>| unsafe {
        let text = function.map_or(std::ptr::null(), |function| function());
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Ok(PluginFacts { api_version, name: text(name), version: text(version) })
}
