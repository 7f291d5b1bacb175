//! Staging: GPU memory moves through page-locked host memory, where the provider cannot reach it.
//!
//! An agent whose VRAM is staged says so in its connection info. A peer that wants to read or write it asks for slots of
//! host memory, which are then its own; it moves data between those and its own memory by ordinary RMA, and asks by message
//! for copies between them and the VRAM. So the one that transfers decides the order of everything, and the other only
//! copies and answers. A peer that knows nothing of staging is served too where only the local side is VRAM: data then goes
//! through slots here and right into the peer's host memory.
//!
//! Whoever drives the rails drives this.

mod client;
mod server;
mod slots;
mod transfer;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use self::client::Client;
use self::server::Server;
pub use self::transfer::{StagedPiece, StagedTransfer};
use super::mail::Note;
use super::shared::Shared;
use crate::cuda::{Context, InFlight, Span};
use crate::error::{Error, Result};
use crate::memory::Registration;
use crate::transfer::Streams;
use crate::types::Desc;

/// What an engine knows of staging.
#[derive(Default)]
pub struct Staging {
    /// A context of the application in which host memory is page-locked.
    context: OnceLock<Context>,
    /// VRAM of this agent that is staged.
    regions: Mutex<Vec<Weak<Registration>>>,
    posted: Mutex<Vec<Arc<StagedTransfer>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    streams: Directions,
    server: Server,
    client: Client,
}

/// Streams into GPU memory and out of it, so that the two overlap.
#[derive(Default)]
struct Directions {
    into_memory: Streams,
    out_of_memory: Streams,
}

impl Directions {
    /// Starts a copy between a slot and GPU memory.
    fn copy(&self, context: &Context, into_memory: bool, slot: Span, memory: Span) -> Result<InFlight> {
        let (streams, to, from) =
            if into_memory { (&self.into_memory, memory, slot) } else { (&self.out_of_memory, slot, memory) };
        let copy = streams.get(context).and_then(|stream| stream.copy(to, from));
        copy.inspect_err(|_| streams.forget(context))
    }
}

impl Staging {
    /// VRAM of this agent is staged from now on.
    pub fn add_region(&self, region: &Arc<Registration>) -> Result<()> {
        if let Some(context) = region.copy_context()? {
            self.context.get_or_init(|| context);
        }
        let mut regions = lock(&self.regions);
        regions.retain(|known| known.strong_count() > 0);
        regions.push(Arc::downgrade(region));
        Ok(())
    }

    /// The staged region of this agent that holds a range.
    fn region_of(&self, desc: &Desc) -> Result<Arc<Registration>> {
        let regions = lock(&self.regions);
        let mut known = regions.iter().filter_map(Weak::upgrade);
        known.find(|region| !region.is_retired() && region.check(desc).is_ok()).ok_or_else(|| {
            Error::not_found(format!("{:#x}+{} is in no registered VRAM", desc.addr, desc.len))
        })
    }

    /// Takes in a transfer that has begun.
    pub fn post(&self, transfer: Arc<StagedTransfer>, shared: &Shared) {
        lock(&self.posted).push(transfer);
        shared.mail.set_busy(true);
    }

    /// Gives up what is under way, and all slots. Nothing drives any more.
    pub fn clear(&self) {
        *lock(&self.state) = State::default();
        lock(&self.posted).clear();
    }

    /// One turn, unless another thread has it. Returns how much was done.
    pub fn drive(&self, shared: &Shared) -> usize {
        if !shared.mail.is_busy() {
            return 0;
        }
        let Ok(mut state) = self.state.try_lock() else { return 0 };
        let handled = self.turn(&mut state, shared);
        // What comes in after this sets it again.
        shared.mail.set_busy(false);
        let waits = !shared.mail.is_empty() || !lock(&self.posted).is_empty();
        if waits || state.server.is_busy() || state.client.is_busy() {
            shared.mail.set_busy(true);
        }
        handled
    }

    fn turn(&self, state: &mut State, shared: &Shared) -> usize {
        let State { streams, server, client } = state;
        let mail = shared.mail.take();
        let mut handled = mail.len();
        for (peer, note) in mail {
            match note {
                Note::Ask => server.lend(self, shared, &peer),
                Note::Copy(wish) => server.copy(self, streams, peer, wish),
                Note::Lend { slot_bytes, slots, region } => client.on_lend(&peer, slot_bytes, slots, region),
                Note::Copied { ticket, error } => client.on_copied(&peer, ticket, error),
            }
        }
        handled += server.settle();
        for transfer in std::mem::take(&mut *lock(&self.posted)) {
            client.add(transfer);
        }
        handled += client.advance(self, streams, shared);
        // Copies end unannounced: somebody must look.
        handled + usize::from(server.is_busy() || client.is_copying())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
