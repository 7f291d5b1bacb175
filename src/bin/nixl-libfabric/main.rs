//! The command that users run and paste when something is wrong.

mod arguments;
mod doctor;
mod top;
mod topology;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use nixl_libfabric::doctor::probe;
use nixl_libfabric::error::{Error, Result};

use arguments::usage;

const HELP: &str = "\
Usage: nixl-libfabric doctor [OPTIONS]
       nixl-libfabric doctor --listen [--port N], and on another host
       nixl-libfabric doctor --to HOST [--port N]
       nixl-libfabric top PID|ENDPOINT [OPTIONS]
       nixl-libfabric topology [OPTIONS]

doctor says what is here, what is missing, and what to do: OK, WARN or FAIL for each check. It ends with 1 if one failed.
With --listen on one host and --to on another it moves bytes between them by every pair of rails, and names those that drop.

Options:
  --watch SECONDS     how long the counters are watched (2)
  --nixl DIR          the NIXL in use: the folder with its libraries and its plugins/; python -m nixl_libfabric doctor knows it
  --plugin-dir DIR    the folder that NIXL would be given where NIXL_PLUGIN_DIR is not set
  --root DIR          read /sys, /proc and /dev below DIR
  --port N            of the TCP connection between --listen and --to (7677)
  --json              for programs

top shows what the rails of a process are doing: bytes, operations, errors. The process must serve its metrics (option
metrics, NIXL_LIBFABRIC_METRICS=127.0.0.1:0); ENDPOINT is an address and port, or a socket's path.

Options:
  --interval SECONDS  between two looks (1)
  --once              two looks, one table
  --json              for programs: one line for each interval

topology prints the machine as a tree, and which network devices serve which memory.

Options:
  --xml FILE          the machine that FILE describes (lstopo --of xml FILE), not this one
  --devices LIST      only devices that LIST allows: globs over names or PCI addresses, `!` forbids
                      (rdmap*,!rdmap79s0)
  --max-rails N       at most N devices, spread evenly
  --gpu-devices MAP   overrule the map: GPU=DEVICES;GPU=DEVICES (0000:53:00.0=rdmap79s0,rdmap80s0)
  --max-bw GBPS       bandwidth of one host buffer in Gb/s (option max_bw_per_dram_seg)
  --buffer WHAT       what would be chosen for numa:NODE or gpu:PCI-ADDRESS; may be repeated
  --json              for programs
  --svg               a picture: topology --svg > machine.svg

  --help              this text
  --version           version of the plugin
";

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)).and_then(|(text, well)| print(&text).map(|_| well)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("nixl-libfabric: {error}");
            ExitCode::from(2)
        }
    }
}

/// Returns whether somebody still reads.
fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Ok(()) => Ok(true),
        Err(error) => Err(Error::backend(format!("cannot write: {error}"))),
    }
}

/// What to print, and whether all is well.
fn run(mut words: impl Iterator<Item = OsString>) -> Result<(String, bool)> {
    let help = || (HELP.to_owned(), true);
    match words.next().as_deref().and_then(|word| word.to_str()) {
        Some("topology") => Ok(topology::run(words)?.map_or_else(help, |text| (text, true))),
        Some("top") => Ok(top::run(words, print)?.map_or_else(help, |()| (String::new(), true))),
        Some("doctor") => Ok(doctor::run(words)?.unwrap_or_else(help)),
        // Of the doctor's child processes; see `doctor::probe`.
        Some("probe") => Ok((probe::answer(&words.map(PathBuf::from).collect::<Vec<_>>()), true)),
        Some("--version" | "-V") => Ok((format!("nixl-libfabric {}\n", env!("CARGO_PKG_VERSION")), true)),
        Some("--help" | "-h" | "help") | None => Ok(help()),
        Some(other) => Err(usage(format!("no command `{other}`"))),
    }
}
