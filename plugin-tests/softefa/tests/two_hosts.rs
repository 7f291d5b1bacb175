//! libfabric's real efa provider in processes on two software hosts: data, order, faults, deaths.

mod bed;

use bed::{Done, Peer, each};

#[test]
#[ignore = "one end of the other tests, which start it themselves"]
fn peer() {
    bed::peer::run();
}

const MIB: usize = 1 << 20;

/// Completion statuses of the EFA device.
const FLUSHED: i32 = 1;
const BAD_ADDRESS: i32 = 7;
const BAD_QPN: i32 = 9;
const UNKNOWN_PEER: i32 = 14;
const UNREACHABLE: i32 = 15;

/// Makes a handshake happen: the fabric efa exchanges one before it uses RDMA, and its packets would be counted in.
fn warm_up(a: &mut Peer, b: &mut Peer) {
    b.tell("wait 0 1 30000");
    a.write(0, b, 0, 8, Some(1));
    assert_eq!(a.wait(1, 0).sent, [0]);
    assert_eq!(b.done().arrived.len(), 1);
}

#[test]
fn every_byte_moves_and_counters_count() {
    each(|network| {
        let [mut a, mut b] = network.pair(8 * MIB, 128);
        warm_up(&mut a, &mut b);
        a.ask("fill 0 7");
        for (index, length) in [1, 64, 4096, 8929, 100_000, 3 * MIB + 1].into_iter().enumerate() {
            a.write(0, &b, 0, length, Some(index as u32));
            b.tell("wait 0 1 30000");
            assert_eq!(a.wait(1, 0).sent, [0]);
            let arrived = b.done().arrived;
            assert_eq!(arrived, [(index as i64, 0, 0)], "{length}");
            assert_eq!(b.ask(&format!("check 0 0 {length} 7")), "", "{length}");
        }
        b.ask("fill 0 9");
        a.read(0, &b, 1, 5 * MIB);
        b.tell("wait 0 1000 100");
        assert_eq!(a.wait(1, 0).sent, [0]);
        b.done();
        assert_eq!(a.ask(&format!("check 0 1 {} 9", 5 * MIB)), "");
        for _ in 0..8 {
            a.ask("send 0 0 0 64 5");
        }
        b.tell("wait 0 8 30000");
        assert_eq!(a.wait(8, 0).sent, [0; 8]);
        assert_eq!(b.done().arrived, [(5, 64, 0); 8]);
        assert!(network.counter("a", "rdma_write_bytes") > 3 * MIB as u64);
        assert_eq!(network.counter("a", "rdma_read_bytes"), 5 * MIB as u64);
        assert_eq!(network.counter("b", "rdma_read_resp_bytes"), 5 * MIB as u64);
        assert!(network.counter("b", "recv_wrs") >= 8);
    });
}

fn immediates(done: &Done) -> Vec<i64> {
    done.arrived.iter().map(|(imm, _, _)| *imm).collect()
}

#[test]
fn order_is_anything_unless_asked_for() {
    each(|network| {
        let count = 256;
        for (control, ordered) in [("hold_pct=50 reorder_us=2000", false), ("hold_pct=0 shuffle=0", true)] {
            let [mut a, mut b] = network.pair(4 * MIB, 512);
            network.control(control);
            warm_up(&mut a, &mut b);
            a.ask("fill 0 3");
            for index in 0..count {
                a.write(0, &b, index * 16_384, 16_384, Some(index as u32));
            }
            b.tell(&format!("wait 0 {count} 30000"));
            assert_eq!(a.wait(count, 0).sent, vec![0; count]);
            let arrived = immediates(&b.done());
            assert_eq!(arrived.is_sorted(), ordered, "{control}: {arrived:?}");
            assert_eq!(b.ask(&format!("check 0 0 {} 3", count * 16_384)), "");
        }
    });
}

#[test]
fn a_batch_rings_one_doorbell() {
    each(|network| {
        let [mut a, mut b] = network.pair(MIB, 64);
        warm_up(&mut a, &mut b);
        let counted = || {
            let [posted, rung] =
                ["softefa_posted_wrs", "softefa_doorbells"].map(|name| network.counter("a", name));
            (posted, rung)
        };
        let (key, base) = b.buffers[0];
        for (batch, times, doorbells) in [(1, 32, 32), (16, 2, 2)] {
            // What the provider has to say for itself is said by now.
            a.wait_up_to(1, 0, 100);
            let before = counted();
            for _ in 0..times {
                a.ask(&format!("batch {batch} 0 0 0 64 {key} {base}"));
            }
            assert_eq!(a.wait(32, 0).sent, [0; 32]);
            let after = counted();
            assert_eq!((after.0 - before.0, after.1 - before.1), (32, doorbells), "batches of {batch}");
        }
    });
}

