//! Builds the C++ shim, the only C++ in the plugin.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
}
