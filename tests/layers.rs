//! Layers point down only: what a module names of this crate stands below it in this list, as ARCHITECTURE.md draws it.

use std::fs;
use std::path::Path;

/// From the top down. Modules of one row do not name one another.
const LAYERS: &[&[&str]] = &[
    &["doctor"],
    &["abi"],
    &["engine"],
    &["peer", "transfer"],
    &["memory", "notify", "progress"],
    &["rail", "config"],
    &["cuda"],
    &["fabric", "wire", "topology", "metrics"],
    &["sys"],
    &["types", "error", "logging", "sync"],
];

fn layer(module: &str) -> usize {
    let found = LAYERS.iter().position(|layer| layer.contains(&module));
    found.unwrap_or_else(|| panic!("module {module} stands in no layer"))
}

/// Modules that a file names by `crate::`.
fn named(text: &str) -> impl Iterator<Item = &str> {
    text.split("crate::").skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c == '_')).unwrap_or(rest.len());
        Some(&rest[..end]).filter(|word| !word.is_empty() && rest[end..].starts_with("::"))
    })
}

fn check(path: &Path, module: &str, wrong: &mut Vec<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            check(&entry.unwrap().path(), module, wrong);
        }
    } else if path.extension().is_some_and(|ending| ending == "rs") {
        let text = fs::read_to_string(path).unwrap();
        let upward = named(&text).filter(|other| *other != module && layer(other) <= layer(module));
        wrong.extend(upward.map(|other| format!("{}: names {other}", path.display())));
    }
}

#[test]
fn modules_name_only_what_stands_below_them() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if module != "lib" && module != "bin" {
            check(&path, &module, &mut wrong);
            seen += 1;
        }
    }
    assert_eq!(
        seen,
        LAYERS.iter().map(|layer| layer.len()).sum::<usize>(),
        "a layer names what is not there"
    );
    assert!(wrong.is_empty(), "arrows that point up:\n{}", wrong.join("\n"));
}

#[test]
fn names_are_found_in_paths() {
    let text =
        "use crate::rail::Rail; fn f(x: &crate::peer::Peer) {} use crate::{a, b}; pub(crate) fn g() {}";
    assert_eq!(named(text).collect::<Vec<_>>(), ["rail", "peer"]);
}
