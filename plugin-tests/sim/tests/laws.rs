//! What random schedules meet too seldom, each in a schedule of its own.

use nixl_libfabric::engine::Engine;
use nixl_libfabric::error::Status;
use nixl_libfabric::types::{AgentName, Op};
use nixl_libfabric_sim::clock::VirtualTime;
use nixl_libfabric_sim::pair::{Group, init};
use nixl_libfabric_sim::provider::{library, on_host};
use nixl_libfabric_sim::world::{BOUND_MR, EFA, EFA_DIRECT, EFA_READS_ONLY, Faults, Held, TCP, World};

#[path = "laws/failing_rails.rs"]
mod failing_rails;

const PROFILES: [nixl_libfabric_sim::world::Profile; 3] = [EFA, EFA_DIRECT, TCP];
const OPTIONS: &[(&str, &str)] = &[("connect_timeout_ms", "2000"), ("drain_timeout_ms", "300")];

/// Opening fails at every step there is, one after the other: what was opened before it is closed, in order.
#[test]
fn a_failure_at_any_step_of_opening_leaves_nothing_open() {
    for profile in PROFILES {
        for step in 0.. {
            let _time = VirtualTime::start();
            let world = World::new(1, profile, 2);
            world.state().faults = Faults { setup_fails_at: Some(step), ..Faults::default() };
            let host = world.add_host();
            let options = [("control_recv_buffers", "8")];
            let init = init(&AgentName::from("a"), &options);
            let engine = on_host(&world, host, || Engine::create_on(library(), init));
            let steps = world.state().setup_calls;
            if step == 0 {
                assert!(engine.is_err(), "without an answer of fi_getinfo there is nothing to open");
            }
            drop(engine);
            let state = world.state();
            assert_eq!(state.broken, Vec::<String>::new(), "{profile:?}, step {step}");
            assert_eq!(state.open_objects(), Vec::new(), "{profile:?}, step {step}");
            if step >= steps {
                assert!(steps > 20, "{profile:?}: only {steps} steps");
                break;
            }
        }
    }
}

#[test]
#[ignore = "an endpoint cannot be closed while its own buffers are bound to it, and holds them while it is open"]
fn registrations_bound_to_endpoints_work_and_are_closed_before_them() {
    let mut group = Group::new(2, BOUND_MR, 2, OPTIONS);
    group.agents[0].arena.fill(0, 100, 5);
    let request = group.write(0, 1, (0, 100), Some(b"bound"));
    assert_eq!(group.finish(0, &request), Ok(Status::Success));
    assert_eq!(group.agents[1].arena.differs(0, 100, 5), None);
    assert!(group.live_until(100, |group| group.got(1, b"bound") == 1));
    drop(request);
    group.close();
}

/// The efa fabric delivers no message that follows a lost one: no transfer that needs one waits for ever, and writes go on.
#[test]
fn who_hears_no_more_keeps_nobody_waiting() {
    let mut group = Group::new(2, EFA, 1, OPTIONS);
    group.live(20);
    group.world.state().faults.sends_to_fail = 1;
    let many: Vec<_> = (0..6).map(|i| group.write(0, 1, (i * 4096, 64), Some(b"lost"))).collect();
    // Some messages may be said to have left before the loss is known.
    let failed = many.iter().filter(|request| group.finish(0, request).is_err()).count();
    assert!(failed > 0);
    let late = group.prepare(Op::Write, 0, 1, &[(0, 8)]).unwrap();
    if group.engine(0).post_xfer(&late, Some(b"late")).is_ok() {
        let error = group.finish(0, &late).unwrap_err();
        assert!(error.to_string().contains("restart"), "{error}");
    }
    let silent = group.write(0, 1, (8192, 64), None);
    assert_eq!(group.finish(0, &silent), Ok(Status::Success));
    drop((many, late, silent));
    group.close();
}

