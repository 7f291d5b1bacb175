//! What comes back: completions, and events that belong to no operation.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::{MaybeUninit, zeroed};

use super::efa;
use super::endpoint::Endpoint;
use super::error::{FabricError, code_of, is_disconnect, status_of};
use super::slots::{BufferInFlight, Context};
use crate::error::{Error, Status};
use crate::sys::libfabric as sys;

/// Most entries that one poll takes.
const POLL_ENTRIES_MAX: usize = 64;

/// What one or more entries of the completion queue say. Contexts in them are free again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completion {
    /// Writes or reads of a share are done.
    Moved {
        /// The share.
        share: u32,
        /// How many.
        count: u32,
        /// Bytes of all.
        bytes: u64,
    },
    /// A write or read of a share has failed.
    MoveFailed {
        /// The share.
        share: u32,
        /// Bytes that it was to move.
        bytes: u64,
        /// Why.
        error: Box<CompletionError>,
    },
    /// A message has left, or not.
    Sent {
        /// Number of its buffer.
        buffer: u32,
        /// Why not.
        error: Option<Box<CompletionError>>,
    },
    /// A message is here.
    Received {
        /// Number of its buffer.
        buffer: u32,
        /// Bytes.
        len: usize,
        /// Immediate data that came along.
        imm: Option<u32>,
    },
    /// A receive has failed.
    ReceiveFailed {
        /// Number of its buffer.
        buffer: u32,
        /// Why.
        error: Box<CompletionError>,
    },
    /// Writes of peers, with this immediate data, are here.
    Landed {
        /// The immediate data.
        imm: u32,
        /// How many.
        count: u32,
        /// A receive that one of them has used up (FI_RX_CQ_DATA).
        buffer: Option<u32>,
    },
    /// An operation of a peer has failed here.
    Foreign {
        /// Why.
        error: Box<CompletionError>,
    },
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
    of_device: bool,
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
        let of_device = code == libc::ENODEV || (efa && efa::is_of_device(prov_code));
        Self { code, prov_code, text, disconnect, of_device }
    }

    /// Whether the device here has failed, whatever the operation was: nothing more will come of it.
    pub fn is_of_device(&self) -> bool {
        self.of_device
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

/// Completions of one share, one behind the other.
#[derive(Clone, Copy)]
struct Moved {
    share: u32,
    count: u32,
    bytes: u64,
}

impl Endpoint {
    /// Drives the endpoint and appends what has completed, of at most 64 entries; says how many those were.
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
            let mut moved: Option<Moved> = None;
            for entry in &entries[..count] {
                // SAFETY: the provider has filled this many entries.
                let entry = unsafe { entry.assume_init_ref() };
                match self.slots.context_of(entry.op_context) {
                    Some(Context::Operation(index)) => {
                        let Some((share, len)) = self.slots.release(index) else {
                            self.completed_twice("operation", index);
                            continue;
                        };
                        match &mut moved {
                            Some(moved) if moved.share == share => {
                                moved.count += 1;
                                moved.bytes += u64::from(len);
                            }
                            _ => {
                                let now = Moved { share, count: 1, bytes: len.into() };
                                self.settle(moved.replace(now), out);
                            }
                        }
                    }
                    Some(Context::Buffer(buffer)) => {
                        if let Some(completion) = self.buffer_done(buffer, entry) {
                            out.push(completion);
                        }
                    }
                    None if entry.flags & sys::FI_REMOTE_CQ_DATA != 0 => landed(entry.data as u32, None, out),
                    None => {}
                }
            }
            self.settle(moved, out);
            return Ok(count);
        }
        match code_of(status) {
            libc::EAGAIN | libc::EINTR => Ok(0),
            sys::FI_EAVAIL => self.poll_errors(out),
            code => Err(FabricError::new("fi_cq_read", code)),
        }
    }

    /// Operations of a share are over.
    fn settle(&mut self, moved: Option<Moved>, out: &mut Vec<Completion>) {
        let Some(Moved { share, count, bytes }) = moved else { return };
        if let Some(peer) = self.shares.finished(share, count) {
            self.peers.finished(peer, count);
        }
        out.push(Completion::Moved { share, count, bytes });
    }

    /// The operation on a buffer is over.
    fn buffer_done(&mut self, buffer: u32, entry: &sys::fi_cq_data_entry) -> Option<Completion> {
        let operation = self.release_buffer(buffer)?;
        if operation.flags & sys::FI_SEND != 0 {
            return Some(Completion::Sent { buffer, error: None });
        }
        let imm = (entry.flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(entry.data as u32);
        Some(match imm {
            // efa-direct: a write with immediate data uses up a receive.
            Some(imm) if entry.flags & sys::FI_REMOTE_WRITE != 0 => {
                Completion::Landed { imm, count: 1, buffer: Some(buffer) }
            }
            imm => Completion::Received { buffer, len: entry.len, imm },
        })
    }

    fn release_buffer(&mut self, buffer: u32) -> Option<BufferInFlight> {
        let operation = self.slots.release_buffer(buffer);
        match &operation {
            Some(operation) => {
                if let Some(peer) = operation.peer {
                    self.peers.send_over(peer);
                }
            }
            None => self.completed_twice("buffer", buffer),
        }
        operation
    }

    fn completed_twice(&self, what: &str, index: u32) {
        log::error!("{self:?}: a completion for {what} {index}, which is not in flight; it was ignored");
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
            out.extend(self.failed(entry.op_context, Box::new(error)));
        }
        Ok(POLL_ENTRIES_MAX)
    }

    /// Whose an error entry is.
    fn failed(&mut self, context: *mut c_void, error: Box<CompletionError>) -> Option<Completion> {
        match self.slots.context_of(context) {
            Some(Context::Operation(index)) => {
                let Some((share, len)) = self.slots.release(index) else {
                    self.completed_twice("operation", index);
                    return None;
                };
                if let Some(peer) = self.shares.finished(share, 1) {
                    self.peers.finished(peer, 1);
                }
                Some(Completion::MoveFailed { share, bytes: len.into(), error })
            }
            Some(Context::Buffer(buffer)) => {
                let operation = self.release_buffer(buffer)?;
                Some(if operation.flags & sys::FI_SEND != 0 {
                    Completion::Sent { buffer, error: Some(error) }
                } else {
                    Completion::ReceiveFailed { buffer, error }
                })
            }
            None => Some(Completion::Foreign { error }),
        }
    }

    /// Reads events that belong to no operation, and logs them. Gives the errors.
    pub fn drain_events(&mut self) -> Vec<CompletionError> {
        let mut errors = Vec::new();
        let Some(eq) = self.eq.as_ref().map(super::handle::Handle::as_ptr) else { return errors };
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
            log::error!("{self:?}: the provider reports: {}", error.text);
            errors.push(error);
        }
        errors
    }

    fn is_efa(&self) -> bool {
        efa::is_efa(self.domain().device().provider())
    }
}

/// Peers' writes with one number come in rows.
fn landed(imm: u32, buffer: Option<u32>, out: &mut Vec<Completion>) {
    match out.last_mut() {
        Some(Completion::Landed { imm: last, count, buffer: None }) if *last == imm && buffer.is_none() => {
            *count += 1;
        }
        _ => out.push(Completion::Landed { imm, count: 1, buffer }),
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
        assert!(CompletionError::new(true, libc::ECANCELED, 1, "").is_of_device());
        assert!(!CompletionError::new(false, libc::ECANCELED, 1, "").is_of_device());
        let error = CompletionError::new(false, libc::ECONNRESET, 0, "Connection reset by peer");
        assert_eq!(error.text, "Connection reset by peer (104, provider 0)");
        assert_eq!(Error::from(error).status(), Status::RemoteDisconnect);
    }
}
