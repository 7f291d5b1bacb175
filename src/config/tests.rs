use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::error::Status;

fn params(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn read(pairs: &[(&str, &str)]) -> Result<Config> {
    Config::from_lookup(&params(pairs), |_| None).map(|(config, _)| config)
}

#[test]
fn defaults_are_readable_and_are_what_stock_users_know() {
    let config = read(&[]).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.striping_threshold_bytes, 131_072);
    assert_eq!(config.num_threads, 0);
    assert_eq!(config.split_batch_size, 1024);
    assert_eq!(config.connect_timeout, Duration::from_secs(30));
    assert_eq!(config.spin, None);
}

#[test]
fn keys_are_unique_and_lines_are_one_line() {
    let keys: BTreeSet<_> = OPTIONS.iter().map(|spec| spec.key).collect();
    assert_eq!(keys.len(), OPTIONS.len());
    for spec in OPTIONS {
        assert!(!spec.help.contains(['|', '\n']), "{}", spec.key);
    }
}

#[test]
fn a_parameter_beats_the_environment_and_that_beats_the_default() {
    let env = |name: &str| (name == "NIXL_LIBFABRIC_MAX_RAILS").then(|| "7".to_owned());
    let max_rails = |pairs: &[(&str, &str)]| Config::from_lookup(&params(pairs), env).unwrap().0.max_rails;
    assert_eq!(max_rails(&[]), 7);
    assert_eq!(max_rails(&[("max_rails", "3")]), 3);
    let empty = Config::from_lookup(&params(&[]), |_| Some(String::new())).unwrap().0;
    assert_eq!(empty, Config::default());
}

#[test]
fn passing_the_shown_options_back_changes_nothing() {
    let env = |name: &str| (name == "NIXL_LIBFABRIC_SPIN_US").then(|| "9".to_owned());
    let shown: BTreeMap<_, _> = defaults_from(env).into_iter().collect();
    assert_eq!(shown.len(), OPTIONS.len());
    let (config, warnings) = Config::from_lookup(&shown, env).unwrap();
    assert_eq!(config, Config { spin: Some(Duration::from_micros(9)), ..Config::default() });
    assert!(warnings.is_empty());
}

#[test]
fn a_bad_value_is_an_error_that_names_key_value_range_and_source() {
    for (key, value) in [
        ("max_rails", "1025"),
        ("max_rails", "-1"),
        ("max_rails", "+1"),
        ("max_rails", ""),
        ("max_rails", "1K"),
        ("chunk_bytes_max", "99999999999999999999"),
        ("chunk_bytes_max", "99999999999999999G"),
        ("chunk_bytes_max", "1"),
        ("require_rdma", "maybe"),
        ("wait", "never"),
        ("fabric", "EFA!"),
        ("devices", "a,!"),
        ("gpu_devices", "rdmap79s0"),
        ("gpu_devices", "0000:53:00.0="),
    ] {
        let error = read(&[(key, value)]).unwrap_err();
        assert_eq!(error.status(), Status::InvalidParam);
        let words = error.to_string();
        let range = OPTIONS.iter().find(|spec| spec.key == key).unwrap().range.to_string();
        for part in [key, &format!("`{value}`"), &range, "parameters"] {
            assert!(words.contains(part), "{words} lacks {part}");
        }
    }
    let env = |name: &str| (name == "NIXL_LIBFABRIC_WAIT").then(|| "x".to_owned());
    let words = Config::from_lookup(&params(&[]), env).unwrap_err().to_string();
    assert!(words.contains("NIXL_LIBFABRIC_WAIT"), "{words}");
}

/// Whatever a host passes to the C++ plugin, it gets a backend here.
#[test]
fn what_the_stock_plugin_starts_with_is_a_warning() {
    let texts = [
        "0",
        "1",
        "65536",
        "65537",
        "1000001",
        "18446744073709551615",
        "99999999999999999999",
        "-1",
        "",
        " ",
        "lots",
        "1.5",
        "0x10",
        "12 slices",
        "+1",
    ];
    for key in STOCK {
        let spec = OPTIONS.iter().find(|spec| spec.key == *key).expect("an option of ours");
        for text in texts {
            let (_, warnings) = Config::from_lookup(&params(&[(key, text)]), |_| None).unwrap();
            let is_fine = <u64 as value::FromText>::from_text(text, spec.range).is_ok();
            assert_eq!(warnings.len(), usize::from(!is_fine), "{key} `{text}`: {warnings:?}");
            for warning in warnings {
                assert!(warning.contains(key) && warning.contains("going on with"), "{warning}");
            }
        }
    }
    let batch = |text| read(&[("split_batch_size", text)]).unwrap().batch_slices();
    assert_eq!(
        [batch("0"), batch("1"), batch("99999"), batch("many"), batch("-1")],
        [1024, 1, 65_536, 1024, 1024]
    );
    assert_eq!(read(&[("num_threads", "4096")]).unwrap().num_threads, 64);
    let env = |name: &str| (name == "NIXL_LIBFABRIC_NUM_THREADS").then(|| "x".to_owned());
    let (config, warnings) = Config::from_lookup(&params(&[]), env).unwrap();
    assert!(config.num_threads == 0 && warnings[0].contains("NIXL_LIBFABRIC_NUM_THREADS"), "{warnings:?}");
}

#[test]
fn an_unknown_key_is_a_warning_that_lists_near_names() {
    let warnings = |key: &str| Config::from_lookup(&params(&[(key, "1")]), |_| None).unwrap().1;
    assert!(warnings("num_threads").is_empty());
    for (written, near) in [
        ("num_thread", "num_threads"),
        ("MAX_RAILS", "max_rails"),
        ("stripping_threshold", "striping_threshold"),
    ] {
        let [warning] = &warnings(written)[..] else { panic!("one warning for {written}") };
        assert!(warning.contains(written) && warning.contains(near), "{warning}");
    }
    assert!(!warnings("zzzz")[0].contains("did you mean"));
}

#[test]
fn sizes_take_suffixes() {
    assert_eq!(read(&[("chunk_bytes_max", "2M")]).unwrap().chunk_bytes_max, 2 << 20);
    assert_eq!(read(&[("striping_threshold", "64k")]).unwrap().striping_threshold_bytes, 65_536);
}

/// `BLESS=1 cargo test` writes the table into the README.
#[test]
fn the_readme_shows_this_table() {
    const BEGIN: &str = "<!-- options:begin -->\n";
    const END: &str = "<!-- options:end -->";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let Ok(readme) = std::fs::read_to_string(path) else { return };
    let begin = readme.find(BEGIN).expect("README.md lacks the line `<!-- options:begin -->`") + BEGIN.len();
    let end =
        begin + readme[begin..].find(END).expect("README.md lacks `<!-- options:end -->` after the table");
    let table = markdown_table();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, format!("{}{table}{}", &readme[..begin], &readme[end..])).unwrap();
    } else {
        assert!(
            readme[begin..end] == table,
            "README.md has an old table of options; run `BLESS=1 cargo test config`"
        );
    }
}
