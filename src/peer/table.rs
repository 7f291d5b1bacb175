//! All peers of an engine, by name and by the index that they send us.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Local, Peer};
use crate::error::{Error, Result, Status};
use crate::types::AgentName;
use crate::wire::ConnectionInfo;
use crate::wire::immediate::{PEERS_MAX, STOCK_PEERS_MAX};

/// Peers known by name and by index. Index 0 is the agent itself, as the stock wire has it.
#[derive(Default)]
pub struct PeerTable {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    by_name: HashMap<AgentName, Arc<Peer>>,
    by_index: Vec<Option<Arc<Peer>>>,
    /// Where the search for a free index goes on, for stock peers and for ours: an index comes back as late as
    /// possible, because immediates for its last owner may still be under way.
    next_stock: u16,
    next: u16,
}

impl PeerTable {
    /// The peer with this name.
    pub fn get(&self, name: &AgentName) -> Option<Arc<Peer>> {
        self.read().by_name.get(name).cloned()
    }

    /// The peer to which we gave this index.
    pub fn by_index(&self, index: u16) -> Option<Arc<Peer>> {
        self.read().by_index.get(index as usize)?.clone()
    }

    /// Every peer.
    pub fn all(&self) -> Vec<Arc<Peer>> {
        self.read().by_name.values().cloned().collect()
    }

    /// Takes in connection info: of the user (`loaded`), or of a hello. A peer that is known with the same
    /// endpoints stays as it is; one with others is a new run of the agent, and the old peer is closed.
    pub fn load(
        &self,
        name: &AgentName,
        info: ConnectionInfo,
        loaded: bool,
        local: &Arc<Local>,
    ) -> Result<Arc<Peer>> {
        let mut inner = self.write();
        if let Some(peer) = inner.by_name.get(name) {
            if peer.info.endpoints == info.endpoints {
                peer.loaded.fetch_or(loaded, std::sync::atomic::Ordering::Relaxed);
                return Ok(Arc::clone(peer));
            }
            log::info!("{name} has new endpoints: it was started anew, transfers with its former run fail");
            let peer = Arc::clone(peer);
            inner.remove(
                &peer,
                &Error::disconnected(format!("{name} was started anew; load its new metadata")),
            );
        }
        let speaks_v2 = info.extension.is_some_and(|e| e.speaks_v2());
        let index = inner.free_index(speaks_v2)?;
        let peer = Arc::new(Peer::new(name.clone(), index, info, loaded, local));
        inner.by_index[index as usize] = Some(Arc::clone(&peer));
        inner.by_name.insert(name.clone(), Arc::clone(&peer));
        Ok(peer)
    }

    /// Removes a peer; its index rests before somebody else gets it.
    pub fn remove(&self, name: &AgentName) -> Option<Arc<Peer>> {
        let mut inner = self.write();
        let peer = inner.by_name.get(name).cloned()?;
        inner.remove(&peer, &Error::disconnected(format!("{name} was removed")));
        Some(peer)
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, peer: &Arc<Peer>, why: &Error) {
        self.by_name.remove(&peer.name);
        self.by_index[peer.index as usize] = None;
        peer.close(why);
    }

    /// Stock peers need an index of 8 bits, so ours leave those alone while there are others.
    fn free_index(&mut self, speaks_v2: bool) -> Result<u16> {
        let (first, last, next) = if speaks_v2 {
            (STOCK_PEERS_MAX, PEERS_MAX, &mut self.next)
        } else {
            (1, STOCK_PEERS_MAX, &mut self.next_stock)
        };
        let count = last - first;
        for step in 0..count {
            let index = first + (next.wrapping_add(step)) % count;
            let slot = index as usize;
            if self.by_index.len() <= slot {
                self.by_index.resize(slot + 1, None);
            }
            if self.by_index[slot].is_none() {
                *next = (index - first + 1) % count;
                return Ok(index);
            }
        }
        let kind = if speaks_v2 { "" } else { " that run the C++ plugin" };
        Err(Error::new(
            Status::NotAllowed,
            format!(
                "there are {count} peers{kind} already, more than the wire can tell apart; remove some first"
            ),
        ))
    }
}
