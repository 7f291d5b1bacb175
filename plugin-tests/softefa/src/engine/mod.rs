//! Moves operations from post to completion.
//!
//! A process has one engine with one lock. Whoever posts or polls drives it for a moment, as the hardware would run
//! beside them; a thread of its own drives it when nobody does, keeps time, reads the control file, writes the
//! counter files and looks after peers. [`source`] is the sender's half of an operation, [`target`] the receiver's.

mod house;
mod link;
pub mod source;
pub mod state;
pub mod target;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use crate::config::Config;
use crate::queue::qp::QueuePair;
use crate::queue::work::WorkRequest;
use crate::shm::Mapping;
use crate::shm::mailbox::{self, Mailbox};
use crate::shm::process::ProcessId;
use crate::trace::now_ns;
use state::State;

/// Pieces that one drive of the engine moves at most, so that registering and closing get their turn.
const PIECES_PER_DRIVE: usize = 64;
/// Drives in a row that one poll or post makes at most.
const DRIVES_PER_CALL: usize = 4;
/// Polls this close together come from a caller that does nothing else.
const POLLING_GAP_NS: u64 = 10_000;
/// The thread leaves the work to callers who polled for one part in so many of its last nap: one that sleeps between its
/// polls is no NIC.
const POLLING_PART: u64 = 2;
/// How long the thread naps meanwhile.
const NAP: Duration = Duration::from_millis(1);
/// How often the thread does what needs doing now and then.
const HOUSEKEEPING: Duration = Duration::from_millis(50);

/// The device half of this process.
pub struct Engine {
    /// This process.
    pub me: ProcessId,
    /// Its configuration.
    pub config: &'static Config,
    mailbox: Arc<Mapping<Mailbox>>,
    /// What was posted, one entry for each ring of a doorbell.
    inbox: Mutex<Vec<(Arc<QueuePair>, Vec<WorkRequest>)>>,
    inbox_length: AtomicUsize,
    state: Mutex<State>,
    /// The bell as it was before the last drive.
    seen_bell: AtomicU64,
    /// When there is something to do without a bell, in nanoseconds of the monotonic clock.
    next_due: AtomicU64,
    last_poll: AtomicU64,
    /// How long callers polled without a pause since the thread last looked.
    polled_ns: AtomicU64,
}

/// The tables, held. What was put on the agenda meanwhile is known to the engine when this ends.
pub struct Locked<'a> {
    engine: &'a Engine,
    state: MutexGuard<'a, State>,
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.engine.next_due.store(self.state.next_due(), Ordering::SeqCst);
    }
}

