//! libfabric's functions and tables, answered from a [`World`].

mod addresses;
mod discovery;
mod lifetime;
mod open;
mod posting;
mod tables;

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nixl_libfabric::fabric::Libfabric;
use nixl_libfabric::sys::libfabric as sys;

use crate::world::{Inside, Kind, Occupancy, State, World};
use discovery::{freeinfo, getinfo};
use open::open_fabric;

thread_local! {
    /// World and host that this thread opens things in.
    static HERE: RefCell<Option<(Arc<World>, usize)>> = const { RefCell::new(None) };
}

/// Runs `body` as that host: what it opens, it opens there.
pub fn on_host<T>(world: &Arc<World>, host: usize, body: impl FnOnce() -> T) -> T {
    let before = HERE.replace(Some((Arc::clone(world), host)));
    let outcome = body();
    HERE.set(before);
    outcome
}

fn here() -> (Arc<World>, usize) {
    HERE.with_borrow(|here| here.clone().expect("inside `on_host`"))
}

/// The simulated library. The worlds that it is used in must outlive what is opened.
pub fn library() -> Libfabric {
    let api = sys::Api { getinfo, freeinfo, fabric: open_fabric, version, strerror };
    // SAFETY: the functions below do what libfabric's do, as far as they are used; that is what this crate is for.
    unsafe { Libfabric::from_api(api) }
}

unsafe extern "C" fn version() -> u32 {
    2 << 16 | 6
}

unsafe extern "C" fn strerror(_: c_int) -> *const c_char {
    c"simulated error".as_ptr()
}

const EAGAIN: c_int = -libc::EAGAIN;

/// An object: libfabric's part first, then where it belongs. Freed with its world, so that a use after its end is seen.
#[repr(C)]
struct Object<F> {
    fid: F,
    world: *const World,
    index: usize,
    kind: Kind,
    /// Of queues, and of endpoints once they are bound to one.
    occupancy: OnceLock<Arc<Occupancy>>,
    open: AtomicBool,
}

impl<F> Object<F> {
    fn world(&self) -> &World {
        // SAFETY: the world frees its objects when it ends, so it is there.
        unsafe { &*self.world }
    }

    fn enter(&self, call: &str) -> Inside<'_> {
        self.occupancy.get_or_init(Arc::default).enter(self.world(), call)
    }
}

/// Objects of a world, freed with it.
#[derive(Debug, Default)]
pub(crate) struct Graveyard(Vec<(*mut c_void, unsafe fn(*mut c_void))>);

// SAFETY: the pointers are owned, and only used to free what is behind them.
unsafe impl Send for Graveyard {}

impl Drop for Graveyard {
    fn drop(&mut self) {
        for (object, free) in self.0.drain(..) {
            // SAFETY: `new_object` put them here together; the world ends, so no engine is left to use the object.
            unsafe { free(object) };
        }
    }
}

fn new_object<F>(fid: F, world: &World, state: &mut State, index: usize, kind: Kind) -> *mut F {
    unsafe fn free<F>(object: *mut c_void) {
        // SAFETY: the object came from `Box::into_raw` below.
        drop(unsafe { Box::from_raw(object.cast::<Object<F>>()) });
    }
    let object = Object { fid, world, index, kind, occupancy: OnceLock::new(), open: AtomicBool::new(true) };
    let object = Box::into_raw(Box::new(object));
    state.graveyard.0.push((object.cast(), free::<F>));
    state.opened(kind);
    object.cast()
}

/// The object behind a pointer that the code under test passes.
///
/// # Safety
/// The pointer is one that [`new_object`] gave for the same kind of object.
unsafe fn object<'a, F>(fid: *mut F, call: &str) -> &'a Object<F> {
    // SAFETY: the caller's promise; objects are freed with their world.
    let object = unsafe { &*fid.cast::<Object<F>>() };
    if !object.open.load(Ordering::Relaxed) {
        object.world().state().breach(format!("{call} on a {:?} that was closed", object.kind));
    }
    object
}
