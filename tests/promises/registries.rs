//! Tests of fleets that are registered in etcd by others: the entries are the bytes that their writers put there.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use etcd_client::{Client, PutOptions};
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::programs::{COMMAND, optimised};
use super::common::{free_port, group, local};
use super::echo::{EchoClient, EchoServer};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Balancer, Setup, entry, put, scratch, until};

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
        let (beside, other) = (format!("{group}-2"), RawBackend::start(ok).await);
        case.register(&mut keys, &beside, other.address.port())
            .await;
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
        assert!(other.requests().is_empty(), "{}", case.name);
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
    }
}

/// After a lost lease, go-zero is there under two keys for a while. It is one backend, whichever of them goes first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_under_two_keys_is_one_backend() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    for newer_goes_first in [false, true] {
        let group = group("go-zero-twice");
        let servers = [EchoServer::start("a").await, EchoServer::start("b").await];
        let mut leases = Vec::new();
        for (number, server) in [(1, 0), (2, 1), (3, 0)] {
            let lease = keys.lease_grant(60, None).await.unwrap().id();
            let address = servers[server].address.to_string();
            let options = PutOptions::new().with_lease(lease);
            let key = format!("{group}/75878812345678901{number}");
            keys.put(key, address, Some(options)).await.unwrap();
            leases.push(lease);
        }
        let fields = "registry: { format: go-zero }\npolicy: round_robin";
        let balancer = Setup::shared(&group).with(fields).listening().await;
        let mut client = EchoClient::to(&balancer.url).await;
        let mut counted = async || {
            let mut of_a = 0;
            for _ in 0..40 {
                let answer = client.call("x").await.unwrap();
                of_a += u32::from(answer.starts_with('a'));
            }
            of_a
        };
        assert_eq!(counted().await, 20, "two backends, not three");
        let gone = leases.remove(if newer_goes_first { 2 } else { 0 });
        keys.lease_revoke(gone).await.unwrap();
        until("it is still served", async || counted().await == 20).await;
        keys.lease_revoke(leases[if newer_goes_first { 0 } else { 1 }])
            .await
            .unwrap();
        until("the other one is left", async || counted().await == 0).await;
    }
}

/// A fleet that moves: some processes are in the former registry, one is in both, and some are in the new one only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_moves_from_one_registry_to_another() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    let group = group("moving");
    let mut backends = Vec::new();
    for _ in 0..3 {
        backends.push(RawBackend::start(ok).await);
    }
    let [old, both, new] = [0, 1, 2].map(|index| backends[index].address.port());
    let kratos = |port: u16| {
        let endpoints = json!([format!("http://127.0.0.1:{port}")]);
        json!({ "id": "x", "name": "moving", "endpoints": endpoints }).to_string()
    };
    for port in [old, both] {
        let key = format!("/microservices/{group}/{port}");
        keys.put(key, kratos(port), None).await.unwrap();
    }
    for (id, port) in [("both", both), ("new", new)] {
        let entry = entry(id, Some(port), json!({}));
        put(&mut keys, &group, &entry, None).await;
    }
    let fields = "policy: round_robin\nfurther_registries: [{ format: kratos, scheme: http }]";
    let balancer = Setup::shared(&group).with(fields).listening().await;
    let counted = async |count: usize| {
        let before = backends.iter().map(|it| it.requests().len());
        let before: Vec<_> = before.collect();
        for _ in 0..count {
            assert_eq!(answer(&balancer).await, "200");
        }
        let after = backends.iter().zip(before);
        after
            .map(|(it, before)| it.requests().len() - before)
            .collect::<Vec<_>>()
    };
    until("each is one backend", async || {
        counted(30).await == [10, 10, 10]
    })
    .await;
    // The one in both drains where this crate's word counts.
    let draining = entry("both", Some(both), json!({ "state": "draining" }));
    put(&mut keys, &group, &draining, None).await;
    until("it drains", async || counted(20).await == [10, 0, 10]).await;
    // The last one of the former registry goes.
    let key = format!("/microservices/{group}/{old}");
    keys.delete(key, None).await.unwrap();
    until("only the new one is left", async || {
        counted(10).await == [0, 0, 10]
    })
    .await;
    // The command shows the nodes of both, and the ids say where they are.
    let ids = nodes(&balancer);
    let expected = [
        "both".to_owned(),
        format!("kratos:{both}"),
        "new".to_owned(),
    ];
    assert_eq!(ids, expected);
}

