//! A libfabric made of Rust, decided by a seed.
//!
//! libfabric's objects are structures with tables of functions. Here the tables are filled in Rust, so that the real
//! engine - rails, peers, transfers, notifications - runs above a network that is a list of things to happen: a piece
//! of data lands, a message is matched, a completion appears. A seed decides when, in what order, and what goes wrong.
//! Several agents live in one process and one thread, in virtual time; the same seed gives the same run.
//!
//! - [`world`]: the network, its faults, and the rules of use that it watches over;
//! - [`provider`]: the tables of functions;
//! - [`agents`]: random NIXL calls on several agents, held against a small model;
//! - [`pair`]: two agents under a test's own hands;
//! - [`clock`]: virtual time.
#![allow(
    clippy::needless_pass_by_value,
    clippy::should_implement_trait,
    clippy::similar_names,
    clippy::struct_excessive_bools,
    clippy::type_complexity,
    reason = "a test bed: its profile is a list of switches, and its dice have a method `next`"
)]
// The C headers document what the tables hold.
#![allow(clippy::doc_markdown)]

pub mod agents;
pub mod clock;
pub mod log;
pub mod memory;
pub mod network;
pub mod pair;
pub mod provider;
pub mod rng;
pub mod world;
