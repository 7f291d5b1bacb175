//! The trace ring: what was posted, by which thread, when, and what became of it.
//!
//! With `SOFTEFA_TRACE=1` each process keeps the last [`RECORDS_MAX`] events in a file `trace-<host>-<pid>-…` of the
//! network's directory, so that they can be read while it runs and after it was killed: `softefa-env trace FILE`.

use std::cell::Cell;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::Config;
use crate::shm::process::ProcessId;
use crate::shm::{Mapping, Shared};

/// Events kept.
pub const RECORDS_MAX: usize = 1 << 16;
const WORDS: usize = 6;

macro_rules! events {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Event { $(#[doc = $text] $name,)* }

        /// Names, by number.
        const NAMES: &[&str] = &[$($text,)*];
    };
}

events! {
    Start = "wr-start",
    Post = "post",
    Ring = "wr-complete",
    Abort = "wr-abort",
    Full = "queue-full",
    PostRecv = "post-recv",
    Send = "transmit",
    Lost = "lost",
    NotReady = "rnr",
    Arrive = "arrive",
    Piece = "piece",
    Land = "land",
    Refuse = "refuse",
    Complete = "completion",
    Poll = "polled",
    TwoPollers = "two-threads-poll",
    TwoPosters = "two-threads-post",
    Register = "register",
    Deregister = "deregister",
    Create = "create-qp",
    Destroy = "destroy-qp",
    PeerGone = "peer-gone",
    Overrun = "cq-overrun",
}

/// One event; fields that make no sense for it are 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// Own queue pair.
    pub qpn: u32,
    /// The other end's queue pair.
    pub peer_qpn: u32,
    /// Index of the device among those of this host.
    pub device: u16,
    /// [`crate::status::Op`], or 0.
    pub op: u8,
    /// [`crate::status::Status`].
    pub status: u8,
    /// Caller's work request id, or an address.
    pub id: u64,
    /// Bytes.
    pub length: u64,
    /// Immediate data, key, or offset of a piece.
    pub extra: u32,
}

/// The ring as it lies in the file.
#[repr(C)]
struct Ring {
    next: AtomicU64,
    words: [[AtomicU64; WORDS]; RECORDS_MAX],
}

// SAFETY: atomics only; a record of zeros has time 0 and is skipped.
unsafe impl Shared for Ring {}

fn ring() -> Option<&'static Mapping<Ring>> {
    static RING: OnceLock<Option<Mapping<Ring>>> = OnceLock::new();
    let open = || {
        let config = Config::get().filter(|config| config.trace)?;
        let path = config.dir.join(format!("trace-{}-{}", config.host, ProcessId::current()));
        Mapping::create(&path).map_err(|error| eprintln!("softefa: {}: {error}", path.display())).ok()
    };
    RING.get_or_init(open).as_ref()
}

/// Nanoseconds of the monotonic clock.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the result goes to this stack; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn thread_id() -> u32 {
    thread_local!(static ID: Cell<u32> = const { Cell::new(0) });
    ID.with(|id| {
        if id.get() == 0 {
            // SAFETY: gettid has no preconditions and cannot fail.
            id.set(unsafe { libc::gettid() } as u32);
        }
        id.get()
    })
}

/// Notes an event, if this process traces.
pub fn note(event: Event, record: Record) {
    let Some(ring) = ring() else { return };
    let index = ring.next.fetch_add(1, Ordering::Relaxed) as usize % RECORDS_MAX;
    let small = u64::from(event as u8) << 48
        | u64::from(record.device) << 32
        | u64::from(record.op) << 16
        | u64::from(record.status);
    let words = [
        now_ns(),
        u64::from(thread_id()) << 32 | u64::from(record.extra),
        u64::from(record.qpn) << 32 | u64::from(record.peer_qpn),
        small,
        record.id,
        record.length,
    ];
    for (slot, word) in ring.words[index].iter().zip(words) {
        slot.store(word, Ordering::Relaxed);
    }
}

/// The events of a trace file as text, oldest first.
pub fn dump(path: &Path) -> io::Result<String> {
    let ring = Mapping::<Ring>::open(path)?;
    let next = ring.next.load(Ordering::Acquire) as usize;
    let mut out = String::from("time_us thread event op dev qpn peer id length extra status\n");
    for index in next.saturating_sub(RECORDS_MAX)..next {
        let word = |at: usize| ring.words[index % RECORDS_MAX][at].load(Ordering::Relaxed);
        if word(0) == 0 {
            continue;
        }
        let name = NAMES.get((word(3) >> 48) as usize & 0xff).copied().unwrap_or("?");
        let op = ["send", "write", "read"].get((word(3) >> 16) as usize & 0xff).copied().unwrap_or("?");
        writeln!(
            out,
            "{}.{:03} {} {name} {op} {} {} {} {:x} {} {:x} {}",
            word(0) / 1000,
            word(0) % 1000,
            word(1) >> 32,
            word(3) >> 32 & 0xffff,
            word(2) >> 32,
            word(2) & 0xffff_ffff,
            word(4),
            word(5),
            word(1) & 0xffff_ffff,
            word(3) & 0xff,
        )
        .map_err(io::Error::other)?;
    }
    Ok(out)
}
