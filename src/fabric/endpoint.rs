//! An endpoint with its completion queue, event queue and address vector: what one rail drives.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::{forget, zeroed};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;

use super::device::Device;
use super::domain::Domain;
use super::efa;
use super::error::FabricError;
use super::handle::Handle;
use super::peers::{FiAddr, InFlight, Peers};
use super::shares::Shares;
use super::slots::Slots;
use crate::error::{Error, Result};
use crate::sys::libfabric as sys;
use crate::types::Op;

/// Longest endpoint name in bytes. EFA's has 32, a socket address 28; strings are longer.
pub(super) const NAME_BYTES_MAX: usize = 256;

/// Fewest completion queue entries that are asked for by number.
const CQ_ENTRIES_MIN: usize = 1024;

/// How an endpoint is opened.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// Entries of the completion queue; 0 leaves it to the provider. Where so many cannot be had, it gets fewer.
    pub cq_entries: usize,
    /// Buffers, of receives and messages, each in flight once at a time.
    pub buffers: u32,
    /// RMA operations in flight at a time.
    pub operations: u32,
    /// Entries of the transmit queue; `None` takes the device's, or what suits it ([`efa::tx_size`]).
    pub tx_size: Option<usize>,
    /// Entries of the receive queue, at most the device's; `None` takes all of them.
    pub rx_size: Option<usize>,
    /// Whether to ask for a file descriptor to sleep on. A provider without one that works is polled.
    pub want_wait_fd: bool,
    /// Whether efa is to leave GPU memory to its NIC and make no call of CUDA; see [`Endpoint::reaches_gpus`].
    pub gpu_by_nic: bool,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self {
            cq_entries: 0,
            buffers: 64,
            operations: 1024,
            tx_size: None,
            rx_size: None,
            want_wait_fd: true,
            gpu_by_nic: false,
        }
    }
}

/// An open endpoint. Whoever has `&mut` drives it; nobody else can.
pub struct Endpoint {
    pub(super) ep: Handle<sys::fid_ep>,
    pub(super) eq: Option<Handle<sys::fid_eq>>,
    av: Handle<sys::fid_av>,
    pub(super) cq: Handle<sys::fid_cq>,
    pub(super) slots: Slots,
    pub(super) peers: Peers,
    pub(super) shares: Shares,
    /// See [`Endpoint::open_batch`].
    pub(super) open_batch: Option<u32>,
    pub(super) orders_writes: bool,
    emulates_writes: bool,
    wait_fd: Option<RawFd>,
    reaches_gpus: bool,
    // Last: what is above is closed before its domain.
    occupied: Occupied,
}

/// The domain, claimed for one endpoint.
struct Occupied(Arc<Domain>);

impl Occupied {
    fn new(domain: &Arc<Domain>) -> Result<Self> {
        domain.occupy()?;
        Ok(Self(Arc::clone(domain)))
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.0.vacate();
    }
}

impl Endpoint {
    /// Opens and enables an endpoint of the device, which must be the one that the domain was opened for.
    pub fn open(domain: &Arc<Domain>, device: &Device, options: &EndpointOptions) -> Result<Self> {
        Self::open_objects(domain, device, options)
            .map_err(|error| error.context(format_args!("endpoint of {device:?}")))
    }

    fn open_objects(domain: &Arc<Domain>, device: &Device, options: &EndpointOptions) -> Result<Self> {
        if !device.is_same(domain.device()) {
            return Err(Error::invalid("the domain was opened for another device"));
        }
        // A failure below drops what was opened in the opposite order: the endpoint first, the domain last.
        let occupied = Occupied::new(domain)?;
        let (cq, wait_fd) = open_cq(domain, device, options)?;
        let av = open_av(domain)?;
        let event_queue = open_eq(domain)?;
        let mut eq = None;
        let ep = open_ep(domain, device, options)?;
        // SAFETY: the queues and the address vector stay open until the endpoint is closed; see `drop`. The event queue
        // moves to a variable that is older than the endpoint for that.
        unsafe {
            ep.bind(cq.fid(), sys::FI_TRANSMIT | sys::FI_RECV)?;
            ep.bind(av.fid(), 0)?;
            // Without an event queue, the efa provider aborts the process on errors that belong to no operation.
            match ep.bind(event_queue.fid(), 0) {
                Ok(()) => eq = Some(event_queue),
                Err(error) => log::debug!("{device:?}: no event queue on its endpoints: {error}"),
            }
        }
        let reaches_gpus = !efa::is_efa(device.provider())
            || efa::configure(device, domain.fabric().version(), options, |option, value| {
                set_option(&ep, option, value)
            });
        // SAFETY: FI_ENABLE takes no argument.
        unsafe { ep.control("fi_enable", sys::FI_ENABLE, ptr::null_mut())? };
        let is_efa = efa::is_efa(device.provider());
        let emulates_writes = is_efa && efa::emulates_writes(|option| get_flag(&ep, option));
        Ok(Self {
            ep,
            eq,
            av,
            cq,
            slots: Slots::new(options.buffers, options.operations),
            peers: Peers::default(),
            shares: Shares::default(),
            open_batch: None,
            orders_writes: device.orders_writes(),
            emulates_writes,
            wait_fd,
            reaches_gpus,
            occupied,
        })
    }

