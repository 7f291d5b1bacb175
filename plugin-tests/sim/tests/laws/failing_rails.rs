//! Devices that fail, in the middle or when the agent starts, and devices that are slow.

use nixl_libfabric::engine::Engine;
use nixl_libfabric::error::{Error, Status};
use nixl_libfabric::types::{MemKind, Op};
use nixl_libfabric::wire::ConnectionInfo;
use nixl_libfabric_sim::clock;
use nixl_libfabric_sim::pair::{Group, init};
use nixl_libfabric_sim::provider::{library, on_host};
use nixl_libfabric_sim::world::{Breakage, EFA, EFA_DIRECT};

use super::OPTIONS;

/// What cannot be done anew, and is said in words: what the efa fabric never completes, because closing its endpoint could
/// wait for ever.
fn may_fail(how: Breakage, fabric: &str, outcome: &Result<Status, Error>) -> bool {
    let Err(error) = outcome else { return false };
    let error = error.to_string();
    how == Breakage::IsMute && fabric == "efa" && error.contains("on nic") && error.contains("has failed")
}

/// A NIC that fails in the middle of a transfer is taken out: the transfer ends well over the others, its notification
/// comes once and after its data, and nothing that the NIC has sent lands when the transfer is done.
#[test]
fn a_rail_that_fails_leaves_its_work_to_the_others() {
    for how in [Breakage::Flushes, Breakage::IsMute, Breakage::Refuses] {
        for profile in [EFA, EFA_DIRECT] {
            for seed in 0..12 {
                let mut group = Group::unconnected(seed, 2, profile, 3, OPTIONS);
                group.load(0, 1);
                group.load(1, 0);
                group.live(20);
                let host = group.agents[0].host;
                let place = seed as usize % 3;
                let op = if seed % 2 == 0 { Op::Write } else { Op::Read };
                let pieces: Vec<_> = (0..6000).map(|i| (i * 256, 200)).collect();
                let (from, to) = if op == Op::Write { (0, 1) } else { (1, 0) };
                let request = group.prepare(op, 0, 1, &pieces).unwrap();
                for round in [1, 2, 3] {
                    for &(at, len) in &pieces {
                        group.agents[from].arena.fill(at, len, at as u64 ^ round << 32);
                    }
                    let note = [round as u8; 5];
                    group.engine(0).post_xfer(&request, Some(&note)).unwrap();
                    if round == 2 {
                        group.live(2 + seed as usize % 7);
                        group.world.state().break_endpoint(host, place, how);
                    }
                    let what = format!("{how:?} {} seed {seed} round {round}", profile.fabric);
                    let outcome = group.finish(0, &request);
                    if round == 2 && may_fail(how, profile.fabric, &outcome) {
                        group.live_until(100, |_| false);
                        continue;
                    }
                    assert_eq!(outcome, Ok(Status::Success), "{what}");
                    for &(at, len) in &pieces {
                        let there = group.agents[to].arena.differs(at, len, at as u64 ^ round << 32);
                        assert_eq!(there, None, "{what}: a byte at {at} is not there");
                    }
                    assert!(group.live_until(100, |group| group.got(1, &note) == 1), "{what}");
                    // The memory is its owner's again.
                    group.agents[to].arena.fill(0, 6000 * 256, 77);
                    group.live_until(100, |_| false);
                    let late = group.agents[to].arena.differs(0, 6000 * 256, 77);
                    assert_eq!(late, None, "{what}: something landed after DONE");
                    assert_eq!(group.got(1, &note), 1, "{what}");
                }
                drop(request);
                group.close();
            }
        }
    }
}

/// What was under way on the rail of messages is sent again over another, whether it has arrived or not, and comes once.
#[test]
fn notifications_under_way_on_a_rail_that_fails_come_once() {
    for profile in [EFA, EFA_DIRECT] {
        for seed in 0..20 {
            let mut group = Group::unconnected(seed, 2, profile, 2, OPTIONS);
            group.load(0, 1);
            group.load(1, 0);
            group.live(20);
            let (host, name) = (group.agents[0].host, group.agents[1].name.clone());
            let notes: Vec<Vec<u8>> = (1..20u8).map(|i| vec![i; usize::from(i) * 2000]).collect();
            for note in &notes {
                group.engine(0).send_notification(&name, note).unwrap();
            }
            group.live(seed as usize % 4);
            group.world.state().break_endpoint(host, 0, Breakage::Flushes);
            let all = |group: &mut Group| notes.iter().all(|note| group.got(1, note) > 0);
            assert!(group.live_until(1_000, all), "{profile:?}, seed {seed}");
            group.live_until(100, |_| false);
            assert!(notes.iter().all(|note| group.got(1, note) == 1), "{profile:?}, seed {seed}");
            group.close();
        }
    }
}

