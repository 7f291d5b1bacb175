//! What the dynamic linker sees of the plugin: two functions, and no library that a machine might lack.

use std::path::PathBuf;

use object::elf::{DF_1_NODELETE, DT_FLAGS_1, DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn as _, FileHeader as _};
use object::{Endianness, Object as _};

type Elf = FileHeader64<Endianness>;

/// The cdylib that this build made, which cargo puts beside the tests.
fn plugin() -> Vec<u8> {
    let tests = std::env::current_exe().expect("own path");
    let path: PathBuf = tests.with_file_name("libnixl_libfabric.so");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The entries of the dynamic section: tag, value, and the value as a string where it is one.
fn dynamic_entries(data: &[u8]) -> Vec<(u32, u64, String)> {
    let header = Elf::parse(data).expect("an ELF file");
    let endian = header.endian().expect("an ELF byte order");
    let sections = header.sections(endian, data).expect("sections");
    let (entries, link) = sections.dynamic(endian, data).expect("readable").expect("a dynamic section");
    let strings = sections.strings(endian, data, link).expect("its strings");
    let text = |entry: &object::elf::Dyn64<Endianness>| {
        let bytes = entry.string(endian, strings).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    entries
        .iter()
        .filter_map(|entry| Some((entry.tag32(endian)?, entry.d_val(endian), text(entry))))
        .collect()
}

#[test]
fn only_nixls_two_functions_are_exported() {
    let data = plugin();
    let file = object::File::parse(&*data).expect("an ELF file");
    let mut names: Vec<String> = file
        .exports()
        .expect("dynamic symbols")
        .iter()
        .map(|export| String::from_utf8_lossy(export.name()).into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["nixl_plugin_fini", "nixl_plugin_init"]);
}

#[test]
fn it_needs_only_what_every_machine_has() {
    let allowed = [
        "libc.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libstdc++.so.6",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    ];
    let entries = dynamic_entries(&plugin());
    let needed: Vec<&str> =
        entries.iter().filter(|(tag, ..)| *tag == DT_NEEDED).map(|(.., name)| name.as_str()).collect();
    assert!(
        needed.contains(&"libstdc++.so.6"),
        "shares the C++ library, and its allocator, with NIXL: {needed:?}"
    );
    for name in needed {
        assert!(allowed.contains(&name), "needs {name}");
    }
}

#[test]
fn it_stays_loaded() {
    let flags =
        dynamic_entries(&plugin()).iter().find(|(tag, ..)| *tag == DT_FLAGS_1).map_or(0, |entry| entry.1);
    assert_ne!(flags & u64::from(DF_1_NODELETE), 0, "linked without -z nodelete");
}
