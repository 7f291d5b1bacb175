#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nixl_libfabric_fuzz::connection_info(data));