    /// Domain of the endpoint.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.occupied.0
    }

    /// False if efa was asked to leave GPU memory to its NIC and answered that this NIC cannot reach it. It would still
    /// take GPU memory, and carry it through the processor in packets of 8 KB, each copied by CUDA.
    pub fn reaches_gpus(&self) -> bool {
        self.reaches_gpus
    }

    /// Whether an operation that has failed is over for the NIC. A write that efa emulates is several packets, and fails with
    /// the first of them (prov/efa/src/rdm/efa_rdm_pke_cmd.c, `efa_rdm_pke_handle_tx_error`, 1.22 to 2.6); what the NIC does
    /// itself is one work request.
    pub fn ends_with_failure(&self, op: Op) -> bool {
        op == Op::Read || !self.emulates_writes
    }

    /// Operations in flight, receives included.
    pub fn in_flight(&self) -> u32 {
        self.slots.in_flight()
    }

    /// RMA operations in flight.
    pub fn operations_in_flight(&self) -> u32 {
        self.slots.operations_in_flight()
    }

    /// What is in flight to a peer.
    pub fn in_flight_to(&self, peer: FiAddr) -> InFlight {
        self.peers.in_flight(peer)
    }

    /// RMA operations that can be posted now.
    pub fn room(&self) -> u32 {
        self.slots.room()
    }

    /// Name by which peers reach the endpoint.
    pub fn name(&self) -> Result<Vec<u8>> {
        let mut name = [0u8; NAME_BYTES_MAX];
        let mut len = name.len();
        let fid = self.ep.fid();
        // SAFETY: the endpoint is open; the buffer is as long as said.
        let status = unsafe {
            match (*self.ep.as_ptr()).cm.as_ref().and_then(|cm| cm.getname) {
                Some(getname) => getname(fid, name.as_mut_ptr().cast(), &raw mut len),
                None => -libc::ENOSYS,
            }
        };
        FabricError::check("fi_getname", status as isize)?;
        Ok(name[..len.min(NAME_BYTES_MAX)].to_vec())
    }

    /// Makes a peer's endpoint known. A name that is known already gives the same address once more; it stays until
    /// it was removed as often as it was inserted.
    ///
    /// The name may come from the network: a wrong one is an error here or on the first operation, never worse.
    pub fn insert_address(&mut self, name: &[u8]) -> Result<FiAddr> {
        if name.len() >= NAME_BYTES_MAX || name.is_empty() {
            return Err(Error::invalid(format!("an endpoint name of {} bytes", name.len())));
        }
        // Providers read as much as their format has, whatever we were given: always lend them the whole buffer.
        let mut padded = [0u8; NAME_BYTES_MAX];
        padded[..name.len()].copy_from_slice(name);
        if let Some(known) = self.peers.find(&padded) {
            return Ok(known);
        }
        let mut raw = sys::FI_ADDR_NOTAVAIL;
        let av = self.av.as_ptr();
        // SAFETY: the address vector is open; no event queue is bound to it, so the call is done when it returns.
        let count = unsafe {
            match (*(*av).ops).insert {
                Some(insert) => insert(av, padded.as_ptr().cast(), 1, &raw mut raw, 0, ptr::null_mut()),
                None => -libc::ENOSYS,
            }
        };
        FabricError::check("fi_av_insert", count as isize)?;
        if count != 1 || raw == sys::FI_ADDR_NOTAVAIL {
            return Err(Error::invalid("fi_av_insert: this is no endpoint name of this network"));
        }
        Ok(self.peers.insert(&padded, raw))
    }

    /// Forgets a peer's endpoint. Refused while operations to it are in flight.
    pub fn remove_address(&mut self, address: FiAddr) -> Result<()> {
        let Some(mut raw) = self.peers.remove(address)? else { return Ok(()) };
        let av = self.av.as_ptr();
        // SAFETY: as in `insert_address`; nothing in flight uses the address.
        let status = unsafe {
            match (*(*av).ops).remove {
                Some(remove) => remove(av, &raw mut raw, 1, 0),
                None => -libc::ENOSYS,
            }
        };
        Ok(FabricError::check("fi_av_remove", status as isize)?)
    }

    /// File descriptor that becomes readable when there is something to poll, if the provider has one. Block on it
    /// only after [`Self::try_wait`] has said so.
    pub fn wait_fd(&self) -> Option<RawFd> {
        self.wait_fd
    }

    /// Whether it is safe to block on [`Self::wait_fd`] now: nothing has arrived that the descriptor would not show.
    pub fn try_wait(&mut self) -> bool {
        if self.wait_fd.is_none() {
            return false;
        }
        let fabric = self.domain().fabric().handle().as_ptr();
        let mut fid = self.cq.fid();
        // SAFETY: fabric and queue are open; one fid is passed.
        unsafe {
            match (*(*fabric).ops).trywait {
                Some(trywait) => trywait(fabric, &raw mut fid, 1) == 0,
                None => false,
            }
        }
    }

    /// Closes the endpoint before its time: nothing that is in flight reads or writes memory here any more, or completes.
    /// What its packets carry may still arrive at the peer, for as long as a packet lives.
    pub fn shut(&mut self) -> Result<()> {
        if efa::close_waits(self.domain().device()) {
            return Err(Error::not_supported("closing it could wait for ever"));
        }
        self.ep.close()?;
        // The provider has no address of a cell, and uses no memory of an operation, any more.
        self.slots = Slots::new(0, 0);
        self.shares = Shares::default();
        Ok(())
    }

    pub(super) fn fid(&self) -> *mut sys::fid {
        self.ep.fid()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let Err(error) = self.ep.close() else { return };
        log::error!("{self:?} cannot be closed, its memory is kept for ever: {error}");
        // The provider may go on using everything that was bound to the endpoint or posted on it.
        self.ep.abandon();
        self.av.abandon();
        self.cq.abandon();
        if let Some(eq) = &mut self.eq {
            eq.abandon();
        }
        forget(std::mem::replace(&mut self.slots, Slots::new(0, 0)));
        // What is in flight reads and writes the memory that its share keeps registered.
        forget(std::mem::take(&mut self.shares));
        forget(Arc::clone(self.domain()));
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "endpoint of {:?}, {} in flight", self.domain().device(), self.in_flight())
    }
}

