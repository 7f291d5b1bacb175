//! Faults: a text file that is read again whenever it changes.
//!
//! A line is a list of `key=value`. Keys that select (`src`, `dst`, `host`, `op`) say which operations the line is
//! about; the others say what happens to them. All lines that match apply, a later one over an earlier one. README.md
//! has the table.

use std::time::Duration;

use crate::abi::verbs::ibv_gid;
use crate::status::Op;
use crate::topology::host_number;

/// Lines of a control file; more is an error, since each operation looks at each line.
pub const LINES_MAX: usize = 256;

/// When an operation ends with a status that nothing caused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Never.
    Never,
    /// Each n-th operation that the line matches, counted in a process.
    Every(u64),
    /// Only the n-th.
    Nth(u64),
    /// With this chance in percent.
    Percent(f64),
}

/// What happens to an operation.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own in the control file")]
pub struct Effects {
    /// Chance in percent that an operation, or a completion, is held back and so overtaken.
    pub hold_pct: f64,
    /// How long it is held at most, in microseconds.
    pub reorder_us: u64,
    /// Pieces that an operation is cut into at most; they land in any order.
    pub pieces: u32,
    /// Whether pending pieces are taken in any order; off, they land in the order of arrival.
    pub shuffle: bool,
    /// Fixed delay in microseconds.
    pub delay_us: u64,
    /// Random delay up to this many microseconds.
    pub jitter_us: u64,
    /// Delay in microseconds of the sender's completion, after the data has landed.
    pub ack_delay_us: u64,
    /// Bandwidth of the sending device in Gbit/s; 0 is no limit.
    pub gbps: f64,
    /// Status of operations that are made to fail.
    pub status: u8,
    /// Which operations are made to fail, and the line whose matches are counted for it.
    pub fail: (When, usize),
    /// Whether an operation that is made to fail lands all the same.
    pub land: bool,
    /// Chance in percent that the receiver answers that it is not ready.
    pub rnr_pct: f64,
    /// Chance in percent that nothing of the operation arrives and nothing comes back.
    pub drop_pct: f64,
    /// How long until an operation without an answer is given up; `None` is never.
    pub unreachable: Option<Duration>,
    /// The sending device is gone: operations end as flushed.
    pub dead_source: bool,
    /// The receiving device is gone: nothing answers.
    pub dead_destination: bool,
    /// A device reaches itself. A real one does not.
    pub loopback: bool,
    /// RDMA needs an address handle for the sender at the target, as on a real device.
    pub address_check: bool,
    /// The line that sets `gbps`, so that each line has one bucket.
    pub bucket: usize,
}

impl Default for Effects {
    fn default() -> Self {
        Self {
            hold_pct: 25.0,
            reorder_us: 20,
            pieces: 64,
            shuffle: true,
            delay_us: 0,
            jitter_us: 0,
            ack_delay_us: 0,
            gbps: 0.0,
            status: crate::status::Status::UNRESPONSIVE_REMOTE.0,
            fail: (When::Never, 0),
            land: false,
            rnr_pct: 0.0,
            drop_pct: 0.0,
            unreachable: Some(Duration::from_secs(3)),
            dead_source: false,
            dead_destination: false,
            loopback: false,
            address_check: true,
            bucket: 0,
        }
    }
}

/// A host, or one device of it, or everything.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct End {
    host: Option<[u8; 4]>,
    /// Bus, and device with function, as in the GID.
    device: Option<[u8; 2]>,
}

impl End {
    /// `host`, `host/rdmap79s0`, `*/rdmap79s0` or `*`.
    fn parse(text: &str) -> Option<Self> {
        let (host, device) = text.split_once('/').unwrap_or((text, "*"));
        let device = match device {
            "*" => None,
            name => {
                let (bus, device) = name.strip_prefix("rdmap")?.split_once('s')?;
                Some([bus.parse().ok()?, device.parse::<u8>().ok()?.checked_mul(8)?])
            }
        };
        Some(Self { host: (host != "*").then(|| host_number(host)), device })
    }

    fn matches(self, gid: &ibv_gid) -> bool {
        self.host.is_none_or(|host| host == gid.raw[8..12])
            && self.device.is_none_or(|device| device == gid.raw[14..])
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Line {
    source: End,
    destination: End,
    either: End,
    op: Option<(Op, Option<bool>)>,
    effects: Vec<Effect>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Effect {
    HoldPct(f64),
    ReorderUs(u64),
    Pieces(u32),
    Shuffle(bool),
    DelayUs(u64),
    JitterUs(u64),
    AckDelayUs(u64),
    Gbps(f64),
    Status(u8),
    Fail(When),
    Land(bool),
    RnrPct(f64),
    DropPct(f64),
    Unreachable(Option<Duration>),
    Dead(bool),
    Loopback(bool),
    AddressCheck(bool),
}

/// A parsed control file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Control {
    /// `seed=`, which goes before `SOFTEFA_SEED`.
    pub seed: Option<u64>,
    lines: Vec<Line>,
}

impl Control {
    /// Parses a file; an error names the line and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut control = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let mut parsed = Line::default();
            for word in line.split_whitespace() {
                let bad = || format!("line {}: cannot read {word}", number + 1);
                let (key, value) = word.split_once('=').ok_or_else(bad)?;
                if key == "seed" {
                    control.seed = Some(value.parse().map_err(|_| bad())?);
                } else {
                    parsed.set(key, value).ok_or_else(bad)?;
                }
            }
            if !parsed.effects.is_empty() {
                control.lines.push(parsed);
            }
        }
        if control.lines.len() > LINES_MAX {
            return Err(format!("more than {LINES_MAX} lines"));
        }
        Ok(control)
    }

