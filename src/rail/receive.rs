//! The receive buffers of a rail.

use crate::error::Result;
use crate::fabric::{Domain, Endpoint, Posted, Recv, RegisteredBuffer};
use std::sync::Arc;

/// Buffers kept posted. Buffer `i` uses context `i`.
pub(super) struct Receives {
    buffer: Option<RegisteredBuffer>,
    buffers: usize,
    bytes_each: usize,
    /// Buffers that the provider would not take yet.
    unposted: Vec<u32>,
}

impl Receives {
    pub fn new(domain: &Arc<Domain>, count: u32, bytes_each: usize, key: u64) -> Result<Self> {
        let buffer = match count {
            0 => None,
            n => Some(RegisteredBuffer::new(domain, n as usize * bytes_each, key)?),
        };
        Ok(Self { buffer, buffers: count as usize, bytes_each, unposted: (0..count).rev().collect() })
    }

    pub fn registered(&self) -> Option<&RegisteredBuffer> {
        self.buffer.as_ref()
    }

    /// Copies the first `len` bytes of a buffer that the NIC has filled.
    pub fn read(&self, context: u32, len: usize) -> Vec<u8> {
        self.buffer.as_ref().map_or_else(Vec::new, |buffer| {
            buffer.copy_out(context as usize * self.bytes_each, len.min(self.bytes_each))
        })
    }

    /// Whether there are buffers, and each has come back and waits to be posted.
    pub fn are_used_up(&self) -> bool {
        self.buffers > 0 && self.unposted.len() == self.buffers
    }

    /// Buffers that the provider has.
    pub fn posted(&self) -> u32 {
        (self.buffers - self.unposted.len()) as u32
    }

    /// Gives a buffer back to be posted.
    pub fn recycle(&mut self, context: u32) {
        self.unposted.push(context);
    }

    /// Posts what is not posted, until the provider puts it off.
    pub fn post(&mut self, endpoint: &mut Endpoint) -> Result<()> {
        let Some(buffer) = &self.buffer else { return Ok(()) };
        while let Some(&context) = self.unposted.last() {
            let offset = context as usize * self.bytes_each;
            match endpoint.recv(&Recv { buffer, offset, len: self.bytes_each, context })? {
                Posted::Yes => self.unposted.pop(),
                Posted::Again => break,
            };
        }
        Ok(())
    }
}
