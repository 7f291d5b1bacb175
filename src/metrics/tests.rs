use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::http::{Answer, REQUEST_BYTES_MAX, answer};
use super::read::{Sample, ask, endpoint_of, parse};
use super::*;

/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The number of the one sample with this name and these labels.
fn count_of(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> u64 {
    let mut found = samples
        .iter()
        .filter(|s| s.name == name && labels.iter().all(|(label, value)| s.label(label) == *value));
    let first = found.next().unwrap_or_else(|| panic!("no {name} {labels:?}"));
    assert!(found.next().is_none(), "{name} {labels:?} stands there twice");
    first.value as u64
}

#[test]
fn names_keep_the_conventions() {
    let names: BTreeSet<_> = METRICS.iter().map(|spec| spec.name).collect();
    assert_eq!(names.len(), METRICS.len());
    for spec in METRICS {
        assert_eq!(spec.name.ends_with("_total"), spec.kind == Kind::Counter, "{}", spec.name);
        assert_eq!(spec.name.ends_with("_seconds"), spec.kind == Kind::Histogram, "{}", spec.name);
        assert!(!spec.help.contains(['|', '\n', '\\']), "{}", spec.name);
    }
    assert_eq!(Metric::PeerPending as usize, METRICS.len() - 1);
}

#[test]
fn the_text_is_in_prometheus_form() {
    let mut samples = Samples::default();
    samples.begin("a".into());
    samples.add(Metric::Peers, &[], 3);
    samples.add(Metric::Healthy, &[], true);
    samples.begin("b\"\\\n".into());
    samples.add(Metric::Peers, &[], 4);
    let text = samples.text();
    let expected = "\
# HELP nixl_libfabric_healthy 1; 0 when the plugin has panicked and this backend refuses all calls.
# TYPE nixl_libfabric_healthy gauge
nixl_libfabric_healthy{agent=\"a\"} 1
# HELP nixl_libfabric_peers Peers known. Only the first 256 have series of their own.
# TYPE nixl_libfabric_peers gauge
nixl_libfabric_peers{agent=\"a\"} 3
nixl_libfabric_peers{agent=\"b\\\"\\\\\\n\"} 4
";
    assert_eq!(text, expected);
}

#[test]
fn agents_of_one_name_are_told_apart() {
    let mut samples = Samples::default();
    for count in [1, 2, 3] {
        samples.begin("a".into());
        samples.add(Metric::Peers, &[], count);
    }
    let read = parse(&samples.text()).unwrap();
    for (agent, count) in [("a", 1), ("a#2", 2), ("a#3", 3)] {
        assert_eq!(count_of(&read, "nixl_libfabric_peers", &[("agent", agent)]), count);
    }
}

#[test]
fn long_names_are_cut_and_stay_apart() {
    let (long, other) = ("ä".repeat(5000), "ä".repeat(5001));
    assert_eq!(label_of(&"short", 1), "short");
    assert!(label_of(&long, 1).len() < 160);
    assert_ne!(label_of(&long, 1), label_of(&other, 2));
}

proptest! {
    #[test]
    fn what_is_written_is_read(agent: String, peer: String, count in 0..1u64 << 53) {
        let mut samples = Samples::default();
        samples.begin(agent.clone());
        samples.add(Metric::PeerErrors, &[&peer], count);
        // A carriage return alone is no line's end for the format, and is one for nobody here.
        let read = parse(&samples.text()).unwrap();
        prop_assert_eq!(read.len(), 1);
        prop_assert_eq!(read[0].label("agent"), &agent);
        prop_assert_eq!(read[0].label("peer"), &peer);
        prop_assert_eq!(read[0].value as u64, count);
    }

    #[test]
    fn times_fall_into_the_bucket_that_bounds_them(times in prop::collection::vec(0..20_000_000u64, 0..50)) {
        let histogram = Histogram::default();
        for &us in &times {
            histogram.record(Duration::from_micros(us));
        }
        let mut samples = Samples::default();
        samples.begin("a".into());
        samples.add_times(Metric::TransferSeconds, &[&"read", &"1MiB"], &histogram);
        for s in parse(&samples.text()).unwrap() {
            let expected = match (s.name.as_str(), s.label("le")) {
                ("nixl_libfabric_transfer_seconds_bucket", le) => {
                    let bound: f64 = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
                    times.iter().filter(|&&us| us as f64 <= bound * 1e6 + 1e-6).count() as f64
                }
                ("nixl_libfabric_transfer_seconds_sum", "") => times.iter().sum::<u64>() as f64 / 1e6,
                ("nixl_libfabric_transfer_seconds_count", "") => times.len() as f64,
                other => panic!("{other:?}"),
            };
            prop_assert!((s.value - expected).abs() < 1e-6, "{s:?}, expected {expected}");
        }
    }

    #[test]
    fn no_request_breaks_the_reader(request: Vec<u8>) {
        let _ = answer(&request);
    }

    #[test]
    fn no_text_breaks_the_parser(text: String) {
        let _ = parse(&text);
    }
}

#[test]
fn requests_are_answered_as_http_wants() {
    let metrics = |body| Some(Answer::Metrics { body });
    assert_eq!(answer(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), metrics(true));
    assert_eq!(answer(b"GET /metrics?a=b HTTP/1.0\n\n"), metrics(true));
    assert_eq!(answer(b"HEAD / HTTP/1.1\r\n\r\n"), metrics(false));
    assert_eq!(answer(b"GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
    for (request, status) in [
        (&b"GET /secret HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET\r\n\r\n", "400"),
        (b"\r\n\r\n", "400"),
        (b"GET /metrics HTTP/2\r\n\r\n", "505"),
        (&[b'a'; REQUEST_BYTES_MAX], "431"),
    ] {
        assert!(
            matches!(answer(request), Some(Answer::Refuse(said)) if said.starts_with(status)),
            "{status}"
        );
    }
}

#[test]
fn addresses_read_as_they_print() {
    for text in ["127.0.0.1:9400", "127.0.0.1:0", "[::1]:9400-9415", "0.0.0.0:9400-9400", "/run/nixl-%p.sock"]
    {
        let read: Address = text.parse().unwrap();
        assert_eq!(read.to_string().parse::<Address>().unwrap(), read, "{text}");
    }
    assert_eq!("localhost:9400".parse::<Address>().unwrap().to_string(), "127.0.0.1:9400");
    for text in [
        "9400",
        "on",
        "run/x.sock",
        "127.0.0.1",
        "127.0.0.1:9400-",
        "127.0.0.1:9-8",
        "127.0.0.1:0-8",
        "host:1",
    ] {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
    assert!("127.0.0.1:1-65535".parse::<Address>().is_err(), "too many ports");
}

#[test]
fn the_documents_table_is_this_one() {
    const BEGIN: &str = "<!-- metrics:begin -->\n";
    const END: &str = "<!-- metrics:end -->";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    let document = std::fs::read_to_string(path).unwrap();
    let begin = document.find(BEGIN).expect("docs/metrics.md lacks `<!-- metrics:begin -->`") + BEGIN.len();
    let end = begin + document[begin..].find(END).expect("docs/metrics.md lacks `<!-- metrics:end -->`");
    let written = format!("{}{}{}", &document[..begin], markdown_table(), &document[end..]);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, written).unwrap();
    } else {
        assert!(document == written, "docs/metrics.md has an old table; run `BLESS=1 cargo test metrics`");
    }
}

/// Metrics of a made-up agent.
struct Agent(&'static str);

impl Source for Agent {
    fn gather(&self, samples: &mut Samples) {
        samples.begin(self.0.into());
        samples.add(Metric::Healthy, &[], true);
        // More than a socket takes in at once.
        for peer in 0..20_000 {
            samples.add(Metric::PeerErrors, &[&peer], peer);
        }
    }
}

fn open(address: &str, agent: &'static str) -> crate::error::Result<Endpoint> {
    Endpoint::open(&address.parse().unwrap(), Arc::new(Agent(agent)))
}

fn request(location: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(location).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    // A refused request that was not read to its end resets the connection, after the answer or before it.
    let _ = stream.read_to_string(&mut answer);
    answer
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn agents_share_an_endpoint_and_the_last_one_ends_it() {
    // Of two tests in one process the second would share this address.
    let (first, second) = (open("127.0.0.2:0", "first").unwrap(), open("127.0.0.2:0", "second").unwrap());
    let location = first.location().to_owned();
    assert_eq!(second.location(), location);
    let read = ask(&location).unwrap();
    for agent in ["first", "second"] {
        assert_eq!(count_of(&read, "nixl_libfabric_healthy", &[("agent", agent)]), 1);
    }
    drop(first);
    assert!(ask(&location).unwrap().iter().all(|s| s.label("agent") == "second"));
    drop(second);
    assert!(TcpStream::connect(&location).is_err(), "it still listens");
}

#[test]
fn a_port_of_a_range_is_taken_or_it_is_said_that_none_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = open(&format!("127.0.0.3:{port}"), "a").err().unwrap().to_string();
    assert!(error.contains(&port.to_string()) && error.contains("in use"), "{error}");
    let next = open(&format!("127.0.0.3:{port}-{}", port.saturating_add(20)), "a").unwrap();
    assert_ne!(next.location(), taken.local_addr().unwrap().to_string());
    ask(next.location()).unwrap();
}

#[test]
fn bad_clients_hold_up_nobody() {
    let endpoint = open("127.0.0.4:0", "a").unwrap();
    let location = endpoint.location();
    // More than are served at a time: half a request, nothing at all, a request that is not read.
    let idle: Vec<_> = (0..100)
        .map(|i| {
            let mut stream = TcpStream::connect(location).unwrap();
            let part: &[u8] = [&b"GET /metr"[..], b"", b"GET /metrics HTTP/1.0\r\n\r\n"][i % 3];
            stream.write_all(part).unwrap();
            stream
        })
        .collect();
    assert!(request(location, &vec![b'x'; 4 * REQUEST_BYTES_MAX]).len() < 1000);
    assert!(request(location, b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    assert!(request(location, b"HEAD / HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
    let read = ask(location).unwrap();
    assert_eq!(count_of(&read, "nixl_libfabric_peer_errors_total", &[("peer", "19999")]), 19_999);
    // Each is let go of in time.
    for mut stream in idle {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        assert!(end.is_ok() || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
}

#[test]
fn a_socket_in_a_folder_is_the_owners_and_goes_with_the_endpoint() {
    let pattern = std::env::temp_dir().join("nixl-metrics-test-%p.sock").display().to_string();
    let path = PathBuf::from(pattern.replace("%p", &std::process::id().to_string()));
    // One that a killed process left behind is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let endpoint = open(&pattern, "a").unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    ask(endpoint.location()).unwrap();
    drop(endpoint);
    assert!(!path.exists());
    // What is no socket stays, and is an error.
    std::fs::write(&path, "precious").unwrap();
    assert!(open(&pattern, "a").is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_process_tells_where_its_endpoint_is() {
    let endpoint = open("127.0.0.5:0", "a").unwrap();
    until("the endpoint of this process is not found", || {
        // Other tests of this process may have endpoints, too.
        endpoint_of(std::process::id())
            .is_ok_and(|location| location.starts_with("127.0.0.") || location.starts_with('/'))
    });
    drop(endpoint);
    let unknown = endpoint_of(u32::MAX).unwrap_err().to_string();
    assert!(unknown.contains("cannot be read"), "{unknown}");
}

#[test]
fn strangers_are_no_endpoint() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let location = listener.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    });
    assert!(ask(&location).is_err());
    thread.join().unwrap();
    assert!(ask("nowhere").unwrap_err().to_string().contains("neither"));
}
