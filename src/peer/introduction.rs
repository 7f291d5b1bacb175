//! A hello that waits until every rail here takes the peer's operations.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Peer;
use super::wires::Outgoing;
use crate::rail::{Fragments, Rail, Tag};

/// What the [`Event::Admitted`](crate::rail::Event::Admitted) of a peer's endpoints is tagged with.
pub struct Introduction {
    peer: Arc<Peer>,
    hello: Mutex<Option<(Box<dyn Fragments>, Outgoing)>>,
    rails_left: AtomicUsize,
}

impl Introduction {
    /// Makes the peer's endpoints known on `rails`.
    pub(super) fn begin(peer: &Arc<Peer>, hello: (Box<dyn Fragments>, Outgoing), rails: &[Arc<Rail>]) {
        let introduction = Arc::new(Self {
            peer: Arc::clone(peer),
            hello: Mutex::new(Some(hello)),
            rails_left: AtomicUsize::new(rails.len()),
        });
        for rail in rails {
            rail.admit(peer.endpoints.clone(), Arc::clone(&introduction) as Tag);
        }
    }

    /// One rail more knows the endpoints. Behind the last one the hello is sent.
    pub fn admitted(&self) {
        if self.rails_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let hello = self.hello.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((content, outgoing)) = hello {
            self.peer.hand_over(content, outgoing);
        }
    }
}
