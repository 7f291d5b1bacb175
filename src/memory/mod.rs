//! Registrations and remote keys.
