//! What comes back: completions, and events that belong to no operation.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::{MaybeUninit, zeroed};

use super::efa;
use super::endpoint::Endpoint;
use super::error::{FabricError, code_of, is_disconnect, status_of};
use crate::error::{Error, Status};
use crate::sys::libfabric as sys;

/// Most entries that one poll takes.
const POLL_ENTRIES_MAX: usize = 64;

/// Flags that say what has completed.
const KINDS: u64 = sys::FI_SEND | sys::FI_RECV | sys::FI_WRITE | sys::FI_READ | sys::FI_REMOTE_WRITE;

/// One entry of the completion queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Context of the operation of ours that is over; `None` for a peer's write.
    pub context: Option<u32>,
    /// libfabric's flags, which say what has completed.
    pub flags: u64,
    /// Bytes received; 0 or undefined for what we sent.
    pub len: usize,
    /// Immediate data that the peer sent along.
    pub imm: Option<u32>,
    /// Why it failed, if it did.
    pub error: Option<Box<CompletionError>>,
}

impl Completion {
    /// A receive that we posted.
    pub fn is_recv(&self) -> bool {
        self.flags & sys::FI_RECV != 0
    }

    /// A peer has written to our memory.
    pub fn is_remote_write(&self) -> bool {
        self.flags & sys::FI_REMOTE_WRITE != 0
    }

    /// A send, write or read that we posted.
    pub fn is_tx(&self) -> bool {
        !self.is_recv() && self.flags & (sys::FI_SEND | sys::FI_WRITE | sys::FI_READ) != 0
    }
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompletionError {
    /// libfabric's error number, positive.
    pub code: i32,
    /// The provider's error number.
    pub prov_code: i32,
    /// Both in words.
    pub text: String,
    disconnect: bool,
}

impl CompletionError {
    fn new(efa: bool, code: i32, prov_code: i32, provider_text: &str) -> Self {
        // Providers without numbers of their own put an errno there: tcp says that an operation was cancelled, and only
        // there that it was because the connection broke.
        let disconnect = is_disconnect(code)
            || if efa { efa::is_disconnect(prov_code) } else { is_disconnect(prov_code.saturating_abs()) };
        let words = FabricError::new("", code).text;
        let text = if provider_text.is_empty() || provider_text == words {
            format!("{words} ({code}, provider {prov_code})")
        } else {
            format!("{words}: {provider_text} ({code}, provider {prov_code})")
        };
        let text = match efa.then(|| efa::remedy(prov_code)).flatten() {
            Some(remedy) => format!("{text}. {remedy}"),
            None => text,
        };
        Self { code, prov_code, text, disconnect }
    }

    /// Whether the peer, or the way to it, is gone.
    pub fn is_disconnect(&self) -> bool {
        self.disconnect
    }

    /// NIXL's status for it.
    pub fn status(&self) -> Status {
        if self.disconnect { Status::RemoteDisconnect } else { status_of(self.code) }
    }
}

impl From<CompletionError> for Error {
    fn from(error: CompletionError) -> Self {
        Self::new(error.status(), error.text)
    }
}

impl Endpoint {
    /// Drives the endpoint and appends what has completed, at most 64 entries; says how many. Contexts in them are
    /// free again.
    ///
    /// An error says that the queue itself has failed; failures of operations are entries.
    pub fn poll(&mut self, out: &mut Vec<Completion>) -> Result<usize, FabricError> {
        let mut entries: [MaybeUninit<sys::fi_cq_data_entry>; POLL_ENTRIES_MAX] =
            [const { MaybeUninit::uninit() }; POLL_ENTRIES_MAX];
        let cq = self.cq.as_ptr();
        // SAFETY: the queue is open, of FI_CQ_FORMAT_DATA, and the array has room for that many entries.
        let status = unsafe {
            match (*(*cq).ops).read {
                Some(read) => read(cq, entries.as_mut_ptr().cast(), POLL_ENTRIES_MAX),
                None => -(libc::ENOSYS as isize),
            }
        };
        if status >= 0 {
            let count = (status as usize).min(POLL_ENTRIES_MAX);
            out.reserve(count);
            for entry in &entries[..count] {
                // SAFETY: the provider has filled this many entries.
                let entry = unsafe { entry.assume_init_ref() };
                let completion = self.completion(entry.op_context, entry.flags, entry.len, entry.data);
                out.push(completion);
            }
            return Ok(count);
        }
        match code_of(status) {
            libc::EAGAIN | libc::EINTR => Ok(0),
            sys::FI_EAVAIL => self.poll_errors(out),
            code => Err(FabricError::new("fi_cq_read", code)),
        }
    }

