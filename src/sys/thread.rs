//! Threads that leave the host's signals alone, and wake in time.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

/// Says how late sleeps of this thread may end; the kernel's default is 50 us (`PR_SET_TIMERSLACK`, prctl(2)).
pub fn set_timer_slack(slack: Duration) {
    // SAFETY: the call takes numbers only, and concerns this thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, slack.as_nanos() as libc::c_ulong, 0, 0, 0) };
}

/// Starts a named thread in which every signal is blocked: the host's handlers run on the host's threads.
pub fn spawn_without_signals(
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    // SAFETY: an all-zero sigset_t is a valid value of this plain C type.
    let (mut all, mut before) = unsafe { (std::mem::zeroed::<libc::sigset_t>(), std::mem::zeroed()) };
    // SAFETY: the pointers describe locals. The mask is inherited by the thread started below and restored
    // on this one right after, so that no signal meant for it is lost: it stays pending in between.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let thread = std::thread::Builder::new().name(name).spawn(body);
    // SAFETY: `before` was filled in above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    thread
}
