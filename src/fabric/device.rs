//! What libfabric offers: one [`Device`] for each way to reach the network that fits a [`Query`].

use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{FabricError, code_of};
use super::library::{Libfabric, Version};
use super::{efa, error};
use crate::error::{Error, Result, Status};
use crate::sys::libfabric as sys;
use crate::types::PciAddress;

/// Most entries taken of one answer. The largest EC2 instances have 32 NICs and a handful of entries for each.
const DEVICES_MAX: usize = 4096;

/// Most bytes in one operation, whatever the provider says. The efa provider cuts what is longer than its NIC takes
/// (1 GiB) into several, and when the queue fills up in between, it answers "again" while the first are in flight.
const OPERATION_BYTES_MAX: usize = 1 << 30;

/// What is wanted of the network. `None` is: any.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Provider, as `FI_PROVIDER` names it: `efa`, `tcp`.
    pub provider: Option<String>,
    /// Fabric: `efa`, `efa-direct`, or a network in CIDR notation.
    pub fabric: Option<String>,
    /// Domain: one NIC.
    pub domain: Option<String>,
    /// Whether accelerator memory is to be registered.
    pub hmem: bool,
    /// Whether writes must be able to complete only when their data is in the peer's memory.
    pub delivery_complete: bool,
}

/// Form of an endpoint's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddrFormat {
    /// `struct sockaddr` of any family.
    Sock,
    /// `struct sockaddr_in`.
    SockIn,
    /// `struct sockaddr_in6`.
    SockIn6,
    /// `struct sockaddr_ib`.
    SockIb,
    /// GID, queue pair number and key of an EFA endpoint.
    Efa,
    /// A string.
    Str,
    /// InfiniBand datagram address.
    IbUd,
    /// Another format, by libfabric's number.
    Other(u32),
}

/// The NIC behind a device, as far as the provider tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name that the system gives it (`rdmap79s0`).
    pub name: String,
    /// Where it sits.
    pub pci: Option<PciAddress>,
    /// Link speed in bits per second; 0 if unknown.
    pub speed_bps: u64,
}

/// One way to reach the network: a provider, a fabric, a NIC, and what they can do.
#[derive(Clone)]
pub struct Device {
    list: Arc<InfoList>,
    info: InfoPtr,
    facts: Arc<Facts>,
}

/// A list of `fi_info` as libfabric gave it, freed with its last device.
struct InfoList {
    library: Libfabric,
    head: *mut sys::fi_info,
    /// Held while an entry is passed to libfabric: opening an endpoint writes the wished queue sizes into it.
    lock: Mutex<()>,
}

// SAFETY: the list is plain memory of our own; its entries are only read or written under `lock` once the list is
// shared, and freed when nobody is left.
unsafe impl Send for InfoList {}
// SAFETY: as above.
unsafe impl Sync for InfoList {}

impl Drop for InfoList {
    fn drop(&mut self) {
        // SAFETY: `head` came from fi_getinfo and is freed once, by the same library.
        unsafe { (self.library.api().freeinfo)(self.head) };
    }
}

/// One entry of an [`InfoList`].
#[derive(Clone, Copy)]
struct InfoPtr(*mut sys::fi_info);

// SAFETY: see `InfoList`.
unsafe impl Send for InfoPtr {}
// SAFETY: see `InfoList`.
unsafe impl Sync for InfoPtr {}

/// Everything that we want to know about an entry, read once while nobody else can see it.
struct Facts {
    provider: String,
    fabric: String,
    domain: String,
    caps: u64,
    mode: u64,
    mr_mode: i32,
    tx_op_flags: u64,
    tx_msg_order: u64,
    tx_size: usize,
    rx_size: usize,
    max_msg_size: usize,
    max_order_waw_size: usize,
    threading: i32,
    addr_format: AddrFormat,
    source: Vec<u8>,
    nic: Option<Nic>,
    api_version: Version,
}

