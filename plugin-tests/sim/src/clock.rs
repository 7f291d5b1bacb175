//! Virtual time, without a seam in the code under test.
//!
//! The standard library asks libc for the time, for sleep and for the keys of its hash maps. A test binary may define
//! those three functions itself, and then its definitions are linked. In a thread that runs a schedule they answer from
//! the simulation; in every other thread they pass the question on to the kernel.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_long, c_uint, c_void};

/// Virtual time begins here, in nanoseconds: any moment that is not near zero.
const EPOCH_NS: u64 = 1_000_000_000_000_000;

type Sleeper = Box<dyn FnMut(u64)>;

thread_local! {
    static NOW: Cell<Option<u64>> = const { Cell::new(None) };
    static SLEEPS: Cell<u64> = const { Cell::new(0) };
    static SLEEPER: RefCell<Option<Sleeper>> = const { RefCell::new(None) };
}

/// Makes time virtual in this thread, for as long as the guard lives.
#[derive(Debug)]
pub struct VirtualTime(());

impl VirtualTime {
    /// Begins at a fixed moment.
    pub fn start() -> Self {
        NOW.set(Some(EPOCH_NS));
        SLEEPS.set(0);
        Self(())
    }
}

impl Drop for VirtualTime {
    fn drop(&mut self) {
        NOW.set(None);
        SLEEPER.with_borrow_mut(|sleeper| *sleeper = None);
    }
}

/// Nanoseconds: virtual ones, or the kernel's where time is real.
pub fn now_ns() -> u64 {
    NOW.get().unwrap_or_else(|| {
        let time = kernel_time(libc::CLOCK_MONOTONIC);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    })
}

/// Whether this thread's time is virtual.
pub fn is_virtual() -> bool {
    NOW.get().is_some()
}

/// Moves virtual time on. Where time is real, it moves by itself.
pub fn advance(ns: u64) {
    if let Some(now) = NOW.get() {
        NOW.set(Some(now + ns));
    }
}

/// Sleeps so far in this thread.
pub fn sleeps() -> u64 {
    SLEEPS.get()
}

/// Calls `sleeper` with the length of each sleep, after time has moved on: others live on while one sleeps.
pub fn on_sleep(sleeper: impl FnMut(u64) + 'static) {
    SLEEPER.with_borrow_mut(|place| *place = Some(Box::new(sleeper)));
}

fn slept(ns: u64) {
    advance(ns);
    SLEEPS.set(SLEEPS.get() + 1);
    // Taken out while it runs: who sleeps inside just sleeps.
    let sleeper = SLEEPER.with_borrow_mut(Option::take);
    if let Some(mut sleeper) = sleeper {
        sleeper(ns);
        SLEEPER.with_borrow_mut(|place| {
            place.get_or_insert(sleeper);
        });
    }
}

fn kernel_time(clock: libc::clockid_t) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure lives across the call.
    unsafe { libc::syscall(libc::SYS_clock_gettime, c_long::from(clock), &raw mut time) };
    time
}

/// libc's clock_gettime(2).
///
/// # Safety
/// `time` points to a timespec.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    let answer = match NOW.try_with(Cell::get) {
        Ok(Some(now)) => libc::timespec {
            tv_sec: (now / 1_000_000_000) as libc::time_t,
            tv_nsec: (now % 1_000_000_000) as c_long,
        },
        _ => kernel_time(clock),
    };
    // SAFETY: the caller's promise.
    unsafe { time.write(answer) };
    0
}

/// libc's nanosleep(2).
///
/// # Safety
/// `want` points to a timespec; `left` to one, or is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nanosleep(want: *const libc::timespec, left: *mut libc::timespec) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { clock_nanosleep(libc::CLOCK_MONOTONIC, 0, want, left) }
}

/// libc's clock_nanosleep(2), which gives the error number itself.
///
/// # Safety
/// As [`nanosleep`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_nanosleep(
    clock: libc::clockid_t,
    flags: c_int,
    want: *const libc::timespec,
    left: *mut libc::timespec,
) -> c_int {
    if let Ok(Some(now)) = NOW.try_with(Cell::get) {
        // SAFETY: the caller's promise.
        let want = unsafe { *want };
        let ns = want.tv_sec as u64 * 1_000_000_000 + want.tv_nsec as u64;
        slept(if flags & libc::TIMER_ABSTIME != 0 { ns.saturating_sub(now) } else { ns });
        return 0;
    }
    // SAFETY: the caller's promise; the kernel takes what libc takes.
    let status = unsafe {
        libc::syscall(libc::SYS_clock_nanosleep, c_long::from(clock), c_long::from(flags), want, left)
    };
    if status == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINTR) }
}

/// libc's getrandom(2). In a schedule hash maps get fixed keys, so that they are walked in the same order each time.
///
/// # Safety
/// `buffer` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, flags: c_uint) -> isize {
    if let Ok(Some(_)) = NOW.try_with(Cell::get) {
        // SAFETY: the caller's promise.
        unsafe { buffer.cast::<u8>().write_bytes(0x5a, len) };
        return len as isize;
    }
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) as isize }
}
