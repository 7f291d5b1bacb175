//! Options of the command line: `--name value` or `--name=value`.

use std::ffi::OsString;
use std::time::Duration;

use nixl_libfabric::error::{Error, Result};

/// Longest time that an option takes.
const SECONDS_MAX: u64 = 3600;

/// An option as it was given.
pub struct Given<'a> {
    /// Its name, with the dashes.
    pub name: String,
    /// What follows `=`, until somebody takes it.
    attached: Option<OsString>,
    rest: &'a mut dyn Iterator<Item = OsString>,
}

impl<'a> Given<'a> {
    /// Reads a word; `rest` are the words after it.
    pub fn new(word: OsString, rest: &'a mut dyn Iterator<Item = OsString>) -> Result<Self> {
        let word = word.into_string().map_err(|word| usage(format!("no option {}", word.display())))?;
        Ok(match word.split_once('=') {
            Some((name, value)) => Self { name: name.to_owned(), attached: Some(value.into()), rest },
            None => Self { name: word, attached: None, rest },
        })
    }

    /// Its value, as it is.
    pub fn value(&mut self) -> Result<OsString> {
        let value = self.attached.take().or_else(|| self.rest.next());
        value.ok_or_else(|| usage(format!("{} needs a value", self.name)))
    }

    /// Its value as text.
    pub fn text(&mut self) -> Result<String> {
        let value = self.value()?;
        value.into_string().map_err(|value| usage(format!("{}: {} is not text", self.name, value.display())))
    }

    /// Its value as a whole number from 1.
    pub fn number(&mut self) -> Result<u64> {
        let text = self.text()?;
        let number = text.parse().ok().filter(|&number| number > 0);
        number.ok_or_else(|| usage(format!("{} `{text}`: want a whole number from 1", self.name)))
    }

    /// Its value as a time in whole seconds, `least` at the least.
    pub fn seconds(&mut self, least: u64) -> Result<Duration> {
        let text = self.text()?;
        let seconds = text.parse().ok().filter(|seconds| (least..=SECONDS_MAX).contains(seconds));
        let wanted = || usage(format!("{} `{text}`: want seconds, {least} to {SECONDS_MAX}", self.name));
        seconds.map(Duration::from_secs).ok_or_else(wanted)
    }

    /// An error if there is a value that nobody has taken.
    pub fn end(self) -> Result<()> {
        match self.attached {
            Some(_) => Err(usage(format!("{} takes no value", self.name))),
            None => Ok(()),
        }
    }
}

/// The error for words that make no sense.
pub fn usage(what: impl Into<String>) -> Error {
    Error::invalid(what.into() + "; see nixl-libfabric --help")
}
