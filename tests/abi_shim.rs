//! The C++ shim forwards every call as it came: driven by C++, with the sanitizers looking on.

use std::path::Path;
use std::process::Command;

#[test]
fn the_shim_forwards_every_call() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let driver = Path::new(env!("CARGO_TARGET_TMPDIR")).join("abi_driver");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let status = Command::new(&compiler)
        .current_dir(root)
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-g", "-O1"])
        .args(["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"])
        .args(["-Iinclude", "tests/abi_driver.cpp", "src/abi/shim.cpp", "-o"])
        .arg(&driver)
        .status()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(status.success(), "{compiler}: {status}");
    let output = Command::new(&driver).output().expect("the driver runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out == "all held\n", "{}: {out}{err}", output.status);
}
