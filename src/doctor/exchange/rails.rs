//! The endpoints of one side, and what they write and find.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::report::Written;
use super::{BLOCK_BYTES, RAILS_MAX};
use crate::error::{Error, Result};
use crate::fabric::{
    Completion, Device, Domain, Endpoint, EndpointOptions, Fabric, FabricError, FiAddr, Libfabric, Posted,
    PostedSlices, RegisteredBuffer, RmaList, Slice, Way, next_key,
};
use crate::types::Op;

/// Marks the block that one rail writes to another: what neither zeroed memory nor another pair's block has.
fn block(writer: usize, reader: usize) -> Vec<u8> {
    let seed = (writer * RAILS_MAX + reader + 1) as u64;
    let word = |at: usize| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(at as u32 % 64) ^ at as u64;
    (0..BLOCK_BYTES / 8).flat_map(|at| word(at).to_le_bytes()).collect()
}

/// The rails of this side.
pub(super) struct Rails {
    ours: Vec<Rail>,
    delivery_complete: bool,
    theirs: usize,
}

struct Rail {
    endpoint: Endpoint,
    /// Where the blocks for the other side's rails stand, one after the other.
    source: RegisteredBuffer,
    /// Where the blocks of the other side's rails arrive.
    target: RegisteredBuffer,
    peers: Vec<Peer>,
    completed: Vec<Completion>,
}

/// A rail of the other side, as one of ours reaches it.
struct Peer {
    address: FiAddr,
    /// The one write to it.
    write: Arc<RmaList>,
}

impl Rails {
    pub(super) fn open(library: &Libfabric, devices: &[Device], theirs: usize) -> Result<Self> {
        let open = |(at, device): (usize, &Device)| {
            let fabric = Fabric::open(library, device)?;
            let domain = Domain::open(&fabric, device)?;
            let options = EndpointOptions {
                want_wait_fd: false,
                operations: theirs as u32,
                ..EndpointOptions::default()
            };
            let endpoint = Endpoint::open(&domain, device, &options)?;
            let buffer = || -> Result<RegisteredBuffer> {
                let buffer = RegisteredBuffer::new(&domain, theirs * BLOCK_BYTES, next_key())?;
                buffer.region().bind(&endpoint)?;
                Ok(buffer)
            };
            let (mut source, target) = (buffer()?, buffer()?);
            for reader in 0..theirs {
                source.copy_in(reader * BLOCK_BYTES, &block(at, reader));
            }
            Ok(Rail { endpoint, source, target, peers: Vec::new(), completed: Vec::new() })
        };
        let rails = devices.iter().take(RAILS_MAX).enumerate().map(open).collect::<Result<_>>()?;
        let delivery_complete = devices.iter().all(Device::delivery_complete);
        Ok(Self { ours: rails, delivery_complete, theirs })
    }

    /// What the other side must know of each rail, in lines.
    pub(super) fn introductions(&self) -> Result<Vec<String>> {
        let introduce = |rail: &Rail| {
            let region = rail.target.region();
            Ok(format!("{}\t{:x}\t{:x}", hex(&rail.endpoint.name()?), region.remote_base(), region.key()))
        };
        self.ours.iter().map(introduce).collect()
    }

