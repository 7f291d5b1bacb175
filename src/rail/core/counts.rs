//! What is counted in two places is the same in both. Looked at after each turn in builds with debug assertions: the simulator's.

use super::Core;

impl Core {
    /// Panics where two counts of one thing differ.
    pub(super) fn check_counts(&self) {
        let posted: u32 = self.shares.iter().map(|(_, share)| share.posted).sum();
        let on_buffers = self.receives.posted() + self.messages.in_flight();
        assert_eq!(
            posted + on_buffers,
            self.endpoint.in_flight(),
            "operations of shares, receives and messages; cells in flight"
        );
        let shared = self.shares.iter().filter(|(_, share)| share.is_shared());
        let shared: u32 = shared.map(|(_, share)| share.posted).sum();
        assert_eq!(shared, self.window.operations(), "operations of shared work; the window's");
        for (key, share) in &self.shares {
            assert_eq!(share.queued, self.turns.contains(&key), "share {key} is queued; it has a turn");
            let rests = self.resting.contains(&key);
            assert!(share.queued || share.posted > 0 || rests, "share {key} rests and holds nothing");
        }
        self.messages.check_counts();
        let users = self.shares.len() + self.messages.users_of_destinations();
        assert_eq!(users, self.destinations.users(), "shares and messages; users of destinations");
    }
}
