//! Valid inputs of each kind.

use pingora_etcd::discovery::{EntryTable, Format, Registry, Scheme};
use serde_json::{Map, Value, json};

use crate::mutate::Corpus;

/// The number of node ids in use.
pub(crate) const IDS: usize = 12;

pub(crate) fn id(index: usize) -> String {
    match index % IDS {
        10 => "n \u{e9}\u{1f600}".to_owned(),
        11 => "x".repeat(200),
        index => format!("n{index}"),
    }
}

fn metadatas() -> (Vec<Value>, Vec<Value>) {
    let mut nested = json!(1);
    for level in 0..25 {
        nested = json!({ "level": level, "in": [nested] });
    }
    let wide: Map<_, _> = (0..900)
        .map(|at| (format!("key{at}"), json!(at as f64 / 7.0)))
        .collect();
    let small = vec![
        json!({ "cpu_usage_percent": 45.2, "memory_usage_percent": 30.1, "queue_depth": 3 }),
        json!({ "cpu_usage_percent": 0.1, "memory_usage_percent": 99.99999999999999,
                "memory_available_bytes": u64::MAX, "load_avg_1m": 1.5e-7, "active_connections": 0,
                "requests_per_second": 1234.5678, "queue_depth": 1000000 }),
        json!({ "modèle": "gpt\u{1f600}", "quo\"te": "a\\b\n\u{1}", "": null, "on": true }),
        json!({ "models": ["a", "b", ["c"]], "nested": { "cpu_usage_percent": 1, "deep": [{}] } }),
        json!({ "neg": -5, "min": i64::MIN, "half": -0.5, "big": 1e300, "tiny": 5e-324 }),
        nested,
        json!(null),
        json!([1, 2.5, "x"]),
        json!("text"),
        json!(7),
    ];
    let big = vec![
        Value::Object(wide),
        json!({ "text": "y".repeat(60_000) }),
        json!({ "list": vec![0.1; 1_000] }),
    ];
    (small, big)
}

/// Values of nodes. A small input at `index` has the node id `id(index)`.
pub(crate) fn nodes() -> Corpus {
    let (small, big) = metadatas();
    let weight = |index: usize| match index % 15 {
        3 => json!(0),
        6 => json!(-5),
        9 => json!("0"),
        _ => json!(0.5 + index as f64),
    };
    let full = |index: usize, metadata: &Value| {
        let mut node = json!({ "id": id(index), "ip": format!("10.0.0.{}", index % IDS + 1) });
        // Each field is present in some of the nodes.
        for (field, value, every) in [
            ("last_seen", json!(1_700_000_000_000_u64 + index as u64), 1),
            ("port", json!(8080 + index), 2),
            ("zone", json!(["a", "b", "zone \u{e9}"][index % 3]), 2),
            ("tags", json!(["canary", "x"]), 3),
            ("weight", weight(index), 3),
            ("state", json!("draining"), 7),
            ("priority", json!(index), 4),
            ("leaving", json!(true), 11),
            ("new", json!({ "unknown": [1] }), 5),
        ] {
            if index.is_multiple_of(every) {
                node[field] = value;
            }
        }
        if !metadata.is_null() {
            node["metadata"] = metadata.clone();
        }
        node["ip"] = match index % 9 {
            7 => json!("fd00::7"),
            8 => json!("::ffff:10.1.2.3"),
            _ => node["ip"].clone(),
        };
        node.to_string().into_bytes()
    };
    let mut items = Vec::new();
    for round in 0..4 {
        for index in 0..IDS {
            items.push(full(
                round * IDS + index,
                &small[(round + index) % small.len()],
            ));
        }
    }
    Corpus {
        small: items,
        big: big
            .iter()
            .enumerate()
            .map(|(index, metadata)| full(index, metadata))
            .collect(),
        tokens: &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"id\":",
            "\"ip\":",
            "\"port\":",
            "\"weight\":",
            "\"metadata\":",
            "\"tags\":",
            "\"state\":",
            "\"serving\"",
            "\"DRAINING\"",
            "\"0.0.0.0\"",
            "null",
            "\"leaving\":true",
            "\"id\":\"n1\"",
            " ",
        ],
        is_json: true,
    }
}

