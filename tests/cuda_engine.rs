//! The engine with GPU memory, on a stand-in driver and a stand-in for a libfabric that takes GPU memory.

mod cuda_bed;

use std::time::Duration;

use cuda_bed::stage::{MIB, Stage, desc, fill_at, register, vram, wait};
use cuda_bed::{Memory, bytes_at};
use nixl_libfabric::engine::{XferDesc, available_mems};
use nixl_libfabric::error::Status;
use nixl_libfabric::types::{Desc, MemKind, Op};

#[test]
fn asking_what_the_plugin_could_do_touches_no_driver() {
    let stage = Stage::new();
    assert_eq!(available_mems(), [MemKind::Dram, MemKind::Vram]);
    assert_eq!(stage.bed.take_log(), [""; 0]);
}

#[test]
fn gpu_memory_is_registered_by_dmabuf_in_the_context_of_its_device() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    assert_eq!(engine.supported_mems(), [MemKind::Dram, MemKind::Vram]);
    let mine = stage.bed.app_uses(0);
    stage.bed.app_current(mine);
    let addr = stage.gpu(1, MIB, 0);
    stage.bed.take_log();

    let metadata = vram(&engine, addr, MIB, 1).unwrap();
    let story = stage.story();
    let at = story.iter().position(|line| line == "fi_mr_regattr cuda1 dmabuf primary1").unwrap();
    assert_eq!(story[at - 1], "cuCtxPushCurrent primary1");
    assert_eq!(story[at + 1], "cuCtxPopCurrent primary1");
    assert_eq!(stage.bed.thread_state(), (mine, 1, 0));
    assert_eq!(stage.bed.open_dmabufs(), 0, "the registration keeps the memory, not the descriptor");

    engine.deregister_mem(&metadata).unwrap();
    let expected = ["cuCtxPushCurrent primary1", "fi_close(mr) primary1", "cuCtxPopCurrent primary1"];
    assert_eq!(stage.story(), expected);
    drop(metadata);
    assert_eq!(stage.story(), [""; 0]);
    assert_eq!(stage.bed.thread_state(), (mine, 1, 0));
    drop(engine);
    assert_eq!(stage.bed.count("contexts_created"), 0);
}

#[test]
fn where_no_dmabuf_is_to_be_had_the_address_is_registered() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    let addr = stage.gpu(0, MIB, 0);
    for refuse in
        [|stage: &Stage| stage.fabric_option("dmabuf", 0), |stage: &Stage| stage.bed.option("dmabuf", 0)]
    {
        stage.fabric_option("dmabuf", 1);
        refuse(&stage);
        stage.bed.take_log();
        let metadata = vram(&engine, addr, MIB, 0).unwrap();
        let story = stage.story();
        assert!(story.iter().any(|line| line == "fi_mr_regattr cuda0 address primary0"), "{story:?}");
        drop(metadata);
    }
    assert_eq!(stage.bed.open_dmabufs(), 0);
}

/// Without it a provider that copies by CUDA completes operations before the copies are over.
#[test]
fn copies_on_registered_memory_are_synchronous_whoever_makes_them() {
    let stage = Stage::new();
    for nic in [1, 0] {
        stage.fabric_option("nic", nic);
        let engine = stage.engine_with("alone", false, &[("devices", "*")]);
        let addr = stage.gpu(0, MIB, 0);
        stage.bed.take_log();
        let metadata = vram(&engine, addr, MIB, 0).unwrap();
        let log = stage.bed.take_log();
        assert!(log.iter().any(|line| line.starts_with("cuPointerSetAttribute")), "nic {nic}: {log:?}");
        drop(metadata);
    }
}

