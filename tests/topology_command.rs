//! The command that support asks a user to run.

#[path = "topology_common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::process::{Command, Output};

use common::{Case, cases, folder};

fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nixl-libfabric")).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn complaint(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

/// A fixture, as long as there is a libhwloc to read it.
fn readable(name: &str) -> Option<Case> {
    let case = cases().into_iter().find(|case| case.name == name).unwrap();
    case.by_hwloc().map(|_| case)
}

#[test]
fn draws_this_machine() {
    let drawing = text(&run(&["topology"]));
    assert!(drawing.starts_with("read from "), "{drawing}");
    for heading in ["\nMachine\n", "\nDevices\n", "\nAccelerator memory\n", "\nHost memory, "] {
        assert!(drawing.contains(heading), "{drawing}");
    }
}

#[test]
fn reads_the_kernels_files_where_libhwloc_is_broken() {
    let folder = std::env::temp_dir().join(format!("nixl-libfabric-broken-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("libhwloc.so.15"), "no library").unwrap();
    let command = env!("CARGO_BIN_EXE_nixl-libfabric");
    let output = Command::new(command).arg("topology").env("LD_LIBRARY_PATH", &folder).output().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let drawing = text(&output);
    assert!(drawing.starts_with("read from /sys (libhwloc not used: "), "{drawing}");
}

#[test]
fn draws_every_fixture_and_names_every_device() {
    for case in cases().into_iter().filter(|case| case.name == case.machine && case.devices[0].pci.is_some())
    {
        if case.by_hwloc().is_none() {
            return;
        }
        let drawing = text(&run(&[OsStr::new("topology"), OsStr::new("--xml"), case.xml().as_os_str()]));
        for (at, device) in case.devices.iter().enumerate() {
            let name = device.short_name();
            let leaf =
                drawing.lines().find(|line| line.ends_with(&format!("[device {at}]"))).unwrap_or_default();
            assert!(leaf.contains(name), "{}: device {at} is {name}:\n{drawing}", case.name);
        }
    }
}

#[test]
fn json_is_json() {
    let Some(case) = readable("p5.48xlarge") else { return };
    let xml = case.xml();
    let json = text(&run(&["topology", "--json", "--buffer=numa:1", "--xml", xml.to_str().unwrap()]));
    let script = "import json,sys\n\
                  report=json.load(sys.stdin)\n\
                  assert len(report['devices'])==32 and len(report['accelerators'])==8\n\
                  assert report['accelerators'][0]['devices']==['rdmap79s0','rdmap80s0','rdmap81s0','rdmap82s0']\n\
                  assert report['buffers'][0]['buffer']=='numa:1' and len(report['buffers'][0]['devices'])==4\n\
                  assert report['tree']['children'][0]['nodes']==[0]\n";
    let Ok(mut python) =
        Command::new("python3").args(["-c", script]).stdin(std::process::Stdio::piped()).spawn()
    else {
        eprintln!("skipped: there is no python3");
        return;
    };
    std::io::Write::write_all(python.stdin.as_mut().unwrap(), json.as_bytes()).unwrap();
    assert!(python.wait().unwrap().success(), "{json}");
}

#[test]
fn svg_is_a_picture() {
    let drawing = text(&run(&["topology", "--svg"]));
    assert!(drawing.starts_with("<svg ") && drawing.ends_with("</svg>\n"), "{drawing}");
    let Some(case) = readable("p5.48xlarge") else { return };
    let xml = case.xml();
    let of_gpu = |more: &[&str]| {
        let mut arguments = vec!["topology", "--svg", "--xml", xml.to_str().unwrap()];
        arguments.extend(more);
        text(&run(&arguments)).matches("data-from=\"0000:53:00.0\"").count()
    };
    assert_eq!((of_gpu(&[]), of_gpu(&["--devices", "!rdmap80s0"])), (4, 3));
}

#[test]
fn answers_for_buffers_and_obeys_the_options() {
    let Some(case) = readable("p5.48xlarge") else { return };
    let xml = case.xml();
    let ask = |more: &[&str]| {
        let mut arguments = vec!["topology", "--xml", xml.to_str().unwrap(), "--buffer", "gpu:0000:53:00.0"];
        arguments.extend(more);
        let drawing = text(&run(&arguments));
        drawing.lines().last().unwrap().trim().to_owned()
    };
    assert_eq!(ask(&[]), "rdmap79s0 rdmap80s0 rdmap81s0 rdmap82s0");
    assert_eq!(ask(&["--devices", "!rdmap80s0"]), "rdmap79s0 rdmap81s0 rdmap82s0");
    assert_eq!(ask(&["--max-rails", "8"]), "rdmap79s0");
    assert_eq!(ask(&["--gpu-devices", "53:00.0=rdmap201s0"]), "rdmap201s0");
    assert_eq!(ask(&["--max-bw=100", "--buffer", "numa:1"]), "rdmap147s0");
}

#[test]
fn says_what_is_wrong() {
    assert!(complaint(&["topologie"]).contains("no command `topologie`"));
    assert!(complaint(&["topology", "--xlm"]).contains("no option `--xlm`"));
    assert!(complaint(&["topology", "--xml"]).contains("--xml needs a value"));
    assert!(complaint(&["topology", "--json=yes"]).contains("--json takes no value"));
    assert!(complaint(&["topology", "--json", "--svg"]).contains("want one of the two"));
    assert!(complaint(&["topology", "--svg", "--buffer=numa:0"]).contains("not with --svg"));
    assert!(complaint(&["topology", "--max-bw", "0"]).contains("want a whole number from 1"));
    assert!(complaint(&["topology", "--buffer", "disk:1"]).contains("want numa:NODE or gpu:PCI-ADDRESS"));
    assert!(complaint(&["topology", "--xml", "/nowhere.xml"]).contains("/nowhere.xml"));
    assert!(complaint(&["topology", "--devices", "nosuch0"]).contains("`nosuch0` is not here; known: "));
    assert!(complaint(&["doctor", "--watch", "long"]).contains("want seconds, 0 to 3600"));
    assert!(
        complaint(&["doctor", "--listen", "--to", "host"])
            .contains("--listen on one host, --to on the other")
    );
    assert!(complaint(&["doctor", "--to", "host", "--port", "65536"]).contains("want 0 to 65535"));
    assert!(text(&run(&["--help"])).contains("nixl-libfabric topology [OPTIONS]"));
}

#[test]
fn the_fixtures_are_those_of_the_table() {
    let script = folder().join("generate.py");
    match Command::new("python3").arg(&script).arg("--check").output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => eprintln!("skipped: python3: {error}"),
    }
}
