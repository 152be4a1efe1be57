//! Inputs: valid ones, and what becomes of them.

use fastrand::Rng;
use serde_json::{Map, Value, json};

/// Longer ones are cut: four times the default limit of an entry.
const LONGEST: usize = 262_144;

const NUMBERS: &[&str] = &[
    "1e999",
    "-1e999",
    "-0",
    "-0.0",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "9223372036854775808",
    "1e-400",
    "4.9e-324",
    "2.2250738585072011e-308",
    "1.7976931348623157e308",
    "NaN",
    "Infinity",
    "-inf",
    ".inf",
    "0x10",
    "0o7",
    "1_000",
    "00",
    "+1",
    "65536",
    "65535",
    "0",
    "-1",
    "9e15",
    "0.1",
    "0.30000000000000004",
    "1.0000000000000002",
    "1e",
    "1.",
    "null",
    "true",
    "\"1\"",
    "[]",
    "{}",
];

const TEXTS: &[&str] = &[
    "",
    "/",
    "..",
    "a/b",
    "\u{0}",
    "\u{7f}",
    "\n",
    "\r\n",
    "\u{202e}gro",
    "\u{feff}",
    "\u{1f600}",
    "e\u{301}",
    "\u{10ffff}",
    "\\u0000",
    "\\ud800",
    "\\ud83d\\ude00",
    "\\",
    "\"",
    "::1",
    "::ffff:169.254.169.254",
    "255.255.255.255",
    "fe80::1%eth0",
    "10.0.0.1",
    "cpu_usage_percent",
    "leaving",
];

const BAD_UTF8: &[&[u8]] = &[
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\x80",
];

/// Valid inputs of one kind, and what is put into them.
pub(crate) struct Corpus {
    pub(crate) small: Vec<Vec<u8>>,
    /// Taken once in fifty times, because they take that much longer.
    pub(crate) big: Vec<Vec<u8>>,
    pub(crate) tokens: &'static [&'static str],
    pub(crate) is_json: bool,
}

impl Corpus {
    /// An input, and which of the small ones it comes from, if it is mostly that.
    pub(crate) fn next(&self, rng: &mut Rng) -> (Option<usize>, Vec<u8>) {
        let chance = rng.u8(..100);
        if chance < 3 {
            let length = rng.usize(..300);
            return (None, (0..length).map(|_| rng.u8(..)).collect());
        }
        if chance < 6 {
            let mut bytes = Vec::new();
            for _ in 0..rng.usize(..40) {
                self.token(rng, &mut bytes);
            }
            return (None, bytes);
        }
        let (index, mut bytes) = if !self.big.is_empty() && rng.u8(..50) == 0 {
            (None, rng.choice(&self.big).cloned().unwrap_or_default())
        } else {
            let index = rng.usize(..self.small.len());
            (Some(index), self.small[index].clone())
        };
        if chance < 20 {
            return (index, bytes);
        }
        // Two thirds of the JSON stay JSON, so that what is behind the parser is reached.
        if self.is_json && rng.u8(..3) != 0 {
            if let Ok(mut value) = serde_json::from_slice(&bytes) {
                for _ in 0..=rng.usize(..2) {
                    alter(&mut value, rng);
                }
                bytes = value.to_string().into_bytes();
            }
            if rng.u8(..6) == 0 {
                replace_number(&mut bytes, rng);
            }
        } else {
            self.mutate(&mut bytes, rng);
            for _ in 0..7 {
                if rng.u8(..3) != 0 {
                    break;
                }
                self.mutate(&mut bytes, rng);
            }
        }
        bytes.truncate(LONGEST);
        (index, bytes)
    }

    fn token(&self, rng: &mut Rng, bytes: &mut Vec<u8>) {
        let lists = [self.tokens, NUMBERS, TEXTS];
        match rng.usize(..8) {
            0 => bytes.extend(rng.choice(BAD_UTF8).copied().unwrap_or_default()),
            1 => bytes.extend(rng.choice(NUMBERS).unwrap_or(&"").bytes()),
            2 => bytes.extend(rng.choice(TEXTS).unwrap_or(&"").bytes()),
            3 => {
                let list = rng.choice(lists).unwrap_or(NUMBERS);
                bytes.extend(rng.choice(list).unwrap_or(&"").bytes());
            }
            _ => bytes.extend(rng.choice(self.tokens).unwrap_or(&"").bytes()),
        }
    }