    /// What happens to an operation from one device to another.
    pub fn effects(&self, source: &ibv_gid, destination: &ibv_gid, op: Op, immediate: bool) -> Effects {
        let mut effects = Effects::default();
        for (index, line) in self.lines.iter().enumerate() {
            if line.matches(source, destination, op, immediate) {
                line.effects.iter().for_each(|effect| effects.apply(*effect, index));
                if let Some(dead) = line.dead() {
                    effects.dead_source =
                        if line.either.matches(source) { dead } else { effects.dead_source };
                    effects.dead_destination =
                        if line.either.matches(destination) { dead } else { effects.dead_destination };
                }
            }
        }
        effects
    }
}

impl Line {
    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        let flag = || match value {
            "0" | "off" => Some(false),
            "1" | "on" => Some(true),
            _ => None,
        };
        let percent = || value.parse::<f64>().ok().filter(|percent| (0.0..=100.0).contains(percent));
        let effect = match key {
            "src" => return End::parse(value).map(|end| self.source = end),
            "dst" => return End::parse(value).map(|end| self.destination = end),
            "host" => return End::parse(value).map(|end| self.either = end),
            "op" => return parse_op(value).map(|op| self.op = op),
            "hold_pct" => Effect::HoldPct(percent()?),
            "reorder_us" => Effect::ReorderUs(value.parse().ok()?),
            "pieces" => Effect::Pieces(value.parse().ok().filter(|pieces| (1..=1024).contains(pieces))?),
            "shuffle" => Effect::Shuffle(flag()?),
            "delay_us" => Effect::DelayUs(value.parse().ok()?),
            "jitter_us" => Effect::JitterUs(value.parse().ok()?),
            "ack_delay_us" => Effect::AckDelayUs(value.parse().ok()?),
            "gbps" => Effect::Gbps(value.parse().ok().filter(|gbps| *gbps >= 0.0)?),
            "status" => Effect::Status(value.parse().ok()?),
            "every" => Effect::Fail(When::Every(value.parse().ok().filter(|every| *every > 0)?)),
            "nth" => Effect::Fail(When::Nth(value.parse().ok().filter(|nth| *nth > 0)?)),
            "pct" => Effect::Fail(When::Percent(percent()?)),
            "land" => Effect::Land(flag()?),
            "rnr_pct" => Effect::RnrPct(percent()?),
            "drop_pct" => Effect::DropPct(percent()?),
            "unreachable_ms" if value == "never" => Effect::Unreachable(None),
            "unreachable_ms" => Effect::Unreachable(Some(Duration::from_millis(value.parse().ok()?))),
            "dead" => Effect::Dead(flag()?),
            "loopback" => Effect::Loopback(flag()?),
            "address_check" => Effect::AddressCheck(flag()?),
            _ => return None,
        };
        self.effects.push(effect);
        Some(())
    }

    fn dead(&self) -> Option<bool> {
        self.effects
            .iter()
            .rev()
            .find_map(|effect| if let Effect::Dead(dead) = effect { Some(*dead) } else { None })
    }

    fn matches(&self, source: &ibv_gid, destination: &ibv_gid, op: Op, immediate: bool) -> bool {
        self.source.matches(source)
            && self.destination.matches(destination)
            && (self.either.matches(source) || self.either.matches(destination))
            && self.op.is_none_or(|(wanted, with)| wanted == op && with.is_none_or(|with| with == immediate))
    }
}

#[expect(clippy::option_option, reason = "outer: readable; inner: all operations")]
fn parse_op(value: &str) -> Option<Option<(Op, Option<bool>)>> {
    Some(match value {
        "*" => None,
        "send" => Some((Op::Send, None)),
        "write" => Some((Op::Write, None)),
        "write_plain" => Some((Op::Write, Some(false))),
        "write_imm" => Some((Op::Write, Some(true))),
        "read" => Some((Op::Read, None)),
        _ => return None,
    })
}

