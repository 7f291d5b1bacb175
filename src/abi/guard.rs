//! Nothing unwinds into C++, and an engine that has panicked does no more work.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Result, Status};
use crate::types::AgentName;

/// Where lines of the boundary come from, for operators: not a module of ours.
pub const LOG: &str = "nixl_libfabric";

/// Runs `body`; a panic comes back as its message.
pub fn catch<T>(body: impl FnOnce() -> T) -> std::result::Result<T, String> {
    // Unwind safety: whoever gets an error here drops the state that the panic left behind, or refuses to use it (`Guard`).
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        let message = panic_message(payload.as_ref());
        // A payload may panic when it is dropped, and nothing would catch that.
        std::mem::forget(payload);
        message
    })
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}

/// Stands before one engine: logs its errors, stops its panics, and keeps calls out after the first panic.
#[derive(Debug)]
pub struct Guard {
    agent: AgentName,
    poisoned: AtomicBool,
}

impl Guard {
    /// A guard for the engine of `agent`.
    pub fn new(agent: AgentName) -> Self {
        Self { agent, poisoned: AtomicBool::new(false) }
    }

    /// Whether the engine has panicked.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Runs one call of NIXL's, named `call`. When a status comes back, its error has been logged.
    pub fn run<T>(&self, call: &str, body: impl FnOnce() -> Result<T>) -> std::result::Result<T, Status> {
        self.run_at(call, body, |status| match status {
            // What the peer did, or what this backend does not offer: the caller decides how bad it is.
            Status::NotSupported | Status::RemoteDisconnect | Status::Canceled => log::Level::Warn,
            _ => log::Level::Error,
        })
    }

    /// The same for a call whose failure is always an error.
    pub fn run_or_error<T>(
        &self,
        call: &str,
        body: impl FnOnce() -> Result<T>,
    ) -> std::result::Result<T, Status> {
        self.run_at(call, body, |_| log::Level::Error)
    }

    fn run_at<T>(
        &self,
        call: &str,
        body: impl FnOnce() -> Result<T>,
        level: impl FnOnce(Status) -> log::Level,
    ) -> std::result::Result<T, Status> {
        if self.is_poisoned() {
            // A refused call may own a handle that NIXL gave back, and dropping that may panic.
            self.discard(call, body);
            return Err(Status::Backend);
        }
        match catch(body) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                let status = error.status();
                log::log!(target: LOG, level(status), "agent \"{}\": {call}: {error}", self.agent);
                Err(status)
            }
            Err(message) => {
                self.poison(call, &message);
                Err(Status::Backend)
            }
        }
    }

    /// Drops what takes no further calls.
    pub fn discard<T>(&self, call: &str, value: T) {
        if let Err(message) = catch(|| drop(value)) {
            self.poison(call, &message);
        }
    }

    fn poison(&self, call: &str, message: &str) {
        // One line for the first panic: later calls are refused because of it, and callers poll.
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            log::error!(
                target: LOG,
                "agent \"{}\": {call}: the plugin panicked ({message}); this backend refuses all further calls, \
                 restart the process and report the panic",
                self.agent
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Guard, catch};
    use crate::error::{Error, Status};

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
    fn an_error_keeps_the_engine_and_a_panic_ends_it() {
        let guard = Guard::new("a".into());
        assert_eq!(
            guard.run("connect", || Err::<(), _>(Error::not_found("no such peer"))),
            Err(Status::NotFound)
        );
        assert_eq!(guard.run("connect", || Ok(1)), Ok(1));
        assert_eq!(guard.run::<()>("connect", || panic!("bug")), Err(Status::Backend));
        assert!(guard.is_poisoned());
        let refused = guard.run::<()>("connect", || unreachable!("a poisoned engine was called"));
        assert_eq!(refused, Err(Status::Backend));
    }

    #[test]
    fn a_panic_while_dropping_ends_the_engine() {
        let guard = Guard::new("a".into());
        guard.discard("destroy_engine", PanicsOnDrop);
        assert!(guard.is_poisoned());
    }

    #[test]
    fn a_refused_call_drops_what_it_owns() {
        let guard = Guard::new("a".into());
        assert_eq!(guard.run::<()>("connect", || panic!("bug")), Err(Status::Backend));
        let handle = std::sync::Arc::new(());
        let owned = std::sync::Arc::clone(&handle);
        let panics = PanicsOnDrop;
        let refused = guard.run("deregisterMem", move || {
            let _owned = (&owned, &panics);
            Ok(())
        });
        assert_eq!(refused, Err(Status::Backend));
        assert_eq!(std::sync::Arc::strong_count(&handle), 1);
    }
}
