//! Queue pairs and completion queues of this process.

pub mod cq;
pub mod lock;
pub mod qp;
pub mod work;
