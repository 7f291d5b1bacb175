//! Staging: GPU memory moves through page-locked host memory, where the provider cannot reach it.
//!
//! An agent whose VRAM is staged says so in its connection info. A peer that wants to read or write it asks for slots of
//! host memory, which are then its own; it moves data between those and its own memory by ordinary RMA, and asks by message
//! for copies between them and the VRAM. So the one that transfers decides the order of everything, and the other only
//! copies and answers. A peer that knows nothing of staging is served too where only the local side is VRAM: data then goes
//! through slots here and right into the peer's host memory.
//!
//! What the first transfer needs is made ready before: slots here when VRAM is registered, those of a peer when its
//! metadata is loaded.
//!
//! Whoever drives the rails drives this.

mod arena;
mod client;
mod lease;
mod server;
mod slots;
mod transfer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use self::client::Client;
use self::server::Server;
pub use self::transfer::{StagedPiece, StagedTransfer};
use super::mail::Note;
use super::shared::Shared;
use crate::cuda::{Context, InFlight, Span, Streams};
use crate::error::{Error, Result};
use crate::memory::Registration;
use crate::peer::Peer;
use crate::types::Desc;

/// Ranges of GPU memory that one turn begins to copy for peers, and as many for transfers of this agent: each is a call of
/// the driver's, of a microsecond or two.
const COPIES_PER_TURN: usize = 256;

/// Turns that a thread takes in one go where others want one, too: what rails bring may concern what this turn has looked at already.
const TURNS_MAX: usize = 2;

/// Whoever drives stays awake for so long after a word of a peer's about staging: the next one belongs to the same transfer, and
/// to be woken for it takes as long as to copy a chunk.
const AWAKE: Duration = Duration::from_micros(300);

/// What an engine knows of staging.
#[derive(Default)]
pub struct Staging {
    /// A context of the application in which host memory is page-locked.
    context: OnceLock<Context>,
    /// VRAM of this agent that is staged.
    regions: Mutex<Vec<Weak<Registration>>>,
    arrived: Mutex<Arrived>,
    /// Somebody wanted a turn since the last one began.
    wanted: AtomicBool,
    state: Mutex<State>,
}

/// What calls have left for whoever drives.
#[derive(Default)]
struct Arrived {
    transfers: Vec<Arc<StagedTransfer>>,
    /// Peers of which staged VRAM is known now.
    peers: Vec<Arc<Peer>>,
}

#[derive(Default)]
struct State {
    last_word: Option<Instant>,
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
    /// Makes the streams of a context.
    fn prepare(&self, context: &Context) -> Result<()> {
        self.into_memory.get(context)?;
        self.out_of_memory.get(context).map(|_| ())
    }

    /// Starts copies between pairs of host memory and GPU memory; they end together.
    fn copy(&self, context: &Context, into_memory: bool, pairs: Vec<(Span, Span)>) -> Result<InFlight> {
        let streams = if into_memory { &self.into_memory } else { &self.out_of_memory };
        let pairs = pairs.into_iter().map(|(host, gpu)| if into_memory { (gpu, host) } else { (host, gpu) });
        let copy = streams.get(context).and_then(|stream| stream.copy_all(pairs));
        copy.inspect_err(|_| streams.forget(context))
    }
}

impl Staging {
    /// VRAM of this agent is staged from now on. What transfers of it need is made ready.
    pub fn add_region(&self, region: &Arc<Registration>, shared: &Shared) -> Result<()> {
        if let Some(context) = region.copy_context()? {
            let mut state = lock(&self.state);
            let State { streams, client, .. } = &mut *state;
            let locking = self.context.get_or_init(|| context.clone());
            if let Err(e) = streams.prepare(&context).and_then(|()| client.prepare(locking, shared)) {
                log::warn!(
                    "agent {}: staging is not ready yet, and transfers will try again: {e}",
                    shared.local.name
                );
            }
        }
        let mut regions = lock(&self.regions);
        regions.retain(|known| known.strong_count() > 0);
        regions.push(Arc::downgrade(region));
        drop(regions);
        rouse(shared);
        Ok(())
    }