impl Libfabric {
    /// The devices that fit the query, in libfabric's order of preference; none is not an error.
    pub fn discover(&self, query: &Query) -> Result<Vec<Device>> {
        // Manual progress is what we drive; a provider that cannot be driven so may still progress by itself. Writes
        // with immediate data that use up receives are a last resort: efa-direct without unsolicited write receives.
        for (progress, mode) in [
            (sys::FI_PROGRESS_MANUAL, 0),
            (sys::FI_PROGRESS_UNSPEC, 0),
            (sys::FI_PROGRESS_MANUAL, sys::FI_RX_CQ_DATA),
        ] {
            let devices = self.getinfo(query, progress, mode)?;
            if !devices.is_empty() {
                return Ok(devices);
            }
        }
        Ok(Vec::new())
    }

    fn getinfo(&self, query: &Query, progress: i32, mode: u64) -> Result<Vec<Device>> {
        let version = self.api_version(query.hmem);
        let mut hints = Hints::new(query, progress, mode)?;
        let mut head = ptr::null_mut();
        // SAFETY: the hints and everything that they point to live through the call; libfabric copies what it keeps.
        let status = unsafe {
            let hints = hints.link();
            (self.api().getinfo)(version.packed(), ptr::null(), ptr::null(), 0, hints, &raw mut head)
        };
        if status != 0 {
            let code = code_of(status as isize);
            if code == libc::ENODATA || code == libc::ENODEV {
                return Ok(Vec::new());
            }
            let error = FabricError::new("fi_getinfo", code);
            return Err(Error::new(error::status_of(code), format!("{self:?}: {error}")));
        }
        // SAFETY: fi_getinfo succeeded, so `head` starts a list that is ours to free, and nobody else has it yet.
        Ok(unsafe { devices_of(self, head) })
    }
}

/// # Safety
/// `head` starts a list from fi_getinfo of `library` (or is null) that nobody else uses.
unsafe fn devices_of(library: &Libfabric, head: *mut sys::fi_info) -> Vec<Device> {
    if head.is_null() {
        return Vec::new();
    }
    let list = Arc::new(InfoList { library: library.clone(), head, lock: Mutex::new(()) });
    let mut devices = Vec::new();
    let mut next = head;
    while !next.is_null() && devices.len() < DEVICES_MAX {
        // SAFETY: `next` is an entry of the list, which lives; nobody else has seen it.
        unsafe {
            let facts = Facts::read(next);
            // libfabric lists the same thing several times when it can be layered in several ways.
            let is_new = |facts: &Facts| devices.iter().all(|d: &Device| !d.facts.same_way(facts));
            if let Some(facts) = facts.filter(is_new) {
                devices.push(Device { list: Arc::clone(&list), info: InfoPtr(next), facts: Arc::new(facts) });
            }
            next = (*next).next;
        }
    }
    devices
}

/// Hints with the structures and strings that they point to.
struct Hints {
    info: sys::fi_info,
    tx: sys::fi_tx_attr,
    rx: sys::fi_rx_attr,
    ep: sys::fi_ep_attr,
    domain: sys::fi_domain_attr,
    fabric: sys::fi_fabric_attr,
    provider_name: Option<CString>,
    fabric_name: Option<CString>,
    domain_name: Option<CString>,
}

impl Hints {
    fn new(query: &Query, progress: i32, mode: u64) -> Result<Self> {
        let name = |what: &str, name: &Option<String>| {
            name.as_ref()
                .map(|text| CString::new(text.as_str()))
                .transpose()
                .map_err(|_| Error::invalid(format!("the {what} name holds a NUL character")))
        };
        let (names, hmem) = (
            (
                name("provider", &query.provider)?,
                name("fabric", &query.fabric)?,
                name("domain", &query.domain)?,
            ),
            query.hmem,
        );
        // SAFETY: these structures are integers and raw pointers, for which zero is a value: "no wish".
        let mut hints = unsafe {
            Self {
                info: std::mem::zeroed(),
                tx: std::mem::zeroed(),
                rx: std::mem::zeroed(),
                ep: std::mem::zeroed(),
                domain: std::mem::zeroed(),
                fabric: std::mem::zeroed(),
                provider_name: names.0,
                fabric_name: names.1,
                domain_name: names.2,
            }
        };
        // Not FI_LOCAL_COMM or FI_REMOTE_COMM: a host that has nothing but its loopback must work, too.
        hints.info.caps = sys::FI_MSG | sys::FI_RMA | if hmem { sys::FI_HMEM } else { 0 };
        hints.info.mode = sys::FI_CONTEXT | sys::FI_CONTEXT2 | mode;
        hints.tx.op_flags = if query.delivery_complete { sys::FI_DELIVERY_COMPLETE } else { 0 };
        hints.ep.type_ = sys::FI_EP_RDM;
        hints.domain.control_progress = progress;
        hints.domain.data_progress = progress;
        hints.domain.resource_mgmt = sys::FI_RM_ENABLED;
        // The provider's own, strongest level is taken; `Facts::read` lowers it where that pays.
        hints.domain.threading = sys::FI_THREAD_UNSPEC;
        hints.domain.av_type = sys::FI_AV_UNSPEC;
        hints.domain.mr_mode = sys::FI_MR_LOCAL
            | sys::FI_MR_VIRT_ADDR
            | sys::FI_MR_ALLOCATED
            | sys::FI_MR_PROV_KEY
            | sys::FI_MR_ENDPOINT
            | if hmem { sys::FI_MR_HMEM } else { 0 };
        Ok(hints)
    }

