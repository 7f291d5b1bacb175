//! Peers, their states and the handshake.
