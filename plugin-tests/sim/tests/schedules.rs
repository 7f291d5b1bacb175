//! Random schedules: bounded ones in `cargo test`, one that failed with `SIM_SEED`, any number with `SIM_SEEDS`.

use nixl_libfabric_sim::agents::{Plan, run};

/// Schedules of a plain test run.
const SEEDS: u64 = 400;
/// Failures after which a run ends.
const FAILURES_MAX: usize = 10;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

#[test]
fn the_laws_hold_in_every_schedule() {
    nixl_libfabric_sim::log::start();
    if let Some(seed) = number("SIM_SEED") {
        let plan = Plan::of(seed);
        println!("{plan:?}");
        match run(&plan) {
            Ok(summary) => println!("seed {seed}: {summary:?}"),
            Err(failure) => panic!("{failure}"),
        }
        return;
    }
    let first = number("SIM_FIRST").unwrap_or(1);
    let count = number("SIM_SEEDS").unwrap_or(SEEDS);
    let mut totals = (0, 0, 0);
    let mut failures = Vec::new();
    for seed in first..first + count {
        match run(&Plan::of(seed)) {
            Ok(summary) => {
                totals =
                    (totals.0 + summary.done, totals.1 + summary.failed, totals.2 + summary.notifications);
            }
            Err(failure) => {
                println!("seed {seed}: {}", failure.broken[0]);
                failures.push(failure);
            }
        }
        if failures.len() >= FAILURES_MAX {
            break;
        }
    }
    println!(
        "{count} schedules: {} transfers done, {} failed, {} notifications",
        totals.0, totals.1, totals.2
    );
    if let Some(failure) = failures.first() {
        panic!("{failure}");
    }
    // Schedules in which nothing happens would all be well. As it is: 23 done, 1.5 failed, 35 notifications each.
    let (done, failed, notifications) = totals;
    if count >= SEEDS {
        assert!(done >= 15 * count && notifications >= 20 * count, "little happens: {totals:?}");
        assert!(failed * 100 >= done && failed * 8 <= done, "faults do too little, or too much: {totals:?}");
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 1..6 {
        let (one, other) = (run(&Plan::of(seed)), run(&Plan::of(seed)));
        assert_eq!(one.ok(), other.ok(), "seed {seed}");
    }
}
