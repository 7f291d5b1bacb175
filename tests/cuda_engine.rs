//! The engine with GPU memory, on a stand-in driver and a stand-in for a libfabric that takes GPU memory.

mod cuda_bed;

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cuda_bed::{Bed, Memory, bytes_at};
use nixl_libfabric::cuda::LIBRARY_ENV;
use nixl_libfabric::engine::{Engine, InitParams, Metadata, Request, XferDesc, available_mems};
use nixl_libfabric::error::{Result, Status};
use nixl_libfabric::fabric::MemoryRange;
use nixl_libfabric::types::{Desc, MemKind, Op};

const MIB: usize = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

/// The process has one CUDA driver and one libfabric, so the tests take turns.
struct Stage {
    bed: Bed,
    fabric: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARIES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (driver, fabric) = LIBRARIES.get_or_init(|| {
            let map = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin-tests/cuda-standin/fabric.map");
            let fabric = cuda_bed::build(
                "fabric.c",
                "libfabric-standin.so",
                &["-DREAL_LIBFABRIC=\"libfabric.so.1\"", &format!("-Wl,--version-script={}", map.display())],
            );
            let (_, driver) = Bed::open();
            // SAFETY: no other thread reads or writes the environment: every test begins here, and takes turns.
            unsafe { std::env::set_var(LIBRARY_ENV, &driver) };
            (driver, fabric)
        });
        let stage = Self { bed: Bed::on(driver), fabric: fabric.clone(), _turn: turn };
        for (key, value) in [("nic", 1), ("hmem", 1), ("dmabuf", 1), ("cuda", 1)] {
            stage.fabric_option(key, value);
        }
        for (key, value) in [("dmabuf", 1), ("dmabuf_across", 1), ("polls", 3)] {
            stage.bed.option(key, value);
        }
        stage.bed.fail("", 0, 0);
        stage.bed.app_current(0);
        stage.bed.take_log();
        stage
    }

    fn fabric_option(&self, key: &str, value: i32) {
        let library = cuda_bed::open_library(&self.fabric);
        let key = CString::new(key).unwrap();
        // SAFETY: fabric.c defines the function so.
        unsafe {
            let symbol = libc::dlsym(library, c"standin_fabric_option".as_ptr());
            assert!(!symbol.is_null());
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, c_int)>(symbol)(
                key.as_ptr(),
                value,
            );
        }
    }

    fn engine(&self, name: &str, progress_thread: bool) -> Engine {
        self.engine_with(name, progress_thread, &[])
    }

    fn engine_with(&self, name: &str, progress_thread: bool, options: &[(&str, &str)]) -> Engine {
        let fabric = self.fabric.to_str().unwrap();
        let always = [("libfabric_path", fabric), ("devices", "lo"), ("same_host", "off")];
        let params = always.iter().chain(options);
        Engine::create(InitParams {
            local_agent: name.into(),
            params: params.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            progress_thread,
            progress_delay: Duration::ZERO,
            poison: Arc::default(),
        })
        .unwrap()
    }

    /// GPU memory of the application, filled with a byte.
    fn gpu(&self, device: i32, bytes: usize, fill: u8) -> u64 {
        let addr = self.bed.memory(Memory::Device, device, bytes, self.bed.app_uses(device));
        fill_at(addr, bytes, fill);
        addr
    }

    /// What was called, as far as it is about contexts and registrations.
    fn story(&self) -> Vec<String> {
        let told = ["cuCtxPush", "cuCtxPop", "fi_"];
        let log = self.bed.take_log();
        log.into_iter().filter(|line| told.iter().any(|call| line.starts_with(call))).collect()
    }
}

fn fill_at(addr: u64, bytes: usize, fill: u8) {
    // SAFETY: the stand-in's memory is host memory of that length.
    unsafe { std::ptr::write_bytes(addr as *mut u8, fill, bytes) };
}

