//! Shares: what one endpoint moves of lists of operations.

use std::sync::Arc;

use super::error::FabricError;
use super::list::RmaList;
use super::peers::FiAddr;

/// A list, one of its lanes, and a peer: what operations in flight refer to.
pub(super) struct Share {
    /// Keeps the local memory registered for as long as anything of the share is in flight.
    pub(super) list: Arc<RmaList>,
    pub(super) lane: u16,
    pub(super) peer: FiAddr,
    /// Immediate data of each write.
    pub(super) imm: Option<u32>,
    pub(super) in_flight: u32,
    /// Nothing more will be posted.
    ended: bool,
}

/// The shares of an endpoint, by numbers that its owner chooses.
#[derive(Default)]
pub(super) struct Shares(Vec<Option<Share>>);

impl Shares {
    pub(super) fn begin(
        &mut self,
        key: u32,
        list: Arc<RmaList>,
        lane: u16,
        peer: FiAddr,
        imm: Option<u32>,
    ) -> Result<(), FabricError> {
        let at = key as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        if self.0[at].is_some() {
            return Err(FabricError::refused("begin", format!("share {key} is in use")));
        }
        self.0[at] = Some(Share { list, lane, peer, imm, in_flight: 0, ended: false });
        Ok(())
    }

    pub(super) fn get(&self, key: u32) -> Option<&Share> {
        self.0.get(key as usize)?.as_ref()
    }

    /// So many more operations are in flight.
    pub(super) fn started(&mut self, key: u32, count: u32) {
        if let Some(Some(share)) = self.0.get_mut(key as usize) {
            share.in_flight += count;
        }
    }

    /// So many are over. Gives the peer.
    pub(super) fn finished(&mut self, key: u32, count: u32) -> Option<FiAddr> {
        let place = self.0.get_mut(key as usize)?;
        let share = place.as_mut()?;
        share.in_flight -= count;
        let peer = share.peer;
        if share.ended && share.in_flight == 0 {
            *place = None;
        }
        Some(peer)
    }

    /// Nothing more will be posted. What is in flight keeps the share.
    pub(super) fn end(&mut self, key: u32) {
        let Some(place) = self.0.get_mut(key as usize) else { return };
        if let Some(share) = place {
            share.ended = true;
            if share.in_flight == 0 {
                *place = None;
            }
        }
    }
}
