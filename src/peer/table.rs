//! All peers of an engine, by name and by the index that they send us.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::former::FormerPeers;
use super::{Local, Peer, Released};
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
    /// Indices of removed peers that are still listened to, oldest first.
    lingering: VecDeque<u16>,
    former: FormerPeers,
}

/// Removed peers that are still listened to. A peer that we removed and added again sends under its old index until
/// our hello has reached it; what it sends meanwhile is not lost.
const LINGERING_MAX: usize = 64;

impl PeerTable {
    /// The peer with this name.
    pub fn get(&self, name: &AgentName) -> Option<Arc<Peer>> {
        self.read().by_name.get(name).cloned()
    }

    /// Whether notifications of a peer are for the user: it is known, if only under a later index.
    pub fn is_heard(&self, peer: &Arc<Peer>) -> bool {
        self.read().by_name.get(&peer.name).is_some_and(|now| now.info.endpoints == peer.info.endpoints)
    }

    /// The peer to which we gave this index, though it may be removed since.
    pub fn by_index(&self, index: u16) -> Option<Arc<Peer>> {
        self.read().by_index.get(index as usize)?.clone()
    }

    /// Every peer.
    pub fn all(&self) -> Vec<Arc<Peer>> {
        self.read().by_name.values().cloned().collect()
    }

    /// Takes in connection info: of the user (`loaded`), or of a hello. A peer that is known with the same
    /// endpoints stays as it is; one with others is a new run of the agent, and the old peer is closed: what waited for it comes
    /// back. A hello of the old run may come after that, and is refused.
    pub fn load(
        &self,
        name: &AgentName,
        info: ConnectionInfo,
        loaded: bool,
        local: &Arc<Local>,
    ) -> Result<(Arc<Peer>, Released)> {
        let mut inner = self.write();
        let mut released = Released::default();
        if let Some(peer) = inner.by_name.get(name) {
            if peer.info.endpoints == info.endpoints {
                peer.loaded.fetch_or(loaded, std::sync::atomic::Ordering::Relaxed);
                return Ok((Arc::clone(peer), released));
            }
            // A handshake in the name of a peer that speaks our wire, from somebody who does not: not that peer.
            if !loaded && peer.info.extension.is_some() && info.extension.is_none() {
                return Err(Error::invalid(format!(
                    "a handshake in the name of {name}, with a stranger's address"
                )));
            }
            if !loaded && peer.info.is_newer_than(&info) {
                return Err(Error::not_found(format!("a handshake of a former run of {name} came late")));
            }
            log::info!("{name} has new endpoints: it was started anew, transfers with its former run fail");
            let peer = Arc::clone(peer);
            released = inner.remove(
                &peer,
                &Error::disconnected(format!("{name} was started anew; load its new metadata")),
            );
        }
        let speaks_v2 = info.extension.is_some_and(|e| e.speaks_v2());
        let former = inner.former.take(name, &info.endpoints[0]).filter(|_| !speaks_v2);
        let index = inner.free_index(speaks_v2)?;
        let wire = if speaks_v2 { "version 2" } else { "the stock plugin's" };
        log::debug!("peer {name} has {} rails, index {index}, and reads {wire} wire", info.endpoints.len());
        let peer = Arc::new(Peer::new(name.clone(), index, info, loaded, former, local));
        inner.by_index[index as usize] = Some(Arc::clone(&peer));
        inner.by_name.insert(name.clone(), Arc::clone(&peer));
        Ok((peer, released))
    }

    /// Takes note of a stock peer's hello without connection info, if that peer was removed here.
    pub fn hear_former(&self, name: &AgentName, index: u16) {
        self.write().former.hear(name, index);
    }

    /// Removes a peer; its index rests before somebody else gets it.
    pub fn remove(&self, name: &AgentName) -> Option<Released> {
        let mut inner = self.write();
        let peer = inner.by_name.get(name).cloned()?;
        Some(inner.remove(&peer, &Error::disconnected(format!("{name} was removed"))))
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, peer: &Arc<Peer>, why: &Error) -> Released {
        self.by_name.remove(&peer.name);
        self.lingering.push_back(peer.index);
        if self.lingering.len() > LINGERING_MAX {
            self.forget_oldest();
        }
        let released = peer.close(why);
        if let Some(agreement) = peer.agreement() {
            self.former.keep(peer.name.clone(), agreement);
        }
        released
    }

    fn forget_oldest(&mut self) -> bool {
        let Some(index) = self.lingering.pop_front() else { return false };
        self.by_index[index as usize] = None;
        true
    }

    /// Stock peers need an index of 8 bits, so ours leave those alone. An index for which a removed peer lingers
    /// comes last.
    fn free_index(&mut self, speaks_v2: bool) -> Result<u16> {
        let range = if speaks_v2 { STOCK_PEERS_MAX..PEERS_MAX } else { 1..STOCK_PEERS_MAX };
        loop {
            let next = if speaks_v2 { &mut self.next } else { &mut self.next_stock };
            let start = (*next).clamp(range.start, range.end - 1);
            let in_turn = (start..range.end).chain(range.start..start);
            let taken = |index: &u16| self.by_index.get(*index as usize).is_some_and(Option::is_some);
            if let Some(index) = in_turn.clone().find(|index| !taken(index)) {
                *next = if index + 1 == range.end { range.start } else { index + 1 };
                let len = self.by_index.len().max(index as usize + 1);
                self.by_index.resize(len, None);
                return Ok(index);
            }
            if !self.forget_oldest() {
                break;
            }
        }
        let kind = if speaks_v2 { "" } else { " that run the C++ plugin" };
        Err(Error::new(
            Status::NotAllowed,
            format!(
                "there are {} peers{kind} already, more than the wire can tell apart; remove some first",
                range.len()
            ),
        ))
    }
}
