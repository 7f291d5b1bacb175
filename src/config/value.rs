//! From an option's text to its type.

use std::time::Duration;

use super::Range;
use crate::metrics::Address;
use crate::topology::{DeviceFilter, GpuDevices};

/// Reads an option's text. The error says what is wrong beyond the range, or nothing.
pub(super) trait FromText: Sized {
    fn from_text(text: &str, range: Range) -> Result<Self, String>;
}

/// A whole number in the range.
fn number(text: &str, range: Range) -> Result<u64, String> {
    let Range::Number(low, high, unit) = range else {
        return Err("the table's range is not one of numbers".into());
    };
    let text = text.trim();
    let shift = match text.as_bytes().last() {
        Some(b'K' | b'k') if unit == "bytes" => 10,
        Some(b'M' | b'm') if unit == "bytes" => 20,
        Some(b'G' | b'g') if unit == "bytes" => 30,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    // `u64::from_str` would take a plus sign; an option does not.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a whole number".into());
    }
    let value = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    value.filter(|n| (low..=high).contains(n)).ok_or_else(|| "out of range".into())
}

/// The nearest number in the range to one outside it; `None` for what is no whole number.
pub(super) fn nearest(text: &str, range: Range) -> Option<u64> {
    let Range::Number(low, high, _) = range else { return None };
    let text = text.trim();
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX).clamp(low, high))
}

macro_rules! numbers {
    ($($type:ty),*) => { $(
        impl FromText for $type {
            fn from_text(text: &str, range: Range) -> Result<Self, String> {
                Self::try_from(number(text, range)?).map_err(|_| "out of range".into())
            }
        }
    )* };
}

numbers!(u16, u64, usize);

impl FromText for Duration {
    fn from_text(text: &str, range: Range) -> Result<Self, String> {
        let count = number(text, range)?;
        match range {
            Range::Number(_, _, "us") => Ok(Self::from_micros(count)),
            Range::Number(_, _, "ms") => Ok(Self::from_millis(count)),
            _ => Err("the table gives no unit of time".into()),
        }
    }
}

/// Nothing, or a value.
impl FromText for Option<Duration> {
    fn from_text(text: &str, range: Range) -> Result<Self, String> {
        if text.trim().is_empty() { Ok(None) } else { Duration::from_text(text, range).map(Some) }
    }
}

impl FromText for bool {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err(String::new()),
        }
    }
}

impl FromText for String {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        if text.contains('\0') { Err("it contains a NUL".into()) } else { Ok(text.trim().to_owned()) }
    }
}

/// Fabric of the efa provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fabric {
    /// What the provider offers first.
    #[default]
    Any,
    /// `efa`: the provider's own protocol, with its ordering and large messages.
    Efa,
    /// `efa-direct`: straight onto the device.
    EfaDirect,
}

impl FromText for Fabric {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        match text.trim() {
            "" => Ok(Self::Any),
            "efa" => Ok(Self::Efa),
            "efa-direct" => Ok(Self::EfaDirect),
            _ => Err(String::new()),
        }
    }
}

/// How an idle progress thread waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wait {
    /// On the wait object where there is one, else asleep.
    #[default]
    Auto,
    /// On the completion queue's wait object.
    Fd,
    /// In naps.
    Sleep,
}

impl FromText for Wait {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "fd" => Ok(Self::Fd),
            "sleep" => Ok(Self::Sleep),
            _ => Err(String::new()),
        }
    }
}

/// Whether agents of one host reach each other's memory without a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SameHost {
    /// Where the kernel lets both.
    #[default]
    Auto,
    /// Never.
    Off,
    /// As `Auto`, and Yama is told to let every process of the user reach this one.
    PtracerAny,
}

impl FromText for SameHost {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "ptracer_any" => Ok(Self::PtracerAny),
            _ => Err(String::new()),
        }
    }
}

/// Nowhere, or an address.
impl FromText for Option<Address> {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
    }
}

impl FromText for DeviceFilter {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        Self::parse(text).map_err(|e| e.to_string())
    }
}

impl FromText for GpuDevices {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        Self::parse(text).map_err(|e| e.to_string())
    }
}
