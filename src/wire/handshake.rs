//! The handshake: each side tells the other which index to put into its immediates.

use super::blob::Bytes;
use super::serdes::{Reader, Writer, malformed};
use super::{CONNECTION_INFO_BYTES_MAX, CONTROL_BYTES_MAX};
use crate::error::{Error, Result};

/// In place of the index: the number of another version of the stock wire.
const VERSION_TAG: &str = "ver";
const INDEX_TAG: &str = "idx";
const NAME_TAG: &str = "name";
const HAS_CONN_TAG: &str = "has_conn";
const CONN_TAG: &str = "conn";
const EXTENSION_TAG: &str = "nlf_hs";

/// A handshake message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// Index that the sender has given to the receiver in its own table: what the receiver puts into immediates.
    pub index: u16,
    /// The sender's agent name, not empty.
    pub name: Vec<u8>,
    /// The sender's connection info blob, where it believes that the receiver lacks it.
    pub conn: Option<Vec<u8>>,
    /// What a stock agent has not.
    pub extension: Option<HandshakeExtension>,
}

/// Our addition to the handshake. WIRE.md, "Extension of the handshake".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandshakeExtension {
    /// The sender's number for this connection, never 0 and never used before with this receiver. Everything that
    /// the sender counts for the receiver (transfer ids, message ids) starts anew with it.
    pub session: u64,
    /// The receiver's number as the sender knows it; 0 where it knows none.
    pub peer_session: u64,
    /// The sender waits for a handshake in return.
    pub answer_wanted: bool,
    /// Endpoints of the sender that have failed: number `i` is bit `i % 64` of word `i / 64`. An agent has no more than
    /// 128 whose names fit into a handshake.
    pub retired: [u64; 2],
}

impl HandshakeExtension {
    const VERSION: u16 = 1;
    const ANSWER_WANTED: u16 = 1 << 0;

    fn encode(self) -> Vec<u8> {
        let flags = if self.answer_wanted { Self::ANSWER_WANTED } else { 0 };
        let mut out = Vec::new();
        out.extend_from_slice(&Self::VERSION.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.session.to_le_bytes());
        out.extend_from_slice(&self.peer_session.to_le_bytes());
        if self.retired != [0; 2] {
            out.extend(self.retired.iter().flat_map(|word| word.to_le_bytes()));
        }
        out
    }

    /// `None` for a version that we do not know.
    fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let cut = || malformed("the extension of the handshake is cut short");
        let mut input = Bytes(bytes);
        if u16::from_le_bytes(input.take().ok_or_else(cut)?) != Self::VERSION {
            return Ok(None);
        }
        let flags = u16::from_le_bytes(input.take().ok_or_else(cut)?);
        let session = u64::from_le_bytes(input.take().ok_or_else(cut)?);
        let peer_session = u64::from_le_bytes(input.take().ok_or_else(cut)?);
        if session == 0 {
            return Err(malformed("the extension of the handshake has session 0"));
        }
        let retired = [(); 2].map(|()| input.take().map_or(0, u64::from_le_bytes));
        Ok(Some(Self { session, peer_session, answer_wanted: flags & Self::ANSWER_WANTED != 0, retired }))
    }
}

impl Handshake {
    /// The message; an error if it does not fit into a control message.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.field(INDEX_TAG, &self.index.to_le_bytes());
        writer.field(NAME_TAG, &self.name);
        writer.field(HAS_CONN_TAG, &[u8::from(self.conn.is_some())]);
        if let Some(conn) = &self.conn {
            writer.field(CONN_TAG, conn);
        }
        if let Some(extension) = self.extension {
            writer.field(EXTENSION_TAG, &extension.encode());
        }
        let message = writer.finish();
        if message.len() > CONTROL_BYTES_MAX {
            return Err(malformed(format!(
                "a handshake has {} bytes, more than {CONTROL_BYTES_MAX}; use fewer rails (`max_rails`) or a shorter agent name",
                message.len()
            )));
        }
        Ok(message)
    }

    /// Reads a handshake of any agent, stock or ours.
    pub fn decode(message: &[u8]) -> Result<Self> {
        if message.len() > CONNECTION_INFO_BYTES_MAX {
            return Err(malformed(format!("a handshake has {} bytes", message.len())));
        }
        let mut reader = Reader::new(message)?;
        if let Some(version) = reader.optional_field(VERSION_TAG)? {
            return Err(other_version(version, reader.optional_field(NAME_TAG)?.unwrap_or_default()));
        }
        let index = u16::from_le_bytes(reader.fixed(INDEX_TAG)?);
        let name = reader.field(NAME_TAG)?;
        if name.is_empty() {
            return Err(malformed("a handshake has an empty agent name"));
        }
        let [has_conn] = reader.fixed(HAS_CONN_TAG)?;
        let conn = if has_conn == 0 { None } else { Some(reader.field(CONN_TAG)?.to_vec()) };
        if conn.as_ref().is_some_and(Vec::is_empty) {
            return Err(malformed("a handshake has empty connection info"));
        }
        let extension = match reader.optional_field(EXTENSION_TAG)? {
            Some(bytes) => HandshakeExtension::decode(bytes)?,
            None => None,
        };
        Ok(Self { index, name: name.to_vec(), conn, extension })
    }
}

fn other_version(version: &[u8], name: &[u8]) -> Error {
    let version = version.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes));
    malformed(format!(
        "agent {} has a C++ plugin whose protocol has version {version}, and this plugin speaks version 1 (NIXL 1.4 and 1.5): \
         nothing can be sent to it; use the same plugin at both ends",
        name.escape_ascii()
    ))
}