/// The efa fabric keeps operations until the peer has answered its handshake, says nothing if that is lost, and sends them if
/// the peer wakes later: nothing of a transfer that has failed.
#[test]
fn a_peer_that_never_answered_ends_the_wait_and_one_that_did_is_waited_for() {
    let mut group = Group::new(2, EFA, 1, OPTIONS);
    group.live(20);
    let hold = |group: &Group, held| group.world.state().faults.held = held;
    hold(&group, Held::Rma);
    group.agents[0].arena.fill(0, 64, 1);
    group.agents[1].arena.fill(0, 64, 2);
    let first = group.write(0, 1, (0, 64), None);
    let error = group.finish(0, &first).unwrap_err();
    assert!(error.to_string().contains("connect_timeout_ms"), "{error}");
    // What the provider puts off meanwhile ends, too.
    group.world.state().faults.again = 1000;
    let put_off = group.write(0, 1, (12_288, 64), None);
    let error = group.finish(0, &put_off).unwrap_err();
    assert!(error.to_string().contains("connect_timeout_ms"), "{error}");
    group.world.state().faults.again = 0;
    hold(&group, Held::Nothing);
    group.live(20);
    let second = group.write(0, 1, (4096, 64), None);
    assert_eq!(group.finish(0, &second), Ok(Status::Success));
    assert_eq!(group.agents[1].arena.differs(0, 64, 2), None, "it was written when it had failed");

    hold(&group, Held::Rma);
    let third = group.write(0, 1, (8192, 64), None);
    assert!(
        !group.live_until(20_000, |group| { group.engine(0).check_xfer(&third) != Ok(Status::InProgress) })
    );
    hold(&group, Held::Nothing);
    assert_eq!(group.finish(0, &third), Ok(Status::Success));
    drop((first, put_off, second, third));
    group.close();
}

/// Where the target's software moves the data, one look moves more than one operation, although none of them tells it so.
#[test]
fn a_target_that_looks_seldom_takes_in_several_operations_each_time() {
    let mut group = Group::new(2, TCP, 1, OPTIONS);
    group.live(20);
    let pieces: Vec<_> = (0..64).map(|i| (i * 256, 8)).collect();
    let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
    group.engine(0).post_xfer(&request, None).unwrap();
    let mut looks = 0;
    while group.engine(0).check_xfer(&request) == Ok(Status::InProgress) {
        group.world.pass(1_000_000);
        assert!(group.engine(1).take_notifications().unwrap().is_empty());
        looks += 1;
        assert!(looks <= 64 / 2, "an operation or less for each look");
    }
    assert_eq!(group.finish(0, &request), Ok(Status::Success));
    drop(request);
    group.close();
}

/// Posts without an end, some without notification, some released in flight.
#[test]
fn of_many_notifications_each_comes_once() {
    let mut group = Group::new(2, EFA, 1, OPTIONS);
    let requests: Vec<_> =
        (0..32).map(|i| group.prepare(Op::Write, 0, 1, &[(i * 4096, 8)]).unwrap()).collect();
    let mut sent = 0;
    for round in 0..600u32 {
        for (i, request) in requests.iter().enumerate() {
            let note = (round * 32 + i as u32).to_le_bytes();
            let counted = !(round as usize + i).is_multiple_of(7);
            sent += usize::from(counted);
            group.engine(0).post_xfer(request, counted.then_some(&note[..])).unwrap();
        }
        if round % 50 == 0 {
            let released = group.prepare(Op::Write, 0, 1, &[(64 * 4096, 8)]).unwrap();
            group.engine(0).post_xfer(&released, Some(b"released")).unwrap();
            group.engine(0).release_request(released).unwrap();
        }
        for request in &requests {
            assert_eq!(group.finish(0, request), Ok(Status::Success));
        }
    }
    let count = |group: &mut Group| {
        let mut seen: Vec<_> = group.agents[1]
            .inbox
            .iter()
            .filter(|(_, m)| m.as_slice() != b"released")
            .map(|(_, m)| m.clone())
            .collect();
        let all = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), all, "one came twice");
        all
    };
    assert!(group.live_until(1_000, |group| count(group) == sent), "{} of {sent} came", count(&mut group));
    drop(requests);
    group.close();
}

