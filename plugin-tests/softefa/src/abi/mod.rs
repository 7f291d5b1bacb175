//! Foreign layouts: the part of `infiniband/verbs.h` and `infiniband/efadv.h` that callers touch from outside.
//!
//! Callers reach most verbs through pointers inside these structs (the headers' inline functions), so size and order
//! of every field matter. `tests/layout.rs` checks them against installed headers.

pub mod efadv;
pub mod verbs;
