//! The plugin's name is the name of its file: `libplugin_LIBFABRIC.so` and `libplugin_Libfabric.so` are the same library.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::sys::dl::file_of;

/// The name under which NIXL's documentation knows this backend.
pub const DEFAULT: &CStr = c"LIBFABRIC";

/// The name under which the plugin was loaded first.
pub fn plugin_name() -> &'static CStr {
    static NAME: OnceLock<CString> = OnceLock::new();
    NAME.get_or_init(|| own_path().and_then(|path| in_path(&path)).unwrap_or_else(|| DEFAULT.to_owned()))
}

/// The path under which the dynamic linker loaded this library.
pub fn own_path() -> Option<PathBuf> {
    // Any address of this library's own will do.
    file_of(DEFAULT.as_ptr().addr())
}

fn in_path(path: &Path) -> Option<CString> {
    let file = path.file_name()?.as_bytes();
    let name = file.strip_prefix(b"libplugin_")?.strip_suffix(b".so")?;
    CString::new(name).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::{in_path, plugin_name};

    #[test]
    fn the_plugin_is_named_after_its_file() {
        let name = |path: &str| in_path(path.as_ref()).map(|name| name.into_string().unwrap());
        assert_eq!(name("/opt/nixl/plugins/libplugin_LIBFABRIC.so").as_deref(), Some("LIBFABRIC"));
        assert_eq!(name("libplugin_Libfabric.so").as_deref(), Some("Libfabric"));
        for path in ["/usr/bin/python3", "", "/", "libplugin_.so", "/x/libnixl_libfabric.so"] {
            assert_eq!(name(path), None, "{path:?}");
        }
    }

    #[test]
    fn another_file_gets_the_documented_name() {
        assert_eq!(plugin_name(), c"LIBFABRIC");
    }
}