/// When nothing completes, a rail takes as many operations and messages as on its first day, whatever happened before.
#[test]
fn nothing_is_lost_of_a_rails_capacity() {
    for profile in PROFILES {
        let mut group = Group::new(2, profile, 1, OPTIONS);
        group.live(100);
        let pieces: Vec<_> = (0..500).map(|i| (i * 4096, 8)).collect();
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        group.meet(0, 1, 1);
        let probe = |group: &mut Group| {
            group.world.state().faults = Faults { held: Held::All, ..Faults::default() };
            group.engine(0).post_xfer(&request, None).unwrap();
            for _ in 0..100 {
                group.look(0);
                group.look(1);
            }
            let taken = group.world.state().operations_in_flight(group.agents[0].host);
            group.world.state().faults = Faults::default();
            assert_eq!(group.finish(0, &request), Ok(Status::Success));
            let receives =
                group.live_until(100, |g| g.world.state().receives_posted(g.agents[1].host) == [256]);
            assert!(receives, "receives were lost");
            taken
        };
        let fresh = probe(&mut group);
        assert!(fresh > 100, "{fresh} operations in flight");
        for round in 0..200 {
            let faults =
                Faults { rma_error: 300, send_error: 100, post_error: 20, again: 200, ..Faults::default() };
            group.world.state().faults = faults;
            let note = vec![7; 20_000];
            let note = (round % 2 == 0).then_some(&note[..]);
            let posted = group.engine(0).post_xfer(&request, note);
            if posted.is_ok() {
                let _ = group.finish(0, &request);
            }
            group.live(10);
        }
        group.world.state().faults = Faults::default();
        let again = group.live_until(10_000, |group| {
            group.engine(0).post_xfer(&request, None).is_ok() && group.finish(0, &request).is_ok()
        });
        assert!(again, "{profile:?}: no transfer succeeds any more");
        assert_eq!(probe(&mut group), fresh, "{profile:?}");
        drop(request);
        group.close();
    }
}

/// A peer that is dead, or stands still, costs the others nothing.
#[test]
fn a_dead_peer_holds_up_nobody_else() {
    for profile in PROFILES {
        let mut group = Group::new(3, profile, 1, OPTIONS);
        group.live(100);
        let host = group.agents[2].host;
        group.world.kill_host(host);
        let to_dead = group.prepare(Op::Write, 0, 2, &[(0, 4096)]).unwrap();
        group.engine(0).post_xfer(&to_dead, Some(b"dead")).unwrap();
        for i in 0..100 {
            let _ = group.engine(0).send_notification(&group.agents[2].name, b"anybody?");
            group.agents[0].arena.fill(4096, 64, i + 1);
            let request = group.write(0, 1, (4096, 64), Some(&i.to_le_bytes()));
            let quick = group.live_until(20, |group| group.got(1, &i.to_le_bytes()) == 1);
            assert!(quick, "{profile:?}: a dead peer delays the others");
            assert_eq!(group.finish(0, &request), Ok(Status::Success));
        }
        let status = group.finish(0, &to_dead).unwrap_err().status();
        assert_eq!(status, Status::RemoteDisconnect, "{profile:?}");
        drop(to_dead);
        group.close();
    }
}

/// What was to go to a peer that never answered takes nothing of a rail: larger than a rail's window, on all rails.
#[test]
fn a_peer_that_never_answered_holds_up_nobody_else() {
    let mut group = Group::new(3, EFA, 2, OPTIONS);
    group.live(20);
    let pieces: Vec<_> = (0..20_000).map(|i| (i * 64, 8)).collect();
    group.world.state().faults.held = Held::RmaOf(group.agents[2].host);
    for _ in 0..3 {
        let in_vain = group.prepare(Op::Write, 0, 2, &pieces).unwrap();
        group.engine(0).post_xfer(&in_vain, None).unwrap();
        let error = group.finish(0, &in_vain).unwrap_err();
        assert!(error.to_string().contains("connect_timeout_ms"), "{error}");
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        group.engine(0).post_xfer(&request, None).unwrap();
        assert_eq!(group.finish(0, &request), Ok(Status::Success));
        drop((in_vain, request));
    }
    group.close();
}