    /// Sets the pointers. They are good until the hints move.
    fn link(&mut self) -> *const sys::fi_info {
        let text = |name: &Option<CString>| name.as_ref().map_or(ptr::null_mut(), |n| n.as_ptr().cast_mut());
        self.fabric.prov_name = text(&self.provider_name);
        self.fabric.name = text(&self.fabric_name);
        self.domain.name = text(&self.domain_name);
        self.info.tx_attr = &raw mut self.tx;
        self.info.rx_attr = &raw mut self.rx;
        self.info.ep_attr = &raw mut self.ep;
        self.info.domain_attr = &raw mut self.domain;
        self.info.fabric_attr = &raw mut self.fabric;
        &raw const self.info
    }
}

impl Facts {
    /// Reads an entry; `None` for one that lacks what every provider fills.
    ///
    /// # Safety
    /// `info` is an entry that fi_getinfo gave and that nobody else uses.
    unsafe fn read(info: *mut sys::fi_info) -> Option<Self> {
        // SAFETY: the entry and its attributes are readable in the layout of the symbol version that was asked for;
        // attributes are checked for null; names are C strings or null. No reference outlives this function.
        unsafe {
            let info = &mut *info;
            let (tx, rx) = (info.tx_attr.as_ref()?, info.rx_attr.as_ref()?);
            let ep = info.ep_attr.as_ref()?;
            let (fabric, domain) = (info.fabric_attr.as_mut()?, info.domain_attr.as_mut()?);
            // libfabric may name objects that are open already. We open our own, and theirs may close before ours.
            fabric.fabric = ptr::null_mut();
            domain.domain = ptr::null_mut();
            let provider = text(fabric.prov_name);
            if efa::is_efa(&provider) {
                // One owner drives an endpoint and its queue, so efa need not lock. Other providers keep the locks
                // that they have: they are not what speed depends on.
                domain.threading = sys::FI_THREAD_COMPLETION;
                // Without local communication it opens no shm domain, endpoint and queue beside each of its own, and
                // peers of this host are reached through the NIC. Nobody can ask for that before it is known that efa
                // is the provider: others have hosts with nothing but a loopback.
                if info.caps & sys::FI_REMOTE_COMM != 0 {
                    info.caps &= !sys::FI_LOCAL_COMM;
                }
            }
            Some(Self {
                provider,
                fabric: text(fabric.name),
                domain: text(domain.name),
                caps: info.caps,
                mode: info.mode,
                mr_mode: domain.mr_mode,
                tx_op_flags: tx.op_flags,
                tx_msg_order: tx.msg_order,
                tx_size: tx.size,
                rx_size: rx.size,
                max_msg_size: ep.max_msg_size.min(OPERATION_BYTES_MAX),
                max_order_waw_size: ep.max_order_waw_size,
                threading: domain.threading,
                addr_format: AddrFormat::from_number(info.addr_format),
                source: bytes(info.src_addr.cast(), info.src_addrlen),
                nic: nic(info.nic),
                api_version: Version::from_packed(fabric.api_version),
            })
        }
    }
}

impl Facts {
    /// Whether both lead to the same network by the same means.
    fn same_way(&self, other: &Self) -> bool {
        let key = |f: &Self| (f.addr_format, f.caps, f.mode, f.tx_size, f.rx_size);
        self.provider == other.provider
            && self.fabric == other.fabric
            && self.domain == other.domain
            && self.source == other.source
            && key(self) == key(other)
    }
}

