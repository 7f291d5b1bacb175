//! A hello that waits until every rail here takes the peer's operations.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Peer;
use super::outgoing::Outgoing;
use crate::rail::{Admitted, Rail};

pub(super) struct Introduction {
    peer: Arc<Peer>,
    hello: Mutex<Option<Outgoing>>,
    rails_left: AtomicUsize,
}

impl Introduction {
    /// Makes the peer's endpoints known on `rails`, and then sends the hello.
    pub fn begin(peer: &Arc<Peer>, hello: Outgoing, rails: &[Arc<Rail>]) {
        let introduction = Arc::new(Self {
            peer: Arc::clone(peer),
            hello: Mutex::new(Some(hello)),
            rails_left: AtomicUsize::new(rails.len()),
        });
        for rail in rails {
            rail.admit(peer.endpoints.clone(), Arc::clone(&introduction) as Arc<dyn Admitted>);
        }
    }
}

impl Admitted for Introduction {
    fn on_admitted(&self) {
        if self.rails_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let hello = self.hello.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(hello) = hello {
            self.peer.hand_over(hello);
        }
    }
}