#[test]
fn a_completion_queue_that_is_full_loses_what_comes() {
    each(|network| {
        if !network.direct() {
            // There libfabric makes the queue as large as it thinks right.
            return;
        }
        // None comes late, when there is room again.
        network.control("hold_pct=0");
        let mut ends = [network.spawn("a"), network.spawn("b")];
        for (end, entries) in ends.iter_mut().zip([1024, 64]) {
            end.open_with(0, &network.fabric, entries);
            end.buffer(4096);
            // A write with immediate data may use one up.
            end.receives(128);
        }
        let [mut a, mut b] = ends;
        a.connect(&b);
        b.connect(&a);
        for index in 0..100 {
            a.write(0, &b, 0, 64, Some(index));
        }
        // Each of them is done: it has arrived, and its sender cannot know that nobody will hear of it.
        assert_eq!(a.wait(100, 0).sent, [0; 100]);
        assert_eq!(b.wait_up_to(0, 100, 500).arrived.len(), 64);
        assert_eq!(network.counter("b", "softefa_cq_overruns"), 36);
        assert_eq!(network.counter("a", "softefa_cq_overruns"), 0);
        // Room that was made is used.
        a.write(0, &b, 0, 64, Some(7));
        assert_eq!(a.wait(1, 0).sent, [0]);
        assert_eq!(immediates(&b.wait(0, 1)), [7]);
    });
}

#[test]
fn an_operation_fails_as_told() {
    each(|network| {
        let [mut a, mut b] = network.pair(MIB, 64);
        warm_up(&mut a, &mut b);
        network.control("src=a dst=b op=write nth=3 status=7");
        for index in 0..5 {
            a.write(0, &b, 0, 4096, Some(index));
        }
        b.tell("wait 0 4 30000");
        let mut sent = a.wait(5, 0).sent;
        sent.sort_unstable();
        assert_eq!(sent, [0, 0, 0, 0, BAD_ADDRESS]);
        let mut arrived = immediates(&b.done());
        arrived.sort_unstable();
        assert_eq!(arrived, [0, 1, 3, 4]);
    });
}

#[test]
fn a_wrong_key_is_refused_and_hurts_nobody_else() {
    each(|network| {
        let [mut a, mut b] = network.pair(MIB, 64);
        warm_up(&mut a, &mut b);
        let (key, base) = b.buffers[0];
        a.ask(&format!("write 0 0 0 64 {} {base} -", key ^ 1));
        a.ask(&format!("write 0 0 0 64 {key} {} -", base + MIB as u64 - 32));
        a.write(0, &b, 0, 64, None);
        let mut sent = a.wait(3, 0).sent;
        sent.sort_unstable();
        assert_eq!(sent, [0, BAD_ADDRESS, BAD_ADDRESS]);
        assert_eq!(network.counter("a", "rdma_write_wr_err"), 2);
    });
}

#[test]
fn a_dropping_network_counts_what_it_swallows() {
    each(|network| {
        network.control("dst=b drop_pct=100 unreachable_ms=300");
        let [mut a, b] = network.pair(MIB, 64);
        // The fabric efa sends a handshake first and fails with that.
        a.tell(&format!("write 0 0 0 64 {} {} -", b.buffers[0].0, b.buffers[0].1));
        if network.direct() {
            a.answer().expect("posted");
            assert_eq!(a.wait(1, 0).sent, [UNREACHABLE]);
        }
        let start = std::time::Instant::now();
        while network.counter("a", "tx_pkts") == 0 {
            assert!(start.elapsed().as_millis() < u128::from(bed::PATIENCE_MS), "nothing was sent");
            std::thread::yield_now();
        }
        assert_eq!(network.counter("b", "rx_pkts"), 0);
        std::thread::sleep(std::time::Duration::from_millis(200));
        let path = "class/infiniband/rdmap79s0/ports/1/hw_counters";
        assert_ne!(network.sysfs("a", &format!("{path}/tx_pkts")).trim(), "0");
    });
}

