//! The TCP connection between two doctors: lines of text, of bounded length, each within a time.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::RAILS_MAX;
use crate::error::{Error, Result};
use crate::fabric::Device;

/// Most bytes of a line: a word for each pair of rails.
const LINE_BYTES_MAX: usize = 1 << 20;
/// How long a look at the socket waits.
const LOOK_TIME: Duration = Duration::from_millis(1);
/// How long the other side may take to take in what is said.
const SAY_TIME: Duration = Duration::from_secs(10);
/// What a first line begins with; the number is this protocol's.
const GREETING: &str = "nixl-libfabric-doctor 1";

/// The connection.
pub(super) struct Link {
    stream: TcpStream,
    other: String,
    /// What came after the last line that was heard.
    rest: Vec<u8>,
}

impl Link {
    pub(super) fn new(stream: TcpStream, other: &str) -> Result<Self> {
        let set = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(LOOK_TIME)))
            .and_then(|()| stream.set_write_timeout(Some(SAY_TIME)))
            .and_then(|()| stream.set_nodelay(true));
        set.map_err(|error| Error::backend(format!("{other}: {error}")))?;
        Ok(Self { stream, other: other.to_owned(), rest: Vec::new() })
    }

    /// Sends a line.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        let written = self.stream.write_all(format!("{line}\n").as_bytes());
        written.map_err(|error| self.lost(&error))
    }

    /// The next line, `meanwhile` being called until it is there.
    pub(super) fn hear(
        &mut self,
        time: Duration,
        mut meanwhile: impl FnMut() -> Result<()>,
    ) -> Result<String> {
        let deadline = Instant::now() + time;
        let mut part = [0; 16 << 10];
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if self.rest.len() > LINE_BYTES_MAX {
                return Err(Error::backend(format!("{}: a line without end: this is no doctor", self.other)));
            }
            match self.stream.read(&mut part) {
                Ok(0) => return Err(self.lost(&"it has gone; what does it say?")),
                Ok(count) => self.rest.extend_from_slice(&part[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(self.lost(&error)),
            }
            meanwhile()?;
            if Instant::now() > deadline {
                return Err(self.lost(&format!("it said nothing for {} s", time.as_secs())));
            }
        }
    }

    /// Waits for one certain line.
    pub(super) fn expect(
        &mut self,
        word: &str,
        time: Duration,
        meanwhile: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let line = self.hear(time, meanwhile)?;
        if line == word {
            Ok(())
        } else {
            Err(self.lost(&format!("`{word}` was to come, and `{line:.60}` came")))
        }
    }

    fn lost(&self, why: &dyn std::fmt::Display) -> Error {
        Error::backend(format!("the doctor on {}: {why}", self.other))
    }
}

/// The first line: what a side uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub provider: String,
    pub fabric: String,
    pub devices: Vec<String>,
}

impl Hello {
    pub(super) fn of(devices: &[Device]) -> Self {
        let first = devices.first();
        // Networks of software providers are named by address block, and differ between hosts that reach each other.
        let fabric = first.map(Device::fabric_name).filter(|name| name.starts_with("efa")).unwrap_or("-");
        Self {
            provider: first.map_or("-", Device::provider).to_owned(),
            fabric: fabric.to_owned(),
            devices: devices.iter().map(|device| device.domain_name().to_owned()).take(RAILS_MAX).collect(),
        }
    }

    pub(super) fn encode(&self) -> String {
        format!("{GREETING}\t{}\t{}\t{}", self.provider, self.fabric, self.devices.join("\t"))
    }

    pub(super) fn decode(line: &str) -> Result<Self> {
        let mut fields = line.split('\t');
        if fields.next() != Some(GREETING) {
            return Err(Error::backend("the other side is no doctor of this version"));
        }
        let mut next = || fields.next().unwrap_or_default().to_owned();
        let (provider, fabric) = (next(), next());
        let devices: Vec<String> = fields.map(ToOwned::to_owned).collect();
        if devices.is_empty() || devices.len() > RAILS_MAX {
            return Err(Error::backend(format!(
                "the other side has {} rails: 1 to {RAILS_MAX} are wanted",
                devices.len()
            )));
        }
        Ok(Self { provider, fabric, devices })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_hello_comes_as_it_went_and_others_are_refused() {
        let hello = Hello {
            provider: "efa".into(),
            fabric: "efa".into(),
            devices: vec!["a-rdm".into(), "b-rdm".into()],
        };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        for line in
            ["", "SSH-2.0", "nixl-libfabric-doctor 2\tefa\tefa\ta", "nixl-libfabric-doctor 1\tefa\tefa"]
        {
            assert!(Hello::decode(line).is_err(), "{line}");
        }
    }

    #[test]
    fn silence_an_end_and_noise_are_errors() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut link = Link::new(listener.accept().unwrap().0, "there").unwrap();
        theirs.write_all(b"one\ntwo\nthr").unwrap();
        let time = Duration::from_secs(20);
        assert_eq!(link.hear(time, || Ok(())).unwrap(), "one");
        assert!(link.expect("three", time, || Ok(())).unwrap_err().to_string().contains("`two` came"));
        let silent = link.hear(Duration::from_millis(50), || Ok(())).unwrap_err().to_string();
        assert!(silent.contains("said nothing"), "{silent}");
        drop(theirs);
        assert!(link.hear(time, || Ok(())).unwrap_err().to_string().contains("it has gone"));
    }
}
