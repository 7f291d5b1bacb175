//! Codecs of everything that crosses the network: pure, no I/O.
