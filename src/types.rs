//! Words that every layer uses: memory kinds, operations, descriptors, PCI addresses.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Kind of memory, with NIXL's values (`nixl_mem_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(i32)]
pub enum MemKind {
    /// Host memory.
    Dram = 0,
    /// Accelerator memory.
    Vram = 1,
    /// Block storage.
    Block = 2,
    /// Object storage.
    Object = 3,
    /// Files.
    File = 4,
}

impl TryFrom<i32> for MemKind {
    type Error = i32;

    fn try_from(value: i32) -> Result<Self, i32> {
        Ok(match value {
            0 => Self::Dram,
            1 => Self::Vram,
            2 => Self::Block,
            3 => Self::Object,
            4 => Self::File,
            other => return Err(other),
        })
    }
}

impl fmt::Display for MemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dram => "DRAM",
            Self::Vram => "VRAM",
            Self::Block => "BLK",
            Self::Object => "OBJ",
            Self::File => "FILE",
        })
    }
}

/// Direction of a transfer, with NIXL's values (`nixl_xfer_op_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Op {
    /// Remote memory to local memory.
    Read = 0,
    /// Local memory to remote memory.
    Write = 1,
}

impl TryFrom<i32> for Op {
    type Error = i32;

    fn try_from(value: i32) -> Result<Self, i32> {
        match value {
            0 => Ok(Self::Read),
            1 => Ok(Self::Write),
            other => Err(other),
        }
    }
}

/// Name of an agent. NIXL takes any bytes, so do we.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentName(Arc<[u8]>);

impl AgentName {
    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for AgentName {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl From<&str> for AgentName {
    fn from(text: &str) -> Self {
        text.as_bytes().into()
    }
}

impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// A range of memory as NIXL describes it (`nixlBasicDesc`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// First byte.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Device number; its meaning belongs to the memory kind.
    pub dev_id: u64,
}

/// Tells one connection with an agent from all others of an engine, earlier ones with the same agent too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerId(pub u64);

/// Index of a rail in its engine. It travels inside operations; it is never a position in some other list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RailId(pub u16);

impl RailId {
    /// As an index into a table that holds one entry for each rail.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for RailId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// PCI address, `domain:bus:device.function`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// PCI domain (segment).
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number on the bus.
    pub device: u8,
    /// Function of the device.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = String;

    /// Reads `dddd:bb:dd.f` or `bb:dd.f`, hexadecimal.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a PCI address (want dddd:bb:dd.f)");
        let mut parts: Vec<&str> = text.split(':').collect();
        if parts.len() == 2 {
            parts.insert(0, "0");
        }
        let [domain, bus, slot] = parts[..] else { return Err(bad()) };
        let (device, function) = slot.split_once('.').ok_or_else(bad)?;
        let hex = |s: &str| u32::from_str_radix(s, 16).map_err(|_| bad());
        let small = |s: &str| hex(s).and_then(|v| u8::try_from(v).map_err(|_| bad()));
        Ok(Self {
            domain: hex(domain)?,
            bus: small(bus)?,
            device: small(device)?,
            function: small(function)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::PciAddress;

    #[test]
    fn pci_addresses_read_and_print_alike() {
        for text in ["0000:4f:00.0", "10001:00:1d.7"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        assert_eq!("4f:00.0".parse::<PciAddress>().unwrap().to_string(), "0000:4f:00.0");
        for text in ["", "4f", "0000:4f:00", "0000:4f:zz.0", "0000:14f:00.0", "0:0:0:0.0"] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }
}
