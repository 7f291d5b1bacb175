//! Structures of rdma/*.h. Members that we never call are plain pointers.

use std::ffi::{c_char, c_int, c_void};

use super::Layout;

/// Declares `repr(C)` structures and the table by which the layout test finds them.
/// A trailing underscore stands for a C name that is a Rust keyword; `tail` is not in C.
macro_rules! structures {
    ($table:ident: $($(#[$meta:meta])* struct $name:ident { $($field:ident: $kind:ty,)* })*) => {
        $($(#[$meta])* #[repr(C)] #[derive(Debug)] pub struct $name { $(pub $field: $kind,)* })*

        /// Structures and their layouts.
        pub const $table: &[Layout] = &[$(Layout {
            name: stringify!($name),
            size: size_of::<$name>(),
            fields: &[$((stringify!($field), std::mem::offset_of!($name, $field))),*],
        }),*];
    };
}

/// A member that is never called.
type unused = *const c_void;

pub type fi_addr_t = u64;

/// Room for members that later releases append to a structure that we hand in or that is filled for us.
pub type tail = [u64; 8];

structures! { LAYOUTS:
    // What fi_getinfo takes and gives.

    struct fi_tx_attr {
        caps: u64,
        mode: u64,
        op_flags: u64,
        msg_order: u64,
        comp_order: u64,
        inject_size: usize,
        size: usize,
        iov_limit: usize,
        rma_iov_limit: usize,
        tclass: u32,
    }

    struct fi_rx_attr {
        caps: u64,
        mode: u64,
        op_flags: u64,
        msg_order: u64,
        comp_order: u64,
        total_buffered_recv: usize,
        size: usize,
        iov_limit: usize,
    }

    struct fi_ep_attr {
        type_: c_int,
        protocol: u32,
        protocol_version: u32,
        max_msg_size: usize,
        msg_prefix_size: usize,
        max_order_raw_size: usize,
        max_order_war_size: usize,
        max_order_waw_size: usize,
        mem_tag_format: u64,
        tx_ctx_cnt: usize,
        rx_ctx_cnt: usize,
        auth_key_size: usize,
        auth_key: *mut u8,
        tail: tail,
    }

    struct fi_domain_attr {
        domain: *mut fid_domain,
        name: *mut c_char,
        threading: c_int,
        control_progress: c_int,
        data_progress: c_int,
        resource_mgmt: c_int,
        av_type: c_int,
        mr_mode: c_int,
        mr_key_size: usize,
        cq_data_size: usize,
        cq_cnt: usize,
        ep_cnt: usize,
        tx_ctx_cnt: usize,
        rx_ctx_cnt: usize,
        max_ep_tx_ctx: usize,
        max_ep_rx_ctx: usize,
        max_ep_stx_ctx: usize,
        max_ep_srx_ctx: usize,
        cntr_cnt: usize,
        mr_iov_limit: usize,
        caps: u64,
        mode: u64,
        auth_key: *mut u8,
        auth_key_size: usize,
        max_err_data: usize,
        mr_cnt: usize,
        tclass: u32,
        tail: tail,
    }

    struct fi_fabric_attr {
        fabric: *mut fid_fabric,
        name: *mut c_char,
        prov_name: *mut c_char,
        prov_version: u32,
        api_version: u32,
    }

    struct fi_info {
        next: *mut fi_info,
        caps: u64,
        mode: u64,
        addr_format: u32,
        src_addrlen: usize,
        dest_addrlen: usize,
        src_addr: *mut c_void,
        dest_addr: *mut c_void,
        handle: *mut fid,
        tx_attr: *mut fi_tx_attr,
        rx_attr: *mut fi_rx_attr,
        ep_attr: *mut fi_ep_attr,
        domain_attr: *mut fi_domain_attr,
        fabric_attr: *mut fi_fabric_attr,
        nic: *mut fid_nic,
    }

    struct fi_device_attr {
        name: *mut c_char,
        device_id: *mut c_char,
        device_version: *mut c_char,
        vendor_id: *mut c_char,
        driver: *mut c_char,
        firmware: *mut c_char,
    }

    struct fi_pci_attr {
        domain_id: u16,
        bus_id: u8,
        device_id: u8,
        function_id: u8,
    }

    /// `attr` is a union whose only member is `pci`.
    struct fi_bus_attr {
        bus_type: c_int,
        attr: fi_pci_attr,
    }

    struct fi_link_attr {
        address: *mut c_char,
        mtu: usize,
        speed: usize,
        state: c_int,
        network_type: *mut c_char,
    }

    struct fid_nic {
        fid: fid,
        device_attr: *mut fi_device_attr,
        bus_attr: *mut fi_bus_attr,
        link_attr: *mut fi_link_attr,
        prov_attr: *mut c_void,
    }

    // Objects and their tables.

    struct fi_ops {
        size: usize,
        close: Option<unsafe extern "C" fn(fid: *mut fid) -> c_int>,
        bind: Option<unsafe extern "C" fn(fid: *mut fid, bfid: *mut fid, flags: u64) -> c_int>,
        control: Option<unsafe extern "C" fn(fid: *mut fid, command: c_int, arg: *mut c_void) -> c_int>,
        ops_open: unused,
        tostr: unused,
        ops_set: unused,
    }

    struct fid {
        fclass: usize,
        context: *mut c_void,
        ops: *mut fi_ops,
    }

    struct fi_ops_fabric {
        size: usize,
        domain: Option<
            unsafe extern "C" fn(
                fabric: *mut fid_fabric,
                info: *mut fi_info,
                dom: *mut *mut fid_domain,
                context: *mut c_void,
            ) -> c_int,
        >,
        passive_ep: unused,
        eq_open: Option<
            unsafe extern "C" fn(
                fabric: *mut fid_fabric,
                attr: *mut fi_eq_attr,
                eq: *mut *mut fid_eq,
                context: *mut c_void,
            ) -> c_int,
        >,
        wait_open: unused,
        trywait: Option<
            unsafe extern "C" fn(fabric: *mut fid_fabric, fids: *mut *mut fid, count: c_int) -> c_int,
        >,
        domain2: unused,
    }

    struct fid_fabric {
        fid: fid,
        ops: *mut fi_ops_fabric,
        api_version: u32,
    }

    struct fi_ops_domain {
        size: usize,
        av_open: Option<
            unsafe extern "C" fn(
                domain: *mut fid_domain,
                attr: *mut fi_av_attr,
                av: *mut *mut fid_av,
                context: *mut c_void,
            ) -> c_int,
        >,
        cq_open: Option<
            unsafe extern "C" fn(
                domain: *mut fid_domain,
                attr: *mut fi_cq_attr,
                cq: *mut *mut fid_cq,
                context: *mut c_void,
            ) -> c_int,
        >,
        endpoint: Option<
            unsafe extern "C" fn(
                domain: *mut fid_domain,
                info: *mut fi_info,
                ep: *mut *mut fid_ep,
                context: *mut c_void,
            ) -> c_int,
        >,
        scalable_ep: unused,
        cntr_open: unused,
        poll_open: unused,
        stx_ctx: unused,
        srx_ctx: unused,
        query_atomic: unused,
        query_collective: unused,
        endpoint2: unused,
    }

    struct fi_ops_mr {
        size: usize,
        reg: unused,
        regv: unused,
        regattr: Option<
            unsafe extern "C" fn(
                fid: *mut fid,
                attr: *const fi_mr_attr,
                flags: u64,
                mr: *mut *mut fid_mr,
            ) -> c_int,
        >,
    }

    struct fid_domain {
        fid: fid,
        ops: *mut fi_ops_domain,
        mr: *mut fi_ops_mr,
    }

    struct fid_mr {
        fid: fid,
        mem_desc: *mut c_void,
        key: u64,
    }

    struct fi_ops_av {
        size: usize,
        insert: Option<
            unsafe extern "C" fn(
                av: *mut fid_av,
                addr: *const c_void,
                count: usize,
                fi_addr: *mut fi_addr_t,
                flags: u64,
                context: *mut c_void,
            ) -> c_int,
        >,
        insertsvc: unused,
        insertsym: unused,
        remove: Option<
            unsafe extern "C" fn(
                av: *mut fid_av,
                fi_addr: *mut fi_addr_t,
                count: usize,
                flags: u64,
            ) -> c_int,
        >,
        lookup: unused,
        straddr: unused,
        av_set: unused,
    }

    struct fid_av {
        fid: fid,
        ops: *mut fi_ops_av,
    }

    struct fi_ops_cq {
        size: usize,
        read: Option<unsafe extern "C" fn(cq: *mut fid_cq, buf: *mut c_void, count: usize) -> isize>,
        readfrom: unused,
        readerr: Option<
            unsafe extern "C" fn(cq: *mut fid_cq, buf: *mut fi_cq_err_entry, flags: u64) -> isize,
        >,
        sread: unused,
        sreadfrom: unused,
        signal: unused,
        strerror: Option<
            unsafe extern "C" fn(
                cq: *mut fid_cq,
                prov_errno: c_int,
                err_data: *const c_void,
                buf: *mut c_char,
                len: usize,
            ) -> *const c_char,
        >,
    }

    struct fid_cq {
        fid: fid,
        ops: *mut fi_ops_cq,
    }

    struct fi_ops_eq {
        size: usize,
        read: Option<
            unsafe extern "C" fn(
                eq: *mut fid_eq,
                event: *mut u32,
                buf: *mut c_void,
                len: usize,
                flags: u64,
            ) -> isize,
        >,
        readerr: Option<
            unsafe extern "C" fn(eq: *mut fid_eq, buf: *mut fi_eq_err_entry, flags: u64) -> isize,
        >,
        write: unused,
        sread: unused,
        strerror: Option<
            unsafe extern "C" fn(
                eq: *mut fid_eq,
                prov_errno: c_int,
                err_data: *const c_void,
                buf: *mut c_char,
                len: usize,
            ) -> *const c_char,
        >,
    }

    struct fid_eq {
        fid: fid,
        ops: *mut fi_ops_eq,
    }

    struct fi_ops_ep {
        size: usize,
        cancel: Option<unsafe extern "C" fn(fid: *mut fid, context: *mut c_void) -> isize>,
        getopt: Option<
            unsafe extern "C" fn(
                fid: *mut fid,
                level: c_int,
                optname: c_int,
                optval: *mut c_void,
                optlen: *mut usize,
            ) -> c_int,
        >,
        setopt: Option<
            unsafe extern "C" fn(
                fid: *mut fid,
                level: c_int,
                optname: c_int,
                optval: *const c_void,
                optlen: usize,
            ) -> c_int,
        >,
        tx_ctx: unused,
        rx_ctx: unused,
        rx_size_left: unused,
        tx_size_left: unused,
    }

    struct fi_ops_cm {
        size: usize,
        setname: unused,
        getname: Option<unsafe extern "C" fn(fid: *mut fid, addr: *mut c_void, addrlen: *mut usize) -> c_int>,
        getpeer: unused,
        connect: unused,
        listen: unused,
        accept: unused,
        reject: unused,
        shutdown: unused,
        join: unused,
    }

    struct fi_ops_msg {
        size: usize,
        recv: unused,
        recvv: unused,
        recvmsg: Option<unsafe extern "C" fn(ep: *mut fid_ep, msg: *const fi_msg, flags: u64) -> isize>,
        send: unused,
        sendv: unused,
        sendmsg: Option<unsafe extern "C" fn(ep: *mut fid_ep, msg: *const fi_msg, flags: u64) -> isize>,
        inject: unused,
        senddata: unused,
        injectdata: unused,
    }

    struct fi_ops_rma {
        size: usize,
        read: unused,
        readv: unused,
        readmsg: Option<unsafe extern "C" fn(ep: *mut fid_ep, msg: *const fi_msg_rma, flags: u64) -> isize>,
        write: unused,
        writev: unused,
        writemsg: Option<unsafe extern "C" fn(ep: *mut fid_ep, msg: *const fi_msg_rma, flags: u64) -> isize>,
        inject: unused,
        writedata: unused,
        injectdata: unused,
    }

    struct fid_ep {
        fid: fid,
        ops: *mut fi_ops_ep,
        cm: *mut fi_ops_cm,
        msg: *mut fi_ops_msg,
        rma: *mut fi_ops_rma,
        tagged: unused,
        atomic: unused,
        collective: unused,
    }

    // What we hand in.

    struct fi_av_attr {
        type_: c_int,
        rx_ctx_bits: c_int,
        count: usize,
        ep_per_node: usize,
        name: *const c_char,
        map_addr: *mut c_void,
        flags: u64,
        tail: tail,
    }

    struct fi_cq_attr {
        size: usize,
        flags: u64,
        format: c_int,
        wait_obj: c_int,
        signaling_vector: c_int,
        wait_cond: c_int,
        wait_set: *mut c_void,
        tail: tail,
    }

    struct fi_eq_attr {
        size: usize,
        flags: u64,
        wait_obj: c_int,
        signaling_vector: c_int,
        wait_set: *mut c_void,
        tail: tail,
    }

    /// `mr_iov` points to a `fi_mr_dmabuf` instead when FI_MR_DMABUF is given; `device` is a union of an index (int)
    /// and 64 reserved bits. The tail covers what 1.19 and later append.
    struct fi_mr_attr {
        mr_iov: *const c_void,
        iov_count: usize,
        access: u64,
        offset: u64,
        requested_key: u64,
        context: *mut c_void,
        auth_key_size: usize,
        auth_key: *mut u8,
        iface: c_int,
        device: u64,
        tail: tail,
    }

    struct fi_rma_iov {
        addr: u64,
        len: usize,
        key: u64,
    }

    struct fi_msg {
        msg_iov: *const libc::iovec,
        desc: *mut *mut c_void,
        iov_count: usize,
        addr: fi_addr_t,
        context: *mut c_void,
        data: u64,
    }

    struct fi_msg_rma {
        msg_iov: *const libc::iovec,
        desc: *mut *mut c_void,
        iov_count: usize,
        addr: fi_addr_t,
        rma_iov: *const fi_rma_iov,
        rma_iov_count: usize,
        context: *mut c_void,
        data: u64,
    }

    /// Scratch space that the provider owns while an operation is in flight (mode bit FI_CONTEXT2).
    struct fi_context2 {
        internal: [*mut c_void; 8],
    }

    // What is filled for us.

    struct fi_cq_data_entry {
        op_context: *mut c_void,
        flags: u64,
        len: usize,
        buf: *mut c_void,
        data: u64,
    }

    /// The tail covers `src_addr`, which came with 1.20.
    struct fi_cq_err_entry {
        op_context: *mut c_void,
        flags: u64,
        len: usize,
        buf: *mut c_void,
        data: u64,
        tag: u64,
        olen: usize,
        err: c_int,
        prov_errno: c_int,
        err_data: *mut c_void,
        err_data_size: usize,
        tail: tail,
    }

    struct fi_eq_err_entry {
        fid: *mut fid,
        context: *mut c_void,
        data: u64,
        err: c_int,
        prov_errno: c_int,
        err_data: *mut c_void,
        err_data_size: usize,
        tail: tail,
    }
}

structures! { LAYOUTS_AFTER_1_17:
    /// What `fi_mr_attr.mr_iov` points to under FI_MR_DMABUF (1.20).
    struct fi_mr_dmabuf {
        fd: c_int,
        offset: u64,
        len: usize,
        base_addr: *mut c_void,
    }
}
