//! Builds the two libraries that programs load by their foreign names.
//!
//! A Rust cdylib cannot carry symbol versions: rustc hands the linker a version script without names, and a linker
//! takes either such a script or named nodes. So the device is one plain cdylib, `libsoftefa.so`, and
//! `libibverbs.so.1` and `libefa.so.1` are thin: each symbol is a jump to the function of the same name with the
//! prefix `softefa_`, under the version that rdma-core gave it. They are linked here against an empty stand-in with
//! the soname of `libsoftefa.so`, which does not exist yet.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const LIBRARIES: [(&str, &str); 2] = [("libibverbs.so.1", "libibverbs.txt"), ("libefa.so.1", "libefa.txt")];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the target");
    let jump = match arch.as_str() {
        "x86_64" => "jmp TARGET@PLT",
        "aarch64" => "b TARGET",
        other => panic!("softefa: no jump instruction known for {other}"),
    };
    println!("cargo:rerun-if-changed=symbols");
    println!("cargo:rustc-env=SOFTEFA_SHIM_DIR={}", out.display());
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libsoftefa.so");
    // The device has threads: it must stay mapped when a program closes the library that pulled it in.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");

    let empty = write(&out, "empty.S", ".section .note.GNU-stack,\"\",%progbits\n");
    let standin = out.join("libsoftefa.so");
    link(&standin, &["-nostdlib".into(), "-Wl,-soname,libsoftefa.so".into(), empty.display().to_string()]);
    for (soname, list) in LIBRARIES {
        let text = fs::read_to_string(Path::new("symbols").join(list)).expect("symbol list");
        let nodes = parse(&text);
        let asm = write(&out, &format!("{soname}.S"), &jumps(&nodes, jump));
        let map = write(&out, &format!("{soname}.map"), &version_script(&nodes));
        link(
            &out.join(soname),
            &[
                "-nostdlib".into(),
                asm.display().to_string(),
                "-Wl,--no-as-needed".into(),
                standin.display().to_string(),
                "-Wl,-z,nodelete".into(),
                "-Wl,-rpath,$ORIGIN".into(),
                format!("-Wl,-soname,{soname}"),
                format!("-Wl,--version-script={}", map.display()),
            ],
        );
    }
    fs::remove_file(&standin).expect("remove the stand-in");
}

/// Version nodes in order, each with its symbols.
fn parse(text: &str) -> Vec<(String, Vec<String>)> {
    let mut nodes: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some(node) = words.next() else { continue };
        if nodes.last().is_none_or(|(last, _)| last != node) {
            nodes.push((node.to_owned(), Vec::new()));
        }
        let symbols = &mut nodes.last_mut().expect("just pushed").1;
        symbols.extend(words.map(str::to_owned));
    }
    nodes
}

fn jumps(nodes: &[(String, Vec<String>)], jump: &str) -> String {
    let mut asm = String::from(".text\n");
    for symbol in nodes.iter().flat_map(|(_, symbols)| symbols) {
        let jump = jump.replace("TARGET", &format!("softefa_{symbol}"));
        writeln!(asm, ".globl {symbol}\n.type {symbol},%function\n.balign 16\n{symbol}:\n\t{jump}")
            .expect("string");
        writeln!(asm, ".size {symbol},.-{symbol}").expect("string");
    }
    asm.push_str(".section .note.GNU-stack,\"\",%progbits\n");
    asm
}

fn version_script(nodes: &[(String, Vec<String>)]) -> String {
    let mut script = String::new();
    let mut parent = String::new();
    for (index, (node, symbols)) in nodes.iter().enumerate() {
        writeln!(script, "{node} {{").expect("string");
        if !symbols.is_empty() {
            writeln!(script, "\tglobal: {};", symbols.join("; ")).expect("string");
        }
        if index == 0 {
            writeln!(script, "\tlocal: *;").expect("string");
        }
        writeln!(script, "}}{parent};").expect("string");
        parent = format!(" {node}");
    }
    script
}

fn write(out: &Path, name: &str, text: &str) -> PathBuf {
    let path = out.join(name);
    fs::write(&path, text).expect("write into OUT_DIR");
    path
}

fn link(output: &Path, arguments: &[String]) {
    let compiler = cc::Build::new().get_compiler();
    let mut command = Command::new(compiler.path());
    let status = command.arg("-shared").arg("-fPIC").arg("-o").arg(output).args(arguments).status();
    assert!(status.is_ok_and(|status| status.success()), "softefa: linking {} failed", output.display());
}
