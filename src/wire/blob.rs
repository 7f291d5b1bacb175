//! Connection info and the metadata of registrations: what NIXL carries between agents for us.

use std::fmt;

use super::gpu::Shareable;
use super::host::{BoardEntry, HostInfo};
use super::serdes::{Reader, Writer, malformed};
use super::staging::COPY_BYTES_MAX;
use crate::error::Result;

/// Most rails that an agent can have.
pub const RAILS_MAX: usize = 1024;
/// Largest connection info in bytes. 1024 rails with names of the greatest length stay below it.
pub const CONNECTION_INFO_BYTES_MAX: usize = 1 << 20;
/// Bytes of an endpoint name on the stock wire.
const STOCK_NAME_BYTES: usize = 56;
/// Longest endpoint name in bytes. libfabric's longest formats (network paths of verbs, psm3) are below 256.
const NAME_BYTES_MAX: usize = 256;

const RAIL_COUNT_TAG: &str = "num_rails";
const NAME_TAG: &str = "dest_data_ep_";
const KEY_TAG: &str = "key_";
const ADDR_TAG: &str = "addr";
const EXTENSION_TAG: &str = "nlf_ext";
/// `FI_KEY_NOTAVAIL`: the rail does not serve the buffer.
const NO_KEY: u64 = u64::MAX;

/// An endpoint's address as `fi_getname` gives it.
///
/// Names of up to 56 bytes are kept padded with zeros to 56, as the stock wire has them: the padding cannot be
/// told from the name, and every address format knows its own length.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EndpointName(Vec<u8>);

impl EndpointName {
    /// From `fi_getname`; 1 to 256 bytes.
    pub fn new(name: &[u8]) -> Result<Self> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(malformed(format!(
                "an endpoint name has {} bytes, not 1 to {NAME_BYTES_MAX}",
                name.len()
            )));
        }
        let mut bytes = name.to_vec();
        bytes.resize(name.len().max(STOCK_NAME_BYTES), 0);
        Ok(Self(bytes))
    }

    /// The name, at least 56 bytes: ready for `fi_av_insert`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What a stock peer reads. It has no room for longer names; it cannot reach such an endpoint.
    fn stock_bytes(&self) -> &[u8] {
        &self.0[..STOCK_NAME_BYTES]
    }
}

impl fmt::Debug for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EndpointName({})", self.0.escape_ascii())
    }
}

/// How to reach an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// One name for each rail, at least one.
    pub endpoints: Vec<EndpointName>,
    /// What a stock agent has not; `None` also for an agent whose extension we do not know.
    pub extension: Option<Extension>,
    /// How agents of its host reach it; `None` for one that has to be reached by its NICs.
    pub host: Option<HostInfo>,
}

/// What an agent of this project says about itself. WIRE.md, "Extension of connection info".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// Set of [`capability`] bits. Unknown bits mean nothing to us.
    pub capabilities: u32,
    /// Number of this run of the agent, greater than that of any earlier run.
    pub incarnation: u64,
    /// Largest control message that the agent can receive, in bytes.
    pub control_bytes_max: u32,
    /// Largest notification that the agent takes, in bytes.
    pub notif_bytes_max: u64,
}

/// Bits of [`Extension::capabilities`].
pub mod capability {
    /// The agent reads immediates and control messages of version 2.
    pub const WIRE_V2: u32 = 1 << 0;
    /// The agent's VRAM is reached through its host memory, by staging messages.
    pub const STAGED_VRAM: u32 = 1 << 1;
    /// The agent knows the staging message for copies of many ranges, and that a copy may take several slots.
    pub const STAGED_RANGES: u32 = 1 << 2;
}

impl Extension {
    /// The one version we speak.
    const VERSION: u16 = 1;
    const FIXED_BYTES: usize = 28;

    /// What an agent of this version says.
    pub fn ours(incarnation: u64, control_bytes_max: u32, notif_bytes_max: u64) -> Self {
        Self { capabilities: capability::WIRE_V2, incarnation, control_bytes_max, notif_bytes_max }
    }

