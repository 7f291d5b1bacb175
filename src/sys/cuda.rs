//! The part of the CUDA driver API that this plugin uses, resolved at run time from `libcuda.so.1`.
//!
//! Names, values and prototypes are those of the public `cuda.h` (12.9); `tests/cuda_header.rs` compares them with a
//! header where one is installed. Symbols carry the version suffix to which `cuda.h` maps the plain name.
//! The driver API alone is used: libcudart would bring a second notion of the current device.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;

use super::dl::Library;

/// `CUresult`.
pub type CUresult = c_uint;
/// `CUdevice`: the driver's handle of a device.
pub type CUdevice = c_int;
/// `CUdeviceptr`: an address in the unified address space.
pub type CUdeviceptr = u64;

/// Declares opaque driver handles. They are pointers in C, never dereferenced here, and valid on any thread;
/// as integers of the same size and register class they are passed the same way on 64-bit Linux.
macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[repr(transparent)]
        pub struct $name(pub usize);

        impl $name {
            /// C's NULL.
            pub const NULL: Self = Self(0);

            /// Whether this is NULL.
            pub fn is_null(self) -> bool {
                self == Self::NULL
            }
        }
    )*};
}

handles! {
    /// `CUcontext`.
    CUcontext;
    /// `CUstream`.
    CUstream;
    /// `CUevent`.
    CUevent;
    /// `CUmemGenericAllocationHandle` (an `unsigned long long` in C).
    CUmemHandle;
    /// `CUmodule`.
    CUmodule;
    /// `CUfunction`.
    CUfunction;
}

/// `CUipcMemHandle`: passed by value, and a secret of the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct CUipcMemHandle {
    /// The driver's.
    pub reserved: [u8; IPC_HANDLE_BYTES],
}

/// `CU_IPC_HANDLE_SIZE`.
pub const IPC_HANDLE_BYTES: usize = 64;

