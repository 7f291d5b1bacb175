//! The foreign layouts against installed headers: every field that the device or its callers use.
//!
//! Headers are looked for in `RDMA_CORE_INCLUDE`, else in `/usr/include` (package libibverbs-dev). rdma-core 44 or
//! newer has all that is checked here.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::PathBuf;
use std::process::Command;

use softefa::abi::efadv::*;
use softefa::abi::verbs::*;

macro_rules! fields {
    ($out:ident, $type:ident, $($rust:ident = $c:literal),* $(,)?) => {
        $(writeln!(
            $out,
            "_Static_assert(offsetof(struct {0}, {1}) == {2}, \"{0}.{1}\");",
            stringify!($type), $c, offset_of!($type, $rust)
        ).expect("string");)*
    };
}

fn assertions() -> String {
    let mut c = String::new();
    objects(&mut c);
    queues(&mut c);
    extended_context(&mut c);
    c
}

#[rustfmt::skip]
fn objects(c: &mut String) {
    c.push_str("#include <stddef.h>\n#include <infiniband/verbs.h>\n#include <infiniband/efadv.h>\n");
    fields!(c, ibv_device, node_type = "node_type", name = "name", dev_name = "dev_name", dev_path = "dev_path",
        ibdev_path = "ibdev_path");
    fields!(c, ibv_context_ops, poll_cq = "poll_cq", req_notify_cq = "req_notify_cq", post_send = "post_send",
        post_srq_recv = "post_srq_recv", post_recv = "post_recv");
    fields!(c, ibv_context, device = "device", ops = "ops", cmd_fd = "cmd_fd", async_fd = "async_fd",
        num_comp_vectors = "num_comp_vectors", mutex = "mutex", abi_compat = "abi_compat");
    fields!(c, ibv_device_attr, node_guid = "node_guid", max_mr_size = "max_mr_size", vendor_id = "vendor_id",
        vendor_part_id = "vendor_part_id", hw_ver = "hw_ver", max_qp = "max_qp", max_qp_wr = "max_qp_wr",
        max_sge = "max_sge", max_sge_rd = "max_sge_rd", max_cq = "max_cq", max_cqe = "max_cqe", max_mr = "max_mr",
        max_pd = "max_pd", atomic_cap = "atomic_cap", max_ah = "max_ah", max_pkeys = "max_pkeys",
        phys_port_cnt = "phys_port_cnt");
    fields!(c, ibv_port_attr, state = "state", max_msg_sz = "max_msg_sz", pkey_tbl_len = "pkey_tbl_len", lmc = "lmc",
        active_width = "active_width", active_speed = "active_speed", phys_state = "phys_state",
        link_layer = "link_layer", port_cap_flags2 = "port_cap_flags2");
    fields!(c, ibv_pd, context = "context", handle = "handle");
    fields!(c, ibv_mr, pd = "pd", addr = "addr", length = "length", lkey = "lkey", rkey = "rkey");
    fields!(c, ibv_ah, pd = "pd", handle = "handle");
    fields!(c, ibv_ah_attr, dgid = "grh.dgid", flow_label = "grh.flow_label", dlid = "dlid", port_num = "port_num");
}

