//! Notifications: what was sent, and what may come of it.

use nixl_libfabric::types::AgentName;

use super::{Note, Play, outcome};

impl Play {
    pub(super) fn send_notification(&mut self) {
        let Some((i, j)) = self.pick_pair() else { return };
        self.notify(i, j);
    }

    pub(super) fn notify(&mut self, i: usize, j: usize) -> Option<usize> {
        let id = self.new_note(i, j, None);
        let bytes = self.notes[id as usize - 1].bytes.clone();
        let name = self.agents[j].name.clone();
        let answer = self.engine(i).expect("awake").send_notification(&name, &bytes);
        self.note(format!("{i} notifies {j}, note {id} of {} bytes: {}", bytes.len(), outcome(&answer)));
        self.has_failed();
        match answer {
            Ok(()) => {
                self.notes[id as usize - 1].promised = true;
                Some(id as usize - 1)
            }
            Err(e) => {
                if !self.disturbed[i][j] {
                    self.breach(format!("{i} cannot notify {j}, and nothing is wrong between them: {e}"));
                }
                None
            }
        }
    }

    pub(super) fn take_notifications(&mut self, i: usize) {
        if !self.is_awake(i) {
            return;
        }
        let taken = self.engine(i).expect("awake").take_notifications();
        match taken {
            Ok(taken) => {
                for (from, bytes) in taken {
                    self.received(i, &from, &bytes);
                }
            }
            Err(e) => self.breach(format!("{i} cannot take notifications: {e}")),
        }
    }

    pub(super) fn received(&mut self, i: usize, from: &AgentName, bytes: &[u8]) {
        self.summary.notifications += 1;
        let id = bytes.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
        self.note(format!("{i} gets note {id} of {from}"));
        let Some(note) = (id as usize).checked_sub(1).and_then(|at| self.notes.get_mut(at)) else {
            self.breach(format!("{i} got a notification of {} bytes that nobody sent", bytes.len()));
            return;
        };
        note.received += 1;
        let (count, whole) = (note.received, note.bytes == bytes);
        let right = note.to == i && self.agents[note.from].name == *from && note.runs.1 == self.agents[i].run;
        let current = note.runs.0 == self.agents[note.from].run;
        let xfer = note.xfer;
        if count > 1 {
            self.breach(format!("note {id} came {count} times"));
        }
        if !whole {
            self.breach(format!("note {id} is not what was sent"));
        }
        if !right {
            self.breach(format!("note {id} came to {i}, from {from}"));
        }
        if let Some((index, posts)) = xfer.filter(|_| current && right)
            && self.xfers[index].posts == posts
        {
            self.check_bytes(index, "notified");
        }
    }

    /// A notification that was promised, and that nothing excuses from coming.
    pub(super) fn is_owed(&self, note: &Note) -> bool {
        note.promised
            && note.received == 0
            && !self.disturbed[note.from][note.to]
            && note.runs == (self.agents[note.from].run, self.agents[note.to].run)
            && self.agents[note.to].engine.is_some()
    }

    /// The first try may be refused: it tells the user that something was wrong.
    pub(super) fn notification_gets_through(&mut self, i: usize, j: usize) -> bool {
        let mut said = false;
        for _ in 0..5 {
            if let Some(id) = self.notify(i, j) {
                said = true;
                if self.run_until(200, |play| play.notes[id].received > 0) {
                    return true;
                }
            }
            self.run_until(2_000, |play| play.in_flight().is_empty());
            for _ in 0..100 {
                self.round();
            }
        }
        let receives = self.world.state().receives_posted(self.agents[j].host);
        self.breach(format!(
            "no notification of {i} reaches {j} any more, though both live; accepted: {said}, receives posted there: {receives:?}"
        ));
        false
    }
}
