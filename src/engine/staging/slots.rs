//! Page-locked host memory in slots, registered on every rail.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::cuda::{Context, Pinned, Span};
use crate::error::{Error, Result};
use crate::fabric::{MemoryRegion, next_key};
use crate::rail::Rail;
use crate::sys::thread::spawn_without_signals;
use crate::types::RailId;
use crate::wire::PublicMetadata;

/// Bytes of a slot. What moves takes as many in a row as it needs.
pub const SLOT_BYTES: u32 = 64 << 10;

/// One region cut into slots.
pub struct Slots {
    memory: Arc<Pinned>,
    regions: Vec<MemoryRegion>,
    rails: Vec<RailId>,
    slot_bytes: u32,
    count: u16,
}

impl Slots {
    /// `count` slots, page-locked by `context`'s driver.
    fn new(context: &Context, rails: &[Arc<Rail>], slot_bytes: u32, count: u16) -> Result<Self> {
        let memory = Arc::new(Pinned::new(context, usize::from(count) * slot_bytes as usize)?);
        let mut regions = Vec::with_capacity(rails.len());
        for rail in rails {
            let region = rail.domain().register_kept(Arc::clone(&memory) as _, next_key());
            let region = region.map_err(|e| Error::from(e).context("staging memory cannot be registered"))?;
            rail.bind(&region)?;
            regions.push(region);
        }
        Ok(Self { memory, regions, rails: rails.iter().map(|rail| rail.id()).collect(), slot_bytes, count })
    }

    /// Number of slots.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// `len` bytes from `offset` on, for a copy.
    pub fn span(&self, offset: u64, len: u64) -> Result<Span> {
        self.memory.span().part(offset, len)
    }

    /// Its first address.
    pub fn addr(&self) -> u64 {
        self.memory.span().addr()
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.memory.span().len()
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
        let keys = self.regions.iter().map(|region| Some(region.key())).collect();
        PublicMetadata::new(keys, self.addr())
    }
}

/// Slots in the making, on a thread of their own: to page-lock and register 32 MiB takes some ten milliseconds, in which
/// whoever drives has other things to do.
pub struct Making(Option<JoinHandle<Result<Slots>>>);

impl Making {
    /// Begins to make `count` slots.
    pub fn start(context: &Context, rails: &[Arc<Rail>], slot_bytes: u32, count: u16) -> Result<Self> {
        let (context, rails) = (context.clone(), rails.to_vec());
        let make = move || Slots::new(&context, &rails, slot_bytes, count);
        let thread = spawn_without_signals("nixl-staging".to_owned(), make)
            .map_err(|e| Error::backend(format!("no thread could be started to make staging memory: {e}")))?;
        Ok(Self(Some(thread)))
    }

    /// The slots, once they are made.
    pub fn finished(&mut self) -> Option<Result<Slots>> {
        let thread = self.0.take_if(|thread| thread.is_finished())?;
        // A panic goes on where it is looked for: with whoever drives.
        Some(thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }
}
