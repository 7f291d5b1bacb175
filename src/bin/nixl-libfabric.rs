//! The command that users run and paste when something is wrong.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nixl_libfabric::error::{Error, Result};
use nixl_libfabric::topology::{
    Buffer, DeviceFilter, GpuDevices, Machine, RailDevice, RailMap, Report, SelectOptions, parse_buffer,
    rail_devices_from_sysfs, spread,
};

const HELP: &str = "\
Usage: nixl-libfabric topology [OPTIONS]

Prints the machine as a tree, and which network devices serve which memory.

Options:
  --xml FILE          the machine that FILE describes (lstopo --of xml FILE), not this one
  --devices LIST      only devices that LIST allows: globs over names or PCI addresses, `!` forbids
                      (rdmap*,!rdmap79s0)
  --max-rails N       at most N devices, spread evenly
  --gpu-devices MAP   overrule the map: GPU=DEVICES;GPU=DEVICES (0000:53:00.0=rdmap79s0,rdmap80s0)
  --max-bw GBPS       bandwidth of one host buffer in Gb/s (option max_bw_per_dram_seg)
  --buffer WHAT       what would be chosen for numa:NODE or gpu:PCI-ADDRESS; may be repeated
  --json              for programs
  --help              this text
  --version           version of the plugin
";

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).collect();
    match run(arguments).and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nixl-libfabric: {error}");
            ExitCode::from(2)
        }
    }
}

fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Error::backend(format!("cannot write: {error}"))),
    }
}

fn run(arguments: Vec<OsString>) -> Result<String> {
    match Arguments::read(arguments)? {
        Command::Help => Ok(HELP.to_owned()),
        Command::Version => Ok(format!("nixl-libfabric {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Topology(arguments) => topology(&arguments),
    }
}

fn topology(arguments: &Arguments) -> Result<String> {
    let (machine, mut devices) = match &arguments.xml {
        Some(path) => {
            let machine = Machine::from_xml(path)?;
            let devices = RailDevice::all_of(&machine);
            (machine, devices)
        }
        None => (Machine::discover(), devices_here()),
    };
    let allowed = arguments.devices.apply(&devices)?;
    devices = allowed.into_iter().map(|at| devices[at].clone()).collect();
    if let Some(max) = arguments.max_rails {
        devices = spread(&machine, &devices, max).into_iter().map(|at| devices[at].clone()).collect();
    }
    let map = RailMap::build(&machine, &devices, &arguments.options)?;
    let report = Report { machine: &machine, devices: &devices, map: &map, buffers: &arguments.buffers };
    Ok(if arguments.json { report.json() } else { report.text() })
}

/// The devices that libfabric would offer here, as the kernel lists them.
///
/// The seam for libfabric's own list: what `fi_getinfo` says is what the engine uses.
fn devices_here() -> Vec<RailDevice> {
    rail_devices_from_sysfs(Path::new("/"))
}

enum Command {
    Help,
    Version,
    Topology(Arguments),
}

#[derive(Default)]
struct Arguments {
    xml: Option<PathBuf>,
    devices: DeviceFilter,
    max_rails: Option<usize>,
    options: SelectOptions,
    buffers: Vec<Buffer>,
    json: bool,
}

impl Arguments {
    fn read(arguments: Vec<OsString>) -> Result<Command> {
        let mut words = arguments.into_iter();
        match words.next().as_deref().and_then(|word| word.to_str()) {
            Some("topology") => {}
            Some("--version" | "-V") => return Ok(Command::Version),
            Some("--help" | "-h" | "help") | None => return Ok(Command::Help),
            Some(other) => return Err(usage(format!("no command `{other}`"))),
        }
        let mut read = Self::default();
        while let Some(word) = words.next() {
            let mut option = Given::new(word, &mut words)?;
            match option.name.as_str() {
                "--xml" => read.xml = Some(option.value()?.into()),
                "--devices" => read.devices = DeviceFilter::parse(&option.text()?)?,
                "--max-rails" => read.max_rails = usize::try_from(option.number()?).ok(),
                "--gpu-devices" => read.options.gpu_devices = GpuDevices::parse(&option.text()?)?,
                "--max-bw" => read.options.max_bw_per_dram_seg_gbps = Some(option.number()?),
                "--buffer" => read.buffers.push(parse_buffer(&option.text()?)?),
                "--json" => read.json = true,
                "--help" | "-h" => return Ok(Command::Help),
                other => return Err(usage(format!("no option `{other}`"))),
            }
            if option.attached.is_some() {
                return Err(usage(format!("{} takes no value", option.name)));
            }
        }
        Ok(Command::Topology(read))
    }
}

/// An option of the command line: `--name value` or `--name=value`.
struct Given<'a> {
    name: String,
    /// What follows `=`, until somebody takes it.
    attached: Option<OsString>,
    rest: &'a mut dyn Iterator<Item = OsString>,
}

impl<'a> Given<'a> {
    fn new(word: OsString, rest: &'a mut dyn Iterator<Item = OsString>) -> Result<Self> {
        let word = word.into_string().map_err(|word| usage(format!("no option {}", word.display())))?;
        Ok(match word.split_once('=') {
            Some((name, value)) => Self { name: name.to_owned(), attached: Some(value.into()), rest },
            None => Self { name: word, attached: None, rest },
        })
    }

    fn value(&mut self) -> Result<OsString> {
        let value = self.attached.take().or_else(|| self.rest.next());
        value.ok_or_else(|| usage(format!("{} needs a value", self.name)))
    }

    fn text(&mut self) -> Result<String> {
        let value = self.value()?;
        value.into_string().map_err(|value| usage(format!("{}: {} is not text", self.name, value.display())))
    }

    fn number(&mut self) -> Result<u64> {
        let text = self.text()?;
        let number = text.parse().ok().filter(|&number| number > 0);
        number.ok_or_else(|| usage(format!("{} `{text}`: want a whole number from 1", self.name)))
    }
}

fn usage(what: String) -> Error {
    Error::invalid(what + "; see nixl-libfabric --help")
}