#[test]
fn memory_of_several_handles_is_registered_whole() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    stage.bed.app_uses(1);
    let addr = stage.bed.map(Memory::Vmm, &[(MIB, 1), (MIB, 1), (MIB, 1)], 0);
    for across in [1, 0] {
        stage.bed.option("dmabuf_across", across);
        stage.bed.take_log();
        drop(vram(&engine, addr + 4096, 2 * MIB, 1).unwrap());
        let way = if across == 1 { "dmabuf" } else { "address" };
        let story = stage.story();
        assert!(story.contains(&format!("fi_mr_regattr cuda1 {way} primary1")), "{story:?}");
    }
    let live = stage.bed.live();
    assert_eq!((live.3, live.4), (0, 0), "handles and dmabufs are given back");
}

#[test]
fn what_is_no_gpu_memory_is_refused_in_words() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    let ctx = stage.bed.app_uses(0);
    let heap = vec![0_u8; 4096];
    for (kind, words) in [(Memory::Managed, "cudaMalloc"), (Memory::Host, "DRAM_SEG")] {
        let addr = stage.bed.memory(kind, 0, MIB, ctx);
        let error = vram(&engine, addr, MIB, 0).unwrap_err();
        assert_eq!(error.status(), Status::NotSupported);
        assert!(error.to_string().contains(words), "{error}");
    }
    let error = vram(&engine, heap.as_ptr() as u64, heap.len(), 0).unwrap_err();
    assert_eq!(error.status(), Status::NotFound, "{error}");
    let story = stage.story();
    assert!(!story.iter().any(|line| line.starts_with("fi_mr_regattr")), "{story:?}");
}

#[test]
fn a_provider_without_gpu_support_lists_and_takes_none() {
    let stage = Stage::new();
    stage.fabric_option("hmem", 0);
    let engine = stage.engine("alone", false);
    assert_eq!(engine.supported_mems(), [MemKind::Dram]);
    let addr = stage.gpu(0, MIB, 0);
    let error = vram(&engine, addr, MIB, 0).unwrap_err();
    assert_eq!(error.status(), Status::NotSupported);
    // All that the host is told is a status: the line in the log says what was refused, why, and what to do.
    let words = ["cannot register accelerator memory (FI_HMEM)", "NIXL_LIBFABRIC_VRAM_STAGING=true", "on lo"];
    assert!(words.iter().all(|words| error.to_string().contains(words)), "{error}");
    let desc = Desc { addr, len: MIB as u64, dev_id: 0 };
    assert_eq!(engine.query_mem(MemKind::Vram, &mut [desc].into_iter()).unwrap(), [None]);
}

#[test]
fn a_queried_range_tells_device_and_rails() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    let addr = stage.gpu(1, MIB, 0);
    let desc = Desc { addr, len: MIB as u64, dev_id: 1 };
    let answer = engine.query_mem(MemKind::Vram, &mut [desc].into_iter()).unwrap();
    let facts = answer[0].as_ref().unwrap();
    assert_eq!((facts["device"].as_str(), facts["pci"].as_str()), ("1", "0000:1b:00.0"));
    assert_eq!(facts["rails"], "0");
}

#[test]
fn whatever_call_fails_the_thread_is_left_as_it_was_and_nothing_is_kept() {
    let stage = Stage::new();
    let engine = stage.engine("alone", false);
    let mine = stage.bed.app_uses(0);
    stage.bed.app_current(mine);
    let addr = stage.gpu(1, MIB, 0);
    let held = stage.bed.count("primary1");
    stage.bed.take_log();
    drop(vram(&engine, addr, MIB, 1).unwrap());
    let calls = stage.bed.take_log().len() as i32;
    let mut refused = 0;
    for nth in 1..=calls {
        stage.bed.fail("*", nth, 999);
        let outcome = vram(&engine, addr, MIB, 1);
        refused += i32::from(outcome.is_err());
        drop(outcome);
        stage.bed.fail("", 0, 0);
        assert_eq!(stage.bed.thread_state().0, mine, "after call {nth} failed");
        stage.bed.app_current(mine);
        let live = stage.bed.live();
        assert_eq!(live.4, 0, "a dmabuf is left after call {nth} failed");
        assert!((held..=held + i64::from(nth)).contains(&stage.bed.count("primary1")));
    }
    assert!(refused > 0);
    drop(engine);
    stage.bed.reset_counts();
}

