//! Builds the C++ shim, the only C++ in the plugin.

fn main() {
    let sources = ["src/abi/shim.cpp", "src/abi/compat.cpp"];
    let headers = ["include/nixl_backend_abi.h", "include/nixl_libfabric.h"];
    for input in sources.iter().chain(&headers).chain(&["build.rs"]) {
        println!("cargo:rerun-if-changed={input}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .files(sources)
        .include("include")
        // NIXL's core is built with this std::string; some distributions default to the old one.
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-fvisibility=hidden")
        .flag("-fvisibility-inlines-hidden")
        .compile("nixl_libfabric_shim");
    // NIXL loads a plugin to read its options, unloads it, and loads it again; Rust's thread-locals do not survive an unload.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
