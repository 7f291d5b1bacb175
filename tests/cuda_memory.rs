//! What the library says of each kind of memory, exports of it, and copies.

mod cuda_bed;

use std::time::Duration;

use cuda_bed::{Bed, Memory, bytes_at};
use nixl_libfabric::cuda::{Kind, PINNED_BYTES_MAX, Pinned, Span, Stream};
use nixl_libfabric::error::Status;
use nixl_libfabric::fabric::MemoryRange;

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(30);

#[test]
fn devices_are_listed_with_their_pci_addresses() {
    let bed = Bed::new();
    let pci: Vec<String> = bed.cuda.devices().iter().map(|d| d.pci.to_string()).collect();
    assert_eq!(pci, ["0000:1a:00.0", "0000:1b:00.0"]);
    assert_eq!(bed.cuda.device(1).unwrap().name, "Stand-in GPU 1");
    assert_eq!(bed.cuda.device(2).unwrap_err().status(), Status::NotFound);
    assert_eq!(bed.cuda.driver_version(), (12, 9));
    assert_eq!(bed.count("contexts_created"), 0);
}

#[test]
fn each_kind_of_memory_is_told() {
    let bed = Bed::new();
    let ctx = bed.app_uses(1);
    for (memory, ctx, kind, vram) in [
        (Memory::Device, ctx, Kind::Device, true),
        (Memory::Imported, ctx, Kind::Imported, true),
        (Memory::Async, 0, Kind::Async, true),
        (Memory::Vmm, 0, Kind::Vmm, true),
        (Memory::Managed, ctx, Kind::Managed, false),
        (Memory::Host, ctx, Kind::Host, false),
        (Memory::VmmOnHost, 0, Kind::Host, false),
    ] {
        let addr = bed.memory(memory, 1, MIB as usize, ctx);
        let found = bed.cuda.inspect(addr + 10, 100).unwrap();
        assert_eq!((found.kind, found.device.ordinal), (kind, 1), "{memory:?}");
        assert_eq!(found.device.pci.to_string(), "0000:1b:00.0");
        assert_eq!((found.dmabuf_supported, found.gdr_supported), (vram, vram), "{memory:?}");
        assert_eq!(found.require_vram().is_ok(), vram, "{memory:?}");
        assert!(found.context.unwrap().is_primary());
        if vram {
            assert_eq!((found.base, found.size), (addr, MIB));
        }
    }
    assert_eq!(bed.live(), (0, 0, 0, 0, 0));
}

#[test]
fn refusals_say_what_to_do() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let managed = bed.cuda.inspect(bed.memory(Memory::Managed, 0, 4096, ctx), 1).unwrap();
    assert!(managed.require_vram().unwrap_err().to_string().contains("cudaMalloc"));
    let host = bed.cuda.inspect(bed.memory(Memory::Host, 0, 4096, ctx), 1).unwrap();
    assert!(host.require_vram().unwrap_err().to_string().contains("DRAM_SEG"));
    let here = 0_u8;
    let unknown = bed.cuda.inspect(&raw const here as u64, 1).unwrap_err();
    assert_eq!(unknown.status(), Status::NotFound);
    assert!(unknown.to_string().contains("ordinary host memory"), "{unknown}");
}

#[test]
fn ranges_that_leave_their_allocation_are_refused() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let addr = bed.memory(Memory::Device, 0, MIB as usize, ctx);
    let status = |addr, len| bed.cuda.inspect(addr, len).unwrap_err().status();
    assert_eq!(status(addr, 0), Status::InvalidParam);
    assert_eq!(status(addr, u64::MAX), Status::InvalidParam);
    assert_eq!(status(addr + 1, MIB), Status::InvalidParam);
    bed.cuda.inspect(addr + 1, MIB - 1).unwrap();
    // Two allocations that touch are two allocations still.
    let pair = bed.map(Memory::Device, &[(MIB as usize, 0), (MIB as usize, 0)], ctx);
    assert_eq!(status(pair, 2 * MIB), Status::InvalidParam);
    let holed = bed.map(Memory::Vmm, &[(MIB as usize, 0), (MIB as usize, -1), (MIB as usize, 0)], 0);
    assert_eq!(status(holed, 3 * MIB), Status::NotFound);
    let mixed = bed.map(Memory::Vmm, &[(MIB as usize, 0), (MIB as usize, 1)], 0);
    assert_eq!(status(mixed, 2 * MIB), Status::InvalidParam);
    assert_eq!(bed.count("primary0"), 1);
}