pub(crate) fn metadata() -> Corpus {
    let (small, big) = metadatas();
    let text = |values: Vec<Value>| {
        let text = values.iter().map(|value| value.to_string().into_bytes());
        text.collect::<Vec<_>>()
    };
    Corpus {
        small: text(small),
        big: text(big),
        tokens: &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"cpu_usage_percent\":",
            "\"queue_depth\":",
            "\"a\":1",
            " ",
            "null",
            "false",
        ],
        is_json: true,
    }
}

/// The JSON in a snapshot file.
/// The registry of an entry in [`entries`], and the prefix of its keys.
pub(crate) fn registry(index: usize) -> (Registry, String) {
    let custom: EntryTable = serde_json::from_value(json!({
        "require": [{ "at": "/kind", "is": ["web", 7, true] }],
        "address": ["/url", { "host": "/Host", "port": "/Port" }],
        "weight": { "at": "/Weight", "default": 100, "zero": "drain" },
        "zone": "/MetadataX/zone", "tags": ["/version", "/labels"], "metadata": "/MetadataX",
        "metrics": { "queue_depth": { "at": "/load/0" } }, "drain": [{ "at": "/Enable", "is": [false] }],
    }))
    .unwrap();
    let (registry, prefix) = match index % 7 {
        0 => (Registry::new(Format::Grpc), "g/"),
        1 => (Registry::new(Format::GoZero), "g/"),
        2 => (
            Registry::new(Format::Kratos).scheme(Scheme::Grpc),
            "/microservices/g/",
        ),
        3 => (Registry::new(Format::Cloudwego), "hertz/registry-etcd/g/"),
        4 => (Registry::new(Format::GoMicro), "/micro/registry/g/"),
        5 => (
            Registry::new(Format::Goframe),
            "/service/default/default/g/",
        ),
        _ => (Registry::custom("p/", custom), "p/"),
    };
    (registry, prefix.to_owned())
}

pub(crate) fn entries() -> Corpus {
    let small = [
        r#"{"Op":0,"Addr":"10.2.0.7:7443","Metadata":{"a":[1,null]}}"#,
        "[fd00::7]:8080",
        r#"{"id":"1","name":"g","version":"v1","metadata":{"weight":"20"},"endpoints":["http://10.2.0.7:8000","grpc://10.2.0.7:9000?isSecure=false"]}"#,
        r#"{"network":"tcp","address":"fd00::7:8888","weight":10,"tags":{"zone":"a"}}"#,
        r#"{"name":"g","version":"latest","metadata":null,"endpoints":[{"request":{"values":[]}}],"nodes":[{"metadata":{"protocol":"grpc"},"id":"x","address":"10.2.0.7:43211"}]}"#,
        r#"{"protocol":"http","insecure":true,"weight":3}"#,
        r#"{"kind":7,"Host":"fd00::1","Port":"8080","Weight":5,"Enable":true,"version":"v2","labels":["a",1],"load":[3],"MetadataX":{"zone":"a"}}"#,
    ];
    let small = small.map(|text| text.as_bytes().to_vec());
    Corpus {
        small: small.into(),
        big: Vec::new(),
        tokens: &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"Addr\":",
            "\"weight\":0",
            "grpc://",
            "[::]:80",
            "db.test:1",
            "null",
        ],
        is_json: true,
    }
}

pub(crate) fn snapshots() -> Corpus {
    let nodes = nodes();
    let file = |nodes: &[Vec<u8>]| {
        let stored: Vec<Value> = nodes
            .iter()
            .enumerate()
            .map(|(at, node)| {
                let node: Value = serde_json::from_slice(node).unwrap();
                json!({ "incarnation": at as i64 - 1, "node": node })
            })
            .collect();
        json!({ "group": "g", "key_prefix": "", "cluster_id": u64::MAX, "revision": 7,
                "written": 1_700_000_000_000_u64, "nodes": stored })
        .to_string()
        .into_bytes()
    };
    Corpus {
        small: vec![
            file(&[]),
            file(&nodes.small[..1]),
            file(&nodes.small[1..4]),
            file(&nodes.small[4..12]),
            file(&nodes.small[20..22]),
        ],
        big: vec![
            file(&[&nodes.small[..], &nodes.small].concat()),
            file(&nodes.big[..1]),
        ],
        tokens: &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"group\":\"g\"",
            "\"written\":",
            "\"nodes\":",
            "\"incarnation\":",
            "\"node\":",
            "\"id\":\"n1\"",
            "pingora-etcd snapshot 1\n",
            "pingora-etcd snapshot 2\n",
        ],
        is_json: true,
    }
}

