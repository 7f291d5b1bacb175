//! The context guard: work in a context, and leave the thread as it was.

use std::ffi::c_uint;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::{Cuda, Device, check, describe};
use crate::error::{Error, Result};
use crate::sys::cuda::{self as sys, Api, CUcontext};

/// A context of the application in which work on an allocation can be done.
///
/// Where it is the device's primary context it is retained for as long as this value or a clone of it lives, so a
/// registration that keeps one can use it from any thread at any time. A context that the application made by itself
/// (`cuCtxCreate`) cannot be retained; it must live as long as the memory made in it, as CUDA asks anyway.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    cuda: Cuda,
    device: Device,
    handle: CUcontext,
    retained: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.retained {
            return;
        }
        let _relaxed = Relaxed::enter(self.cuda.api());
        // SAFETY: takes no pointers; matches the one retain of `context_of`.
        let rc = unsafe { (self.cuda.api().primary_ctx_release)(self.device.handle) };
        // At the exit of the process the driver may be gone before us, and with it what was retained.
        if rc != sys::SUCCESS && rc != sys::ERROR_DEINITIALIZED {
            let why = describe(self.cuda.api(), rc);
            log::warn!("CUDA device {}: cuDevicePrimaryCtxRelease: {why}", self.device.ordinal);
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(device {}, primary {})", self.0.device.ordinal, self.0.retained)
    }
}

/// Equal are two that stand for the same context of the driver.
impl PartialEq for Context {
    fn eq(&self, other: &Self) -> bool {
        self.0.handle == other.0.handle
    }
}

impl Eq for Context {}

impl Context {
    /// The device of the context.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether it is the device's primary context, which this value keeps alive.
    pub fn is_primary(&self) -> bool {
        self.0.retained
    }

    /// Runs `work` with this context current on the calling thread, then restores what was current, also when `work`
    /// panics. The error is that the context could not be entered; `work` has not run then.
    pub fn with<R>(&self, work: impl FnOnce() -> R) -> Result<R> {
        let _guard = Guard::enter(self.cuda(), self.0.handle).map_err(|e| {
            e.context(format!("entering the context of CUDA device {}", self.device().ordinal))
        })?;
        Ok(work())
    }

    /// Runs `work` in whatever context is current on the calling thread, and in this one if none is: a library that
    /// calls CUDA in there makes no context of its own.
    pub fn with_any<R>(&self, work: impl FnOnce() -> R) -> R {
        let _relaxed = Relaxed::enter(self.cuda().api());
        let entered = match current(self.cuda().api()) {
            Ok(CUcontext::NULL) => Guard::enter(self.cuda(), self.0.handle),
            _ => return work(),
        };
        if let Err(why) = &entered {
            log::debug!("CUDA device {}: its context cannot be entered: {why}", self.device().ordinal);
        }
        work()
    }

    pub(super) fn cuda(&self) -> &Cuda {
        &self.0.cuda
    }

    pub(super) fn handle(&self) -> CUcontext {
        self.0.handle
    }
}

impl Cuda {
    /// The context in which to work on an allocation of `device` whose own context is `own` (NULL for VMM and
    /// stream-ordered memory): the primary context if the application has it active and `own` does not say otherwise,
    /// else `own`, else none. Never creates one.
    pub(super) fn context_of(&self, device: &Device, own: CUcontext) -> Result<Option<Context>> {
        let context = |handle, retained| {
            Context(Arc::new(Inner { cuda: self.clone(), device: device.clone(), handle, retained }))
        };
        let api = self.api();
        let (mut flags, mut active) = (0, 0);
        // SAFETY: writes two ints.
        self.check("cuDevicePrimaryCtxGetState", unsafe {
            (api.primary_ctx_get_state)(device.handle, &raw mut flags, &raw mut active)
        })?;
        if active == 0 {
            return Ok((!own.is_null()).then(|| context(own, false)));
        }
        let mut primary = CUcontext::NULL;
        // SAFETY: writes one handle. The context is active, so retaining counts and creates nothing; only an
        // application that drops its last use between the two calls could make it be created again.
        self.check("cuDevicePrimaryCtxRetain", unsafe {
            (api.primary_ctx_retain)(&raw mut primary, device.handle)
        })?;
        let retained = context(primary, true);
        Ok(Some(if own.is_null() || own == primary { retained } else { context(own, false) }))
    }

