//! The plugin's name is the name of its file: `libplugin_LIBFABRIC.so` and `libplugin_Libfabric.so` are the same library.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

/// The name under which NIXL's documentation knows this backend.
pub const DEFAULT: &CStr = c"LIBFABRIC";

/// The name under which the plugin was loaded first.
pub fn plugin_name() -> &'static CStr {
    static NAME: OnceLock<CString> = OnceLock::new();
    NAME.get_or_init(|| own_path().and_then(|path| in_path(&path)).unwrap_or_else(|| DEFAULT.to_owned()))
}

/// The path under which the dynamic linker loaded this library.
fn own_path() -> Option<CString> {
    let own_address = (&raw const super::calls::OPS).cast();
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: any address may be asked for, and `info` is valid for the write.
    let found = unsafe { libc::dladdr(own_address, info.as_mut_ptr()) } != 0;
    // SAFETY: all zero is a valid `Dl_info`.
    let path = unsafe { info.assume_init() }.dli_fname;
    if !found || path.is_null() {
        return None;
    }
    // SAFETY: dladdr returned a C string of the dynamic linker's, which lives as long as this library is loaded.
    Some(unsafe { CStr::from_ptr(path) }.to_owned())
}

fn in_path(path: &CStr) -> Option<CString> {
    let file = Path::new(OsStr::from_bytes(path.to_bytes())).file_name()?.as_bytes();
    let name = file.strip_prefix(b"libplugin_")?.strip_suffix(b".so")?;
    CString::new(name).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::{in_path, plugin_name};

    #[test]
    fn the_plugin_is_named_after_its_file() {
        let name = |path| in_path(path).map(|name| name.into_string().unwrap());
        assert_eq!(name(c"/opt/nixl/plugins/libplugin_LIBFABRIC.so").as_deref(), Some("LIBFABRIC"));
        assert_eq!(name(c"libplugin_Libfabric.so").as_deref(), Some("Libfabric"));
        for path in [c"/usr/bin/python3", c"", c"/", c"libplugin_.so", c"/x/libnixl_libfabric.so"] {
            assert_eq!(name(path), None, "{path:?}");
        }
    }

    #[test]
    fn another_file_gets_the_documented_name() {
        assert_eq!(plugin_name(), c"LIBFABRIC");
    }
}
