//! Whether the NIXL of this process calls an engine the way this plugin was built for, asked before it calls one.
//!
//! NIXL's core calls an engine by the places of its virtual functions. Its `api_version` has stayed 1 over releases that moved
//! them (0.9, 0.10, 1.0), and open proposals put functions between those that are there. So the order is read off what NIXL
//! itself installed: every plugin of its own has the table of `nixlBackendEngine`, with the names of the functions. A function
//! that a proposal adds gets the answer of a backend without that feature; one that nobody here knows is refused in words.

use std::ffi::{OsStr, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::name::own_path;
use super::types::{EngineLayout, FUNCTIONS};
use super::vtable::{Library, Slot, method};
use crate::error::{Error, Result};
use crate::sys::dl::file_of;

/// The class whose virtual functions NIXL's core calls.
pub const ENGINE_TABLE: &str = "_ZTV17nixlBackendEngine";

/// The virtual functions of our engine, in the order of its slots: that of NIXL 1.0.0 to 1.5.1.
pub const OURS: [&str; FUNCTIONS] = [
    "~",
    "~",
    "supportsRemote",
    "supportsLocal",
    "supportsNotif",
    "getSupportedMems",
    "registerMem",
    "deregisterMem",
    "connect",
    "disconnect",
    "unloadMD",
    "prepXfer",
    "postXfer",
    "checkXfer",
    "releaseReqH",
    "prepMemView",
    "prepMemView",
    "releaseMemView",
    "getPublicData",
    "getConnInfo",
    "loadRemoteConnInfo",
    "loadRemoteMD",
    "loadLocalMD",
    "getNotifs",
    "genNotif",
    "queryMem",
    "estimateXferCost",
];

/// Places of the destructors, of the functions that every backend must have, and of those with an answer of NIXL's own.
const DESTRUCTORS: usize = 2;
const PURE: usize = 13;

/// Mangled names of the functions with an answer of NIXL's own, arguments included, from slot 15 on.
const DEFAULTS: [&str; OURS.len() - DESTRUCTORS - PURE] = [
    "_ZNK17nixlBackendEngine11prepMemViewERK12nixlDescListI18nixlRemoteMetaDescERPvPK23nixlBackendOptionalArgs",
    "_ZNK17nixlBackendEngine11prepMemViewERK12nixlDescListI12nixlMetaDescERPvPK23nixlBackendOptionalArgs",
    "_ZNK17nixlBackendEngine14releaseMemViewEPv",
    "_ZNK17nixlBackendEngine13getPublicDataEPK13nixlBackendMDRNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    "_ZNK17nixlBackendEngine11getConnInfoERNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    "_ZN17nixlBackendEngine18loadRemoteConnInfoERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEES7_",
    "_ZN17nixlBackendEngine12loadRemoteMDERK12nixlBlobDescRK10nixl_mem_tRKNSt7__cxx1112basic_stringIcSt11char_traitsIcE\
     SaIcEEERP13nixlBackendMD",
    "_ZN17nixlBackendEngine11loadLocalMDEP13nixlBackendMDRS1_",
    "_ZN17nixlBackendEngine9getNotifsERSt6vectorISt4pairINSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEES7_ESaIS8_EE",
    "_ZNK17nixlBackendEngine8genNotifERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEES7_",
    "_ZNK17nixlBackendEngine8queryMemERK12nixlDescListI12nixlBlobDescERSt6vectorISt8optionalISt13unordered_mapINSt7__cxx11\
     12basic_stringIcSt11char_traitsIcESaIcEEESD_St4hashISD_ESt8equal_toISD_ESaISt4pairIKSD_SD_EEEESaISN_EE",
    "_ZNK17nixlBackendEngine16estimateXferCostERK14nixl_xfer_op_tRK12nixlDescListI12nixlMetaDescES7_RKNSt7__cxx1112basic_\
     stringIcSt11char_traitsIcESaIcEEERKP15nixlBackendReqHRNSt6chrono8durationIlSt5ratioILl1ELl1000000EEEESP_R11nixl_cost_t\
     PK21nixlAgentOptionalArgs",
];

/// What stands in a slot that is not ours, by what the function returns. The shim has a function for each.
const ANSWER_FALSE: i8 = -1;
const ANSWER_NOT_SUPPORTED: i8 = -2;
const ANSWER_NOTHING: i8 = -3;

/// Functions of open proposals, with the answer of a backend that does not offer what they are for.
const PROPOSED: [(&str, i8); 9] = [
    ("supportsSendRecv", ANSWER_FALSE),    // ai-dynamo/nixl#1678
    ("prepTagXfer", ANSWER_NOT_SUPPORTED), // the same
    ("postTagXfer", ANSWER_NOT_SUPPORTED), // the same
    ("supportsProxy", ANSWER_FALSE),       // ai-dynamo/nixl#1931
    ("createDeviceProxyBackendAdapter", ANSWER_NOT_SUPPORTED), // the same
    ("supportsNotifCallback", ANSWER_FALSE), // ai-dynamo/nixl#1455
    ("supportsNotifInjection", ANSWER_FALSE), // ai-dynamo/nixl#2065
    ("checkXferEvents", ANSWER_NOT_SUPPORTED), // ai-dynamo/nixl#1274
    ("getXferPathInfo", ANSWER_NOTHING),   // ai-dynamo/nixl#2152
];

/// Functions of the class that are no virtual ones, should the core have a copy.
const NOT_VIRTUAL: [&str; 7] = [
    "setInitParam",
    "getInitParam",
    "addTelemetryEvent",
    "getTelemetryEvents",
    "getInitErr",
    "getType",
    "getCustomParams",
];

/// How the core that `core` lies in, an address in its code, wants an engine; `init` is what it passes to make one.
///
/// Reads files of NIXL's: some milliseconds, once for each engine. What cannot be compared is served as NIXL 1.0 to 1.5, with a
/// warning; what is known to be different is an error.
///
/// # Safety
/// `init` points at what NIXL calls `nixlBackendInitParams`, of whatever version.
pub unsafe fn of_process(core: *const c_void, init: *const c_void) -> Result<EngineLayout> {
    // SAFETY: the class starts with these members since 1.0, and has more behind them.
    let init = unsafe { &*init.cast::<InitParams>() };
    if !init.is_plausible() {
        return Err(Error::not_supported(format!(
            "{} passes other parameters than NIXL 1.0 to 1.5 do; use one of these, or a release of nixl-libfabric made for it",
            file_of(core as usize).unwrap_or_default().display()
        )));
    }
    of_core(file_of(core as usize).as_deref(), own_path().as_deref())
}

/// How the core in the file `core` wants an engine; `own` is the file of this plugin.
pub fn of_core(core: Option<&Path>, own: Option<&Path>) -> Result<EngineLayout> {
    let known = EngineLayout::default();
    let Some(core) = core else {
        log::warn!("nobody knows which library called: taking it for NIXL 1.0 to 1.5");
        return Ok(known);
    };
    let image = std::fs::read(core).unwrap_or_default();
    // Plugins that were linked into the core; else those that were installed with it; else those that were put beside us.
    let beside_core = core.parent().map(|folder| plugins_in(&folder.join("plugins"), own));
    let beside_us = own.and_then(Path::parent).map(|folder| plugins_in(folder, own));
    if let Some(found) = compare(&image, core, core) {
        return found;
    }
    for plugin in beside_core.into_iter().flatten().chain(beside_us.into_iter().flatten()) {
        if let Some(found) = compare(&std::fs::read(&plugin).unwrap_or_default(), &plugin, core) {
            return found;
        }
    }
    if let Some(unknown) = Library::parse(&image).as_ref().and_then(|library| called_by(library)) {
        return Err(refused(
            core,
            format_args!(
                "it calls {unknown}, and there is no plugin of NIXL's beside it that says at which place"
            ),
        ));
    }
    log::warn!(
        "{}: taken for NIXL 1.0 to 1.5, as no plugin of NIXL's beside it says in which order it calls a backend's functions",
        core.display()
    );
    Ok(known)
}

/// Plugins in `folder`, the smallest first: it is read fastest, and all have the same table.
fn plugins_in(folder: &Path, own: Option<&Path>) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut plugins: Vec<(u64, PathBuf)> = entries
        .filter(|entry| entry.file_name().as_bytes().starts_with(b"libplugin_"))
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new("so")) && Some(path.as_path()) != own)
        .filter_map(|path| Some((std::fs::metadata(&path).ok()?.len(), path)))
        .collect();
    plugins.sort();
    plugins.into_iter().map(|(_, path)| path).collect()
}