fn register(engine: &Engine, kind: MemKind, addr: u64, bytes: usize, device: u64) -> Result<Arc<Metadata>> {
    // SAFETY: the memory of the stand-in, and that of the tests, outlives its engine.
    engine.register_mem(unsafe { MemoryRange::assume_registered(addr, bytes as u64) }, device, kind)
}

fn vram(engine: &Engine, addr: u64, bytes: usize, device: u64) -> Result<Arc<Metadata>> {
    register(engine, MemKind::Vram, addr, bytes, device)
}

fn desc(metadata: &Arc<Metadata>, addr: u64, bytes: usize) -> XferDesc<'_> {
    XferDesc { desc: Desc { addr, len: bytes as u64, dev_id: 0 }, metadata }
}

fn wait(engines: &[&Engine], request: &Request) -> Result<Status> {
    wait_for(engines, request, &mut 0)
}

/// Waits, and counts the notifications that the other engines get meanwhile.
fn wait_for(engines: &[&Engine], request: &Request, notifications: &mut usize) -> Result<Status> {
    let start = Instant::now();
    loop {
        let status = engines[0].check_xfer(request)?;
        if status != Status::InProgress {
            return Ok(status);
        }
        assert!(start.elapsed() < DEADLINE, "the transfer does not end");
        for engine in &engines[1..] {
            *notifications += engine.take_notifications().unwrap().len();
        }
    }
}

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
    assert!(error.to_string().contains("cannot register accelerator memory (FI_HMEM)"), "{error}");
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

/// GPU memory of two agents that no rail reaches, and host memory of both.
struct Staged {
    stage: Stage,
    engines: [Engine; 2],
    gpu: [u64; 2],
    host: [Vec<u8>; 2],
    regions: [[Arc<Metadata>; 2]; 2],
}

const STAGED_BYTES: usize = 5 * MIB + 4321;

impl Staged {
    fn new(progress_thread: bool) -> Self {
        Self::with(progress_thread, &[])
    }

    fn with(progress_thread: bool, options: &[(&str, &str)]) -> Self {
        let stage = Stage::new();
        stage.fabric_option("hmem", 0);
        stage.bed.option("polls", 2);
        let options = [&[("vram_staging", "true")], options].concat();
        let engine = |name| stage.engine_with(name, progress_thread, &options);
        let engines = [engine("one"), engine("two")];
        let gpu = [stage.gpu(0, STAGED_BYTES, 0), stage.gpu(1, STAGED_BYTES, 0)];
        let host = [vec![0_u8; STAGED_BYTES], vec![0_u8; STAGED_BYTES]];
        let regions = std::array::from_fn(|i| {
            let on_host = host[i].as_ptr() as u64;
            [
                vram(&engines[i], gpu[i], STAGED_BYTES, i as u64).unwrap(),
                register(&engines[i], MemKind::Dram, on_host, STAGED_BYTES, 0).unwrap(),
            ]
        });
        let [one, two] = &engines;
        one.load_remote_conn_info(&"two".into(), &two.conn_info().unwrap()).unwrap();
        two.load_remote_conn_info(&"one".into(), &one.conn_info().unwrap()).unwrap();
        Self { stage, engines, gpu, host, regions }
    }

    /// Address of an agent's memory of a kind.
    fn addr(&self, agent: usize, kind: MemKind) -> u64 {
        if kind == MemKind::Vram { self.gpu[agent] } else { self.host[agent].as_ptr() as u64 }
    }

    fn region(&self, agent: usize, kind: MemKind) -> &Arc<Metadata> {
        &self.regions[agent][usize::from(kind == MemKind::Dram)]
    }

    /// The second agent's memory as the first one knows it.
    fn remote(&self, kind: MemKind) -> Arc<Metadata> {
        let range = Desc { addr: self.addr(1, kind), len: STAGED_BYTES as u64, dev_id: 0 };
        let blob = self.engines[1].public_data(self.region(1, kind)).unwrap();
        self.engines[0].load_remote_md(range, kind, &blob, &"two".into()).unwrap()
    }

