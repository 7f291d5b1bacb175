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
    &["rail", "config", "neighbour"],
    &["cuda"],
    &["fabric", "wire", "topology", "metrics"],
    &["sys"],
    &["types", "error", "logging", "sync"],
];

fn layer(module: &str) -> usize {
    let found = LAYERS.iter().position(|layer| layer.contains(&module));
    found.unwrap_or_else(|| panic!("module {module} stands in no layer"))
}

/// Modules that a file names by `crate::`, also in groups: `crate::{rail::Rail, peer}`.
fn named(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => found.extend(heads(group)),
            // What is not followed by a path is a macro or a function of the crate, unless it is imported.
            None => found.extend(word(rest).filter(|word| leads_on(&rest[word.len()..]))),
        }
    }
    found
}

/// Where the items of a group begin, as far as its closing brace.
fn heads(group: &str) -> Vec<&str> {
    let (mut depth, mut heads, mut begins) = (0, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => begins = true,
            _ if begins && !c.is_whitespace() => {
                heads.extend(word(&group[at..]).filter(|word| *word != "self"));
                begins = false;
            }
            _ => {}
        }
    }
    heads
}

/// The name of a module at the beginning.
fn word(text: &str) -> Option<&str> {
    let end = text.find(|c: char| !(c.is_ascii_lowercase() || c == '_')).unwrap_or(text.len());
    Some(&text[..end]).filter(|word| !word.is_empty())
}

/// Whether what stands behind a word makes it a module: more of a path, or the end of `use`.
fn leads_on(after: &str) -> bool {
    ["::", ";", " as "].iter().any(|next| after.starts_with(next))
}

fn check(path: &Path, module: &str, wrong: &mut Vec<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            check(&entry.unwrap().path(), module, wrong);
        }
    } else if path.extension().is_some_and(|ending| ending == "rs") {
        let text = fs::read_to_string(path).unwrap();
        let upward =
            named(&text).into_iter().filter(|other| *other != module && layer(other) <= layer(module));
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
    let text = "use crate::rail::Rail; fn f(x: &crate::peer::Peer) {} pub(crate) fn g() { crate::help!() }";
    assert_eq!(named(text), ["rail", "peer"]);
}

#[test]
fn names_are_found_in_imports_of_modules_and_of_groups() {
    assert_eq!(named("use crate::wire; use crate::notify as news;"), ["wire", "notify"]);
    let text = "use crate::{\n    error::{Error, Result}, rail,\n    peer::{link::{Link, State}, Peer as Other}, Engine, self,\n};
        use crate::{sys};";
    assert_eq!(named(text), ["error", "rail", "peer", "sys"]);
}
