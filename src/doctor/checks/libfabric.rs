//! Which libfabric it would be, whether there will be a second one, and what it offers.

use std::collections::BTreeMap;
use std::path::Path;

use super::few;
use crate::doctor::facts::{Facts, Loaded};
use crate::doctor::finding::Finding;
use crate::fabric::efa;

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    match &facts.libfabric {
        None => Vec::new(),
        Some(Err(reason)) => vec![Finding::fail(
            "libfabric",
            reason.clone(),
            "on EC2 install the EFA installer's into the image; elsewhere the distribution's. LD_LIBRARY_PATH and the option \
             libfabric_path (NIXL_LIBFABRIC_LIBFABRIC_PATH) decide which one is taken",
        )],
        Some(Ok(loaded)) => {
            let mut findings = vec![Finding::ok(
                "libfabric",
                format!("{}.{} ({})", loaded.version.0, loaded.version.1, loaded.origin),
            )];
            findings.extend(second_copies(facts, loaded));
            findings.push(offers(facts, loaded));
            findings
        }
    }
}

/// Two copies in one process share no state: the second one finds the devices' queues taken, or breaks in other ways.
fn second_copies(facts: &Facts, loaded: &Loaded) -> Vec<Finding> {
    let canonical = |path: &str| Path::new(path).canonicalize().unwrap_or_else(|_| path.into());
    let ours = canonical(&loaded.origin);
    let judge = |(library, brought): &(std::path::PathBuf, Result<Vec<String>, String>)| {
        let library = library.display();
        match brought {
            Err(reason) => Finding::warn(
                "second-libfabric",
                format!("{library} does not load: {reason}"),
                "NCCL goes on without it, over TCP. Its libfabric is missing, or another than it was linked with is found first",
            ),
            Ok(files) => match files.iter().find(|file| canonical(file) != ours) {
                Some(other) => Finding::warn(
                    "second-libfabric",
                    format!(
                        "NCCL's plugin {library} brings {other}, and this plugin would take {}",
                        loaded.origin
                    ),
                    format!(
                        "which of the two a process has depends on who is first, and it may have both. Make it one: \
                         NIXL_LIBFABRIC_LIBFABRIC_PATH={other}, or its folder first in LD_LIBRARY_PATH"
                    ),
                ),
                None if files.is_empty() => Finding::ok("second-libfabric", format!("{library} brings none")),
                None => Finding::ok("second-libfabric", format!("{library} has the same file")),
            },
        }
    };
    facts.nccl.iter().map(judge).collect()
}

fn offers(facts: &Facts, loaded: &Loaded) -> Finding {
    let mut domains: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (provider, domain) in &loaded.offers {
        let known = domains.entry(provider).or_default();
        if !known.contains(&domain.as_str()) {
            known.push(domain);
        }
    }
    let seen = domains.iter().map(|(provider, domains)| format!("{provider} on {}", few(domains)));
    let seen = seen.collect::<Vec<_>>().join("; ");
    if domains.is_empty() {
        return Finding::fail(
            "provider",
            "libfabric offers no provider with reliable datagrams and RMA",
            "look at FI_PROVIDER, and at what `fi_info` of the same libfabric says",
        );
    }
    let efa = domains.iter().find(|(provider, _)| efa::is_efa(provider));
    match efa {
        Some((_, domains)) if domains.len() < facts.rdma.iter().filter(|device| device.efa).count() => {
            Finding::warn(
                "provider",
                format!("{seen}; the kernel has more EFA devices than these {}", domains.len()),
                "were all of them given to this container? The check device-files says which cannot be opened",
            )
        }
        None if facts.has_efa() => Finding::fail(
            "provider",
            format!("there are EFA devices, and libfabric offers none of them, only {seen}"),
            "this libfabric has no efa provider, or FI_PROVIDER excludes it, or the devices cannot be opened (the checks environment and \
             device-files). The EFA installer's libfabric in /opt/amazon/efa has it; set require_rdma so that nothing starts \
             without it",
        ),
        _ => Finding::ok("provider", seen),
    }
}
