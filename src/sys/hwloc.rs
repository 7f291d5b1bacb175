//! libhwloc, loaded at run time: the fourteen calls that reading a topology takes, and an owning handle around them.
//!
//! Made for the ABI of hwloc 2 (`libhwloc.so.15`), 2.1 and later. Layouts are those of `hwloc.h` 2.x; `tests/topology_hwloc_layout.rs`
//! compares them with the header of the machine where there is one. hwloc 3 has another soname and is not tried.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use super::dl::Library;

/// soname of the library: hwloc 2.x.
const LIBRARY: &str = "libhwloc.so.15";
/// Major number that `hwloc_get_api_version` must show.
const API_MAJOR: c_uint = 2;

/// `enum hwloc_obj_type_t`: the types that are told apart here.
const OBJ_NUMANODE: c_int = 13;
const OBJ_BRIDGE: c_int = 14;
const OBJ_PCI_DEVICE: c_int = 15;
const OBJ_OS_DEVICE: c_int = 16;
/// `enum hwloc_get_type_depth_e`.
const DEPTH_NUMANODE: c_int = -3;
const DEPTH_PCI_DEVICE: c_int = -5;
/// `enum hwloc_type_filter_e`.
const FILTER_KEEP_ALL: c_int = 0;
const FILTER_KEEP_NONE: c_int = 1;
/// `HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST`.
const COMPONENTS_BLACKLIST: c_ulong = 1;
/// `HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED`: see also the NUMA nodes that a container may not use. Without it their
/// host bridges would move up to the root, and devices of every node would look equally near.
const FLAG_INCLUDE_DISALLOWED: c_ulong = 1;
/// `hwloc_obj_bridge_type_t`.
const BRIDGE_PCI: c_int = 1;
/// `hwloc_obj_osdev_type_t`.
const OSDEV_NETWORK: c_int = 2;
const OSDEV_OPENFABRICS: c_int = 3;

/// Most NUMA nodes that a kernel can have; the set of a machine without NUMA may be infinite.
const NODES_MAX: c_int = 1024;

/// Components that talk to accelerator drivers: they would create contexts in this process, and take seconds.
const COMPONENTS_UNWANTED: [&CStr; 6] = [c"cuda", c"nvml", c"opencl", c"rsmi", c"levelzero", c"gl"];

/// `struct hwloc_obj` up to the last member that is read here.
#[repr(C)]
#[doc(hidden)]
pub struct RawObj {
    pub kind: c_int,
    pub subtype: *mut c_char,
    pub os_index: c_uint,
    pub name: *mut c_char,
    pub total_memory: u64,
    pub attr: *mut c_void,
    pub depth: c_int,
    pub logical_index: c_uint,
    pub next_cousin: *mut RawObj,
    pub prev_cousin: *mut RawObj,
    pub parent: *mut RawObj,
    pub sibling_rank: c_uint,
    pub next_sibling: *mut RawObj,
    pub prev_sibling: *mut RawObj,
    pub arity: c_uint,
    pub children: *mut *mut RawObj,
    pub first_child: *mut RawObj,
    pub last_child: *mut RawObj,
    pub symmetric_subtree: c_int,
    pub memory_arity: c_uint,
    pub memory_first_child: *mut RawObj,
    pub io_arity: c_uint,
    pub io_first_child: *mut RawObj,
    pub misc_arity: c_uint,
    pub misc_first_child: *mut RawObj,
    pub cpuset: *mut c_void,
    pub complete_cpuset: *mut c_void,
    pub nodeset: *mut c_void,
}

/// `struct hwloc_pcidev_attr_s`.
#[repr(C)]
#[derive(Clone, Copy)]
#[doc(hidden)]
pub struct RawPci {
    pub domain: u16,
    pub bus: u8,
    pub dev: u8,
    pub func: u8,
    pub class_id: u16,
    pub vendor_id: u16,
    pub device_id: u16,
    pub subvendor_id: u16,
    pub subdevice_id: u16,
    pub revision: u8,
    /// GB/s.
    pub linkspeed: f32,
}

/// `struct hwloc_bridge_attr_s`.
#[repr(C)]
#[derive(Clone, Copy)]
#[doc(hidden)]
pub struct RawBridge {
    pub upstream: RawPci,
    pub upstream_type: c_int,
    pub downstream_domain: u16,
    pub downstream_secondary_bus: u8,
    pub downstream_subordinate_bus: u8,
    pub downstream_type: c_int,
    pub depth: c_uint,
}

