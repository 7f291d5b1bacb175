//! Loads vendor libraries when they are needed, so that the plugin itself loads where they are missing.
//!
//! A library is never unloaded: its threads, exit handlers and our function pointers outlive any scope we could name.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A library that is in this process, and stays.
#[derive(Debug, Clone)]
pub struct Library {
    handle: Handle,
    origin: String,
}

/// What `dlopen` gave. It is only ever passed back to the loader.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handle(*mut c_void);

// SAFETY: the dynamic loader takes its own lock; a handle that is never closed may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Library {
    /// Finds or loads a library.
    ///
    /// A copy that is already in the process is used before any other is loaded: two copies of one library have
    /// two sets of globals. `stem` is its file name up to the first `.` or `-` (`libfabric` finds `libfabric.so.1`
    /// and also `libfabric-1a2b3c.so.1.28` of a Python wheel). Else `names` are tried in turn, as `dlopen` takes
    /// them. An explicit `path` is loaded instead of `names`, and is refused when another copy is already there.
    ///
    /// The error says, for each name, what the loader said.
    pub fn open(stem: &str, path: Option<&Path>, names: &[&str]) -> Result<Self, String> {
        let loaded = loaded_file(stem);
        if let (Some(loaded), Some(path)) = (&loaded, path)
            && !same_file(loaded, path)
        {
            return Err(format!(
                "{} is asked for, but this process already uses {}; a second copy would not share its state",
                path.display(),
                loaded.display()
            ));
        }
        let candidates: Vec<&OsStr> = match (&loaded, path) {
            (Some(loaded), _) => vec![loaded.as_os_str()],
            (None, Some(path)) => vec![path.as_os_str()],
            (None, None) => names.iter().map(OsStr::new).collect(),
        };
        let mut reasons = Vec::new();
        for name in candidates {
            // NOLOAD: what was found in the process is taken from there, whatever its path leads to by now.
            match dlopen(name, if loaded.is_some() { libc::RTLD_NOLOAD } else { 0 }) {
                Ok(handle) => return Ok(Self { handle, origin: name.to_string_lossy().into_owned() }),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    }

    /// Loads a library by name or path; one of that name that is in the process already is used.
    pub fn load(name: &Path) -> Result<Self, String> {
        let handle = dlopen(name.as_os_str(), 0)?;
        Ok(Self { handle, origin: name.to_string_lossy().into_owned() })
    }

    /// Resolves a function.
    ///
    /// # Safety
    /// `F` is the type of a pointer to the function of that name.
    pub unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let found = self.symbol(name)?;
        // SAFETY: by contract F is a pointer to a function, of the size of `found`, which is not null.
        Ok(unsafe { std::mem::transmute_copy(&found) })
    }

    /// Name or path by which the library was opened.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Address of a symbol.
    pub fn symbol(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle came from dlopen and is never closed; the name is a C string.
        let address = unsafe { libc::dlsym(self.handle.0, name.as_ptr()) };
        self.found(address, name, None)
    }

    /// Address of one version of a symbol (`name@version`), whatever the library's default version is.
    pub fn versioned_symbol(&self, name: &CStr, version: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: as in `symbol`; `dlvsym` is in every glibc that Rust supports.
        let address = unsafe { dlvsym(self.handle.0, name.as_ptr(), version.as_ptr()) };
        self.found(address, name, Some(version))
    }

    fn found(
        &self,
        address: *mut c_void,
        name: &CStr,
        version: Option<&CStr>,
    ) -> Result<*mut c_void, String> {
        if !address.is_null() {
            return Ok(address);
        }
        let version = version.map(|v| format!("@{}", v.to_string_lossy())).unwrap_or_default();
        Err(format!("{} has no symbol {}{version}", self.origin, name.to_string_lossy()))
    }
}

unsafe extern "C" {
    fn dlvsym(handle: *mut c_void, symbol: *const c_char, version: *const c_char) -> *mut c_void;
}

