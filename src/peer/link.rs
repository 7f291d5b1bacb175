//! The handshake with one peer, as a pure state machine.
//!
//! Each side numbers its connection to the other with a session, a number that only grows: what was said under an earlier
//! one is told by it. A hello that the other side has not seen is always answered, also on a
//! link that works: the other may have removed and added us again. Nothing is sent under a session before the other
//! side has named it: what came earlier than the hello that announces it could only be dropped, and on EFA it does come
//! earlier. A stock peer has no sessions; it wants an answer when its hello carries connection info. Its numbers go on
//! whatever becomes of the link: it draws them from one counter for all its peers, for as long as its process lives.

use crate::wire::{Handshake, HandshakeExtension};

/// What the peer told us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Theirs {
    /// Its session; 0 for a stock peer.
    pub session: u64,
    /// Our index in its table: what our immediates carry.
    pub index: u16,
}

/// One side of a handshake.
#[derive(Debug)]
pub struct Link {
    session: u64,
    theirs: Option<Theirs>,
    /// The peer has named our session: it knows it.
    confirmed: bool,
    /// What we know of the peer is from before its last removal here: it may have forgotten us since.
    remembered: bool,
}

/// What a hello asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reaction {
    /// Send a handshake.
    pub answer: bool,
    /// The peer has begun a new session: forget what is unfinished of the earlier one.
    pub receive_anew: bool,
}

impl Link {
    /// A link that has heard nothing. `session` is not 0 and was never used with this peer.
    pub fn new(session: u64) -> Self {
        Self { session, theirs: None, confirmed: false, remembered: false }
    }

    /// A link to a stock peer that gave us `index` before it was removed here. It is used until the peer says another.
    pub fn resumed(session: u64, index: u16) -> Self {
        Self { session, theirs: Some(Theirs { session: 0, index }), confirmed: true, remembered: true }
    }

    /// Whether the peer may lack our connection info.
    pub fn wants_conn(&self) -> bool {
        self.theirs.is_none() || self.remembered
    }

    /// Our session.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// What the peer told us, once it has.
    pub fn theirs(&self) -> Option<Theirs> {
        self.theirs
    }

    /// What the peer told us, once it knows our session, too: now it can be sent to.
    pub fn ready(&self) -> Option<Theirs> {
        self.theirs.filter(|_| self.confirmed)
    }

    /// What to say about sessions in a handshake of ours.
    pub fn extension(&self) -> HandshakeExtension {
        let peer_session = self.theirs.map_or(0, |t| t.session);
        HandshakeExtension {
            session: self.session,
            peer_session,
            answer_wanted: !self.confirmed,
            retired: [0; 2],
        }
    }

