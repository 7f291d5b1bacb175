//! Who a process is, so that a recycled pid is not taken for it.

use std::fmt;
use std::fs;

/// Bits of a Linux pid (`/proc/sys/kernel/pid_max` is at most 2^22).
const PID_BITS: u32 = 22;

/// A pid with the time at which that process started, in clock ticks since boot. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId(u64);

impl ProcessId {
    /// This process.
    pub fn current() -> Self {
        let pid = std::process::id();
        let start =
            fs::read_to_string("/proc/self/stat").ok().and_then(|stat| parse(&stat)).map_or(0, |stat| stat.1);
        Self::new(pid, start)
    }

    fn new(pid: u32, start: u64) -> Self {
        Self(start << PID_BITS | u64::from(pid))
    }

    /// From a shared word; 0 is nobody.
    pub fn from_raw(raw: u64) -> Option<Self> {
        (raw != 0).then_some(Self(raw))
    }

    /// For a shared word.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The pid.
    pub fn pid(self) -> i32 {
        (self.0 & ((1 << PID_BITS) - 1)) as i32
    }

    /// Whether that very process still runs. A zombie does not: its memory and its devices are gone.
    pub fn alive(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid())) else { return false };
        parse(&stat).is_some_and(|(state, start)| {
            !matches!(state, 'Z' | 'X' | 'x') && Self::new(self.pid() as u32, start) == self
        })
    }
}

/// State and start time from `/proc/<pid>/stat`; the command name, in parentheses, may contain anything.
fn parse(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.nth(18)?.parse().ok()?))
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:x}", self.pid(), self.0 >> PID_BITS)
    }
}

impl fmt::Debug for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ProcessId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (pid, start) = text.split_once('-').ok_or(())?;
        let start = u64::from_str_radix(start, 16).map_err(|_| ())?;
        Ok(Self::new(pid.parse().map_err(|_| ())?, start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_its_twin_with_another_start_does_not() {
        let me = ProcessId::current();
        assert!(me.alive());
        assert!(!ProcessId::new(me.pid() as u32, 1).alive());
        assert_eq!(me.to_string().parse(), Ok(me));
    }

    #[test]
    fn a_zombie_is_dead() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("spawn");
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("stat");
        let id = ProcessId::new(child.id(), parse(&stat).expect("fields").1);
        assert!(id.alive());
        child.kill().expect("kill");
        while id.alive() {
            std::thread::yield_now();
        }
        child.wait().expect("reap");
    }

    #[test]
    fn command_names_with_parentheses() {
        let tail = (0..17).map(|_| "0 ").collect::<String>();
        assert_eq!(parse(&format!("1 (a) R 9) S 0 {tail}77 0")), Some(('S', 77)));
    }
}
