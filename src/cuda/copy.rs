//! Copies on a stream of our own, polled by whoever drives progress.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::Context;
use super::kernel::{Kernel, Table};
use super::span::{Batch, Keep, Owner, Piece, Span};
use crate::error::{Error, Result};
use crate::sys::cuda::{self as sys, CUevent, CUstream};

/// Fewer pieces than this are left to the driver, whatever their length: a launch costs as much as a copy or two.
const KERNEL_PIECES_MIN: usize = 4;

/// Tables of the kernel that a stream keeps for reuse: page-locking memory takes longer than most copies.
const IDLE_TABLES_MAX: usize = 4;

/// Most idle events that a stream keeps for reuse.
const IDLE_EVENTS_MAX: usize = 64;

/// Most copies dropped while in flight; one more waits for the stream to empty.
const ABANDONED_MAX: usize = 1024;

/// How long the end of a stream waits for its copies: far more than any copy takes, so running into it means that the
/// device is lost.
const DRAIN_MS_MAX: u64 = 10_000;

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
            if to.len() != from.len() {
                return Err(Error::invalid(format!("a copy of {} bytes into {}", from.len(), to.len())));
            }
            batch.add(&to, 0, &from, 0, to.len())?;
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

/// The streams on which GPUs copy, one for each context, made when first needed.
#[derive(Default)]
pub struct Streams(Mutex<Vec<Stream>>);

impl Streams {
    /// The stream of a context.
    pub fn get(&self, context: &Context) -> Result<Stream> {
        let mut streams = self.lock();
        if let Some(stream) = streams.iter().find(|stream| stream.context() == context) {
            return Ok(stream.clone());
        }
        let stream = Stream::new(context)?;
        streams.push(stream.clone());
        Ok(stream)
    }

    /// The next copy in this context gets a new stream: the application may have reset the device.
    pub fn forget(&self, context: &Context) {
        self.lock().retain(|stream| stream.context() != context);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
