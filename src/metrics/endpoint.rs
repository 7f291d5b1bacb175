//! The endpoint: one thread that answers whoever asks for the metrics of this process.
//!
//! Engines that name the same address share it, since a process has one port and its agents are told apart by a label. A client
//! can neither hold it up nor make it grow: requests and connections are few and short, and each has a deadline.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::{self, Answer, REQUEST_BYTES_MAX};
use super::{ANNOUNCEMENT, Address, Samples, Source};
use crate::error::{Error, Result};
use crate::sys::event::{EventFd, Watched, poll};
use crate::sys::{memfd, panic, thread};

/// Clients at a time. One more takes the place of the one that has been there longest.
const CONNECTIONS_MAX: usize = 16;
/// From the connection to the last byte of the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(5);
/// How long no client is taken after one could not be: the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Longest sleep; nothing waits for its end.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// The endpoints of this process, which may be ending.
static SERVERS: Mutex<Vec<(Address, Weak<Server>)>> = Mutex::new(Vec::new());

/// An engine's place at an endpoint, until it is dropped. The last one ends the endpoint.
pub struct Endpoint {
    server: Arc<Server>,
    id: u64,
}

impl Endpoint {
    /// Serves the metrics of `source` at `address`.
    pub fn open(address: &Address, source: Arc<dyn Source>) -> Result<Self> {
        let mut servers = lock(&SERVERS);
        servers.retain(|(_, server)| server.strong_count() > 0);
        let known =
            servers.iter().find(|(known, _)| known == address).and_then(|(_, server)| server.upgrade());
        let server = if let Some(server) = known {
            server
        } else {
            let server = Arc::new(Server::start(address)?);
            servers.push((address.clone(), Arc::downgrade(&server)));
            server
        };
        let id = server.shared.ids.fetch_add(1, Ordering::Relaxed);
        lock(&server.shared.sources).push((id, source));
        Ok(Self { server, id })
    }

    /// Where the metrics are to be had.
    pub fn location(&self) -> &str {
        &self.server.location
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let taken = {
            let mut sources = lock(&self.server.shared.sources);
            let at = sources.iter().position(|(id, _)| *id == self.id);
            at.map(|at| sources.remove(at))
        };
        drop(taken);
    }
}

/// What the thread and its owner share.
struct Shared {
    sources: Mutex<Vec<(u64, Arc<dyn Source>)>>,
    ids: AtomicU64,
    stop: AtomicBool,
    wake: EventFd,
}

struct Server {
    shared: Arc<Shared>,
    location: String,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
    /// Tells `nixl-libfabric top` of the endpoint.
    _announcement: Option<OwnedFd>,
}