/// The NIC at which peers' messages come in fails, and its owner does not notice: what was under way goes to another of its
/// NICs, and so does all that follows, each once and after its data.
#[test]
fn messages_for_a_rail_that_fails_come_over_another() {
    for profile in [EFA, EFA_DIRECT] {
        for seed in 0..30 {
            let what = format!("{} seed {seed}", profile.fabric);
            let mut group = Group::unconnected(seed, 3, profile, 2, OPTIONS);
            for (i, j) in [(0, 1), (1, 0), (2, 1), (1, 2)] {
                group.load(i, j);
            }
            group.live(20);
            let (host, name) = (group.agents[1].host, group.agents[1].name.clone());
            let notes: Vec<Vec<u8>> = (1..40u8).map(|i| vec![i; usize::from(i % 7) * 3000 + 1]).collect();
            for (at, note) in notes.iter().enumerate() {
                group.engine(0).send_notification(&name, note).unwrap();
                if at == 20 {
                    group.live(seed as usize % 5);
                    group.world.state().break_endpoint(host, 0, Breakage::Flushes);
                }
            }
            // Who was silent until then gets through, too.
            group.engine(2).send_notification(&name, b"late").unwrap();
            let all = |group: &mut Group| {
                notes.iter().all(|note| group.got(1, note) > 0) && group.got(1, b"late") > 0
            };
            let came = group.live_until(1_000, all);
            let missing: Vec<_> =
                notes.iter().filter(|note| group.got(1, note) == 0).map(|n| (n[0], n.len())).collect();
            assert!(came, "{what} {missing:?}");
            // It finds its NIC dead when it has something to send there, and says so.
            let own = group.prepare(Op::Write, 1, 0, &[(0, 140_000)]).unwrap();
            for _ in 0..2 {
                group.engine(1).post_xfer(&own, None).unwrap();
                assert_eq!(group.finish(1, &own), Ok(Status::Success), "{what}");
            }
            group.live(50);
            for turn in 0..6u8 {
                let note = [turn; 70];
                group.agents[0].arena.fill(0, 9_000, u64::from(turn) + 5);
                let request = group.write(0, 1, (0, 9_000), Some(&note));
                assert!(group.live_until(1_000, |group| group.got(1, &note) > 0), "{what}");
                let there = group.agents[1].arena.differs(0, 9_000, u64::from(turn) + 5);
                assert_eq!(there, None, "{what}: a notification came before its data");
                assert_eq!(group.finish(0, &request), Ok(Status::Success), "{what}");
            }
            group.live_until(100, |_| false);
            assert!(notes.iter().all(|note| group.got(1, note) == 1), "{what}");
            drop(own);
            group.close();
        }
    }
}

/// The efa fabric delivers no message behind a lost one, also if it has said that it left. Where there is another way, nobody
/// notices.
#[test]
fn messages_behind_a_lost_one_come_another_way() {
    for seed in 0..40 {
        let mut group = Group::unconnected(seed, 2, EFA, 2, OPTIONS);
        group.load(0, 1);
        group.load(1, 0);
        group.live(20);
        let name = group.agents[1].name.clone();
        let notes: Vec<[u8; 9]> = (0..30u8).map(|i| [i; 9]).collect();
        for (at, note) in notes.iter().enumerate() {
            if at == 10 {
                group.world.state().faults.sends_to_fail = 1;
            }
            group.engine(0).send_notification(&name, note).unwrap();
            group.live(seed as usize % 3);
        }
        let all = |group: &mut Group| notes.iter().all(|note| group.got(1, note) > 0);
        assert!(group.live_until(1_000, all), "seed {seed}");
        let request = group.write(0, 1, (0, 64), Some(b"behind"));
        assert_eq!(group.finish(0, &request), Ok(Status::Success), "seed {seed}");
        assert!(group.live_until(100, |group| group.got(1, b"behind") == 1), "seed {seed}");
        assert!(notes.iter().all(|note| group.got(1, note) == 1), "seed {seed}");
        drop(request);
        group.close();
    }
}

