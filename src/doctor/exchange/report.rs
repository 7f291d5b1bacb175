//! What became of the pairs, from both sides' words. Pure.

use std::collections::BTreeMap;

use super::BLOCK_BYTES;
use super::link::Hello;
use crate::doctor::checks::SILENT_DROP;
use crate::doctor::finding::Finding;
use crate::error::{Error, Result};

/// What became of a write, as its writer sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Written {
    Completed,
    Failed(String),
    /// Neither in time.
    Silent,
}

/// What became of a pair, as both see it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Whole,
    /// Completed, and the bytes are not there.
    Damaged,
    Failed(String),
    Silent,
}

/// By [writer's rail][reader's rail].
pub(super) type Outcomes = Vec<Vec<Outcome>>;

/// Joins the writer's word and the reader's.
pub(super) fn judge(written: &[Vec<Written>], arrived: &str, readers: usize) -> Outcomes {
    let arrived: Vec<bool> = arrived.bytes().map(|byte| byte == b'1').collect();
    let is_there = |writer: usize, reader: usize| arrived.get(writer * readers + reader) == Some(&true);
    let join = |(writer, row): (usize, &Vec<Written>)| {
        let one = |(reader, written): (usize, &Written)| match written {
            Written::Completed if is_there(writer, reader) => Outcome::Whole,
            Written::Completed => Outcome::Damaged,
            Written::Failed(why) => Outcome::Failed(why.clone()),
            Written::Silent => Outcome::Silent,
        };
        row.iter().enumerate().map(one).collect()
    };
    written.iter().enumerate().map(join).collect()
}

/// Outcomes as a line.
pub(super) fn encode(outcomes: &Outcomes) -> String {
    let word = |outcome: &Outcome| match outcome {
        Outcome::Whole => "whole".to_owned(),
        Outcome::Damaged => "damaged".to_owned(),
        Outcome::Silent => "silent".to_owned(),
        Outcome::Failed(why) => format!("failed {}", why.replace(['\t', '\n'], " ")),
    };
    outcomes.iter().flatten().map(word).collect::<Vec<_>>().join("\t")
}

/// The other side's line.
pub(super) fn decode(line: &str, writers: usize, readers: usize) -> Result<Outcomes> {
    let word = |word: &str| match word {
        "whole" => Some(Outcome::Whole),
        "damaged" => Some(Outcome::Damaged),
        "silent" => Some(Outcome::Silent),
        other => other.strip_prefix("failed ").map(|why| Outcome::Failed(why.to_owned())),
    };
    let all: Option<Vec<Outcome>> = line.split('\t').map(word).collect();
    let all = all.filter(|all| all.len() == writers * readers);
    let all = all.ok_or_else(|| Error::backend("the other side's outcomes make no sense"))?;
    Ok(all.chunks(readers).map(<[Outcome]>::to_vec).collect())
}

/// Two sides that cannot meet.
pub(super) fn differing(ours: &Hello, theirs: &Hello, other: &str) -> Option<Finding> {
    let name =
        |hello: &Hello| if hello.fabric == "-" { hello.provider.clone() } else { hello.fabric.clone() };
    if (&ours.provider, &ours.fabric) == (&theirs.provider, &theirs.fabric) {
        return None;
    }
    Some(Finding::fail(
        "rail-pairs",
        format!("{} is used here, and {} on {other}: they do not meet", name(ours), name(theirs)),
        "run `doctor` on both: one of them does not see its EFA devices, or the options provider and fabric differ",
    ))
}

/// Both directions in words.
pub(super) fn findings(
    ours: &Hello,
    theirs: &Hello,
    other: &str,
    mine: &Outcomes,
    told: &Outcomes,
) -> Vec<Finding> {
    let here = |device: &String| format!("{device} here");
    let there = |device: &String| format!("{device} on {other}");
    let our_names: Vec<String> = ours.devices.iter().map(here).collect();
    let their_names: Vec<String> = theirs.devices.iter().map(there).collect();
    let mut findings = direction(&our_names, &their_names, mine);
    findings.extend(direction(&their_names, &our_names, told));
    if findings.is_empty() {
        findings.push(Finding::ok(
            "rail-pairs",
            format!(
                "{other} over {}, {} by {} rails: every pair moved {} KiB each way, every byte compared",
                ours.provider,
                ours.devices.len(),
                theirs.devices.len(),
                BLOCK_BYTES >> 10
            ),
        ));
    }
    findings
}