    /// Whether the agent's VRAM is reached through its host memory.
    pub fn stages_vram(&self) -> bool {
        self.speaks_v2() && self.capabilities & capability::STAGED_VRAM != 0
    }

    /// Whether copies for staging may have many ranges and take several slots.
    pub fn stages_ranges(&self) -> bool {
        self.speaks_v2()
            && self.capabilities & capability::STAGED_RANGES != 0
            && self.control_bytes_max >= COPY_BYTES_MAX
    }

    /// Whether the agent reads the version 2 wire.
    pub fn speaks_v2(&self) -> bool {
        self.capabilities & capability::WIRE_V2 != 0
    }

    /// Fixed part, then each name longer than the stock wire allows: u16 rail, u16 length, bytes.
    fn encode(&self, endpoints: &[EndpointName]) -> Vec<u8> {
        let long = |(_, name): &(usize, &EndpointName)| name.0.len() > STOCK_NAME_BYTES;
        let long_count = endpoints.iter().enumerate().filter(long).count();
        let mut out = Vec::with_capacity(Self::FIXED_BYTES);
        out.extend_from_slice(&Self::VERSION.to_le_bytes());
        out.extend_from_slice(&(long_count as u16).to_le_bytes());
        out.extend_from_slice(&self.capabilities.to_le_bytes());
        out.extend_from_slice(&self.incarnation.to_le_bytes());
        out.extend_from_slice(&self.control_bytes_max.to_le_bytes());
        out.extend_from_slice(&self.notif_bytes_max.to_le_bytes());
        for (rail, name) in endpoints.iter().enumerate().filter(long) {
            out.extend_from_slice(&(rail as u16).to_le_bytes());
            out.extend_from_slice(&(name.0.len() as u16).to_le_bytes());
            out.extend_from_slice(&name.0);
        }
        out
    }

    /// `None` for a version that we do not know. Long names go into `endpoints`; bytes behind them are ignored.
    fn decode(bytes: &[u8], endpoints: &mut [EndpointName]) -> Result<Option<Self>> {
        let cut = || malformed("the extension of the connection info is cut short");
        let mut input = Bytes(bytes);
        if u16::from_le_bytes(input.take().ok_or_else(cut)?) != Self::VERSION {
            return Ok(None);
        }
        let long_count = u16::from_le_bytes(input.take().ok_or_else(cut)?);
        let extension = Self {
            capabilities: u32::from_le_bytes(input.take().ok_or_else(cut)?),
            incarnation: u64::from_le_bytes(input.take().ok_or_else(cut)?),
            control_bytes_max: u32::from_le_bytes(input.take().ok_or_else(cut)?),
            notif_bytes_max: u64::from_le_bytes(input.take().ok_or_else(cut)?),
        };
        for _ in 0..long_count {
            let rail = u16::from_le_bytes(input.take().ok_or_else(cut)?) as usize;
            let len = u16::from_le_bytes(input.take().ok_or_else(cut)?) as usize;
            let name = EndpointName::new(input.slice(len).ok_or_else(cut)?)?;
            let place = endpoints.get_mut(rail).ok_or_else(|| {
                malformed(format!("a long endpoint name is for rail {rail}, which is not announced"))
            })?;
            *place = name;
        }
        Ok(Some(extension))
    }
}

/// A cursor over bytes.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next `N` bytes, if there are so many.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
}