type Opened<T> = std::result::Result<Handle<T>, FabricError>;

fn open_ep(domain: &Domain, device: &Device, options: &EndpointOptions) -> Opened<sys::fid_ep> {
    let (_guard, info) = device.lock_info();
    let fid = domain.handle().as_ptr();
    let mut ep = ptr::null_mut();
    // SAFETY: the domain is open; the entry with its attributes is complete, and ours while the guard is held: so what
    // we write for the call is put back before anybody else reads it.
    unsafe {
        let (tx, rx) = ((*info).tx_attr, (*info).rx_attr);
        let (tx_size, rx_size, op_flags) = ((*tx).size, (*rx).size, (*tx).op_flags);
        // Writes name FI_DELIVERY_COMPLETE themselves. As a default the efa provider adds it to messages, too, whatever
        // their own flags, and then they wait for a receipt: for ever, if the peer dies after its NIC took the message.
        (*tx).op_flags = op_flags & !sys::FI_DELIVERY_COMPLETE;
        (*tx).size = options.tx_size.unwrap_or_else(|| efa::tx_size(device));
        (*rx).size = options.rx_size.map_or(rx_size, |size| size.min(rx_size));
        let status = match (*(*fid).ops).endpoint {
            Some(open) => open(fid, info, &raw mut ep, ptr::null_mut()),
            None => -libc::ENOSYS,
        };
        (*tx).size = tx_size;
        (*tx).op_flags = op_flags;
        (*rx).size = rx_size;
        Handle::from_open("fi_endpoint", status, ep)
    }
}

fn open_cq(
    domain: &Domain,
    device: &Device,
    options: &EndpointOptions,
) -> std::result::Result<(Handle<sys::fid_cq>, Option<RawFd>), FabricError> {
    if options.want_wait_fd && efa::has_wait_object(device) {
        match open_cq_of_any_size(domain, options.cq_entries, sys::FI_WAIT_FD) {
            Ok(cq) => {
                let mut fd: c_int = -1;
                // SAFETY: FI_GETWAIT of a queue with FI_WAIT_FD fills an int.
                let got =
                    unsafe { cq.control("fi_control(FI_GETWAIT)", sys::FI_GETWAIT, (&raw mut fd).cast()) };
                if got.is_ok() && fd >= 0 {
                    return Ok((cq, Some(fd)));
                }
            }
            Err(error) => {
                log::debug!("{:?}: no file descriptor to sleep on, will poll: {error}", domain.device());
            }
        }
    }
    Ok((open_cq_of_any_size(domain, options.cq_entries, sys::FI_WAIT_NONE)?, None))
}