    /// A WRITE of all GPU memory of the first agent to that of the second.
    fn prepare_write(&self, remote: &Arc<Metadata>) -> Request {
        let (local, far) = (
            desc(self.region(0, MemKind::Vram), self.gpu[0], STAGED_BYTES),
            desc(remote, self.gpu[1], STAGED_BYTES),
        );
        self.engines[0].prep_xfer(Op::Write, &[local], &[far], &"two".into()).unwrap()
    }

    fn wait(&self, request: &Request) -> Result<Status> {
        wait(&[&self.engines[0], &self.engines[1]], request)
    }
}

#[test]
fn staged_memory_moves_both_ways_between_all_kinds() {
    for progress_thread in [false, true] {
        let bed = Staged::new(progress_thread);
        assert_eq!(bed.engines[0].supported_mems(), [MemKind::Dram, MemKind::Vram]);
        let kinds = [MemKind::Vram, MemKind::Dram];
        let mut fill = 1_u8;
        for (near, far) in kinds.into_iter().flat_map(|near| kinds.map(|far| (near, far))) {
            let remote = bed.remote(far);
            let (here, there) = (bed.addr(0, near), bed.addr(1, far));
            for op in [Op::Write, Op::Read] {
                let (source, target) = if op == Op::Write { (here, there) } else { (there, here) };
                fill_at(source, STAGED_BYTES, fill);
                fill_at(target, STAGED_BYTES, 0);
                let len = STAGED_BYTES - 200;
                let (local, far) =
                    (desc(bed.region(0, near), here + 100, len), desc(&remote, there + 100, len));
                let request = bed.engines[0].prep_xfer(op, &[local], &[far], &"two".into()).unwrap();
                bed.engines[0].post_xfer(&request, Some(b"moved")).unwrap();
                let mut notified = 0;
                let [one, two] = &bed.engines;
                assert_eq!(
                    wait_for(&[one, two], &request, &mut notified),
                    Ok(Status::Success),
                    "{op:?} {near}"
                );
                let bytes = bytes_at(target, STAGED_BYTES);
                assert!(bytes[..100].iter().chain(&bytes[STAGED_BYTES - 100..]).all(|byte| *byte == 0));
                assert!(bytes[100..STAGED_BYTES - 100].iter().all(|byte| *byte == fill), "{op:?} {near}");
                let start = Instant::now();
                while notified == 0 {
                    notified += two.take_notifications().unwrap().len();
                    one.take_notifications().unwrap();
                    assert!(start.elapsed() < DEADLINE, "no notification");
                }
                fill += 1;
            }
        }
        assert_eq!(bed.stage.bed.thread_state(), (0, 0, 0));
        let Staged { stage, engines, regions, .. } = bed;
        drop(regions);
        drop(engines);
        let live = stage.bed.live();
        assert_eq!((live.0, live.1, live.2), (0, 0, 0), "streams, events and pinned memory are given back");
    }
}

#[test]
fn staged_pieces_in_great_number_and_any_order_arrive() {
    let bed = Staged::new(false);
    let (here, there, remote) = (bed.gpu[0], bed.gpu[1], bed.remote(MemKind::Vram));
    let pattern: Vec<u8> = (0..STAGED_BYTES).map(|i| (i % 251) as u8).collect();
    // SAFETY: the stand-in's memory is host memory of that length.
    unsafe { std::ptr::copy_nonoverlapping(pattern.as_ptr(), here as *mut u8, STAGED_BYTES) };
    let piece = 8 << 10;
    let count = STAGED_BYTES / piece;
    // A stride that has no divisor in common with the count visits every piece once.
    let places = (0..count).map(|i| (i * 7 % count) * piece).collect::<Vec<_>>();
    let list = |metadata, base: u64| {
        let places = places.clone();
        places.into_iter().map(move |at| desc(metadata, base + at as u64, piece)).collect::<Vec<_>>()
    };
    let (local, far) = (list(bed.region(0, MemKind::Vram), here), list(&remote, there));
    let request = bed.engines[0].prep_xfer(Op::Write, &local, &far, &"two".into()).unwrap();
    for _ in 0..2 {
        fill_at(there, STAGED_BYTES, 0);
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success));
        assert_eq!(bytes_at(there, count * piece), pattern[..count * piece]);
    }
}