impl Engine {
    /// The engine of this process, started when first asked for. `None` when the configuration is bad or the
    /// network's directory cannot be used; the reason was said on stderr.
    pub fn get() -> Option<&'static Self> {
        static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
        static THREAD: OnceLock<()> = OnceLock::new();
        let engine = ENGINE.get_or_init(|| {
            let config = Config::get()?;
            Self::open(config).map_err(|error| eprintln!("softefa: {}: {error}", config.dir.display())).ok()
        });
        if let Some(engine) = engine {
            THREAD.get_or_init(|| engine.start_thread());
        }
        engine.as_ref()
    }

    fn open(config: &'static Config) -> std::io::Result<Self> {
        std::fs::create_dir_all(&config.dir)?;
        house::sweep(&config.dir);
        let me = ProcessId::current();
        let mailbox = Arc::new(mailbox::create(&config.dir, me)?);
        // SAFETY: no pointers. Where Yama restricts ptrace this lets the peers read our registered memory; elsewhere
        // it fails and changes nothing.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
        Ok(Self {
            me,
            config,
            state: Mutex::new(State::new(config, me, Arc::clone(&mailbox))),
            mailbox,
            inbox: Mutex::default(),
            inbox_length: AtomicUsize::new(0),
            seen_bell: AtomicU64::new(u64::MAX),
            next_due: AtomicU64::new(u64::MAX),
            last_poll: AtomicU64::new(0),
            polled_ns: AtomicU64::new(0),
        })
    }

    /// The tables, for verbs that look at them. Waits at most for the pieces of one drive.
    pub fn lock(&self) -> Locked<'_> {
        Locked { engine: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Hands over what a caller posted, and starts on it.
    pub fn post(&self, qp: &Arc<QueuePair>, requests: Vec<WorkRequest>) {
        {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            inbox.push((Arc::clone(qp), requests));
            self.inbox_length.store(inbox.len(), Ordering::SeqCst);
        }
        self.drive();
        // What was posted may be due later than the thread means to wake.
        if self.mailbox.asleep() && self.next_due.load(Ordering::SeqCst) != u64::MAX {
            self.mailbox.ring();
        }
    }

    /// A caller looks for completions: does what there is to do.
    pub fn poll(&self) {
        let now = now_ns();
        let gap = now.saturating_sub(self.last_poll.swap(now, Ordering::Relaxed));
        if gap < POLLING_GAP_NS {
            self.polled_ns.fetch_add(gap, Ordering::Relaxed);
        }
        self.drive();
    }

    /// A caller is about to sleep until a completion: from now on the thread works at once.
    pub fn expect_sleep(&self) {
        self.polled_ns.store(0, Ordering::Relaxed);
        self.mailbox.ring();
    }

    fn has_work(&self) -> bool {
        u64::from(self.mailbox.bell()) != self.seen_bell.load(Ordering::SeqCst)
            || self.inbox_length.load(Ordering::SeqCst) > 0
            || self.is_due()
    }

    fn is_due(&self) -> bool {
        let due = self.next_due.load(Ordering::SeqCst);
        due != u64::MAX && due <= now_ns()
    }

    fn drive(&self) {
        for _ in 0..DRIVES_PER_CALL {
            if !self.has_work() {
                return;
            }
            let mut state = match self.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Whoever holds the lock looks at `has_work` again after giving it back.
                Err(TryLockError::WouldBlock) => return,
            };
            self.step(&mut state);
            drop(state);
            fence(Ordering::SeqCst);
        }
    }

    fn step(&self, state: &mut State) {
        self.seen_bell.store(u64::from(self.mailbox.bell()), Ordering::SeqCst);
        let posted = {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            self.inbox_length.store(0, Ordering::SeqCst);
            std::mem::take(&mut *inbox)
        };
        for (qp, requests) in posted {
            state.ring(&qp, requests);
        }
        state.receive_messages();
        state.run_due();
        state.move_pieces(PIECES_PER_DRIVE);
        state.flush();
        self.next_due.store(state.next_due(), Ordering::SeqCst);
    }

    fn start_thread(&'static self) {
        house::at_exit();
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both sets live through the calls; signals are for the program's own threads, and the mask of this
        // thread is put back below.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        }
        let thread = std::thread::Builder::new().name("softefa".to_owned()).spawn(move || self.run());
        // SAFETY: `before` was filled by the call above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
        if let Err(error) = thread {
            eprintln!("softefa: no thread for the device: {error}; it works only while somebody polls");
        }
    }

    fn run(&self) {
        let mut house = house::House::new();
        let mut last = now_ns();
        loop {
            let now = now_ns();
            let polled_ns = self.polled_ns.swap(0, Ordering::Relaxed);
            let poller = polled_ns > 0 && polled_ns * POLLING_PART >= now - last;
            last = now;
            if !poller {
                self.drive();
            }
            house.keep(self);
            let seen = self.seen_bell.load(Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if poller {
                self.mailbox.wait(self.mailbox.bell(), NAP, false);
            } else if self.has_work() {
                // Another thread has the lock, or there is more than one drive may do.
                std::thread::yield_now();
            } else {
                let due = self.next_due.load(Ordering::SeqCst).saturating_sub(now_ns());
                self.mailbox.wait(seen as u32, Duration::from_nanos(due).min(HOUSEKEEPING), true);
            }
        }
    }
}
