//! The calling thread's CUDA state is the same after each call as before it, and no context comes into being.

mod cuda_bed;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use cuda_bed::{Bed, Memory};
use nixl_libfabric::cuda::{Pinned, Stream};
use nixl_libfabric::error::{Error, Result};

const MIB: usize = 1 << 20;
const RELAX: &str = "cuThreadExchangeStreamCaptureMode 2";
const UNRELAX: &str = "cuThreadExchangeStreamCaptureMode 0";

#[test]
fn a_context_is_pushed_used_and_popped_in_that_order() {
    let bed = Bed::new();
    let ctx = bed.app_uses(1);
    let addr = bed.memory(Memory::Device, 1, MIB, ctx);
    let allocation = bed.cuda.inspect(addr, 100).unwrap();
    bed.take_log();
    allocation.with_context(&bed.cuda, || bed.count("calls")).unwrap();
    let expected = [
        RELAX,
        "cuCtxGetCurrent",
        "cuCtxPushCurrent primary1",
        "cuCtxPopCurrent primary1",
        "cuCtxGetCurrent",
        UNRELAX,
    ];
    assert_eq!(bed.take_log(), expected);
    drop(allocation);
    assert_eq!(bed.take_log(), [RELAX, "cuDevicePrimaryCtxRelease 1", UNRELAX]);
}

#[test]
fn an_inspection_works_in_the_allocations_context_and_leaves() {
    let bed = Bed::new();
    let other = bed.app_uses(0);
    let ctx = bed.app_uses(1);
    bed.app_current(other);
    let addr = bed.memory(Memory::Device, 1, MIB, ctx);
    let allocation = bed.cuda.inspect(addr, 100).unwrap();
    let log = bed.take_log();
    let position =
        |call: &str| log.iter().position(|line| line == call).unwrap_or_else(|| panic!("{call} in {log:?}"));
    assert!(position("cuDevicePrimaryCtxGetState 1") < position("cuDevicePrimaryCtxRetain 1"));
    assert!(position("cuCtxPushCurrent primary1") < position("cuMemGetAddressRange primary1"));
    assert!(position("cuMemGetAddressRange primary1") < position("cuCtxPopCurrent primary1"));
    assert_eq!(bed.thread_state(), (other, 1, 0));
    drop(allocation);
    assert_eq!((bed.count("primary0"), bed.count("primary1")), (1, 1));
}

#[test]
fn a_panic_in_the_work_leaves_the_context_too() {
    let bed = Bed::new();
    let mine = bed.app_uses(0);
    let ctx = bed.app_uses(1);
    bed.app_current(mine);
    let addr = bed.memory(Memory::Async, 1, MIB, 0);
    let allocation = bed.cuda.inspect(addr, 100).unwrap();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        allocation.with_context(&bed.cuda, || {
            assert_eq!(bed.thread_state(), (ctx, 2, 2));
            panic!("the work failed");
        })
    }));
    outcome.unwrap_err();
    assert_eq!(bed.thread_state(), (mine, 1, 0));
}

#[test]
fn work_that_leaves_the_stack_uneven_is_set_right() {
    for careless in [Bed::push, Bed::set_current] {
        let bed = Bed::new();
        let mine = bed.app_uses(0);
        let ctx = bed.app_uses(1);
        bed.app_current(mine);
        let addr = bed.memory(Memory::Device, 1, MIB, ctx);
        let allocation = bed.cuda.inspect(addr, 100).unwrap();
        let stranger = bed.app_context(1);
        allocation.with_context(&bed.cuda, || careless(&bed, stranger)).unwrap();
        let (current, _, mode) = bed.thread_state();
        assert_eq!((current, mode), (mine, 0));
    }
}

#[test]
fn contexts_nest_across_devices() {
    let bed = Bed::new();
    let contexts = [bed.app_uses(0), bed.app_uses(1)];
    let on = [0, 1].map(|device| bed.cuda.active_context(device).unwrap().unwrap());
    on[0]
        .with(|| {
            on[1].with(|| assert_eq!(bed.thread_state(), (contexts[1], 2, 2))).unwrap();
            assert_eq!(bed.thread_state(), (contexts[0], 1, 2));
        })
        .unwrap();
    assert_eq!(bed.thread_state(), (0, 0, 0));
}