pub(crate) fn reports() -> Corpus {
    let texts = [
        "TEXT cpu_utilization=0.3,mem_utilization=0.5,application_utilization=0.7,rps_fractional=10",
        "TEXT cpu_utilization:0.3, named_metrics.queue_depth:12 ,named_metrics.in_flight: 4",
        "TEXT cpu_utilization=0.25,named_metrics.sampled_at=1700000000000",
        "TEXT ,,named_metrics.queue_depth=3,",
        "TEXT ",
        "  TEXT mem_utilization=1",
        r#"JSON {"cpu_utilization": 0.3, "named_metrics": {"in_flight": 7, "queue_depth": 2}}"#,
        r#"JSON {"mem_utilization":1,"application_utilization":0.4,"named_metrics.queue_depth":3,"utilization":{"x":0.5}}"#,
        r#"JSON {"named_metrics":{"sampled_at":1700000000000.0,"queue_depth":null}}"#,
        "JSON {}",
    ];
    let long = format!("TEXT {}", "rps_fractional=1,".repeat(238));
    Corpus {
        small: texts.map(|text| text.as_bytes().to_vec()).into(),
        big: vec![long.into_bytes()],
        tokens: &[
            "TEXT ",
            "JSON ",
            "BIN ",
            "=",
            ",",
            ":",
            "{",
            "}",
            "cpu_utilization=",
            "application_utilization=",
            "mem_utilization",
            "named_metrics.",
            "named_metrics.queue_depth=",
            "named_metrics.in_flight=",
            "named_metrics.sampled_at=",
            "\"named_metrics\":",
        ],
        is_json: false,
    }
}

pub(crate) fn yaml() -> Corpus {
    let files = [
        include_str!("../../config/demo.yaml"),
        include_str!("../../config/leader_routing.yaml"),
        include_str!("../../config/load_balancer.yaml"),
    ];
    let least = "version: 1\nthreads: 2\ncluster:\n  etcd: { endpoints: ['memory://x'] }\n  group: workers\n";
    let mut small: Vec<String> = [
        "",
        "  policy: headroom\n  headroom: { cpu: 1, memory: 0.5, queue: .25, floor: 0.05 }\n",
        "  filter: { zones: [a, b], tags: [canary] }\n  allowed_networks: ['10.0.0.0/8', '::1']\n  allowed_ports: [80, '9000-9100']\n",
        "  limits: { key_bytes: 100, value_bytes: 1000, depth: 4, values: 100, nodes: 50 }\n  hash_on: header:X-User\n  policy: consistent\n",
        "  zone: a\n  zones: { least_spill: 0.1 }\n  listen: '[::1]:80'\n  self_preservation: { enabled: false }\n",
        "  zone: &z a\n  filter: { zones: [*z, *z] }\n  load_reports: yes\n",
    ]
    .map(|rest| format!("{least}{rest}"))
    .into();
    small.push(least.replace(
        "['memory://x'] }",
        "['http://h:2379'], user: u, password: 'p' }",
    ));
    small.push(format!("---\n{least}...\n"));
    // Without their comments the files are parsed three times as fast.
    small.extend(files.iter().map(|file| {
        let lines = file
            .lines()
            .map(|line| line.split(" #").next().unwrap_or(""));
        let lines = lines.filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        lines.map(|line| format!("{}\n", line.trim_end())).collect()
    }));
    Corpus {
        small: small.into_iter().map(String::into_bytes).collect(),
        big: files.map(|file| file.as_bytes().to_vec()).into(),
        tokens: &[
            "&a ",
            "*a",
            "&a [*a]",
            "<<: *a",
            "!!binary ",
            "!!str ",
            "!x ",
            "? ",
            ": ",
            "- ",
            "|\n",
            ">-\n",
            "---\n",
            "...\n",
            "%YAML 1.2\n",
            "%TAG ! x\n",
            "\t",
            "'",
            "\"",
            "{",
            "}",
            "[",
            "]",
            "# ",
            "\n  ",
            "\n    ",
            "~",
            "yes",
            "cluster:",
            "  group: ",
            "  zone: ",
            "[*a,*a,*a,*a,*a,*a,*a,*a]",
        ],
        is_json: false,
    }
}

