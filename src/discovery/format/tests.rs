use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::discovery::admission::{Admission, Refusal};
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::store::Entry;

/// Reads an entry as a discovery does.
fn read(registry: &Registry, key: &str, value: &str) -> Result<Node, Refusal> {
    registry.validate("registry").unwrap();
    let admission = Admission {
        decoder: registry.decoder(),
        ..Admission::default()
    };
    let keys = registry.keys("", "billing");
    let entry = Entry {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        create_revision: 5,
        mod_revision: 7,
        lease: None,
    };
    let id = keys.node_id(key).ok_or(Refusal::Unwanted)?;
    admission.admit(&id, &entry)
}

fn address(node: &Node) -> String {
    node.addr(0).to_string()
}

fn protocol(node: &Node) -> Option<&str> {
    node.metadata
        .get(metadata_keys::PROTOCOL)
        .and_then(Value::as_str)
}

/// The entries are made up after the descriptions of each registry.
#[test]
fn each_format_is_read_as_its_writers_write_it() {
    let kratos = |endpoints: Value| {
        json!({
            "id": "0b9c", "name": "billing", "version": "v1.4.0",
            "metadata": { "weight": "20", "zone": "eu-1a", "protocol": "mine" }, "endpoints": endpoints
        })
        .to_string()
    };
    let both = kratos(json!(["http://10.2.0.7:8000", "grpc://10.2.0.7:9000"]));
    let any = Registry::new;
    let with = |format, scheme| Registry::new(format).scheme(scheme);
    for (registry, key, value, expected, spoken) in [
        (
            any(Format::Grpc),
            "billing/10.2.0.7:7443",
            r#"{"Op":0,"Addr":"10.2.0.7:7443","Metadata":null}"#,
            "10.2.0.7:7443",
            Some("h2c"),
        ),
        (
            any(Format::Grpc),
            "billing/a/b",
            r#"{"addr":"[fd00::7]:7443"}"#,
            "[fd00::7]:7443",
            Some("h2c"),
        ),
        (
            any(Format::GoZero),
            "billing/7587881234567890123",
            "10.2.0.7:8080",
            "10.2.0.7:8080",
            Some("h2c"),
        ),
        (
            any(Format::Kratos),
            "/microservices/billing/0b9c",
            &both,
            "10.2.0.7:8000",
            Some("http1"),
        ),
        (
            with(Format::Kratos, Scheme::Grpc),
            "/microservices/billing/0b9c",
            &both,
            "10.2.0.7:9000",
            Some("h2c"),
        ),
        (
            with(Format::Kratos, Scheme::Grpcs),
            "/microservices/billing/0b9c",
            &kratos(json!(["grpc://10.2.0.7:9000?isSecure=true"])),
            "10.2.0.7:9000",
            Some("h2"),
        ),
        (
            any(Format::Cloudwego),
            "hertz/registry-etcd/billing/10.2.0.7:8888",
            r#"{"network":"tcp","address":"10.2.0.7:8888","weight":10,"tags":{"zone":"a"}}"#,
            "10.2.0.7:8888",
            None,
        ),
        (
            any(Format::Cloudwego).prefix("kitex/registry-etcd/billing/"),
            "kitex/registry-etcd/billing/x",
            r#"{"network":"tcp","address":"fd00::7:9999","weight":0,"tags":null}"#,
            "[fd00::7]:9999",
            None,
        ),
        (
            any(Format::GoMicro),
            "/micro/registry/billing/billing-5f0c",
            r#"{"name":"billing","version":"latest","metadata":null,"endpoints":[{"a":[{"b":{}}]}],
                "nodes":[{"metadata":{"protocol":"grpc"},"id":"x","address":"10.2.0.7:43211"}]}"#,
            "10.2.0.7:43211",
            Some("h2c"),
        ),
        (
            any(Format::Goframe),
            "/service/default/default/billing/latest/10.2.0.7:8000,192.168.9.7:8000",
            r#"{"protocol":"http","insecure":true}"#,
            "10.2.0.7:8000",
            Some("http1"),
        ),
    ] {
        let node = read(&registry, key, value).unwrap_or_else(|error| panic!("{value}: {error:?}"));
        assert_eq!(address(&node), expected, "{value}");
        assert_eq!(protocol(&node), spoken, "{value}");
        assert_eq!(
            (node.incarnation(), node.revision(), node.last_seen),
            (-5, 7, 0)
        );
        assert!(GroupKeys::is_id(&node.id), "{}", node.id);
    }
    let node = read(&any(Format::Kratos), "/microservices/billing/0b9c", &both).unwrap();
    assert_eq!((&*node.id, node.weight), ("0b9c", Some(20.0)));
    assert!(node.tags.contains("v1.4.0"));
    assert_eq!(node.metadata.get("zone"), Some(json!("eu-1a")).as_ref());
    let hertz = r#"{"network":"tcp","address":"10.2.0.7:8888","weight":-1,"tags":{"zone":"a"}}"#;
    let node = read(
        &any(Format::Cloudwego),
        "hertz/registry-etcd/billing/x",
        hertz,
    )
    .unwrap();
    assert_eq!(node.weight, Some(10.0));
    assert!(node.tags.contains("zone=a"));
    let node = read(
        &any(Format::Grpc),
        "billing/a/b%",
        r#"{"Addr":"10.0.0.1:1"}"#,
    )
    .unwrap();
    assert_eq!(node.id, "a%2Fb%25");
}