    /// Staged VRAM of a peer is known: it is asked to lend slots, so that the first transfer need not wait for them.
    pub fn meet(&self, peer: &Arc<Peer>, shared: &Shared) {
        let mut arrived = lock(&self.arrived);
        if !arrived.peers.last().is_some_and(|last| Arc::ptr_eq(last, peer)) {
            arrived.peers.push(Arc::clone(peer));
        }
        drop(arrived);
        rouse(shared);
    }

    /// The staged region of this agent that holds all of these ranges.
    fn region_of(&self, ranges: &[(u64, u32)]) -> Result<Arc<Registration>> {
        let regions = lock(&self.regions);
        let desc = |&(addr, len): &(u64, u32)| Desc { addr, len: len.into(), dev_id: 0 };
        let holds =
            |region: &Arc<Registration>| ranges.iter().all(|range| region.check(&desc(range)).is_ok());
        let mut known = regions.iter().filter_map(Weak::upgrade);
        known.find(|region| !region.is_retired() && holds(region)).ok_or_else(|| {
            let words = ranges.first().map(|(addr, len)| format!("{addr:#x}+{len}")).unwrap_or_default();
            let others =
                if ranges.len() > 1 { format!(" and {} more", ranges.len() - 1) } else { String::new() };
            Error::not_found(format!("no registered VRAM holds {words}{others}"))
        })
    }

    /// Takes in a transfer that has begun.
    pub fn post(&self, transfer: Arc<StagedTransfer>, shared: &Shared) {
        lock(&self.arrived).transfers.push(transfer);
        shared.mail.set_busy(true);
    }

    /// Gives up what is under way, and all slots. Nothing drives any more.
    pub fn clear(&self) {
        *lock(&self.state) = State::default();
        *lock(&self.arrived) = Arrived::default();
    }

    /// One turn, unless another thread has it; that one then takes another turn. Returns how much was done.
    pub fn drive(&self, shared: &Shared) -> usize {
        let mut handled = 0;
        for _ in 0..TURNS_MAX {
            if !shared.mail.is_busy() {
                break;
            }
            // In this order: who has the turn looks at it after it has let go.
            self.wanted.store(true, Ordering::SeqCst);
            let Ok(mut state) = self.state.try_lock() else { break };
            self.wanted.store(false, Ordering::SeqCst);
            handled += self.turn(&mut state, shared);
            // What comes in after this sets it again.
            shared.mail.set_busy(false);
            let waits = !shared.mail.is_empty() || !lock(&self.arrived).is_empty();
            let is_busy = state.server.is_busy() || state.client.is_busy(shared);
            if waits || is_busy || is_recent(state.last_word) {
                shared.mail.set_busy(true);
            }
            drop(state);
            if !self.wanted.load(Ordering::SeqCst) {
                break;
            }
        }
        handled
    }

    fn turn(&self, state: &mut State, shared: &Shared) -> usize {
        let State { last_word, streams, server, client } = state;
        let mail = shared.mail.take();
        let mut handled = mail.len();
        if handled > 0 {
            *last_word = Some(Instant::now());
        }
        for (peer, note) in mail {
            match note {
                Note::Ask => server.lend(self, shared, &peer),
                Note::Copy(wish) => server.wish(peer, wish),
                Note::Lend { slot_bytes, slots, region } => client.on_lend(&peer, slot_bytes, slots, region),
                Note::Copied { ticket, error } => client.on_copied(&peer, ticket, error),
            }
        }
        handled += server.advance(self, streams, shared);
        let Arrived { transfers, peers } = std::mem::take(&mut *lock(&self.arrived));
        for peer in &peers {
            client.meet(peer);
        }
        for transfer in transfers {
            client.add(transfer);
        }
        handled += client.advance(self, streams, shared);
        if shared.local.has_mail() {
            // Somebody waits for it: where there is no progress thread, the application's next call may be far.
            shared.kick();
        }
        // Copies end unannounced: somebody must look.
        handled + usize::from(server.is_copying() || client.is_copying() || is_recent(*last_word))
    }
}

impl Arrived {
    fn is_empty(&self) -> bool {
        self.transfers.is_empty() && self.peers.is_empty()
    }
}

/// There is something to do for whoever drives.
fn rouse(shared: &Shared) {
    shared.mail.set_busy(true);
    shared.wake();
}

/// Whether a peer's next word is waited for awake.
fn is_recent(last_word: Option<Instant>) -> bool {
    last_word.is_some_and(|at| at.elapsed() < AWAKE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
