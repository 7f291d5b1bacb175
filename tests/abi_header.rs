//! The C header is the one that the Rust types give.

use std::path::Path;

#[test]
fn the_header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let checked_in = root.join("include/nixl_libfabric.h");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/abi/types.rs"))
        .generate()
        .expect("cbindgen reads src/abi/types.rs");
    let mut header = Vec::new();
    bindings.write(&mut header);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&checked_in, &header).expect("write the header");
    }
    let current = std::fs::read(&checked_in).unwrap_or_default();
    assert!(
        current == header,
        "include/nixl_libfabric.h differs from src/abi/types.rs; run `BLESS=1 cargo test --test abi_header`"
    );
}
