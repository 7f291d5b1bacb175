//! Metrics: their table, the text in which Prometheus reads them, and the endpoint that serves it.
//!
//! Nothing here knows rails, peers or transfers: an engine is a [`Source`], which is asked when somebody looks. So a metric that
//! nobody reads costs what its counter costs.
#![forbid(unsafe_code)]

mod address;
mod endpoint;
mod histogram;
mod http;
pub mod read;
mod table;
mod text;

pub use self::address::Address;
pub use self::endpoint::Endpoint;
pub use self::histogram::Histogram;
pub use self::table::{Kind, METRICS, Metric, Spec, markdown_table};
pub use self::text::{Number, Samples, label_of};

/// Something that has metrics: an engine.
pub trait Source: Send + Sync {
    /// Adds what it has to tell. Waits for nobody.
    fn gather(&self, samples: &mut Samples);
}

/// What the name of the memory file begins with by which a process tells its endpoint: see [`read::endpoint_of`].
const ANNOUNCEMENT: &str = "nixl-libfabric-metrics:";

#[cfg(test)]
mod tests;