/// Where the target's software moves what is written, its death is heard of by asking; one that stands still answers.
#[test]
fn a_write_that_the_target_fetches_ends_with_its_life() {
    let mut group = Group::new(3, EFA_READS_ONLY, 2, OPTIONS);
    group.live(20);
    let pieces: Vec<_> = (0..2_000).map(|i| (i * 256, 8)).collect();
    let request = group.prepare(Op::Write, 0, 2, &pieces).unwrap();
    group.engine(0).post_xfer(&request, None).unwrap();
    assert_eq!(group.finish(0, &request), Ok(Status::Success));

    group.world.state().faults.held = Held::RmaOf(group.agents[2].host);
    group.engine(0).post_xfer(&request, None).unwrap();
    group.live(5);
    group.world.kill_host(group.agents[2].host);
    group.world.state().faults.held = Held::Nothing;
    let error = group.finish(0, &request).unwrap_err();
    assert_eq!(error.status(), Status::RemoteDisconnect, "{error}");

    let other = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
    for _ in 0..4 {
        group.engine(0).post_xfer(&other, None).unwrap();
        assert_eq!(group.finish(0, &other), Ok(Status::Success), "what never ends holds up the others");
    }
    drop((request, other));
    group.close();
}

/// A peer that stands still takes operations and messages until half of what is free is gone, and no more.
#[test]
fn a_peer_that_stands_still_holds_up_nobody_else() {
    for profile in PROFILES {
        let mut group = Group::new(3, profile, 1, OPTIONS);
        group.live(100);
        let pieces: Vec<_> = (0..6000).map(|i| (i * 256, 8)).collect();
        let to_still = group.prepare(Op::Write, 0, 2, &pieces).unwrap();
        let long = vec![1; 500_000];
        for _ in 0..6 {
            let _ = group.engine(0).send_notification(&group.agents[2].name, &long);
        }
        group.engine(0).post_xfer(&to_still, Some(&long)).unwrap();
        for i in 0..100u64 {
            let request = group.write(0, 1, (1_600_000, 64), Some(&i.to_le_bytes()));
            for _ in 0..200 {
                // Agent 2 is not called at all.
                group.look(0);
                group.look(1);
                group.world.pass(10_000);
            }
            let done = group.engine(0).check_xfer(&request);
            assert_eq!(done, Ok(Status::Success), "{profile:?}: a peer that stands still delays the others");
            assert_eq!(group.got(1, &i.to_le_bytes()), 1, "{profile:?}");
        }
        // It goes on, and so does what is for it.
        assert_eq!(group.finish(0, &to_still), Ok(Status::Success), "{profile:?}");
        assert!(group.live_until(1_000, |group| group.got(2, &long) == 7), "{profile:?}");
        drop(to_still);
        group.close();
    }
}

/// A host that the network cut off keeps what was posted to it; the rest of the device is for the others.
#[test]
fn a_host_that_is_cut_off_holds_up_nobody_else() {
    for profile in PROFILES {
        let mut group = Group::new(3, profile, 1, OPTIONS);
        group.live(100);
        let met = group.write(0, 2, (0, 64), None);
        assert_eq!(group.finish(0, &met), Ok(Status::Success));
        group.world.state().faults.held = Held::RmaOf(group.agents[2].host);
        // More than any device here takes.
        let pieces: Vec<_> = (0..20_000).map(|i| (i * 64, 8)).collect();
        let stuck = group.prepare(Op::Write, 0, 2, &pieces).unwrap();
        group.engine(0).post_xfer(&stuck, None).unwrap();
        group.live(1_000);
        for i in 0..20 {
            let request = group.write(0, 1, (1_600_000 + i * 64, 64), None);
            assert_eq!(group.finish(0, &request), Ok(Status::Success), "{profile:?}");
        }
        assert_eq!(group.engine(0).check_xfer(&stuck), Ok(Status::InProgress), "{profile:?}");
        group.world.state().faults.held = Held::Nothing;
        assert_eq!(group.finish(0, &stuck), Ok(Status::Success), "{profile:?}");
        drop((met, stuck));
        group.close();
    }
}

