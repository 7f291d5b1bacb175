//! NIXL backend plugin that moves data over EFA through libfabric.
//!
//! ARCHITECTURE.md has the map: layers, laws, and one transfer followed through the files.

pub mod abi;
pub mod config;
pub mod cuda;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod fabric;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod neighbour;
pub mod notify;
pub mod peer;
pub mod progress;
pub mod rail;
pub mod sync;
pub mod sys;
pub mod topology;
pub mod transfer;
pub mod types;
pub mod wire;