/// What `pingora-etcd nodes` prints for the file of a balancer: the ids.
fn nodes(balancer: &Balancer) -> Vec<String> {
    let mut command = Command::new(optimised(COMMAND));
    let printed = command
        .args(["nodes", "--json", "--conf"])
        .arg(&balancer.conf)
        .output()
        .unwrap();
    assert!(printed.status.success(), "{printed:?}");
    let nodes: Vec<Value> = serde_json::from_slice(&printed.stdout).unwrap();
    let mut ids: Vec<_> = nodes
        .iter()
        .map(|node| node["id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_knows_of_other_registries() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    let group = group("command");
    let case = &HTTP[0];
    let backend = RawBackend::start(ok).await;
    case.register(&mut keys, &group, backend.address.port())
        .await;
    // One of the same id in this crate's own registry, which nobody asked for.
    let entry = entry("0b9c2f7e", Some(1), json!({}));
    put(&mut keys, &group, &entry, None).await;
    let balancer = case.setup(&group).listening().await;
    assert_eq!(nodes(&balancer), ["0b9c2f7e"]);
    let mut command = Command::new(optimised(COMMAND));
    let said = command
        .args(["drain", "0b9c2f7e", "--conf"])
        .arg(&balancer.conf)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(
        !said.status.success() && error.contains("cluster.registry"),
        "{error}"
    );
    assert_eq!(answer(&balancer).await, "200");
}

/// A balancer that starts without etcd knows the nodes of each format from its file, and how they are spoken to; but not
/// those of another format.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_format_is_in_the_snapshot_file() {
    let etcd = Etcd::own();
    let mut keys = etcd.raw_client().await;
    let (http, grpc) = (RawBackend::start(ok).await, EchoServer::start("s").await);
    let is_served = async |balancer: &Balancer, is_grpc: bool| match is_grpc {
        true => match tonic::transport::Channel::from_shared(balancer.url.clone())
            .unwrap()
            .connect()
            .await
        {
            Ok(channel) => EchoClient::new(channel).call("x").await.is_ok(),
            Err(_) => false,
        },
        false => match tokio::net::TcpStream::connect(&balancer.listen).await {
            Ok(stream) => status(&Raw(stream).get("").await) == "200",
            Err(_) => false,
        },
    };
    let mut setups = Vec::new();
    for (case, is_grpc) in HTTP
        .iter()
        .map(|case| (case, false))
        .chain(GRPC.iter().map(|case| (case, true)))
    {
        let group = group(case.name);
        let port = if is_grpc {
            grpc.address.port()
        } else {
            http.address.port()
        };
        case.register(&mut keys, &group, port).await;
        let file = scratch(&format!("{group}.nodes"));
        let snapshot = format!(
            "ready_timeout_ms: 300\nsnapshot: {{ file: '{}', interval_ms: 100 }}",
            file.display()
        );
        let setup = Setup::new(etcd.endpoints(), &group).with(&snapshot);
        let registry = (case.fields)(&group);
        let full = setup.clone().with(&format!("registry: {{ {registry} }}"));
        let balancer = full.start();
        until(&format!("{}: it is served", case.name), async || {
            is_served(&balancer, is_grpc).await
        })
        .await;
        until(&format!("{}: there is a file", case.name), async || {
            file.exists()
        })
        .await;
        setups.push((case.name, is_grpc, setup, full));
    }
    etcd.stop();
    for (name, is_grpc, setup, full) in &setups {
        let balancer = full.start();
        until(&format!("{name}: it is served from the file"), async || {
            is_served(&balancer, *is_grpc).await
        })
        .await;
        if *name == "kratos" {
            let other = setup.clone().with("registry: { format: go-micro }").start();
            until("the file is refused", async || {
                other.log_text().contains("snapshot file cannot be used")
            })
            .await;
            assert!(!is_served(&other, false).await);
        }
    }
}

/// A server of DNS, which answers every question for IPv4 with these addresses, for a second.
struct Dns {
    address: SocketAddr,
    /// `None`: it says that it has failed.
    answers: Arc<Mutex<Option<Vec<Ipv4Addr>>>>,
    asked: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Dns {
    async fn start(answers: &[Ipv4Addr]) -> Self {
        let socket = UdpSocket::bind((local(), 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        let answers = Arc::new(Mutex::new(Some(answers.to_vec())));
        let given = answers.clone();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut question = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut question).await {
                count.fetch_add(1, Ordering::Relaxed);
                // RFC 1035: a head of 12 bytes, then the name, which ends with a zero, its type and its class.
                let name = 12
                    + question[12..length]
                        .iter()
                        .position(|byte| *byte == 0)
                        .unwrap();
                let end = name + 5;
                let is_ipv4 = question[name + 2] == 1;
                let given = given.lock().unwrap().clone();
                let failed = u8::from(given.is_none()) * 2;
                let addresses = given.filter(|_| is_ipv4).unwrap_or_default();
                let mut answer = question[..2].to_vec();
                answer.extend([
                    0x81,
                    0x80 | failed,
                    0,
                    1,
                    0,
                    addresses.len() as u8,
                    0,
                    0,
                    0,
                    0,
                ]);
                answer.extend(&question[12..end]);
                for address in addresses {
                    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
                    answer.extend(address.octets());
                }
                let _ = socket.send_to(&answer, client).await;
            }
        });
        Self {
            address,
            answers,
            asked,
            _serving: serving,
        }
    }

    fn answer(&self, answers: Option<&[Ipv4Addr]>) {
        *self.answers.lock().unwrap() = answers.map(<[_]>::to_vec);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_names_are_followed() {
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    let group = group("names");
    let port = free_port();
    let ips = [3, 4, 2].map(|last| Ipv4Addr::new(127, 0, 0, last));
    let mut backends = Vec::new();
    for ip in ips {
        backends.push(RawBackend::start_at((ip, port).into(), ok).await);
    }
    let dns = Dns::start(&ips[..2]).await;
    let key = format!("/services/{group}/1");
    let value = format!("shop.test:{port}");
    keys.put(key, value, None).await.unwrap();
    let setup = |host_names: &str| {
        let registry = format!(
            "registry: {{ format: custom, prefix: /services/{group}/, custom: {{ text: true }}, host_names: {host_names} }}\n\
             name_servers: ['{}']\npolicy: round_robin",
            dns.address
        );
        Setup::shared(&group).with(&registry).start()
    };
    let all = setup("all");
    let first = setup("first");
    let counted = async |balancer: &Balancer| {
        let before = backends.iter().map(|it| it.requests().len());
        let before: Vec<_> = before.collect();
        for _ in 0..10 {
            let Ok(stream) = tokio::net::TcpStream::connect(&balancer.listen).await else {
                return Vec::new();
            };
            Raw(stream).get("").await;
        }
        let after = backends.iter().zip(before);
        after
            .map(|(it, before)| it.requests().len() - before)
            .collect()
    };
    until("all addresses are used", async || {
        counted(&all).await == [5, 5, 0]
    })
    .await;
    until("one address is used", async || {
        counted(&first).await == [10, 0, 0]
    })
    .await;
    dns.answer(Some(&ips));
    until("a new one is used", async || {
        let counted = counted(&all).await;
        counted.iter().all(|count| *count >= 3)
    })
    .await;
    // Once both have asked again.
    let asked = dns.asked.load(Ordering::Relaxed);
    until("it is asked again", async || {
        dns.asked.load(Ordering::Relaxed) > asked + 8
    })
    .await;
    assert_eq!(
        counted(&first).await,
        [10, 0, 0],
        "it stays while it is there"
    );
    // While nothing can be resolved, the last addresses stay.
    dns.answer(None);
    until("it is in the log", async || {
        all.log_text().contains("shop.test")
    })
    .await;
    let used = counted(&all).await;
    assert!(used.iter().all(|count| *count >= 3), "{used:?}");
    dns.answer(Some(&ips[2..]));
    for balancer in [&all, &first] {
        until("only the last one is used", async || {
            counted(balancer).await == [0, 0, 10]
        })
        .await;
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
