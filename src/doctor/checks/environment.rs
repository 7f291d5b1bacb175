//! Variables that change what happens.

use std::collections::BTreeMap;

use crate::config::{Config, OPTIONS};
use crate::cuda::{self, neuron};
use crate::doctor::facts::Facts;
use crate::doctor::finding::Finding;

/// Lists of plugins that serving programs load, where they are set; ours is not loaded unless it is in them.
const PLUGIN_LISTS: [&str; 2] = ["VLLM_PLUGINS", "SGLANG_PLUGINS"];
/// Name of the entry point that those lists take.
const ENTRY_POINT: &str = "nixl_libfabric";
/// Beginning of the variables that are options of this plugin.
const PREFIX: &str = "NIXL_LIBFABRIC_";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let set = &facts.environment;
    let mut findings = Vec::new();
    if let Err(error) = Config::from_lookup(&BTreeMap::new(), |name| set.get(name).cloned()) {
        findings.push(Finding::fail(
            "environment",
            error.to_string(),
            "correct or unset it: no backend starts with it",
        ));
    }
    findings.extend(set.keys().filter(|name| is_unknown_option(name)).map(|name| {
        Finding::warn(
            "environment",
            format!("{name} is no option of this version and does nothing"),
            nearest(name),
        )
    }));
    findings.extend(provider(facts));
    if set.get("FI_EFA_USE_DEVICE_RDMA").is_some_and(|value| is_off(value)) {
        findings.push(Finding::warn(
            "environment",
            "FI_EFA_USE_DEVICE_RDMA turns off the NIC's RDMA: every byte is copied by the processor",
            "unset it",
        ));
    }
    for name in PLUGIN_LISTS {
        if set.get(name).is_some_and(|list| list.split(',').all(|plugin| plugin.trim() != ENTRY_POINT)) {
            findings.push(Finding::warn(
                "environment",
                format!("{name} lists plugins, and {ENTRY_POINT} is not among them"),
                format!("add it; without it NIXL_PLUGIN_DIR must be set by you (python -m {ENTRY_POINT} plugin-dir)"),
            ));
        }
    }
    if findings.is_empty() {
        let shown: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let seen = if shown.is_empty() { "nothing is set".to_owned() } else { shown.join(" ") };
        findings.push(Finding::ok("environment", seen));
    }
    findings
}

fn is_off(value: &str) -> bool {
    ["0", "false", "no", "off"].contains(&value.to_ascii_lowercase().as_str())
}

fn is_unknown_option(name: &str) -> bool {
    name.starts_with(PREFIX)
        && OPTIONS.iter().all(|option| option.env_name() != name)
        && ![cuda::LIBRARY_ENV, neuron::LIBRARY_ENV].contains(&name)
}

/// The option whose name shares most letters at both ends.
fn nearest(name: &str) -> String {
    let alike = |other: &str| {
        let from_start = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let from_end = name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
        from_start + from_end
    };
    let names = OPTIONS.iter().map(crate::config::Spec::env_name);
    names.max_by_key(|other| alike(other)).map_or_else(String::new, |other| format!("did you mean {other}?"))
}

/// `FI_PROVIDER` names providers, or excludes those after `^`.
fn provider(facts: &Facts) -> Option<Finding> {
    let value = facts.environment.get("FI_PROVIDER")?;
    let (excludes, list) = value.strip_prefix('^').map_or((false, value.as_str()), |list| (true, list));
    let names_efa = list.split([',', ';']).any(|name| name.trim() == "efa");
    (facts.has_efa() && names_efa == excludes).then(|| {
        Finding::warn(
            "environment",
            format!("FI_PROVIDER={value} keeps libfabric from the EFA devices that are here"),
            "unset it: this plugin takes efa by itself where it is offered",
        )
    })
}