/// Declares the numbers of `cuda.h` that are used, and a list of them for the comparison with the header.
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident = $c:ident : $value:expr;)*) => {
        $($(#[$doc])* pub const $name: c_uint = $value;)*

        /// Each constant: its name in `cuda.h` and our value.
        pub const CONSTANTS: &[(&str, c_uint)] = &[$((stringify!($c), $name)),*];
    };
}

constants! {
    /// The call succeeded.
    SUCCESS = CUDA_SUCCESS: 0;
    /// A parameter is wrong, or the driver is too old to know it.
    ERROR_INVALID_VALUE = CUDA_ERROR_INVALID_VALUE: 1;
    /// The driver is being shut down: the process exits.
    ERROR_DEINITIALIZED = CUDA_ERROR_DEINITIALIZED: 4;
    /// The library is the toolkit's link-time stub.
    ERROR_STUB_LIBRARY = CUDA_ERROR_STUB_LIBRARY: 34;
    /// No device.
    ERROR_NO_DEVICE = CUDA_ERROR_NO_DEVICE: 100;
    /// The call needs a current context, or got one that is gone.
    ERROR_INVALID_CONTEXT = CUDA_ERROR_INVALID_CONTEXT: 201;
    /// Not found.
    ERROR_NOT_FOUND = CUDA_ERROR_NOT_FOUND: 500;
    /// Work queued earlier is not done.
    ERROR_NOT_READY = CUDA_ERROR_NOT_READY: 600;
    /// This device or driver cannot do it.
    ERROR_NOT_SUPPORTED = CUDA_ERROR_NOT_SUPPORTED: 801;
    /// User space and kernel driver differ in version.
    ERROR_SYSTEM_DRIVER_MISMATCH = CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: 803;

    /// The context of an allocation; NULL for stream-ordered and VMM memory.
    POINTER_CONTEXT = CU_POINTER_ATTRIBUTE_CONTEXT: 1;
    /// One of the `MEMORYTYPE_` values; 0 where CUDA does not know the address.
    POINTER_MEMORY_TYPE = CU_POINTER_ATTRIBUTE_MEMORY_TYPE: 2;
    /// Synchronous copies on this memory really are synchronous.
    POINTER_SYNC_MEMOPS = CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: 6;
    /// A number of the allocation that the process never gives to another one.
    POINTER_BUFFER_ID = CU_POINTER_ATTRIBUTE_BUFFER_ID: 7;
    /// Whether the memory is managed.
    POINTER_IS_MANAGED = CU_POINTER_ATTRIBUTE_IS_MANAGED: 8;
    /// The ordinal of the device.
    POINTER_DEVICE_ORDINAL = CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: 9;
    /// Whether `cuIpcGetMemHandle` takes the allocation.
    POINTER_IS_LEGACY_IPC_CAPABLE = CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: 10;
    /// Whether GPU Direct RDMA takes the memory.
    POINTER_IS_GDR_CAPABLE = CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE: 15;
    /// The memory pool of the allocation, NULL where there is none.
    POINTER_MEMPOOL_HANDLE = CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: 17;
    /// Length in bytes of the mapping around the address.
    POINTER_MAPPING_SIZE = CU_POINTER_ATTRIBUTE_MAPPING_SIZE: 18;
    /// First address of the mapping around the address.
    POINTER_MAPPING_BASE = CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: 19;

    /// Host memory.
    MEMORYTYPE_HOST = CU_MEMORYTYPE_HOST: 1;
    /// Device memory.
    MEMORYTYPE_DEVICE = CU_MEMORYTYPE_DEVICE: 2;

    /// Whether the device supports GPU Direct RDMA.
    DEVICE_GDR_SUPPORTED = CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED: 116;
    /// Whether the device can export memory as dmabuf.
    DEVICE_DMA_BUF_SUPPORTED = CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: 124;

    /// The range handle is a dmabuf file descriptor.
    RANGE_HANDLE_DMA_BUF_FD = CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD: 1;
    /// Map the dmabuf through the BAR of the bus even where another path to the CPU exists (GB200).
    RANGE_FLAG_PCIE = CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE: 1;

    /// The physical memory of a VMM handle lies on a device.
    LOCATION_DEVICE = CU_MEM_LOCATION_TYPE_DEVICE: 1;
    /// A VMM handle that may be exported as a file descriptor.
    HANDLE_FILE = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR: 1;
    /// A device may read and write a mapping.
    ACCESS_READ_WRITE = CU_MEM_ACCESS_FLAGS_PROT_READWRITE: 3;
    /// Opening memory of another device enables access to that device.
    IPC_ENABLE_PEER = CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: 1;

    /// The stream does not synchronise with the legacy default stream.
    STREAM_NON_BLOCKING = CU_STREAM_NON_BLOCKING: 1;
    /// The event keeps no time.
    EVENT_DISABLE_TIMING = CU_EVENT_DISABLE_TIMING: 2;
    /// Page-locked memory is so in every context.
    MEMHOSTALLOC_PORTABLE = CU_MEMHOSTALLOC_PORTABLE: 1;
    /// This thread's calls do not disturb captures of other threads.
    CAPTURE_RELAXED = CU_STREAM_CAPTURE_MODE_RELAXED: 2;
}

/// `CUmemAllocationProp`: how a VMM handle was made.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CUmemAllocationProp {
    /// `CUmemAllocationType`.
    pub kind: c_uint,
    /// Bit mask of `CUmemAllocationHandleType`.
    pub handle_types: c_uint,
    /// `location.type`.
    pub location_type: c_uint,
    /// `location.id`: the device ordinal where the location is a device.
    pub location_id: c_int,
    /// Windows alone; 0.
    pub win32: usize,
    /// `allocFlags.compressionType`.
    pub compression: u8,
    /// `allocFlags.gpuDirectRDMACapable`.
    pub gdr_capable: u8,
    /// `allocFlags.usage`.
    pub usage: u16,
    /// Reserved.
    pub reserved: [u8; 4],
}

/// `CUmemLocation`: where memory is, or who uses it.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CUmemLocation {
    /// `CUmemLocationType`.
    pub kind: c_uint,
    /// The device ordinal where the location is a device.
    pub id: c_int,
}

/// `CUmemAccessDesc`: who may do what with a mapping.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CUmemAccessDesc {
    /// Who.
    pub location: CUmemLocation,
    /// `CUmemAccess_flags`.
    pub flags: c_uint,
}

