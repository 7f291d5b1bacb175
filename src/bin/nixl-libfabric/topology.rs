//! `nixl-libfabric topology`: the machine, and which devices serve which memory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nixl_libfabric::error::Result;
use nixl_libfabric::topology::{
    Buffer, DeviceFilter, GpuDevices, Machine, RailDevice, RailMap, Report, SelectOptions, parse_buffer,
    rail_devices_from_sysfs, spread,
};

use crate::arguments::{Given, usage};

/// Runs the command; `None` asks for help.
pub fn run(words: impl Iterator<Item = OsString>) -> Result<Option<String>> {
    let Some(arguments) = Arguments::read(words)? else { return Ok(None) };
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
    Ok(Some(match arguments.form {
        Form::Text => report.text(),
        Form::Json => report.json(),
        Form::Svg => report.svg(),
    }))
}

/// The devices that libfabric would offer here, as the kernel lists them.
///
/// The seam for libfabric's own list: what `fi_getinfo` says is what the engine uses.
fn devices_here() -> Vec<RailDevice> {
    rail_devices_from_sysfs(Path::new("/"))
}

#[derive(Default)]
struct Arguments {
    xml: Option<PathBuf>,
    devices: DeviceFilter,
    max_rails: Option<usize>,
    options: SelectOptions,
    buffers: Vec<Buffer>,
    form: Form,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Form {
    #[default]
    Text,
    Json,
    Svg,
}

impl Arguments {
    fn read(mut words: impl Iterator<Item = OsString>) -> Result<Option<Self>> {
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
                "--json" => read.choose(Form::Json)?,
                "--svg" => read.choose(Form::Svg)?,
                "--help" | "-h" => return Ok(None),
                other => return Err(usage(format!("no option `{other}`"))),
            }
            option.end()?;
        }
        if read.form == Form::Svg && !read.buffers.is_empty() {
            return Err(usage("--buffer is answered in words or with --json, not with --svg"));
        }
        Ok(Some(read))
    }

    fn choose(&mut self, form: Form) -> Result<()> {
        if self.form != Form::Text && self.form != form {
            return Err(usage("--json and --svg: want one of the two"));
        }
        self.form = form;
        Ok(())
    }
}
