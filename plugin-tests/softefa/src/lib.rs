//! softefa: a software EFA device.
//!
//! `libibverbs.so.1` and `libefa.so.1` made by this package (see `build.rs`) are found through `LD_LIBRARY_PATH` by an
//! unmodified libfabric, whose real `efa` provider then runs between processes of one machine. README.md says how to
//! use it; this is the map of the source:
//!
//! - [`install`]: puts the libraries where `LD_LIBRARY_PATH` can name them.
//! - [`abi`]: foreign struct layouts. [`exports`]: the foreign functions, thin, over what follows.
//! - [`config`], [`topology`], [`sysfs`], [`hwloc`]: which host this process is on and what devices that host has.
//! - [`shm`]: what processes share: a file per device, a mailbox per process, a channel per pair of processes.
//! - [`memory`], [`dmabuf`], [`queue`]: registrations, address handles, queue pairs, completion queues; private to a process.
//! - [`engine`]: moves operations from post to completion. [`copy`] is the only place that moves bytes; [`cuda`] those
//!   of GPUs, which other processes see in a [`bounce`] buffer.
//! - [`control`]: faults. [`counters`], [`trace`]: what can be seen from outside.
//!
//! Each process owns its half of every operation: the process that has the destination memory pulls the bytes into
//! it, after its own checks, so nobody writes into another process and a killed one can only stop answering.
#![allow(non_camel_case_types, reason = "foreign types keep their names")]

pub mod abi;
pub mod bounce;
pub mod config;
pub mod control;
pub mod copy;
pub mod counters;
pub mod cuda;
pub mod dmabuf;
pub mod engine;
pub mod exports;
pub mod hwloc;
pub mod install;
pub mod memory;
pub mod queue;
pub mod shm;
pub mod status;
pub mod sysfs;
pub mod topology;
pub mod trace;