/// `struct hwloc_distances_s`.
#[repr(C)]
#[doc(hidden)]
pub struct RawDistances {
    pub nbobjs: c_uint,
    pub objs: *mut *mut RawObj,
    pub kind: c_ulong,
    pub values: *mut u64,
}

type RawTopology = *mut c_void;

/// The library's functions.
struct Table {
    get_api_version: unsafe extern "C" fn() -> c_uint,
    init: unsafe extern "C" fn(*mut RawTopology) -> c_int,
    destroy: unsafe extern "C" fn(RawTopology),
    load: unsafe extern "C" fn(RawTopology) -> c_int,
    set_xml: unsafe extern "C" fn(RawTopology, *const c_char) -> c_int,
    set_flags: unsafe extern "C" fn(RawTopology, c_ulong) -> c_int,
    set_components: unsafe extern "C" fn(RawTopology, c_ulong, *const c_char) -> c_int,
    set_io_types_filter: unsafe extern "C" fn(RawTopology, c_int) -> c_int,
    set_cache_types_filter: unsafe extern "C" fn(RawTopology, c_int) -> c_int,
    get_nbobjs_by_depth: unsafe extern "C" fn(RawTopology, c_int) -> c_uint,
    get_obj_by_depth: unsafe extern "C" fn(RawTopology, c_int, c_uint) -> *mut RawObj,
    bitmap_next: unsafe extern "C" fn(*const c_void, c_int) -> c_int,
    distances_get_by_name: unsafe extern "C" fn(
        RawTopology,
        *const c_char,
        *mut c_uint,
        *mut *mut RawDistances,
        c_ulong,
    ) -> c_int,
    distances_release: unsafe extern "C" fn(RawTopology, *mut RawDistances),
}

impl Table {
    /// The library, loaded on first use; the reason where it cannot be used. Never unloaded.
    fn get() -> Result<&'static Self, String> {
        static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
        TABLE.get_or_init(Self::load_library).as_ref().map_err(Clone::clone)
    }

    fn load_library() -> Result<Self, String> {
        let library = Library::load(Path::new(LIBRARY))?;
        // SAFETY: each symbol is resolved in hwloc's library and cast to the type that hwloc.h 2.x declares for
        // it; the version check below refuses every other major number before a call that depends on it.
        let table = unsafe {
            Self {
                get_api_version: library.function(c"hwloc_get_api_version")?,
                init: library.function(c"hwloc_topology_init")?,
                destroy: library.function(c"hwloc_topology_destroy")?,
                load: library.function(c"hwloc_topology_load")?,
                set_xml: library.function(c"hwloc_topology_set_xml")?,
                set_flags: library.function(c"hwloc_topology_set_flags")?,
                set_components: library.function(c"hwloc_topology_set_components")?,
                set_io_types_filter: library.function(c"hwloc_topology_set_io_types_filter")?,
                set_cache_types_filter: library.function(c"hwloc_topology_set_cache_types_filter")?,
                get_nbobjs_by_depth: library.function(c"hwloc_get_nbobjs_by_depth")?,
                get_obj_by_depth: library.function(c"hwloc_get_obj_by_depth")?,
                bitmap_next: library.function(c"hwloc_bitmap_next")?,
                distances_get_by_name: library.function(c"hwloc_distances_get_by_name")?,
                distances_release: library.function(c"hwloc_distances_release")?,
            }
        };
        // SAFETY: takes nothing, in every version.
        let version = unsafe { (table.get_api_version)() };
        if version >> 16 == API_MAJOR {
            Ok(table)
        } else {
            Err(format!("libhwloc.so.15 has API {version:#x}, made for 2.x"))
        }
    }
}

/// A loaded topology.
pub struct Topology {
    table: &'static Table,
    raw: RawTopology,
}

impl Topology {
    /// The machine that this process runs on, or what `HWLOC_XMLFILE` names.
    pub fn of_this_machine() -> Result<Self, String> {
        Self::load(None)
    }

    /// The machine that an XML file describes.
    pub fn of_xml(path: &Path) -> Result<Self, String> {
        let path =
            CString::new(path.as_os_str().as_bytes()).map_err(|_| "the path holds a zero byte".to_owned())?;
        Self::load(Some(&path))
    }