/// One finding for each way to fail, naming the pairs; rails by which nothing goes are named once.
fn direction(writers: &[String], readers: &[String], outcomes: &Outcomes) -> Vec<Finding> {
    let mut failed: BTreeMap<&Outcome, Vec<(usize, usize)>> = BTreeMap::new();
    for (writer, row) in outcomes.iter().enumerate() {
        for (reader, outcome) in row.iter().enumerate().filter(|(_, outcome)| **outcome != Outcome::Whole) {
            failed.entry(outcome).or_default().push((writer, reader));
        }
    }
    let finding = |(outcome, pairs): (&Outcome, Vec<(usize, usize)>)| {
        let pairs = named(writers, readers, &pairs);
        match outcome {
            Outcome::Damaged => Finding::fail(
                "rail-pairs",
                format!("{pairs}: completed, and the bytes are not there"),
                "this must not be: report it with the versions of libfabric and of the efa driver",
            ),
            Outcome::Failed(why) => Finding::fail("rail-pairs", format!("{pairs}: {why}"), SILENT_DROP),
            _ => Finding::fail(
                "rail-pairs",
                format!("{pairs}: nothing arrives, and nothing is said"),
                SILENT_DROP,
            ),
        }
    };
    failed.into_iter().map(finding).collect()
}

/// `a to b`, with the rails that share a failure put together.
fn named(writers: &[String], readers: &[String], pairs: &[(usize, usize)]) -> String {
    const SHOWN: usize = 8;
    if pairs.len() == writers.len() * readers.len() {
        return format!("any of {} to any of {}", list(writers), list(readers));
    }
    let mut left: Vec<(usize, usize)> = pairs.to_vec();
    let mut words = Vec::new();
    for (at, writer) in writers.iter().enumerate() {
        if left.iter().filter(|pair| pair.0 == at).count() == readers.len() && readers.len() > 1 {
            words.push(format!("{writer} to any of {}", list(readers)));
            left.retain(|pair| pair.0 != at);
        }
    }
    for (at, reader) in readers.iter().enumerate() {
        if pairs.iter().filter(|pair| pair.1 == at).count() == writers.len() && writers.len() > 1 {
            words.push(format!("any of {} to {reader}", list(writers)));
            left.retain(|pair| pair.1 != at);
        }
    }
    words.extend(left.iter().map(|&(writer, reader)| format!("{} to {}", writers[writer], readers[reader])));
    let more = words.len().saturating_sub(SHOWN);
    words.truncate(SHOWN);
    if more > 0 {
        words.push(format!("and {more} more"));
    }
    words.join("; ")
}

fn list(names: &[String]) -> String {
    match names {
        [only] => only.clone(),
        [first, .., last] => format!("{first} … {last}"),
        [] => "none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(devices: &[&str]) -> Hello {
        Hello {
            provider: "efa".into(),
            fabric: "efa".into(),
            devices: devices.iter().map(|&device| device.to_owned()).collect(),
        }
    }

    fn seen(mine: &Outcomes, told: &Outcomes) -> Vec<String> {
        let (ours, theirs) = (hello(&["a", "b"]), hello(&["c", "d"]));
        findings(&ours, &theirs, "peer", mine, told).into_iter().map(|finding| finding.seen).collect()
    }

    #[test]
    fn a_completion_counts_with_its_bytes_only() {
        let failed = || Written::Failed("no route".into());
        let written = [vec![Written::Completed, Written::Completed], vec![Written::Silent, failed()]];
        let outcomes = judge(&written, "1011", 2);
        let failed = Outcome::Failed("no route".into());
        assert_eq!(outcomes, [vec![Outcome::Whole, Outcome::Damaged], vec![Outcome::Silent, failed]]);
        assert_eq!(decode(&encode(&outcomes), 2, 2).unwrap(), outcomes);
        assert_eq!(judge(&written, "", 2)[0][0], Outcome::Damaged, "of a pair that is not spoken of");
        for line in ["", "whole", "whole\twhole\twhole\tlost", "whole\twhole\twhole\twhole\twhole"] {
            assert!(decode(line, 2, 2).is_err(), "{line}");
        }
    }

    #[test]
    fn the_pair_that_drops_is_named() {
        let whole = || vec![vec![Outcome::Whole; 2]; 2];
        assert!(seen(&whole(), &whole())[0].contains("2 by 2 rails: every pair"));
        let mut one = whole();
        one[1][0] = Outcome::Silent;
        assert!(
            seen(&one, &whole())[0].starts_with("b here to c on peer: nothing"),
            "{:?}",
            seen(&one, &whole())
        );
        assert!(
            seen(&whole(), &one)[0].starts_with("d on peer to a here: nothing"),
            "{:?}",
            seen(&whole(), &one)
        );
        let rail = vec![vec![Outcome::Silent; 2], vec![Outcome::Whole; 2]];
        assert!(seen(&rail, &whole())[0].starts_with("a here to any of c on peer … d on peer"));
        let reader = vec![vec![Outcome::Whole, Outcome::Silent]; 2];
        assert!(seen(&reader, &whole())[0].starts_with("any of a here … b here to d on peer:"));
        let all = vec![vec![Outcome::Silent; 2]; 2];
        assert_eq!(seen(&all, &all).len(), 2);
    }

    #[test]
    fn sides_that_do_not_meet_are_told() {
        let (ours, mut theirs) = (hello(&["a"]), hello(&["c"]));
        assert_eq!(differing(&ours, &theirs, "peer"), None);
        theirs.fabric = "efa-direct".into();
        assert!(
            differing(&ours, &theirs, "peer")
                .unwrap()
                .seen
                .contains("efa is used here, and efa-direct on peer")
        );
    }
}
