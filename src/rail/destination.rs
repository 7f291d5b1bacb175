//! Addresses of remote endpoints on one rail.
//!
//! An address stays in the address vector after its last use: the efa provider keeps message numbers by
//! address-vector entry, so that removing and inserting the address of a living peer breaks its sequence
//! (ai-dynamo/nixl#817). Only when there are too many does the one that rested longest go.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::probe::Question;
use crate::error::{Error, Result, Status};
use crate::fabric::{Device, Endpoint, FiAddr, InFlight};
use crate::sys::tcp::{self, Probe};

/// How long a peer whose connection broke may take to accept a new one.
const RECONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a peer takes nothing before it is looked whether its address still accepts connections; then twice as long
/// each time, so that a peer that only stands still finds few of them when it goes on.
const PROBE_DELAY: Duration = Duration::from_millis(200);

/// How long a refusal is good for: everything that waits for a dead peer fails at once, and not one after the other.
const REFUSAL_HOLDS: Duration = Duration::from_millis(200);

/// Addresses kept on a rail; beyond that the longest unused is removed.
const ADDRESSES_MAX: usize = 32_768;

/// A remote endpoint, by its raw libfabric name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination(pub Arc<[u8]>);

#[derive(Debug)]
pub(super) struct Entry {
    pub name: Destination,
    pub addr: FiAddr,
    /// Shares and queued messages that refer to it.
    pub users: u32,
    /// When it last accepted or completed something.
    pub last_progress: Instant,
    /// The connection broke, and nothing has completed since.
    pub lost: bool,
    /// A write or read to it has completed.
    pub reached: bool,
    /// It need not be asked any more before something is posted to it.
    pub answered: bool,
    /// It is being asked whether it answers.
    pub question: Option<Question>,
    /// Why no message reaches it any more.
    pub deaf: Option<Error>,
    listener: Option<Listener>,
    last_used: u64,
}

impl Entry {
    /// An operation is over.
    pub fn completed(&mut self, error: Option<&Error>, now: Instant) {
        match error {
            None => {
                self.last_progress = now;
                self.lost = false;
            }
            Some(error) => self.lost |= error.status() == Status::RemoteDisconnect,
        }
    }

    /// The error of work for it that was put off, once that has lasted too long, or nobody is there any more. tcp puts
    /// posts to a dead peer off for ever, while it tries to connect.
    pub fn stalled(&mut self, in_flight: InFlight, now: Instant, timeout: Duration) -> Option<Error> {
        if in_flight.rma > 0 || in_flight.messages > 0 {
            return None;
        }
        let elapsed = now.duration_since(self.last_progress);
        if let Some(listener) = &mut self.listener
            && listener.refuses(elapsed)
        {
            return Some(Error::disconnected(format!(
                "nobody accepts connections at {} any more: its process ended, or its agent was closed",
                listener.address
            )));
        }
        let limit = if self.lost { timeout.min(RECONNECT_TIMEOUT) } else { timeout };
        if elapsed < limit {
            return None;
        }
        let what = if self.lost && limit == RECONNECT_TIMEOUT {
            format!("its connection broke, and it accepted no new one for {} ms", limit.as_millis())
        } else {
            format!("it accepted nothing for {} ms (connect_timeout_ms)", limit.as_millis())
        };
        Some(Error::disconnected(format!("{what}; is it alive, and can its address be reached?")))
    }
}

/// The address at which a peer accepts connections, and what was last heard from it.
#[derive(Debug)]
struct Listener {
    address: SocketAddr,
    probe: Option<Probe>,
    /// How long the peer takes nothing before the next probe.
    next: Duration,
    /// After how long it refused. That holds for a while, for everything that waits for it.
    refused: Option<Duration>,
}

impl Listener {
    fn new(address: SocketAddr) -> Self {
        Self { address, probe: None, next: PROBE_DELAY, refused: None }
    }

    /// Whether it refuses connections, for all that is known after the peer took nothing for so long.
    fn refuses(&mut self, elapsed: Duration) -> bool {
        if elapsed < PROBE_DELAY {
            *self = Self::new(self.address);
            return false;
        }
        if self.refused.is_some_and(|at| elapsed < at + REFUSAL_HOLDS) {
            return true;
        }
        let refuses = match self.probe.take_if(|probe| probe.refused()) {
            Some(_) => true,
            None if elapsed < self.next => false,
            None => {
                self.next = elapsed * 2;
                match Probe::start(self.address) {
                    Ok(probe) => {
                        self.probe = Some(probe);
                        false
                    }
                    Err(e) => tcp::is_refusal(Some(&e)),
                }
            }
        };
        self.refused = refuses.then_some(elapsed);
        if refuses {
            // It may be started anew at this address.
            self.next = elapsed + REFUSAL_HOLDS;
        }
        refuses
    }
}