impl ConnectionInfo {
    /// Whether this is of a later run of the agent. Never where one of both does not tell.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let run = |info: &Self| info.extension.map(|extension| extension.incarnation);
        matches!((run(self), run(other)), (Some(this), Some(that)) if this > that)
    }

    /// The blob.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.field(RAIL_COUNT_TAG, self.endpoints.len().to_string().as_bytes());
        for (rail, name) in self.endpoints.iter().enumerate() {
            writer.field(&format!("{NAME_TAG}{rail}"), name.stock_bytes());
        }
        if let Some(extension) = &self.extension {
            writer.field(EXTENSION_TAG, &extension.encode(&self.endpoints));
        }
        if let Some(host) = &self.host {
            writer.field(HostInfo::TAG, &host.encode());
        }
        writer.finish()
    }

    /// Reads a blob of any agent, stock or ours.
    pub fn decode(blob: &[u8]) -> Result<Self> {
        if blob.len() > CONNECTION_INFO_BYTES_MAX {
            return Err(malformed(format!(
                "connection info has {} bytes, more than {CONNECTION_INFO_BYTES_MAX}",
                blob.len()
            )));
        }
        let mut reader = Reader::new(blob)?;
        let count = rail_count(reader.field(RAIL_COUNT_TAG)?)?;
        let mut endpoints = (0..count)
            .map(|rail| stock_name(&mut reader, &format!("{NAME_TAG}{rail}")))
            .collect::<Result<Vec<_>>>()?;
        let extension = match reader.optional_field(EXTENSION_TAG)? {
            Some(bytes) => Extension::decode(bytes, &mut endpoints)?,
            None => None,
        };
        let host = match reader.optional_field(HostInfo::TAG)? {
            Some(bytes) => HostInfo::decode(bytes)?,
            None => None,
        };
        Ok(Self { endpoints, extension, host })
    }
}

fn rail_count(text: &[u8]) -> Result<usize> {
    let digits = text.len() <= 4 && text.iter().all(u8::is_ascii_digit);
    let count = std::str::from_utf8(text).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    count.filter(|count| (1..=RAILS_MAX).contains(count)).ok_or_else(|| {
        malformed(format!("`{}` rails are announced, not 1 to {RAILS_MAX}", text.escape_ascii()))
    })
}

fn stock_name(reader: &mut Reader<'_>, tag: &str) -> Result<EndpointName> {
    let name = reader.field(tag)?;
    if name.len() > STOCK_NAME_BYTES {
        return Err(malformed(format!(
            "field `{tag}` has {} bytes, more than {STOCK_NAME_BYTES}",
            name.len()
        )));
    }
    EndpointName::new(name)
}

/// What a peer needs to reach a registered buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicMetadata {
    /// Remote key for each rail of the owner; `None` where that rail does not serve the buffer.
    pub keys: Vec<Option<u64>>,
    /// First byte of the buffer, as the owner sees it.
    pub addr: u64,
    /// Its place on the owner's board, where agents of the owner's host may reach it.
    pub board: Option<BoardEntry>,
    /// How they map it, where it is GPU memory.
    pub gpu: Option<Shareable>,
}

impl PublicMetadata {
    /// Of a buffer that nothing but rails reaches.
    pub fn new(keys: Vec<Option<u64>>, addr: u64) -> Self {
        Self { keys, addr, board: None, gpu: None }
    }

    /// The blob.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        for (rail, key) in self.keys.iter().enumerate() {
            writer.field(&format!("{KEY_TAG}{rail}"), &key.unwrap_or(NO_KEY).to_le_bytes());
        }
        writer.field(ADDR_TAG, &self.addr.to_le_bytes());
        if let Some(board) = &self.board {
            writer.field(BoardEntry::TAG, &board.encode());
        }
        if let Some(gpu) = &self.gpu {
            writer.field(Shareable::TAG, &gpu.encode());
        }
        writer.finish()
    }

    /// Reads a blob of a peer that announced `rail_count` rails. Fields behind the known ones are ignored.
    pub fn decode(blob: &[u8], rail_count: usize) -> Result<Self> {
        debug_assert!(rail_count <= RAILS_MAX, "more rails than connection info can announce");
        let mut reader = Reader::new(blob)?;
        let mut key = |rail| -> Result<Option<u64>> {
            let key = u64::from_le_bytes(reader.fixed(&format!("{KEY_TAG}{rail}"))?);
            Ok((key != NO_KEY).then_some(key))
        };
        let keys = (0..rail_count).map(&mut key).collect::<Result<_>>()?;
        let addr = u64::from_le_bytes(reader.fixed(ADDR_TAG)?);
        let board = reader.optional_field(BoardEntry::TAG)?.map(BoardEntry::decode).transpose()?;
        let gpu = match reader.optional_field(Shareable::TAG)? {
            Some(bytes) => Shareable::decode(bytes)?,
            None => None,
        };
        Ok(Self { keys, addr, board, gpu })
    }
}
