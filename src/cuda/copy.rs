//! Copies on a stream of our own, polled by whoever drives progress, and page-locked host memory.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::kernel::{Kernel, Table};
use super::{Context, Mapping, describe};
use crate::error::{Error, Result};
use crate::fabric::{KeptMemory, MemoryRange};
use crate::sys::cuda::{self as sys, CUcontext, CUevent, CUstream};

/// Most bytes of one page-locked buffer.
pub const PINNED_BYTES_MAX: usize = 1 << 30;

/// Shorter pieces are copied by a kernel of ours, where there are several: each copy that the driver queues costs some 2 us of a
/// processor and leaves the GPU idle for as long, and an H200 moves 4 MB meanwhile (2.1 TB/s within it).
/// `plugin-tests/gpu` has a sweep (`cases.py sweep`) to set it from.
const KERNEL_PIECE_BYTES_MAX: u64 = 4 << 20;

/// Fewer pieces than this are left to the driver, whatever their length: a launch costs as much as a copy or two.
const KERNEL_PIECES_MIN: usize = 4;

/// Tables of the kernel that a stream keeps for reuse: page-locking memory takes longer than most copies.
const IDLE_TABLES_MAX: usize = 4;

/// Most idle events that a stream keeps for reuse.
const IDLE_EVENTS_MAX: usize = 64;

/// Most copies dropped while in flight; one more waits for the stream to empty.
const ABANDONED_MAX: usize = 1024;

/// Bytes at each end of a range that are read to see whether it can be reached, and how long that may take: a GPU that is busy
/// copies in between.
const TRIED_BYTES: u64 = 16;
const TRY_MS_MAX: u64 = 1000;

/// How long the end of a stream waits for its copies: far more than any copy takes, so running into it means that the
/// device is lost.
const DRAIN_MS_MAX: u64 = 10_000;

/// What a copy needs until it is over.
pub type Owner = Arc<dyn fmt::Debug + Send + Sync>;

/// A range of host or device memory to copy from or to.
///
/// One of the user's memory lies within a [`MemoryRange`], which stands for the promise that it stays allocated until copies that
/// name it are done. One of a [`Pinned`] buffer or of a [`Mapping`] keeps that by itself.
#[derive(Debug, Clone)]
pub struct Span {
    addr: u64,
    len: u64,
    owner: Option<Owner>,
    /// The context whose kernels may touch it; NULL where none is known.
    kernels: CUcontext,
}

impl Span {
    /// The `len` bytes at `addr` of registered memory. `InvalidParam` if they are not within it, or start at zero.
    pub fn registered(memory: MemoryRange, addr: u64, len: u64) -> Result<Self> {
        if addr == 0 || !memory.contains(addr, len) {
            let (start, bytes) = (memory.addr(), memory.len());
            return Err(Error::invalid(format!("{addr:#x}+{len:#x} is not within {start:#x}+{bytes:#x}")));
        }
        Ok(Self { addr, len, owner: None, kernels: CUcontext::NULL })
    }

    /// A part of a mapping, which it keeps.
    pub(super) fn mapped(mapping: &Arc<Mapping>, addr: u64, len: u64) -> Self {
        let kernels = mapping.context().handle();
        Self { addr, len, owner: Some(Arc::clone(mapping) as Owner), kernels }
    }

    /// The same, of which it is known that [kernels](super::Cuda::kernels_reach) of this context may touch it.
    #[must_use]
    pub fn with_kernels_of(self, context: &Context) -> Self {
        Self { kernels: context.handle(), ..self }
    }

    /// `len` bytes of this range from `offset` on. `InvalidParam` if they leave it.
    pub fn part(&self, offset: u64, len: u64) -> Result<Self> {
        self.check_part(offset, len)?;
        Ok(Self { addr: self.addr + offset, len, owner: self.owner.clone(), kernels: self.kernels })
    }