/// # Safety
/// `text` is null or a C string.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// # Safety
/// `data` is null or points to `len` readable bytes.
unsafe fn bytes(data: *const u8, len: usize) -> Vec<u8> {
    if data.is_null() || len > super::endpoint::NAME_BYTES_MAX {
        return Vec::new();
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, len) }.to_vec()
}

/// # Safety
/// `nic` is null or an object that libfabric filled.
unsafe fn nic(nic: *const sys::fid_nic) -> Option<Nic> {
    // SAFETY: the caller's promise; each part is null or readable.
    unsafe {
        let nic = nic.as_ref()?;
        let (device, link) = (nic.device_attr.as_ref(), nic.link_attr.as_ref());
        let pci = nic.bus_attr.as_ref().filter(|bus| bus.bus_type == sys::FI_BUS_PCI).map(|bus| PciAddress {
            domain: bus.attr.domain_id.into(),
            bus: bus.attr.bus_id,
            device: bus.attr.device_id,
            function: bus.attr.function_id,
        });
        Some(Nic {
            name: device.map(|d| text(d.name)).unwrap_or_default(),
            pci,
            speed_bps: link.map_or(0, |l| l.speed as u64),
        })
    }
}

impl AddrFormat {
    fn from_number(number: u32) -> Self {
        match number {
            sys::FI_SOCKADDR => Self::Sock,
            sys::FI_SOCKADDR_IN => Self::SockIn,
            sys::FI_SOCKADDR_IN6 => Self::SockIn6,
            sys::FI_SOCKADDR_IB => Self::SockIb,
            sys::FI_ADDR_STR => Self::Str,
            sys::FI_ADDR_IB_UD => Self::IbUd,
            sys::FI_ADDR_EFA => Self::Efa,
            other => Self::Other(other),
        }
    }
}

impl Device {
    /// Provider, with its layers: `efa`, `tcp`, `tcp;ofi_rxm`.
    pub fn provider(&self) -> &str {
        &self.facts.provider
    }

    /// Name of the fabric.
    pub fn fabric_name(&self) -> &str {
        &self.facts.fabric
    }

    /// Name of the domain: the NIC.
    pub fn domain_name(&self) -> &str {
        &self.facts.domain
    }

    /// Whether accelerator memory can be registered.
    pub fn has_hmem(&self) -> bool {
        self.facts.caps & sys::FI_HMEM != 0
    }

    /// Whether a peer names remote memory by its address; else by its offset in the registration.
    pub fn mr_virt_addr(&self) -> bool {
        self.facts.mr_mode & sys::FI_MR_VIRT_ADDR != 0
    }

    /// Whether the provider chooses keys; else we do.
    pub fn mr_prov_key(&self) -> bool {
        self.facts.mr_mode & sys::FI_MR_PROV_KEY != 0
    }

    /// Whether a registration is bound to an endpoint before it is used.
    pub fn mr_endpoint(&self) -> bool {
        self.facts.mr_mode & sys::FI_MR_ENDPOINT != 0
    }

    /// Most operations in the transmit queue.
    pub fn tx_size(&self) -> usize {
        self.facts.tx_size
    }

    /// Most receives in the receive queue.
    pub fn rx_size(&self) -> usize {
        self.facts.rx_size
    }

    /// Most bytes in one operation.
    pub fn max_msg_size(&self) -> usize {
        self.facts.max_msg_size
    }

    /// Whether writes complete only when their data is in the peer's memory, if they are asked to.
    ///
    /// True only where the [`Query`] asked for it, or where the provider says so by itself.
    pub fn delivery_complete(&self) -> bool {
        self.facts.tx_op_flags & sys::FI_DELIVERY_COMPLETE != 0
    }

    /// Whether the data of writes to one peer arrives in the order in which they were posted, whatever their size.
    ///
    /// fi_endpoint(3): FI_ORDER_WAW or FI_ORDER_RMA_WAW orders writes; the data itself is ordered only for messages of
    /// up to `max_order_waw_size` bytes.
    pub fn orders_writes(&self) -> bool {
        self.write_order_bytes_max() >= self.max_msg_size()
    }

