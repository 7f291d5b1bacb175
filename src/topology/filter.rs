//! The user's hand: which devices may be used, and which belong to which accelerator.

use crate::error::{Error, Result};
use crate::types::PciAddress;

use super::select::RailDevice;

/// Most patterns in one option: more is a mistake, not a wish.
const PATTERNS_MAX: usize = 256;

/// Which devices may be used: patterns separated by commas, `!` in front of one that forbids.
///
/// A pattern is a glob (`*` any text, `?` one character) over the libfabric domain name (`rdmap79s0-rdm`), the device
/// name (`rdmap79s0`) or the PCI address (`0000:4f:00.0`, `4f:00.0`). With at least one pattern that allows, a
/// device must match one of them; then every device that a forbidding pattern matches is taken away.
/// A pattern that matches nothing is an error: it is a misspelling, or the device is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceFilter {
    allow: Vec<String>,
    deny: Vec<String>,
}

impl DeviceFilter {
    /// Reads `rdmap*,!rdmap79s0`. Empty text allows everything.
    pub fn parse(text: &str) -> Result<Self> {
        let mut filter = Self::default();
        for item in text.split([',', ' ']).map(str::trim).filter(|item| !item.is_empty()) {
            let (list, pattern) = match item.strip_prefix('!') {
                Some(pattern) => (&mut filter.deny, pattern),
                None => (&mut filter.allow, item),
            };
            if pattern.is_empty() {
                return Err(Error::invalid(format!("devices `{text}`: `!` needs a name after it")));
            }
            list.push(pattern.to_owned());
        }
        if filter.allow.len() + filter.deny.len() > PATTERNS_MAX {
            return Err(Error::invalid(format!("devices: more than {PATTERNS_MAX} patterns")));
        }
        Ok(filter)
    }

    /// Whether the user asks for this very device, by its name and not by a pattern that others match, too.
    pub fn names(&self, device: &RailDevice) -> bool {
        let mut names = self.allow.iter().filter(|pattern| !pattern.contains(['*', '?']));
        names.any(|name| matches_device(name, device))
    }

    /// Indices of the devices that remain, in their order; an error if none does, or if a pattern matches none.
    pub fn apply(&self, devices: &[RailDevice]) -> Result<Vec<usize>> {
        for pattern in self.allow.iter().chain(&self.deny) {
            if !devices.iter().any(|device| matches_device(pattern, device)) {
                return Err(unknown("device", pattern, devices.iter().map(describe)));
            }
        }
        let any =
            |patterns: &[String], device| patterns.iter().any(|pattern| matches_device(pattern, device));
        let kept: Vec<usize> = devices
            .iter()
            .enumerate()
            .filter(|(_, device)| self.allow.is_empty() || any(&self.allow, device))
            .filter(|(_, device)| !any(&self.deny, device))
            .map(|(at, _)| at)
            .collect();
        if kept.is_empty() && !devices.is_empty() {
            let known: Vec<String> = devices.iter().map(describe).collect();
            return Err(Error::invalid(format!("devices: no device remains of {}", known.join(", "))));
        }
        Ok(kept)
    }
}

/// Devices that accelerators shall use whatever the machine says: `GPU=DEVICES`, entries separated by `;`.
///
/// `GPU` is a PCI address or a glob over it, `DEVICES` is what [`DeviceFilter`] reads. The first entry that
/// matches an accelerator decides: `0000:53:00.0=rdmap79s0,rdmap80s0;*=rdmap9*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuDevices {
    entries: Vec<(String, DeviceFilter)>,
}

impl GpuDevices {
    /// Reads the option. Empty text overrules nothing.
    pub fn parse(text: &str) -> Result<Self> {
        let mut entries = Vec::new();
        for item in text.split(';').map(str::trim).filter(|item| !item.is_empty()) {
            let form = || Error::invalid(format!("gpu_devices `{item}`: want GPU=DEVICE,DEVICE"));
            let (gpu, devices) = item.split_once('=').ok_or_else(form)?;
            let (gpu, devices) = (gpu.trim(), devices.trim());
            if gpu.is_empty() || devices.is_empty() {
                return Err(form());
            }
            let filter = DeviceFilter::parse(devices).map_err(|error| error.context("gpu_devices"))?;
            entries.push((gpu.to_owned(), filter));
        }
        if entries.len() > PATTERNS_MAX {
            return Err(Error::invalid(format!("gpu_devices: more than {PATTERNS_MAX} entries")));
        }
        Ok(Self { entries })
    }

    /// The accelerators that are overruled, with the indices of their devices.
    ///
    /// An address that the machine does not list is an error, unless it lists no accelerator at all: then what
    /// the user says is all that is known.
    pub(super) fn resolve(
        &self,
        accelerators: &[PciAddress],
        devices: &[RailDevice],
    ) -> Result<Vec<(PciAddress, Vec<usize>)>> {
        let mut resolved: Vec<(PciAddress, Vec<usize>)> = Vec::new();
        for (gpu, filter) in &self.entries {
            let mut hits: Vec<PciAddress> =
                accelerators.iter().copied().filter(|&address| matches_address(gpu, address)).collect();
            if hits.is_empty() {
                match gpu.parse() {
                    Ok(address) if accelerators.is_empty() => hits.push(address),
                    _ => return Err(unknown("gpu_devices: accelerator", gpu, accelerators)),
                }
            }
            let chosen =
                filter.apply(devices).map_err(|error| error.context(format!("gpu_devices {gpu}")))?;
            for hit in hits {
                if resolved.iter().all(|(known, _)| *known != hit) {
                    resolved.push((hit, chosen.clone()));
                }
            }
        }
        Ok(resolved)
    }
}