#[test]
fn each_thread_keeps_its_own_current_context() {
    let bed = Bed::new();
    let contexts = [bed.app_uses(0), bed.app_uses(1)];
    let addrs = [0, 1].map(|device| bed.memory(Memory::Device, device, MIB, contexts[device as usize]));
    // Raw pointers within the bed keep it off other threads; what they need is copied out.
    let shared = Shared(&bed);
    std::thread::scope(|scope| {
        for current in [0, contexts[0], contexts[1]] {
            let shared = &shared;
            scope.spawn(move || {
                let bed = shared.0;
                bed.app_current(current);
                let before = bed.thread_state();
                for round in 0..50 {
                    let addr = addrs[round % 2];
                    let allocation = bed.cuda.inspect(addr, 4096).unwrap();
                    assert_eq!(bed.thread_state(), before);
                    bed.cuda.export(&allocation, addr, 4096).unwrap();
                    assert_eq!(bed.thread_state(), before);
                }
            });
        }
    });
    assert_eq!((bed.count("primary0"), bed.count("primary1")), (1, 1));
    assert_eq!(bed.open_dmabufs(), 0);
}

/// Lends a bed to other threads.
struct Shared<'a>(&'a Bed);
// SAFETY: the stand-in locks around its state, and its handle is used for look-ups alone.
unsafe impl Sync for Shared<'_> {}

#[test]
fn no_context_is_created_on_a_device_that_the_application_does_not_use() {
    let bed = Bed::new();
    let mine = bed.app_uses(0);
    bed.app_current(mine);
    assert!(bed.cuda.active_context(1).unwrap().is_none());
    for kind in [Memory::Vmm, Memory::Async] {
        let addr = bed.memory(kind, 1, MIB, 0);
        let allocation = bed.cuda.inspect(addr, MIB as u64).unwrap();
        assert!(allocation.context.is_none(), "{kind:?}");
        assert_eq!(bed.cuda.export(&allocation, addr, MIB as u64).unwrap().len(), 1);
        assert_eq!(bed.thread_state(), (mine, 1, 0));
    }
    assert_eq!((bed.count("contexts_created"), bed.count("primary1")), (0, 0));
    assert!(!bed.take_log().iter().any(|call| call.starts_with("cuDevicePrimaryCtxRetain")));
}

#[test]
fn memory_without_a_context_is_no_error_even_with_none_current() {
    let bed = Bed::new();
    let addr = bed.map(Memory::Vmm, &[(2 * MIB, 1), (2 * MIB, 1)], 0);
    let allocation = bed.cuda.inspect(addr + 100, 3 * MIB as u64).unwrap();
    assert_eq!((allocation.base, allocation.size), (addr, 4 * MIB as u64));
    assert_eq!(allocation.segments.len(), 2);
    let ran = allocation.with_context(&bed.cuda, || bed.thread_state()).unwrap();
    assert_eq!(ran, (0, 0, 2));
    assert_eq!(bed.thread_state(), (0, 0, 0));
}

#[test]
fn a_context_of_the_applications_own_is_used_as_it_is() {
    let bed = Bed::new();
    let own = bed.app_context(1);
    for primary_active in [false, true] {
        if primary_active {
            bed.app_uses(1);
        }
        let addr = bed.memory(Memory::Device, 1, MIB, own);
        let allocation = bed.cuda.inspect(addr, 1).unwrap();
        assert!(!allocation.context.as_ref().unwrap().is_primary());
        assert_eq!(allocation.with_context(&bed.cuda, || bed.thread_state().0).unwrap(), own);
        drop(allocation);
        assert_eq!(bed.count("primary1"), i64::from(primary_active));
    }
}

#[test]
fn a_kept_context_outlives_the_applications_use_of_it() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let addr = bed.memory(Memory::Device, 0, MIB, ctx);
    let allocation = bed.cuda.inspect(addr, 1).unwrap();
    assert_eq!(bed.count("primary0"), 2);
    let kept = allocation.context.clone().unwrap();
    drop(allocation);
    assert_eq!(bed.count("primary0"), 2);
    std::thread::scope(|scope| scope.spawn(move || kept.with(|| ()).unwrap()).join().unwrap());
    assert_eq!(bed.count("primary0"), 1);
}

