//! Questions about foreign libraries, each answered by a child process: a library that crashes, hangs or ends the process when
//! it is loaded is a finding like others.
//!
//! The child is this program with the hidden command `probe`. It answers in lines of fields, separated by tabs.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::abi::plugin_facts;
use crate::cuda::Cuda;
use crate::fabric::{Libfabric, Query};
use crate::sys::dl::Library;

/// Longest wait for an answer. Listing 32 EFA devices on a machine with GPUs takes some seconds.
const ANSWER_SECONDS_MAX: u64 = 60;
/// How often a child is looked at.
const LOOK_MS: u64 = 5;
/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Before every line of the answer: a library may write to standard output, too.
const MARK: &str = "nixl-libfabric-probe\t";
/// The first field of a line that is an error.
const ERROR: &str = "error";

/// What a child is asked.
#[derive(Debug, Clone)]
pub enum Question {
    /// Which libfabric is found, and what it offers. The file, if one is to be taken.
    Libfabric(Option<PathBuf>),
    /// What a NIXL plugin says of itself.
    Plugin(PathBuf),
    /// Which libfabric comes with a library.
    LibfabricOf(PathBuf),
    /// The CUDA driver and its devices.
    Cuda,
    /// Whether a library is found by the dynamic linker.
    Library(String),
}

impl Question {
    fn words(&self) -> Vec<PathBuf> {
        let words = |kind: &str, what: Option<&Path>| {
            std::iter::once(PathBuf::from(kind)).chain(what.map(Path::to_owned)).collect()
        };
        match self {
            Self::Libfabric(path) => words("libfabric", path.as_deref()),
            Self::Plugin(path) => words("plugin", Some(path)),
            Self::LibfabricOf(path) => words("libfabric-of", Some(path)),
            Self::Cuda => words("cuda", None),
            Self::Library(name) => words("library", Some(Path::new(name))),
        }
    }

    fn of(words: &[PathBuf]) -> Option<Self> {
        let what = words.get(1).cloned();
        Some(match words.first()?.to_str()? {
            "libfabric" => Self::Libfabric(what),
            "plugin" => Self::Plugin(what?),
            "libfabric-of" => Self::LibfabricOf(what?),
            "cuda" => Self::Cuda,
            "library" => Self::Library(what?.to_str()?.to_owned()),
            _ => return None,
        })
    }
}

/// Lines of fields.
pub type Answer = Vec<Vec<String>>;

/// Asks a child process. The error says how it failed: what the library said, a signal, or that it did not answer.
pub fn ask(question: &Question) -> Result<Answer, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program's own file: {error}"))?;
    let mut child = Command::new(program)
        .arg("probe")
        .args(question.words())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("a child process: {error}"))?;
    let output = child.stdout.take();
    // Reads while the child runs, so that it never waits for room in the pipe.
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = output.map(|output| output.take(ANSWER_BYTES_MAX).read_to_end(&mut text));
        read.transpose().map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let deadline = Instant::now() + Duration::from_secs(ANSWER_SECONDS_MAX);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(LOOK_MS)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it did not answer within {ANSWER_SECONDS_MAX} s"));
            }
            Err(error) => return Err(format!("a child process: {error}")),
        }
    };
    let text = reader.join().map_err(|_| "reading a child's answer failed".to_owned())?;
    let answer = parse(&text.map_err(|error| format!("a child's answer: {error}"))?);
    match answer.iter().find(|line| line[0] == ERROR) {
        Some(line) => Err(line[1..].join(" ")),
        None if status.success() => Ok(answer),
        None => Err(format!("loading it ended the process: {status}")),
    }
}

fn parse(text: &str) -> Answer {
    let lines = text.lines().filter_map(|line| line.strip_prefix(MARK));
    lines.map(|line| line.split('\t').map(ToOwned::to_owned).collect()).collect()
}

/// The child's side: answers on standard output.
pub fn answer(words: &[PathBuf]) -> String {
    let lines = match Question::of(words) {
        Some(Question::Libfabric(path)) => libfabric(path.as_deref()),
        Some(Question::Plugin(path)) => plugin(&path),
        Some(Question::LibfabricOf(path)) => libfabric_of(&path),
        Some(Question::Cuda) => cuda(),
        Some(Question::Library(name)) => library(&name),
        None => Err("no such question".to_owned()),
    };
    let lines = lines.unwrap_or_else(|error| vec![vec![ERROR.to_owned(), error]]);
    lines.iter().fold(String::new(), |mut out, fields| {
        let fields: Vec<String> = fields.iter().map(|field| field.replace(['\t', '\n'], " ")).collect();
        let _ = writeln!(out, "{MARK}{}", fields.join("\t"));
        out
    })
}

fn libfabric(path: Option<&Path>) -> Result<Answer, String> {
    let library = Libfabric::load(path).map_err(|error| error.to_string())?;
    let (version, origin) = (library.version(), library.origin());
    let mut lines = vec![vec![
        "library".to_owned(),
        origin.to_owned(),
        version.major.to_string(),
        version.minor.to_string(),
    ]];
    for hmem in [false, true] {
        let offered = library.discover(&Query { hmem, ..Query::default() });
        // A provider that fails when it is asked for accelerator memory offers none.
        let offered =
            if hmem { offered.unwrap_or_default() } else { offered.map_err(|error| error.to_string())? };
        for device in offered {
            let kind = if hmem && device.has_hmem() { "accelerator" } else { "host" };
            lines.push([kind, device.provider(), device.domain_name()].map(ToOwned::to_owned).to_vec());
        }
    }
    lines.dedup();
    Ok(lines)
}

fn plugin(path: &Path) -> Result<Answer, String> {
    let facts = plugin_facts(path)?;
    Ok(vec![vec!["plugin".to_owned(), facts.api_version.to_string(), facts.name, facts.version]])
}

fn libfabric_of(path: &Path) -> Result<Answer, String> {
    Library::load(path)?;
    let maps = fs::read_to_string("/proc/self/maps").map_err(|error| format!("/proc/self/maps: {error}"))?;
    let is_libfabric =
        |path: &&str| path.rsplit('/').next().is_some_and(|file| file.starts_with("libfabric"));
    let found: BTreeSet<&str> =
        maps.lines().filter_map(|line| line.split_whitespace().nth(5)).filter(is_libfabric).collect();
    Ok(found.into_iter().map(|path| vec!["libfabric".to_owned(), path.to_owned()]).collect())
}

fn cuda() -> Result<Answer, String> {
    let cuda = Cuda::get().map_err(|error| error.to_string())?;
    let (major, minor) = cuda.driver_version();
    let mut lines =
        vec![vec!["driver".to_owned(), format!("{major}.{minor}"), cuda.library_name().to_owned()]];
    for device in cuda.devices() {
        let flag = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        lines.push(vec![
            "gpu".to_owned(),
            device.pci.to_string(),
            flag(device.dmabuf),
            flag(device.gdr),
            device.name.clone(),
        ]);
    }
    Ok(lines)
}

fn library(name: &str) -> Result<Answer, String> {
    Library::load(Path::new(name)).map(|_| vec![vec!["found".to_owned(), name.to_owned()]])
}