fn unknown<T: ToString>(what: &str, pattern: &str, known: impl IntoIterator<Item = T>) -> Error {
    let known: Vec<String> = known.into_iter().map(|name| name.to_string()).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Error::invalid(format!("{what} `{pattern}` is not here; known: {known}"))
}

fn describe(device: &RailDevice) -> String {
    match device.pci {
        Some(pci) => format!("{} ({pci})", device.short_name()),
        None => device.short_name().to_owned(),
    }
}

fn matches_device(pattern: &str, device: &RailDevice) -> bool {
    glob(pattern, &device.name)
        || glob(pattern, device.short_name())
        || device.device.as_deref().is_some_and(|name| glob(pattern, name))
        || device.pci.is_some_and(|pci| matches_address(pattern, pci))
}

/// Whether a glob means a PCI address, with its domain or, for domain 0, without.
fn matches_address(pattern: &str, address: PciAddress) -> bool {
    let pattern = pattern.to_ascii_lowercase();
    let full = address.to_string();
    glob(&pattern, &full) || full.strip_prefix("0000:").is_some_and(|short| glob(&pattern, short))
}

/// Whether `text` is of the form `pattern`: `*` stands for any text, `?` for one character.
///
/// Looks back to the last `*` only, so that time is at most the product of the lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((star_p, star_t)) = star else { return false };
                star = Some((star_p, star_t + 1));
                p = star_p + 1;
                t = star_t + 1;
            }
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, pci: &str) -> RailDevice {
        RailDevice { name: name.to_owned(), device: None, pci: pci.parse().ok(), speed_bps: 0 }
    }

    fn three() -> Vec<RailDevice> {
        vec![
            device("rdmap79s0-rdm", "0000:4f:00.0"),
            device("rdmap80s0-rdm", "0000:50:00.0"),
            device("eth0", ""),
        ]
    }

    fn kept(text: &str) -> Vec<usize> {
        DeviceFilter::parse(text).unwrap().apply(&three()).unwrap()
    }

    #[test]
    fn globs() {
        for (pattern, text) in
            [("", ""), ("*", ""), ("*", "abc"), ("a*c", "abbc"), ("a?c", "abc"), ("*b*c", "abcbc")]
        {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("", "a"), ("a", ""), ("a?", "a"), ("*b", "abc"), ("a*d", "abc")] {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn devices_go_by_domain_name_device_name_and_address() {
        assert_eq!(kept(""), [0, 1, 2]);
        assert_eq!(kept("rdmap*"), [0, 1]);
        assert_eq!(kept("rdmap79s0"), [0]);
        assert_eq!(kept("rdmap79s0-rdm, 50:00.0"), [0, 1]);
        assert_eq!(kept("0000:4F:*"), [0]);
        assert_eq!(kept("!rdmap79s0"), [1, 2]);
        assert_eq!(kept("rdmap*,!0000:50:00.0"), [0]);
    }

    #[test]
    fn what_matches_nothing_is_named_with_what_is_known() {
        let error = DeviceFilter::parse("rdmap81s0").unwrap().apply(&three()).unwrap_err().to_string();
        assert_eq!(
            error,
            "device `rdmap81s0` is not here; known: rdmap79s0 (0000:4f:00.0), rdmap80s0 (0000:50:00.0), eth0"
        );
        assert!(DeviceFilter::parse("!*").unwrap().apply(&three()).is_err());
        assert!(DeviceFilter::parse("a,!").is_err());
    }

    #[test]
    fn gpu_devices_overrule_by_address() {
        let gpus: Vec<PciAddress> =
            ["0000:53:00.0", "0008:01:00.0"].map(|text| text.parse().unwrap()).to_vec();
        let read = |text: &str| GpuDevices::parse(text).and_then(|map| map.resolve(&gpus, &three()));
        assert_eq!(read("").unwrap(), []);
        assert_eq!(read("53:00.0=rdmap80s0; *=eth0").unwrap(), [(gpus[0], vec![1]), (gpus[1], vec![2])]);
        assert!(read("54:00.0=eth0").unwrap_err().to_string().contains("known: 0000:53:00.0, 0008:01:00.0"));
        assert!(read("53:00.0=rdmap9*").unwrap_err().to_string().contains("known: rdmap79s0"));
        assert!(read("53:00.0").is_err());
        let unseen = GpuDevices::parse("54:00.0=eth0").unwrap().resolve(&[], &three()).unwrap();
        assert_eq!(unseen, [("54:00.0".parse().unwrap(), vec![2])]);
    }
}