    fn check_part(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::invalid(format!("bytes {offset}+{len} are not within a range of {}", self.len))),
        }
    }

    /// Reads its first and its last bytes by a copy in this context: whether it can be reached at all.
    pub fn try_reading(&self, context: &Context) -> Result<()> {
        let len = self.len.min(TRIED_BYTES);
        let (buffer, stream) = (Pinned::new(context, 2 * TRIED_BYTES as usize)?, Stream::new(context)?);
        let mut batch = Batch::default();
        batch.add(&buffer.span(), 0, self, 0, len)?;
        batch.add(&buffer.span(), len, self, self.len - len, len)?;
        stream.start(batch)?.wait(Duration::from_millis(TRY_MS_MAX))
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A piece to copy, within what a [`Batch`] keeps.
#[derive(Debug, Clone, Copy)]
struct Piece {
    to: u64,
    from: u64,
    len: u64,
    /// The context whose kernels may touch both ends.
    kernels: CUcontext,
}

impl Piece {
    /// Whether a kernel copies it, where there are several.
    fn is_small(&self) -> bool {
        !self.kernels.is_null() && self.len < KERNEL_PIECE_BYTES_MAX
    }
}

/// Pieces to be copied in one go.
#[derive(Debug, Default)]
pub struct Batch {
    pieces: Vec<Piece>,
    keep: Keep,
    /// Pieces that a kernel copies, if it can.
    small: usize,
}

impl Batch {
    /// One with room for so many pieces.
    pub fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), keep: Keep::new(), small: 0 }
    }

    /// Adds `len` bytes: from an offset in `from` to one in `to`. `InvalidParam` if they leave either.
    pub fn add(&mut self, to: &Span, to_offset: u64, from: &Span, from_offset: u64, len: u64) -> Result<()> {
        to.check_part(to_offset, len)?;
        from.check_part(from_offset, len)?;
        for owner in [&to.owner, &from.owner].into_iter().flatten() {
            // Few different ones, and mostly the last.
            if !self.keep.iter().rev().any(|known| Arc::ptr_eq(known, owner)) {
                self.keep.push(Arc::clone(owner));
            }
        }
        let kernels = if to.kernels == from.kernels { to.kernels } else { CUcontext::NULL };
        let piece = Piece { to: to.addr + to_offset, from: from.addr + from_offset, len, kernels };
        if len > 0 {
            self.small += usize::from(piece.is_small());
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Keeps something until the copies are over, and longer than what was added before.
    pub fn keep(&mut self, owner: Owner) {
        self.keep.push(owner);
    }

    /// How many of its pieces the driver copies, one by one, on a stream that [has a kernel](Stream::has_kernel) or none.
    pub fn singles(&self, has_kernel: bool) -> usize {
        self.pieces.len() - if has_kernel { self.small } else { 0 }
    }

    /// How many pieces it has.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

/// A stream of our own: its copies wait for no work of the application, not even for the legacy default stream.
///
/// When the last use is dropped it waits for the copies that are queued.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    context: Context,
    stream: CUstream,
    events: Mutex<Events>,
    /// Our kernel, once a batch has wanted it; `None` where it cannot be loaded.
    kernel: OnceLock<Option<Kernel>>,
    /// The kernel could not be launched.
    is_kernel_broken: AtomicBool,
}

/// What a stream has that no [`InFlight`] holds.
#[derive(Default)]
struct Events {
    idle: Vec<CUevent>,
    tables: Vec<Table>,
    /// Copies whose [`InFlight`] was dropped while they flew, oldest first, and the buffers they need until they are done.
    abandoned: VecDeque<(CUevent, Keep)>,
}

/// Page-locked buffers and mappings that copies in flight name.
type Keep = Vec<Owner>;

impl Stream {
    /// A stream in a context. For copies between devices, a context of the source.
    pub fn new(context: &Context) -> Result<Self> {
        let cuda = context.cuda();
        let mut stream = CUstream::NULL;
        // SAFETY: writes one handle.
        let rc = context
            .with(|| unsafe { (cuda.api().stream_create)(&raw mut stream, sys::STREAM_NON_BLOCKING) })?;
        cuda.check("cuStreamCreate", rc)?;
        Ok(Self(Arc::new(Inner {
            context: context.clone(),
            stream,
            events: Mutex::default(),
            kernel: OnceLock::new(),
            is_kernel_broken: AtomicBool::new(false),
        })))
    }

    /// Starts one copy. See [`Stream::copy_all`].
    pub fn copy(&self, dst: Span, src: Span) -> Result<InFlight> {
        self.copy_all([(dst, src)])
    }

    /// Starts copies from the second span of each pair to the first. See [`Stream::start`].
    pub fn copy_all(&self, pairs: impl IntoIterator<Item = (Span, Span)>) -> Result<InFlight> {
        let mut batch = Batch::default();
        for (to, from) in pairs {
            if to.len != from.len {
                return Err(Error::invalid(format!("a copy of {} bytes into {}", from.len, to.len)));
            }
            batch.add(&to, 0, &from, 0, to.len)?;
        }
        self.start(batch)
    }

    /// Starts the copies of a batch; one poll tells when all are done.
    ///
    /// Host memory that is not page-locked works, but the call then does the copy itself. An error means that nothing
    /// is in flight; what fails once something is in flight is told by the [`InFlight`] when that has ended.
    pub fn start(&self, batch: Batch) -> Result<InFlight> {
        self.0.context.with(|| self.start_here(batch))?
    }

    /// Whether it copies many small pieces at once. Asked first, it loads what that takes.
    pub fn has_kernel(&self) -> bool {
        self.0.kernel().is_some()
    }

    fn start_here(&self, batch: Batch) -> Result<InFlight> {
        let event = self.0.take_event()?;
        let Batch { mut pieces, keep, .. } = batch;
        let mut copy = InFlight {
            stream: self.clone(),
            event,
            state: State::Flying,
            failed: None,
            keep,
            tables: Vec::new(),
        };
        let mut queued = self.0.queue_small(&mut pieces, &mut copy.tables);
        for piece in pieces {
            match self.0.queue(&piece) {
                Ok(()) => queued = true,
                Err(why) if !queued => {
                    copy.state = State::Ended;
                    return Err(why);
                }
                Err(why) => {
                    copy.failed = Some(why);
                    break;
                }
            }
        }
        // SAFETY: both handles are ours and live.
        let rc = unsafe { (self.0.context.cuda().api().event_record)(event, self.0.stream) };
        if let Err(why) = self.0.context.cuda().check("cuEventRecord", rc) {
            // Without an event only the end of the whole stream tells that the copies are over.
            copy.state = State::Ended;
            if let Err(stuck) = self.0.drain() {
                self.0.leak(copy.take_keep());
                return Err(stuck);
            }
            return Err(why);
        }
        Ok(copy)
    }

    /// Copies and waits, at most `timeout`. On a timeout the copy goes on, and the stream's end waits for it.
    pub fn copy_wait(&self, dst: Span, src: Span, timeout: Duration) -> Result<()> {
        self.copy(dst, src)?.wait(timeout)
    }

    /// The context of the stream.
    pub fn context(&self) -> &Context {
        &self.0.context
    }
}

impl Inner {
    /// Queues one copy. Runs in the stream's context.
    fn queue(&self, piece: &Piece) -> Result<()> {
        let cuda = self.context.cuda();
        // SAFETY: the driver finds by itself what kind of memory the addresses are. They are within ranges whose makers
        // promised that they stay allocated (`MemoryRange::assume_registered`), or whose owners are kept; nothing here holds
        // a reference to the bytes.
        let rc = unsafe { (cuda.api().memcpy_async)(piece.to, piece.from, piece.len as usize, self.stream) };
        cuda.check("cuMemcpyAsync", rc).map_err(|e| {
            e.context(format!("copying {} bytes from {:#x} to {:#x}", piece.len, piece.from, piece.to))
        })
    }

    /// Has the kernel copy the small ones, if they are many, and takes them out. Whether anything was queued. What it could not
    /// do is left: to copy the same bytes again does no harm. Runs in the stream's context.
    fn queue_small(&self, pieces: &mut Vec<Piece>, tables: &mut Vec<Table>) -> bool {
        let own = self.context.handle();
        let is_small = |piece: &Piece| piece.kernels == own && piece.is_small();
        if pieces.len() < KERNEL_PIECES_MIN
            || pieces.iter().filter(|p| is_small(p)).count() < KERNEL_PIECES_MIN
        {
            return false;
        }
        let Some(kernel) = self.kernel() else { return false };
        match self.launch(kernel, pieces.iter().filter(|p| is_small(p)), tables) {
            Ok(()) => pieces.retain(|piece| !is_small(piece)),
            Err(why) => {
                self.is_kernel_broken.store(true, Ordering::Relaxed);
                let ordinal = self.context.device().ordinal;
                log::warn!("CUDA device {ordinal}: small pieces are copied one by one from now on: {why}");
            }
        }
        !tables.is_empty()
    }

    fn launch<'a>(
        &self,
        kernel: &Kernel,
        pieces: impl Iterator<Item = &'a Piece>,
        tables: &mut Vec<Table>,
    ) -> Result<()> {
        let mut table = self.take_table()?;
        for piece in pieces {
            let mut done = 0;
            while done < piece.len {
                let added = table.add(piece.to + done, piece.from + done, piece.len - done);
                if added == 0 {
                    self.launch_table(kernel, table, tables)?;
                    table = self.take_table()?;
                }
                done += added;
            }
        }
        self.launch_table(kernel, table, tables)
    }

    fn launch_table(&self, kernel: &Kernel, mut table: Table, tables: &mut Vec<Table>) -> Result<()> {
        table.publish()?;
        // SAFETY: the caller keeps the table until the copies are over, as it does with the memory that the pieces name, and only
        // pieces of which somebody has said that kernels of this context reach them are in it.
        unsafe { kernel.launch(self.stream, &table) }?;
        tables.push(table);
        Ok(())
    }

    /// The kernel, loaded at the first call; `None` where that or a launch has failed.
    fn kernel(&self) -> Option<&Kernel> {
        let load = || match Kernel::load(&self.context) {
            Ok(kernel) => Some(kernel),
            Err(why) => {
                let ordinal = self.context.device().ordinal;
                log::info!("CUDA device {ordinal}: small pieces are copied one by one: {why}");
                None
            }
        };
        self.kernel.get_or_init(load).as_ref().filter(|_| !self.is_kernel_broken.load(Ordering::Relaxed))
    }

    fn take_table(&self) -> Result<Table> {
        let used = self.events().tables.pop();
        used.map_or_else(|| Table::new(&self.context), Ok)
    }

    fn give_tables(&self, tables: Vec<Table>) {
        for mut table in tables {
            table.clear();
            let mut events = self.events();
            if events.tables.len() < IDLE_TABLES_MAX {
                events.tables.push(table);
            }
        }
    }

    /// An event to record, a used one if possible. Runs in the stream's context.
    fn take_event(&self) -> Result<CUevent> {
        let abandoned = self.settle_abandoned();
        if abandoned >= ABANDONED_MAX {
            self.drain()?;
            self.settle_abandoned();
        }
        if let Some(event) = self.events().idle.pop() {
            return Ok(event);
        }
        let cuda = self.context.cuda();
        let mut event = CUevent::NULL;
        // SAFETY: writes one handle.
        let rc = unsafe { (cuda.api().event_create)(&raw mut event, sys::EVENT_DISABLE_TIMING) };
        cuda.check("cuEventCreate", rc)?;
        Ok(event)
    }

    /// Lets go of the abandoned copies that are done; returns how many are left. Runs in the stream's context.
    fn settle_abandoned(&self) -> usize {
        let mut events = self.events();
        while let Some((event, _)) = events.abandoned.front() {
            // SAFETY: the handle is ours and live.
            if unsafe { (self.context.cuda().api().event_query)(*event) } != sys::SUCCESS {
                break;
            }
            let Some((event, keep)) = events.abandoned.pop_front() else { break };
            drop(events);
            drop(keep);
            self.give_event(event);
            events = self.events();
        }
        events.abandoned.len()
    }

    fn give_event(&self, event: CUevent) {
        let mut events = self.events();
        if events.idle.len() < IDLE_EVENTS_MAX {
            events.idle.push(event);
            return;
        }
        drop(events);
        self.report(self.context.with(|| self.destroy_event(event)));
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn destroy_event(&self, event: CUevent) -> Result<()> {
        let cuda = self.context.cuda();
        // SAFETY: the handle is ours, live, and given up here. An event that has not happened yet is freed when it has.
        cuda.check("cuEventDestroy", unsafe { (cuda.api().event_destroy)(event) })
    }

    /// Waits until the stream is empty. Runs in the stream's context.
    fn drain(&self) -> Result<()> {
        let cuda = self.context.cuda();
        poll_until(Duration::from_millis(DRAIN_MS_MAX), || {
            // SAFETY: the handle is ours and live.
            match unsafe { (cuda.api().stream_query)(self.stream) } {
                sys::ERROR_NOT_READY => Ok(false),
                rc => cuda.check("cuStreamQuery", rc).map(|()| true),
            }
        })
    }

    /// Gives up buffers that a lost device might write still.
    fn leak(&self, keep: Keep) {
        if !keep.is_empty() {
            let ordinal = self.context.device().ordinal;
            log::error!(
                "CUDA device {ordinal}: copies did not end; {} page-locked buffers and mappings are lost",
                keep.len()
            );
            std::mem::forget(keep);
        }
    }

    fn report(&self, outcome: Result<Result<()>>) {
        if let Err(why) = outcome.and_then(|inner| inner) {
            log::warn!("copy stream of CUDA device {}: {why}", self.context.device().ordinal);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Events { idle, abandoned, tables } = std::mem::take(&mut *self.events());
        let (flying, keeps): (Vec<CUevent>, Vec<Keep>) = abandoned.into_iter().unzip();
        let drained = self.context.with(|| self.drain()).and_then(|drained| drained);
        if drained.is_err() {
            self.leak(keeps.into_iter().flatten().collect());
        }
        self.report(Ok(drained));
        drop(tables);
        let outcome = self.context.with(|| {
            for event in idle.into_iter().chain(flying) {
                self.report(Ok(self.destroy_event(event)));
            }
            let cuda = self.context.cuda();
            // SAFETY: the handle is ours, live, and given up here.
            cuda.check("cuStreamDestroy", unsafe { (cuda.api().stream_destroy)(self.stream) })
        });
        self.report(outcome);
    }
}

/// Copies in flight. Dropping it early leaves them running; the stream keeps what they need.
#[must_use = "the copy is done when it says so"]
pub struct InFlight {
    stream: Stream,
    event: CUevent,
    state: State,
    failed: Option<Error>,
    keep: Keep,
    tables: Vec<Table>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Flying,
    /// The event has happened, or stands for nothing.
    Ended,
    /// The driver cannot tell: the copies may be in flight or not.
    Lost,
}

impl InFlight {
    /// Whether the copies are done. Never blocks. An error is final: one of the copies failed and the others are over, or
    /// the driver reports a fault of the device, after which only the end of the stream tells that nothing is in flight.
    pub fn is_done(&mut self) -> Result<bool> {
        if self.state == State::Flying {
            let context = &self.stream.0.context;
            // SAFETY: the handle is ours and live.
            let rc = context.with(|| unsafe { (context.cuda().api().event_query)(self.event) })?;
            if rc == sys::ERROR_NOT_READY {
                return Ok(false);
            }
            if let Err(why) = context.cuda().check("cuEventQuery", rc) {
                self.failed.get_or_insert(why);
                self.state = State::Lost;
            } else {
                self.state = State::Ended;
                // In order: a mapping ends before what allows it.
                self.keep.clear();
                self.stream.0.give_tables(std::mem::take(&mut self.tables));
            }
        }
        self.failed.clone().map_or(Ok(true), Err)
    }

    /// Everything that the copies need.
    fn take_keep(&mut self) -> Keep {
        let mut keep = std::mem::take(&mut self.keep);
        keep.extend(std::mem::take(&mut self.tables).into_iter().map(|table| Arc::new(table) as Owner));
        keep
    }

    /// Waits until the copies are done, at most `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<()> {
        poll_until(timeout, || self.is_done())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        match self.state {
            State::Ended => self.stream.0.give_event(self.event),
            State::Flying | State::Lost => {
                let keep = self.take_keep();
                self.stream.0.events().abandoned.push_back((self.event, keep));
            }
        }
    }
}

/// Polls until done, at most `limit`: a few times at once, then with pauses that grow to a millisecond.
fn poll_until(limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    let mut pause_us = 1;
    for round in 0_u32.. {
        if done()? {
            return Ok(());
        }
        if start.elapsed() >= limit {
            break;
        }
        if round < 64 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(pause_us));
            pause_us = (pause_us * 2).min(1000);
        }
    }
    Err(Error::backend(format!("GPU copies not done after {} ms", limit.as_millis())))
}

