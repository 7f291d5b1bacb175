//! Threads that leave the host's signals alone, and wake in time.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

/// Says how late sleeps of this thread may end; the kernel's default is 50 us (`PR_SET_TIMERSLACK`, prctl(2)).
pub fn set_timer_slack(slack: Duration) {
    // SAFETY: the call takes numbers only, and concerns this thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, slack.as_nanos() as libc::c_ulong, 0, 0, 0) };
}

/// Signals that a thread causes itself. Blocked, they end the process without the handler that would have said where: Python's
/// faulthandler, a crash reporter, a debugger.
const OF_THE_THREAD: [i32; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

/// Starts a named thread in which every signal is blocked that can be handled elsewhere: the host's handlers run on the host's
/// threads.
pub fn spawn_without_signals<T: Send + 'static>(
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // SAFETY: an all-zero sigset_t is a valid value of this plain C type.
    let (mut blocked, mut before) = unsafe { (std::mem::zeroed::<libc::sigset_t>(), std::mem::zeroed()) };
    // SAFETY: the pointers describe locals. The mask is inherited by the thread started below and restored
    // on this one right after, so that no signal meant for it is lost: it stays pending in between.
    unsafe {
        libc::sigfillset(&raw mut blocked);
        for signal in OF_THE_THREAD {
            libc::sigdelset(&raw mut blocked, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, &raw mut before);
    }
    let thread = std::thread::Builder::new().name(name).spawn(body);
    // SAFETY: `before` was filled in above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    thread
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn blocked_here() -> Vec<i32> {
        // SAFETY: an all-zero sigset_t is a valid value; with no new mask the call only writes the present one.
        let mask = unsafe {
            let mut mask = std::mem::zeroed::<libc::sigset_t>();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
            mask
        };
        // SAFETY: `mask` is a set of signals, and these are their numbers.
        (1..32).filter(|&signal| unsafe { libc::sigismember(&raw const mask, signal) } == 1).collect()
    }

    #[test]
    fn faults_reach_their_handlers_and_nothing_else_does() {
        let before = blocked_here();
        let (tell, told) = mpsc::channel();
        let thread =
            spawn_without_signals("signals".into(), move || tell.send(blocked_here()).unwrap()).unwrap();
        let blocked = told.recv().unwrap();
        thread.join().unwrap();
        for signal in OF_THE_THREAD {
            assert!(!blocked.contains(&signal), "signal {signal} is blocked");
        }
        for signal in
            [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGALRM, libc::SIGUSR1, libc::SIGPIPE]
        {
            assert!(blocked.contains(&signal), "signal {signal} is not blocked");
        }
        assert_eq!(blocked_here(), before, "the mask of the thread that started it");
    }
}
