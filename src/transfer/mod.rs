//! Plans and requests: what becomes of a transfer between prepXfer and its last completion.
#![forbid(unsafe_code)]

mod copies;
pub mod plan;
mod rates;
mod request;
mod state;

pub use copies::{Copies, CopyList, CopyOver, CopyPair, Far};
pub use rates::Rates;
pub use request::{Next, Part, Transfer};
pub use state::PostState;
