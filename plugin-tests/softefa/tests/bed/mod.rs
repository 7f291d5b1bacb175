//! A network of software hosts for one test, and the processes on them.

#![allow(dead_code, reason = "each test crate uses a part")]

pub mod gpu;
pub mod peer;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use softefa::{install, topology};

/// How long an operation may take on a busy machine, in milliseconds.
pub const PATIENCE_MS: u64 = 30_000;

/// libfabrics with an efa provider: those in `SOFTEFA_TEST_LIBFABRIC` (paths with colons), else those that the
/// repository's set-up puts under target/libfabric/VERSION.
pub fn libfabrics() -> Vec<PathBuf> {
    if let Ok(paths) = std::env::var("SOFTEFA_TEST_LIBFABRIC") {
        return paths.split(':').map(PathBuf::from).collect();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/libfabric");
    let folders = std::fs::read_dir(root).into_iter().flatten().flatten();
    let found: Vec<_> = folders
        .map(|folder| folder.path().join("libfabric.so.1"))
        .filter(|path| path.with_file_name("libfabric/libefa-fi.so").is_file())
        .collect();
    if found.is_empty() {
        eprintln!("skipped: no libfabric with efa; name one in SOFTEFA_TEST_LIBFABRIC");
    }
    found
}

/// Runs a test with each libfabric and both fabrics of the efa provider.
pub fn each(test: impl Fn(&Network)) {
    for library in libfabrics() {
        for fabric in ["efa", "efa-direct"] {
            eprintln!("{} {fabric}", library.display());
            let network = Network::new(&library, fabric);
            if network.has_fabric() {
                test(&network);
            } else {
                eprintln!("skipped: this libfabric has no fabric {fabric}");
            }
        }
    }
}

/// A directory for `SOFTEFA_DIR`, removed in the end.
pub struct Network {
    dir: PathBuf,
    library: PathBuf,
    /// `efa` or `efa-direct`.
    pub fabric: String,
}

impl Network {
    fn new(library: &Path, fabric: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!("/dev/shm/softefa-test-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("directory");
        Self { dir, library: library.to_owned(), fabric: fabric.to_owned() }
    }

    /// libfabric 1.22 has no efa-direct.
    fn has_fabric(&self) -> bool {
        let mut peer = self.spawn("a");
        peer.tell(&format!("open 0 {}", self.fabric));
        match peer.answer() {
            Ok(_) => true,
            Err(error) if error.contains("0 devices") => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// An empty one of the same kind.
    pub fn another(&self) -> Self {
        Self::new(&self.library, &self.fabric)
    }

    /// efa-direct hands every completion of the device through; efa has a protocol of its own above it.
    pub fn direct(&self) -> bool {
        self.fabric == "efa-direct"
    }

    /// Writes the control file, and waits until every process has read it.
    pub fn control(&self, text: &str) {
        let (path, next) = (self.dir.join("control"), self.dir.join(".control"));
        std::fs::write(&next, text).expect("control");
        std::fs::rename(next, path).expect("control");
        // Processes look every 50 ms, and nothing tells that they did.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }

    /// A process on a host.
    pub fn spawn(&self, host: &str) -> Peer {
        let lib = install::library_dir().expect("libraries");
        let beside = self.library.parent().expect("folder");
        let exe = std::env::current_exe().expect("this test");
        // libfabric finds the device through the environment that its process started with, so each end is a process.
        let mut child = Command::new(&exe)
            .args(["--ignored", "--exact", "peer", "--quiet", "--nocapture"])
            .env("LD_LIBRARY_PATH", format!("{}:{}", lib.display(), beside.display()))
            .env("PEER_LIBFABRIC", &self.library)
            .env("SOFTEFA_DIR", &self.dir)
            .env("SOFTEFA_HOST", host)
            .env("SOFTEFA_DEVICES", "4")
            .env("SOFTEFA_TRACE", "1")
            .env("FI_EFA_ENABLE_SHM_TRANSFER", "0")
            // Registrations end when they are closed, not when a cache finds time.
            .env("FI_EFA_MR_CACHE_ENABLE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", exe.display()));
        let (input, output) = (child.stdin.take().expect("pipe"), child.stdout.take().expect("pipe"));
        Peer { child, input, output: BufReader::new(output), name: String::new(), buffers: Vec::new() }
    }

    /// Two processes on two hosts that know each other, each with a buffer and with `receives` receives posted.
    pub fn pair(&self, length: usize, receives: usize) -> [Peer; 2] {
        let mut ends = [self.spawn("a"), self.spawn("b")];
        for end in &mut ends {
            end.open(0, &self.fabric);
            end.buffer(length);
            end.receives(receives);
        }
        let [a, b] = &mut ends;
        a.connect(b);
        b.connect(a);
        ends
    }

    /// A counter of a device, summed by its name.
    pub fn counter(&self, host: &str, name: &str) -> u64 {
        let devices = topology::Topology::load("p5.48xlarge").expect("known").devices();
        let value = |pci: &topology::Pci| {
            let table = softefa::shm::device::open(&self.dir, &topology::gid(host, *pci)).ok()?;
            table.counters.all().into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        devices.iter().filter_map(|(pci, _)| value(pci)).sum()
    }

    /// The traces of a host's processes.
    pub fn traces(&self, host: &str) -> Vec<String> {
        let prefix = format!("trace-{host}-");
        let files = std::fs::read_dir(&self.dir).expect("directory").flatten();
        let files = files.filter(|file| file.file_name().to_string_lossy().starts_with(&prefix));
        files.map(|file| softefa::trace::dump(&file.path()).expect("trace")).collect()
    }

    /// A file of the host's sysfs.
    pub fn sysfs(&self, host: &str, path: &str) -> String {
        std::fs::read_to_string(self.dir.join("hosts").join(host).join("sys").join(path)).expect(path)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if std::env::var_os("SOFTEFA_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A process.
pub struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    name: String,
    /// Key and base of each buffer.
    pub buffers: Vec<(u64, u64)>,
}

/// What has completed: provider errors of own operations; immediate, length and error of arrivals.
#[derive(Debug, Default)]
pub struct Done {
    /// Own operations.
    pub sent: Vec<i32>,
    /// Messages and writes that came in.
    pub arrived: Vec<(i64, usize, i32)>,
}

impl Peer {
    /// Sends a command without waiting for its answer.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("peer lives");
    }

    /// The next answer.
    pub fn answer(&mut self) -> Result<String, String> {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).expect("pipe") > 0, "the peer has ended");
            // Other lines are the test harness's, on the same pipe.
            let Some(answer) = line.trim_end().strip_prefix("> ") else { continue };
            return match answer.split_once(' ').unwrap_or((answer, "")) {
                ("ok", rest) => Ok(rest.to_owned()),
                _ => Err(answer.to_owned()),
            };
        }
    }

    /// Sends a command; its answer must be good.
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer().unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    pub fn open(&mut self, device: usize, fabric: &str) {
        self.name = self.ask(&format!("open {device} {fabric}"));
    }

    /// The same, with so many entries in the completion queue.
    pub fn open_with(&mut self, device: usize, fabric: &str, cq_entries: usize) {
        self.name = self.ask(&format!("open {device} {fabric} {cq_entries}"));
    }

    pub fn connect(&mut self, peer: &Self) {
        self.ask(&format!("connect {}", peer.name));
    }

    pub fn connect_to_itself(&mut self) {
        self.ask(&format!("connect {}", self.name.clone()));
    }

    pub fn buffer(&mut self, length: usize) {
        let answer = self.ask(&format!("buffer {length}"));
        let (key, base) = answer.split_once(' ').expect("key and base");
        self.buffers.push((key.parse().expect("key"), base.parse().expect("base")));
    }

    /// Posts receives of 64 bytes each into a new buffer.
    pub fn receives(&mut self, count: usize) {
        let buffer = self.buffers.len();
        self.buffer(64 * count.max(1));
        for index in 0..count {
            self.ask(&format!("recv {buffer} {} 64", index * 64));
        }
    }

    /// Posts a write from buffer 0 to the same place in the peer's.
    pub fn write(&mut self, peer: usize, to: &Self, offset: usize, length: usize, imm: Option<u32>) {
        let (key, base) = to.buffers[0];
        let imm = imm.map_or_else(|| "-".to_owned(), |imm| imm.to_string());
        self.ask(&format!("write {peer} 0 {offset} {length} {key} {} {imm}", base + offset as u64));
    }

    /// Posts a read into buffer 0 from the same place in the peer's.
    pub fn read(&mut self, peer: usize, to: &Self, offset: usize, length: usize) {
        let (key, base) = to.buffers[0];
        self.ask(&format!("read {peer} 0 {offset} {length} {key} {}", base + offset as u64));
    }

    /// Waits until so many own operations and arrivals have completed.
    pub fn wait(&mut self, sent: usize, arrived: usize) -> Done {
        let done = self.wait_up_to(sent, arrived, PATIENCE_MS);
        assert!(done.sent.len() >= sent && done.arrived.len() >= arrived, "{sent} {arrived}: {done:?}");
        done
    }

    /// The same, with a limit, after which it returns what there is.
    pub fn wait_up_to(&mut self, sent: usize, arrived: usize, limit_ms: u64) -> Done {
        self.tell(&format!("wait {sent} {arrived} {limit_ms}"));
        self.done()
    }

    /// The answer to a `wait`.
    pub fn done(&mut self) -> Done {
        let answer = self.answer().expect("wait");
        let mut done = Done::default();
        for word in answer.split_whitespace().skip(2) {
            match word.split(':').collect::<Vec<_>>().as_slice() {
                ["t", error] => done.sent.push(error.parse().expect("error")),
                ["r", imm, length, error] => done.arrived.push((
                    imm.parse().expect("imm"),
                    length.parse().expect("length"),
                    error.parse().expect("error"),
                )),
                _ => panic!("{word}"),
            }
        }
        done
    }

    /// Stops the process; a signal takes its time.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("child");
        while !stat().rsplit_once(')').expect("stat").1.starts_with(" T") {
            std::thread::yield_now();
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the pid is its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
