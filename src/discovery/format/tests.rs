use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::discovery::admission::{Admission, Refusal};
use crate::keys::GroupKeys;
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::store::Entry;

/// Reads an entry as a discovery does.
fn read(registry: &Registry, key: &str, value: &str) -> Result<Node, Refusal> {
    registry.validate("registry").unwrap();
    let places = places(registry);
    let admission = Admission {
        decoders: places.decoders("billing"),
        ..Admission::default()
    };
    let keys = places.keys("", "billing").unwrap();
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

fn places(registry: &Registry) -> Places {
    Places {
        main: registry.clone(),
        further: Vec::new(),
    }
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
    assert_eq!((&*node.id, node.weight), ("0b9c", Some(0.2)));
    assert!(node.tags.contains("v1.4.0"));
    assert_eq!(node.metadata.get("zone"), Some(json!("eu-1a")).as_ref());
    let hertz = r#"{"network":"tcp","address":"10.2.0.7:8888","weight":-1,"tags":{"zone":"a"}}"#;
    let node = read(
        &any(Format::Cloudwego),
        "hertz/registry-etcd/billing/x",
        hertz,
    )
    .unwrap();
    assert_eq!(node.weight, Some(1.0));
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
            &says("host name"),
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
    assert_eq!((node.weight, node.zone.as_deref()), (Some(0.05), Some("a")));
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
        Some(1.0)
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
        decoders: places(&registry).decoders("billing"),
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

fn parse(text: &str) -> Result<(Host, Option<u16>), String> {
    let (scheme, rest) = address::split_scheme(text);
    address::host_and_port(scheme.as_deref(), rest)
}

#[test]
fn addresses_are_read_in_every_spelling() {
    for (text, name, port) in [
        ("db.test:80", "db.test", Some(80)),
        ("https://DB-1.test./x", "", None),
        ("https://DB-1.test/x", "db-1.test", Some(443)),
        ("a_b:1", "a_b", Some(1)),
    ] {
        let read = parse(text);
        let expected = (!name.is_empty()).then(|| (Host::Name(name.to_owned()), port));
        assert_eq!(read.ok(), expected, "{text}");
    }
    // A password is not for a log.
    let error = parse("postgres://user:secret@1.2.3:5432").unwrap_err();
    assert!(!error.contains("secret"), "{error}");
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
        let read = parse(text).unwrap();
        let host = Host::Ip(ip.parse::<IpAddr>().unwrap());
        assert_eq!(read, (host, port), "{text}");
    }
    for wrong in [
        "",
        ":80",
        "a..b:80",
        "10.0.0.1:x",
        "10.0.0.1:99999",
        "unix:/run/x",
        "10.0.0.1/8",
        "http://",
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
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
        address: Vec::new(),
        ..pointer("/zone").custom.unwrap()
    };
    let text_with_address = EntryTable {
        text: true,
        ..table()
    };
    let nothing = |drain: bool| {
        let nothing = vec![Equals {
            at: "/x".to_owned(),
            is: Vec::new(),
        }];
        let mut table = table();
        match drain {
            true => table.drain = nothing,
            false => table.require = nothing,
        }
        Registry::custom("p/", table)
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
        (nothing(false), "registry.custom.require[0].is"),
        (nothing(true), "registry.custom.drain[0].is"),
        (
            Registry::custom("p/", text_with_address),
            "registry.custom.address",
        ),
        (Registry::default().scheme(Scheme::Http), "registry.scheme"),
        (
            Registry::default().host_names(HostNames::All),
            "registry.host_names",
        ),
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
            Registry::new(Format::Native).scheme(Scheme::Http),
            "registry.scheme",
        ),
    ] {
        let error = registry.validate("registry").unwrap_err().to_string();
        assert!(error.contains(&format!("{field}: ")), "{error}");
    }
}

