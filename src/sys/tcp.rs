//! Whether somebody listens at a TCP address, without waiting for the answer.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

/// A connection that is being tried, and closed whatever comes of it.
#[derive(Debug)]
pub struct Probe(Socket);

impl Probe {
    /// Begins to connect.
    ///
    /// # Errors
    ///
    /// What the kernel knows at once: `ConnectionRefused` from an address of this host where nobody listens, and whatever
    /// keeps this process from trying, such as too many open files.
    pub fn start(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
        // Closed by a reset: libfabric 1.18 may read an orderly end as "not yet" (`xnet_recv_cm_msg` looks at a
        // stale errno), and then polls that connection for ever.
        socket.set_linger(Some(Duration::ZERO))?;
        match socket.connect(&address.into()) {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
            _ => Ok(Self(socket)),
        }
    }

    /// Whether the address has refused by now. The kernel of a process that is only stopped accepts.
    pub fn refused(&self) -> bool {
        is_refusal(self.0.take_error().ok().flatten().as_ref())
    }
}

/// Whether this error says that the host is there and nobody listens.
pub fn is_refusal(error: Option<&io::Error>) -> bool {
    error.is_some_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
    use std::thread::sleep;
    use std::time::Instant;

    use super::*;

    /// Whether the address refuses within five seconds; at once, if it is to accept.
    fn refuses(address: SocketAddr, expected: bool) -> bool {
        let probe = match Probe::start(address) {
            Ok(probe) => probe,
            Err(e) => return is_refusal(Some(&e)),
        };
        let deadline = Instant::now() + Duration::from_secs(if expected { 5 } else { 0 });
        loop {
            if probe.refused() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_address_refuses_when_its_listener_is_gone() {
        for ip in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            // Nobody ever calls accept, as in a process that is stopped.
            let Ok(listener) = TcpListener::bind(SocketAddr::new(ip, 0)) else { continue };
            let address = listener.local_addr().unwrap();
            for _ in 0..20 {
                assert!(!refuses(address, false), "{address}");
            }
            drop(listener);
            assert!(refuses(address, true), "{address}");
        }
    }
}
