//! Fabrics and domains: what a process opens once for each NIC.

use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::device::Device;
use super::handle::Handle;
use super::library::{Libfabric, Version};
use crate::error::{Error, Result};
use crate::sys::libfabric as sys;

/// An open fabric: the network that a device is part of.
#[derive(Debug)]
pub struct Fabric {
    handle: Handle<sys::fid_fabric>,
    library: Libfabric,
    /// Provider and name: what its domains must be of.
    identity: (String, String),
}

fn identity(device: &Device) -> (String, String) {
    (device.provider().to_owned(), device.fabric_name().to_owned())
}

// SAFETY: the calls on it (opening a domain or an event queue, fi_trywait) may be made by several threads: no threading
// model asks an application to serialise access to a fabric (fi_domain(3)).
unsafe impl Sync for Fabric {}

impl Fabric {
    /// Opens the device's fabric.
    pub fn open(library: &Libfabric, device: &Device) -> Result<Arc<Self>> {
        if !device.is_of(library) {
            return Err(device.unusable("another copy of libfabric found it"));
        }
        let (_guard, info) = device.lock_info();
        let mut fabric = ptr::null_mut();
        // SAFETY: the entry and its attributes are complete (`Facts::read` checked) and ours while the guard is held.
        let handle = unsafe {
            let status = (library.api().fabric)((*info).fabric_attr, &raw mut fabric, ptr::null_mut());
            Handle::from_open("fi_fabric", status, fabric)
        };
        let handle = handle.map_err(|error| Error::from(error).context(format_args!("{device:?}")))?;
        Ok(Arc::new(Self { handle, library: library.clone(), identity: identity(device) }))
    }

    pub(super) fn handle(&self) -> &Handle<sys::fid_fabric> {
        &self.handle
    }

    /// Version of the libfabric that opened it.
    pub(super) fn version(&self) -> Version {
        self.library.version()
    }
}

/// An open domain: a NIC, with the registrations that it knows.
pub struct Domain {
    handle: Handle<sys::fid_domain>,
    // After the handle: dropped, and so closed, after it.
    fabric: Arc<Fabric>,
    device: Device,
    /// Set while an endpoint is open, where the threading level allows no second owner.
    occupied: AtomicBool,
}

// SAFETY: registration and deregistration may be called by several threads: below FI_THREAD_DOMAIN, which `open`
// refuses, an application serialises only endpoints and their completion queues (fi_domain(3)), and those have one
// owner each (`Endpoint` is not Sync).
unsafe impl Sync for Domain {}

impl Domain {
    /// Opens the device's domain. The fabric may have been opened for another device of the same fabric.
    pub fn open(fabric: &Arc<Fabric>, device: &Device) -> Result<Arc<Self>> {
        if !device.is_of(&fabric.library) || identity(device) != fabric.identity {
            return Err(device.unusable("it is not of the fabric that was opened"));
        }
        if !matches!(device.threading(), sys::FI_THREAD_SAFE | sys::FI_THREAD_COMPLETION) {
            return Err(device.unusable("its provider cannot be used by more than one thread"));
        }
        let (guard, info) = device.lock_info();
        let mut domain = ptr::null_mut();
        // SAFETY: the fabric is open, its table has `domain`; the entry is ours while the guard is held.
        let handle = unsafe {
            let fabric = fabric.handle().as_ptr();
            let status = match (*(*fabric).ops).domain {
                Some(open) => open(fabric, info, &raw mut domain, ptr::null_mut()),
                None => -libc::ENOSYS,
            };
            Handle::from_open("fi_domain", status, domain)
        };
        drop(guard);
        let handle = handle.map_err(|error| Error::from(error).context(format_args!("{device:?}")))?;
        Ok(Arc::new(Self {
            handle,
            fabric: Arc::clone(fabric),
            device: device.clone(),
            occupied: AtomicBool::new(false),
        }))
    }

    /// The device that the domain was opened for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The fabric.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// The library.
    pub fn library(&self) -> &Libfabric {
        &self.fabric.library
    }

    pub(super) fn handle(&self) -> &Handle<sys::fid_domain> {
        &self.handle
    }

    /// Claims the domain for one endpoint. Under FI_THREAD_COMPLETION the efa provider keeps state for the whole
    /// domain (its shared receive queue) without a lock, so two endpoints with two owners would race.
    pub(super) fn occupy(&self) -> Result<()> {
        if self.device.threading() == sys::FI_THREAD_COMPLETION && self.occupied.swap(true, Ordering::AcqRel)
        {
            return Err(self.device.unusable("the domain has an endpoint already; open a domain for each"));
        }
        Ok(())
    }

    pub(super) fn vacate(&self) {
        self.occupied.store(false, Ordering::Release);
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain of {:?}", self.device)
    }
}