#[test]
fn what_names_no_scheme_has_the_one_of_the_file() {
    let text = EntryTable {
        text: true,
        ..EntryTable::default()
    };
    let text = || Registry::custom("p/", text.clone());
    let parts = AddressAt::Parts(HostAndPort {
        host: "/h".to_owned(),
        port: "/p".to_owned(),
    });
    let parts = Registry::custom("p/", EntryTable::new([parts]));
    let mut said = EntryTable::new([AddressAt::Whole("/a".to_owned())]);
    said.scheme = Some("/s".to_owned());
    let said = Registry::custom("p/", said);
    let go_zero = Registry::new(Format::GoZero);
    let grpc = Scheme::Grpc;
    for (registry, key, value, expected) in [
        (text(), "p/1", "10.0.0.1:1", None),
        (text(), "p/1", "http://10.0.0.1:1", Some("http1")),
        (text().scheme(grpc), "p/1", "http://10.0.0.1:1", Some("h2c")),
        (text().scheme(grpc), "p/1", "10.0.0.1:1", Some("h2c")),
        (
            text().scheme(Scheme::Grpcs),
            "p/1",
            "https://10.0.0.1:1",
            Some("h2"),
        ),
        (
            parts.clone().scheme(grpc),
            "p/1",
            r#"{"h":"10.0.0.1","p":"7"}"#,
            Some("h2c"),
        ),
        (parts, "p/1", r#"{"h":"10.0.0.1","p":null}"#, None),
        (
            go_zero.clone().scheme(Scheme::Grpcs),
            "billing/1",
            "10.0.0.1:1",
            Some("h2"),
        ),
        (
            go_zero.scheme(Scheme::Http),
            "billing/1",
            "10.0.0.1:1",
            Some("http1"),
        ),
        (
            said.clone(),
            "p/1",
            r#"{"a":"10.0.0.1:1","s":"HTTP"}"#,
            Some("http1"),
        ),
        (said, "p/1", r#"{"a":"10.0.0.1:1","s":""}"#, None),
    ] {
        let node = read(&registry, key, value).unwrap_or_else(|error| panic!("{value}: {error:?}"));
        assert_eq!(protocol(&node), expected, "{registry:?} {value}");
    }
    let http = Registry::new(Format::Kratos).scheme(Scheme::Http);
    for value in [
        r#"{"endpoints":[]}"#,
        r#"{"endpoints":["grpc://db.test:9000"]}"#,
        r#"{"endpoints":["unix:///x"]}"#,
    ] {
        let refusal = read(&http, "/microservices/billing/1", value).unwrap_err();
        assert_eq!(refusal, Refusal::Unwanted, "{value}");
    }
}

#[test]
fn a_key_with_the_address_needs_no_value() {
    let table = EntryTable::new([AddressAt::Whole("key".to_owned())]);
    let registry = Registry::custom("p/", table);
    for value in ["", "weight=5&x", "{}"] {
        assert_eq!(
            address(&read(&registry, "p/10.0.0.1:1", value).unwrap()),
            "10.0.0.1:1"
        );
    }
    let goframe = Registry::new(Format::Goframe);
    let key = "/service/default/default/billing/v1/10.0.0.1:1";
    read(&goframe, key, "").unwrap();
    assert!(matches!(
        read(&goframe, key, "{"),
        Err(Refusal::Malformed(_))
    ));
}

#[test]
fn what_has_a_meaning_here_is_not_taken_from_the_metadata_of_others() {
    let value = json!({
        "Addr": "10.0.0.1:1",
        "Metadata": {
            "protocol": "https", "server_name": "evil.test", "health": "failing", "host_name": "x",
            "cpu_usage_percent": "37", "queue_depth": "many", "region": "eu"
        }
    });
    let registry = Registry::new(Format::Grpc);
    let node = read(&registry, "billing/1", &value.to_string()).unwrap();
    assert_eq!(protocol(&node), Some("h2c"));
    assert_eq!(node.metric("cpu_usage_percent"), Some(37.0));
    for name in ["server_name", "health", "host_name", "queue_depth"] {
        assert!(node.metadata.get(name).is_none(), "{name}");
    }
    assert_eq!(node.metadata.get("region"), Some(json!("eu")).as_ref());
}

#[test]
fn simple_values_are_compared_as_texts_too_and_addresses_are_limited() {
    let text = r#"
format: custom
prefix: p/
custom:
  address: [/a]
  drain: [{ at: /up, is: [false] }, { at: /code, is: [7] }]
"#;
    let registry: Registry = serde_saphyr::from_str(text).unwrap();
    for (more, serves) in [
        (json!({ "up": "false" }), false),
        (json!({ "up": false }), false),
        (json!({ "code": "7" }), false),
        (json!({ "code": 7.0 }), false),
        (json!({ "up": "true", "code": 8 }), true),
        (json!({ "up": null }), true),
    ] {
        let mut value = more.clone();
        value["a"] = json!("10.0.0.1:1");
        let node = read(&registry, "p/1", &value.to_string()).unwrap();
        assert_eq!(node.is_serving(), serves, "{more}");
    }
    let many = vec!["10.0.0.1:0"; 2_000];
    let refusal = read(&registry, "p/1", &json!({ "a": many }).to_string()).unwrap_err();
    assert!(matches!(refusal, Refusal::TooLarge(_)), "{refusal:?}");
}

#[test]
fn several_registries_do_not_mix() {
    let both = Places {
        main: Registry::default(),
        further: vec![
            Registry::new(Format::Kratos),
            Registry::new(Format::Kratos).prefix("/old/billing/"),
            Registry::new(Format::GoZero),
        ],
    };
    both.validate().unwrap();
    let keys = both.keys("", "billing").unwrap();
    for (key, id) in [
        ("registry/billing/a", Some("a")),
        ("/microservices/billing/a", Some("kratos:a")),
        ("/old/billing/a", Some("kratos-2:a")),
        ("billing/7", Some("go-zero:7")),
        ("billing-2/7", None),
        ("/microservices/billing/a/b", None),
    ] {
        assert_eq!(keys.node_id(key).as_deref(), id, "{key}");
    }
    assert!(keys.are_ours() && keys.is_candidacy("election/billing/1a"));
    let admission = Admission {
        decoders: both.decoders("billing"),
        ..Admission::default()
    };
    let entry = |key: &str, value: &str| Entry {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        create_revision: 1,
        mod_revision: 1,
        lease: None,
    };
    let own = entry("registry/billing/a", r#"{"id":"a","ip":"10.0.0.1"}"#);
    assert_eq!(admission.admit("a", &own).unwrap().place(), 0);
    let other = entry("billing/7", "10.0.0.1:1");
    assert_eq!(admission.admit("go-zero:7", &other).unwrap().place(), 3);

    let wrong = |main, further| Places { main, further }.keys("", "billing").unwrap_err();
    for (error, field) in [
        (
            wrong(Registry::new(Format::Kratos), vec![Registry::default()]),
            "further_registries[0].format",
        ),
        (
            wrong(
                Registry::default(),
                vec![Registry::new(Format::Grpc), Registry::new(Format::GoZero)],
            ),
            "further_registries[1].prefix",
        ),
        (
            wrong(
                Registry::default(),
                vec![Registry::new(Format::Grpc).prefix("registry/")],
            ),
            "further_registries[0].prefix",
        ),
    ] {
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn an_id_cannot_be_that_of_a_node_elsewhere() {
    let places = Places {
        main: Registry::default(),
        further: vec![
            Registry::new(Format::Kratos),
            Registry::new(Format::GoZero).host_names(HostNames::All),
        ],
    };
    let admission = Admission {
        decoders: places.decoders("billing"),
        ..Admission::default()
    };
    let keys = places.keys("", "billing").unwrap();
    for (key, value, is_refused) in [
        (
            "registry/billing/kratos:1",
            r#"{"id":"kratos:1","ip":"10.0.0.1"}"#,
            true,
        ),
        (
            "registry/billing/kratos",
            r#"{"id":"kratos","ip":"10.0.0.1"}"#,
            false,
        ),
        (
            "registry/billing/a@b",
            r#"{"id":"a@b","ip":"10.0.0.1"}"#,
            false,
        ),
        ("billing/a@10.0.0.1", "10.0.0.1:1", true),
        ("billing/a", "10.0.0.1:1", false),
    ] {
        let entry = Entry {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        };
        let id = keys.node_id(key).unwrap();
        assert_eq!(admission.admit(&id, &entry).is_err(), is_refused, "{key}");
    }
}

/// What holds for nodes of this crate holds for others too.
#[test]
fn filter_networks_and_ports_hold_for_every_format() {
    use crate::discovery::NodeFilter;

    let kratos = |version: &str, port: u16| Entry {
        key: "/microservices/billing/1".to_owned(),
        value: json!({ "version": version, "endpoints": [format!("http://10.0.0.1:{port}")] })
            .to_string()
            .into_bytes(),
        create_revision: 1,
        mod_revision: 1,
        lease: None,
    };
    let admission = Admission {
        decoders: places(&Registry::new(Format::Kratos)).decoders("billing"),
        filter: NodeFilter::new().tag("v2"),
        ports: crate::discovery::admission::parse_ports(&["8000".to_owned()]).unwrap(),
        networks: vec!["10.0.0.0/8".parse().unwrap()],
        ..Admission::default()
    };
    let admitted = |version, port| admission.admit("1", &kratos(version, port));
    admitted("v2", 8_000).unwrap();
    assert_eq!(admitted("v1", 8_000).unwrap_err(), Refusal::Unwanted);
    let refusal = admitted("v2", 8_001).unwrap_err();
    assert!(matches!(refusal, Refusal::NotAllowed(_)), "{refusal:?}");
}