/// Peers are told of a rail that has failed, and use its endpoint no more; what was prepared before goes on, too.
#[test]
fn peers_are_told_of_a_rail_that_has_failed() {
    for profile in [EFA, EFA_DIRECT] {
        let mut group = Group::new(2, profile, 3, OPTIONS);
        group.live(20);
        let pieces: Vec<_> = (0..600).map(|i| (i * 256, 200)).collect();
        let theirs = group.prepare(Op::Read, 1, 0, &pieces).unwrap();
        let ours = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        let host = group.agents[0].host;
        group.world.state().break_endpoint(host, 1, Breakage::Flushes);
        group.engine(0).post_xfer(&ours, None).unwrap();
        assert_eq!(group.finish(0, &ours), Ok(Status::Success), "{profile:?}");
        group.live(50);
        let injured = group.world.state().injuries.len();
        for _ in 0..8 {
            // Whatever rail it begins with: one that leads there would fail, and leave its work to the others.
            group.engine(1).post_xfer(&theirs, None).unwrap();
            assert_eq!(group.finish(1, &theirs), Ok(Status::Success), "{profile:?}");
        }
        let small = group.prepare(Op::Read, 1, 0, &[(0, 64)]).unwrap();
        for _ in 0..8 {
            group.engine(1).post_xfer(&small, Some(b"small")).unwrap();
            assert_eq!(group.finish(1, &small), Ok(Status::Success), "{profile:?}");
        }
        assert!(group.live_until(100, |group| group.got(0, b"small") == 8));
        assert_eq!(group.world.state().injuries.len(), injured, "{profile:?}: it was tried all the same");
        drop((theirs, ours, small));
        group.close();
    }
}

/// A link goes down in the middle of a transfer, here or at the peer, and nothing tells but that one device reaches nobody:
/// the others do its work, nothing of the earlier attempt lands when the transfer is done, and the next does not try there.
#[test]
fn a_link_that_goes_down_leaves_its_work_to_the_others() {
    for profile in [EFA, EFA_DIRECT] {
        for seed in 0..24 {
            let what = format!("{} seed {seed}", profile.fabric);
            let mut group = Group::unconnected(seed, 2, profile, 3, OPTIONS);
            group.load(0, 1);
            group.load(1, 0);
            group.live(20);
            let cut = group.agents[seed as usize % 2].host;
            let op = if seed % 4 < 2 { Op::Write } else { Op::Read };
            let pieces: Vec<_> = (0..6000).map(|i| (i * 256, 200)).collect();
            let (from, to) = if op == Op::Write { (0, 1) } else { (1, 0) };
            let request = group.prepare(op, 0, 1, &pieces).unwrap();
            for round in [1, 2, 3, 4] {
                for &(at, len) in &pieces {
                    group.agents[from].arena.fill(at, len, at as u64 ^ round << 32);
                }
                let note = [round as u8; 5];
                let began = clock::now_ns();
                group.engine(0).post_xfer(&request, Some(&note)).unwrap();
                if round == 2 {
                    group.live(2 + seed as usize % 7);
                    group.world.state().break_endpoint(cut, seed as usize % 3, Breakage::CutOff);
                }
                assert_eq!(group.finish(0, &request), Ok(Status::Success), "{what} round {round}");
                let took = clock::now_ns() - began;
                assert!(round < 4 || took < 90_000_000, "{what}: tried again, for {took} ns");
                for &(at, len) in &pieces {
                    let there = group.agents[to].arena.differs(at, len, at as u64 ^ round << 32);
                    assert_eq!(there, None, "{what} round {round}: a byte at {at} is not there");
                }
                assert!(group.live_until(100, |group| group.got(1, &note) == 1), "{what} round {round}");
                group.agents[to].arena.fill(0, 6000 * 256, 77);
                group.live_until(100, |_| false);
                let late = group.agents[to].arena.differs(0, 6000 * 256, 77);
                assert_eq!(late, None, "{what} round {round}: something landed after DONE");
                assert_eq!(group.got(1, &note), 1, "{what} round {round}");
            }
            drop(request);
            group.close();
        }
    }
}

/// A peer that is gone is no reason to try all ways there are to it, one after the other.
#[test]
fn a_peer_that_is_gone_is_not_looked_for_on_every_rail() {
    for profile in [EFA, EFA_DIRECT] {
        for pieces in [1, 600] {
            let mut group = Group::new(2, profile, 8, OPTIONS);
            group.live(20);
            let pieces: Vec<_> = (0..pieces).map(|i| (i * 256, 200)).collect();
            let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
            group.engine(0).post_xfer(&request, None).unwrap();
            assert_eq!(group.finish(0, &request), Ok(Status::Success));
            let host = group.agents[1].host;
            group.world.kill_host(host);
            let began = clock::now_ns();
            group.engine(0).post_xfer(&request, Some(b"never")).unwrap();
            let error = group.finish(0, &request).unwrap_err();
            let took = (clock::now_ns() - began) / 1_000_000;
            assert_eq!(error.status(), Status::RemoteDisconnect, "{error}");
            // Two tries, each with the life of a packet behind it.
            assert!(took < 300, "{took} ms: {error}");
            drop(request);
            group.close();
        }
    }
}

