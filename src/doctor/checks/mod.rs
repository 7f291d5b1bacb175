//! From facts to findings. Pure: the same facts, the same findings.

mod devices;
mod environment;
mod gpu;
mod libfabric;
mod network;
mod plugin;
#[cfg(test)]
mod tests;

pub(super) use devices::SILENT_DROP;

use super::{Facts, Finding};

/// Judges everything, in the order in which it matters.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    [plugin::check, libfabric::check, devices::check, gpu::check, environment::check, network::check]
        .iter()
        .flat_map(|check| check(facts))
        .collect()
}

/// The first few of a list, and how many more there are.
fn few<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 4;
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let more = items.len().saturating_sub(SHOWN);
    let shown = items.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}
