//! `doctor --listen` on one host, `doctor --to HOST` on another: bytes by every pair of rails, both ways.
//!
//! The rails are those that a backend would open with the same options, one for each device. Each side writes a block of its
//! own pattern to each rail of the other by each of its own, and looks whether what the other wrote is there: a completion
//! without the bytes is damage, and neither within the time is a pair that drops. What is to be known for that goes over
//! a TCP connection (`link`).

mod link;
mod rails;
mod report;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::Finding;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::fabric::Libfabric;
use link::{Hello, Link};
use rails::Rails;

/// The port of the connection between the doctors, unless another is named.
pub const PORT: u16 = 7677;
/// Most rails of either side; a p5 has 32 devices.
const RAILS_MAX: usize = 256;
/// Bytes that each rail writes to each rail of the other side.
const BLOCK_BYTES: usize = 64 << 10;
/// How long `--listen` waits for somebody.
const LISTEN_TIME: Duration = Duration::from_secs(600);
/// How long `--to` tries to connect.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long a side waits for the other's next word. Opening 32 endpoints takes seconds.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// How long the writes of one direction may take: what has not completed by then is called dropped.
const WRITE_TIME: Duration = Duration::from_secs(5);
/// How often a waiting side looks.
const LOOK_TIME: Duration = Duration::from_millis(20);

/// Waits for one `doctor --to`, on a port (0: any), after telling which.
pub fn listen(port: u16, told: impl FnOnce(u16)) -> Result<Vec<Finding>> {
    let failed = |error: io::Error| Error::backend(format!("port {port}: {error}"));
    // The IPv6 socket takes IPv4, too, where there is IPv6 at all.
    let addresses = [SocketAddr::from(([0; 16], port)), SocketAddr::from(([0; 4], port))];
    let listener = TcpListener::bind(&addresses[..]).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    told(listener.local_addr().map_err(failed)?.port());
    let deadline = Instant::now() + LISTEN_TIME;
    let (stream, from) = loop {
        match listener.accept() {
            Ok(accepted) => break accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(LOOK_TIME);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::backend(format!("nobody came within {} s", LISTEN_TIME.as_secs())));
            }
            Err(error) => return Err(failed(error)),
        }
    };
    examine(stream, &from.ip().to_canonical().to_string(), false)
}

/// Meets the `doctor --listen` on a host.
pub fn connect(host: &str, port: u16) -> Result<Vec<Finding>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::backend(format!(
            "{host} port {port}: {error}. Does `nixl-libfabric doctor --listen` run there, and may TCP to that port pass?"
        ))
    };
    let addresses = (host, port).to_socket_addrs().map_err(|error| failed(&error))?;
    let mut refused = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT_TIME) {
            Ok(stream) => return examine(stream, host, true),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.map_or_else(|| failed(&"no address"), |error| failed(&error)))
}

/// The whole exchange. `first` is who writes first.
fn examine(stream: TcpStream, other: &str, first: bool) -> Result<Vec<Finding>> {
    let config = Config::from_params(&std::collections::BTreeMap::new())?;
    let path = Some(config.libfabric_path.as_str()).filter(|path| !path.is_empty()).map(std::path::Path::new);
    let library = Libfabric::load(path)?;
    let found = crate::engine::find_devices(&library, &config)?;
    let mut talk = Link::new(stream, other)?;
    let ours = Hello::of(&found.devices);
    talk.say(&ours.encode())?;
    let theirs = Hello::decode(&talk.hear(ANSWER_TIME, || Ok(()))?)?;
    if let Some(finding) = report::differing(&ours, &theirs, other) {
        return Ok(vec![finding]);
    }
    let mut rails = Rails::open(&library, &found.devices, theirs.devices.len())?;
    for line in rails.introductions()? {
        talk.say(&line)?;
    }
    for _ in &theirs.devices {
        let line = talk.hear(ANSWER_TIME, || rails.poll())?;
        rails.meet(&line)?;
    }
    let mut mine = report::Outcomes::new();
    for we_write in [first, !first] {
        if we_write {
            let written = rails.write(WRITE_TIME)?;
            talk.say("written")?;
            // The other side drives its endpoints until it has looked, and so do we: some providers answer in software.
            let arrived = talk.hear(ANSWER_TIME, || rails.poll())?;
            mine = report::judge(&written, &arrived, theirs.devices.len());
        } else {
            talk.expect("written", ANSWER_TIME, || rails.poll())?;
            let arrived = rails.arrived(WRITE_TIME)?;
            talk.say(&arrived)?;
        }
    }
    // What became of the other direction is the other side's to tell.
    talk.say(&report::encode(&mine))?;
    let told =
        report::decode(&talk.hear(ANSWER_TIME, || rails.poll())?, theirs.devices.len(), ours.devices.len())?;
    // Nobody closes his endpoints while the other one may still want an answer.
    talk.say("bye")?;
    talk.expect("bye", ANSWER_TIME, || rails.poll())?;
    Ok(report::findings(&ours, &theirs, other, &mine, &told))
}
