//! The engine's virtual functions stand where the core of NIXL looks for them, and a core that looks elsewhere is refused.
//!
//! `NIXL_WHEEL_DIR` names wheels of NIXL to compare with: a directory `site-packages`, or any above some.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use nixl_libfabric::abi::layout::{self, ENGINE_TABLE, OURS};
use nixl_libfabric::abi::types::EngineLayout;
use nixl_libfabric::abi::vtable::{Library, Slot, method};

/// The methods in the virtual table `table` of the library in `path`; several for a slot where the compiler folded them.
fn methods(path: &Path, table: &str) -> Vec<Vec<String>> {
    let data = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let library = Library::parse(&data).expect("an ELF file");
    let names = |slot| match slot {
        Slot::Named(names) => names.into_iter().map(|name| method(name).to_owned()).collect(),
        other => panic!("{}: {other:?} in {table}", path.display()),
    };
    library.slots(table).expect("the virtual table").into_iter().map(names).collect()
}

fn plugin() -> PathBuf {
    std::env::current_exe().expect("own path").with_file_name("libnixl_libfabric.so")
}

fn files_named(name: &str, directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_named(name, &path));
        } else if entry.file_name() == name {
            found.push(path);
        }
    }
    found
}

#[test]
fn mangled_names_give_methods() {
    assert_eq!(method("_ZNK19nixlLibfabricEngine14supportsRemoteEv"), "supportsRemote");
    assert_eq!(method("_ZNK12_GLOBAL__N_16Engine14supportsRemoteEv"), "supportsRemote");
    assert_eq!(method("_ZN12_GLOBAL__N_16EngineD0Ev"), "~");
    for odd in ["", "_ZN", "_ZN9", "_ZN99999999999999999999999a", "_ZN5ab", "main"] {
        assert!(method(odd).len() <= odd.len());
    }
}

#[test]
fn our_functions_stand_in_the_order_that_is_compared() {
    let ours = methods(&plugin(), "_ZTVN12_GLOBAL__N_16EngineE");
    assert_eq!(ours.len(), OURS.len(), "{ours:?}");
    for (slot, (names, expected)) in ours.iter().zip(OURS).enumerate() {
        assert!(
            names.iter().any(|name| name == expected),
            "slot {slot} is {names:?}, and {expected} is expected"
        );
    }
}

#[test]
fn every_wheel_has_the_layout_that_is_served() {
    let Some(wheels) = std::env::var_os("NIXL_WHEEL_DIR") else {
        println!("skipped: NIXL_WHEEL_DIR names no NIXL wheels");
        return;
    };
    let wheels = Path::new(&wheels);
    let plugins = files_named("libplugin_LIBFABRIC.so", wheels);
    assert!(!plugins.is_empty(), "no libplugin_LIBFABRIC.so below {}", wheels.display());
    for plugin in plugins {
        // Of a class that can be made, so with every name.
        let theirs = methods(&plugin, "_ZTV19nixlLibfabricEngine");
        let theirs: Vec<_> = theirs.iter().map(|names| names[0].as_str()).collect();
        assert_eq!(theirs, OURS, "{}", plugin.display());
        // Wheels carry a second copy of their plugins, which nothing loads, without a core.
        let core = plugin.parent().and_then(Path::parent).expect("two folders up").join("libnixl.so");
        if core.is_file() {
            assert_eq!(layout::of_core(Some(&core), None), Ok(EngineLayout::default()), "{}", core.display());
            println!("{}: {} functions in our order", core.display(), theirs.len());
        }
    }
}

/// A process with a core as the macros `proposals` have it, that makes and calls an engine of the plugin.
struct Standin {
    folder: PathBuf,
    proposals: Vec<String>,
}

impl Standin {
    fn new(proposals: &[&str]) -> Self {
        let name = if proposals.is_empty() { "RELEASED".to_owned() } else { proposals.join("+") };
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("abi_core").join(name);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(folder.join("plugins")).expect("a folder");
        let standin = Self { folder, proposals: proposals.iter().map(|name| format!("-D{name}")).collect() };
        standin.compile("core", &["-O2", "-rdynamic", "-ldl"]);
        standin
    }

