//! Codecs of everything that crosses the network: pure, no I/O. WIRE.md has the formats.
//!
//! Every decoder checks every length and count before it uses it, and allocates no more than a small multiple of
//! the bytes it was given.
#![forbid(unsafe_code)]

pub mod blob;
pub mod control;
pub mod gpu;
pub mod handshake;
pub mod host;
pub mod immediate;
pub mod serdes;
pub mod staging;
pub mod stock;

pub use blob::{
    CONNECTION_INFO_BYTES_MAX, ConnectionInfo, EndpointName, Extension, PublicMetadata, RAILS_MAX,
};
pub use control::{Body, ControlMessage, Fragment, FragmentCursor};
pub use gpu::Shareable;
pub use handshake::{Handshake, HandshakeExtension};
pub use host::{BoardEntry, HostInfo};
pub use immediate::Immediate;
pub use staging::Staging;
pub use stock::{StockFirst, StockFragment, StockFragmentCursor};

/// Largest control message in bytes: what a stock receiver has posted.
pub const CONTROL_BYTES_MAX: usize = 8192;

#[cfg(test)]
mod tests;
