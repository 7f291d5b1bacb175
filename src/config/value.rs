//! From an option's text to its type.

use std::time::Duration;

use super::Range;
use crate::types::PciAddress;

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
    /// Asleep, with back-off.
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

/// One pattern of a [`DeviceList`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether a match denies.
    pub deny: bool,
    /// Pattern with `*` and `?`, compared with the device's name and its PCI address.
    pub glob: String,
}

/// Which devices to use. Empty takes all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceList(pub Vec<DeviceRule>);

impl DeviceList {
    /// Whether a device may be used: no rule denies it, and one allows it or all rules are denials.
    pub fn allows(&self, name: &str, pci: Option<PciAddress>) -> bool {
        let pci = pci.map(|address| address.to_string());
        let hit = |rule: &&DeviceRule| {
            glob_match(&rule.glob, name) || pci.as_ref().is_some_and(|pci| glob_match(&rule.glob, pci))
        };
        let (denials, allowances): (Vec<_>, Vec<_>) = self.0.iter().partition(|rule| rule.deny);
        !denials.iter().any(hit) && (allowances.is_empty() || allowances.iter().any(hit))
    }
}

impl FromText for DeviceList {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        let mut rules = Vec::new();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (deny, glob) = item.strip_prefix('!').map_or((false, item), |rest| (true, rest.trim()));
            if glob.is_empty() {
                return Err("`!` without a device".into());
            }
            // A PCI address may be written without its domain; devices carry it in full.
            let glob = glob.parse::<PciAddress>().map_or_else(|_| glob.to_owned(), |pci| pci.to_string());
            rules.push(DeviceRule { deny, glob });
        }
        Ok(Self(rules))
    }
}

/// Devices that one GPU uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuRule {
    /// The GPU.
    pub gpu: PciAddress,
    /// Names or PCI addresses of devices, at least one.
    pub devices: Vec<String>,
}

/// Devices for each GPU that is named. A GPU that is not follows the topology.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuDevices(pub Vec<GpuRule>);

impl GpuDevices {
    /// The devices given for this GPU.
    pub fn devices_of(&self, gpu: PciAddress) -> Option<&[String]> {
        self.0.iter().find(|rule| rule.gpu == gpu).map(|rule| rule.devices.as_slice())
    }
}

impl FromText for GpuDevices {
    fn from_text(text: &str, _: Range) -> Result<Self, String> {
        let mut rules: Vec<GpuRule> = Vec::new();
        for item in text.split(';').map(str::trim).filter(|item| !item.is_empty()) {
            let (gpu, devices) = item.split_once('=').ok_or_else(|| format!("`{item}` has no `=`"))?;
            let gpu = gpu.trim().parse::<PciAddress>()?;
            let devices: Vec<String> = devices
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect();
            if devices.is_empty() {
                return Err(format!("GPU {gpu} has no device"));
            }
            if rules.iter().any(|rule| rule.gpu == gpu) {
                return Err(format!("GPU {gpu} stands twice"));
            }
            rules.push(GpuRule { gpu, devices });
        }
        Ok(Self(rules))
    }
}

/// Whether the whole of `text` matches `pattern`; `*` stands for any run of bytes and `?` for one.
fn glob_match(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on after the last star, if what follows it does not fit here.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, t));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}
