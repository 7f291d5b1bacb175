//! Every option: key, environment variable, default, range, help. One table, [`OPTIONS`].
//!
//! An option's value is the user's parameter, else the environment variable `NIXL_LIBFABRIC_<KEY>`, else the
//! default. A bad value is an error, but for the options that the C++ plugin has, too; a key nobody knows is a warning,
//! because NIXL passes keys of its own.
#![forbid(unsafe_code)]

mod options;
mod value;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

pub use options::{Config, OPTIONS};
pub use value::{Fabric, SameHost, Wait};

use crate::error::{Error, Result};

/// One row of the table.
#[derive(Debug)]
pub struct Spec {
    /// Key among NIXL's backend parameters.
    pub key: &'static str,
    /// Default, in the form in which a user would write it.
    pub default: &'static str,
    /// Values that are taken.
    pub range: Range,
    /// One line of help.
    pub help: &'static str,
}

/// Options that NIXL's C++ plugin has. It starts with any value: what it cannot read is its default, with a warning. A host that
/// runs with it must not be refused here, since some go on without a backend and crash.
const STOCK: &[&str] =
    &["num_threads", "split_batch_size", "post_queue_size", "striping_threshold", "max_bw_per_dram_seg"];

/// Slices handed to a rail at a time where the user leaves that to us.
const BATCH_SLICES: usize = 1024;

/// Values that an option takes.
#[derive(Debug, Clone, Copy)]
pub enum Range {
    /// A whole number between the two, in the unit. Where the unit is bytes, a suffix K, M or G (powers of 1024) is read.
    Number(u64, u64, &'static str),
    /// One of these words.
    Word(&'static [&'static str]),
    /// Text of this form.
    Text(&'static str),
}

impl Spec {
    /// The environment variable that sets it.
    pub fn env_name(&self) -> String {
        format!("NIXL_LIBFABRIC_{}", self.key.to_ascii_uppercase())
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(low, high, "") => write!(f, "{low} to {high}"),
            Self::Number(low, high, unit) => write!(f, "{low} to {high} {unit}"),
            Self::Word(words) => {
                let shown: Vec<_> = words.iter().map(|w| if w.is_empty() { "(empty)" } else { w }).collect();
                f.write_str(&shown.join(", "))
            }
            Self::Text(form) => f.write_str(form),
        }
    }
}

impl Config {
    /// Reads the user's parameters and this process's environment. Warnings go to the log.
    pub fn from_params(params: &BTreeMap<String, String>) -> Result<Self> {
        let (config, warnings) = Self::from_lookup(params, process_env)?;
        for warning in warnings {
            log::warn!("{warning}");
        }
        Ok(config)
    }

    /// As [`from_params`](Self::from_params), with the environment as a closure; returns the warnings.
    pub fn from_lookup(
        params: &BTreeMap<String, String>,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<(Self, Vec<String>)> {
        let mut warnings = Vec::new();
        let config = Self::read(|spec| {
            let value = source(spec, params, &env);
            if STOCK.contains(&spec.key) { readable(spec, value, &mut warnings) } else { value }
        })?;
        let unknown = params.keys().filter(|key| OPTIONS.iter().all(|spec| spec.key != key.as_str()));
        warnings.extend(unknown.map(|key| unknown_key(key)));
        Ok((config, warnings))
    }

    /// The error of a transfer that is not done after `elapsed`, if that is longer than `transfer_timeout_ms`.
    pub fn late(&self, elapsed: Duration) -> Option<Error> {
        let limit = self.transfer_timeout;
        (!limit.is_zero() && elapsed > limit).then(|| {
            Error::backend(format!("it was not done after {} ms (transfer_timeout_ms)", limit.as_millis()))
        })
    }

    /// Slices handed to a rail at a time. The C++ plugin's 0 hands everything to its threads, which is no batch of any size.
    pub fn batch_slices(&self) -> u32 {
        if self.split_batch_size == 0 { BATCH_SLICES as u32 } else { self.split_batch_size as u32 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::read(|spec| Value { text: spec.default.into(), from: "the default".into() })
            .expect("a test reads every default")
    }
}

/// What an option is set to before the user's parameters: the environment variable, else the default.
///
/// NIXL shows these to users (`get_backend_options`), who often pass them all back as parameters; with the
/// environment left out, that would undo what the environment says.
pub fn defaults() -> Vec<(String, String)> {
    defaults_from(process_env)
}

fn defaults_from(env: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let none = BTreeMap::new();
    OPTIONS.iter().map(|spec| (spec.key.to_owned(), source(spec, &none, &env).text)).collect()
}

/// The table as Markdown, for the README.
pub fn markdown_table() -> String {
    let mut table = String::from("| Option | Default | Values | Meaning |\n|---|---|---|---|\n");
    for spec in OPTIONS {
        let default = if spec.default.is_empty() { String::new() } else { format!("`{}`", spec.default) };
        writeln!(table, "| `{}` | {default} | {} | {} |", spec.key, spec.range, spec.help)
            .expect("a String takes every write");
    }
    table
}

/// A value and the words that say where it came from.
struct Value {
    text: String,
    from: String,
}

fn process_env(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// An empty environment variable counts as unset.
fn source(spec: &Spec, params: &BTreeMap<String, String>, env: &impl Fn(&str) -> Option<String>) -> Value {
    if let Some(text) = params.get(spec.key) {
        return Value { text: text.clone(), from: "the backend's parameters".into() };
    }
    let name = spec.env_name();
    match env(&name).filter(|text| !text.is_empty()) {
        Some(text) => Value { text, from: name },
        None => Value { text: spec.default.into(), from: "the default".into() },
    }
}

/// The value, or in place of one that cannot be used the nearest that can, else the default, with a warning.
fn readable(spec: &Spec, value: Value, warnings: &mut Vec<String>) -> Value {
    let Err(why) = <u64 as value::FromText>::from_text(&value.text, spec.range) else { return value };
    let text = value::nearest(&value.text, spec.range)
        .map_or_else(|| spec.default.to_owned(), |near| near.to_string());
    warnings.push(format!("{}; going on with {text}", bad_value(spec, &value, &why)));
    Value { text, ..value }
}

fn bad_value(spec: &Spec, value: &Value, why: &str) -> Error {
    let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
    Error::invalid(format!(
        "option {} has the value `{}`{why}, set by {}; it takes {}",
        spec.key, value.text, value.from, spec.range
    ))
}

fn unknown_key(key: &str) -> String {
    let near: Vec<_> = OPTIONS.iter().map(|spec| spec.key).filter(|known| is_near(key, known)).collect();
    if near.is_empty() {
        format!("option `{key}` is not known and is ignored; the README lists the options")
    } else {
        format!("option `{key}` is not known and is ignored; did you mean {}?", near.join(" or "))
    }
}

/// Whether one is a typing error, an upper-case form or a part of the other.
fn is_near(written: &str, known: &str) -> bool {
    let written = written.to_ascii_lowercase().replace('-', "_");
    let part = written.len() >= 4 && (known.contains(&written) || written.contains(known));
    part || edit_distance(&written, known) <= known.len() / 4
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