    fn mutate(&self, bytes: &mut Vec<u8>, rng: &mut Rng) {
        let length = bytes.len();
        let at = rng.usize(..=length);
        match rng.u8(..16) {
            0 | 1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << rng.u8(..8);
                }
            }
            2 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = rng.u8(..);
                }
            }
            3 => {
                let new: Vec<u8> = (0..=rng.usize(..8)).map(|_| rng.u8(..)).collect();
                bytes.splice(at..at, new);
            }
            4 => {
                let end = length.min(at + 1 + rng.usize(..16));
                bytes.drain(at..end);
            }
            5 => bytes.truncate(at),
            6 => {
                // The head of this one and the tail of another.
                let other = rng.choice(&self.small).cloned().unwrap_or_default();
                bytes.truncate(at);
                bytes.extend(&other[rng.usize(..=other.len())..]);
            }
            7 => {
                let end = length.min(at + 1 + rng.usize(..200));
                let block = bytes[at..end].to_vec();
                let most = if rng.u8(..40) == 0 { 400 } else { 8 };
                let times = rng.usize(1..=most).min(LONGEST / block.len().max(1));
                bytes.splice(at..at, block.repeat(times));
            }
            8 | 9 => replace_number(bytes, rng),
            10 | 11 => {
                let mut token = Vec::new();
                self.token(rng, &mut token);
                bytes.splice(at..at, token);
            }
            12 => {
                let deep = deep(rng);
                let (open, close) = if rng.bool() {
                    ("[", "]")
                } else {
                    ("{\"a\":", "}")
                };
                let mut text = open.repeat(deep);
                text.push('1');
                // Now and then it is not closed.
                if rng.u8(..4) != 0 {
                    text += &close.repeat(deep);
                }
                bytes.splice(at..at, text.into_bytes());
            }
            13 => {
                // What is between quotes becomes something else.
                if let Some(open) = find(bytes, at, b'"')
                    && let Some(close) = find(bytes, open + 1, b'"')
                {
                    let text = text(rng);
                    bytes.splice(open + 1..close, text.into_bytes());
                }
            }
            14 => {
                // A line comes twice, goes, or goes in deeper.
                let start = find(bytes, at, b'\n').map_or(0, |at| at + 1);
                let end = find(bytes, start, b'\n').map_or(length, |at| at + 1);
                let line = bytes[start..end].to_vec();
                match rng.u8(..3) {
                    0 => drop(bytes.splice(start..start, line)),
                    1 => drop(bytes.drain(start..end)),
                    _ => drop(bytes.splice(start..start, *b"  ")),
                }
            }
            _ => {
                // What comes after a colon becomes something else.
                if let Some(colon) = find(bytes, at, b':') {
                    let is_end = |byte: &u8| matches!(byte, b',' | b'\n' | b'}');
                    let rest = bytes[colon..].iter().position(is_end);
                    let end = rest.map_or(length, |rest| colon + rest);
                    let mut new = b": ".to_vec();
                    self.token(rng, &mut new);
                    bytes.splice(colon..end, new);
                }
            }
        }
        bytes.truncate(LONGEST);
    }
}

fn find(bytes: &[u8], from: usize, byte: u8) -> Option<usize> {
    let rest = bytes.get(from..)?;
    Some(from + rest.iter().position(|other| *other == byte)?)
}

