//! The EC2 instance metadata service, version 2: what it says of the instance's networks.
//!
//! Three requests of HTTP 1.0 to a link-local address; the plugin itself never asks. `AWS_EC2_METADATA_SERVICE_ENDPOINT` names
//! another address, as in the AWS SDKs.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

/// Where the service answers on an instance.
const ENDPOINT: &str = "http://169.254.169.254";
/// Longest wait for all answers. It answers within milliseconds, or not at all.
const WAIT: Duration = Duration::from_secs(2);
/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Most network interfaces that are asked about; the largest instances have 32 network cards.
const INTERFACES_MAX: usize = 64;

/// What the service says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// As `p5.48xlarge`.
    pub instance_type: String,
    /// The network interfaces that have an address. EFA-only interfaces have none.
    pub interfaces: Vec<Interface>,
}

/// A network interface of the instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its hardware address, which is how the service names it.
    pub mac: String,
    /// The block of its subnet.
    pub subnet: String,
    /// The primary block of its VPC.
    pub primary: String,
    /// Its security groups.
    pub groups: Vec<String>,
}

/// Asks the service. The error says why there is no answer.
pub(super) fn ask(endpoint: Option<&str>) -> Result<Metadata, String> {
    let endpoint = endpoint.unwrap_or(ENDPOINT);
    let service = Service { endpoint, deadline: Instant::now() + WAIT };
    let token = service
        .request("PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60")
        .map_err(|error| format!("{endpoint}: {error}"))?;
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let get = |path: &str| service.request("GET", &format!("/latest/meta-data/{path}"), &header);
    let macs = get("network/interfaces/macs/").map_err(|error| format!("{endpoint}: {error}"))?;
    let interface = |mac: &str| {
        // What an interface does not have is answered by 404.
        let of = |what: &str| get(&format!("network/interfaces/macs/{mac}/{what}")).unwrap_or_default();
        Interface {
            mac: mac.to_owned(),
            subnet: of("subnet-ipv4-cidr-block"),
            primary: of("vpc-ipv4-cidr-block"),
            groups: of("security-group-ids").split_whitespace().map(ToOwned::to_owned).collect(),
        }
    };
    let macs = macs.split_whitespace().map(|mac| mac.trim_end_matches('/')).take(INTERFACES_MAX);
    Ok(Metadata {
        instance_type: get("instance-type").unwrap_or_default(),
        interfaces: macs.map(interface).filter(|interface| !interface.subnet.is_empty()).collect(),
    })
}

struct Service<'a> {
    endpoint: &'a str,
    deadline: Instant,
}

impl Service<'_> {
    fn left(&self) -> Result<Duration, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(format!("no answer within {} s", WAIT.as_secs())) } else { Ok(left) }
    }

    fn request(&self, method: &str, path: &str, header: &str) -> Result<String, String> {
        let host =
            self.endpoint.strip_prefix("http://").ok_or("an address that begins with http:// is wanted")?;
        let host = host.trim_end_matches('/');
        let authority = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
        let address =
            authority.to_socket_addrs().map_err(|error| error.to_string())?.next().ok_or("no address")?;
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => "no answer".to_owned(),
            _ => error.to_string(),
        };
        let mut stream = TcpStream::connect_timeout(&address, self.left()?).map_err(failed)?;
        stream.set_write_timeout(Some(self.left()?)).map_err(failed)?;
        let request =
            format!("{method} {path} HTTP/1.0\r\nHost: {host}\r\nContent-Length: 0\r\n{header}\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut answer = Vec::new();
        let mut part = [0; 4096];
        loop {
            stream.set_read_timeout(Some(self.left()?)).map_err(failed)?;
            match stream.read(&mut part).map_err(failed)? {
                0 => break,
                count => answer.extend_from_slice(&part[..count]),
            }
            if answer.len() as u64 > ANSWER_BYTES_MAX {
                return Err("an answer without end".to_owned());
            }
        }
        body(&String::from_utf8_lossy(&answer)).map(|text| text.trim().to_owned())
    }
}

fn body(answer: &str) -> Result<&str, String> {
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer in HTTP")?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if status == "200" { Ok(body) } else { Err(format!("status {status}")) }
}

#[cfg(test)]
mod tests {
    use super::body;

    #[test]
    fn an_answer_is_its_body_or_its_status() {
        assert_eq!(body("HTTP/1.1 200 OK\r\nA: b\r\n\r\n10.0.0.0/16"), Ok("10.0.0.0/16"));
        assert_eq!(body("HTTP/1.0 404 Not Found\r\n\r\n"), Err("status 404".to_owned()));
        assert!(body("ssh").is_err());
    }
}