/// Declares the table: each required entry is a function pointer, each optional one an `Option` of it.
macro_rules! table {
    (
        required { $($(#[$rdoc:meta])* fn $rname:ident = $rsym:literal ($($rarg:ty),*);)* }
        optional { $($(#[$odoc:meta])* fn $oname:ident = $osym:literal ($($oarg:ty),*);)* }
    ) => {
        /// The driver's entry points. Only [`Api::load`] makes one, so each pointer has the type that `cuda.h` gives it.
        pub struct Api {
            $($(#[$rdoc])* pub $rname: unsafe extern "C" fn($($rarg),*) -> CUresult,)*
            $($(#[$odoc])* pub $oname: Option<unsafe extern "C" fn($($oarg),*) -> CUresult>,)*
            library: Library,
        }

        impl Api {
            fn resolve(library: Library) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: cuda.h declares the symbols with these prototypes.
                    $($rname: unsafe { library.function($rsym) }.map_err(|why| format!("{why}: the driver is too old"))?,)*
                    // SAFETY: as above.
                    $($oname: unsafe { library.function($osym) }.ok(),)*
                    library,
                })
            }
        }

        /// The symbols looked up, for the comparison with `cuda.h`.
        pub const SYMBOLS: &[&CStr] = &[$($rsym,)* $($osym,)*];
    };
}

table! {
    required {
        /// Initialises the driver. Creates no context.
        fn init = c"cuInit"(c_uint);
        /// Driver version, `1000 * major + 10 * minor`.
        fn driver_get_version = c"cuDriverGetVersion"(*mut c_int);
        /// Symbolic name of a result.
        fn get_error_name = c"cuGetErrorName"(CUresult, *mut *const c_char);
        /// Description of a result.
        fn get_error_string = c"cuGetErrorString"(CUresult, *mut *const c_char);
        /// Number of devices visible to the process.
        fn device_get_count = c"cuDeviceGetCount"(*mut c_int);
        /// Handle of a device.
        fn device_get = c"cuDeviceGet"(*mut CUdevice, c_int);
        /// Attribute of a device.
        fn device_get_attribute = c"cuDeviceGetAttribute"(*mut c_int, c_uint, CUdevice);
        /// Name of a device.
        fn device_get_name = c"cuDeviceGetName"(*mut c_char, c_int, CUdevice);
        /// PCI address of a device as text.
        fn device_get_pci_bus_id = c"cuDeviceGetPCIBusId"(*mut c_char, c_int, CUdevice);
        /// Flags of the primary context, and whether it is active.
        fn primary_ctx_get_state = c"cuDevicePrimaryCtxGetState"(CUdevice, *mut c_uint, *mut c_int);
        /// Retains the primary context, and creates it where it is not active.
        fn primary_ctx_retain = c"cuDevicePrimaryCtxRetain"(*mut CUcontext, CUdevice);
        /// Releases the primary context.
        fn primary_ctx_release = c"cuDevicePrimaryCtxRelease_v2"(CUdevice);
        /// Pushes a context on this thread's stack.
        fn ctx_push_current = c"cuCtxPushCurrent_v2"(CUcontext);
        /// Pops the top of this thread's stack.
        fn ctx_pop_current = c"cuCtxPopCurrent_v2"(*mut CUcontext);
        /// The top of this thread's stack, or NULL.
        fn ctx_get_current = c"cuCtxGetCurrent"(*mut CUcontext);
        /// Replaces the top of this thread's stack.
        fn ctx_set_current = c"cuCtxSetCurrent"(CUcontext);
        /// Several attributes of a pointer; zeroes where CUDA does not know it.
        fn pointer_get_attributes = c"cuPointerGetAttributes"(c_uint, *mut c_uint, *mut *mut c_void, CUdeviceptr);
        /// One attribute of a pointer.
        fn pointer_get_attribute = c"cuPointerGetAttribute"(*mut c_void, c_uint, CUdeviceptr);
        /// Sets an attribute of a pointer.
        fn pointer_set_attribute = c"cuPointerSetAttribute"(*const c_void, c_uint, CUdeviceptr);
        /// Allocation around an address; of VMM memory, the part that one handle backs.
        fn mem_get_address_range = c"cuMemGetAddressRange_v2"(*mut CUdeviceptr, *mut usize, CUdeviceptr);
        /// Page-locked host memory.
        fn mem_host_alloc = c"cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
        /// Frees page-locked host memory.
        fn mem_free_host = c"cuMemFreeHost"(*mut c_void);
        /// Queues a copy between any two addresses of the unified address space.
        fn memcpy_async = c"cuMemcpyAsync"(CUdeviceptr, CUdeviceptr, usize, CUstream);
        /// Creates a stream.
        fn stream_create = c"cuStreamCreate"(*mut CUstream, c_uint);
        /// Whether all work of a stream is done.
        fn stream_query = c"cuStreamQuery"(CUstream);
        /// Destroys a stream; queued work goes on.
        fn stream_destroy = c"cuStreamDestroy_v2"(CUstream);
        /// Creates an event.
        fn event_create = c"cuEventCreate"(*mut CUevent, c_uint);
        /// Records what is queued on a stream.
        fn event_record = c"cuEventRecord"(CUevent, CUstream);
        /// Whether what was recorded is done.
        fn event_query = c"cuEventQuery"(CUevent);
        /// Destroys an event.
        fn event_destroy = c"cuEventDestroy_v2"(CUevent);
    }
    optional {
        /// Exports an address range (CUDA 11.7).
        fn mem_get_handle_for_address_range =
            c"cuMemGetHandleForAddressRange"(*mut c_void, CUdeviceptr, usize, c_uint, c_ulonglong);
        /// The VMM handle behind an address (CUDA 11.0).
        fn mem_retain_allocation_handle = c"cuMemRetainAllocationHandle"(*mut CUmemHandle, *mut c_void);
        /// How a VMM handle was made (CUDA 10.2).
        fn mem_get_allocation_properties =
            c"cuMemGetAllocationPropertiesFromHandle"(*mut CUmemAllocationProp, CUmemHandle);
        /// Releases a VMM handle (CUDA 10.2).
        fn mem_release = c"cuMemRelease"(CUmemHandle);
        /// What another process opens an allocation of `cuMemAlloc` with (CUDA 4.1).
        fn ipc_get_mem_handle = c"cuIpcGetMemHandle"(*mut CUipcMemHandle, CUdeviceptr);
        /// Maps what another process has got a handle of.
        fn ipc_open_mem_handle = c"cuIpcOpenMemHandle_v2"(*mut CUdeviceptr, CUipcMemHandle, c_uint);
        /// Ends such a mapping.
        fn ipc_close_mem_handle = c"cuIpcCloseMemHandle"(CUdeviceptr);
        /// A file descriptor, or another handle, of a VMM handle (CUDA 10.2), as are the next ones.
        fn mem_export = c"cuMemExportToShareableHandle"(*mut c_void, CUmemHandle, c_uint, c_ulonglong);
        /// A VMM handle of what another process has exported.
        fn mem_import = c"cuMemImportFromShareableHandle"(*mut CUmemHandle, *mut c_void, c_uint);
        /// Reserves addresses.
        fn mem_address_reserve = c"cuMemAddressReserve"(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        /// Gives them back.
        fn mem_address_free = c"cuMemAddressFree"(CUdeviceptr, usize);
        /// Maps a VMM handle at a reserved address.
        fn mem_map = c"cuMemMap"(CUdeviceptr, usize, usize, CUmemHandle, c_ulonglong);
        /// Ends mappings.
        fn mem_unmap = c"cuMemUnmap"(CUdeviceptr, usize);
        /// Says who may use a mapping.
        fn mem_set_access = c"cuMemSetAccess"(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
        /// What somebody may do with a mapping.
        fn mem_get_access = c"cuMemGetAccess"(*mut c_ulonglong, *const CUmemLocation, CUdeviceptr);
        /// Loads kernels into the current context; PTX is a string, and compiled here.
        fn module_load_data = c"cuModuleLoadData"(*mut CUmodule, *const c_void);
        /// A kernel by its name.
        fn module_get_function = c"cuModuleGetFunction"(*mut CUfunction, CUmodule, *const c_char);
        /// Unloads kernels.
        fn module_unload = c"cuModuleUnload"(CUmodule);
        /// Queues a kernel: grid, block, bytes of shared memory, stream, arguments.
        fn launch_kernel = c"cuLaunchKernel"(
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
        );
        /// Swaps this thread's stream capture mode (CUDA 10.1).
        fn thread_exchange_capture_mode = c"cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    }
}

impl Api {
    /// Loads `path`, or without one `libcuda.so.1`: the copy already in the process if there is one.
    ///
    /// The error is a sentence: the loader's reason, or the entry point that is missing.
    pub fn load(path: Option<&Path>) -> Result<Self, String> {
        Self::resolve(Library::load(path.unwrap_or(Path::new("libcuda.so.1")))?)
    }

    /// Name or path the library was opened by.
    pub fn library_name(&self) -> &str {
        self.library.origin()
    }
}
