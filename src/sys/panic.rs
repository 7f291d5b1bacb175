//! Panics: caught where our code begins, on every thread, and not forgotten.
#![forbid(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs `body`; a panic comes back as its message.
pub fn catch<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    // Unwind safety: whoever gets an error here drops the state that the panic left behind, or refuses to use it (`Poison`).
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        let message = message_of(payload.as_ref());
        // A payload may panic when it is dropped, and nothing would catch that.
        std::mem::forget(payload);
        message
    })
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}

/// The mark that a panic leaves on what it happened in, whatever thread it happened on.
///
/// Whoever runs code of ours runs it in [`watch`](Self::watch) and looks at [`is_set`](Self::is_set) before the next time: what a
/// panic left half done is not worked on.
#[derive(Default)]
pub struct Poison {
    set: AtomicBool,
}

impl Poison {
    /// Whether there was a panic.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Runs `body`; none if it panicked. The first panic sets the mark, and is logged for `owner` with what it happened in. What
    /// waits then is told by its next call, which is refused.
    pub fn watch<T>(&self, owner: impl fmt::Display, place: &str, body: impl FnOnce() -> T) -> Option<T> {
        catch(body).map_err(|message| self.set(owner, place, &message)).ok()
    }

    fn set(&self, owner: impl fmt::Display, place: &str, message: &str) {
        // One line for the first panic: later calls are refused because of it, and callers poll.
        if self.set.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!(
            "agent \"{owner}\": {place}: the plugin panicked ({message}); this backend refuses all further calls, \
             restart the process and report the panic"
        );
    }
}

impl fmt::Debug for Poison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Poison").field(&self.is_set()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct PanicsOnDrop;

    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(catch(|| 7), Ok(7));
        assert_eq!(catch(|| panic!("plain")), Err::<(), _>("plain".to_owned()));
        assert_eq!(catch(|| panic!("rail {}", 3)), Err::<(), _>("rail 3".to_owned()));
        assert_eq!(catch(|| std::panic::panic_any(PanicsOnDrop)), Err::<(), _>("no message".to_owned()));
    }

    #[test]
    fn a_panic_on_any_thread_leaves_its_mark() {
        let poison = Arc::new(Poison::default());
        assert_eq!(poison.watch("a", "connect", || 1), Some(1));
        assert!(!poison.is_set());
        let shared = Arc::clone(&poison);
        let thread = std::thread::spawn(move || shared.watch("a", "nixl-fabric-0", || panic!("bug")));
        assert_eq!(thread.join().expect("the panic stops inside"), None::<()>);
        assert!(poison.is_set());
    }
}
