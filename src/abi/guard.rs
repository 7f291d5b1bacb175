//! Nothing unwinds into C++, and an engine that has panicked does no more work.

use std::sync::Arc;

use crate::error::{Result, Status};
use crate::sys::panic::Poison;
use crate::types::AgentName;

/// Where lines of the boundary come from, for operators: not a module of ours.
pub const LOG: &str = "nixl_libfabric";

/// Stands before one engine: logs its errors, stops its panics, and keeps calls out after the first panic, be it in a call or on
/// a thread of the engine's.
#[derive(Debug)]
pub struct Guard {
    agent: AgentName,
    poison: Arc<Poison>,
}

impl Guard {
    /// A guard for the engine of `agent`, whose threads have the same `poison`.
    pub fn new(agent: AgentName, poison: Arc<Poison>) -> Self {
        Self { agent, poison }
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
        if self.poison.is_set() {
            // A refused call may own a handle that NIXL gave back, and dropping that may panic.
            self.discard(call, body);
            return Err(Status::Backend);
        }
        match self.poison.watch(&self.agent, call, body) {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => {
                let status = error.status();
                log::log!(target: LOG, level(status), "agent \"{}\": {call}: {error}", self.agent);
                Err(status)
            }
            None => Err(Status::Backend),
        }
    }

    /// Drops what takes no further calls.
    pub fn discard<T>(&self, call: &str, value: T) {
        let _ = self.poison.watch(&self.agent, call, || drop(value));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Guard, Poison};
    use crate::error::{Error, Status};

    struct PanicsOnDrop;

    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn an_error_keeps_the_engine_and_a_panic_ends_it() {
        let guard = Guard::new("a".into(), Arc::default());
        assert_eq!(
            guard.run("connect", || Err::<(), _>(Error::not_found("no such peer"))),
            Err(Status::NotFound)
        );
        assert_eq!(guard.run("connect", || Ok(1)), Ok(1));
        assert_eq!(guard.run::<()>("connect", || panic!("bug")), Err(Status::Backend));
        assert!(guard.poison.is_set());
        let refused = guard.run::<()>("connect", || unreachable!("a poisoned engine was called"));
        assert_eq!(refused, Err(Status::Backend));
    }

    #[test]
    fn a_panic_on_a_thread_ends_the_engine() {
        let poison = Arc::<Poison>::default();
        let guard = Guard::new("a".into(), Arc::clone(&poison));
        let thread = std::thread::spawn(move || poison.watch("a", "nixl-fabric-0", || panic!("bug")));
        assert_eq!(thread.join().unwrap(), None::<()>);
        assert_eq!(guard.run("checkXfer", || Ok(1)), Err(Status::Backend));
    }

    #[test]
    fn a_panic_while_dropping_ends_the_engine() {
        let guard = Guard::new("a".into(), Arc::default());
        guard.discard("destroy_engine", PanicsOnDrop);
        assert!(guard.poison.is_set());
    }

    #[test]
    fn a_refused_call_drops_what_it_owns() {
        let guard = Guard::new("a".into(), Arc::default());
        assert_eq!(guard.run::<()>("connect", || panic!("bug")), Err(Status::Backend));
        let handle = Arc::new(());
        let owned = Arc::clone(&handle);
        let panics = PanicsOnDrop;
        let refused = guard.run("deregisterMem", move || {
            let _owned = (&owned, &panics);
            Ok(())
        });
        assert_eq!(refused, Err(Status::Backend));
        assert_eq!(Arc::strong_count(&handle), 1);
    }
}