#[test]
fn an_agent_copies_to_itself_by_gpu() {
    let stage = Stage::new();
    let engine = stage.engine("self", false);
    let (a, b) = (stage.gpu(0, 3 * MIB, 0xa1), stage.gpu(1, 3 * MIB, 0xb2));
    let mut host = vec![0_u8; 3 * MIB];
    let host_addr = host.as_mut_ptr() as u64;
    let on_a = vram(&engine, a, 3 * MIB, 0).unwrap();
    let on_b = vram(&engine, b, 3 * MIB, 1).unwrap();
    let on_host = register(&engine, MemKind::Dram, host_addr, 3 * MIB, 0).unwrap();
    let copy = |op, from: XferDesc<'_>, to: XferDesc<'_>| {
        let (local, remote) = if op == Op::Write { (from, to) } else { (to, from) };
        engine.prep_xfer(op, &[local], &[remote], &"self".into()).unwrap()
    };

    // Between GPUs: it is done when the GPU says so, not before.
    stage.bed.option("polls", 50);
    let request = copy(Op::Write, desc(&on_a, a + 8, 2 * MIB), desc(&on_b, b + MIB as u64, 2 * MIB));
    assert_eq!(engine.post_xfer(&request, Some(b"there")).unwrap(), Status::InProgress);
    assert_eq!(bytes_at(b + MIB as u64, 1), [0xb2]);
    assert!(engine.take_notifications().unwrap().is_empty(), "a notification before its data");
    assert_eq!(wait(&[&engine], &request), Ok(Status::Success));
    assert_eq!(bytes_at(b + MIB as u64, 2 * MIB), vec![0xa1; 2 * MIB]);
    assert_eq!(bytes_at(b, MIB), vec![0xb2; MIB]);
    assert_eq!(engine.take_notifications().unwrap().len(), 1);
    stage.bed.option("polls", 1);

    // To the host and back, the same request twice.
    let request = copy(Op::Read, desc(&on_b, b, 3 * MIB), desc(&on_host, host_addr, 3 * MIB));
    for _ in 0..2 {
        fill_at(host_addr, 3 * MIB, 0);
        engine.post_xfer(&request, None).unwrap();
        assert_eq!(wait(&[&engine], &request), Ok(Status::Success));
        assert_eq!(bytes_at(host_addr, 3 * MIB), bytes_at(b, 3 * MIB));
    }
    let request = copy(Op::Write, desc(&on_host, host_addr, MIB), desc(&on_a, a, MIB));
    engine.post_xfer(&request, None).unwrap();
    assert_eq!(wait(&[&engine], &request), Ok(Status::Success));
    assert_eq!(bytes_at(a, MIB), vec![0xb2; MIB]);

    // Released in flight: the regions are let go when the GPU has let go of them.
    stage.bed.option("polls", 20);
    let request = copy(Op::Write, desc(&on_a, a, MIB), desc(&on_b, b, MIB));
    assert_eq!(engine.post_xfer(&request, None).unwrap(), Status::InProgress);
    engine.release_request(request).unwrap();
    engine.deregister_mem(&on_a).unwrap();
    assert_eq!(stage.bed.thread_state(), (0, 0, 0));
    drop((on_a, on_b, on_host));
    drop(engine);
    let live = stage.bed.live();
    assert_eq!((live.0, live.1), (0, 0), "streams and events are given back");
}

