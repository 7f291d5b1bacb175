//! Plans and requests: what becomes of a transfer between prepXfer and its last completion.
#![forbid(unsafe_code)]

mod local;
pub mod plan;
mod rates;
mod request;
mod state;

pub use local::{LocalCopies, LocalPiece, LocalTransfer, Streams};
pub use rates::Rates;
pub use request::{Next, Part, Transfer};
pub use state::PostState;
