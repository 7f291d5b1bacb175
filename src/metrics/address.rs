//! Where metrics are served: the value of the option `metrics`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Ports of a range at the most: each is tried.
const PORTS_MAX: u16 = 1024;

/// An address as the user wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// The first free port from one to another; 0 is the kernel's choice.
    Tcp(IpAddr, u16, u16),
    /// A socket in the file system; `%p` is the process' number.
    Unix(String),
}

impl Address {
    /// The socket's path in this process.
    pub(super) fn path(pattern: &str) -> PathBuf {
        pattern.replace("%p", &std::process::id().to_string()).into()
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.to_owned()));
        }
        let (first, last) = match text.rsplit_once('-') {
            Some((first, last)) => (first, Some(last)),
            None => (text, None),
        };
        let address = match first.strip_prefix("localhost:") {
            Some(port) => port.parse().ok().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            None => first.parse().ok(),
        };
        let address = address.ok_or_else(|| "neither address and port nor an absolute path".to_owned())?;
        let last = last.map_or(Ok(address.port()), str::parse);
        let last = last.map_err(|_| "the last port of the range is not a port".to_owned())?;
        if last < address.port() || (last > address.port() && address.port() == 0) {
            return Err("the last port of the range comes before the first".into());
        }
        if last - address.port() >= PORTS_MAX {
            return Err(format!("more than {PORTS_MAX} ports"));
        }
        Ok(Self::Tcp(address.ip(), address.port(), last))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(ip, first, last) => {
                write!(f, "{}", SocketAddr::new(*ip, *first))?;
                if last > first { write!(f, "-{last}") } else { Ok(()) }
            }
            Self::Unix(pattern) => f.write_str(pattern),
        }
    }
}
