//! Notifications: reassembly and the inbox.
