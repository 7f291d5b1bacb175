//! The one error type: a NIXL status and a sentence for the person who reads the log.

use std::fmt;

/// Status codes of NIXL's backend interface (`nixl_status_t`), with its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Status {
    /// The operation goes on; ask again.
    InProgress = 1,
    /// Done.
    Success = 0,
    /// The request was never posted.
    NotPosted = -1,
    /// A parameter is wrong.
    InvalidParam = -2,
    /// The backend failed.
    Backend = -3,
    /// The thing named does not exist.
    NotFound = -4,
    /// Two things that must agree do not.
    Mismatch = -5,
    /// The call is not allowed now.
    NotAllowed = -6,
    /// The request is still in flight.
    RepostActive = -7,
    /// Unknown failure.
    Unknown = -8,
    /// The backend cannot do this.
    NotSupported = -9,
    /// The peer is gone.
    RemoteDisconnect = -10,
    /// The request was cancelled.
    Canceled = -11,
    /// No telemetry is kept.
    NoTelemetry = -12,
}

impl Status {
    /// The value that crosses the C boundary.
    pub fn code(self) -> i32 {
        self as i32
    }
}

/// A failure: what NIXL is told, and what the log says.
///
/// The message names what failed, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with the given status and message.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        debug_assert!((status as i32) < 0, "an error needs an error status");
        Self { status, message: message.into() }
    }

    /// `NIXL_ERR_INVALID_PARAM`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidParam, message)
    }

    /// `NIXL_ERR_BACKEND`.
    pub fn backend(message: impl Into<String>) -> Self {
        Self::new(Status::Backend, message)
    }

    /// `NIXL_ERR_NOT_FOUND`.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Status::NotFound, message)
    }

    /// `NIXL_ERR_NOT_SUPPORTED`.
    pub fn not_supported(message: impl Into<String>) -> Self {
        Self::new(Status::NotSupported, message)
    }

    /// `NIXL_ERR_REMOTE_DISCONNECT`.
    pub fn disconnected(message: impl Into<String>) -> Self {
        Self::new(Status::RemoteDisconnect, message)
    }

    /// The NIXL status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The same error with words before its message: where it happened.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
