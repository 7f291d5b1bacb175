//! Transfers of the agent with itself.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::remote::failed_late;
use super::shared::Shared;
use super::{XferElement, local, metadata};
use crate::error::{Error, Result, Status};
use crate::memory::Registration;
use crate::rail::Tag;
use crate::transfer::plan::Cutter;
use crate::transfer::{CopyList, CopyPair, Far, Next, Transfer};
use crate::types::Op;

/// A transfer within the agent.
pub struct Own {
    pub transfer: Arc<Transfer>,
}

impl Own {
    /// From lists of one length.
    pub fn prepare<'a>(
        op: Op,
        local_descs: &[impl XferElement<'a>],
        remote_descs: &[impl XferElement<'a>],
    ) -> Result<Self> {
        let mut pairs: Vec<CopyPair> = Vec::new();
        let mut numbers = HashMap::new();
        let mut cutter = Cutter::whole(local_descs.len());
        for (here, there) in local_descs.iter().zip(remote_descs) {
            let (near, far) = (local(metadata(here)?)?, local(metadata(there)?)?);
            let key = (here.region(), there.region());
            let (here, there) = (here.desc(), there.desc());
            near.check(&here)?;
            far.check(&there)?;
            if here.len != there.len {
                return Err(Error::invalid(format!(
                    "a local descriptor has {} bytes and its counterpart {}",
                    here.len, there.len
                )));
            }
            let number = *numbers.entry(key).or_insert_with(|| {
                pairs.push(CopyPair { near: Arc::clone(near), far: Far::Here(Arc::clone(far)) });
                pairs.len() as u32 - 1
            });
            cutter.extend(number, std::iter::once((here.addr, there.addr, here.len)));
        }
        let copies = CopyList::new(op, cutter.finish(), pairs)?;
        let mut registrations: Vec<Arc<Registration>> = Vec::new();
        for registration in copies.registrations() {
            if !registrations.iter().any(|known| Arc::ptr_eq(known, registration)) {
                registrations.push(Arc::clone(registration));
            }
        }
        Ok(Self { transfer: Transfer::new(op, Vec::new(), Some(copies), registrations) })
    }

    /// Begins a post, and copies for one turn.
    pub fn post(self: &Arc<Self>, notification: Option<Vec<u8>>, shared: &Shared) -> Result<()> {
        self.transfer.begin(notification)?;
        let tag = Arc::clone(self) as Tag;
        let launched = self.transfer.launch(&tag, 0, &[], &shared.copies, |_| None, |_| true);
        debug_assert!(launched, "it needs no rails");
        self.part_over(Ok(()), shared);
        shared.drive_copies();
        Ok(())
    }

    /// A part of the post is over.
    pub fn part_over(&self, outcome: Result<()>, shared: &Shared) {
        if let Err(e) = outcome {
            self.transfer.fail(e, &mut Vec::new());
        }
        match self.transfer.part_over() {
            Next::Nothing => {}
            Next::Notify(message) => {
                shared.inbox.push(shared.local.name.clone(), message);
                self.part_over(Ok(()), shared);
            }
            Next::Ended { outcome, .. } => {
                let _ = outcome.inspect(|&took| shared.local_rates.record(self.transfer.bytes(), took));
            }
        }
    }

    /// What checkXfer answers.
    pub fn status(&self, shared: &Shared) -> Result<Status> {
        let status = self.transfer.status(shared.config.drain_timeout)?;
        if let Some(late) = failed_late(&self.transfer, status, shared) {
            self.transfer.fail(late, &mut Vec::new());
        }
        Ok(status)
    }
}

/// The transfer behind a tag, if it is one with the agent itself.
pub fn of_tag(tag: &Tag) -> Option<Arc<Own>> {
    let tag: Arc<dyn Any + Send + Sync> = Arc::clone(tag);
    tag.downcast().ok()
}
