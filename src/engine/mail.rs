//! What peers say about staging, until staging looks at it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::peer::Peer;
use crate::wire::{PublicMetadata, Staging as Message};

/// Messages taken in and not looked at.
const MAIL_MAX: usize = 65_536;

/// A peer's wish to copy between slots and ranges of GPU memory.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub ticket: u64,
    pub slot: u16,
    pub into_memory: bool,
    /// Address and bytes of each, at most [`COPY_RANGES_MAX`](crate::wire::staging::COPY_RANGES_MAX).
    pub ranges: Vec<(u64, u32)>,
}

/// A message of a peer.
pub(super) enum Note {
    Ask,
    Lend { slot_bytes: u32, slots: u16, region: PublicMetadata },
    Copy(Wish),
    Copied { ticket: u64, error: Option<String> },
}

/// Messages in the order in which they came.
#[derive(Default)]
pub(super) struct Mail {
    notes: Mutex<VecDeque<(Arc<Peer>, Note)>>,
    /// Whether there are some, or other work that staging has.
    busy: AtomicBool,
}

impl Mail {
    /// Takes in a message.
    pub fn take_in(&self, peer: Arc<Peer>, message: Message<'_>) -> Result<()> {
        let note = match message {
            Message::Ask => Note::Ask,
            Message::Lend { slot_bytes, slots, region } => {
                let region = if slots == 0 {
                    PublicMetadata::new(Vec::new(), 0)
                } else {
                    PublicMetadata::decode(region, peer.endpoint_count())?
                };
                Note::Lend { slot_bytes, slots, region }
            }
            Message::Copy { ticket, slot, into_memory, addr, len } => {
                Note::Copy(Wish { ticket, slot, into_memory, ranges: vec![(addr, len)] })
            }
            Message::CopyRanges { ticket, slot, into_memory, ranges } => {
                Note::Copy(Wish { ticket, slot, into_memory, ranges: ranges.iter().collect() })
            }
            Message::Copied { ticket, error } => {
                let text = String::from_utf8_lossy(error).into_owned();
                Note::Copied { ticket, error: Some(text).filter(|text| !text.is_empty()) }
            }
        };
        let mut notes = self.lock();
        if notes.len() >= MAIL_MAX {
            return Err(Error::backend(format!("more than {MAIL_MAX} staging messages wait")));
        }
        notes.push_back((peer, note));
        drop(notes);
        self.set_busy(true);
        Ok(())
    }

    /// Everything that has come.
    pub fn take(&self) -> VecDeque<(Arc<Peer>, Note)> {
        std::mem::take(&mut *self.lock())
    }

    /// Whether something has come.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Whether staging has something to do.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// Says whether staging has something to do.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Arc<Peer>, Note)>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
