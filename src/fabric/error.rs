//! Failures of libfabric calls and completions, in words and as NIXL statuses.

use std::ffi::CStr;
use std::fmt;

use crate::error::{Error, Status};
use crate::sys::libfabric as sys;

/// A libfabric call that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FabricError {
    /// The call, as libfabric's manual names it.
    pub call: &'static str,
    /// libfabric error number, positive; below 256 it is an errno value.
    pub code: i32,
    /// What the number means, and what is known about this failure.
    pub text: String,
}

impl FabricError {
    /// A failure with the words that belong to its number.
    pub fn new(call: &'static str, code: i32) -> Self {
        Self { call, code, text: describe(code) }
    }

    /// A request that was refused here, before libfabric saw it.
    pub(super) fn refused(call: &'static str, text: impl Into<String>) -> Self {
        Self { call, code: libc::EINVAL, text: text.into() }
    }

    /// `Ok` unless `status` is negative.
    pub(super) fn check(call: &'static str, status: isize) -> Result<(), Self> {
        if status < 0 { Err(Self::new(call, code_of(status))) } else { Ok(()) }
    }

    /// Whether the device itself has failed.
    pub fn is_of_device(&self) -> bool {
        self.code == libc::ENODEV
    }

    /// Whether the device may have failed: the number names neither the peer, nor the request, nor what cannot be had.
    pub fn may_be_of_device(&self) -> bool {
        self.is_of_device() || status_of(self.code) == Status::Backend
    }

    /// The same failure with more words.
    #[must_use]
    pub(super) fn hint(mut self, words: impl fmt::Display) -> Self {
        self.text = format!("{}: {words}", self.text);
        self
    }
}

/// Positive error number of a negative status.
pub(super) fn code_of(status: isize) -> i32 {
    i32::try_from(status.unsigned_abs()).unwrap_or(sys::FI_EOTHER)
}

impl fmt::Display for FabricError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.call, self.text, self.code)
    }
}

impl std::error::Error for FabricError {}

impl From<FabricError> for Error {
    fn from(error: FabricError) -> Self {
        Self::new(status_of(error.code), error.to_string())
    }
}

/// NIXL status of a failed call or completion, by libfabric's error number.
pub(super) fn status_of(code: i32) -> Status {
    if is_disconnect(code) {
        return Status::RemoteDisconnect;
    }
    match code {
        libc::EINVAL | libc::EMSGSIZE | sys::FI_EBADFLAGS => Status::InvalidParam,
        libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOPROTOOPT => Status::NotSupported,
        libc::ENODEV | libc::ENODATA => Status::NotFound,
        libc::ECANCELED => Status::Canceled,
        _ => Status::Backend,
    }
}

/// Whether an error number says that the peer, or the way to it, is gone.
///
/// A completion's provider error number may say so, too: see [`super::efa::is_disconnect`] and
/// [`super::CompletionError::is_disconnect`].
pub fn is_disconnect(code: i32) -> bool {
    matches!(
        code,
        libc::ECONNREFUSED
            | libc::ECONNRESET
            | libc::ECONNABORTED
            | libc::ENOTCONN
            | libc::ESHUTDOWN
            | libc::EPIPE
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ETIMEDOUT
    )
}

/// Words for an error number, without asking a library: calls fail before one is chosen, too.
fn describe(code: i32) -> String {
    let text = match code {
        sys::FI_EOTHER => "unspecified error",
        sys::FI_ETOOSMALL => "the buffer is too small",
        sys::FI_EOPBADSTATE => "not permitted in this state",
        sys::FI_EAVAIL => "an error is waiting on the queue",
        sys::FI_EBADFLAGS => "flags not supported",
        sys::FI_ENOEQ => "no event queue",
        sys::FI_EDOMAIN => "wrong domain",
        sys::FI_ENOCQ => "no completion queue",
        sys::FI_ECRC => "checksum error",
        sys::FI_ETRUNC => "the message is longer than the buffer",
        sys::FI_ENOKEY => "the key is taken, or no registration has it",
        sys::FI_ENOAV => "no address vector",
        sys::FI_EOVERRUN => "the queue was overrun",
        sys::FI_ENORX => "the peer has no receive buffer posted",
        errno => return errno_text(errno),
    };
    text.to_owned()
}

fn errno_text(errno: i32) -> String {
    let mut buffer = [0u8; 128];
    // SAFETY: the buffer is as long as said; the XSI strerror_r writes a C string into it. (libc binds
    // __xpg_strerror_r under this name.)
    let status = unsafe { libc::strerror_r(errno, buffer.as_mut_ptr().cast(), buffer.len()) };
    match CStr::from_bytes_until_nul(&buffer) {
        Ok(text) if status == 0 => text.to_string_lossy().into_owned(),
        _ => format!("error {errno}"),
    }
}

/// What to do when a registration fails. `efa`: it was efa's, which passes on what `ibv_reg_mr` says.
pub(super) fn registration_hint(efa: bool, code: i32) -> Option<&'static str> {
    match code {
        // The kernel says the same of both limits.
        libc::ENOMEM if efa => Some(
            "the NIC could not take the memory. Either the locked-memory limit is too low (`ulimit -l`; raise it by \
             `ulimit -l unlimited`, or LimitMEMLOCK=infinity), or the NIC's page entries are used up: an EFA NIC has about 24 \
             million, some 90 GB in pages of 4 KiB. Put large host pools on huge pages (2 MiB or 1 GiB), or register \
             less on each NIC (max_bw_per_dram_seg)",
        ),
        libc::ENOMEM => Some(
            "the NIC could not pin the memory: raise the locked-memory limit (`ulimit -l unlimited`, or \
             LimitMEMLOCK=infinity), or register less on each NIC",
        ),
        libc::EFAULT => Some("the address range is not mapped, or is device memory given as host memory"),
        libc::ENOSYS | libc::EOPNOTSUPP => {
            Some("this libfabric, or its provider, cannot register this kind of memory")
        }
        libc::ENOKEY | sys::FI_ENOKEY => Some("the requested key is in use"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_a_nic_cannot_take_has_two_remedies() {
        let words = registration_hint(true, libc::ENOMEM).expect("words");
        assert!(words.contains("huge pages") && words.contains("24 million") && words.contains("ulimit -l"));
        // Page entries are what EFA NICs run out of.
        assert!(!registration_hint(false, libc::ENOMEM).expect("words").contains("huge pages"));
    }

    #[test]
    fn numbers_become_words_and_statuses() {
        let error = FabricError::new("fi_writemsg", libc::ECONNREFUSED);
        assert_eq!(error.to_string(), "fi_writemsg: Connection refused (111)");
        assert_eq!(Error::from(error).status(), Status::RemoteDisconnect);
        assert_eq!(Error::from(FabricError::new("fi_mr_regattr", sys::FI_ENOKEY)).status(), Status::Backend);
        assert_eq!(FabricError::check("x", 3), Ok(()));
        assert_eq!(FabricError::check("x", -11).unwrap_err().code, libc::EAGAIN);
        assert_eq!(describe(99_999), "error 99999");
    }

    #[test]
    fn peers_that_are_gone_are_told_from_other_failures() {
        assert!(is_disconnect(libc::EHOSTUNREACH));
        assert!(!is_disconnect(libc::EIO));
        assert!(!is_disconnect(sys::FI_ENOKEY));
    }
}
