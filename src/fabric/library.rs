//! The library itself: which copy, which version.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::sys::libfabric::Api;

/// A libfabric version, as major and minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major number.
    pub major: u16,
    /// Minor number.
    pub minor: u16,
}

impl Version {
    /// From its two numbers.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// From libfabric's packed form (`FI_VERSION`).
    pub const fn from_packed(packed: u32) -> Self {
        Self { major: (packed >> 16) as u16, minor: packed as u16 }
    }

    /// libfabric's packed form.
    pub const fn packed(self) -> u32 {
        (self.major as u32) << 16 | self.minor as u32
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Oldest library that is known to work.
const OLDEST: Version = Version::new(1, 17);

/// API version asked for; all that the plugin needs for host memory.
const API_WANTED: Version = Version::new(1, 18);

/// API version asked for where accelerator memory is wanted: 1.20 brought registration by dmabuf.
const API_WANTED_HMEM: Version = Version::new(1, 20);

/// A loaded libfabric. It stays loaded until the process ends.
#[derive(Clone)]
pub struct Libfabric {
    inner: Arc<Inner>,
}

struct Inner {
    api: Api,
    version: Version,
    origin: String,
}

impl Libfabric {
    /// Finds libfabric: the copy that is already in this process, else `path` if one is given, else the system's,
    /// else the EFA installer's.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let (api, origin) = Api::load(path).map_err(|reason| {
            Error::not_supported(format!(
                "libfabric cannot be loaded: {reason}. Install it (Debian and Ubuntu: libfabric1; Fedora, RHEL and \
                 Amazon Linux: libfabric; on EC2 with EFA: the EFA installer, which puts it into /opt/amazon/efa), \
                 or name the file"
            ))
        })?;
        let library = Self::from_api_at(api, origin);
        if library.version() < OLDEST {
            return Err(Error::not_supported(format!(
                "{} is libfabric {}, the oldest that works is {OLDEST}: install a newer one",
                library.origin(),
                library.version()
            )));
        }
        Ok(library)
    }

    /// A fabric made of the caller's own functions.
    ///
    /// # Safety
    /// The functions, and the tables of the objects that they give, must behave as libfabric's do.
    pub unsafe fn from_api(api: Api) -> Self {
        Self::from_api_at(api, "simulator".to_owned())
    }

    fn from_api_at(api: Api, origin: String) -> Self {
        // SAFETY: fi_version takes nothing and may be called at any time.
        let version = Version::from_packed(unsafe { (api.version)() });
        Self { inner: Arc::new(Inner { api, version, origin }) }
    }

    /// Version of the library, which may be newer than the API version that is asked for.
    pub fn version(&self) -> Version {
        self.inner.version
    }

    /// File that the library was loaded from.
    pub fn origin(&self) -> &str {
        &self.inner.origin
    }

    /// Whether both are the same copy.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
            || std::ptr::fn_addr_eq(self.inner.api.getinfo, other.inner.api.getinfo)
    }

    pub(super) fn api(&self) -> &Api {
        &self.inner.api
    }

    /// API version to ask for.
    pub(super) fn api_version(&self, hmem: bool) -> Version {
        self.version().min(if hmem { API_WANTED_HMEM } else { API_WANTED })
    }
}

impl fmt::Debug for Libfabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libfabric {} ({})", self.version(), self.origin())
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_pack_as_libfabric_packs_them() {
        assert_eq!(Version::new(1, 18).packed(), 0x1_0012);
        assert_eq!(Version::from_packed(0x2_0004), Version::new(2, 4));
        assert!(Version::new(1, 22) < Version::new(2, 0));
    }
}
