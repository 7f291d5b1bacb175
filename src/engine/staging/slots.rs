//! Page-locked host memory in slots, registered on every rail.

use std::sync::Arc;

use crate::cuda::{Context, Pinned, Span};
use crate::error::{Error, Result};
use crate::fabric::{MemoryRegion, next_key};
use crate::rail::Rail;
use crate::types::RailId;
use crate::wire::PublicMetadata;

/// Bytes of a slot: the most that one chunk moves. Long enough that messages about it cost little.
pub const SLOT_BYTES: u32 = 1 << 20;

/// One region cut into slots.
pub struct Slots {
    memory: Arc<Pinned>,
    regions: Vec<MemoryRegion>,
    rails: Vec<RailId>,
    count: u16,
}

impl Slots {
    /// `count` slots, page-locked by `context`'s driver.
    pub fn new(context: &Context, rails: &[Arc<Rail>], count: u16) -> Result<Self> {
        let memory = Arc::new(Pinned::new(context, usize::from(count) * SLOT_BYTES as usize)?);
        let mut regions = Vec::with_capacity(rails.len());
        for rail in rails {
            let region = rail.domain().register_kept(Arc::clone(&memory) as _, next_key());
            let region = region.map_err(|e| Error::from(e).context("staging memory cannot be registered"))?;
            rail.bind(&region)?;
            regions.push(region);
        }
        Ok(Self { memory, regions, rails: rails.iter().map(|rail| rail.id()).collect(), count })
    }

    /// Number of slots.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// The first `len` bytes of a slot, for a copy.
    pub fn span(&self, slot: u16, len: u64) -> Result<Span> {
        if slot >= self.count || len > SLOT_BYTES.into() {
            return Err(Error::invalid(format!("slot {slot} of {} with {len} bytes", self.count)));
        }
        self.memory.span().part(u64::from(slot) * u64::from(SLOT_BYTES), len)
    }

    /// Address of a slot.
    pub fn addr(&self, slot: u16) -> u64 {
        self.memory.span().addr() + u64::from(slot) * u64::from(SLOT_BYTES)
    }

    /// The rails that serve it: all.
    pub fn rails(&self) -> &[RailId] {
        &self.rails
    }

    /// Its region on a rail.
    pub fn region(&self, rail: RailId) -> MemoryRegion {
        self.regions[rail.index()].clone()
    }

    /// What a peer needs to reach it.
    pub fn metadata(&self) -> PublicMetadata {
        PublicMetadata {
            keys: self.regions.iter().map(|region| Some(region.key())).collect(),
            addr: self.memory.span().addr(),
            board: None,
            gpu: None,
        }
    }
}