    /// Takes in the peer's handshake.
    pub fn on_hello(&mut self, hello: &Handshake) -> Reaction {
        let Some(extension) = hello.extension else {
            self.theirs = Some(Theirs { session: 0, index: hello.index });
            self.confirmed = true;
            self.remembered = false;
            return Reaction { answer: hello.conn.is_some(), ..Reaction::default() };
        };
        let names_ours = extension.peer_session == self.session;
        let names_older = extension.peer_session != 0 && !names_ours;
        let known = self.theirs.map_or(0, |t| t.session);
        // Sessions of one agent only grow, so an older one is a hello that was overtaken. To a link that has heard
        // nothing, one that names another session was said to the link before it; our hello makes the peer begin anew.
        if extension.session < known || (names_older && self.theirs.is_none()) {
            return Reaction { answer: extension.answer_wanted, ..Reaction::default() };
        }
        if extension.session == known {
            self.confirmed |= names_ours;
            return Reaction { answer: extension.answer_wanted || names_older, ..Reaction::default() };
        }
        // A newer session is taken whatever it names: passed over on both sides, two of them would be said for ever. The
        // peer has begun anew, and knows our session only if it names it.
        let receive_anew = self.theirs.is_some();
        self.theirs = Some(Theirs { session: extension.session, index: hello.index });
        self.confirmed = names_ours;
        Reaction { answer: extension.answer_wanted || !self.confirmed, receive_anew }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Two agents' links and the handshakes in flight between them.
    struct Pair {
        links: [Link; 2],
        /// Index that each gives to the other; a new one after each removal.
        indices: [u16; 2],
        in_flight: [VecDeque<Handshake>; 2],
        sessions: u64,
    }

    impl Pair {
        fn new() -> Self {
            let mut pair = Self {
                links: [Link::new(1), Link::new(2)],
                indices: [1, 1],
                in_flight: [VecDeque::new(), VecDeque::new()],
                sessions: 2,
            };
            pair.say(0);
            pair.say(1);
            pair
        }

        fn say(&mut self, who: usize) {
            self.in_flight[1 - who].push_back(Handshake {
                index: self.indices[who],
                name: b"x".to_vec(),
                conn: None,
                extension: Some(self.links[who].extension()),
            });
        }

        fn remove_and_add(&mut self, who: usize) {
            self.sessions += 1;
            self.indices[who] += 1;
            self.links[who] = Link::new(self.sessions);
            self.say(who);
        }

        fn deliver(&mut self, to: usize, which: usize, again: bool) {
            let queue = &mut self.in_flight[to];
            if queue.is_empty() {
                return;
            }
            let at = which % queue.len();
            let hello = if again { queue[at].clone() } else { queue.remove(at).unwrap() };
            let reaction = self.links[to].on_hello(&hello);
            if reaction.answer {
                self.say(to);
            }
        }
    }

    proptest! {
        // Each is short, and the orders that matter are rare.
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn both_sides_agree_in_the_end(steps in prop::collection::vec((0usize..2, 0usize..8, 0u8..10), 0..60)) {
            let mut pair = Pair::new();
            for (who, which, what) in steps {
                match what {
                    0 => pair.remove_and_add(who),
                    1 => pair.deliver(who, which, true),
                    _ => pair.deliver(who, which, false),
                }
            }
            let mut rounds = 0;
            while !pair.in_flight.iter().all(VecDeque::is_empty) {
                pair.deliver(rounds % 2, rounds, false);
                rounds += 1;
                prop_assert!(rounds < 1000, "the handshake does not come to rest");
            }
            for who in 0..2 {
                let theirs = pair.links[who].ready().expect("every hello was delivered");
                prop_assert_eq!(theirs.session, pair.links[1 - who].session());
                prop_assert_eq!(theirs.index, pair.indices[1 - who]);
            }
        }
    }

    #[test]
    fn two_links_that_know_older_sessions_of_each_other_come_to_rest() {
        let hello = |session, peer_session| Handshake {
            index: 1,
            name: b"x".to_vec(),
            conn: None,
            extension: Some(HandshakeExtension {
                session,
                peer_session,
                answer_wanted: true,
                retired: [0; 2],
            }),
        };
        let mut links = [Link::new(13), Link::new(12)];
        links[0].on_hello(&hello(9, 0));
        links[1].on_hello(&hello(11, 0));
        let mut to = 1;
        for _ in 0..10 {
            let said = Handshake { extension: Some(links[1 - to].extension()), ..hello(1, 0) };
            if !links[to].on_hello(&said).answer {
                break;
            }
            to = 1 - to;
        }
        assert_eq!(links.map(|link| link.ready().map(|theirs| theirs.session)), [Some(12), Some(13)]);
    }

    #[test]
    fn a_stock_hello_is_answered_when_it_brings_its_address() {
        let mut link = Link::new(1);
        let mut hello = Handshake { index: 7, name: b"s".to_vec(), conn: None, extension: None };
        assert_eq!(link.on_hello(&hello), Reaction::default());
        assert_eq!(link.theirs(), Some(Theirs { session: 0, index: 7 }));
        hello.conn = Some(vec![1]);
        assert!(link.on_hello(&hello).answer);
    }

    #[test]
    fn a_stock_peer_that_adds_us_again_keeps_what_it_has_sent() {
        let mut link = Link::new(1);
        let mut hello = Handshake { index: 7, name: b"s".to_vec(), conn: Some(vec![1]), extension: None };
        link.on_hello(&hello);
        hello.index = 8;
        let answer_only = Reaction { answer: true, ..Reaction::default() };
        assert_eq!(link.on_hello(&hello), answer_only);
        assert_eq!(link.ready(), Some(Theirs { session: 0, index: 8 }));
    }

    #[test]
    fn a_remembered_index_serves_until_the_peer_gives_another() {
        let mut link = Link::resumed(1, 7);
        assert_eq!(link.ready(), Some(Theirs { session: 0, index: 7 }));
        assert!(link.wants_conn(), "it may have removed us meanwhile");
        let hello = Handshake { index: 8, name: b"s".to_vec(), conn: None, extension: None };
        assert_eq!(link.on_hello(&hello), Reaction::default());
        assert_eq!(link.ready(), Some(Theirs { session: 0, index: 8 }));
        assert!(!link.wants_conn());
    }
}