/// Key of a destination on its rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DestinationKey(u32);

pub(super) struct Destinations {
    device: Device,
    by_name: HashMap<Destination, DestinationKey>,
    entries: Vec<Option<Entry>>,
    vacant: Vec<u32>,
    clock: u64,
}

impl Destinations {
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            by_name: HashMap::new(),
            entries: Vec::new(),
            vacant: Vec::new(),
            clock: 0,
        }
    }

    /// The entry of `name`, inserted into the address vector at first use; counts one more user.
    pub fn acquire(&mut self, name: &Destination, endpoint: &mut Endpoint) -> Result<DestinationKey> {
        self.clock += 1;
        let key = if let Some(&key) = self.by_name.get(name) {
            key
        } else {
            self.make_room(endpoint);
            self.insert(name, endpoint.insert_address(&name.0)?)
        };
        let clock = self.clock;
        let entry = self.get(key);
        if entry.users == 0 {
            entry.last_progress = Instant::now();
        }
        entry.users += 1;
        entry.last_used = clock;
        Ok(key)
    }

    /// Uses of all entries.
    pub fn users(&self) -> usize {
        self.entries.iter().flatten().map(|entry| entry.users as usize).sum()
    }

    pub fn release(&mut self, key: DestinationKey) {
        self.get(key).users -= 1;
    }

    pub fn get(&mut self, key: DestinationKey) -> &mut Entry {
        self.entries[key.0 as usize].as_mut().expect("a key is used only between acquire and release")
    }

    /// The provider did not reach somebody with a word of its own, and does not say whom. It may be one that is being asked.
    pub fn suspect(&mut self, now: Instant) {
        for question in self.entries.iter_mut().flatten().filter_map(|entry| entry.question.as_mut()) {
            question.suspect(now);
        }
    }

    fn insert(&mut self, name: &Destination, addr: FiAddr) -> DestinationKey {
        let entry = Entry {
            name: name.clone(),
            addr,
            users: 0,
            last_progress: Instant::now(),
            lost: false,
            reached: false,
            answered: false,
            question: None,
            deaf: None,
            listener: self.device.listener(&name.0).map(Listener::new),
            last_used: self.clock,
        };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            (self.entries.len() - 1) as u32
        });
        self.entries[index as usize] = Some(entry);
        let key = DestinationKey(index);
        self.by_name.insert(name.clone(), key);
        key
    }

    fn make_room(&mut self, endpoint: &mut Endpoint) {
        if self.by_name.len() < ADDRESSES_MAX {
            return;
        }
        let oldest = self
            .entries
            .iter()
            .enumerate()
            .filter_map(|(i, e)| e.as_ref().map(|e| (i, e)))
            .filter(|(_, e)| e.users == 0)
            .min_by_key(|(_, e)| e.last_used)
            .map(|(i, _)| i);
        let Some(entry) = oldest.and_then(|i| self.entries[i].take().inspect(|_| self.vacant.push(i as u32)))
        else {
            return;
        };
        self.by_name.remove(&entry.name);
        if let Err(e) = endpoint.remove_address(entry.addr) {
            log::warn!("an unused address could not be removed from the address vector: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn everything_that_waits_for_a_dead_peer_hears_of_it_at_once() {
        let somebody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut listener = Listener::new(somebody.local_addr().unwrap());
        assert!(!listener.refuses(PROBE_DELAY));
        drop(somebody);
        // The first one may have to wait for the answer to a new probe.
        let mut elapsed = PROBE_DELAY;
        let deadline = Instant::now() + Duration::from_secs(5);
        while !listener.refuses(elapsed) {
            assert!(Instant::now() < deadline, "{listener:?}");
            elapsed += PROBE_DELAY;
        }
        assert!((0..10).all(|_| listener.refuses(elapsed)), "others that wait");
        assert!(!listener.refuses(Duration::ZERO), "it took something");
    }
}