/// Page-locked host memory, which a GPU copies from and to at full speed and asynchronously.
///
/// The GPU and the NIC write it, so it is no slice: [`Pinned::read`] and [`Pinned::write`] copy. It is freed when it and
/// the copies that name it are gone.
pub struct Pinned(Arc<Memory>);

struct Memory {
    context: Context,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns plain memory that is not bound to a thread; Rust accesses it by the copies of `Pinned` alone.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared `Pinned` only reads, and writing takes an exclusive one.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.base, self.len)
    }
}

impl Pinned {
    /// `len` bytes, at most [`PINNED_BYTES_MAX`], zeroed, page-locked for every context.
    pub fn new(context: &Context, len: usize) -> Result<Self> {
        if len == 0 || len > PINNED_BYTES_MAX {
            let what = format!("a page-locked buffer of {len} bytes (1 to {PINNED_BYTES_MAX} are possible)");
            return Err(Error::invalid(what));
        }
        let cuda = context.cuda();
        let mut base: *mut c_void = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let rc = context.with(|| unsafe {
            (cuda.api().mem_host_alloc)(&raw mut base, len, sys::MEMHOSTALLOC_PORTABLE)
        })?;
        cuda.check("cuMemHostAlloc", rc).map_err(|e| e.context(format!("page-locking {len} bytes")))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| Error::backend("cuMemHostAlloc succeeded without memory"))?;
        // SAFETY: `len` bytes at `base` were allocated just now and are ours alone.
        unsafe { base.write_bytes(0, len) };
        Ok(Self(Arc::new(Memory { context: context.clone(), base, len })))
    }

    /// The whole buffer. Copies keep it; whoever hands its address to a NIC keeps it for as long as that takes.
    pub fn span(&self) -> Span {
        let (addr, len) = (self.0.base.as_ptr() as u64, self.0.len as u64);
        Span { addr, len, owner: Some(self.0.clone() as Owner), kernels: CUcontext::NULL }
    }

    /// Copies bytes from `offset` on out of the buffer. `InvalidParam` if they leave it.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: the range is within the buffer, which lives; `into` is Rust memory and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into the buffer from `offset` on. `InvalidParam` if they leave it.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: as in `read`; the exclusive borrow keeps other writes of ours away.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Where `len` bytes from `offset` on begin, if they are within the buffer.
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        self.span().part(offset as u64, len as u64)?;
        // SAFETY: the offset is at most the length of the buffer.
        Ok(unsafe { self.0.base.as_ptr().add(offset) })
    }
}

// SAFETY: the buffer is allocated once, never moves and is freed by `Memory::drop` alone; nothing refers to its bytes.
unsafe impl KeptMemory for Pinned {
    fn addr(&self) -> u64 {
        self.0.base.as_ptr() as u64
    }

    fn len(&self) -> u64 {
        self.0.len as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let cuda = self.context.cuda();
        // SAFETY: allocated by `Pinned::new`, freed once: the last of the buffer and of the copies that name it is gone.
        let freed = self.context.with(|| unsafe { (cuda.api().mem_free_host)(self.base.as_ptr().cast()) });
        match freed {
            Ok(sys::SUCCESS | sys::ERROR_DEINITIALIZED) => {}
            Ok(rc) => log::warn!("cuMemFreeHost: {}", describe(cuda.api(), rc)),
            Err(why) => log::warn!("freeing page-locked memory: {why}"),
        }
    }
}
