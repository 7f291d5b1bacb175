//! How a process of the same host maps a region of GPU memory: a field behind the stock ones, which others ignore. WIRE.md, "Agents
//! of one host".

use super::blob::Bytes;
use super::serdes::malformed;
use crate::error::Result;

/// Bytes of the driver's handle of an allocation (`CU_IPC_HANDLE_SIZE`).
pub const HANDLE_BYTES: usize = 64;

/// Most file descriptors that one range is lent by: 10 GiB of `PyTorch`'s segments of 20 MiB.
pub const FILES_MAX: usize = 512;

/// How memory is lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handle {
    /// The driver's handle of a whole allocation.
    Ipc([u8; HANDLE_BYTES]),
    /// Descriptors in the lender's process and the bytes that each stands for, in the order of the addresses.
    Files(Vec<(u32, u64)>),
}

/// What another process needs to map an allocation, or several that lie behind one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shareable {
    /// Its first address in the lender's process.
    pub base: u64,
    /// Its length in bytes.
    pub size: u64,
    /// The driver's number of it, which the lender's process never gives to another allocation, not even at the same address
    /// (`CU_POINTER_ATTRIBUTE_BUFFER_ID`).
    pub id: u64,
    /// How it is mapped.
    pub handle: Handle,
}

impl Shareable {
    /// Name of the field in the metadata of a registration.
    pub(super) const TAG: &str = "nlf_gpu";
    const IPC: u32 = 1;
    const FILES: u32 = 2;

    pub(super) fn encode(&self) -> Vec<u8> {
        let kind = match self.handle {
            Handle::Ipc(_) => Self::IPC,
            Handle::Files(_) => Self::FILES,
        };
        let mut out = Vec::with_capacity(96);
        out.extend_from_slice(&kind.to_le_bytes());
        for number in [self.base, self.size, self.id] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        match &self.handle {
            Handle::Ipc(handle) => out.extend_from_slice(handle),
            Handle::Files(files) => {
                out.extend_from_slice(&(files.len() as u32).to_le_bytes());
                for (file, bytes) in files {
                    out.extend_from_slice(&file.to_le_bytes());
                    out.extend_from_slice(&bytes.to_le_bytes());
                }
            }
        }
        out
    }

    /// `None` for a kind that we do not know. Bytes behind the known ones are ignored.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let cut = || malformed("what the metadata says of GPU memory is cut short");
        let mut input = Bytes(bytes);
        let kind = u32::from_le_bytes(input.take().ok_or_else(cut)?);
        if kind != Self::IPC && kind != Self::FILES {
            return Ok(None);
        }
        let mut number = || input.take().map(u64::from_le_bytes).ok_or_else(cut);
        let (base, size, id) = (number()?, number()?, number()?);
        let handle = if kind == Self::IPC {
            Handle::Ipc(input.take().ok_or_else(cut)?)
        } else {
            let count = u32::from_le_bytes(input.take().ok_or_else(cut)?) as usize;
            if count > FILES_MAX {
                return Err(malformed(format!(
                    "GPU memory lent by {count} descriptors ({FILES_MAX} are the most)"
                )));
            }
            let mut file = || {
                let number = input.take().map(u32::from_le_bytes)?;
                Some((number, u64::from_le_bytes(input.take()?)))
            };
            Handle::Files((0..count).map(|_| file().ok_or_else(cut)).collect::<Result<_>>()?)
        };
        Ok(Some(Self { base, size, id, handle }))
    }
}
