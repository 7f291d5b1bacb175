//! As much of HTTP as a scrape needs: one GET, one answer, and the connection ends.

/// Longest request, in bytes. Prometheus' own has some 300.
pub(super) const REQUEST_BYTES_MAX: usize = 8192;

/// What is to be said to a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The metrics; without the body for HEAD.
    Metrics { body: bool },
    /// An error, as the status line has it.
    Refuse(&'static str),
}

/// What a request asks for; none while it is not whole.
pub(super) fn answer(request: &[u8]) -> Option<Answer> {
    let is_whole =
        request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n");
    if !is_whole {
        let too_long = request.len() >= REQUEST_BYTES_MAX;
        return too_long.then_some(Answer::Refuse("431 Request Header Fields Too Large"));
    }
    let line = request.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let mut words = line.trim_ascii_end().split(|&byte| byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Some(Answer::Refuse("400 Bad Request"));
    };
    if !version.starts_with(b"HTTP/1.") {
        return Some(Answer::Refuse("505 HTTP Version Not Supported"));
    }
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
    Some(match (method, path) {
        (b"GET", b"/metrics" | b"/") => Answer::Metrics { body: true },
        (b"HEAD", b"/metrics" | b"/") => Answer::Metrics { body: false },
        (b"GET" | b"HEAD", _) => Answer::Refuse("404 Not Found"),
        _ => Answer::Refuse("405 Method Not Allowed"),
    })
}

/// A whole response.
pub(super) fn response(status: &str, body: &str, with_body: bool) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    let mut response = head.into_bytes();
    if with_body {
        response.extend_from_slice(body.as_bytes());
    }
    response
}