    /// Largest write whose data is ordered after that of earlier writes to the same peer, in bytes; 0 if none is.
    pub fn write_order_bytes_max(&self) -> usize {
        if self.facts.tx_msg_order & (sys::FI_ORDER_WAW | sys::FI_ORDER_RMA_WAW) == 0 {
            0
        } else {
            self.facts.max_order_waw_size
        }
    }

    /// The NIC, if the provider tells about it.
    pub fn nic(&self) -> Option<&Nic> {
        self.facts.nic.as_ref()
    }

    /// Form of addresses.
    pub fn addr_format(&self) -> AddrFormat {
        self.facts.addr_format
    }

    /// Local IP address that endpoints of this device have, if it is one.
    pub fn source_ip(&self) -> Option<IpAddr> {
        matches!(self.addr_format(), AddrFormat::Sock | AddrFormat::SockIn | AddrFormat::SockIn6)
            .then(|| ip_of(&self.facts.source))?
    }

    /// Whether the local address is one that only this host can reach: 127.0.0.0/8 or `::1`.
    pub fn loopback(&self) -> bool {
        self.source_ip().is_some_and(|address| address.is_loopback())
    }

    /// Where the remote endpoint of this raw name accepts connections, if operations go over TCP connections.
    ///
    /// The provider tcp, by itself or under ofi_rxm, names an endpoint by the address of its listening socket, which is
    /// open for as long as the endpoint (prov/tcp/src, libfabric 2.6).
    pub fn listener(&self, name: &[u8]) -> Option<SocketAddr> {
        if self.provider().split(';').next() != Some("tcp") {
            return None;
        }
        let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
        Some(SocketAddr::new(ip_of(name)?, port)).filter(|_| port != 0)
    }

    /// API version that libfabric speaks on this device.
    pub fn api_version(&self) -> Version {
        self.facts.api_version
    }

    /// Whether this copy of libfabric gave the device.
    pub(super) fn is_of(&self, library: &Libfabric) -> bool {
        self.list.library.is_same(library)
    }

    /// Whether both are the same entry of the same answer.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        ptr::eq(self.info.0, other.info.0)
    }

    pub(super) fn threading(&self) -> i32 {
        self.facts.threading
    }

    /// Lends the entry to a call that opens an object; the pointer is good while the guard is held.
    pub(super) fn lock_info(&self) -> (MutexGuard<'_, ()>, *mut sys::fi_info) {
        (self.list.lock.lock().unwrap_or_else(PoisonError::into_inner), self.info.0)
    }

    /// The error of a device that cannot be used for a reason known beforehand.
    pub(super) fn unusable(&self, why: &str) -> Error {
        Error::new(Status::NotSupported, format!("{self:?}: {why}"))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {} ({})", self.provider(), self.domain_name(), self.fabric_name())
    }
}

/// The IP address in a `struct sockaddr`.
fn ip_of(sockaddr: &[u8]) -> Option<IpAddr> {
    match i32::from(u16::from_ne_bytes(*sockaddr.first_chunk()?)) {
        // Port (2 bytes), address.
        libc::AF_INET => Some(IpAddr::from(*sockaddr.get(4..)?.first_chunk::<4>()?)),
        // Port (2 bytes), flow information (4), address.
        libc::AF_INET6 => Some(IpAddr::from(*sockaddr.get(8..)?.first_chunk::<16>()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let v4 = [&(libc::AF_INET as u16).to_ne_bytes()[..], &[0, 80, 127, 0, 0, 1, 0, 0]].concat();
        assert_eq!(ip_of(&v4), Some(IpAddr::from([127, 0, 0, 1])));
        let mut v6 = [0u8; 28];
        v6[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        v6[23] = 1;
        assert!(ip_of(&v6).unwrap().is_loopback());
        for other in [&[][..], &[2], &v4[..7], &v6[..23], &[1, 1, 0, 0, 127, 0, 0, 1]] {
            assert_eq!(ip_of(other), None);
        }
    }

    #[test]
    fn names_with_nul_are_refused() {
        let query = Query { domain: Some("a\0b".into()), ..Query::default() };
        assert_eq!(Hints::new(&query, 0, 0).err().unwrap().status(), Status::InvalidParam);
    }
}
