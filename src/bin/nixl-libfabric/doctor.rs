//! `nixl-libfabric doctor`: what is here, what is missing, and what to do.

use std::ffi::OsString;

use nixl_libfabric::doctor::{self, Facts, Options, Verdict, exchange};
use nixl_libfabric::error::Result;

use crate::arguments::{Given, usage};

/// Runs the command; `None` asks for help. Whether the machine is well comes with the text.
pub fn run(mut words: impl Iterator<Item = OsString>) -> Result<Option<(String, bool)>> {
    let (mut options, mut json) = (Options::default(), false);
    let (mut listens, mut to, mut port) = (false, None, exchange::PORT);
    while let Some(word) = words.next() {
        let mut option = Given::new(word, &mut words)?;
        match option.name.as_str() {
            "--nixl" => options.nixl = Some(option.value()?.into()),
            "--plugin-dir" => options.plugin_dir = Some(option.value()?.into()),
            "--watch" => options.watch = option.seconds(0)?,
            "--root" => options.root = option.value()?.into(),
            "--listen" => listens = true,
            "--to" => to = Some(option.text()?),
            "--port" => port = tcp_port(&option.text()?)?,
            "--json" => json = true,
            "--help" | "-h" => return Ok(None),
            other => return Err(usage(format!("no option `{other}`"))),
        }
        option.end()?;
    }
    let findings = match (listens, to) {
        (true, Some(_)) => return Err(usage("--listen on one host, --to on the other")),
        (true, None) => exchange::listen(port, |port| {
            eprintln!("listening on port {port} for `doctor --to` of another host");
        })?,
        (false, Some(host)) => exchange::connect(&host, port)?,
        (false, None) => doctor::judge(&Facts::collect(&options)),
    };
    let text = if json { doctor::json(&findings) } else { doctor::text(&findings) };
    Ok(Some((text, doctor::worst(&findings) < Verdict::Fail)))
}

fn tcp_port(text: &str) -> Result<u16> {
    text.parse().map_err(|_| usage(format!("--port `{text}`: want 0 to 65535")))
}