#[test]
fn a_driver_without_the_newer_attributes_still_tells_the_device() {
    let bed = Bed::new();
    let ctx = bed.app_uses(1);
    let addr = bed.memory(Memory::Device, 1, 4096, ctx);
    bed.fail("cuPointerGetAttribute", 1, 1);
    let found = bed.cuda.inspect(addr, 4096).unwrap();
    assert_eq!((found.kind, found.device.ordinal), (Kind::Device, 1));
}

#[test]
fn sync_memops_are_set_where_there_is_such_a_thing() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let device = bed.cuda.inspect(bed.memory(Memory::Device, 0, 4096, ctx), 1).unwrap();
    let vmm = bed.cuda.inspect(bed.memory(Memory::Vmm, 0, 4096, 0), 1).unwrap();
    assert_eq!(bed.cuda.set_sync_memops(&device), Ok(true));
    assert_eq!(bed.cuda.set_sync_memops(&vmm), Ok(false));
    bed.fail("cuPointerSetAttribute", 1, 999);
    bed.cuda.set_sync_memops(&device).unwrap_err();
}

#[test]
fn an_export_is_of_whole_pages_and_closes_with_its_owner() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let addr = bed.memory(Memory::Device, 0, MIB as usize, ctx);
    let allocation = bed.cuda.inspect(addr, MIB).unwrap();
    bed.take_log();
    let exported = bed.cuda.export(&allocation, addr + 5000, 5000).unwrap();
    assert_eq!(exported.len(), 1);
    assert_eq!((exported[0].offset, exported[0].addr, exported[0].len), (5000 - 4096, addr + 5000, 5000));
    let calls = bed.take_log();
    assert!(
        calls.contains(&"cuMemGetHandleForAddressRange primary0 size=8192 flags=1".to_owned()),
        "{calls:?}"
    );
    assert_eq!(bed.open_dmabufs(), 1);
    drop(exported);
    assert_eq!(bed.open_dmabufs(), 0);
    assert_eq!(bed.cuda.export(&allocation, addr, MIB + 1).unwrap_err().status(), Status::InvalidParam);
}

#[test]
fn an_export_goes_without_the_pcie_flag_where_the_driver_does_not_know_it() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    bed.option("pcie_flag", 0);
    let addr = bed.memory(Memory::Device, 0, MIB as usize, ctx);
    let allocation = bed.cuda.inspect(addr, MIB).unwrap();
    assert_eq!(bed.cuda.export(&allocation, addr, MIB).unwrap().len(), 1);
}

#[test]
fn memory_of_several_handles_is_exported_whole_or_handle_by_handle() {
    let bed = Bed::new();
    bed.app_uses(0);
    let addr = bed.map(Memory::Vmm, &[(2 * MIB as usize, 0); 3], 0);
    let allocation = bed.cuda.inspect(addr + MIB, 4 * MIB).unwrap();
    assert_eq!(allocation.segments.len(), 3);
    assert_eq!(bed.cuda.export(&allocation, addr + MIB, 4 * MIB).unwrap().len(), 1);
    bed.option("dmabuf_across", 0);
    let parts = bed.cuda.export(&allocation, addr + MIB, 4 * MIB).unwrap();
    let parts_at: Vec<_> = parts.iter().map(|p| (p.addr - addr, p.len, p.offset)).collect();
    assert_eq!(parts_at, [(MIB, MIB, 0), (2 * MIB, 2 * MIB, 0), (4 * MIB, MIB, 0)]);
    assert_eq!(bed.open_dmabufs(), 3);
    // The second of the parts fails: the first is closed.
    drop(parts);
    bed.option("pcie_flag", 1);
    bed.fail("cuMemGetHandleForAddressRange", 4, 999);
    bed.cuda.export(&allocation, addr + MIB, 4 * MIB).unwrap_err();
    assert_eq!(bed.open_dmabufs(), 0);
}