    fn load(xml: Option<&CStr>) -> Result<Self, String> {
        let table = Table::get()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes a handle through the pointer.
        check("hwloc_topology_init", unsafe { (table.init)(&raw mut raw) })?;
        let topology = Self { table, raw };
        if let Some(path) = xml {
            // SAFETY: the handle is initialised and not loaded; the path is a C string that is copied.
            check("hwloc_topology_set_xml", unsafe { (table.set_xml)(raw, path.as_ptr()) })?;
        }
        for component in COMPONENTS_UNWANTED {
            // SAFETY: as above. An error says that there is no such component: all the better.
            unsafe { (table.set_components)(raw, COMPONENTS_BLACKLIST, component.as_ptr()) };
        }
        // SAFETY: as above.
        unsafe {
            check("hwloc_topology_set_flags", (table.set_flags)(raw, FLAG_INCLUDE_DISALLOWED))?;
            check("hwloc_topology_set_io_types_filter", (table.set_io_types_filter)(raw, FILTER_KEEP_ALL))?;
            check(
                "hwloc_topology_set_cache_types_filter",
                (table.set_cache_types_filter)(raw, FILTER_KEEP_NONE),
            )?;
            check("hwloc_topology_load", (table.load)(raw))?;
        }
        Ok(topology)
    }

    /// Version of the library's interface, for people: `2.8`.
    pub fn library_version(&self) -> String {
        // SAFETY: takes nothing.
        let version = unsafe { (self.table.get_api_version)() };
        format!("{}.{}", version >> 16, version >> 8 & 0xff)
    }

    /// The NUMA nodes.
    pub fn numa_nodes(&self) -> impl Iterator<Item = Object<'_>> {
        self.objects(DEPTH_NUMANODE)
    }

    /// The PCI devices other than bridges.
    pub fn pci_devices(&self) -> impl Iterator<Item = Object<'_>> {
        self.objects(DEPTH_PCI_DEVICE)
    }

    fn objects(&self, depth: c_int) -> impl Iterator<Item = Object<'_>> {
        // SAFETY: the handle is loaded.
        let count = unsafe { (self.table.get_nbobjs_by_depth)(self.raw, depth) };
        (0..count).filter_map(move |index| {
            // SAFETY: the handle is loaded; an index that is out of range gives null.
            let raw = unsafe { (self.table.get_obj_by_depth)(self.raw, depth, index) };
            Object::new(self, raw)
        })
    }

    /// Distances between NUMA nodes as the firmware gives them: (from, to, distance). Empty where it gives none.
    pub fn numa_distances(&self) -> Vec<(u32, u32, u32)> {
        let mut count: c_uint = 1;
        let mut raw: *mut RawDistances = ptr::null_mut();
        // SAFETY: the handle is loaded; there is room for the one pointer that `count` announces.
        let status = unsafe {
            (self.table.distances_get_by_name)(
                self.raw,
                c"NUMALatency".as_ptr(),
                &raw mut count,
                &raw mut raw,
                0,
            )
        };
        if status != 0 || count == 0 || raw.is_null() {
            return Vec::new();
        }
        // SAFETY: the library filled in one structure, which lives until it is released below: `objs` has
        // `nbobjs` entries and `values` has `nbobjs` squared (hwloc/distances.h).
        let (objects, values) = unsafe {
            let distances = &*raw;
            let count = distances.nbobjs as usize;
            (
                std::slice::from_raw_parts(distances.objs, count).to_vec(),
                std::slice::from_raw_parts(distances.values, count * count).to_vec(),
            )
        };
        // SAFETY: the structure came from the library and is not used any more.
        unsafe { (self.table.distances_release)(self.raw, raw) };
        let nodes: Vec<_> =
            objects.iter().map(|&raw| Object::new(self, raw).filter(Object::is_numa_node)).collect();
        let pairs = nodes.iter().flat_map(|from| nodes.iter().map(move |to| (from, to)));
        pairs
            .zip(values)
            .filter_map(|((from, to), value)| {
                Some((from.as_ref()?.os_index(), to.as_ref()?.os_index(), u32::try_from(value).ok()?))
            })
            .collect()
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        // SAFETY: initialised, destroyed once, and objects borrow the topology.
        unsafe { (self.table.destroy)(self.raw) }
    }
}

fn check(what: &str, status: c_int) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    Err(format!("{what}: {}", std::io::Error::last_os_error()))
}

/// An object of a loaded topology.
pub struct Object<'a> {
    topology: &'a Topology,
    raw: ptr::NonNull<RawObj>,
    of: PhantomData<&'a RawObj>,
}

