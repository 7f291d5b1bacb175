//! One end of a test: does what it reads from its input, a command a line, and answers each with a line after `> `.
//!
//! ```text
//! open DEVICE FABRIC [CQ-ENTRIES]        -> ok NAME-IN-HEX
//! connect NAME-IN-HEX           -> ok
//! buffer LENGTH                 -> ok KEY BASE              buffers and peers are numbered from 0
//! free BUFFER                   -> ok      deregisters and frees it; a small one takes its number
//! swap BUFFER BUFFER            -> ok
//! fill BUFFER SEED              -> ok
//! check BUFFER OFFSET LENGTH SEED|zeros  -> ok | differs at N
//! send PEER BUFFER OFFSET LENGTH IMM|-
//! write PEER BUFFER OFFSET LENGTH KEY ADDRESS IMM|-
//! read PEER BUFFER OFFSET LENGTH KEY ADDRESS       -> ok     all three when posted
//! batch COUNT PEER BUFFER OFFSET LENGTH KEY ADDRESS -> ok     so many such writes, all but the last with FI_MORE
//! recv BUFFER OFFSET LENGTH     -> ok
//! wait SENT ARRIVED MS          -> ok SENT ARRIVED what has completed since the last wait, each as
//!                                  `t:PROVIDER-ERROR` or `r:IMM:LENGTH:PROVIDER-ERROR`
//! gpu LENGTH                    -> ok KEY BASE              the only GPU memory; `gpu` is its name as a BUFFER of write and read
//! gpu-fill SEED                 -> ok
//! gpu-check SEED                -> ok | differs at N
//! sleep MS                      -> ok | slept   blocks on the queue's descriptor until something arrives
//! ```

use std::fmt::Write as _;
use std::io::{BufRead, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nixl_libfabric::fabric::{
    Completion, Domain, Endpoint, EndpointOptions, Fabric, FabricError, FiAddr, Hmem, Libfabric, MemoryRange,
    MemoryRegion, Posted, Query, Recv, RegisteredBuffer, RmaList, Send, Slice, Way,
};
use nixl_libfabric::types::Op;

use super::gpu::{Gpu, Kind};

/// Operations in flight at a time.
const CONTEXTS: u32 = 4096;
/// How long a post is tried.
const POST_MAX: Duration = Duration::from_secs(20);

struct Side {
    endpoint: Endpoint,
    buffers: Vec<RegisteredBuffer>,
    /// With its address and length.
    gpu: Option<(MemoryRegion, u64, usize)>,
    domain: Arc<Domain>,
    peers: Vec<FiAddr>,
    done: Vec<Completion>,
    next_context: u32,
    next_share: u32,
}

type Answer = Result<String, String>;

/// Answers until the input ends.
pub fn run() {
    let mut side = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("input");
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match (words.as_slice(), &mut side) {
            (["open", device, fabric, rest @ ..], none) => {
                open(device, fabric, rest.first()).map(|(new, name)| {
                    *none = Some(new);
                    name
                })
            }
            (words, Some(side)) => side.command(words),
            _ => Err("open first".to_owned()),
        };
        let answer = answer.map_or_else(|error| format!("error {error}"), |text| format!("ok {text}"));
        let mut out = std::io::stdout().lock();
        writeln!(out, "> {}", answer.replace('\n', " ")).expect("output");
        out.flush().expect("output");
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("{word} is no number"))
}

fn open(device: &str, fabric: &str, cq_entries: Option<&&str>) -> Result<(Side, String), String> {
    let path = std::env::var_os("PEER_LIBFABRIC");
    let library = Libfabric::load(path.as_deref().map(std::path::Path::new)).map_err(text)?;
    let query = Query { provider: Some("efa".into()), fabric: Some(fabric.into()), ..Query::default() };
    let devices = library.discover(&query).map_err(text)?;
    let device = devices.get(number(device)? as usize).ok_or(format!("{} devices", devices.len()))?;
    let fabric = Fabric::open(&library, device).map_err(text)?;
    let domain = Domain::open(&fabric, device).map_err(text)?;
    let cq_entries = cq_entries.map_or(Ok(0), |entries| number(entries))? as usize;
    let options =
        EndpointOptions { buffers: CONTEXTS, operations: CONTEXTS, cq_entries, ..EndpointOptions::default() };
    let endpoint = Endpoint::open(&domain, device, &options).map_err(text)?;
    let name = endpoint.name().map_err(text)?.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("string");
        hex
    });
    let (buffers, peers, done) = (Vec::new(), Vec::new(), Vec::new());
    Ok((Side { endpoint, buffers, gpu: None, domain, peers, done, next_context: 0, next_share: 0 }, name))
}

