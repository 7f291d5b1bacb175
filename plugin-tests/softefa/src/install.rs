//! Puts the three libraries into one directory, for `LD_LIBRARY_PATH`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where build.rs put the two thin libraries.
const SHIMS: &str = env!("SOFTEFA_SHIM_DIR");

/// The two thin libraries.
const THIN: [&str; 2] = ["libibverbs.so.1", "libefa.so.1"];

/// The directory with `libibverbs.so.1`, `libefa.so.1` and `libsoftefa.so`, made or refreshed beside the running
/// program (a binary or test of this workspace), or taken as it is by a program that was carried elsewhere with it.
pub fn library_dir() -> io::Result<PathBuf> {
    // Files on their way in are named by the process alone.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let program = std::env::current_exe()?;
    let beside = program.parent().unwrap_or(Path::new("."));
    let candidates = [beside.join("deps"), beside.to_owned()];
    let device = candidates.iter().map(|dir| dir.join("libsoftefa.so")).find(|path| path.is_file());
    let dir = beside.join("softefa-lib");
    let Some(device) = device else {
        let whole = THIN.iter().chain(&["libsoftefa.so"]).all(|name| dir.join(name).is_file());
        let advice = "no libsoftefa.so beside this program: cargo build -p softefa";
        return if whole { Ok(dir) } else { Err(io::Error::other(advice)) };
    };
    fs::create_dir_all(&dir)?;
    refresh(&device, &dir.join("libsoftefa.so"))?;
    for name in THIN {
        refresh(&Path::new(SHIMS).join(name), &dir.join(name))?;
    }
    Ok(dir)
}

/// Copies if the copy is missing or older. Programs that have the old copy mapped keep it.
fn refresh(from: &Path, to: &Path) -> io::Result<()> {
    let (source, copy) = (fs::metadata(from)?, fs::metadata(to));
    let current = copy.is_ok_and(|copy| {
        copy.len() == source.len()
            && copy.modified().ok() >= source.modified().ok()
            && copy.modified().is_ok()
    });
    if current {
        return Ok(());
    }
    let next = to.with_extension(format!("{}", std::process::id()));
    fs::copy(from, &next)?;
    fs::rename(next, to)
}