#[test]
fn a_copy_that_the_gpu_refuses_is_an_error_of_its_request() {
    let stage = Stage::new();
    let engine = stage.engine("self", false);
    let (a, b) = (stage.gpu(0, MIB, 1), stage.gpu(0, MIB, 2));
    let (on_a, on_b) = (vram(&engine, a, MIB, 0).unwrap(), vram(&engine, b, MIB, 0).unwrap());
    let prepare = || {
        let (from, to) = (desc(&on_a, a, MIB), desc(&on_b, b, MIB));
        engine.prep_xfer(Op::Write, &[from], &[to], &"self".into()).unwrap()
    };
    for call in ["cuStreamCreate", "cuMemcpyAsync", "cuEventRecord", "cuEventQuery"] {
        let request = prepare();
        stage.bed.fail(call, 1, 700);
        let outcome = engine.post_xfer(&request, None).and_then(|_| wait(&[&engine], &request));
        stage.bed.fail("", 0, 0);
        assert!(outcome.is_err(), "{call}");
        let next = prepare();
        engine.post_xfer(&next, None).unwrap();
        assert_eq!(wait(&[&engine], &next), Ok(Status::Success), "after {call}");
    }
    drop((on_a, on_b));
    drop(engine);
    stage.bed.reset_counts();
}

#[test]
fn gpu_memory_goes_over_the_wire_and_the_provider_finds_a_context() {
    for progress_thread in [false, true] {
        let stage = Stage::new();
        let (one, two) = (stage.engine("one", progress_thread), stage.engine("two", progress_thread));
        let (a, b) = (stage.gpu(0, 4 * MIB, 0x5a), stage.gpu(1, 4 * MIB, 0));
        let (on_a, on_b) = (vram(&one, a, 4 * MIB, 0).unwrap(), vram(&two, b, 4 * MIB, 1).unwrap());
        one.load_remote_conn_info(&"two".into(), &two.conn_info().unwrap()).unwrap();
        two.load_remote_conn_info(&"one".into(), &one.conn_info().unwrap()).unwrap();
        let range = Desc { addr: b, len: 4 * MIB as u64, dev_id: 1 };
        let there = one
            .load_remote_md(range, MemKind::Vram, &two.public_data(&on_b).unwrap(), &"two".into())
            .unwrap();
        // Until here one of the two had no GPU memory, and need not have looked for a context.
        stage.fabric_option("cuda", 1);
        stage.bed.take_log();
        for op in [Op::Write, Op::Read] {
            let (here, far) = (desc(&on_a, a, 4 * MIB), desc(&there, b, 4 * MIB));
            let request = one.prep_xfer(op, &[here], &[far], &"two".into()).unwrap();
            one.post_xfer(&request, None).unwrap();
            assert_eq!(wait(&[&one, &two], &request), Ok(Status::Success));
            assert_eq!(bytes_at(a, 4 * MIB), bytes_at(b, 4 * MIB));
            assert_eq!(bytes_at(a, 1), [0x5a]);
            fill_at(b, 4 * MIB, 0x5a);
        }
        assert_eq!(stage.bed.thread_state(), (0, 0, 0));
        drop((on_a, on_b, there));
        drop((one, two));
        let story = stage.story();
        assert!(!story.iter().any(|line| line.starts_with("fi_cq_read")), "driven without a context");
        assert_eq!(stage.bed.count("contexts_created"), 0);
    }
}

#[test]
fn a_copy_within_an_agent_ends_after_transfer_timeout_ms() {
    const BYTES: usize = 64 * MIB;
    let stage = Stage::new();
    let engine = stage.engine_with("self", false, &[("transfer_timeout_ms", "1")]);
    let (source, target) = (vec![1_u8; BYTES], vec![0_u8; BYTES]);
    let [from, to] = [&source, &target]
        .map(|memory| register(&engine, MemKind::Dram, memory.as_ptr() as u64, BYTES, 0).unwrap());
    let (local, remote) =
        (desc(&from, source.as_ptr() as u64, BYTES), desc(&to, target.as_ptr() as u64, BYTES));
    let request = engine.prep_xfer(Op::Write, &[local], &[remote], &"self".into()).unwrap();
    engine.post_xfer(&request, Some(b"never")).unwrap();
    std::thread::sleep(Duration::from_millis(2));
    let error = wait(&[&engine], &request).unwrap_err();
    assert!(error.to_string().contains("transfer_timeout_ms"), "{error}");
    assert!(engine.take_notifications().unwrap().is_empty());
}
