//! The log of the code under test, with virtual time, when `SIM_LOG` names a level.

struct Printer;

impl log::Log for Printer {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let now = crate::clock::now_ns() % 1_000_000_000_000;
        eprintln!("{:>12.3} us {:5} {}", now as f64 / 1e3, record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Starts it, once.
pub fn start() {
    let level = std::env::var("SIM_LOG").ok().and_then(|level| level.parse().ok());
    if let Some(level) = level
        && log::set_logger(&Printer).is_ok()
    {
        log::set_max_level(level);
    }
}
