//! The other side: finds the endpoint of a process, asks it, and reads the answer.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::Socket;

use super::ANNOUNCEMENT;
use crate::error::{Error, Result};

/// How long an endpoint may take for each step of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// One sample: a metric, its labels, its number.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the metric.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its number.
    pub value: f64,
}

impl Sample {
    /// The value of a label, empty if it has none of that name.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// Where the process `pid` serves its metrics, as it announces among its open files; below its own root, if it is a socket's path.
pub fn endpoint_of(pid: u32) -> Result<String> {
    let folder = format!("/proc/{pid}/fd");
    let files = fs::read_dir(&folder).map_err(|e| {
        Error::not_found(format!("{folder} cannot be read: {e}; is process {pid} there, and yours?"))
    })?;
    let mut links = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    let found = links.find_map(|link| announced(link.to_str()?));
    let location = found.ok_or_else(|| {
        Error::not_found(format!(
            "process {pid} serves no metrics: start it with NIXL_LIBFABRIC_METRICS=127.0.0.1:0, or with the backend's \
             parameter metrics"
        ))
    })?;
    Ok(if location.starts_with('/') { format!("/proc/{pid}/root{location}") } else { location })
}

/// What stands behind an announcement in the name of a memory file.
fn announced(link: &str) -> Option<String> {
    let (_, location) = link.split_once(ANNOUNCEMENT)?;
    Some(location.strip_suffix(" (deleted)").unwrap_or(location).to_owned())
}

/// Asks the endpoint at an address and port, or at a socket's path.
pub fn ask(location: &str) -> Result<Vec<Sample>> {
    let failed = |e: std::io::Error| Error::backend(format!("{location} does not answer: {e}"));
    let stream: Socket = if location.starts_with('/') {
        UnixStream::connect(Path::new(location)).map_err(failed)?.into()
    } else {
        let address: SocketAddr = location.parse().map_err(|_| {
            Error::invalid(format!("`{location}` is neither address and port nor an absolute path"))
        })?;
        TcpStream::connect_timeout(&address, ANSWER_TIME).map_err(failed)?.into()
    };
    let answer = get(stream).map_err(failed)?;
    let strange = || Error::backend(format!("what answers at {location} is no endpoint of nixl-libfabric"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(strange)?;
    if head.split(' ').nth(1) != Some("200") {
        return Err(strange());
    }
    parse(body).ok_or_else(strange)
}

fn get(mut stream: Socket) -> std::io::Result<String> {
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// Reads the text format; none where it is not that.
pub fn parse(text: &str) -> Option<Vec<Sample>> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (name, mut rest) = line.split_at_checked(line.find(['{', ' '])?)?;
    let mut labels = BTreeMap::new();
    if let Some(mut inner) = rest.strip_prefix('{') {
        while !inner.starts_with('}') {
            let (label, quoted) = inner.strip_prefix(',').unwrap_or(inner).split_once("=\"")?;
            let (value, after) = unquoted(quoted)?;
            labels.insert(label.to_owned(), value);
            inner = after;
        }
        rest = &inner[1..];
    }
    Some(Sample { name: name.to_owned(), labels, value: rest.trim().parse().ok()? })
}

/// A quoted value, and what comes after it.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            c => value.push(c),
        }
    }
    None
}