/// What `image`, the bytes of `file`, says about the core's layout; none when it says nothing.
fn compare(image: &[u8], file: &Path, core: &Path) -> Option<Result<EngineLayout>> {
    let slots = Library::parse(image)?.slots(ENGINE_TABLE)?;
    let layout = layout(&slots)
        .map_err(|difference| refused(core, format_args!("by {}, {difference}", file.display())));
    if let Ok(layout) = &layout {
        log::debug!("{}: the order of a backend's functions is that of {}", core.display(), file.display());
        let added: Vec<_> = layout.slots().iter().zip(&slots).filter(|&(&slot, _)| slot < 0).collect();
        if !added.is_empty() {
            let names: Vec<_> = added.into_iter().map(|(_, slot)| name(slot)).collect();
            log::info!("{}: not offered by this plugin: {}", core.display(), names.join(", "));
        }
    }
    Some(layout)
}

fn refused(core: &Path, difference: std::fmt::Arguments) -> Error {
    Error::not_supported(format!(
        "{} calls a backend's functions in another order than NIXL 1.0 to 1.5: {difference}; use one of these, or a release \
         of nixl-libfabric made for it",
        core.display()
    ))
}

fn name<'a>(slot: &'a Slot) -> &'a str {
    match slot {
        Slot::Named(names) => names.first().map_or("?", |name| method(name)),
        Slot::Pure => "a pure virtual function",
        Slot::Nameless => "a function without a name",
    }
}

