//! What a check has found, and how it is written.

use std::fmt::Write as _;

use crate::topology::Json;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing here to be checked, or it cannot be seen from here.
    Skip,
    /// As it should be.
    Ok,
    /// It works, but not as it could, or only now.
    Warn,
    /// Transfers will fail, or go another way than they should.
    Fail,
}

impl Verdict {
    /// The word that people and programs read.
    pub fn word(self) -> &'static str {
        match self {
            Self::Skip => "SKIP",
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One line of the doctor's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was checked: a name that does not change between versions.
    pub check: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, seen: seen.into(), remedy: String::new() }
    }

    /// Not checked, and why.
    pub fn skip(check: &'static str, seen: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Skip, seen: seen.into(), remedy: String::new() }
    }

    /// Works, with a flaw.
    pub fn warn(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, seen: seen.into(), remedy: remedy.into() }
    }

    /// Does not work.
    pub fn fail(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, seen: seen.into(), remedy: remedy.into() }
    }
}

/// The worst verdict of all.
pub fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

/// For people: a line each, the remedy below it, and a sum at the end.
pub fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut out = String::new();
    for finding in findings {
        let _ = writeln!(out, "{:4}  {:width$}  {}", finding.verdict.word(), finding.check, finding.seen);
        if !finding.remedy.is_empty() {
            let _ = writeln!(out, "{:4}  {:width$}  -> {}", "", "", finding.remedy);
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let [ok, warn, fail] = [Verdict::Ok, Verdict::Warn, Verdict::Fail].map(count);
    let _ = writeln!(out, "\n{ok} OK, {warn} WARN, {fail} FAIL");
    out
}

/// For programs.
pub fn json(findings: &[Finding]) -> String {
    let list = Json::list(findings, |finding| {
        Json::Object(vec![
            ("check", Json::text(finding.check)),
            ("verdict", Json::text(finding.verdict.word())),
            ("seen", Json::text(&finding.seen)),
            ("remedy", Json::text(&finding.remedy)),
        ])
    });
    let report = Json::Object(vec![
        ("version", Json::text(env!("CARGO_PKG_VERSION"))),
        ("verdict", Json::text(worst(findings).word())),
        ("findings", list),
    ]);
    format!("{report}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_counts_and_every_finding_is_written_in_both_forms() {
        let findings = [
            Finding::ok("a", "well"),
            Finding::fail("bb", "broken \"x\"", "mend it"),
            Finding::skip("c", "not here"),
        ];
        assert_eq!(worst(&findings), Verdict::Fail);
        assert_eq!(worst(&[]), Verdict::Ok);
        let text = text(&findings);
        assert!(text.contains("FAIL  bb  broken \"x\"\n          -> mend it\n"), "{text}");
        assert!(text.ends_with("1 OK, 0 WARN, 1 FAIL\n"), "{text}");
        let json = json(&findings);
        assert!(
            json.contains(r#""verdict":"FAIL","findings":[{"check":"a""#) && json.contains(r#"broken \"x\""#),
            "{json}"
        );
    }
}
