//! The log, driven by `NIXL_LOG_LEVEL` as the rest of NIXL is.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::sync::Once;

use env_logger::fmt::Formatter;
use log::{LevelFilter, Record};

/// Environment variable that NIXL's own log reads.
const LEVEL_VARIABLE: &str = "NIXL_LOG_LEVEL";

/// Starts the log on first call. A logger that the process already has stays in place.
pub fn init() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let wanted = std::env::var_os(LEVEL_VARIABLE).map(|text| text.to_string_lossy().into_owned());
        let level = wanted.as_deref().map_or(Some(LevelFilter::Warn), level_of);
        let started = env_logger::Builder::new()
            .filter_level(level.unwrap_or(LevelFilter::Warn))
            .format(write_line)
            .try_init()
            .is_ok();
        if started && level.is_none() {
            log::warn!("{LEVEL_VARIABLE} is none of TRACE, DEBUG, INFO, WARN, ERROR, FATAL; logging at WARN");
        }
    });
}

/// NIXL's names, in any case. FATAL shows only what ends the process, and this plugin never does.
fn level_of(name: &str) -> Option<LevelFilter> {
    Some(match name.to_ascii_uppercase().as_str() {
        "TRACE" => LevelFilter::Trace,
        "DEBUG" => LevelFilter::Debug,
        "INFO" => LevelFilter::Info,
        "" | "WARN" => LevelFilter::Warn,
        "ERROR" => LevelFilter::Error,
        "FATAL" => LevelFilter::Off,
        _ => return None,
    })
}

fn write_line(out: &mut Formatter, record: &Record) -> std::io::Result<()> {
    let time = out.timestamp_micros();
    let level = record.level();
    writeln!(out, "{time} {level:<5} nixl-libfabric {}", one_line(&record.args().to_string()))
}

/// An operator reads lines; a message with line breaks in it (a peer's name may have them) stays one.
fn one_line(message: &str) -> String {
    message.replace('\n', "\\n").replace('\r', "\\r")
}

#[cfg(test)]
mod tests {
    use super::{LevelFilter, init, level_of, one_line};

    #[test]
    fn levels_are_spelled_as_nixl_spells_them() {
        assert_eq!(level_of("TRACE"), Some(LevelFilter::Trace));
        assert_eq!(level_of("debug"), Some(LevelFilter::Debug));
        assert_eq!(level_of("FATAL"), Some(LevelFilter::Off));
        assert_eq!(level_of("LOUD"), None);
    }

    #[test]
    fn starting_twice_and_beside_another_logger_is_harmless() {
        init();
        init();
        assert!(env_logger::Builder::new().try_init().is_err());
        init();
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("a\nb\r"), "a\\nb\\r");
    }
}