impl Server {
    fn start(address: &Address) -> Result<Self> {
        let (listener, file) = listen(address)?;
        let location = listener.location()?;
        let announced = memfd::named(&format!("{ANNOUNCEMENT}{location}"));
        let announced = announced
            .inspect_err(|e| log::debug!("nixl-libfabric top will not find the metrics by process: {e}"));
        let shared = Arc::new(Shared {
            sources: Mutex::default(),
            ids: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let theirs = Arc::clone(&shared);
        let body = move || {
            let server = Serving { listener, shared: theirs, clients: Vec::new(), pause: None };
            if let Err(message) = panic::catch(|| server.run()) {
                log::error!("metrics: the plugin panicked ({message}); no more are served, report the panic");
            }
        };
        let thread = thread::spawn_without_signals("nixl-metrics".into(), body)
            .map_err(|e| Error::backend(format!("no thread could be started: {e}")))?;
        Ok(Self { shared, location, thread: Some(thread), _file: file, _announcement: announced.ok() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket's file, removed with this, unless another stands there by then.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client's end, of either kind.
trait Stream: Read + Write + AsRawFd + Send {}
impl<T: Read + Write + AsRawFd + Send> Stream for T {}

impl Listener {
    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
        })
    }

    /// Where it listens.
    fn location(&self) -> Result<String> {
        let location = match self {
            Self::Tcp(listener) => listener.local_addr().map(|address| address.to_string()),
            Self::Unix(listener) => listener.local_addr().map(|address| {
                address.as_pathname().map_or_else(String::new, |path| path.display().to_string())
            }),
        };
        location.map_err(|e| Error::backend(format!("getsockname: {e}")))
    }

    fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(listener) => listener.as_raw_fd(),
        }
    }
}

/// Listens. A port that is taken is an error, if it is not one of several.
fn listen(address: &Address) -> Result<(Listener, Option<SocketFile>)> {
    let failed = |e: io::Error| Error::backend(format!("{address} cannot be listened on: {e}"));
    match address {
        Address::Tcp(ip, first, last) => {
            let ports: Vec<_> = (*first..=*last).map(|port| SocketAddr::new(*ip, port)).collect();
            let listener = TcpListener::bind(&ports[..]).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Ok((Listener::Tcp(listener), None))
        }
        Address::Unix(pattern) => {
            let path = Address::path(pattern);
            remove_left_over(&path);
            let listener = UnixListener::bind(&path).map_err(failed)?;
            let inode = fs::symlink_metadata(&path).map_err(failed)?.ino();
            let file = SocketFile { path, inode };
            listener.set_nonblocking(true).map_err(failed)?;
            // Names of peers are nobody else's business.
            fs::set_permissions(&file.path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
            Ok((Listener::Unix(listener), Some(file)))
        }
    }
}

/// Removes a socket on which nobody listens: its process was killed. Nothing but a socket is touched.
fn remove_left_over(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
        let _ = fs::remove_file(path);
    }
}

/// A client that has connected.
struct Client {
    stream: Box<dyn Stream>,
    until: Instant,
    request: Vec<u8>,
    /// What is left of the answer, once there is one.
    answer: Option<Vec<u8>>,
    written: usize,
}

/// What the thread works on.
struct Serving {
    listener: Listener,
    shared: Arc<Shared>,
    clients: Vec<Client>,
    /// Until when no client is taken.
    pause: Option<Instant>,
}

impl Serving {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let now = Instant::now();
            self.pause = self.pause.filter(|until| *until > now);
            self.wait(now);
            if self.pause.is_none() {
                self.take_client();
            }
            let now = Instant::now();
            let mut clients = std::mem::take(&mut self.clients);
            clients.retain_mut(|client| now < client.until && self.serve(client));
            self.clients = clients;
        }
    }

    fn wait(&self, now: Instant) {
        let mut watched = vec![Watched { fd: self.shared.wake.fd(), write: false }];
        if self.pause.is_none() {
            watched.push(Watched { fd: self.listener.fd(), write: false });
        }
        let clients = self.clients.iter();
        watched.extend(clients.map(|c| Watched { fd: c.stream.as_raw_fd(), write: c.answer.is_some() }));
        let next = self.clients.iter().map(|client| client.until).chain(self.pause).min();
        poll(&watched, next.map_or(SLEEP_MAX, |next| next.saturating_duration_since(now)));
    }

    /// One at a time: those that are there are served in between.
    fn take_client(&mut self) {
        match self.listener.accept() {
            Ok(stream) => {
                if self.clients.len() == CONNECTIONS_MAX {
                    self.clients.remove(0);
                }
                let until = Instant::now() + CONNECTION_TIME;
                self.clients.push(Client { stream, until, request: Vec::new(), answer: None, written: 0 });
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
            Err(_) => self.pause = Some(Instant::now() + ACCEPT_PAUSE),
        }
    }

    /// Reads and writes as far as it goes. Returns whether the client stays.
    fn serve(&self, client: &mut Client) -> bool {
        if client.answer.is_none() {
            let mut part = [0; REQUEST_BYTES_MAX];
            let room = REQUEST_BYTES_MAX - client.request.len();
            match client.stream.read(&mut part[..room]) {
                Ok(0) => return false,
                Ok(len) => client.request.extend_from_slice(&part[..len]),
                Err(e) => return is_patient(&e),
            }
            let Some(answer) = http::answer(&client.request) else { return true };
            client.answer = Some(self.respond(&answer));
        }
        let Some(answer) = &client.answer else { return true };
        match client.stream.write(&answer[client.written..]) {
            Ok(0) => false,
            Ok(len) => {
                client.written += len;
                client.written < answer.len()
            }
            Err(e) => is_patient(&e),
        }
    }

    fn respond(&self, answer: &Answer) -> Vec<u8> {
        match answer {
            Answer::Metrics { body } => {
                let mut samples = Samples::default();
                for (_, source) in lock(&self.shared.sources).iter() {
                    source.gather(&mut samples);
                }
                http::response("200 OK", &samples.text(), *body)
            }
            Answer::Refuse(status) => http::response(status, &format!("{status}; GET /metrics\n"), true),
        }
    }
}

fn is_patient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