impl Effects {
    fn apply(&mut self, effect: Effect, line: usize) {
        match effect {
            Effect::HoldPct(value) => self.hold_pct = value,
            Effect::ReorderUs(value) => self.reorder_us = value,
            Effect::Pieces(value) => self.pieces = value,
            Effect::Shuffle(value) => self.shuffle = value,
            Effect::DelayUs(value) => self.delay_us = value,
            Effect::JitterUs(value) => self.jitter_us = value,
            Effect::AckDelayUs(value) => self.ack_delay_us = value,
            Effect::Gbps(value) => (self.gbps, self.bucket) = (value, line),
            Effect::Status(value) => self.status = value,
            Effect::Fail(value) => self.fail = (value, line),
            Effect::Land(value) => self.land = value,
            Effect::RnrPct(value) => self.rnr_pct = value,
            Effect::DropPct(value) => self.drop_pct = value,
            Effect::Unreachable(value) => self.unreachable = value,
            // Which end it is about is for the line to say: see `Control::effects`.
            Effect::Dead(_) => {}
            Effect::Loopback(value) => self.loopback = value,
            Effect::AddressCheck(value) => self.address_check = value,
        }
    }
}

/// Chance, drawn from a seed and what is decided: the same decisions in each run, whatever the timing.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// For the operation `serial` of a queue pair at `source`; `purpose` keeps uses apart.
    pub fn new(seed: u64, source: &ibv_gid, qpn: u32, serial: u64, purpose: u64) -> Self {
        let low = u64::from_be_bytes(source.raw[8..16].try_into().unwrap_or_default());
        let mut dice = Self(seed);
        for word in [low, u64::from(qpn), serial, purpose] {
            dice.0 ^= word;
            dice.roll();
        }
        dice
    }

    /// splitmix64.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 if `limit` is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        if limit == 0 { 0 } else { self.roll() % limit }
    }

    /// True with this chance.
    pub fn percent(&mut self, percent: f64) -> bool {
        percent > 0.0 && (self.below(1_000_000) as f64) < percent * 10_000.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topology::{Pci, gid};

    fn device(host: &str, bus: u8) -> ibv_gid {
        gid(host, Pci { domain: 0, bus, device: 0, function: 0 })
    }

    #[test]
    fn lines_select_by_host_device_and_operation() {
        let text = "seed=7\ndelay_us=5 # for all\ndst=b op=write delay_us=10\nsrc=a/rdmap79s0 gbps=1.5\nhost=c drop_pct=100";
        let control = Control::parse(text).expect("good");
        assert_eq!(control.seed, Some(7));
        let effects = |from: (&str, u8), to: &str, op| {
            control.effects(&device(from.0, from.1), &device(to, 9), op, false)
        };
        assert_eq!(effects(("a", 80), "b", Op::Write).delay_us, 10);
        assert_eq!(effects(("a", 80), "b", Op::Read).delay_us, 5);
        assert!((effects(("a", 79), "b", Op::Read).gbps - 1.5).abs() < 1e-9);
        assert!(effects(("b", 79), "a", Op::Read).gbps.abs() < 1e-9);
        assert!(effects(("c", 79), "a", Op::Send).drop_pct > 99.0);
        assert!(effects(("a", 79), "c", Op::Send).drop_pct > 99.0);
        assert!(effects(("a", 79), "b", Op::Send).drop_pct < 1.0);
    }

    #[test]
    fn an_operation_with_immediate_is_told_apart() {
        let control = Control::parse("op=write_imm status=7 nth=3 land=1").expect("good");
        let with = |immediate| control.effects(&device("a", 1), &device("b", 1), Op::Write, immediate);
        assert_eq!(with(true).fail, (When::Nth(3), 0));
        assert_eq!(with(false).fail.0, When::Never);
    }

    #[test]
    fn a_dead_device_is_dead_at_its_own_end() {
        let control = Control::parse("host=b/rdmap79s0 dead=1").expect("good");
        let effects = |from: ibv_gid, to: ibv_gid| control.effects(&from, &to, Op::Send, false);
        let out = effects(device("b", 79), device("a", 79));
        assert!(out.dead_source && !out.dead_destination);
        let back = effects(device("a", 79), device("b", 79));
        assert!(!back.dead_source && back.dead_destination);
        assert!(!effects(device("a", 79), device("b", 80)).dead_destination);
    }

    #[test]
    fn mistakes_name_the_line() {
        for bad in
            ["delay_us=x", "nonsense=1", "every=0", "hold_pct=101", "delay_us", "src=a/eth0", "pieces=0"]
        {
            let error = Control::parse(&format!("# first\n{bad}")).expect_err(bad);
            assert!(error.starts_with("line 2") && error.contains(bad), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = Control::parse(&text);
        }

        #[test]
        fn dice_repeat_and_keep_their_limits(seed: u64, serial: u64, limit in 0..1000_u64) {
            let dice = || Dice::new(seed, &device("a", 3), 5, serial, 1);
            prop_assert_eq!(dice().roll(), dice().roll());
            prop_assert!(dice().below(limit) < limit.max(1));
            prop_assert!(!dice().percent(0.0));
            prop_assert!(dice().percent(100.0));
        }
    }
}
