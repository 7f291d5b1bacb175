//! How an agent of the same host reaches this one without a network: fields behind the stock ones, which others ignore. WIRE.md,
//! "Agents of one host".

use super::blob::Bytes;
use super::serdes::malformed;
use crate::error::Result;

/// Which process of which host an agent is, and where its board is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostInfo {
    /// The run of the host's kernel.
    pub boot_id: [u8; 16],
    /// Inode of the namespace in which `pid` counts.
    pub pid_namespace: u64,
    /// The process.
    pub pid: u32,
    /// Descriptor of the board's file in that process.
    pub board_fd: u32,
    /// When the process began, in clock ticks since the boot: tells it from a later one with its number.
    pub start_time: u64,
    /// Where the board is mapped in that process.
    pub board_addr: u64,
    /// Random bytes that are found there: who reads them has reached this agent and no other.
    pub nonce: [u8; 16],
}

/// Where a region stands on the board of its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoardEntry {
    /// Its place.
    pub number: u32,
    /// What the place holds for as long as the region is registered: never 0, and never the same for another region.
    pub generation: u64,
}

impl HostInfo {
    /// Name of the field in connection info.
    pub(super) const TAG: &str = "nlf_host";
    const VERSION: u16 = 1;

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(68);
        out.extend_from_slice(&Self::VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.board_fd.to_le_bytes());
        out.extend_from_slice(&self.boot_id);
        out.extend_from_slice(&self.pid_namespace.to_le_bytes());
        out.extend_from_slice(&self.pid.to_le_bytes());
        out.extend_from_slice(&self.start_time.to_le_bytes());
        out.extend_from_slice(&self.board_addr.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out
    }

    /// `None` for a version that we do not know. Bytes behind the known ones are ignored.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let cut = || malformed("what the connection info says of its host is cut short");
        let mut input = Bytes(bytes);
        if u16::from_le_bytes(input.take().ok_or_else(cut)?) != Self::VERSION {
            return Ok(None);
        }
        input.slice(2).ok_or_else(cut)?;
        Ok(Some(Self {
            board_fd: u32::from_le_bytes(input.take().ok_or_else(cut)?),
            boot_id: input.take().ok_or_else(cut)?,
            pid_namespace: u64::from_le_bytes(input.take().ok_or_else(cut)?),
            pid: u32::from_le_bytes(input.take().ok_or_else(cut)?),
            start_time: u64::from_le_bytes(input.take().ok_or_else(cut)?),
            board_addr: u64::from_le_bytes(input.take().ok_or_else(cut)?),
            nonce: input.take().ok_or_else(cut)?,
        }))
    }
}

impl BoardEntry {
    /// Name of the field in the metadata of a registration.
    pub(super) const TAG: &str = "nlf_board";

    pub(super) fn encode(&self) -> Vec<u8> {
        [&self.number.to_le_bytes()[..], &self.generation.to_le_bytes()].concat()
    }

    /// Bytes behind the known ones are ignored.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let cut = || malformed("the region's place on the board is cut short");
        let mut input = Bytes(bytes);
        let number = u32::from_le_bytes(input.take().ok_or_else(cut)?);
        let generation = u64::from_le_bytes(input.take().ok_or_else(cut)?);
        if generation == 0 {
            return Err(malformed("the region's generation on the board is 0, which stands for none"));
        }
        Ok(Self { number, generation })
    }
}