/// A completion queue with so many entries, else with half of them, and so on down to the provider's own choice.
fn open_cq_of_any_size(domain: &Domain, entries: usize, wait_obj: c_int) -> Opened<sys::fid_cq> {
    let mut size = entries;
    loop {
        match open_cq_of_size(domain, size, wait_obj) {
            Err(error) if size > 0 && matches!(error.code, libc::EINVAL | libc::ENOMEM) => {
                log::debug!("{:?}: no completion queue of {size} entries: {error}", domain.device());
                size = if size > CQ_ENTRIES_MIN { size / 2 } else { 0 };
            }
            opened => {
                if size != entries && opened.is_ok() {
                    let got = if size == 0 { "the provider's default".to_owned() } else { size.to_string() };
                    log::info!(
                        "{:?}: {entries} completion queue entries cannot be had, it has {got}",
                        domain.device()
                    );
                }
                return opened;
            }
        }
    }
}

fn open_cq_of_size(domain: &Domain, entries: usize, wait_obj: c_int) -> Opened<sys::fid_cq> {
    let fid = domain.handle().as_ptr();
    let mut cq = ptr::null_mut();
    // SAFETY: integers and raw pointers, for which zero is a value; the domain is open, the attributes live through the
    // call.
    unsafe {
        let mut attr: sys::fi_cq_attr = zeroed();
        attr.size = entries;
        attr.format = sys::FI_CQ_FORMAT_DATA;
        attr.wait_obj = wait_obj;
        let status = match (*(*fid).ops).cq_open {
            Some(open) => open(fid, &raw mut attr, &raw mut cq, ptr::null_mut()),
            None => -libc::ENOSYS,
        };
        Handle::from_open("fi_cq_open", status, cq)
    }
}

fn open_av(domain: &Domain) -> Opened<sys::fid_av> {
    let fid = domain.handle().as_ptr();
    let mut av = ptr::null_mut();
    // SAFETY: as in `open_cq_of_size`.
    unsafe {
        let mut attr: sys::fi_av_attr = zeroed();
        attr.type_ = sys::FI_AV_UNSPEC;
        let status = match (*(*fid).ops).av_open {
            Some(open) => open(fid, &raw mut attr, &raw mut av, ptr::null_mut()),
            None => -libc::ENOSYS,
        };
        Handle::from_open("fi_av_open", status, av)
    }
}

fn open_eq(domain: &Domain) -> Opened<sys::fid_eq> {
    let fabric = domain.fabric().handle().as_ptr();
    let mut eq = ptr::null_mut();
    // SAFETY: as in `open_cq_of_size`; the fabric is open for as long as the domain.
    unsafe {
        let mut attr: sys::fi_eq_attr = zeroed();
        attr.wait_obj = sys::FI_WAIT_NONE;
        let status = match (*(*fabric).ops).eq_open {
            Some(open) => open(fabric, &raw mut attr, &raw mut eq, ptr::null_mut()),
            None => -libc::ENOSYS,
        };
        Handle::from_open("fi_eq_open", status, eq)
    }
}

/// A `bool` option; `None` where this libfabric does not know it.
fn get_flag(ep: &Handle<sys::fid_ep>, option: c_int) -> Option<bool> {
    let (mut value, mut len) = (0_u8, 1_usize);
    // SAFETY: the endpoint is open; the provider writes a C `bool` where it is lent one byte.
    let status = unsafe {
        let getopt = (*(*ep.as_ptr()).ops).getopt?;
        getopt(ep.fid(), sys::FI_OPT_ENDPOINT, option, (&raw mut value).cast::<c_void>(), &raw mut len)
    };
    (status == 0).then_some(value != 0)
}

fn set_option(ep: &Handle<sys::fid_ep>, option: c_int, value: &[u8]) -> std::result::Result<(), FabricError> {
    // SAFETY: the endpoint is open; the value is as long as said. A provider that does not know the option says so.
    let status = unsafe {
        match (*(*ep.as_ptr()).ops).setopt {
            Some(setopt) => {
                setopt(ep.fid(), sys::FI_OPT_ENDPOINT, option, value.as_ptr().cast::<c_void>(), value.len())
            }
            None => -libc::ENOSYS,
        }
    };
    FabricError::check("fi_setopt", status as isize)
}