pub(crate) fn candidates() -> Corpus {
    Corpus {
        small: (0..IDS).map(|index| id(index).into_bytes()).collect(),
        big: vec![b"n".repeat(512), b"n".repeat(513), b"n".repeat(100_000)],
        tokens: &["n1", "n2", "n", "election/", "registry/"],
        is_json: false,
    }
}

/// PROXY headers of both versions, each followed by the start of a request.
pub(crate) fn proxy_headers() -> Corpus {
    let signature = b"\r\n\r\n\0\r\nQUIT\n";
    let v2 = |command: u8, family: u8, rest: &[u8]| {
        let length = u16::try_from(rest.len()).unwrap_or(u16::MAX).to_be_bytes();
        [signature, &[0x20 | command, family][..], &length, rest].concat()
    };
    let v4 = [192, 0, 2, 7, 192, 0, 2, 8, 0x13, 0x88, 0x20, 0xfb];
    let v6 = [[0x20; 32].as_slice(), &[0x13, 0x88, 0x01, 0xbb]].concat();
    let with_values = [&v4[..], &[0x04, 0, 3, 1, 2, 3, 0x05, 0, 1, 9]].concat();
    let headers = [
        b"PROXY TCP4 192.0.2.7 192.0.2.8 5000 8443\r\n".to_vec(),
        b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n".to_vec(),
        b"PROXY UNKNOWN\r\n".to_vec(),
        b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(),
        v2(1, 0x11, &v4),
        v2(1, 0x21, &v6),
        v2(1, 0x12, &v4),
        v2(0, 0, &[]),
        v2(1, 0x11, &with_values),
    ];
    let long = v2(1, 0x11, &[&v4[..], &[0; 3_000]].concat());
    Corpus {
        small: headers
            .into_iter()
            .flat_map(|header| {
                let with_request = [&header[..], b"GET / HTTP/1.1\r\n"].concat();
                [header, with_request]
            })
            .collect(),
        big: vec![long],
        tokens: &[
            "PROXY ", "TCP4 ", "TCP6 ", "\r\n", " ", "QUIT\n", "\0", "0", "65536",
        ],
        is_json: false,
    }
}

/// What clients send: one or several requests each.
pub(crate) fn connections() -> Corpus {
    let text = |text: &str| text.replace('\n', "\r\n").into_bytes();
    let mut small: Vec<_> = [
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET /?q=%20 HTTP/1.0\n\n",
        "GET / HTTP/1.0\nConnection: keep-alive\n\n",
        "HEAD /x HTTP/1.1\nHost: a\nConnection: close\n\n",
        "POST / HTTP/1.1\nHost: a\nContent-Length: 5\n\nhello",
        "POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n",
        "PUT / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\nTrailer: t\n\n1;x=y\nh\n0\nt: 1\n\n",
        "POST / HTTP/1.1\nHost: a\nExpect: 100-continue\nContent-Length: 3\n\nabc",
        "GET http://a/path HTTP/1.1\nHost: a\n\n",
        "OPTIONS * HTTP/1.1\nHost: a\n\n",
        "CONNECT a:443 HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n\n",
        "GET / HTTP/1.1\nHost: a\nX-Forwarded-For: 1.2.3.4, 5.6.7.8\nx_leader_epoch: 9\n\n",
        "GET /1 HTTP/1.1\nHost: a\n\nGET /2 HTTP/1.1\nHost: a\n\nGET /3 HTTP/1.1\nHost: a\n\n",
    ]
    .map(text)
    .into();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // SETTINGS, then HEADERS that end the stream: GET, http, /, and the authority "a".
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let head = [0, 0, 6, 1, 5, 0, 0, 0, 1, 0x82, 0x86, 0x84, 0x41, 1, b'a'];
    let going = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    small.push([&preface[..], &settings, &head].concat());
    small.push([&preface[..], &settings, &head, &going].concat());
    Corpus {
        small,
        big: vec![text(&format!(
            "GET / HTTP/1.1\nHost: a\nx: {}\n\n",
            "y".repeat(60_000)
        ))],
        tokens: &[
            "GET ",
            "HTTP/1.1",
            "\r\n",
            "\r\n\r\n",
            "Host: b\r\n",
            "Content-Length: 0\r\n",
            "Content-Length: 5\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Connection: close\r\n",
            "Connection: keep-alive\r\n",
            "0\r\n\r\n",
            " ",
            ":",
            "\t",
            "\0",
            "\n",
            "ffffffffffffffff",
        ],
        is_json: false,
    }
}
