//! The boundary to NIXL's core, which is C++. The only place that knows that C++ exists.
//!
//! NIXL loads the plugin and calls [`nixl_plugin_init`]. That hands a table of Rust functions ([`types::EngineOps`]) to the shim
//! (`shim.cpp`), whose engine class has the virtual functions that NIXL expects and forwards each to one entry of the table
//! ([`calls`]). Everything runs behind a [`guard`]: no panic gets into C++, and an engine that panicked does no more work.

pub mod calls;
mod facts;
pub mod guard;
pub mod layout;
mod name;
pub mod types;
pub mod vtable;

pub use facts::{API_VERSION, PluginFacts, plugin_facts};

use std::ffi::c_void;

/// The first thing that NIXL calls. Returns its `nixlBackendPlugin`, valid for the life of the process.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_init() -> *const c_void {
    if let Err(message) = crate::sys::panic::catch(crate::logging::init) {
        // The log is what just failed.
        eprintln!("nixl_plugin_init: starting the log panicked ({message}); going on without a log");
    }
    // SAFETY: the table is static.
    unsafe { types::nlf_shim_plugin(&raw const calls::OPS) }
}

/// NIXL calls this when it unloads the plugin, which it may load again: it does so just to ask for the options.
///
/// Engines are gone by then and took their threads along; what is left is static.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_fini() {}