#[test]
fn nothing_reaches_oneself() {
    each(|network| {
        if !network.direct() {
            return;
        }
        network.control("unreachable_ms=200");
        let mut a = network.spawn("a");
        a.open(0, &network.fabric);
        a.buffer(4096);
        a.connect_to_itself();
        let (key, base) = a.buffers[0];
        a.ask(&format!("write 0 0 0 64 {key} {} -", base + 64));
        assert_eq!(a.wait(1, 0).sent, [UNREACHABLE]);
        network.control("loopback=1");
        a.ask(&format!("write 0 0 0 64 {key} {} -", base + 64));
        assert_eq!(a.wait(1, 0).sent, [0]);
    });
}

#[test]
fn a_receiver_that_is_not_ready_gets_it_later() {
    each(|network| {
        if !network.direct() {
            return;
        }
        let [mut a, mut b] = network.pair(4096, 0);
        a.ask("send 0 0 0 64 9");
        let done = b.wait_up_to(0, 1, 100);
        assert!(done.arrived.is_empty());
        assert!(network.counter("b", "rx_drops") > 0);
        b.receives(1);
        b.tell("wait 0 1 30000");
        assert_eq!(a.wait(1, 0).sent, [0]);
        assert_eq!(b.done().arrived, [(9, 64, 0)]);
    });
}

#[test]
fn a_killed_peer_fails_its_own_operations_and_its_successor_is_another() {
    each(|network| {
        let [mut a, mut b] = network.pair(8 * MIB, 64);
        let mut c = network.spawn("c");
        c.open(0, &network.fabric);
        c.buffer(MIB);
        c.receives(64);
        a.connect(&c);
        c.connect(&a);
        warm_up(&mut a, &mut b);
        for _ in 0..16 {
            a.write(0, &b, 0, 8 * MIB, None);
        }
        b.signal(libc::SIGKILL);
        // The fabric efa posts its own receives, and answers handshakes, only while it is polled.
        c.tell("wait 0 4 30000");
        for _ in 0..4 {
            a.write(1, &c, 0, 4096, Some(3));
        }
        let sent = a.wait(20, 0).sent;
        assert_eq!(c.done().arrived.len(), 4);
        assert!(sent.iter().filter(|error| **error == 0).count() >= 4, "{sent:?}");
        assert!(sent.iter().all(|error| [0, BAD_QPN, BAD_ADDRESS].contains(error)), "{sent:?}");
        assert!(sent.contains(&BAD_QPN), "{sent:?}");
        // The host lives on with a new process, whose queue pair has another number.
        let mut successor = network.spawn("b");
        successor.open(0, &network.fabric);
        successor.buffer(8 * MIB);
        successor.receives(64);
        successor.connect(&a);
        a.connect(&successor);
        successor.tell("wait 0 1 30000");
        a.write(2, &successor, 0, 4096, Some(8));
        assert_eq!(a.wait(1, 0).sent, [0]);
        assert_eq!(immediates(&successor.done()), [8]);
    });
}

#[test]
fn a_stopped_peer_delays_and_loses_nothing() {
    each(|network| {
        let [mut a, mut b] = network.pair(4 * MIB, 64);
        warm_up(&mut a, &mut b);
        a.ask("fill 0 4");
        b.stop();
        for index in 0..4 {
            a.write(0, &b, index * MIB, MIB, Some(index as u32));
        }
        assert!(a.wait_up_to(1, 0, 100).sent.is_empty());
        b.signal(libc::SIGCONT);
        b.tell("wait 0 4 30000");
        assert_eq!(a.wait(4, 0).sent, [0; 4]);
        assert_eq!(b.done().arrived.len(), 4);
        assert_eq!(b.ask(&format!("check 0 0 {} 4", 4 * MIB)), "");
    });
}

#[test]
fn a_sleeper_is_woken() {
    each(|network| {
        let [mut a, mut b] = network.pair(4096, 64);
        b.tell("sleep 0");
        if b.answer().is_err_and(|error| error.contains("no descriptor")) {
            eprintln!("skipped: this libfabric's efa has no descriptor to sleep on");
            return;
        }
        warm_up(&mut a, &mut b);
        b.tell("sleep 30000");
        a.write(0, &b, 0, 64, Some(2));
        assert_eq!(a.wait(1, 0).sent, [0]);
        b.answer().expect("woken");
        assert_eq!(immediates(&b.wait(0, 1)), [2]);
    });
}

