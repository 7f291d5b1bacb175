//! Our numbers, symbol names and layouts are those of NVIDIA's `cuda.h`, where one is installed.
//!
//! `CUDA_INCLUDE` names the directory; the `PyPI` package nvidia-cuda-runtime-cu12 carries one.

mod cuda_bed;

use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use std::process::Command;

use nixl_libfabric::sys::cuda::{
    CONSTANTS, CUipcMemHandle, CUmemAccessDesc, CUmemAllocationProp, CUmemLocation, SYMBOLS,
};

fn include_dir() -> Option<PathBuf> {
    let named = std::env::var_os("CUDA_INCLUDE").map(PathBuf::from);
    let known = ["/usr/local/cuda/include", "/opt/cuda/include"].map(PathBuf::from);
    let found = named.into_iter().chain(known).find(|dir| dir.join("cuda.h").exists());
    if found.is_none() {
        eprintln!("skipped: no cuda.h (set CUDA_INCLUDE to a directory that has one)");
    }
    found
}

#[test]
fn numbers_symbols_and_layouts_agree_with_the_header() {
    let Some(include) = include_dir() else { return };
    let mut source = String::from("#include <cuda.h>\n#include <stddef.h>\n#include <string.h>\n");
    for (name, value) in CONSTANTS {
        writeln!(source, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    let prop = [
        ("type", offset_of!(CUmemAllocationProp, kind)),
        ("requestedHandleTypes", offset_of!(CUmemAllocationProp, handle_types)),
        ("location.type", offset_of!(CUmemAllocationProp, location_type)),
        ("location.id", offset_of!(CUmemAllocationProp, location_id)),
        ("allocFlags.gpuDirectRDMACapable", offset_of!(CUmemAllocationProp, gdr_capable)),
        ("allocFlags.usage", offset_of!(CUmemAllocationProp, usage)),
    ];
    for (field, offset) in prop {
        writeln!(source, "_Static_assert(offsetof(CUmemAllocationProp, {field}) == {offset}, \"{field}\");")
            .unwrap();
    }
    let access = [
        ("location.type", offset_of!(CUmemAccessDesc, location.kind)),
        ("location.id", offset_of!(CUmemAccessDesc, location.id)),
        ("flags", offset_of!(CUmemAccessDesc, flags)),
    ];
    for (field, offset) in access {
        writeln!(source, "_Static_assert(offsetof(CUmemAccessDesc, {field}) == {offset}, \"{field}\");")
            .unwrap();
    }
    let sizes = [
        ("CUmemAllocationProp", size_of::<CUmemAllocationProp>()),
        ("CUmemAccessDesc", size_of::<CUmemAccessDesc>()),
        ("CUmemLocation", size_of::<CUmemLocation>()),
        ("CUipcMemHandle", size_of::<CUipcMemHandle>()),
    ];
    for (name, size) in sizes {
        writeln!(source, "_Static_assert(sizeof({name}) == {size}, \"{name}\");").unwrap();
    }
    source += "#define TEXT_(x) #x\n#define TEXT(x) TEXT_(x)\n\
               #define SAME(plain, symbol) if (strcmp(TEXT(plain), symbol)) return __LINE__;\n\
               int main(void) {\n";
    for symbol in SYMBOLS {
        let symbol = symbol.to_str().unwrap();
        let plain = symbol.strip_suffix("_v2").unwrap_or(symbol);
        writeln!(source, "(void)sizeof(&{plain}); SAME({plain}, \"{symbol}\")").unwrap();
    }
    source += "return 0; }\n";

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (dir.join("cuda_header.c"), dir.join("cuda_header"));
    std::fs::write(&file, &source).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let built =
        Command::new(compiler).arg("-I").arg(include).arg("-o").arg(&program).arg(&file).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let line = Command::new(&program).status().unwrap().code().unwrap();
    assert_eq!(line, 0, "{}", source.lines().nth(line as usize - 1).unwrap_or_default());
}

#[test]
fn the_stand_in_has_the_headers_prototypes() {
    let Some(include) = include_dir() else { return };
    let include = format!("-I{}", include.display());
    cuda_bed::build("cuda.c", "libcuda-with-header.so", &["-DWITH_CUDA_H", &include]);
}
