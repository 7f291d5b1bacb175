//! Prints the environment of one software host, or runs a command in it; shows traces and counters.

use std::env;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use softefa::config::Config;
use softefa::{hwloc, install, sysfs, topology, trace};

const USAGE: &str = "\
usage: softefa-env [OPTION]... [-- COMMAND [ARGUMENT]...]   print the variables of a host, or run a command with them
       softefa-env [OPTION]... counters                     print the counters of the host's devices
       softefa-env trace FILE                               print a trace (SOFTEFA_DIR/trace-*)

  --host NAME        the host to play (a)
  --topology TYPE    instance type, or FILE.json[#TYPE] (p5.48xlarge)
  --devices LIST     how many devices, or which: 4, rdmap79s0,rdmap96s0 (all)
  --dir DIR          the network (/dev/shm/softefa-UID)
  --control FILE     faults (DIR/control)
  --seed NUMBER      of order and faults (1)
  --gpu WAY          registrations of GPU memory that the host takes: all, dmabuf, pointer, none (all)
  --trace            keep a trace
  --shm              leave libfabric its shared memory between processes of a host
  --hwloc            also let hwloc see the instance type's machine
";

fn main() -> ExitCode {
    match run(env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("softefa-env: {error}");
            ExitCode::from(2)
        }
    }
}

/// The command line.
#[derive(Default)]
struct Options {
    set: Vec<(&'static str, String)>,
    with_hwloc: bool,
    with_shm: bool,
    /// `--` and a command, or `counters`, or `trace` and a file.
    rest: Vec<String>,
}

impl Options {
    fn parse(arguments: Vec<String>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let variable = match argument.as_str() {
                "--host" => "SOFTEFA_HOST",
                "--topology" => "SOFTEFA_TOPOLOGY",
                "--devices" => "SOFTEFA_DEVICES",
                "--dir" => "SOFTEFA_DIR",
                "--control" => "SOFTEFA_CONTROL",
                "--seed" => "SOFTEFA_SEED",
                "--gpu" => "SOFTEFA_GPU",
                "--trace" => {
                    options.set.push(("SOFTEFA_TRACE", "1".to_owned()));
                    continue;
                }
                "--shm" => {
                    options.with_shm = true;
                    continue;
                }
                "--hwloc" => {
                    options.with_hwloc = true;
                    continue;
                }
                "--help" => return Err(format!("\n{USAGE}known types: {}\n", topology::known_names())),
                "--" | "counters" | "trace" => {
                    options.rest = std::iter::once(argument).chain(arguments).collect();
                    break;
                }
                _ => return Err(format!("unknown {argument}\n{USAGE}")),
            };
            let value = arguments.next().ok_or_else(|| format!("{argument} needs a value\n"))?;
            options.set.push((variable, value));
        }
        Ok(options)
    }

    fn config(&self) -> Result<Config, String> {
        let given =
            |name: &str| self.set.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
        Config::from_variables(|name| given(name).or_else(|| env::var(name).ok()))
            .map_err(|error| format!("{error}\n"))
    }
}

fn run(arguments: Vec<String>) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let rest: Vec<&str> = options.rest.iter().map(String::as_str).collect();
    match rest.as_slice() {
        ["trace", file] => {
            print!("{}", trace::dump(Path::new(file)).map_err(|error| format!("{file}: {error}\n"))?);
        }
        ["counters"] => print_counters(&options.config()?),
        [] => {
            for (name, value) in variables(&options.config()?, &options)? {
                println!("export {name}='{}'", value.replace('\'', r"'\''"));
            }
        }
        ["--", command, arguments @ ..] => {
            let variables = variables(&options.config()?, &options)?;
            let error = Command::new(command).args(arguments).envs(variables).exec();
            return Err(format!("{command}: {error}\n"));
        }
        _ => return Err(format!("cannot {}\n{USAGE}", rest.join(" "))),
    }
    Ok(())
}

/// Everything that a program of this host needs; writes the files that it will look for.
fn variables(config: &Config, options: &Options) -> Result<Vec<(String, String)>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}\n", config.dir.display());
    sysfs::create(config).map_err(failed)?;
    let library = install::library_dir().map_err(|error| format!("{error}\n"))?;
    let path = env::var("LD_LIBRARY_PATH").ok().filter(|path| !path.is_empty());
    let path = path.map_or_else(String::new, |path| format!(":{path}"));
    let names: Vec<_> = config.devices.iter().map(|device| device.name.clone()).collect();
    let mut variables = vec![
        ("LD_LIBRARY_PATH", format!("{}{path}", library.display())),
        ("SYSFS_PATH", config.sysfs().display().to_string()),
        ("SOFTEFA_DIR", config.dir.display().to_string()),
        ("SOFTEFA_HOST", config.host.clone()),
        ("SOFTEFA_DEVICES", names.join(",")),
        ("SOFTEFA_CONTROL", config.control.display().to_string()),
        ("SOFTEFA_SEED", config.seed.to_string()),
        ("SOFTEFA_TRACE", u8::from(config.trace).to_string()),
        ("SOFTEFA_TOPOLOGY", config.topology_name.clone()),
        ("SOFTEFA_GPU", config.gpu.name().to_owned()),
    ];
    if !options.with_shm {
        // Two hosts of one machine share /dev/shm, and killed programs leave libfabric's files there.
        variables.push(("FI_EFA_ENABLE_SHM_TRANSFER", "0".to_owned()));
    }
    if options.with_hwloc {
        let file = config.dir.join("hosts").join(&config.host).join("hwloc.xml");
        std::fs::write(&file, hwloc::xml(&config.topology)).map_err(failed)?;
        variables.push(("HWLOC_XMLFILE", file.display().to_string()));
        // The machine in the file is the one to be on: hwloc would else refuse to bind.
        variables.push(("HWLOC_THISSYSTEM", "1".to_owned()));
    }
    Ok(variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

fn print_counters(config: &Config) {
    for device in &config.devices {
        let Ok(table) = softefa::shm::device::open(&config.dir, &device.gid) else { continue };
        for (name, value) in table.counters.all() {
            println!("{} {name} {value}", device.name);
        }
    }
}
