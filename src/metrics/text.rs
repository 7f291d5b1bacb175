//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write as _};

use super::histogram::BOUNDS_US;
use super::{Histogram, METRICS, Metric};

/// Longest value of a label, in bytes: agents choose their names, and each is in many lines.
const LABEL_BYTES_MAX: usize = 128;

/// What `GET /metrics` is answered with, as it is put together.
#[derive(Debug, Default)]
pub struct Samples {
    agent: String,
    /// Agents so far.
    agents: Vec<String>,
    /// Lines of each metric, in the order of the table: the format wants them together.
    lines: Vec<String>,
}

/// A sample's number.
#[derive(Debug, Clone, Copy)]
pub enum Number {
    /// A count.
    Count(u64),
    /// A time in seconds.
    Seconds(f64),
}

impl From<u64> for Number {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<bool> for Number {
    fn from(is_so: bool) -> Self {
        Self::Count(is_so.into())
    }
}

impl Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Seconds(seconds) => write!(f, "{seconds}"),
        }
    }
}

/// A label's value for a name that others chose: cut if it is long, and then told from its like by `id`.
pub fn label_of(name: &impl Display, id: impl Display) -> String {
    let mut text = name.to_string();
    if text.len() > LABEL_BYTES_MAX {
        let end = (0..=LABEL_BYTES_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        write!(text, "#{id}").expect("a String takes every write");
    }
    text
}

impl Samples {
    /// What follows is of this agent. Agents of one name are numbered: the same sample twice would void the whole answer.
    pub fn begin(&mut self, agent: String) {
        self.lines.resize(METRICS.len(), String::new());
        let others = self.agents.iter().filter(|other| **other == agent).count();
        self.agent = if others == 0 { agent.clone() } else { format!("{agent}#{}", others + 1) };
        self.agents.push(agent);
    }

    /// Adds a number, with the values of the metric's labels.
    pub fn add(&mut self, metric: Metric, labels: &[&dyn Display], number: impl Into<Number>) {
        self.line(metric, "", labels, None, &number.into());
    }

    /// Adds the lines of a histogram of times.
    pub fn add_times(&mut self, metric: Metric, labels: &[&dyn Display], times: &Histogram) {
        let times = times.times();
        let bounds = BOUNDS_US.iter().map(|&us| (us as f64 / 1e6).to_string());
        for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(times.up_to) {
            self.line(metric, "_bucket", labels, Some(&bound), &Number::Count(count));
        }
        self.line(metric, "_sum", labels, None, &Number::Seconds(times.sum.as_secs_f64()));
        self.line(metric, "_count", labels, None, &Number::Count(times.up_to[BOUNDS_US.len()]));
    }

    fn line(
        &mut self,
        metric: Metric,
        suffix: &str,
        labels: &[&dyn Display],
        bound: Option<&str>,
        number: &Number,
    ) {
        let spec = metric.spec();
        debug_assert_eq!(spec.labels.len(), labels.len(), "the labels of {}", spec.name);
        let mut line = format!("{}{suffix}{{agent=\"{}\"", spec.name, escaped(&self.agent));
        for (label, value) in spec.labels.iter().zip(labels) {
            write!(line, ",{label}=\"{}\"", escaped(&value.to_string())).expect("a String takes every write");
        }
        if let Some(bound) = bound {
            write!(line, ",le=\"{bound}\"").expect("a String takes every write");
        }
        writeln!(self.lines[metric as usize], "{line}}} {number}").expect("a String takes every write");
    }

    /// The whole text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (spec, lines) in METRICS.iter().zip(&self.lines).filter(|(_, lines)| !lines.is_empty()) {
            write!(text, "# HELP {0} {1}\n# TYPE {0} {2}\n{lines}", spec.name, spec.help, spec.kind.name())
                .expect("a String takes every write");
        }
        text
    }
}

/// A label's value as the format quotes it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