    /// Takes in one such line.
    pub(super) fn meet(&mut self, line: &str) -> Result<()> {
        let nonsense = || Error::backend(format!("`{line:.60}` introduces no rail"));
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, base, key] = fields[..] else { return Err(nonsense()) };
        let number = |text| u64::from_str_radix(text, 16).map_err(|_| nonsense());
        let (name, base, key) = (unhex(name).ok_or_else(nonsense)?, number(base)?, number(key)?);
        for (at, rail) in self.ours.iter_mut().enumerate() {
            let address = rail.endpoint.insert_address(&name)?;
            let slice = Slice {
                local_addr: rail.source.addr_of(rail.peers.len() * BLOCK_BYTES),
                // In the other side's buffer each of our rails has a block.
                remote_addr: base.checked_add((at * BLOCK_BYTES) as u64).ok_or_else(nonsense)?,
                len: BLOCK_BYTES as u32,
                pair: 0,
            };
            let way = Way { region: rail.source.region().clone(), key };
            let write = Arc::new(RmaList::new(vec![slice], vec![way], 1)?);
            rail.peers.push(Peer { address, write });
        }
        Ok(())
    }

    /// Drives all endpoints once.
    pub(super) fn poll(&mut self) -> Result<()> {
        for rail in &mut self.ours {
            rail.endpoint.poll(&mut rail.completed)?;
        }
        Ok(())
    }

    /// Writes every block to its rail of the other side, and says what became of each: [our rail][their rail].
    pub(super) fn write(&mut self, time: Duration) -> Result<Vec<Vec<Written>>> {
        let deadline = Instant::now() + time;
        let mut written: Vec<Vec<Option<Written>>> =
            self.ours.iter().map(|_| (0..self.theirs).map(|_| None).collect()).collect();
        let mut next = vec![0; self.ours.len()];
        while Instant::now() < deadline && written.iter().flatten().any(Option::is_none) {
            for (rail, (next, written)) in self.ours.iter_mut().zip(next.iter_mut().zip(&mut written)) {
                while *next < self.theirs {
                    match rail.post(*next) {
                        Ok(Posted::Yes) => {}
                        Ok(Posted::Again) => break,
                        Err(error) => written[*next] = Some(Written::Failed(error.to_string())),
                    }
                    *next += 1;
                }
            }
            self.poll()?;
            for (rail, written) in self.ours.iter_mut().zip(&mut written) {
                for completion in rail.completed.drain(..) {
                    match completion {
                        Completion::Moved { share, .. } => written[share as usize] = Some(Written::Completed),
                        Completion::MoveFailed { share, error, .. } => {
                            written[share as usize] = Some(Written::Failed(Error::from(*error).to_string()));
                        }
                        _ => {}
                    }
                }
            }
        }
        let rest =
            |rail: Vec<Option<Written>>| rail.into_iter().map(|one| one.unwrap_or(Written::Silent)).collect();
        Ok(written.into_iter().map(rest).collect())
    }

    /// Which blocks of the other side are here, whole: `1` or `0` for each, [their rail][our rail].
    pub(super) fn arrived(&mut self, time: Duration) -> Result<String> {
        // The other side's writes have completed or are given up. Where a provider cannot confirm arrival, what has
        // completed may still be on its way.
        let deadline = Instant::now() + if self.delivery_complete { Duration::ZERO } else { time };
        loop {
            self.poll()?;
            let whole = |writer: usize| {
                let is_whole = move |(reader, rail): (usize, &Rail)| {
                    rail.target.copy_out(writer * BLOCK_BYTES, BLOCK_BYTES) == block(writer, reader)
                };
                self.ours.iter().enumerate().map(is_whole)
            };
            let all: Vec<bool> = (0..self.theirs).flat_map(whole).collect();
            if all.iter().all(|whole| *whole) || Instant::now() >= deadline {
                return Ok(all.into_iter().map(|whole| if whole { '1' } else { '0' }).collect());
            }
        }
    }
}

impl Rail {
    /// Posts the write to a rail of the other side, under its number.
    fn post(&mut self, reader: usize) -> std::result::Result<Posted, FabricError> {
        let Peer { address, write } = &self.peers[reader];
        let share = reader as u32;
        self.endpoint.begin(share, Arc::clone(write), 0, *address, None)?;
        let PostedSlices { stopped, .. } = self.endpoint.post_slices(share, Op::Write, 0..1, 1, false);
        self.endpoint.end(share);
        stopped.unwrap_or(Ok(Posted::Yes))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_a_block_of_its_own() {
        let blocks: std::collections::HashSet<Vec<u8>> =
            (0..8).flat_map(|writer| (0..8).map(move |reader| block(writer, reader))).collect();
        assert!(blocks.len() == 64 && blocks.iter().all(|block| block.len() == BLOCK_BYTES));
    }

    #[test]
    fn names_go_in_hexadecimal() {
        assert_eq!(unhex(&hex(&[0, 0xab, 0xff])), Some(vec![0, 0xab, 0xff]));
        assert_eq!(unhex("abc"), None);
        assert_eq!(unhex("zz"), None);
    }
}
