//! Values of rdma/*.h.

use std::ffi::c_int;

/// Declares constants and the table by which the layout test finds them.
macro_rules! constants {
    ($(#[$meta:meta])* $table:ident: $($name:ident: $kind:ty = $value:expr;)*) => {
        $(pub const $name: $kind = $value;)*
        $(#[$meta])*
        pub const $table: &[(&str, u64)] = &[$((stringify!($name), $name as u64)),*];
    };
}

constants! {
    /// Constants that every supported release has, with their values.
    CONSTANTS:

    // Capabilities and operation flags.
    FI_MSG: u64 = 1 << 1;
    FI_RMA: u64 = 1 << 2;
    FI_READ: u64 = 1 << 8;
    FI_WRITE: u64 = 1 << 9;
    FI_RECV: u64 = 1 << 10;
    FI_SEND: u64 = 1 << 11;
    FI_TRANSMIT: u64 = FI_SEND;
    FI_REMOTE_READ: u64 = 1 << 12;
    FI_REMOTE_WRITE: u64 = 1 << 13;
    FI_REMOTE_CQ_DATA: u64 = 1 << 17;
    FI_MORE: u64 = 1 << 18;
    FI_COMPLETION: u64 = 1 << 24;
    FI_TRANSMIT_COMPLETE: u64 = 1 << 27;
    FI_DELIVERY_COMPLETE: u64 = 1 << 28;
    FI_HMEM: u64 = 1 << 47;
    FI_LOCAL_COMM: u64 = 1 << 51;
    FI_REMOTE_COMM: u64 = 1 << 52;
    FI_HMEM_DEVICE_ONLY: u64 = 1 << 46;

    // Mode bits.
    FI_CONTEXT: u64 = 1 << 59;
    FI_CONTEXT2: u64 = 1 << 52;
    FI_RX_CQ_DATA: u64 = 1 << 56;

    // Address formats.
    FI_FORMAT_UNSPEC: u32 = 0;
    FI_SOCKADDR: u32 = 1;
    FI_SOCKADDR_IN: u32 = 2;
    FI_SOCKADDR_IN6: u32 = 3;
    FI_SOCKADDR_IB: u32 = 4;
    FI_ADDR_STR: u32 = 9;
    FI_ADDR_IB_UD: u32 = 11;
    FI_ADDR_EFA: u32 = 12;

    FI_ADDR_UNSPEC: u64 = u64::MAX;
    FI_ADDR_NOTAVAIL: u64 = u64::MAX;
    FI_KEY_NOTAVAIL: u64 = u64::MAX;

    FI_AV_UNSPEC: c_int = 0;
    FI_AV_MAP: c_int = 1;
    FI_AV_TABLE: c_int = 2;

    FI_MR_LOCAL: c_int = 1 << 2;
    FI_MR_VIRT_ADDR: c_int = 1 << 4;
    FI_MR_ALLOCATED: c_int = 1 << 5;
    FI_MR_PROV_KEY: c_int = 1 << 6;
    FI_MR_ENDPOINT: c_int = 1 << 9;
    FI_MR_HMEM: c_int = 1 << 10;

    FI_PROGRESS_UNSPEC: c_int = 0;
    FI_PROGRESS_MANUAL: c_int = 2;

    FI_THREAD_UNSPEC: c_int = 0;
    FI_THREAD_SAFE: c_int = 1;
    FI_THREAD_FID: c_int = 2;
    FI_THREAD_DOMAIN: c_int = 3;
    FI_THREAD_COMPLETION: c_int = 4;

    FI_RM_UNSPEC: c_int = 0;
    FI_RM_ENABLED: c_int = 2;

    FI_ORDER_WAW: u64 = 1 << 4;
    FI_ORDER_RMA_WAW: u64 = 1 << 35;

    FI_EP_RDM: c_int = 3;
    FI_BUS_PCI: c_int = 1;

    FI_HMEM_SYSTEM: c_int = 0;
    FI_HMEM_CUDA: c_int = 1;
    FI_HMEM_NEURON: c_int = 4;

    // Control commands.
    FI_GETWAIT: c_int = 5;
    FI_ENABLE: c_int = 6;

    FI_WAIT_NONE: c_int = 0;
    FI_WAIT_FD: c_int = 3;
    FI_CQ_FORMAT_DATA: c_int = 3;
    FI_CQ_COND_NONE: c_int = 0;

    // Endpoint options.
    FI_OPT_ENDPOINT: c_int = 0;
    FI_OPT_FI_HMEM_P2P: c_int = 8;
    FI_HMEM_P2P_REQUIRED: c_int = 1;
    FI_OPT_EFA_RNR_RETRY: c_int = -(0xefa << 16);

    // Errors of libfabric's own; below 256 they are errno values.
    FI_EOTHER: c_int = 256;
    FI_ETOOSMALL: c_int = 257;
    FI_EOPBADSTATE: c_int = 258;
    FI_EAVAIL: c_int = 259;
    FI_EBADFLAGS: c_int = 260;
    FI_ENOEQ: c_int = 261;
    FI_EDOMAIN: c_int = 262;
    FI_ENOCQ: c_int = 263;
    FI_ECRC: c_int = 264;
    FI_ETRUNC: c_int = 265;
    FI_ENOKEY: c_int = 266;
    FI_ENOAV: c_int = 267;
    FI_EOVERRUN: c_int = 268;
    FI_ENORX: c_int = 269;
}

// An older library answers that it does not know these, or is not asked.
constants! {
    /// Constants that came after 1.17 and that 2.0 has.
    CONSTANTS_OF_2_0:

    // 1.20: a dmabuf describes the memory to register.
    FI_MR_DMABUF: u64 = 1 << 40;
    FI_OPT_CUDA_API_PERMITTED: c_int = 10;
    // 1.18.
    FI_OPT_EFA_EMULATED_WRITE: c_int = FI_OPT_EFA_RNR_RETRY + 2;
}

constants! {
    /// Constants that came with 2.5.
    CONSTANTS_OF_2_5:

    FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV: c_int = FI_OPT_EFA_RNR_RETRY + 8;
}
