//! The engine's virtual functions stand in the order that NIXL's core was compiled with.
//!
//! The order is compared with the LIBFABRIC plugin of a NIXL wheel, named by `NIXL_WHEEL_DIR` (its directory `site-packages`, or
//! any above `libplugin_LIBFABRIC.so`).

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use object::{Object as _, ObjectSymbol as _, ObjectSymbolTable as _, RelocationTarget};

/// The names of the functions in the virtual table of the class whose table has the symbol `table`.
///
/// The slots are filled by the dynamic linker: with a named symbol where the function is exported, else with an address. An
/// address can have several names, since the compiler folds functions that do the same.
fn slots(data: &[u8], table: &str) -> Vec<BTreeSet<String>> {
    const POINTER: u64 = 8;
    let file = object::File::parse(data).expect("an ELF file");
    let symbols: Vec<_> = file.symbols().chain(file.dynamic_symbols()).collect();
    let names_at = |address: u64| {
        let here = symbols.iter().filter(|symbol| symbol.is_definition() && symbol.address() == address);
        here.filter_map(|symbol| Some(method(symbol.name().ok()?))).collect()
    };
    let table = symbols.iter().find(|symbol| symbol.name() == Ok(table)).expect("the virtual table");
    let relocations: HashMap<u64, _> = file.dynamic_relocations().expect("relocations").collect();
    // Two words come before the functions: the offset to the top and the type information.
    (table.address() + 2 * POINTER..table.address() + table.size())
        .step_by(POINTER as usize)
        .map(|slot| {
            let relocation = relocations.get(&slot).unwrap_or_else(|| panic!("slot at {slot:#x} is empty"));
            match relocation.target() {
                RelocationTarget::Symbol(index) => {
                    let symbols = file.dynamic_symbol_table().expect("dynamic symbols");
                    let symbol = symbols.symbol_by_index(index).expect("the relocation's symbol");
                    BTreeSet::from([method(symbol.name().expect("its name"))])
                }
                _ => names_at(relocation.addend().cast_unsigned()),
            }
        })
        .collect()
}

/// What NIXL and we both call it: the last component of a nested name, for methods and destructors.
fn method(mangled: &str) -> String {
    let mut rest = mangled.trim_start_matches("_ZN").trim_start_matches('K');
    let mut last = "";
    loop {
        if let Some(anonymous_or_more) = rest.strip_prefix("12_GLOBAL__N_1") {
            rest = anonymous_or_more;
            continue;
        }
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let Ok(length) = rest[..digits].parse::<usize>() else { break };
        last = &rest[digits..digits + length];
        rest = &rest[digits + length..];
    }
    // A destructor has no name of its own: D0, D1 or D2 follows the class.
    if rest.starts_with('D') { "destructor".to_owned() } else { last.to_owned() }
}

fn find(directory: &Path, file: &str) -> Option<PathBuf> {
    let mut directories = Vec::new();
    for entry in std::fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            directories.push(path);
        } else if entry.file_name() == file {
            return Some(path);
        }
    }
    directories.iter().find_map(|below| find(below, file))
}

#[test]
fn mangled_names_give_methods() {
    assert_eq!(method("_ZNK19nixlLibfabricEngine14supportsRemoteEv"), "supportsRemote");
    assert_eq!(method("_ZNK12_GLOBAL__N_16Engine14supportsRemoteEv"), "supportsRemote");
    assert_eq!(method("_ZN12_GLOBAL__N_16EngineD0Ev"), "destructor");
}

/// Each slot of our engine has, among its names, the expected one.
fn check_ours<'a>(expected: impl ExactSizeIterator<Item = &'a str>) {
    let path = std::env::current_exe().expect("own path").with_file_name("libnixl_libfabric.so");
    let data = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let ours = slots(&data, "_ZTVN12_GLOBAL__N_16EngineE");
    assert_eq!(ours.len(), expected.len(), "{ours:?}");
    for (slot, (names, expected)) in ours.iter().zip(expected).enumerate() {
        assert!(names.contains(expected), "slot {slot} is {names:?}, and NIXL calls it as {expected}");
    }
}

/// The order as the header has it and as NIXL 1.0.0 to 1.5.1 have it.
#[test]
fn slots_stand_in_nixls_order() {
    let order = "destructor destructor supportsRemote supportsLocal supportsNotif getSupportedMems registerMem \
                 deregisterMem connect disconnect unloadMD prepXfer postXfer checkXfer releaseReqH prepMemView \
                 prepMemView releaseMemView getPublicData getConnInfo loadRemoteConnInfo loadRemoteMD loadLocalMD \
                 getNotifs genNotif queryMem estimateXferCost";
    let order: Vec<&str> = order.split_whitespace().collect();
    check_ours(order.into_iter());
}

#[test]
fn slots_stand_in_the_order_of_the_wheel() {
    let Some(directory) = std::env::var_os("NIXL_WHEEL_DIR") else {
        println!("skipped: NIXL_WHEEL_DIR names no NIXL wheel");
        return;
    };
    let path = find(Path::new(&directory), "libplugin_LIBFABRIC.so")
        .unwrap_or_else(|| panic!("no libplugin_LIBFABRIC.so below {}", directory.display()));
    let theirs = slots(&std::fs::read(&path).expect("the wheel's plugin"), "_ZTV19nixlLibfabricEngine");
    check_ours(theirs.iter().map(|names| names.first().expect("a named function").as_str()));
}
