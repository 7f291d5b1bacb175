//! Compares what `sys::libfabric` declares with the C headers: every structure's size, every field's offset, every
//! constant's value.
//!
//! Needs a C compiler and libfabric's headers (Debian: libfabric-dev); `NIXL_TEST_LIBFABRIC_INCLUDE` names a directory
//! with those of another release. Without headers the test says so and passes.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use nixl_libfabric::sys::libfabric as sys;

/// Structures that end in a tail for members of later releases.
fn has_tail(layout: &sys::Layout) -> bool {
    layout.fields.iter().any(|(field, _)| *field == "tail")
}

/// C's name of a field; `None` for what C does not have.
fn c_field<'a>(structure: &str, field: &'a str) -> Option<&'a str> {
    match (structure, field) {
        (_, "tail") => None,
        ("fi_bus_attr", "attr") => Some("attr.pci"),
        _ => Some(field.strip_suffix('_').unwrap_or(field)),
    }
}

/// A C program that prints `name value` for everything that is declared.
fn program(layouts: &[sys::Layout], constants: &[(&str, u64)]) -> String {
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <rdma/fabric.h>\n#include <rdma/fi_domain.h>\n\
         #include <rdma/fi_endpoint.h>\n#include <rdma/fi_eq.h>\n#include <rdma/fi_cm.h>\n#include <rdma/fi_rma.h>\n\
         #include <rdma/fi_errno.h>\n#include <rdma/fi_ext.h>\nint main(void) {\n",
    );
    let mut print = |name: &str, value: &str| {
        writeln!(text, "printf(\"{name} %llu\\n\", (unsigned long long)({value}));").unwrap();
    };
    print("version", "FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION)");
    for layout in layouts {
        print(layout.name, &format!("sizeof(struct {})", layout.name));
        for (field, _) in layout.fields {
            if let Some(c) = c_field(layout.name, field) {
                print(&format!("{}.{field}", layout.name), &format!("offsetof(struct {}, {c})", layout.name));
            }
        }
    }
    for (name, _) in constants {
        print(name, name);
    }
    text.push_str("return 0;\n}\n");
    text
}

/// Compiles and runs a program; its lines as a table, or what the compiler said.
fn run(include: Option<&str>, name: &str, program: &str) -> Result<HashMap<String, u64>, String> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (directory.join(format!("{name}.c")), directory.join(name));
    std::fs::write(&source, program).unwrap();
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(include.map(|path| format!("-I{path}"))).arg("-w").arg("-o").arg(&binary).arg(&source);
    let output = cc.output().map_err(|error| format!("no C compiler: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let output = Command::new(&binary).output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    Ok(lines
        .lines()
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect())
}

#[test]
fn declarations_are_those_of_the_headers() {
    let include = std::env::var("NIXL_TEST_LIBFABRIC_INCLUDE").ok();
    let include = include.as_deref();
    let probe = "#include <stdio.h>\n#include <rdma/fabric.h>\nint main(void) { \
                 printf(\"version %u\\n\", FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION)); return 0; }\n";
    let version = match run(include, "probe", probe) {
        Ok(values) => values["version"],
        Err(reason) if include.is_none() => {
            println!("skipped: no libfabric headers (install libfabric-dev) or no C compiler: {reason}");
            return;
        }
        Err(reason) => panic!("{reason}"),
    };

    let mut layouts = sys::LAYOUTS.to_vec();
    let mut constants = sys::CONSTANTS.to_vec();
    if version > packed(1, 17) {
        layouts.extend_from_slice(sys::LAYOUTS_AFTER_1_17);
    }
    if version >= packed(2, 0) {
        constants.extend_from_slice(sys::CONSTANTS_OF_2_0);
    }
    if version >= packed(2, 5) {
        constants.extend_from_slice(sys::CONSTANTS_OF_2_5);
    }
    let values = run(include, "layout", &program(&layouts, &constants)).unwrap();

    let mut wrong = Vec::new();
    for layout in &layouts {
        let (rust, c) = (layout.size as u64, values[layout.name]);
        // Tables that libfabric owns may grow: we look at their size member. What we own must have room.
        let fits = if has_tail(layout) { c <= rust } else { c == rust || is_table(layout) && c > rust };
        if !fits {
            wrong.push(format!("sizeof({}): {rust}, C has {c}", layout.name));
        }
        for (field, offset) in layout.fields {
            if c_field(layout.name, field).is_none() {
                continue;
            }
            let c = values[&format!("{}.{field}", layout.name)];
            if *offset as u64 != c {
                wrong.push(format!("offsetof({}, {field}): {offset}, C has {c}", layout.name));
            }
        }
    }
    for (name, value) in &constants {
        if *value != values[*name] {
            wrong.push(format!("{name}: {value:#x}, C has {:#x}", values[*name]));
        }
    }
    assert!(wrong.is_empty(), "libfabric {}.{}:\n{}", version >> 16, version & 0xffff, wrong.join("\n"));
    println!(
        "{} structures and {} constants are those of libfabric {}.{}",
        layouts.len(),
        constants.len(),
        version >> 16,
        version & 0xffff
    );
}

fn is_table(layout: &sys::Layout) -> bool {
    layout.name.starts_with("fi_ops")
}

fn packed(major: u64, minor: u64) -> u64 {
    major << 16 | minor
}