/// Who hears a hello may say something at once; on a fabric without order that comes before its own hello.
#[test]
fn nothing_overtakes_a_hello() {
    for seed in 0..40 {
        let mut group = Group::unconnected(seed, 2, EFA, 1, OPTIONS);
        group.load(0, 1);
        let name = group.agents[0].name.clone();
        let heard = group.live_until(100, |group| group.engine(1).send_notification(&name, b"early").is_ok());
        assert!(heard);
        assert!(group.live_until(5_000, |group| group.got(0, b"early") == 1), "seed {seed}");
        group.close();
    }
}

/// While a transfer uses it, memory is not given back to the host; afterwards it is, whoever holds what.
#[test]
fn memory_in_use_is_not_deregistered() {
    let mut group = Group::new(2, EFA, 2, OPTIONS);
    group.live(20);
    group.world.state().faults.held = Held::Rma;
    let request = group.write(0, 1, (0, 64), None);
    let local = group.agents[0].local.clone().unwrap();
    let early = group.engine(0).deregister_mem(&local).unwrap_err();
    assert_eq!(early.status(), Status::NotAllowed);
    group.world.state().faults.held = Held::Nothing;
    assert_eq!(group.finish(0, &request), Ok(Status::Success));
    assert!(group.engine(0).post_xfer(&request, None).is_err(), "its memory is gone");
    drop((request, local));
    group.close();
}

#[test]
fn memory_that_was_deregistered_is_out_of_the_nics_reach() {
    let mut group = Group::new(2, EFA, 2, OPTIONS);
    group.live(20);
    let request = group.prepare(Op::Write, 0, 1, &[(0, 64)]).unwrap();
    let local = group.agents[0].local.take().unwrap();
    group.engine(0).deregister_mem(&local).unwrap();
    drop(local);
    let (host, addr, len) = (group.agents[0].host, group.agents[0].arena.addr(), group.agents[0].arena.len());
    assert_eq!(group.world.state().registrations_of(host, addr, len), 0);
    drop(request);
    group.close();
}

/// Both users remove and add the other again, while earlier handshakes are under way.
#[test]
fn both_sides_may_begin_anew_at_once() {
    for seed in 0..60 {
        let mut group = Group::unconnected(seed, 2, EFA, 1, OPTIONS);
        group.load(0, 1);
        group.load(1, 0);
        for (i, j) in [(0, 1), (1, 0), (0, 1), (1, 0)] {
            group.live((seed % 5) as usize);
            group.remove(i, j);
            group.load(i, j);
        }
        for (i, j) in [(0, 1), (1, 0)] {
            let name = group.agents[j].name.clone();
            group.engine(i).send_notification(&name, b"anew").unwrap();
            assert!(group.live_until(5_000, |group| group.got(j, b"anew") == 1), "seed {seed}: {i} to {j}");
        }
        group.close();
    }
}

/// The sender removes its peer and loads it again while a write is under way. It lands when the next transfer has
/// begun, and is none of its writes.
#[test]
fn a_write_that_lands_late_is_no_write_of_the_next_transfer() {
    for profile in PROFILES {
        let mut group = Group::new(2, profile, 1, OPTIONS);
        group.live(20);
        let hold = |group: &Group, held| group.world.state().faults.held = held;
        hold(&group, Held::Rma);
        let old = group.write(0, 1, (0, 64), Some(b"old"));
        group.live(5);
        group.remove(0, 1);
        group.load(0, 1);
        group.live(20);
        hold(&group, Held::Nothing);
        for _ in 0..10 {
            group.world.pass(1_000_000);
        }
        hold(&group, Held::Rma);
        let new = group.write(0, 1, (4096, 64), Some(b"new"));
        group.live(100);
        assert_eq!(group.got(1, b"new"), 0, "{profile:?}: the notification came before its data");
        hold(&group, Held::Nothing);
        assert_eq!(group.finish(0, &new), Ok(Status::Success), "{profile:?}");
        assert!(group.live_until(100, |group| group.got(1, b"new") == 1), "{profile:?}");
        drop((old, new));
        group.close();
    }
}