#[test]
fn an_application_that_captures_a_graph_is_not_disturbed() {
    let bed = Bed::new();
    bed.app_uses(0);
    bed.option("capturing", 1);
    let context = bed.cuda.active_context(0).unwrap().unwrap();
    let mut buffer = Pinned::new(&context, 4096).unwrap();
    buffer.write(0, &[7; 4096]).unwrap();
    let target = bed.memory(Memory::Async, 0, 4096, 0);
    let stream = Stream::new(&context).unwrap();
    let target = bed.span(target, 4096);
    stream.copy_wait(target, buffer.span(), Duration::from_secs(10)).unwrap();
    drop((stream, buffer));
    assert_eq!(bed.count("capture_ruined"), 0);
    assert_eq!(bed.thread_state(), (0, 0, 0));
}

/// Everything the library does with a buffer on device 1, from a thread on device 0.
fn whole_life(bed: &Bed, addr: u64) -> Result<()> {
    let len = 4 * MIB as u64;
    let allocation = bed.cuda.inspect(addr, len)?;
    allocation.require_vram()?;
    bed.cuda.set_sync_memops(&allocation)?;
    let exported = bed.cuda.export(&allocation, addr, len)?;
    allocation.with_context(&bed.cuda, || ())?;
    let context = allocation.context.as_ref().ok_or_else(|| Error::not_found("no context"))?;
    let buffer = Pinned::new(context, MIB)?;
    let stream = Stream::new(context)?;
    let gpu = bed.span(addr, len).part(0, MIB as u64)?;
    let mut copy = stream.copy_all([(gpu.clone(), buffer.span()), (buffer.span(), gpu)])?;
    while !copy.is_done()? {}
    drop((copy, stream, buffer, exported));
    Ok(())
}

#[test]
fn whatever_call_fails_the_thread_is_as_it_was_and_nothing_leaks() {
    for (kind, handles) in [(Memory::Device, 1), (Memory::Vmm, 2)] {
        let bed = Bed::new();
        let mine = bed.app_uses(0);
        let ctx = bed.app_uses(1);
        bed.app_current(mine);
        let ctx = if kind == Memory::Device { ctx } else { 0 };
        let addr = bed.map(kind, &vec![(4 * MIB / handles, 1); handles], ctx);
        bed.option("dmabuf_across", 0);
        let start = bed.count("calls");
        whole_life(&bed, addr).unwrap();
        let calls = bed.count("calls") - start;
        assert!(calls > 50, "{calls}");
        for nth in 1..=calls {
            bed.take_log();
            bed.fail("*", nth as i32, 999);
            let outcome = whole_life(&bed, addr);
            let log = bed.take_log();
            bed.fail("*", 0, 0);
            let failed = log[nth as usize - 1].split(' ').next().unwrap();
            let at = format!("{kind:?}: call {nth}, {failed}: {outcome:?}");
            let (current, depth, mode) = bed.thread_state();
            assert_eq!(current, mine, "{at}");
            match failed {
                // What could not be undone because undoing failed is lost; the caller's current context is not.
                "cuCtxPopCurrent" => {}
                "cuThreadExchangeStreamCaptureMode" => assert_eq!(depth, 1, "{at}"),
                _ => assert_eq!((depth, mode), (1, 0), "{at}"),
            }
            let undoing = ["Release", "Destroy", "FreeHost", "Pop", "GetCurrent", "SetCurrent", "Push"];
            if !undoing.iter().any(|call| failed.contains(call)) {
                assert_eq!(bed.live(), (0, 0, 0, 0, 0), "{at}");
                assert_eq!((bed.count("primary0"), bed.count("primary1")), (1, 1), "{at}");
            }
            assert_eq!((bed.open_dmabufs(), bed.count("contexts_created")), (0, 0), "{at}");
            reset(&bed, mine);
        }
    }
}

/// Undoes what a failed undoing left, so that the next round starts clean.
fn reset(bed: &Bed, current: usize) {
    bed.app_current(current);
    bed.reset_counts();
}
