//! Foreign tables loaded at run time: libfabric, hwloc, libcuda, libnrt. The only foreign struct layouts.

pub mod cuda;
pub mod cudart;
pub mod dl;
pub mod event;
pub mod files;
pub mod hwloc;
pub mod libfabric;
pub mod memfd;
pub mod net;
pub mod nrt;
pub mod numa;
pub mod page;
pub mod panic;
pub mod process;
pub mod tcp;
pub mod thread;