#[test]
fn a_device_without_dmabuf_says_so() {
    let (handle, path) = Bed::open();
    cuda_bed::set_option(handle, "dmabuf", 0);
    let cuda = nixl_libfabric::cuda::Cuda::load(Some(&path)).unwrap();
    std::fs::remove_file(path).unwrap();
    assert!(cuda.devices().iter().all(|d| !d.dmabuf && d.gdr));
}

#[test]
fn copies_move_the_bytes_and_are_polled() {
    let bed = Bed::new();
    let contexts = [bed.app_uses(0), bed.app_uses(1)];
    let gpu =
        [0, 1].map(|device| bed.memory(Memory::Device, device, MIB as usize, contexts[device as usize]));
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let stream = Stream::new(&context).unwrap();
    let mut buffer = Pinned::new(&context, 4096).unwrap();
    let pattern: Vec<u8> = (0..4096_u32).map(|i| (i * 7 % 251) as u8).collect();
    buffer.write(0, &pattern).unwrap();

    let [first, second] = gpu.map(|addr| bed.span(addr, MIB));
    let mut copy = stream
        .copy_all([
            (first.part(100, 4096).unwrap(), buffer.span()),
            (second.part(0, 4096).unwrap(), first.part(100, 4096).unwrap()),
        ])
        .unwrap();
    assert!(!copy.is_done().unwrap());
    copy.wait(LONG).unwrap();
    assert!(copy.is_done().unwrap());
    assert_eq!(bytes_at(gpu[1], 4096), pattern);

    buffer.write(0, &[0; 4096]).unwrap();
    stream.copy_wait(buffer.span(), second.part(0, 4096).unwrap(), LONG).unwrap();
    let mut back = vec![0; 4096];
    buffer.read(0, &mut back).unwrap();
    assert_eq!(back, pattern);
    drop((copy, stream, buffer));
    assert_eq!(bed.live(), (0, 0, 0, 0, 0));
}

#[test]
fn events_are_used_again() {
    let bed = Bed::new();
    bed.app_uses(0);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let stream = Stream::new(&context).unwrap();
    let buffer = Pinned::new(&context, 64).unwrap();
    let (to, from) = (buffer.span().part(0, 32).unwrap(), buffer.span().part(32, 32).unwrap());
    for _ in 0..1000 {
        stream.copy_wait(to.clone(), from.clone(), LONG).unwrap();
    }
    assert_eq!(bed.count("events"), 1);
    // More in flight at once than are kept.
    let copies: Vec<_> = (0..100).map(|_| stream.copy(to.clone(), from.clone()).unwrap()).collect();
    assert_eq!(bed.count("events"), 100);
    drop(copies);
    stream.copy_wait(to.clone(), from.clone(), LONG).unwrap();
    stream.copy_wait(to, from, LONG).unwrap();
    assert!(bed.count("events") < 100);
}

#[test]
fn a_buffer_lives_as_long_as_the_copies_that_name_it() {
    let bed = Bed::new();
    bed.app_uses(0);
    bed.option("polls", 20);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let target = bed.memory(Memory::Async, 0, 4096, 0);
    let stream = Stream::new(&context).unwrap();
    let start = |value: u8| {
        let mut buffer = Pinned::new(&context, 4096).unwrap();
        buffer.write(0, &[value; 4096]).unwrap();
        stream.copy(bed.span(target, 4096), buffer.span()).unwrap()
    };
    let mut copy = start(5);
    assert_eq!(bed.count("pinned"), 1);
    copy.wait(LONG).unwrap();
    assert_eq!(bed.count("pinned"), 0);
    assert_eq!(bytes_at(target, 4096), [5; 4096]);
    drop(start(6));
    drop(start(7));
    assert_eq!(bed.count("pinned"), 2);
    drop((copy, stream));
    assert_eq!(bytes_at(target, 4096), [7; 4096]);
    assert_eq!(bed.live(), (0, 0, 0, 0, 0));
}