    fn poll_errors(&mut self, out: &mut Vec<Completion>) -> Result<usize, FabricError> {
        let cq = self.cq.as_ptr();
        for count in 0..POLL_ENTRIES_MAX {
            // SAFETY: integers and raw pointers, for which zero is a value; no room for error data is offered, so the
            // provider lends its own until the next read.
            let mut entry: sys::fi_cq_err_entry = unsafe { zeroed() };
            // SAFETY: the queue is open; the entry is as large as that of the newest release, with room to spare.
            let status = unsafe {
                match (*(*cq).ops).readerr {
                    Some(readerr) => readerr(cq, &raw mut entry, 0),
                    None => -(libc::ENOSYS as isize),
                }
            };
            if status <= 0 {
                // Nothing (more) to read: another reader's, or announced before it was there.
                return match code_of(status) {
                    0 | libc::EAGAIN => Ok(count),
                    code => Err(FabricError::new("fi_cq_readerr", code)),
                };
            }
            // SAFETY: the queue is open; the error data is the provider's, untouched since.
            let words = unsafe {
                let strerror = (*(*cq).ops).strerror;
                provider_text(|buffer, len| {
                    strerror.map(|f| f(cq, entry.prov_errno, entry.err_data, buffer, len))
                })
            };
            let error = CompletionError::new(self.is_efa(), entry.err, entry.prov_errno, &words);
            let completion = self.completion(entry.op_context, entry.flags, entry.len, entry.data);
            out.push(Completion { error: Some(Box::new(error)), ..completion });
        }
        Ok(POLL_ENTRIES_MAX)
    }

    /// Frees the context that an entry names, and what the operation held.
    fn completion(&mut self, context: *mut c_void, flags: u64, len: usize, data: u64) -> Completion {
        let imm = (flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(data as u32);
        let index = self.slots.index_of(context);
        let operation = index.and_then(|index| self.slots.release(index));
        let Some(operation) = operation else {
            if let Some(index) = index {
                log::error!("{self:?}: a completion for context {index}, which is not in flight");
            }
            return Completion { context: None, flags, len, imm, error: None };
        };
        if let Some(peer) = operation.peer {
            self.peers.finished(peer);
        }
        // Providers leave the flags of some error entries empty.
        let flags = if flags & KINDS == 0 { flags | operation.flags } else { flags };
        Completion { context: index, flags, len, imm, error: None }
    }

    /// Reads events that belong to no operation, logs them, and gives the errors: after one, the endpoint is not to be
    /// trusted.
    pub fn drain_events(&mut self) -> Vec<CompletionError> {
        let Some(eq) = self.eq.as_ref().map(super::handle::Handle::as_ptr) else { return Vec::new() };
        let mut errors = Vec::new();
        for _ in 0..POLL_ENTRIES_MAX {
            let (mut event, mut entry) = (0u32, [0u64; 32]);
            // SAFETY: the queue is open; the buffer is as long as said and larger than any event.
            let status = unsafe {
                match (*(*eq).ops).read {
                    Some(read) => read(eq, &raw mut event, entry.as_mut_ptr().cast(), size_of_val(&entry), 0),
                    None => return errors,
                }
            };
            if status >= 0 {
                log::debug!("{self:?}: event {event}");
                continue;
            }
            if code_of(status) != sys::FI_EAVAIL {
                break;
            }
            // SAFETY: as in `poll_errors`.
            let mut entry: sys::fi_eq_err_entry = unsafe { zeroed() };
            // SAFETY: as in `poll_errors`.
            let words = unsafe {
                let Some(readerr) = (*(*eq).ops).readerr else { break };
                if readerr(eq, &raw mut entry, 0) <= 0 {
                    break;
                }
                let strerror = (*(*eq).ops).strerror;
                provider_text(|buffer, len| {
                    strerror.map(|f| f(eq, entry.prov_errno, entry.err_data, buffer, len))
                })
            };
            let error = CompletionError::new(self.is_efa(), entry.err, entry.prov_errno, &words);
            log::error!("{self:?}: {}", error.text);
            errors.push(error);
        }
        errors
    }

    fn is_efa(&self) -> bool {
        efa::is_efa(self.domain().device().provider())
    }
}

/// Words of a provider for its own error number.
///
/// # Safety
/// `strerror` gives null or a C string, in the buffer that it is lent or elsewhere.
unsafe fn provider_text(strerror: impl FnOnce(*mut c_char, usize) -> Option<*const c_char>) -> String {
    let mut buffer = [0 as c_char; 256];
    match strerror(buffer.as_mut_ptr(), buffer.len() - 1) {
        // SAFETY: the caller's promise; the last byte of the buffer stays 0.
        Some(text) if !text.is_null() => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        _ => String::new(),
    }
}

const _: () = assert!(size_of::<c_int>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn provider_numbers_count_only_for_their_provider() {
        assert!(CompletionError::new(true, libc::EIO, 15, "").is_disconnect());
        assert!(!CompletionError::new(false, libc::EIO, 15, "").is_disconnect());
        assert!(CompletionError::new(true, libc::EIO, 15, "").text.contains("security group"));
        assert!(!CompletionError::new(false, libc::EIO, 15, "").text.contains("security group"));
        assert!(CompletionError::new(false, libc::ECANCELED, libc::ENOTCONN, "").is_disconnect());
        assert!(!CompletionError::new(false, libc::ECANCELED, libc::ECANCELED, "").is_disconnect());
        let error = CompletionError::new(false, libc::ECONNRESET, 0, "Connection reset by peer");
        assert_eq!(error.text, "Connection reset by peer (104, provider 0)");
        assert_eq!(Error::from(error).status(), Status::RemoteDisconnect);
    }
}