    /// A primary context that the application has active, of the first device that has one. Never creates one.
    pub fn any_active_context(&self) -> Option<Context> {
        self.devices().iter().find_map(|device| self.active_context(device.ordinal).ok().flatten())
    }

    /// The ordinal-th device's primary context, if the application has it active. Never creates one.
    pub fn active_context(&self, ordinal: u32) -> Result<Option<Context>> {
        let _relaxed = Relaxed::enter(self.api());
        self.context_of(self.device(ordinal)?, CUcontext::NULL)
    }
}

/// Runs `work` in `context`, or where there is none in whatever is current, in relaxed capture mode either way.
pub(super) fn with_context<R>(cuda: &Cuda, context: Option<&Context>, work: impl FnOnce() -> R) -> Result<R> {
    if let Some(context) = context {
        return context.with(work);
    }
    let _relaxed = Relaxed::enter(cuda.api());
    Ok(work())
}

/// A context pushed on this thread's stack. It is popped by `Drop`, so that no path misses it; the type is private and
/// lives in one stack frame, so that guards nest and stay on their thread.
struct Guard<'a> {
    api: &'a Api,
    before: CUcontext,
    _relaxed: Relaxed<'a>,
}

impl<'a> Guard<'a> {
    fn enter(cuda: &'a Cuda, context: CUcontext) -> Result<Self> {
        let api = cuda.api();
        let relaxed = Relaxed::enter(api);
        let before = current(api)?;
        // SAFETY: takes a handle; the driver refuses one that is not a live context.
        check(api, "cuCtxPushCurrent", unsafe { (api.ctx_push_current)(context) })?;
        Ok(Self { api, before, _relaxed: relaxed })
    }

    /// Pops, and makes sure that the caller's context is current even if the work left the stack uneven.
    fn leave(&self) -> Result<()> {
        let mut popped = CUcontext::NULL;
        // SAFETY: writes one handle.
        let pop = check(self.api, "cuCtxPopCurrent", unsafe { (self.api.ctx_pop_current)(&raw mut popped) });
        if current(self.api) == Ok(self.before) {
            return pop;
        }
        // SAFETY: takes a handle that was current on this thread when the guard was made.
        check(self.api, "cuCtxSetCurrent", unsafe { (self.api.ctx_set_current)(self.before) })?;
        Err(Error::backend("the context stack was left uneven and has been set right"))
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Err(why) = self.leave() {
            log::error!("restoring the caller's CUDA context: {why}");
        }
    }
}

fn current(api: &Api) -> Result<CUcontext> {
    let mut context = CUcontext::NULL;
    // SAFETY: writes one handle.
    check(api, "cuCtxGetCurrent", unsafe { (api.ctx_get_current)(&raw mut context) })?;
    Ok(context)
}

/// This thread in relaxed stream capture mode, until dropped.
///
/// While some thread captures a graph in the global mode (the default; `PyTorch` and vLLM do), calls that CUDA counts as
/// unsafe, `cuEventQuery` among them, fail on every thread and ruin the capture. A thread that works on streams of its
/// own says so with the relaxed mode (cuda.h, `cuThreadExchangeStreamCaptureMode`).
pub(super) struct Relaxed<'a> {
    api: &'a Api,
    before: Option<c_uint>,
    _on_this_thread: PhantomData<*const ()>,
}

impl<'a> Relaxed<'a> {
    pub(super) fn enter(api: &'a Api) -> Self {
        let mut mode = sys::CAPTURE_RELAXED;
        let before = api
            .thread_exchange_capture_mode
            // SAFETY: reads and writes one enum. A failure leaves the mode alone: then there is nothing to restore.
            .and_then(|exchange| (unsafe { exchange(&raw mut mode) } == sys::SUCCESS).then_some(mode));
        Self { api, before, _on_this_thread: PhantomData }
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        let (Some(exchange), Some(mut mode)) = (self.api.thread_exchange_capture_mode, self.before) else {
            return;
        };
        // SAFETY: reads and writes one enum; the value came from the driver.
        let rc = unsafe { exchange(&raw mut mode) };
        if rc != sys::SUCCESS {
            log::warn!("cuThreadExchangeStreamCaptureMode: {}", describe(self.api, rc));
        }
    }
}