/// The byte that a buffer filled with `seed` has at `index`.
fn byte(seed: u64, index: usize) -> u8 {
    let mixed = (seed ^ index as u64 >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (8 * (index & 7))) as u8 ^ index as u8
}

impl Side {
    fn command(&mut self, words: &[&str]) -> Answer {
        match words {
            ["connect", name] => {
                let bytes = (0..name.len()).step_by(2).map(|at| u8::from_str_radix(&name[at..at + 2], 16));
                let name: Vec<u8> = bytes.collect::<Result<_, _>>().map_err(text)?;
                self.peers.push(self.endpoint.insert_address(&name).map_err(text)?);
                Ok(String::new())
            }
            ["buffer", length] => {
                let key = self.buffers.len() as u64;
                let buffer =
                    RegisteredBuffer::new(&self.domain, number(length)? as usize, key).map_err(text)?;
                let answer = format!("{} {}", buffer.region().key(), buffer.region().remote_base());
                self.buffers.push(buffer);
                Ok(answer)
            }
            ["free", buffer] => {
                let index = number(buffer)? as usize;
                self.buffers[index] = RegisteredBuffer::new(&self.domain, 8, 1 << 16).map_err(text)?;
                Ok(String::new())
            }
            ["swap", one, other] => {
                self.buffers.swap(number(one)? as usize, number(other)? as usize);
                Ok(String::new())
            }
            ["fill", buffer, seed] => {
                let (buffer, seed) = (number(buffer)? as usize, number(seed)?);
                let data: Vec<u8> = (0..self.buffers[buffer].len()).map(|index| byte(seed, index)).collect();
                self.buffers[buffer].copy_in(0, &data);
                Ok(String::new())
            }
            ["check", buffer, offset, length, seed] => {
                let (offset, seed) = (number(offset)? as usize, number(seed).ok());
                let data = self.buffers[number(buffer)? as usize].copy_out(offset, number(length)? as usize);
                match (0..data.len())
                    .find(|index| data[*index] != seed.map_or(0, |seed| byte(seed, offset + index)))
                {
                    Some(index) => Ok(format!("differs at {}", offset + index)),
                    None => Ok(String::new()),
                }
            }
            ["recv", buffer, offset, length] => {
                let (buffer, offset, len) =
                    (number(buffer)? as usize, number(offset)? as usize, number(length)?);
                self.post(|side, context| {
                    let buffer = &side.buffers[buffer];
                    side.endpoint.recv(&Recv { buffer, offset, len: len as usize, context })
                })
            }
            ["send", peer, buffer, offset, length, imm] => {
                let (buffer, offset, len) =
                    (number(buffer)? as usize, number(offset)? as usize, number(length)?);
                let (dest, imm) = (self.peers[number(peer)? as usize], imm.parse().ok());
                self.post(|side, context| {
                    let buffer = &side.buffers[buffer];
                    side.endpoint.send(&Send { buffer, offset, len: len as usize, imm, dest, context })
                })
            }
            ["write", peer, buffer, offset, length, key, address, imm] => {
                self.rma(Op::Write, 1, [peer, buffer, offset, length, key, address], imm.parse().ok())
            }
            ["batch", count, peer, buffer, offset, length, key, address] => {
                let count = number(count)? as usize;
                self.rma(Op::Write, count, [peer, buffer, offset, length, key, address], None)
            }
            ["read", peer, buffer, offset, length, key, address] => {
                self.rma(Op::Read, 1, [peer, buffer, offset, length, key, address], None)
            }
            ["wait", sent, arrived, limit] => {
                self.wait(number(sent)? as usize, number(arrived)? as usize, number(limit)?)
            }
            ["gpu", length] => {
                let length = number(length)? as usize;
                let address = Gpu::get().memory(Kind::Device, &[length]);
                // SAFETY: the stand-in's memory stays to the end of the process.
                let range = unsafe { MemoryRange::assume_registered(address, length as u64) };
                let region = self.domain.register(range, Hmem::System, None, 1 << 17).map_err(text)?;
                let answer = format!("{} {}", region.key(), region.remote_base());
                self.gpu = Some((region, address, length));
                Ok(answer)
            }
            ["gpu-fill", seed] => {
                let (seed, (_, address, length)) = (number(seed)?, self.gpu.as_ref().ok_or("no gpu")?);
                let data: Vec<u8> = (0..*length).map(|index| byte(seed, index)).collect();
                Gpu::get().write(*address, &data);
                Ok(String::new())
            }
            ["gpu-check", seed] => {
                let (seed, (_, address, length)) = (number(seed)?, self.gpu.as_ref().ok_or("no gpu")?);
                let data = Gpu::get().read(*address, *length);
                let differs = (0..*length).find(|index| data[*index] != byte(seed, *index));
                Ok(differs.map_or_else(String::new, |index| format!("differs at {index}")))
            }
            ["sleep", limit] => self.sleep(number(limit)?),
            _ => Err(format!("cannot {words:?}")),
        }
    }

