//! `nixl-libfabric doctor`: what is here, what is missing, and what to do.

use std::ffi::OsString;
use std::time::Duration;

use nixl_libfabric::doctor::{self, Facts, Options, Verdict};
use nixl_libfabric::error::Result;

use crate::arguments::{Given, usage};

/// Longest time for which the counters are watched.
const WATCH_SECONDS_MAX: u64 = 3600;

/// Runs the command; `None` asks for help. Whether the machine is well comes with the text.
pub fn run(mut words: impl Iterator<Item = OsString>) -> Result<Option<(String, bool)>> {
    let (mut options, mut json) = (Options::default(), false);
    while let Some(word) = words.next() {
        let mut option = Given::new(word, &mut words)?;
        match option.name.as_str() {
            "--nixl" => options.nixl = Some(option.value()?.into()),
            "--plugin-dir" => options.plugin_dir = Some(option.value()?.into()),
            "--watch" => options.watch = seconds(&option.text()?)?,
            "--root" => options.root = option.value()?.into(),
            "--json" => json = true,
            "--help" | "-h" => return Ok(None),
            other => return Err(usage(format!("no option `{other}`"))),
        }
        option.end()?;
    }
    let findings = doctor::judge(&Facts::collect(&options));
    let text = if json { doctor::json(&findings) } else { doctor::text(&findings) };
    Ok(Some((text, doctor::worst(&findings) < Verdict::Fail)))
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds = text.parse().ok().filter(|seconds| *seconds <= WATCH_SECONDS_MAX);
    let wanted = || usage(format!("--watch `{text}`: want seconds, 0 to {WATCH_SECONDS_MAX}"));
    seconds.map(Duration::from_secs).ok_or_else(wanted)
}
