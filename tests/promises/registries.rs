//! Tests of fleets that are registered in etcd by others: the entries are the bytes that their writers put there.

use etcd_client::{Client, PutOptions};
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::{free_port, group};
use super::echo::{EchoClient, EchoServer};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Balancer, Setup, until};

/// A registry as its writers use it.
struct Case {
    name: &'static str,
    /// The fields of `registry`.
    fields: fn(&str) -> String,
    /// The key and the value of a process at this port.
    entry: fn(group: &str, port: u16) -> (String, String),
}

const HTTP: [Case; 6] = [
    Case {
        name: "kratos",
        fields: |_| "format: kratos, scheme: http".to_owned(),
        entry: |group, port| {
            let value = json!({
                "id": "0b9c2f7e", "name": group, "version": "v1.4.0", "metadata": { "weight": "20" },
                "endpoints": [format!("grpc://127.0.0.1:{}", port - 1), format!("http://127.0.0.1:{port}")],
            });
            (
                format!("/microservices/{group}/0b9c2f7e"),
                value.to_string(),
            )
        },
    },
    Case {
        name: "hertz",
        fields: |_| "format: cloudwego".to_owned(),
        entry: |group, port| {
            let value = format!(
                r#"{{"network":"tcp","address":"127.0.0.1:{port}","weight":10,"tags":null}}"#
            );
            (
                format!("hertz/registry-etcd/{group}/127.0.0.1:{port}"),
                value,
            )
        },
    },
    Case {
        name: "micro",
        fields: |_| "format: go-micro".to_owned(),
        entry: |group, port| {
            // It describes the types of every handler in each entry.
            let described: Vec<_> = (0..900)
                .map(|field| json!({ "name": field, "values": [] }))
                .collect();
            let value = json!({
                "name": group, "version": "latest", "metadata": null,
                "endpoints": [{ "name": "H.Call", "request": { "values": described }, "metadata": {} }],
                "nodes": [{
                    "metadata": { "protocol": "http", "registry": "etcd" },
                    "id": "x", "address": format!("127.0.0.1:{port}"),
                }],
            });
            (
                format!("/micro/registry/{group}/{group}-5f0c6f2e"),
                value.to_string(),
            )
        },
    },
    Case {
        name: "goframe",
        fields: |_| "format: goframe".to_owned(),
        entry: |group, port| {
            let key = format!("/service/default/default/{group}/latest/127.0.0.1:{port}");
            (key, r#"{"protocol":"http","insecure":true}"#.to_owned())
        },
    },
    Case {
        name: "go-kit",
        fields: |group| {
            format!("format: custom, prefix: /services/{group}/, custom: {{ text: true }}")
        },
        entry: |group, port| {
            let key = format!("/services/{group}/127.0.0.1:{port}");
            (key, format!("http://127.0.0.1:{port}"))
        },
    },
    Case {
        name: "jupiter",
        fields: |group| {
            let table = "address: [/Addr], weight: { at: /MetadataX/weight, default: 100 }, \
                         drain: [{ at: /MetadataX/enable, is: [false] }]";
            format!("format: custom, prefix: 'http:{group}:v1:live/', custom: {{ {table} }}")
        },
        entry: |group, port| {
            let metadata = json!({ "weight": 100, "enable": true, "healthy": true, "zone": "a" });
            let addr = format!("127.0.0.1:{port}");
            let value = json!({ "Op": 0, "Addr": addr, "MetadataX": metadata });
            (format!("http:{group}:v1:live/{addr}"), value.to_string())
        },
    },
];

const GRPC: [Case; 3] = [
    Case {
        name: "naming",
        fields: |_| "format: grpc".to_owned(),
        entry: |group, port| {
            let value = format!(r#"{{"Op":0,"Addr":"127.0.0.1:{port}","Metadata":null}}"#);
            (format!("{group}/127.0.0.1:{port}"), value)
        },
    },
    Case {
        name: "go-zero",
        fields: |_| "format: go-zero".to_owned(),
        entry: |group, port| {
            let key = format!("{group}/7587881234567{port}");
            (key, format!("127.0.0.1:{port}"))
        },
    },
    Case {
        name: "kratos-grpc",
        fields: |_| "format: kratos, scheme: grpc".to_owned(),
        entry: |group, port| {
            let endpoints = json!(["http://127.0.0.1:1", format!("grpc://127.0.0.1:{port}")]);
            let value =
                json!({ "id": "1", "name": group, "metadata": null, "endpoints": endpoints });
            (format!("/microservices/{group}/{port}"), value.to_string())
        },
    },
];

impl Case {
    fn setup(&self, group: &str) -> Setup {
        let registry = (self.fields)(group);
        Setup::shared(group).with(&format!("registry: {{ {registry} }}"))
    }

    /// Registers a process under a lease of its own, which it returns.
    async fn register(&self, etcd: &mut Client, group: &str, port: u16) -> i64 {
        let lease = etcd.lease_grant(60, None).await.unwrap().id();
        let (key, value) = (self.entry)(group, port);
        let options = PutOptions::new().with_lease(lease);
        etcd.put(key, value, Some(options)).await.unwrap();
        lease
    }
}

async fn answer(balancer: &Balancer) -> String {
    let mut client = Raw::to(balancer).await;
    status(&client.get("").await).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_fleets_of_other_registries_are_served_as_they_are() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    for case in HTTP {
        let group = group(case.name);
        let [one, two] = [RawBackend::start(ok).await, RawBackend::start(ok).await];
        let first = case.register(&mut keys, &group, one.address.port()).await;
        // What is beside the prefix is another service.
        let beside = format!("{group}-2");
        case.register(&mut keys, &beside, free_port()).await;
        let balancer = case.setup(&group).listening().await;
        for _ in 0..10 {
            assert_eq!(answer(&balancer).await, "200", "{}", case.name);
        }
        assert_eq!(one.requests().len(), 10, "{}", case.name);
        // A second process comes, and the first one goes.
        let second = case.register(&mut keys, &group, two.address.port()).await;
        until("the second one is used", async || {
            answer(&balancer).await;
            !two.requests().is_empty()
        })
        .await;
        keys.lease_revoke(first).await.unwrap();
        until("only the second one is used", async || {
            let before = two.requests().len();
            for _ in 0..5 {
                assert_eq!(answer(&balancer).await, "200", "{}", case.name);
            }
            two.requests().len() == before + 5
        })
        .await;
        keys.lease_revoke(second).await.unwrap();
        until("nobody is left", async || answer(&balancer).await == "503").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_fleets_of_other_registries_are_spoken_to_in_grpc() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    for case in GRPC {
        let group = group(case.name);
        let server = EchoServer::start("s").await;
        let port = server.address.port();
        case.register(&mut keys, &group, port).await;
        let balancer = case.setup(&group).listening().await;
        let mut client = EchoClient::to(&balancer.url).await;
        assert_eq!(client.call("one").await.unwrap(), "s: one", "{}", case.name);
        // After a lost lease, go-zero is there twice for a while: it stays one backend.
        case.register(&mut keys, &group, port).await;
        assert_eq!(client.call("two").await.unwrap(), "s: two", "{}", case.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_cannot_be_read_is_named_and_harms_no_other() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    let group = group("unreadable");
    let case = &HTTP[0];
    let backend = RawBackend::start(ok).await;
    case.register(&mut keys, &group, backend.address.port())
        .await;
    let bad = format!("/microservices/{group}/bad");
    let value = r#"{"endpoints":["http://db.test:80"]}"#;
    keys.put(bad.clone(), value, None).await.unwrap();
    let balancer = case.setup(&group).listening().await;
    for _ in 0..5 {
        assert_eq!(answer(&balancer).await, "200");
    }
    until("it is in the log", async || {
        let log = balancer.log_text();
        log.contains(&bad) && log.contains("db.test") && log.contains("host names are not resolved")
    })
    .await;
    keys.delete(bad, None).await.unwrap();
}