#[test]
fn what_is_not_for_this_group_is_left_out_and_what_is_wrong_says_so() {
    let custom = || Registry::custom("p/", EntryTable::new([AddressAt::Whole("/a".to_owned())]));
    let unwanted = |refusal: &Refusal| *refusal == Refusal::Unwanted;
    let says = |words: &'static str| move |refusal: &Refusal| refusal.reason().contains(words);
    type Expected<'e> = &'e dyn Fn(&Refusal) -> bool;
    let kratos = Registry::new(Format::Kratos).scheme(Scheme::Https);
    let cases: [(Registry, &str, &str, Expected<'_>); 13] = [
        (
            kratos,
            "/microservices/billing/1",
            r#"{"endpoints":["http://10.0.0.1:1"]}"#,
            &unwanted,
        ),
        (
            Registry::new(Format::Cloudwego),
            "hertz/registry-etcd/billing/1",
            r#"{"network":"unix","address":"/x"}"#,
            &unwanted,
        ),
        (
            Registry::new(Format::GoMicro),
            "/micro/registry/billing/1",
            r#"{"nodes":[{"metadata":{"protocol":"mucp"},"address":"10.0.0.1:1"}]}"#,
            &unwanted,
        ),
        (
            Registry::new(Format::Kratos),
            "/microservices/billing/a/b",
            "{}",
            &unwanted,
        ),
        (Registry::new(Format::Grpc), "billing-2/a", "{}", &unwanted),
        (
            Registry::new(Format::GoZero),
            "billing/1",
            "[::]:8080",
            &says("unspecified"),
        ),
        (
            Registry::new(Format::GoZero),
            "billing/1",
            "db.test:8080",
            &says("host names are not resolved"),
        ),
        (
            Registry::new(Format::GoZero),
            "billing/1",
            "10.0.0.1:99999",
            &says("port"),
        ),
        (
            Registry::new(Format::GoZero),
            "billing/1",
            "rpcx_path",
            &says("no IP address"),
        ),
        (
            Registry::new(Format::GoMicro),
            "/micro/registry/billing/1",
            r#"{"nodes":[]}"#,
            &says("no address"),
        ),
        (custom(), "p/1", "{", &says("EOF")),
        (custom(), "p/1", r#"{"a":7}"#, &says("no address")),
        (custom(), "p/1", r#"{"a":"10.0.0.1:0"}"#, &says("port is 0")),
    ];
    for (registry, key, value, expected) in cases {
        let refusal = read(&registry, key, value).unwrap_err();
        assert!(expected(&refusal), "{value}: {refusal:?}");
    }
}

#[test]
fn a_table_of_ones_own_maps_everything_that_a_balancer_reads() {
    let text = r#"
format: custom
prefix: "wsd/billing/"
custom:
  require: [{ at: /kind, is: [web, 7] }]
  address: [/missing, { host: /Host, port: /Port }]
  weight: { at: /Weight, default: 100, zero: drain }
  zone: /MetadataX/zone
  tags: [/version, /labels]
  metadata: /MetadataX
  metrics:
    queue_depth: { at: /load/waiting }
    memory_usage_percent: { at: /load/kv, times: 100 }
  drain: [{ at: /Enable, is: [false] }, { at: /state, is: [stopping] }]
"#;
    let registry: Registry = serde_saphyr::from_str(text).unwrap();
    let value = json!({
        "kind": 7, "Host": "fd00::1", "Port": "8080", "Weight": "5", "Enable": true, "version": "v2",
        "labels": ["a", "b", 3], "load": { "waiting": 3, "kv": "0.62" },
        "MetadataX": { "zone": "a", "region": "eu", "deep": [[1]] }
    });
    let read_with = |change: &dyn Fn(&mut Value)| {
        let mut value = value.clone();
        change(&mut value);
        read(&registry, "wsd/billing/x", &value.to_string())
    };
    let node = read_with(&|_| {}).unwrap();
    assert_eq!(address(&node), "[fd00::1]:8080");
    assert_eq!((node.weight, node.zone.as_deref()), (Some(5.0), Some("a")));
    assert!(
        ["a", "b", "3", "v2"]
            .iter()
            .all(|tag| node.tags.contains(*tag)),
        "{:?}",
        node.tags
    );
    assert_eq!(node.metric("queue_depth"), Some(3.0));
    assert_eq!(node.metric("memory_usage_percent"), Some(62.0));
    assert_eq!(node.metadata.get("region"), Some(json!("eu")).as_ref());
    assert!(node.is_serving());
    for drain in [json!({ "Enable": false }), json!({ "state": "stopping" })] {
        let node = read_with(&|value| {
            value
                .as_object_mut()
                .unwrap()
                .extend(drain.as_object().unwrap().clone());
        });
        assert!(!node.unwrap().is_serving(), "{drain}");
    }
    assert_eq!(
        read_with(&|value| value["Weight"] = json!(0))
            .unwrap()
            .weight,
        Some(0.0)
    );
    assert_eq!(
        read_with(&|value| value["Weight"] = json!("x"))
            .unwrap()
            .weight,
        Some(100.0)
    );
    assert_eq!(
        read_with(&|value| value["kind"] = json!("db")).unwrap_err(),
        Refusal::Unwanted
    );
    assert!(
        read_with(&|value| value["Port"] = json!(70_000))
            .unwrap_err()
            .reason()
            .contains("port")
    );
    let many: Vec<_> = (0..2_000).collect();
    let refusal = read_with(&|value| value["MetadataX"] = json!({ "all": many })).unwrap_err();
    assert!(matches!(refusal, Refusal::TooLarge(_)), "{refusal:?}");
    // What is not wanted does not count.
    read_with(&|value| value["other"] = json!(many)).unwrap();
}

#[test]
fn the_first_address_that_is_allowed_counts() {
    let registry = Registry::new(Format::Goframe);
    let admission = Admission {
        decoder: registry.decoder(),
        networks: vec!["192.168.0.0/16".parse().unwrap()],
        ..Admission::default()
    };
    let entry = Entry {
        key: "/service/default/default/billing/v1/10.2.0.7:8000,192.168.9.7:8001".to_owned(),
        value: b"{}".to_vec(),
        create_revision: 1,
        mod_revision: 1,
        lease: None,
    };
    assert_eq!(
        address(&admission.admit("x", &entry).unwrap()),
        "192.168.9.7:8001"
    );
    let elsewhere = Entry {
        key: "/service/default/default/billing/v1/10.2.0.7:8000".to_owned(),
        ..entry
    };
    let refusal = admission.admit("x", &elsewhere).unwrap_err();
    assert!(matches!(refusal, Refusal::NotAllowed(_)), "{refusal:?}");
}

#[test]
fn addresses_are_read_in_every_spelling() {
    for (text, ip, port) in [
        ("10.0.0.1:80", "10.0.0.1", Some(80)),
        ("10.0.0.1", "10.0.0.1", None),
        ("[fd00::1]:80", "fd00::1", Some(80)),
        ("[fd00::1]", "fd00::1", None),
        ("fd00::1:80", "fd00::1", Some(80)),
        ("fd00::1", "fd00::1", None),
        ("::1", "::1", None),
        ("::1:8080", "::1", Some(8080)),
        ("http://10.0.0.1/path:9", "10.0.0.1", Some(80)),
        ("https://10.0.0.1", "10.0.0.1", Some(443)),
        ("grpc://[fd00::1]:9000?isSecure=true", "fd00::1", Some(9000)),
    ] {
        let read = address::parse(text).unwrap();
        assert_eq!(
            (read.ip, read.port),
            (ip.parse::<IpAddr>().unwrap(), port),
            "{text}"
        );
    }
    for wrong in [
        "",
        ":80",
        "a:80",
        "10.0.0.1:x",
        "10.0.0.1:99999",
        "unix:/run/x",
        "10.0.0.1/8",
        "http://",
    ] {
        assert!(address::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn settings_that_cannot_be_meant_are_refused_by_name() {
    let table = || EntryTable::new([AddressAt::Whole("/a".to_owned())]);
    let pointer = |pointer: &str| {
        let table = EntryTable {
            zone: Some(pointer.to_owned()),
            ..table()
        };
        Registry::custom("p/", table)
    };
    let weighed = EntryTable {
        weight: Some(WeightAt {
            at: "/w".to_owned(),
            default: 0.0,
            zero: ZeroWeight::Default,
        }),
        ..table()
    };
    let text = EntryTable {
        text: true,
        ..pointer("/zone").custom.unwrap()
    };
    for (registry, field) in [
        (
            Registry::new(Format::Kratos).prefix("/microservices/x"),
            "registry.prefix",
        ),
        (
            Registry::new(Format::Native).prefix("x/"),
            "registry.prefix",
        ),
        (Registry::new(Format::Custom), "registry.custom"),
        (
            Registry {
                prefix: None,
                ..Registry::custom("p/", table())
            },
            "registry.prefix",
        ),
        (
            Registry {
                format: Format::Grpc,
                ..Registry::custom("p/", table())
            },
            "registry.custom",
        ),
        (
            Registry::custom("p/", EntryTable::default()),
            "registry.custom.address",
        ),
        (pointer("zone"), "registry.custom.zone"),
        (pointer("/a~2"), "registry.custom.zone"),
        (
            Registry::custom("p/", weighed),
            "registry.custom.weight.default",
        ),
        (Registry::custom("p/", text), "registry.custom.text"),
        (
            Registry::new(Format::GoZero).scheme(Scheme::Http),
            "registry.scheme",
        ),
        (
            Registry::new(Format::Native).scheme(Scheme::Http),
            "registry.scheme",
        ),
    ] {
        let error = registry.validate("registry").unwrap_err().to_string();
        assert!(error.contains(&format!("{field}: ")), "{error}");
    }
}
