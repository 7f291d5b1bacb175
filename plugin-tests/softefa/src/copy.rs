//! The only place that moves bytes: pulls from another process's memory into this one's, or a GPU's of this one.
//!
//! What kind of memory a span is in is told by its mark, which its registration got.

use std::io;

use crate::cuda;
use crate::shm::channel::{GPU, HOST, Span};
use crate::shm::process::ProcessId;

/// Spans on one side of a copy: a posted receive has at most 3, a work request 2.
pub const COPY_SPANS_MAX: usize = 4;

/// Copies all of `from`, host memory in `process`, into `to`, here; both have the same length in all.
///
/// An address that is not mapped, on either side, is an error and not a fault; then part may have been copied.
pub fn pull(process: ProcessId, from: &[Span], to: &[Span]) -> io::Result<()> {
    debug_assert_eq!(bytes(from), bytes(to));
    if to.iter().all(|span| span.memory == HOST) {
        return pull_to_host(process, from, to);
    }
    let mut skip = 0;
    for span in to {
        let from = part(from, skip, span.length);
        if span.memory == GPU {
            // At most a piece of an operation.
            let mut passage = vec![0; span.length as usize];
            pull_to_host(process, &from, &[whole(&mut passage)])?;
            cuda::copy_in(span.address, &passage)?;
        } else {
            pull_to_host(process, &from, &[*span])?;
        }
        skip += span.length;
    }
    Ok(())
}

/// Copies all of `from`, memory of any kind here, into `to`, which has room for it.
pub fn gather(from: &[Span], to: &mut [u8]) -> io::Result<()> {
    debug_assert_eq!(bytes(from), to.len() as u64);
    let mut rest = to;
    for span in from {
        let (to, behind) = rest.split_at_mut(span.length as usize);
        rest = behind;
        if span.memory == GPU {
            cuda::copy_out(to, span.address)?;
        } else {
            pull_to_host(ProcessId::current(), &[*span], &[whole(to)])?;
        }
    }
    Ok(())
}

fn bytes(spans: &[Span]) -> u64 {
    spans.iter().map(|span| span.length).sum()
}

fn whole(bytes: &mut [u8]) -> Span {
    Span { address: bytes.as_mut_ptr() as u64, length: bytes.len() as u64, memory: HOST }
}

fn pull_to_host(process: ProcessId, from: &[Span], to: &[Span]) -> io::Result<()> {
    let wanted = bytes(from);
    if wanted == 0 {
        return Ok(());
    }
    let (remote, local) = (iovecs(from), iovecs(to));
    // SAFETY: both arrays live through the call. The kernel checks every address of both processes; that `local`
    // belongs to memory which its owner registered or posted for being written to is the caller's part.
    let copied = unsafe {
        libc::process_vm_readv(
            process.pid(),
            local.as_ptr(),
            to.len().min(COPY_SPANS_MAX) as u64,
            remote.as_ptr(),
            from.len().min(COPY_SPANS_MAX) as u64,
            0,
        )
    };
    match u64::try_from(copied) {
        Ok(copied) if copied == wanted => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn iovecs(spans: &[Span]) -> [libc::iovec; COPY_SPANS_MAX] {
    let mut out = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; COPY_SPANS_MAX];
    for (iovec, span) in out.iter_mut().zip(spans) {
        *iovec = libc::iovec { iov_base: span.address as *mut libc::c_void, iov_len: span.length as usize };
    }
    out
}

/// The part of `spans` that starts `skip` bytes in and has at most `length` bytes.
pub fn part(spans: &[Span], skip: u64, length: u64) -> Vec<Span> {
    let (mut skip, mut length) = (skip, length);
    let mut out = Vec::with_capacity(spans.len());
    for span in spans {
        if skip >= span.length {
            skip -= span.length;
            continue;
        }
        let take = (span.length - skip).min(length);
        if take > 0 {
            out.push(Span { address: span.address.wrapping_add(skip), length: take, memory: span.memory });
        }
        length -= take;
        skip = 0;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(bytes: &[u8]) -> Span {
        Span { address: bytes.as_ptr() as u64, length: bytes.len() as u64, memory: HOST }
    }

    #[test]
    fn an_unmapped_address_is_an_error() {
        let target = [0_u8; 8];
        let nowhere = [Span { address: 8, length: 8, memory: HOST }];
        assert!(pull(ProcessId::current(), &nowhere, &[span(&target)]).is_err());
    }

    proptest! {
        #[test]
        fn parts_in_any_cut_make_the_whole(first in 0..50_usize, second in 0..50_usize, cut in 0..100_usize) {
            let source: Vec<u8> = (0..100).collect();
            let mut target = vec![0_u8; first + second];
            let from = [span(&source[..first]), span(&source[50..50 + second])];
            let whole = Span { address: target.as_mut_ptr() as u64, length: target.len() as u64, memory: HOST };
            let cut = cut.min(target.len()) as u64;
            for (skip, length) in [(cut, whole.length - cut), (0, cut)] {
                let result =
                    pull(ProcessId::current(), &part(&from, skip, length), &part(&[whole], skip, length));
                prop_assert!(result.is_ok());
            }
            prop_assert_eq!(&target[..first], &source[..first]);
            prop_assert_eq!(&target[first..], &source[50..50 + second]);
        }
    }
}