#[test]
fn delay_and_bandwidth_hold_back() {
    each(|network| {
        let [mut a, mut b] = network.pair(4 * MIB, 64);
        warm_up(&mut a, &mut b);
        for (control, least_ms) in [("delay_us=60000", 60), ("src=a gbps=0.5", 4 * 8 * 2)] {
            network.control(control);
            let start = std::time::Instant::now();
            for index in 0..4 {
                a.write(0, &b, index * MIB, MIB, None);
            }
            assert_eq!(a.wait(4, 0).sent, [0; 4]);
            assert!(start.elapsed().as_millis() >= least_ms, "{control}: {:?}", start.elapsed());
        }
    });
}

#[test]
fn chance_repeats_with_its_seed() {
    each(|network| {
        if !network.direct() {
            return;
        }
        let outcome = |seed: u64| {
            let network = network.another();
            let [mut a, mut b] = network.pair(MIB, 512);
            network.control(&format!("seed={seed}\nop=write pct=30 status=7"));
            for index in 0..200 {
                a.write(0, &b, 0, 64, Some(index));
            }
            let failed = a.wait(200, 0).sent.iter().filter(|error| **error == BAD_ADDRESS).count();
            let mut arrived = immediates(&b.wait(0, 200 - failed));
            arrived.sort_unstable();
            arrived
        };
        let first = outcome(5);
        assert!((100..180).contains(&first.len()), "{}", first.len());
        assert_eq!(first, outcome(5));
        assert_ne!(first, outcome(6));
    });
}

#[test]
fn a_dead_device_flushes_and_does_not_answer() {
    each(|network| {
        if !network.direct() {
            return;
        }
        let [mut a, mut b] = network.pair(MIB, 64);
        warm_up(&mut a, &mut b);
        network.control("unreachable_ms=200\nhost=a/rdmap79s0 dead=1");
        a.write(0, &b, 0, 64, None);
        assert_eq!(a.wait(1, 0).sent, [FLUSHED]);
        b.write(0, &a, 0, 64, None);
        assert_eq!(b.wait(1, 0).sent, [UNREACHABLE]);
        network.control("");
        a.write(0, &b, 0, 64, None);
        assert_eq!(a.wait(1, 0).sent, [0]);
    });
}

#[test]
fn freed_memory_is_not_written() {
    each(|network| {
        let [mut a, mut b] = network.pair(8 * MIB, 64);
        warm_up(&mut a, &mut b);
        a.ask("fill 0 6");
        for _ in 0..4 {
            for _ in 0..8 {
                a.write(0, &b, 0, 8 * MIB, None);
            }
            // What the allocator gives next is most likely the same memory; it begins as zeros and must stay so.
            b.ask("free 0");
            b.buffer(8 * MIB);
            b.tell("wait 0 1000 200");
            let sent = a.wait(8, 0).sent;
            b.done();
            assert!(sent.iter().all(|error| [0, BAD_ADDRESS].contains(error)), "{sent:?}");
            let newest = b.buffers.len() - 1;
            assert_eq!(b.ask(&format!("check {newest} 0 {} zeros", 8 * MIB)), "");
            b.ask(&format!("swap 0 {newest}"));
            b.buffers.swap(0, newest);
        }
    });
}

#[test]
fn rdma_is_for_those_whom_the_target_knows() {
    each(|network| {
        if !network.direct() {
            return;
        }
        let mut ends = [network.spawn("a"), network.spawn("b")];
        for end in &mut ends {
            end.open(0, &network.fabric);
            end.buffer(4096);
        }
        let [mut a, mut b] = ends;
        a.connect(&b);
        a.write(0, &b, 0, 64, None);
        assert_eq!(a.wait(1, 0).sent, [UNKNOWN_PEER]);
        b.connect(&a);
        a.write(0, &b, 0, 64, None);
        assert_eq!(a.wait(1, 0).sent, [0]);
    });
}

#[test]
fn a_trace_outlives_its_process() {
    each(|network| {
        let [mut a, mut b] = network.pair(MIB, 64);
        warm_up(&mut a, &mut b);
        a.signal(libc::SIGKILL);
        let traces = network.traces("a");
        let has = |event: &str, op: &str| {
            let wanted = |line: &str| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.len() == 11 && words[2] == event && words[3] == op
            };
            traces.iter().any(|trace| trace.lines().any(wanted))
        };
        for event in ["post", "transmit", "completion", "polled"] {
            assert!(has(event, "write"), "{event}: {traces:?}");
        }
    });
}
