//! What is refused, and why.

use super::*;
use proptest::prelude::*;

fn entry(value: &str) -> Entry {
    Entry {
        key: "registry/g/n".to_owned(),
        value: value.as_bytes().to_vec(),
        create_revision: 1,
        mod_revision: 1,
        lease: None,
    }
}

#[test]
fn other_addresses_and_ports_are_refused() {
    let admission = Admission {
        networks: parse_networks(&[
            "10.0.0.0/8".to_owned(),
            "fd00::/8".to_owned(),
            "192.0.2.1".to_owned(),
        ])
        .unwrap(),
        ports: parse_ports(&["8080".to_owned(), "9000-9100".to_owned()]).unwrap(),
        ..Admission::default()
    };
    for (ip, port, allowed) in [
        ("10.1.2.3", "8080", true),
        ("::ffff:10.1.2.3", "9100", true),
        ("fd00::1", "9000", true),
        ("192.0.2.1", "8080", true),
        ("192.0.2.2", "8080", false),
        ("::ffff:169.254.169.254", "8080", false),
        ("10.1.2.3", "22", false),
        ("10.1.2.3", "9101", false),
        ("10.1.2.3", "0", false),
        ("10.1.2.3", "null", true),
    ] {
        let value = format!(r#"{{"id":"n","ip":"{ip}","port":{port}}}"#);
        let admitted = admission.admit("n", &entry(&value));
        assert_eq!(admitted.is_ok(), allowed, "{value}");
        if !allowed {
            assert!(matches!(admitted, Err(Refusal::NotAllowed(_))));
        }
    }
}

#[test]
fn an_invalid_network_or_port_is_named() {
    for text in ["", "10.0.0.0/33", "host", "10.0.0/8"] {
        let error = parse_networks(&[text.to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("allowed_networks") && error.contains(text),
            "{error}"
        );
    }
    for text in ["", "0", "65536", "9-8", "a-b", "1-2-3"] {
        let error = parse_ports(&[text.to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("allowed_ports") && error.contains(text),
            "{error}"
        );
    }
}

#[test]
fn an_excess_is_refused_before_the_entry_is_parsed() {
    let limits = EntryLimits {
        key_bytes: 64,
        value_bytes: 300,
        depth: 4,
        values: 16,
        nodes: 1,
    };
    let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(300));
    let wide = format!("[{}1]", "1,".repeat(20));
    for (value, named) in [
        (long.as_str(), "bytes"),
        ("[[[[[1]]]]]", "levels"),
        (wide.as_str(), "values"),
    ] {
        let error = limits.check(&entry(value)).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
    limits
        .check(&entry(r#"{"text":"[[[[[[,,,,,,,,,,,,,,,,,\"{{{{"}"#))
        .unwrap();
    let mut key = entry("{}");
    key.key = "k".repeat(65);
    assert!(limits.check(&key).unwrap_err().contains("key"));
    let error = EntryLimits {
        depth: 1,
        ..EntryLimits::default()
    }
    .validate("limits")
    .unwrap_err();
    assert!(error.to_string().contains("limits.depth"), "{error}");
}

#[test]
fn an_address_that_nobody_can_connect_to_is_named() {
    let admission = Admission::default();
    for (ip, port, named) in [
        ("0.0.0.0", "80", "0.0.0.0"),
        ("::", "80", "::"),
        ("::ffff:0.0.0.0", "80", "unspecified"),
        ("224.0.0.1", "80", "multicast"),
        ("ff02::1", "80", "multicast"),
        ("255.255.255.255", "80", "broadcast"),
        ("fe80::1", "80", "link-local"),
        ("10.0.0.1", "0", "port is 0"),
    ] {
        let value = format!(r#"{{"id":"n","ip":"{ip}","port":{port}}}"#);
        let Err(Refusal::NotAllowed(reason)) = admission.admit("n", &entry(&value)) else {
            panic!("{value} is accepted");
        };
        assert!(reason.contains(named), "{reason}");
        let node: Node = serde_json::from_str(&value).unwrap();
        assert!(
            admission.readmit(&node).is_err(),
            "{value} in a snapshot file"
        );
    }
}

#[test]
fn a_field_that_cannot_be_parsed_is_named() {
    for (field, value) in [
        ("port", r#""80""#),
        ("port", "70000"),
        ("zone", "7"),
        ("tags", r#""blue""#),
        ("state", "1"),
        ("priority", "-1"),
        ("last_seen", r#""now""#),
        ("leaving", "1"),
        ("ip", r#""10.0.0.300""#),
    ] {
        let ip = if field == "ip" {
            ""
        } else {
            r#""ip":"10.0.0.1","#
        };
        let value = format!(r#"{{"id":"n",{ip}"{field}":{value}}}"#);
        let Err(Refusal::Malformed(reason)) = Admission::default().admit("n", &entry(&value))
        else {
            panic!("{value} is accepted");
        };
        assert!(reason.starts_with(&format!("{field}: ")), "{reason}");
    }
}

proptest! {
    /// Whatever is stored is accepted or refused with a reason.
    #[test]
    fn any_bytes(value in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut any = entry("");
        any.value = value;
        let _ = Admission::default().admit("n", &any);
    }
}