#[test]
fn a_staged_transfer_fails_with_its_reason_and_the_next_one_works() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    let prepare = || bed.prepare_write(&remote);
    // Both agents copy with the one driver: the first calls fail here, later ones at the peer.
    for nth in [1, 4, 7, 12] {
        let request = prepare();
        bed.engines[0].post_xfer(&request, None).unwrap();
        bed.stage.bed.fail("cuMemcpyAsync", nth, 700);
        let outcome = bed.wait(&request);
        bed.stage.bed.fail("", 0, 0);
        if let Err(error) = outcome {
            assert!(error.to_string().contains("STANDIN_ERROR_700"), "{error}");
        }
        let next = prepare();
        bed.engines[0].post_xfer(&next, None).unwrap();
        assert_eq!(bed.wait(&next), Ok(Status::Success), "after copy {nth} failed");
    }
    let Staged { stage, engines, regions, .. } = bed;
    drop((remote, regions, engines));
    stage.bed.reset_counts();
}

#[test]
fn a_staged_transfer_can_be_released_and_its_peer_can_leave() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    let prepare = || bed.prepare_write(&remote);
    let request = prepare();
    bed.engines[0].post_xfer(&request, None).unwrap();
    bed.engines[0].release_request(request).unwrap();
    let request = prepare();
    bed.engines[0].post_xfer(&request, None).unwrap();
    assert_eq!(bed.wait(&request), Ok(Status::Success));
    bed.engines[0].post_xfer(&request, None).unwrap();
    bed.engines[0].disconnect(&"two".into()).unwrap();
    assert_eq!(bed.wait(&request).unwrap_err().status(), Status::RemoteDisconnect);
    bed.engines[0].deregister_mem(bed.region(0, MemKind::Vram)).unwrap();
}

#[test]
fn slots_of_a_peer_that_does_not_answer_in_time_come_back_when_it_does() {
    let bed = Staged::with(false, &[("connect_timeout_ms", "1000")]);
    let remote = bed.remote(MemKind::Vram);
    // What a READ begins with is a copy at the peer.
    let (local, far) = (
        desc(bed.region(0, MemKind::Vram), bed.gpu[0], STAGED_BYTES),
        desc(&remote, bed.gpu[1], STAGED_BYTES),
    );
    let request = bed.engines[0].prep_xfer(Op::Read, &[local], &[far], &"two".into()).unwrap();
    bed.engines[0].post_xfer(&request, None).unwrap();
    assert_eq!(bed.wait(&request), Ok(Status::Success));
    // The peer's application calls nothing. Six slots for each post, of sixteen.
    for round in 0..4 {
        bed.engines[0].post_xfer(&request, None).unwrap();
        let error = wait(&[&bed.engines[0]], &request).unwrap_err();
        assert!(error.to_string().contains("connect_timeout_ms"), "round {round}: {error}");
    }
    for fill in [7, 8] {
        fill_at(bed.gpu[1], STAGED_BYTES, fill);
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success));
        assert!(bytes_at(bed.gpu[0], STAGED_BYTES).iter().all(|byte| *byte == fill));
    }
}

#[test]
fn a_staged_transfer_ends_after_transfer_timeout_ms() {
    let bed = Staged::with(false, &[("transfer_timeout_ms", "1500")]);
    let remote = bed.remote(MemKind::Vram);
    let request = bed.prepare_write(&remote);
    // Without a lease, and with one.
    for lent in [false, true] {
        bed.engines[0].post_xfer(&request, None).unwrap();
        let error = wait(&[&bed.engines[0]], &request).unwrap_err();
        assert!(error.to_string().contains("transfer_timeout_ms"), "{lent}: {error}");
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success), "{lent}");
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