/// What waits for a peer that answers late has its deadline from the last that was heard of it.
#[test]
fn many_notified_writes_over_a_slow_network_all_end_well() {
    for profile in PROFILES {
        let mut group = Group::new(2, profile, 1, OPTIONS);
        group.world.state().delay_ns = 15_000_000;
        let requests: Vec<_> = (0..200u32)
            .map(|i| (i, group.prepare(Op::Write, 0, 1, &[(i as usize * 4096, 8)]).unwrap()))
            .collect();
        for round in 0..100u32 {
            for (i, request) in &requests {
                let note = (round * 200 + i).to_le_bytes();
                let _ = group.engine(0).post_xfer(request, Some(&note)).unwrap();
            }
            for (_, request) in &requests {
                assert_eq!(group.finish(0, request), Ok(Status::Success), "{profile:?}, round {round}");
            }
        }
        assert!(group.live_until(1_000, |group| group.agents[1].inbox.len() == 20_000), "{profile:?}");
        drop(requests);
        group.close();
    }
}

/// Bytes that wait for a peer have their limit before it has answered, too.
#[test]
fn notifications_to_a_peer_that_never_answers_do_not_pile_up() {
    const MIB: usize = 1 << 20;
    for profile in PROFILES {
        let options = [OPTIONS, &[("pending_bytes_max", "4194304")]].concat();
        let mut group = Group::unconnected(7, 2, profile, 1, &options);
        group.load(0, 1);
        let host = group.agents[1].host;
        group.world.kill_host(host);
        let name = group.agents[1].name.clone();
        let long = vec![1; MIB];
        let outcomes: Vec<_> = (0..150).map(|_| group.engine(0).send_notification(&name, &long)).collect();
        let taken = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert!((1..=4).contains(&taken), "{profile:?}: {taken} of 1 MiB each were taken");
        let error = outcomes.into_iter().find_map(Result::err).unwrap();
        assert!(error.to_string().contains("pending_bytes_max"), "{error}");
        let request = group.prepare(Op::Write, 0, 1, &[(0, 8)]).unwrap();
        let error = group.engine(0).post_xfer(&request, Some(&long)).unwrap_err();
        assert!(error.to_string().contains("pending_bytes_max"), "{error}");
        drop(request);
        group.close();
    }
}

/// Rails take of a transfer what they get done.
#[test]
fn a_slow_rail_does_less() {
    for (times, at_most) in [(2, 45), (10, 20)] {
        let mut group = Group::new(2, EFA, 2, OPTIONS);
        group.live(20);
        group.meet(0, 1, 2);
        let host = group.agents[0].host;
        group.world.state().faults.slow_endpoint = Some((host, 1, times));
        // Blocks that do not join.
        let pieces: Vec<_> = (0..8000).map(|i| (i * 256, 8)).collect();
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        let before = group.world.state().moved(host);
        for _ in 0..4 {
            group.engine(0).post_xfer(&request, None).unwrap();
            assert_eq!(group.finish(0, &request), Ok(Status::Success));
        }
        let after = group.world.state().moved(host);
        let [fast, slow] = [0, 1].map(|rail| after[rail] - before[rail]);
        assert_eq!(fast + slow, 4 * 8000);
        let percent = slow * 100 / (fast + slow);
        assert!((1..=at_most).contains(&percent), "the rail that is {times} times slower did {percent} %");
        drop(request);
        group.close();
    }
}