fn replace_number(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = rng.usize(..=bytes.len());
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let Some(start) = bytes[at..].iter().position(is_digit) else {
        return;
    };
    let start = at + start;
    let is_number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'-' | b'e' | b'E' | b'+');
    let length = bytes[start..]
        .iter()
        .position(|byte| !is_number(byte))
        .unwrap_or(bytes.len() - start);
    let new = match rng.u8(..8) {
        0 => "9".repeat(rng.usize(1..=2_000)),
        1 => format!("0.{}1", "0".repeat(rng.usize(1..=1_000))),
        2 => f64::from_bits(rng.u64(..)).to_string(),
        _ => (*rng.choice(NUMBERS).unwrap_or(&"0")).to_owned(),
    };
    bytes.splice(start..start + length, new.into_bytes());
}

fn deep(rng: &mut Rng) -> usize {
    match rng.u8(..80) {
        0 => rng.usize(1_000..20_000),
        1..10 => rng.usize(100..200),
        _ => rng.usize(1..40),
    }
}

fn text(rng: &mut Rng) -> String {
    match rng.u8(..64) {
        0 => "x".repeat(rng.usize(..100_000)),
        1..4 => "\u{1f600}".repeat(rng.usize(..500)),
        4..8 => (0..rng.usize(..40)).map(|_| rng.char(..)).collect(),
        8 => "\\u0001".repeat(rng.usize(..2_000)),
        _ => (*rng.choice(TEXTS).unwrap_or(&"")).to_owned(),
    }
}

/// Something else of the same text, still JSON.
fn alter(value: &mut Value, rng: &mut Rng) {
    match value {
        Value::Object(fields) if !fields.is_empty() && rng.u8(..5) != 0 => {
            let at = rng.usize(..fields.len());
            let key = fields.keys().nth(at).cloned().unwrap_or_default();
            match rng.u8(..10) {
                0 => drop(fields.remove(&key)),
                1 => {
                    let moved = fields.remove(&key).unwrap_or_default();
                    fields.insert(text(rng), moved);
                }
                2 => {
                    let most = if rng.u8(..32) == 0 { 2_000 } else { 20 };
                    let new = copies(leaf(rng), rng.usize(..most));
                    for (index, value) in new.enumerate() {
                        fields.insert(format!("{}{index}", text_of_key(rng)), value);
                    }
                }
                _ => alter(fields.get_mut(&key).unwrap_or(&mut Value::Null), rng),
            }
        }
        Value::Array(values) if !values.is_empty() && rng.u8(..5) != 0 => {
            let at = rng.usize(..values.len());
            match rng.u8(..4) {
                0 => drop(values.remove(at)),
                1 => {
                    let most = if rng.u8(..32) == 0 { 2_000 } else { 20 };
                    values.extend(copies(values[at].clone(), rng.usize(..most)));
                }
                _ => alter(&mut values[at], rng),
            }
        }
        other => {
            *other = match rng.u8(..6) {
                0 => {
                    let mut inner = other.take();
                    for _ in 0..deep(rng).min(120) {
                        inner = if rng.bool() {
                            json!([inner])
                        } else {
                            json!({ "a": inner })
                        };
                    }
                    inner
                }
                _ => leaf(rng),
            }
        }
    }
}

/// As many as are not too long together.
fn copies(value: Value, count: usize) -> impl Iterator<Item = Value> {
    let length = value.to_string().len().max(1);
    std::iter::repeat_n(value, count.min(LONGEST / length))
}

fn text_of_key(rng: &mut Rng) -> &'static str {
    rng.choice(["", "k", "named_metrics.", "\u{e9}"])
        .unwrap_or("")
}

fn leaf(rng: &mut Rng) -> Value {
    match rng.u8(..12) {
        0 => Value::Null,
        1 => rng.bool().into(),
        2 => rng.u64(..).into(),
        3 => rng.i64(..).into(),
        4 => f64::from_bits(rng.u64(..)).into(),
        5 => (rng.f64() * 100.0).into(),
        6 => rng.u16(..).into(),
        7 => json!([]),
        8 => json!({}),
        _ => text(rng).into(),
    }
}

/// Ids that nodes have here.
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

/// Values of nodes; the node of a small one is `id(index)`.
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
        // Each part of them is there in some.
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

/// What is between the first and the last line of a snapshot file.
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
    // Without what is said about them the files are parsed three times as fast.
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