/// What an object is, for those that this crate tells apart.
pub enum Kind {
    /// A bridge whose upstream side is PCI.
    PciBridge {
        /// Its upstream side.
        pci: Pci,
    },
    /// A bridge whose upstream side is the host.
    HostBridge {
        /// PCI domain.
        domain: u32,
        /// Root bus.
        bus: u8,
    },
    /// A PCI device.
    PciDevice(Pci),
    /// A network interface of the operating system.
    Interface,
    /// A device under `/sys/class/infiniband`.
    Rdma,
    /// Anything else.
    Other,
}

/// PCI attributes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pci {
    /// domain, bus, device, function
    pub at: (u32, u8, u8, u8),
    /// Class and subclass.
    pub class: u16,
    /// Vendor number.
    pub vendor: u16,
    /// Device number.
    pub id: u16,
    /// Speed of the link in GB/s; 0 where unknown.
    pub link_gbytes: f32,
}

impl From<RawPci> for Pci {
    fn from(raw: RawPci) -> Self {
        Self {
            at: (raw.domain.into(), raw.bus, raw.dev, raw.func),
            class: raw.class_id,
            vendor: raw.vendor_id,
            id: raw.device_id,
            link_gbytes: raw.linkspeed,
        }
    }
}

impl<'a> Object<'a> {
    fn new(topology: &'a Topology, raw: *mut RawObj) -> Option<Self> {
        Some(Self { topology, raw: ptr::NonNull::new(raw)?, of: PhantomData })
    }

    fn raw(&self) -> &RawObj {
        // SAFETY: the library's objects live and do not change as long as the topology that `'a` borrows.
        unsafe { self.raw.as_ref() }
    }

    /// The object that this is part of.
    pub fn parent(&self) -> Option<Object<'a>> {
        Self::new(self.topology, self.raw().parent)
    }

    /// The I/O objects below: of a PCI device, its devices of the operating system.
    pub fn io_children(&self) -> impl Iterator<Item = Object<'a>> + use<'a> {
        let topology = self.topology;
        std::iter::successors(Self::new(topology, self.raw().io_first_child), move |object| {
            Self::new(topology, object.raw().next_sibling)
        })
    }

    /// Number that the operating system gives it.
    pub fn os_index(&self) -> u32 {
        self.raw().os_index
    }

    /// Memory of the NUMA nodes below, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.raw().total_memory
    }

    /// Name, of a device of the operating system.
    pub fn name(&self) -> Option<String> {
        let name = self.raw().name;
        // SAFETY: null or a C string that lives as long as the object.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    /// The NUMA nodes that it is near to; `None` for I/O objects, which have no such set.
    pub fn nodeset(&self) -> Option<Vec<u32>> {
        let set = self.raw().nodeset;
        if set.is_null() {
            return None;
        }
        let next = |after: c_int| {
            // SAFETY: a bitmap of the library that lives as long as the object; -1 asks for the first.
            let found = unsafe { (self.topology.table.bitmap_next)(set, after) };
            (found >= 0).then_some(found)
        };
        let nodes = std::iter::successors(next(-1), |&node| next(node));
        Some(nodes.take_while(|&node| node < NODES_MAX).map(|node| node as u32).collect())
    }

    fn is_numa_node(&self) -> bool {
        self.raw().kind == OBJ_NUMANODE
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        let raw = self.raw();
        if raw.attr.is_null() {
            return Kind::Other;
        }
        match raw.kind {
            OBJ_PCI_DEVICE => {
                // SAFETY: for a PCI device the attributes are the union's member `pcidev`.
                Kind::PciDevice(unsafe { *raw.attr.cast::<RawPci>() }.into())
            }
            OBJ_BRIDGE => {
                // SAFETY: for a bridge the attributes are the union's member `bridge`.
                let bridge = unsafe { *raw.attr.cast::<RawBridge>() };
                if bridge.upstream_type == BRIDGE_PCI {
                    Kind::PciBridge { pci: bridge.upstream.into() }
                } else {
                    Kind::HostBridge {
                        domain: bridge.downstream_domain.into(),
                        bus: bridge.downstream_secondary_bus,
                    }
                }
            }
            OBJ_OS_DEVICE => {
                // SAFETY: for a device of the operating system the attributes are the union's member `osdev`, whose
                // only member is the type.
                match unsafe { *raw.attr.cast::<c_int>() } {
                    OSDEV_NETWORK => Kind::Interface,
                    OSDEV_OPENFABRICS => Kind::Rdma,
                    _ => Kind::Other,
                }
            }
            _ => Kind::Other,
        }
    }
}