/// Small transfers take turns on the rails, and each takes one.
#[test]
fn small_transfers_take_one_rail_in_turn() {
    let mut group = Group::new(2, EFA, 4, OPTIONS);
    group.live(20);
    group.meet(0, 1, 4);
    let host = group.agents[0].host;
    let request = group.prepare(Op::Write, 0, 1, &[(0, 64)]).unwrap();
    let before = group.world.state().moved(host);
    for _ in 0..16 {
        group.engine(0).post_xfer(&request, None).unwrap();
        assert_eq!(group.finish(0, &request), Ok(Status::Success));
    }
    let after = group.world.state().moved(host);
    assert!((0..4).all(|rail| after[rail] - before[rail] == 4), "{before:?} {after:?}");
    drop(request);
    group.close();
}

/// A peer that was reached is written to in batches, which are closed whatever the provider puts off.
#[test]
fn writes_share_doorbells() {
    for again_in_batch in [0, 300] {
        let mut group = Group::new(2, EFA, 1, OPTIONS);
        group.live(20);
        let host = group.agents[0].host;
        let first = group.write(0, 1, (0, 64), None);
        assert_eq!(group.finish(0, &first), Ok(Status::Success));
        group.world.state().faults.again_in_batch = again_in_batch;
        let pieces: Vec<_> = (0..6400).map(|i| (i * 256, 8)).collect();
        group.agents[0].arena.fill(0, 6400 * 256, 9);
        let request = group.prepare(Op::Write, 0, 1, &pieces).unwrap();
        let before = group.world.state().doorbells(host)[0];
        group.engine(0).post_xfer(&request, None).unwrap();
        assert_eq!(group.finish(0, &request), Ok(Status::Success));
        let rung = group.world.state().doorbells(host)[0] - before;
        assert!(rung < 6400 && (again_in_batch > 0 || rung <= 6400 / 16 + 8), "{rung} doorbells");
        // A notification goes its way between batches.
        let note = group.write(0, 1, (0, 64), Some(b"between"));
        assert_eq!(group.finish(0, &note), Ok(Status::Success));
        assert!(group.live_until(100, |group| group.got(1, b"between") == 1));
        drop((first, request, note));
        group.close();
    }
}

/// Memory whose deregistration did not wait for a transfer is closed when that is over.
#[test]
fn memory_given_up_in_use_is_closed_with_its_last_use() {
    let mut group = Group::new(2, EFA, 2, OPTIONS);
    group.live(20);
    group.world.state().faults.held = Held::Rma;
    let request = group.write(0, 1, (0, 64), None);
    let local = group.agents[0].local.take().unwrap();
    assert!(group.engine(0).deregister_mem(&local).is_err());
    let (host, addr, len) = (group.agents[0].host, group.agents[0].arena.addr(), group.agents[0].arena.len());
    assert!(group.world.state().registrations_of(host, addr, len) > 0);
    group.world.state().faults.held = Held::Nothing;
    assert_eq!(group.finish(0, &request), Ok(Status::Success));
    assert_eq!(group.world.state().registrations_of(host, addr, len), 0);
    drop((request, local));
    group.close();
}

/// What nobody takes waits at its sender: the simulator says so if the provider is made to keep it.
#[test]
fn notifications_that_nobody_takes_wait_at_their_sender() {
    for profile in PROFILES {
        let options = [OPTIONS, &[("inbox_bytes_max", "65536")]].concat();
        let mut group = Group::new(3, profile, 2, &options);
        group.live(50);
        let names: Vec<_> = group.agents.iter().map(|agent| agent.name.clone()).collect();
        let count = 4000_u32;
        for number in 0..count {
            group.engine(0).send_notification(&names[1], &number.to_le_bytes()).unwrap();
            // It calls NIXL, and is not interested in notifications.
            group.engine(1).send_notification(&names[2], b"at work").unwrap();
            group.look(0);
            group.look(2);
            group.world.pass(1_000);
        }
        assert_eq!(group.world.state().broken, Vec::<String>::new(), "{profile:?}");
        group.live_until(1_000, |group| group.agents[1].inbox.len() == count as usize);
        let came: Vec<_> = group.agents[1].inbox.iter().map(|(_, bytes)| bytes.clone()).collect();
        let mut sorted = came.clone();
        sorted.sort_by_key(|bytes| u32::from_le_bytes(bytes[..].try_into().unwrap()));
        assert_eq!(sorted, (0..count).map(|n| n.to_le_bytes().to_vec()).collect::<Vec<_>>(), "{profile:?}");
        group.close();
    }
}

