//! What needs doing now and then: faults, counter files, peers that died, files that they left.

use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime};

use super::{Engine, HOUSEKEEPING};
use crate::control::Control;
use crate::shm::process::ProcessId;
use crate::sysfs;

/// The housekeeping of one engine.
pub struct House {
    last: Option<Instant>,
    control: Option<(SystemTime, u64)>,
    counters: Vec<Vec<(&'static str, u64)>>,
}

impl House {
    /// Nothing read or written yet.
    pub fn new() -> Self {
        Self { last: None, control: None, counters: Vec::new() }
    }

    /// Does what is due.
    pub fn keep(&mut self, engine: &Engine) {
        if self.last.is_some_and(|last| last.elapsed() < HOUSEKEEPING) {
            return;
        }
        self.last = Some(Instant::now());
        self.read_control(engine);
        self.write_counters(engine);
        let mut state = engine.lock();
        let gone: Vec<_> = state.links.keys().copied().filter(|peer| !peer.alive()).collect();
        for peer in gone {
            state.peer_gone(peer);
        }
    }

    /// Reads the control file if it changed. One that cannot be read leaves the faults as they are.
    fn read_control(&mut self, engine: &Engine) {
        let path = &engine.config.control;
        let stamp = fs::metadata(path).ok().and_then(|meta| Some((meta.modified().ok()?, meta.len())));
        if stamp == self.control {
            return;
        }
        self.control = stamp;
        let text = if stamp.is_some() { fs::read_to_string(path).unwrap_or_default() } else { String::new() };
        match Control::parse(&text) {
            Ok(control) => engine.lock().set_control(control),
            Err(error) => eprintln!("softefa: {}: {error}; the faults stay as they were", path.display()),
        }
    }

    /// Writes the counters that changed where a host's tools look for them.
    fn write_counters(&mut self, engine: &Engine) {
        let now: Vec<(usize, Vec<_>)> = engine
            .lock()
            .devices
            .iter()
            .map(|(index, device)| (*index, device.table.counters.all()))
            .collect();
        for (index, values) in now {
            if self.counters.len() <= index {
                self.counters.resize(index + 1, Vec::new());
            }
            if self.counters[index] != values {
                sysfs::write_counters(
                    engine.config,
                    &engine.config.devices[index],
                    &values,
                    &self.counters[index],
                );
                self.counters[index] = values;
            }
        }
    }
}

/// Removes the files of processes that are gone.
pub fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let owners = if let Some(owner) = name.strip_prefix("mailbox-") {
            vec![owner]
        } else if let Some(ends) = name.strip_prefix("channel-") {
            ends.split("-to-").collect()
        } else {
            continue;
        };
        let dead = |owner: &&str| owner.parse::<ProcessId>().is_ok_and(|process| !process.alive());
        if owners.iter().any(dead) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Leaves no files behind when the process ends in an orderly way.
pub fn at_exit() {
    extern "C" fn clean() {
        let Some(engine) = Engine::get() else { return };
        // A forked child runs this too, but the files are its parent's.
        if engine.me.pid() as u32 != std::process::id() {
            return;
        }
        House::new().write_counters_now(engine);
        let me = engine.me.to_string();
        let Ok(entries) = fs::read_dir(&engine.config.dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let own = name.strip_prefix("mailbox-").is_some_and(|owner| owner == me)
                || name.strip_prefix("channel-").is_some_and(|ends| ends.split("-to-").any(|end| end == me));
            if own {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    // SAFETY: the function is `extern "C"`, and the library stays mapped until the process ends (`-z nodelete`).
    unsafe { libc::atexit(clean) };
}

impl House {
    /// The last state of the counters; not if the engine's lock is held by a thread that no longer runs.
    fn write_counters_now(&mut self, engine: &Engine) {
        if engine.state.try_lock().is_ok() {
            self.write_counters(engine);
        }
    }
}
