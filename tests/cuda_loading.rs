//! Loading: what is missing is an error in words, and what is in the process already is used.

mod cuda_bed;

use std::path::Path;
use std::process::Command;

use cuda_bed::Bed;
use nixl_libfabric::cuda::neuron::Neuron;
use nixl_libfabric::cuda::{Cuda, LIBRARY_ENV, Runtime, neuron};
use nixl_libfabric::error::Status;

#[test]
fn a_missing_library_is_named() {
    let why = Cuda::load(Some(Path::new("/nowhere/libcuda.so.1"))).unwrap_err();
    assert_eq!(why.status(), Status::NotSupported);
    assert!(why.to_string().contains("/nowhere/libcuda.so.1"), "{why}");
    assert!(
        Neuron::load(Some(Path::new("/nowhere/libnrt.so.1")))
            .is_err_and(|e| e.to_string().contains("/nowhere"))
    );
}

#[test]
fn a_library_that_is_not_the_driver_is_named() {
    let nrt = cuda_bed::build("nrt.c", "libnrt-for-cuda.so", &[]);
    let why = Cuda::load(Some(&nrt)).unwrap_err();
    assert!(why.to_string().contains("has no symbol cuInit"), "{why}");
}

#[test]
fn no_device_is_told() {
    let (handle, path) = Bed::open();
    cuda_bed::set_option(handle, "devices", 0);
    let why = Cuda::load(Some(&path)).unwrap_err();
    std::fs::remove_file(path).unwrap();
    assert_eq!(why.status(), Status::NotSupported);
    assert!(why.to_string().contains("CUDA_VISIBLE_DEVICES"), "{why}");
}

#[test]
fn the_copy_in_the_process_is_used() {
    // An application has loaded its libcuda.so.1 from somewhere the loader would not look.
    let library = cuda_bed::build("cuda.c", "libcuda-of-the-application.so", &["-Wl,-soname,libcuda.so.1"]);
    cuda_bed::set_option(cuda_bed::open_library(&library), "devices", 5);
    assert_eq!(Cuda::load(None).unwrap().devices().len(), 5);
}

#[test]
fn neuron_memory_is_located_and_exported() {
    const BASE: u64 = 0x1000_0000;
    let neuron = Neuron::load(Some(&cuda_bed::build("nrt.c", "libnrt-new.so", &[]))).unwrap();
    assert_eq!(neuron.cores(), 8);
    assert_eq!(neuron.attached_efa(BASE + 5).unwrap().to_string(), "0000:a0:1c.0");
    assert!(neuron.attached_efa(5).is_err());
    let exported = neuron.export(BASE + 4096, 8192).unwrap();
    assert_eq!((exported.offset, exported.addr, exported.len), (4096, BASE + 4096, 8192));
    assert!(neuron.export(BASE, 1 << 21).is_err());
}

#[test]
fn an_older_neuron_runtime_exports_from_the_start_of_a_buffer() {
    const BASE: u64 = 0x1000_0000;
    let library = cuda_bed::build("nrt.c", "libnrt-old.so", &["-DNRT_STANDIN_OLD"]);
    let neuron = Neuron::load(Some(&library)).unwrap();
    assert_eq!(neuron.attached_efa(BASE).unwrap_err().status(), Status::NotSupported);
    assert_eq!(neuron.export(BASE, 4096).unwrap().offset, 0);
    assert!(neuron.export(BASE + 4096, 4096).is_err());
}

/// What a process of its own says of its accelerators, with these variables set.
fn in_a_process(variables: &[(&str, &Path)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "says_what_it_has", "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "the other end of in_a_process"]
fn says_what_it_has() {
    for _ in 0..2 {
        match Runtime::get() {
            Ok(Runtime::Cuda(cuda)) => println!("cuda, {} devices", cuda.devices().len()),
            Ok(Runtime::Neuron(neuron)) => println!("neuron, {} cores", neuron.cores()),
            Err(why) => println!("{why}"),
        }
    }
}

#[test]
fn the_environment_names_the_libraries() {
    let nowhere = Path::new("/nowhere.so");
    let nrt = cuda_bed::build("nrt.c", "libnrt-named.so", &[]);
    let devices = Path::new("3");
    let said = in_a_process(&[(LIBRARY_ENV, cuda_bed::driver()), ("CUDA_STANDIN_DEVICES", devices)]);
    assert_eq!(said.matches("cuda, 3 devices").count(), 2, "{said}");
    let said = in_a_process(&[(LIBRARY_ENV, nowhere), (neuron::LIBRARY_ENV, &nrt)]);
    assert!(said.contains("neuron, 8 cores"), "{said}");
    let said = in_a_process(&[(LIBRARY_ENV, nowhere), (neuron::LIBRARY_ENV, nowhere)]);
    assert!(
        said.contains("no accelerator: CUDA driver library") && said.contains("Neuron runtime library"),
        "{said}"
    );
}

#[test]
fn a_failure_of_the_driver_is_remembered() {
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("calls-{}", std::process::id()));
    let said = in_a_process(&[
        (LIBRARY_ENV, cuda_bed::driver()),
        (neuron::LIBRARY_ENV, Path::new("/nowhere.so")),
        ("CUDA_STANDIN_FAIL", Path::new("cuInit:1:803")),
        ("CUDA_STANDIN_LOG", &log),
    ]);
    assert_eq!(said.matches("kernel module and library differ in version").count(), 2, "{said}");
    let calls = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(log).unwrap();
    assert_eq!(calls.lines().count(), 1, "{calls}");
}
