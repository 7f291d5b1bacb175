//! Memory of GPUs, on a stand-in driver whose memory only CUDA's copies reach.

mod bed;

use std::sync::{Mutex, PoisonError};

use bed::each;
use bed::gpu::{Gpu, Kind};
use softefa::shm::channel::{GPU, HOST, Span};
use softefa::shm::process::ProcessId;
use softefa::{copy, cuda};

#[test]
#[ignore = "one end of the other tests, which start it themselves"]
fn peer() {
    bed::peer::run();
}

const MIB: usize = 1 << 20;

/// The driver's faults are the process's, so tests of copies take turns.
static TURN: Mutex<()> = Mutex::new(());

fn gpu_span(address: u64, length: usize) -> Span {
    Span { address, length: length as u64, memory: GPU }
}

fn host_span(bytes: &[u8]) -> Span {
    Span { address: bytes.as_ptr() as u64, length: bytes.len() as u64, memory: HOST }
}

fn numbers(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index / 251) as u8 ^ (index as u8).wrapping_mul(31) ^ seed).collect()
}

#[test]
fn only_memory_of_a_device_is_a_devices() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = Gpu::get();
    for (kind, is_device) in [
        (Kind::Device, true),
        (Kind::Async, true),
        (Kind::Vmm, true),
        (Kind::Managed, false),
        (Kind::Host, false),
    ] {
        assert_eq!(cuda::is_device(gpu.memory(kind, &[4096])), is_device, "{kind:?}");
    }
    assert!(!cuda::is_device(numbers(8, 0).as_ptr() as u64) && !cuda::is_device(0));
    let gone = gpu.memory(Kind::Device, &[4096]);
    gpu.free(gone);
    assert!(!cuda::is_device(gone));
}

#[test]
fn copies_are_over_when_they_return_and_leave_the_thread_as_it_was() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = Gpu::get();
    for (kind, handles) in
        [(Kind::Device, vec![3 * 4096]), (Kind::Vmm, vec![4096; 3]), (Kind::Async, vec![3 * 4096])]
    {
        let address = gpu.memory(kind, &handles);
        let data = numbers(3 * 4096, kind as u8);
        // Over the border of two handles, and by the byte.
        cuda::copy_in(address + 4001, &data[..5000]).expect("copied");
        assert_eq!(gpu.read(address + 4001, 5000), data[..5000], "{kind:?}");
        gpu.write(address, &data);
        let mut back = vec![0; 5001];
        cuda::copy_out(&mut back, address + 3999).expect("copied");
        assert_eq!(back, data[3999..9000], "{kind:?}");
        assert_eq!(gpu.depth(), 0);
    }
}

#[test]
fn a_pull_into_memory_of_both_kinds_puts_each_byte_where_it_belongs() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = Gpu::get();
    let source = numbers(10_000, 1);
    let (device, host) = (gpu.memory(Kind::Device, &[8192]), vec![0_u8; 3000]);
    let to = [gpu_span(device + 10, 5000), host_span(&host), gpu_span(device + 6000, 2000)];
    let from = [host_span(&source[..7000]), host_span(&source[7000..])];
    copy::pull(ProcessId::current(), &from, &to).expect("copied");
    assert_eq!(gpu.read(device + 10, 5000), source[..5000]);
    assert_eq!(host, source[5000..8000]);
    assert_eq!(gpu.read(device + 6000, 2000), source[8000..]);

    let mut back = vec![0; 10_000];
    copy::gather(&to, &mut back).expect("copied");
    assert_eq!(back, source);
    let hidden = [Span { memory: HOST, ..gpu_span(device, 8) }];
    assert!(
        copy::gather(&hidden, &mut [0; 8]).is_err(),
        "this memory is not the host's, or the test proves nothing"
    );
}

#[test]
fn a_copy_that_fails_is_an_error_and_leaves_the_thread_as_it_was() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = Gpu::get();
    let address = gpu.memory(Kind::Device, &[4096]);
    cuda::copy_in(address, &[1; 4096]).expect("copied");
    for call in ["cuCtxPushCurrent", "cuMemcpyHtoDAsync", "cuStreamSynchronize"] {
        gpu.fail(call, 1);
        assert!(cuda::copy_in(address, &[2; 4096]).is_err(), "{call}");
        assert_eq!(gpu.depth(), 0, "{call}");
    }
    gpu.fail("", 0);
    assert!(cuda::copy_in(address + 4000, &[2; 97]).is_err(), "beyond its end");
    gpu.free(address);
    assert!(cuda::copy_in(address, &[2; 1]).is_err(), "freed");
}

/// Both ends have GPU memory and nothing else; the device gets it by address, since these libfabrics know no CUDA.
#[test]
fn gpu_memory_moves_between_processes() {
    each(|network| {
        let [mut a, mut b] = network.pair(64, 128);
        network.control("hold_pct=50 reorder_us=500");
        let length = 3 * MIB + 1;
        let answers: Vec<_> = [&mut a, &mut b].map(|end| end.ask(&format!("gpu {length}"))).into();
        let (key, base) = answers[1].split_once(' ').expect("key and base");
        a.ask("gpu-fill 7");
        b.ask("gpu-fill 8");
        b.tell("wait 0 1 30000");
        a.ask(&format!("write 0 gpu 0 {length} {key} {base} 5"));
        assert_eq!(a.wait(1, 0).sent, [0]);
        assert_eq!(b.done().arrived.len(), 1);
        assert_eq!(b.ask("gpu-check 7"), "");
        b.ask("gpu-fill 9");
        a.ask(&format!("read 0 gpu 0 {length} {key} {base}"));
        assert_eq!(a.wait(1, 0).sent, [0]);
        assert_eq!(a.ask("gpu-check 9"), "");
        // More than may wait in copies at a time, in the middle of which the reader dies; another goes on.
        let mut other = network.spawn("c");
        other.open(0, &network.fabric);
        other.buffer(64);
        other.connect(&b);
        b.connect(&other);
        // The fabric efa exchanges a handshake before it uses RDMA, for which both ends poll.
        b.tell("wait 0 1 30000");
        other.write(0, &b, 0, 8, Some(1));
        assert_eq!(other.wait(1, 0).sent, [0]);
        assert_eq!(b.done().arrived.len(), 1);
        other.ask(&format!("gpu {length}"));
        for _ in 0..64 {
            other.ask(&format!("read 0 gpu 0 {length} {key} {base}"));
        }
        other.signal(libc::SIGKILL);
        for _ in 0..48 {
            a.ask(&format!("read 0 gpu 0 {length} {key} {base}"));
        }
        assert_eq!(a.wait(48, 0).sent, vec![0; 48]);
        assert_eq!(a.ask("gpu-check 9"), "");
    });
}