/// Path of the loaded object that holds `address`, if the loader knows it.
pub fn file_of(address: usize) -> Option<PathBuf> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dladdr accepts any address and fills the struct it is given.
    let known = unsafe { libc::dladdr(address as *const c_void, &raw mut info) };
    if known == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr succeeded, so the name is a C string that lives as long as the object is loaded.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(OsStr::from_bytes(path.to_bytes()).into())
}

pub(super) fn dlopen(name: &OsStr, flags: c_int) -> Result<Handle, String> {
    let text = CString::new(name.as_bytes()).map_err(|_| format!("{}: name holds a NUL", name.display()))?;
    // SAFETY: the name is a C string. Constructors of the library run here: that is what loading it means.
    let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) };
    if !handle.is_null() {
        return Ok(Handle(handle));
    }
    // SAFETY: dlerror returns null or a C string that stays until this thread's next loader call.
    let reason = unsafe {
        let reason = libc::dlerror();
        if reason.is_null() { None } else { Some(CStr::from_ptr(reason).to_string_lossy().into_owned()) }
    };
    Err(reason.unwrap_or_else(|| format!("{}: cannot be loaded", name.display())))
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// File of the first loaded object whose name is `stem`, then `.` or `-`, then anything with `.so` in it.
fn loaded_file(stem: &str) -> Option<PathBuf> {
    struct Search<'a> {
        stem: &'a str,
        found: Option<PathBuf>,
    }

    unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
        // SAFETY: `data` is the `Search` that `loaded_file` passed, used by nobody else during the walk; `info` and
        // its name are valid during the call. Nothing below panics, so nothing unwinds into C.
        let (search, name) = unsafe {
            if (*info).dlpi_name.is_null() {
                return 0;
            }
            (&mut *data.cast::<Search<'_>>(), CStr::from_ptr((*info).dlpi_name))
        };
        let path = Path::new(OsStr::from_bytes(name.to_bytes()));
        let file = path.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
        if is_library(&file, search.stem) {
            search.found = Some(path.to_owned());
            return 1;
        }
        0
    }

    let mut search = Search { stem, found: None };
    // SAFETY: the callback matches the declared type, and `search` outlives the walk.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search.found
}

fn is_library(file: &str, stem: &str) -> bool {
    file.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-']) && rest.contains(".so"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaded_library_is_found_by_its_stem() {
        let libc_file = loaded_file("libc").expect("every test process has a libc");
        let library = Library::open("libc", None, &[]).unwrap();
        assert_eq!(Path::new(library.origin()), libc_file);
        assert!(library.symbol(c"getpid").is_ok());
        let missing = library.symbol(c"no_such_symbol_at_all").unwrap_err();
        assert!(missing.contains("no_such_symbol_at_all"), "{missing}");
        let other = Library::open("libc", Some(Path::new("/nowhere/libc.so.6")), &[]).unwrap_err();
        assert!(other.contains("/nowhere/libc.so.6"), "{other}");
    }

    #[test]
    fn stems_match_whole_words() {
        assert!(is_library("libfabric.so.1", "libfabric"));
        assert!(is_library("libfabric-9fe97e6c.so.1.28.0", "libfabric"));
        assert!(!is_library("libcudart.so.12", "libcuda"));
        assert!(!is_library("libfabric.txt", "libfabric"));
        assert!(!is_library("xlibfabric.so.1", "libfabric"));
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = Library::open("libnowhere", None, &["libnowhere.so.1", "/nowhere/lib.so"]).unwrap_err();
        assert!(error.contains("libnowhere.so.1") && error.contains("/nowhere/lib.so"), "{error}");
    }

    #[test]
    fn an_address_is_traced_to_its_file() {
        let libc = Library::open("libc", None, &[]).unwrap();
        assert!(
            file_of(libc.symbol(c"getpid").unwrap() as usize).unwrap().to_string_lossy().contains("libc")
        );
        assert_eq!(file_of(0), None);
    }
}
