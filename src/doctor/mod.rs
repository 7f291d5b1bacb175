//! What a support engineer asks first, asked by the machine: `nixl-libfabric doctor`.
//!
//! [`Facts`] are what can be seen here; [`facts::Facts::collect`] reads files, and asks child processes about foreign
//! libraries ([`probe`]), because one that crashes or hangs is a finding and must not be the end. `checks` judge the facts
//! and are pure: [`Finding`]s come out, each with what to do. [`exchange`] moves bytes between two hosts, by every pair of
//! rails.
#![forbid(unsafe_code)]

mod checks;
pub mod exchange;
mod facts;
mod files;
mod finding;
mod metadata;
pub mod probe;

pub use checks::judge;
pub use facts::{Facts, Options};
pub use finding::{Finding, Verdict, json, text, worst};