#[rustfmt::skip]
fn queues(c: &mut String) {
    fields!(c, ibv_qp_init_attr_ex, send_cq = "send_cq", recv_cq = "recv_cq", cap = "cap", qp_type = "qp_type",
        sq_sig_all = "sq_sig_all", comp_mask = "comp_mask", pd = "pd");
    fields!(c, ibv_qp_attr, qp_state = "qp_state", qkey = "qkey", cap = "cap", ah_attr = "ah_attr",
        pkey_index = "pkey_index", port_num = "port_num", rnr_retry = "rnr_retry");
    fields!(c, ibv_qp, pd = "pd", send_cq = "send_cq", recv_cq = "recv_cq", qp_num = "qp_num", state = "state",
        qp_type = "qp_type", mutex = "mutex", events_completed = "events_completed");
    fields!(c, ibv_qp_ex, comp_mask = "comp_mask", wr_id = "wr_id", wr_flags = "wr_flags",
        wr_rdma_read = "wr_rdma_read", wr_rdma_write = "wr_rdma_write", wr_rdma_write_imm = "wr_rdma_write_imm",
        wr_send = "wr_send", wr_send_imm = "wr_send_imm", wr_set_ud_addr = "wr_set_ud_addr",
        wr_set_inline_data = "wr_set_inline_data", wr_set_inline_data_list = "wr_set_inline_data_list",
        wr_set_sge = "wr_set_sge", wr_set_sge_list = "wr_set_sge_list", wr_start = "wr_start",
        wr_complete = "wr_complete", wr_abort = "wr_abort");
    fields!(c, ibv_sge, addr = "addr", length = "length", lkey = "lkey");
    fields!(c, ibv_data_buf, addr = "addr", length = "length");
    fields!(c, ibv_recv_wr, wr_id = "wr_id", next = "next", sg_list = "sg_list", num_sge = "num_sge");
    fields!(c, ibv_comp_channel, context = "context", fd = "fd", refcnt = "refcnt");
    fields!(c, ibv_cq, channel = "channel", cq_context = "cq_context", cqe = "cqe", mutex = "mutex",
        comp_events_completed = "comp_events_completed");
    fields!(c, ibv_cq_ex, comp_mask = "comp_mask", status = "status", wr_id = "wr_id", start_poll = "start_poll",
        next_poll = "next_poll", end_poll = "end_poll", read_opcode = "read_opcode",
        read_vendor_err = "read_vendor_err", read_byte_len = "read_byte_len", read_imm_data = "read_imm_data",
        read_qp_num = "read_qp_num", read_src_qp = "read_src_qp", read_wc_flags = "read_wc_flags",
        read_slid = "read_slid", read_sl = "read_sl", read_dlid_path_bits = "read_dlid_path_bits");
    fields!(c, ibv_cq_init_attr_ex, cq_context = "cq_context", channel = "channel", comp_vector = "comp_vector",
        wc_flags = "wc_flags", comp_mask = "comp_mask", flags = "flags");
    fields!(c, efadv_device_attr, max_sq_wr = "max_sq_wr", max_rq_wr = "max_rq_wr", max_sq_sge = "max_sq_sge",
        inline_buf_size = "inline_buf_size", device_caps = "device_caps", max_rdma_size = "max_rdma_size");
    fields!(c, efadv_ah_attr, ahn = "ahn");
    fields!(c, efadv_cq, wc_read_sgid = "wc_read_sgid");
}

/// The extended context is reached from its end.
fn extended_context(c: &mut String) {
    for (field, from_end) in [
        ("query_port", size_of::<verbs_context>() - offset_of!(verbs_context, query_port)),
        ("create_cq_ex", size_of::<verbs_context>() - offset_of!(verbs_context, create_cq_ex)),
        ("query_device_ex", size_of::<verbs_context>() - offset_of!(verbs_context, query_device_ex)),
        ("create_qp_ex", size_of::<verbs_context>() - offset_of!(verbs_context, create_qp_ex)),
        ("sz", size_of::<verbs_context>() - offset_of!(verbs_context, sz)),
        ("context", size_of::<verbs_context>() - offset_of!(verbs_context, context)),
    ] {
        writeln!(
            c,
            "_Static_assert(sizeof(struct verbs_context) - offsetof(struct verbs_context, {field}) == {from_end}, \
             \"verbs_context.{field}\");"
        )
        .expect("string");
    }
}

fn include_dir() -> Option<PathBuf> {
    let dir =
        std::env::var_os("RDMA_CORE_INCLUDE").map_or_else(|| PathBuf::from("/usr/include"), PathBuf::from);
    dir.join("infiniband/efadv.h").exists().then_some(dir)
}

#[test]
fn foreign_layouts_match_the_headers() {
    let Some(include) = include_dir() else {
        eprintln!("skipped: no infiniband/efadv.h (install libibverbs-dev or set RDMA_CORE_INCLUDE)");
        return;
    };
    let source = std::env::temp_dir().join(format!("softefa-layout-{}.c", std::process::id()));
    std::fs::write(&source, assertions()).expect("write the C file");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-fsyntax-only", "-I"])
        .arg(&include)
        .arg(&source)
        .output()
        .expect("run cc");
    std::fs::remove_file(&source).expect("remove the C file");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
