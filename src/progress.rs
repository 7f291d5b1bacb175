//! Who drives the rails, and when to sleep.
