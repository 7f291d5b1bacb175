//! Where the kernel keeps pages: three system calls that read, and never touch the memory they ask about.

use std::io;
use std::ptr;

use libc::{c_int, c_long, c_ulong, c_void};

/// `MPOL_F_ADDR` of `<linux/mempolicy.h>`: the policy of an address.
const MPOL_F_ADDR: c_ulong = 1 << 1;
/// Bits that the kernel keeps for flags in a policy's mode (`MPOL_F_STATIC_NODES` and its like).
const MPOL_MODE_FLAGS: c_int = 0xe000;
/// Nodes that a mask has room for: no configured kernel has more.
const NODES_MAX: usize = 1024;

/// Memory policy of an address range, as far as it says where pages will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Pages go to the node of the thread that touches them first.
    Local,
    /// Pages go to these nodes.
    Nodes(Vec<u32>),
}

/// The node of each page, by an address in it; `None` for one that is not in memory. No page is moved or faulted in.
pub fn nodes_of_pages(pages: &[u64]) -> io::Result<Vec<Option<u32>>> {
    let addresses: Vec<*const c_void> =
        pages.iter().map(|&page| ptr::without_provenance(page as usize)).collect();
    let mut status: Vec<c_int> = vec![-1; pages.len()];
    // SAFETY: move_pages(2) without target nodes only reports. It reads `pages.len()` addresses, which it looks up
    // and does not follow, and writes as many numbers; both arrays have that length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0 as c_int,
            pages.len() as c_ulong,
            addresses.as_ptr(),
            ptr::null::<c_int>(),
            status.as_mut_ptr(),
            0 as c_int,
        )
    };
    checked(result)?;
    Ok(status.into_iter().map(|node| u32::try_from(node).ok()).collect())
}

/// The memory policy of an address.
pub fn policy_of(addr: u64) -> io::Result<Policy> {
    /// `MPOL_*` of `<linux/mempolicy.h>`.
    const PREFERRED: c_int = 1;
    const BIND: c_int = 2;
    const INTERLEAVE: c_int = 3;
    const PREFERRED_MANY: c_int = 5;
    const WEIGHTED_INTERLEAVE: c_int = 6;

    const WORD_BITS: usize = c_ulong::BITS as usize;
    let mut mode: c_int = 0;
    let mut mask = [0 as c_ulong; NODES_MAX / WORD_BITS];
    // SAFETY: get_mempolicy(2) writes one number and a mask of at most `NODES_MAX` bits, for which there is room.
    // Without MPOL_F_NODE it looks up the mapping and does not touch the page.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            mask.as_mut_ptr(),
            NODES_MAX as c_ulong,
            ptr::without_provenance::<c_void>(addr as usize),
            MPOL_F_ADDR,
        )
    };
    checked(result)?;
    let nodes: Vec<u32> = (0..NODES_MAX)
        .filter(|bit| mask[bit / WORD_BITS] >> (bit % WORD_BITS) & 1 == 1)
        .map(|bit| bit as u32)
        .collect();
    Ok(match mode & !MPOL_MODE_FLAGS {
        PREFERRED | BIND | INTERLEAVE | PREFERRED_MANY | WEIGHTED_INTERLEAVE if !nodes.is_empty() => {
            Policy::Nodes(nodes)
        }
        _ => Policy::Local,
    })
}

/// The node of the CPU that this thread runs on.
pub fn node_of_this_cpu() -> io::Result<u32> {
    let mut node: u32 = 0;
    // SAFETY: getcpu(2) writes a number through each pointer that is not null.
    let result = unsafe {
        libc::syscall(libc::SYS_getcpu, ptr::null_mut::<u32>(), &raw mut node, ptr::null_mut::<c_void>())
    };
    checked(result)?;
    Ok(node)
}

fn checked(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
