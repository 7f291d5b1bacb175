//! Our declarations of hwloc's structures against the header of the machine, where there is one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use nixl_libfabric::sys::hwloc::{RawBridge, RawDistances, RawObj, RawPci};

const HEADER: &str = "/usr/include/hwloc.h";

/// C expressions, and what they must be worth.
fn wanted() -> BTreeMap<String, usize> {
    let mut wanted = BTreeMap::new();
    let mut add =
        |expression: &str, value: usize| assert!(wanted.insert(expression.to_owned(), value).is_none());
    macro_rules! offsets {
        ($raw:ty, $name:literal: $($member:ident = $c:literal),+ $(,)?) => {
            $(add(concat!("offsetof(", $name, ", ", $c, ")"), offset_of!($raw, $member));)+
        };
    }
    offsets!(RawObj, "struct hwloc_obj":
        kind = "type", subtype = "subtype", os_index = "os_index", name = "name", total_memory = "total_memory",
        attr = "attr", depth = "depth", logical_index = "logical_index", next_cousin = "next_cousin",
        prev_cousin = "prev_cousin", parent = "parent", sibling_rank = "sibling_rank",
        next_sibling = "next_sibling", prev_sibling = "prev_sibling", arity = "arity", children = "children",
        first_child = "first_child", last_child = "last_child", symmetric_subtree = "symmetric_subtree",
        memory_arity = "memory_arity", memory_first_child = "memory_first_child", io_arity = "io_arity",
        io_first_child = "io_first_child", misc_arity = "misc_arity", misc_first_child = "misc_first_child",
        cpuset = "cpuset", complete_cpuset = "complete_cpuset", nodeset = "nodeset");
    offsets!(RawPci, "struct hwloc_pcidev_attr_s":
        domain = "domain", bus = "bus", dev = "dev", func = "func", class_id = "class_id",
        vendor_id = "vendor_id", device_id = "device_id", subvendor_id = "subvendor_id",
        subdevice_id = "subdevice_id", revision = "revision", linkspeed = "linkspeed");
    offsets!(RawBridge, "struct hwloc_bridge_attr_s":
        upstream = "upstream", upstream_type = "upstream_type", downstream_domain = "downstream.pci.domain",
        downstream_secondary_bus = "downstream.pci.secondary_bus",
        downstream_subordinate_bus = "downstream.pci.subordinate_bus", downstream_type = "downstream_type",
        depth = "depth");
    offsets!(RawDistances, "struct hwloc_distances_s":
        nbobjs = "nbobjs", objs = "objs", kind = "kind", values = "values");
    add("sizeof(struct hwloc_pcidev_attr_s)", size_of::<RawPci>());
    add("sizeof(struct hwloc_bridge_attr_s)", size_of::<RawBridge>());
    add("sizeof(struct hwloc_distances_s)", size_of::<RawDistances>());
    // The values that src/sys/hwloc.rs takes for granted.
    for (name, value) in [
        ("HWLOC_OBJ_NUMANODE", 13),
        ("HWLOC_OBJ_BRIDGE", 14),
        ("HWLOC_OBJ_PCI_DEVICE", 15),
        ("HWLOC_OBJ_OS_DEVICE", 16),
        ("-HWLOC_TYPE_DEPTH_NUMANODE", 3),
        ("-HWLOC_TYPE_DEPTH_PCI_DEVICE", 5),
        ("HWLOC_TYPE_FILTER_KEEP_ALL", 0),
        ("HWLOC_TYPE_FILTER_KEEP_NONE", 1),
        ("HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST", 1),
        ("HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED", 1),
        ("HWLOC_OBJ_BRIDGE_PCI", 1),
        ("HWLOC_OBJ_OSDEV_NETWORK", 2),
        ("HWLOC_OBJ_OSDEV_OPENFABRICS", 3),
    ] {
        add(name, value);
    }
    wanted
}

#[test]
fn layouts_are_those_of_the_header() {
    if !Path::new(HEADER).exists() {
        eprintln!("skipped: {HEADER} is not installed (libhwloc-dev)");
        return;
    }
    let folder = std::env::temp_dir().join(format!("nixl-libfabric-hwloc-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (source, program) = (folder.join("layout.c"), folder.join("layout"));
    let wanted = wanted();
    let mut text =
        "#include <hwloc.h>\n#include <hwloc/distances.h>\n#include <stddef.h>\n#include <stdio.h>\n\
                    int main(void) {\n"
            .to_owned();
    writeln!(text, "  if (HWLOC_API_VERSION >> 16 != 2) return 77;").unwrap();
    for expression in wanted.keys() {
        writeln!(text, "  printf(\"%s=%zu\\n\", \"{expression}\", (size_t)({expression}));").unwrap();
    }
    text.push_str("  return 0;\n}\n");
    fs::write(&source, text).unwrap();
    let Ok(compiler) = Command::new("cc").arg("-o").args([&program, &source]).status() else {
        eprintln!("skipped: there is no C compiler");
        return;
    };
    assert!(compiler.success(), "the header's members have other names");
    let output = Command::new(&program).output().unwrap();
    fs::remove_dir_all(&folder).unwrap();
    if output.status.code() == Some(77) {
        eprintln!("skipped: {HEADER} is not hwloc 2");
        return;
    }
    let found: BTreeMap<String, usize> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            let (expression, value) = line.split_once('=').unwrap();
            (expression.to_owned(), value.parse().unwrap())
        })
        .collect();
    assert_eq!(found, wanted);
}
