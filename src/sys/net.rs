//! What the kernel says about network interfaces.

use std::ffi::CStr;
use std::ptr;

/// Names of the interfaces that are up and can send: cable in, driver ready (`IFF_RUNNING`, netdevice(7)). Empty if unknown.
pub fn running_interfaces() -> Vec<String> {
    let mut head = ptr::null_mut();
    // SAFETY: getifaddrs writes the head of a list that is ours to free.
    if unsafe { libc::getifaddrs(&raw mut head) } != 0 {
        return Vec::new();
    }
    let mut names = Vec::new();
    let mut next = head;
    // SAFETY: `next` is null or an entry of the list, which lives until it is freed below.
    while let Some(entry) = unsafe { next.as_ref() } {
        let wanted = (libc::IFF_UP | libc::IFF_RUNNING) as u32;
        if entry.ifa_flags & wanted == wanted && !entry.ifa_name.is_null() {
            // SAFETY: the name is a C string that lives as long as the list; it is copied.
            names.push(unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned());
        }
        next = entry.ifa_next;
    }
    // SAFETY: `head` came from getifaddrs, and no reference into the list is left.
    unsafe { libc::freeifaddrs(head) };
    names
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_those_of_interfaces() {
        for name in super::running_interfaces() {
            assert!(std::path::Path::new("/proc/sys/net/ipv4/conf").join(&name).exists(), "{name}");
        }
    }
}