#[test]
fn a_stream_ends_after_its_copies() {
    let bed = Bed::new();
    bed.app_uses(0);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let mut buffer = Pinned::new(&context, 64).unwrap();
    buffer.write(0, &[9; 32]).unwrap();
    let stream = Stream::new(&context).unwrap();
    let (to, from) = (buffer.span().part(32, 32).unwrap(), buffer.span().part(0, 32).unwrap());
    drop(stream.copy(to, from).unwrap());
    drop(stream);
    assert!(bed.take_log().contains(&"cuStreamDestroy primary0 queued=0".to_owned()));
    let mut bytes = [0; 32];
    buffer.read(32, &mut bytes).unwrap();
    assert_eq!(bytes, [9; 32]);
}

#[test]
fn a_copy_that_fails_midway_tells_so_when_the_rest_has_ended() {
    let bed = Bed::new();
    bed.app_uses(0);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let stream = Stream::new(&context).unwrap();
    let buffer = Pinned::new(&context, 64).unwrap();
    let pair = (buffer.span().part(0, 32).unwrap(), buffer.span().part(32, 32).unwrap());
    bed.fail("cuMemcpyAsync", 1, 700);
    assert!(stream.copy_all([pair.clone(), pair.clone()]).is_err());
    bed.fail("cuMemcpyAsync", 2, 700);
    let mut copy = stream.copy_all([pair.clone(), pair.clone()]).unwrap();
    assert_eq!(copy.is_done(), Ok(false));
    let why = copy.wait(LONG).unwrap_err();
    assert!(why.to_string().contains("STANDIN_ERROR_700"), "{why}");
    copy.is_done().unwrap_err();
}

#[test]
fn a_fault_of_the_device_frees_no_buffer_under_a_copy() {
    let bed = Bed::new();
    bed.app_uses(0);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let stream = Stream::new(&context).unwrap();
    let target = bed.memory(Memory::Async, 0, 64, 0);
    let buffer = Pinned::new(&context, 64).unwrap();
    let mut copy = stream.copy(buffer.span(), bed.span(target, 64)).unwrap();
    bed.fail("cuEventQuery", 1, 719);
    assert!(copy.is_done().is_err() && copy.is_done().is_err());
    drop((copy, buffer));
    assert_eq!(bed.count("pinned"), 1);
    drop(stream);
    assert_eq!(bed.live(), (0, 0, 0, 0, 0));
}

#[test]
fn a_wait_has_an_end() {
    let bed = Bed::new();
    bed.app_uses(0);
    bed.option("polls", 200);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let stream = Stream::new(&context).unwrap();
    let buffer = Pinned::new(&context, 64).unwrap();
    let pair = (buffer.span().part(0, 32).unwrap(), buffer.span().part(32, 32).unwrap());
    let why = stream.copy_wait(pair.0, pair.1, Duration::ZERO).unwrap_err();
    assert!(why.to_string().contains("not done after 0 ms"), "{why}");
}

#[test]
fn spans_and_buffers_check_their_bounds() {
    let bed = Bed::new();
    bed.app_uses(0);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    // SAFETY: nothing is copied from or to it.
    let memory = unsafe { MemoryRange::assume_registered(4096, 1000) };
    for (addr, len) in [(0, 10), (4095, 1), (4096, 1001), (5097, 0), (5000, u64::MAX), (u64::MAX, 2)] {
        assert!(Span::registered(memory, addr, len).is_err(), "{addr}+{len}");
    }
    let span = Span::registered(memory, 4096, 100).unwrap();
    assert!(span.part(50, 50).is_ok() && span.part(50, 51).is_err() && span.part(u64::MAX, 2).is_err());
    assert!(Pinned::new(&context, 0).is_err() && Pinned::new(&context, PINNED_BYTES_MAX + 1).is_err());
    let mut buffer = Pinned::new(&context, 10).unwrap();
    assert!(buffer.write(5, &[0; 6]).is_err() && buffer.read(11, &mut []).is_err());
    let stream = Stream::new(&context).unwrap();
    assert!(stream.copy(buffer.span(), buffer.span().part(0, 9).unwrap()).is_err());
}
