//! What is kept of a removed peer that speaks the stock wire.
//!
//! The C++ plugin gives its index for us once, at the first hello. A hello of a peer that it knows already it does not
//! answer, so whoever removes such a peer here and adds it again must remember what it said. That stays true while
//! its process lives: it never gives an index of its table to somebody else, not even after it removed us, and if it
//! has removed us, it answers our next hello with the new one.
//!
//! Kept as well: our transfer numbers, because it may hold unfinished ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::notify::StockIds;
use crate::types::AgentName;
use crate::wire::EndpointName;

/// Removed peers that are remembered; beyond it the one removed longest ago is forgotten. Each takes some 200 bytes.
const FORMER_MAX: usize = 1024;

/// What was agreed with a stock peer.
#[derive(Debug)]
pub(super) struct Agreement {
    /// Where its control messages went: every run of an agent has an endpoint of its own.
    pub control_endpoint: EndpointName,
    /// Our index in its table, if it has told.
    pub theirs: Option<u16>,
    /// Our transfer numbers.
    pub ids: Arc<Mutex<StockIds>>,
}

/// Agreements with peers that were removed, by name.
#[derive(Debug, Default)]
pub(super) struct FormerPeers {
    by_name: HashMap<AgentName, (u64, Agreement)>,
    clock: u64,
}

impl FormerPeers {
    pub fn keep(&mut self, name: AgentName, agreement: Agreement) {
        self.clock += 1;
        self.by_name.insert(name, (self.clock, agreement));
        if self.by_name.len() > FORMER_MAX {
            let oldest = self.by_name.iter().min_by_key(|(_, (at, _))| *at).map(|(name, _)| name.clone());
            self.by_name.remove(&oldest.expect("more than none are kept"));
        }
    }

    /// The agreement with this run of the agent. Whatever was kept under the name is gone afterwards.
    pub fn take(&mut self, name: &AgentName, control_endpoint: &EndpointName) -> Option<Agreement> {
        let (_, agreement) = self.by_name.remove(name)?;
        (agreement.control_endpoint == *control_endpoint).then_some(agreement)
    }

    /// A hello that arrived when its sender was removed already.
    pub fn hear(&mut self, name: &AgentName, index: u16) {
        if let Some((_, agreement)) = self.by_name.get_mut(name) {
            agreement.theirs = Some(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreement(endpoint: &[u8], theirs: Option<u16>) -> Agreement {
        let control_endpoint = EndpointName::new(endpoint).unwrap();
        Agreement { control_endpoint, theirs, ids: Arc::new(Mutex::new(StockIds::starting_at(77))) }
    }

    #[test]
    fn a_peer_met_again_is_known_once_and_only_at_its_endpoint() {
        let mut former = FormerPeers::default();
        let (here, elsewhere) =
            (EndpointName::new(b"here").unwrap(), EndpointName::new(b"elsewhere").unwrap());
        former.keep("a".into(), agreement(b"here", Some(5)));
        let again = former.take(&"a".into(), &here).expect("it was kept");
        assert_eq!(again.theirs, Some(5));
        assert_eq!(again.ids.lock().unwrap().position(), 77);
        assert!(former.take(&"a".into(), &here).is_none());
        former.keep("a".into(), agreement(b"here", Some(5)));
        assert!(former.take(&"a".into(), &elsewhere).is_none(), "another run of the agent");
        assert!(former.take(&"a".into(), &here).is_none(), "its former run does not come back");
    }

    #[test]
    fn a_hello_after_the_removal_counts() {
        let mut former = FormerPeers::default();
        former.hear(&"a".into(), 9);
        former.keep("a".into(), agreement(b"here", None));
        former.hear(&"a".into(), 9);
        assert_eq!(former.take(&"a".into(), &EndpointName::new(b"here").unwrap()).unwrap().theirs, Some(9));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut former = FormerPeers::default();
        let name = |n: usize| AgentName::from(n.to_string().as_str());
        for n in 0..FORMER_MAX + 2 {
            former.keep(name(n), agreement(b"here", None));
        }
        let here = EndpointName::new(b"here").unwrap();
        assert_eq!(former.by_name.len(), FORMER_MAX);
        assert!(former.take(&name(0), &here).is_none() && former.take(&name(1), &here).is_none());
        assert!(former.take(&name(2), &here).is_some());
    }
}