/// Many may write at once to who takes what comes: never is a message there without a receive for it.
#[test]
fn many_messages_at_once_find_receives() {
    const SENDERS: usize = 30;
    for buffers in ["8", "256"] {
        let options = [OPTIONS, &[("control_recv_buffers", buffers)]].concat();
        let mut group = Group::new(SENDERS + 1, EFA, 1, &options);
        group.live(50);
        let target = group.agents[SENDERS].name.clone();
        for _ in 0..4 {
            for sender in 0..SENDERS {
                for _ in 0..64 {
                    group.engine(sender).send_notification(&target, b"to one").unwrap();
                }
            }
            group.world.pass(10_000_000);
        }
        group.look(SENDERS);
        assert_eq!(group.world.state().broken, Vec::<String>::new(), "{buffers} receives");
        assert!(group.live_until(1_000, |group| group.got(SENDERS, b"to one") == SENDERS * 64 * 4));
        group.close();
    }
}

/// Data of agents on one host passes by the network, and notifications do not: they come once, and never before it.
#[test]
fn neighbours_keep_the_laws_though_their_data_passes_by_the_network() {
    let options = [OPTIONS, &[("same_host", "auto")]].concat();
    for profile in PROFILES {
        let mut group = Group::new(2, profile, 2, &options);
        group.live(20);
        let hold = |group: &Group, held| group.world.state().faults.held = held;
        group.agents[0].arena.fill(0, 4096, 5);
        group.agents[0].arena.fill(4096, 4096, 5);

        hold(&group, Held::Rma);
        let request = group.write(0, 1, (0, 4096), Some(b"first"));
        assert_eq!(group.finish(0, &request), Ok(Status::Success), "{profile:?}: no NIC moves it");
        assert_eq!(group.agents[1].arena.differs(0, 4096, 5), None, "{profile:?}: DONE means arrived");
        assert!(group.live_until(1000, |group| group.got(1, b"first") == 1));

        // Nothing at all gets through: the data is there, and who sent it is not told that the notification is.
        hold(&group, Held::All);
        let alone = group.write(0, 1, (4096, 4096), Some(b"second"));
        assert!(!group.live_until(100, |group| group.got(1, b"second") > 0));
        assert_eq!(group.agents[1].arena.differs(4096, 4096, 5), None);
        hold(&group, Held::Nothing);
        assert_eq!(group.finish(0, &alone), Ok(Status::Success));
        assert!(group.live_until(1000, |group| group.got(1, b"second") == 1));

        // What was deregistered there is reached no more, though the memory is still mapped in the process.
        group.agents[0].arena.fill(0, 4096, 6);
        let local = group.agents[1].local.take().unwrap();
        assert_eq!(group.engine(1).deregister_mem(&local).map_err(|e| e.to_string()), Ok(()));
        let outcome = group.engine(0).post_xfer(&request, Some(b"late"));
        let error = outcome.and_then(|_| group.finish(0, &request)).unwrap_err();
        assert!(error.to_string().contains("deregistered"), "{profile:?}: {error}");
        assert_eq!(
            group.agents[1].arena.differs(0, 4096, 5),
            None,
            "{profile:?}: written after deregistration"
        );
        assert!(!group.live_until(100, |group| group.got(1, b"late") > 0));
        assert_eq!(group.agents[1].inbox.len(), 2);
        drop((request, alone));
        group.close();
    }
}