/// A virtual function that the core calls and that NIXL 1.0 to 1.5 do not have.
///
/// Where the core calls a function with an answer of NIXL's own, GCC puts a copy of that answer beside it, as the most likely
/// target, under the function's name. What is not there proves nothing.
fn called_by<'data>(core: &Library<'data>) -> Option<&'data str> {
    core.defined()
        .filter(|name| {
            name.starts_with("_ZN17nixlBackendEngine") || name.starts_with("_ZNK17nixlBackendEngine")
        })
        .filter(|name| !DEFAULTS.contains(name))
        .map(method)
        .find(|method| !NOT_VIRTUAL.contains(method) && !["~", "nixlBackendEngine"].contains(method))
}

/// The layout that `slots`, the table of NIXL's class, describe; or what is unknown about it.
pub fn layout(slots: &[Slot]) -> std::result::Result<EngineLayout, String> {
    let pure = slots.iter().filter(|&slot| *slot == Slot::Pure).count();
    if pure != PURE {
        // Which one it is cannot be told: in the table of an abstract class such functions have no name.
        return Err(format!("there are {pure} functions that every backend must have, and not {PURE}"));
    }
    let mut pure = DESTRUCTORS..;
    let mut ours = Vec::with_capacity(slots.len());
    for (place, slot) in slots.iter().enumerate() {
        ours.push(match slot {
            _ if place < DESTRUCTORS => place as i8,
            Slot::Pure => pure.next().unwrap_or_default() as i8,
            Slot::Named(names) => {
                ours_or_proposed(names).ok_or_else(|| format!("{} is unknown (slot {place})", name(slot)))?
            }
            Slot::Nameless => return Err(format!("the function in slot {place} has no name")),
        });
    }
    EngineLayout::new(&ours).ok_or_else(|| format!("there are {} functions", ours.len()))
}

fn ours_or_proposed(names: &[&str]) -> Option<i8> {
    let ours = || DEFAULTS.iter().position(|default| names.contains(default));
    let proposed = || PROPOSED.iter().find(|(added, _)| names.iter().any(|name| method(name) == *added));
    ours().map(|place| (DESTRUCTORS + PURE + place) as i8).or_else(|| Some(proposed()?.1))
}

/// The members of `nixlBackendInitParams` that are read, up to the last of them.
#[repr(C)]
struct InitParams {
    local_agent: CppString,
    backend_type: CppString,
    custom_params: *const c_void,
    enable_progress_thread: u8,
}

/// libstdc++'s `std::string`.
#[repr(C)]
struct CppString {
    data: *const u8,
    len: usize,
    /// A short text itself, or the capacity of what `data` points to.
    short_or_capacity: MaybeUninit<[usize; 2]>,
}

impl InitParams {
    /// Whether each member holds what such a member can hold. A member that was put before one of them shows so.
    fn is_plausible(&self) -> bool {
        self.local_agent.is_plausible()
            && self.backend_type.is_plausible()
            && self.backend_type.len > 0
            && self.custom_params.cast::<usize>().is_aligned()
            && self.enable_progress_thread <= 1
    }
}

impl CppString {
    fn is_plausible(&self) -> bool {
        const SHORT_BYTES_MAX: usize = 15;
        const BYTES_MAX: usize = 1 << 32;
        if self.data == self.short_or_capacity.as_ptr().cast() {
            return self.len <= SHORT_BYTES_MAX;
        }
        // SAFETY: the caller passed an object of NIXL's, in which this word is initialised when the text is not a short one.
        let capacity = unsafe { self.short_or_capacity.as_ptr().cast::<usize>().read() };
        !self.data.is_null() && self.len <= capacity && (SHORT_BYTES_MAX + 1..BYTES_MAX).contains(&capacity)
    }
}