/// When the last rail has failed, a transfer says so, and new memory cannot be registered; nothing waits.
#[test]
fn without_a_rail_transfers_fail_in_words() {
    for profile in [EFA, EFA_DIRECT] {
        let mut group = Group::new(2, profile, 2, OPTIONS);
        group.live(20);
        let host = group.agents[0].host;
        let pieces: Vec<_> = (0..600).map(|i| (i * 256, 200)).collect();
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        for place in 0..2 {
            group.world.state().break_endpoint(host, place, Breakage::Flushes);
        }
        for _ in 0..3 {
            let posted = group.engine(0).post_xfer(&request, Some(b"never"));
            let error = posted.and_then(|_| group.finish(0, &request)).unwrap_err().to_string();
            assert!(error.contains("no other rail is left") || error.contains("no rail is left"), "{error}");
            assert!(error.contains("on nic") && error.contains("has failed"), "{error}");
        }
        let range = group.agents[0].arena.range();
        let error = group.engine(0).register_mem(range, 7, MemKind::Dram).unwrap_err().to_string();
        assert!(error.contains("no rail is left"), "{error}");
        let name = group.agents[1].name.clone();
        let _ = group.engine(0).send_notification(&name, b"never");
        group.live(50);
        assert!(group.engine(0).send_notification(&name, b"never").is_err());
        assert_eq!(group.got(1, b"never"), 0);
        drop(request);
        group.close();
    }
}

/// A device at a tenth of its speed does about a tenth of what each other does, and holds nobody up: the transfers take about
/// as long as the speeds of all together allow, where equal parts would take ten times as long as with four whole devices.
#[test]
fn a_device_at_a_tenth_of_its_speed_costs_no_more_than_it_lacks() {
    let run = |slow: bool| {
        let mut group = Group::new(2, EFA, 4, OPTIONS);
        group.live(20);
        group.meet(0, 1, 4);
        let host = group.agents[0].host;
        group.world.state().faults.slow_endpoint = slow.then_some((host, 2, 10));
        let pieces: Vec<_> = (0..8000).map(|i| (i * 256, 8)).collect();
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        let (before, began) = (group.world.state().moved(host), clock::now_ns());
        for _ in 0..8 {
            group.engine(0).post_xfer(&request, None).unwrap();
            assert_eq!(group.finish(0, &request), Ok(Status::Success));
        }
        let took = clock::now_ns() - began;
        let after = group.world.state().moved(host);
        drop(request);
        group.close();
        let moved: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        (took, moved)
    };
    let (whole, even) = run(false);
    let (took, moved) = run(true);
    let fast = (moved[0] + moved[1] + moved[3]) / 3;
    println!(
        "four whole devices: {} us, {even:?}; one at a tenth: {} us, {moved:?}",
        whole / 1000,
        took / 1000
    );
    assert_eq!(moved.iter().sum::<u64>(), 8 * 8000);
    assert!(moved[2] * 3 < fast && moved[2] > 0, "{moved:?}");
    // 4 / 3.1 at best.
    assert!(took < whole * 2, "{took} ns, and {whole} with four whole devices");
}

/// A device that cannot be opened when the agent starts is left out, whichever step fails: the others do all.
#[test]
fn a_device_that_cannot_be_opened_is_left_out() {
    let mut group = Group::unconnected(7, 2, EFA, 3, OPTIONS);
    let mut left_out = 0;
    for step in 0.. {
        group.end(0);
        let (world, name) = (std::sync::Arc::clone(&group.world), group.agents[0].name.clone());
        let host = world.add_host();
        let at = world.state().setup_calls + step;
        world.state().faults.setup_fails_at = Some(at);
        let engine = on_host(&world, host, || Engine::create_on(library(), init(&name, OPTIONS)));
        world.state().faults.setup_fails_at = None;
        let failed = world.state().setup_calls > at;
        let Ok(engine) = engine else { continue };
        let rails = ConnectionInfo::decode(&engine.conn_info().unwrap()).unwrap().endpoints.len();
        let agent = &mut group.agents[0];
        agent.host = host;
        agent.local = Some(engine.register_mem(agent.arena.range(), 0, MemKind::Dram).unwrap());
        agent.engine = Some(engine);
        if !failed {
            break;
        }
        // Some things are tried otherwise, or done without.
        left_out += 3 - rails;
        assert!(rails >= 2, "step {step}");
        group.load(0, 1);
        group.load(1, 0);
        for (i, j) in [(0, 1), (1, 0)] {
            group.agents[i].arena.fill(0, 140_000, step + 1);
            let request = group.write(i, j, (0, 140_000), Some(b"whole"));
            assert_eq!(group.finish(i, &request), Ok(Status::Success), "step {step}");
            assert_eq!(group.agents[j].arena.differs(0, 140_000, step + 1), None);
        }
        group.remove(1, 0);
    }
    assert!(left_out > 20, "only {left_out} steps");
    group.close();
}