    fn with_plugin(self) -> Self {
        self.compile("plugins/libplugin_STANDIN.so", &["-O0", "-shared", "-fPIC", "-DPLUGIN"]);
        self
    }

    fn compile(&self, output: &str, options: &[&str]) {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let status = Command::new(&compiler)
            .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "tests/abi_core.cpp", "-o"])
            .arg(self.folder.join(output))
            .args(&self.proposals)
            .args(options)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(status.success(), "{compiler}: {status}");
    }

    /// What the core says in the end, and the log.
    fn run(&self) -> (String, String) {
        // Words of an emulator, where this runs for another processor.
        let runner = std::env::var("ABI_CORE_RUNNER").unwrap_or_default();
        let core = self.folder.join("core").into_os_string();
        let mut words = runner.split_whitespace().map(OsString::from).chain([core, plugin().into()]);
        let core = Command::new(words.next().expect("the core at least"))
            .args(words)
            .env("NIXL_LOG_LEVEL", "INFO")
            .output()
            .expect("the core runs");
        let log = String::from_utf8_lossy(&core.stderr).into_owned();
        assert!(core.status.success(), "{}: {log}", core.status);
        (String::from_utf8_lossy(&core.stdout).trim().to_owned(), log)
    }

    fn is_served(&self) -> String {
        let (answer, log) = self.run();
        assert_eq!(answer, "served", "{log}");
        log
    }

    fn is_refused_because(&self, reason: &str) {
        let (answer, log) = self.run();
        assert_eq!(answer, "refused", "{log}");
        let lines: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
        assert!(lines.len() == 1 && lines[0].contains(reason), "{log}");
    }
}

#[test]
fn a_released_core_is_served() {
    let log = Standin::new(&[]).with_plugin().is_served();
    assert!(!log.contains("taken for") && !log.contains("not offered"), "{log}");
}

#[test]
fn a_core_with_functions_of_proposals_is_served() {
    for proposals in [
        &["DEVICE_PROXY"][..],
        &["NOTIFICATION_CALLBACKS"],
        &["SEND_RECEIVE"],
        &["PATH_INFORMATION"],
        &["LAST_FUNCTION"],
        &["DEVICE_PROXY", "SEND_RECEIVE", "PATH_INFORMATION", "LAST_FUNCTION"],
    ] {
        let log = Standin::new(proposals).with_plugin().is_served();
        assert!(log.contains("not offered by this plugin: "), "{log}");
    }
}

#[test]
fn a_core_with_more_members_or_parameters_is_served() {
    for proposal in ["BACKEND_ID", "TRACER"] {
        Standin::new(&[proposal]).with_plugin().is_served();
    }
}

#[test]
fn a_core_with_what_nobody_knows_is_refused_in_words() {
    let reasons = [
        ("UNKNOWN_FUNCTION", "reserve is unknown (slot 5)"),
        ("UNKNOWN_DUTY", "14 functions that every backend must have, and not 13"),
        ("UNKNOWN_PARAMETER", "passes other parameters than NIXL 1.0 to 1.5 do"),
    ];
    for (proposal, reason) in reasons {
        Standin::new(&[proposal]).with_plugin().is_refused_because(reason);
    }
}

/// What the core itself shows of what it calls is looked at where no plugin tells more.
#[test]
fn a_core_without_plugins_is_served_with_a_warning_unless_it_shows_what_nobody_knows() {
    let log = Standin::new(&["TRACER"]).is_served();
    assert!(log.contains("WARN") && log.contains("taken for NIXL 1.0 to 1.5"), "{log}");
    Standin::new(&["UNKNOWN_FUNCTION", "TRACER"]).is_refused_because("it calls reserve");
}

#[test]
fn what_is_no_library_says_nothing() {
    for data in [&b""[..], b"\x7fELF", &[0x7f; 4096]] {
        assert!(Library::parse(data).is_none_or(|library| library.slots(ENGINE_TABLE).is_none()));
    }
    let mut data = std::fs::read(plugin()).expect("the plugin");
    data.truncate(data.len() / 2);
    assert!(Library::parse(&data).is_none_or(|library| library.slots(ENGINE_TABLE).is_none()));
}