    /// Posts so many operations alike, as one batch where there are several.
    fn rma(&mut self, op: Op, count: usize, words: [&str; 6], imm: Option<u32>) -> Answer {
        let mut numbers = [0; 6];
        for (number_of, word) in numbers.iter_mut().zip(words) {
            *number_of = if word == "gpu" { 0 } else { number(word)? };
        }
        let [peer, buffer, offset, len, key, remote_addr] = numbers;
        let dest = self.peers[peer as usize];
        let (region, local_addr) = match &self.gpu {
            Some((region, address, _)) if words[1] == "gpu" => (region.clone(), address + offset),
            _ => {
                let buffer = &self.buffers[buffer as usize];
                (buffer.region().clone(), buffer.addr_of(offset as usize))
            }
        };
        let slices = vec![Slice { local_addr, remote_addr, len: len as u32, pair: 0 }; count];
        let list = Arc::new(RmaList::new(slices, vec![Way { region, key }], 1).map_err(text)?);
        let (share, end) = (self.next_share, list.len());
        self.next_share += 1;
        self.endpoint.begin(share, list, 0, dest, imm).map_err(text)?;
        let start = Instant::now();
        let mut posted = 0;
        while posted < end {
            let outcome = self.endpoint.post_slices(share, op, posted..end, end, count > 1);
            posted += outcome.count;
            if let Some(Err(error)) = outcome.stopped {
                return Err(text(error));
            }
            self.endpoint.poll(&mut self.done).map_err(text)?;
            if start.elapsed() > POST_MAX {
                return Err("again and again".to_owned());
            }
        }
        self.endpoint.end(share);
        Ok(String::new())
    }

    fn post(&mut self, post: impl Fn(&mut Self, u32) -> Result<Posted, FabricError>) -> Answer {
        let context = self.next_context;
        self.next_context = (context + 1) % CONTEXTS;
        let start = Instant::now();
        while post(self, context).map_err(text)? == Posted::Again {
            self.endpoint.poll(&mut self.done).map_err(text)?;
            if start.elapsed() > POST_MAX {
                return Err("again and again".to_owned());
            }
        }
        Ok(String::new())
    }

    fn wait(&mut self, sent: usize, arrived: usize, limit_ms: u64) -> Answer {
        let start = Instant::now();
        loop {
            self.endpoint.poll(&mut self.done).map_err(text)?;
            let said = said(&self.done);
            let ours = said.iter().filter(|word| word.starts_with('t')).count();
            let over = start.elapsed() > Duration::from_millis(limit_ms);
            if over || (ours >= sent && said.len() - ours >= arrived) {
                self.done.clear();
                return Ok(format!("{ours} {} {}", said.len() - ours, said.join(" ")));
            }
        }
    }

    fn sleep(&mut self, limit_ms: u64) -> Answer {
        let fd = self.endpoint.wait_fd().ok_or("no descriptor")?;
        self.endpoint.poll(&mut self.done).map_err(text)?;
        if !self.done.is_empty() || !self.endpoint.try_wait() {
            return Ok(String::new());
        }
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is passed; the descriptor is the endpoint's, which lives.
        match unsafe { libc::poll(&raw mut poll, 1, limit_ms as i32) } {
            1 => Ok("slept".to_owned()),
            _ => Err("nothing woke the sleeper".to_owned()),
        }
    }
}

/// What has completed, a word each. Of a peer's write the length is not told.
fn said(done: &[Completion]) -> Vec<String> {
    let mut words = Vec::new();
    for entry in done {
        let (word, count) = match entry {
            Completion::Moved { count, .. } => ("t:0".to_owned(), *count),
            Completion::MoveFailed { error, .. } => (format!("t:{}", error.prov_code), 1),
            Completion::Sent { error, .. } => {
                (format!("t:{}", error.as_ref().map_or(0, |error| error.prov_code)), 1)
            }
            Completion::Received { len, imm, .. } => (format!("r:{}:{len}:0", imm.map_or(-1, i64::from)), 1),
            Completion::Landed { imm, count, .. } => (format!("r:{imm}:0:0"), *count),
            Completion::ReceiveFailed { error, .. } | Completion::Foreign { error } => {
                (format!("r:-1:0:{}", error.prov_code), 1)
            }
        };
        words.extend((0..count).map(|_| word.clone()));
    }
    words
}
