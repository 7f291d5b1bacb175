//! Does the installed NIXL find this plugin, and can it load it?

use crate::abi::API_VERSION;
use crate::doctor::facts::{Facts, PLUGIN_FILES, PluginFile};
use crate::doctor::finding::Finding;

/// Versions of NIXL, as major and minor number, that the plugin is tested with.
const NIXL_TESTED: std::ops::RangeInclusive<(u32, u32)> = (1, 0)..=(1, 5);

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![nixl(facts)];
    match &facts.plugins.folder {
        None => findings.push(Finding::skip(
            "plugin",
            "which folder NIXL looks into is not known here: NIXL_PLUGIN_DIR is not set, and no NIXL was named. Ask by \
             `python -m nixl_libfabric doctor`, or with --nixl",
        )),
        Some((folder, _)) if facts.plugins.files.is_empty() => findings.push(Finding::fail(
            "plugin",
            format!("no {} in {}", PLUGIN_FILES[0], described(facts, &folder.display().to_string())),
            "pip install nixl-libfabric beside NIXL and leave NIXL_PLUGIN_DIR unset, or let it name a folder with this plugin and \
             all others that you use: NIXL looks nowhere else",
        )),
        Some(_) => findings.extend(facts.plugins.files.iter().map(|file| judge(facts, file))),
    }
    findings
}

fn described(facts: &Facts, path: &str) -> String {
    let by = facts.plugins.folder.as_ref().map_or("", |(_, by)| *by);
    format!("{path} ({by})")
}

fn judge(facts: &Facts, file: &PluginFile) -> Finding {
    let path = described(facts, &file.path.display().to_string());
    match (&file.loaded, file.ours) {
        (_, Some(false)) => Finding::fail(
            "plugin",
            format!("{path} is not this plugin: NIXL's own C++ one, or another"),
            "NIXL loads what is there: unset NIXL_PLUGIN_DIR where nixl-libfabric is installed by pip and enabled, or put this plugin's \
             file in its place",
        ),
        (Err(reason), _) => Finding::fail(
            "plugin",
            format!("{path} does not load: {reason}"),
            "NIXL says only that the plugin is missing. Install the file anew: a broken copy, a link that leads nowhere, and one \
             that was built for a newer glibc or another processor look like this",
        ),
        (Ok((version, _)), _) if *version != API_VERSION => Finding::fail(
            "plugin",
            format!("{path} speaks interface version {version}, and NIXL 1.x wants {API_VERSION}"),
            "install the version of this plugin that goes with your NIXL",
        ),
        (Ok((_, version)), _) => Finding::ok("plugin", format!("{path}, version {version}, loads")),
    }
}

fn nixl(facts: &Facts) -> Finding {
    let Some(folder) = &facts.plugins.nixl else {
        return Finding::skip(
            "nixl",
            "no NIXL was named; `python -m nixl_libfabric doctor` finds that of its Python",
        );
    };
    if let Some(Err(difference)) = &facts.plugins.interface {
        return Finding::fail(
            "nixl",
            difference.clone(),
            "no backend of this plugin starts there: install NIXL 1.0 to 1.5, or a plugin that is made for yours",
        );
    }
    let Some(version) = &facts.plugins.nixl_version else {
        return Finding::warn(
            "nixl",
            format!("{}: of an unknown version", folder.display()),
            "the plugin is tested with NIXL 1.0 to 1.5 as their wheels have them",
        );
    };
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let seen = format!("{version} ({})", folder.display());
    if NIXL_TESTED.contains(&number) {
        Finding::ok("nixl", seen)
    } else {
        Finding::warn(
            "nixl",
            format!("{seen} is not among the versions that the plugin is tested with, 1.0 to 1.5"),
            "NIXL may have changed what it expects of a plugin: install one of these, or look for a newer plugin",
        )
    }
}
