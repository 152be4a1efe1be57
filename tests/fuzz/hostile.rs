//! Deliberate attacks: inputs as large as the limits allow, and as many as anybody can write. They run
//! one at a time, so that memory can be measured exactly.

use std::fmt::Write as _;
use std::time::Duration;

use pingora_etcd::config::ClusterConfig;
use pingora_etcd::discovery::fuzzing::Group;
use pingora_etcd::discovery::{EntryLimits, NodeFilter, SelfPreservation};
use pingora_etcd::store::{Entry, LeaseId, WatchEvent};

use crate::{MEMORY, SLOWEST, worked};

const KIB: usize = 1 << 10;

/// Runs all attacks, and prints their cost.
pub(crate) fn all() {
    largest_entries();
    listed_giants();
    malformed_keys();
    flood();
    yaml();
}

fn group(limits: EntryLimits) -> Group {
    let preserve = SelfPreservation::default();
    Group::new(limits, NodeFilter::new(), &[], &[], preserve).unwrap()
}

fn entry(key: String, value: Vec<u8>, revision: i64) -> Entry {
    Entry {
        key,
        value,
        create_revision: revision,
        mod_revision: revision,
        lease: Some(LeaseId(revision)),
    }
}

/// The result of a call, the memory that it leaves behind, and the most that it held.
fn measured<T>(call: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let answer = call();
    let left = MEMORY.current_usage().saturating_sub(before);
    (answer, left, MEMORY.peak_usage().saturating_sub(before))
}

/// A name, and the value of the entry with this index.
type Kind = (&'static str, Box<dyn Fn(usize) -> Vec<u8>>);

/// An entry that is filled with parts up to the limits.
fn fill(id: usize, head: &str, part: &dyn Fn(usize) -> String, tail: &str) -> Vec<u8> {
    let EntryLimits {
        value_bytes,
        values,
        ..
    } = EntryLimits::default();
    let mut text = format!(r#"{{"id":"h{id}","ip":"10.0.0.1",{head}"#);
    let mut count = 12;
    for at in 0.. {
        let part = part(at);
        // Counted as the limits do.
        count += 1 + part.matches(['[', '{']).count();
        if count > values || text.len() + part.len() + tail.len() + 2 > value_bytes {
            break;
        }
        if at > 0 {
            text.push(',');
        }
        text += &part;
    }
    (text + tail).into_bytes()
}

/// Values that are just allowed, of the kinds that grow most in memory.
fn largest_values() -> Vec<Kind> {
    let value_bytes = EntryLimits::default().value_bytes;
    let long = "x".repeat(value_bytes - 100);
    let deep = format!("{}1{}", "[".repeat(28), "]".repeat(28));
    vec![
        (
            "one long text",
            Box::new(move |id| {
                format!(r#"{{"id":"h{id}","ip":"10.0.0.1","zone":"{long}"}}"#).into_bytes()
            }),
        ),
        (
            "many numbers",
            Box::new(move |id| {
                fill(
                    id,
                    r#""metadata":{"#,
                    &|at| format!(r#""k{at:05}":9e15"#),
                    "}}",
                )
            }),
        ),
        (
            "many tags",
            Box::new(move |id| fill(id, r#""tags":["#, &|at| format!(r#""t{at:055}""#), "]}")),
        ),
        (
            "many short keys",
            Box::new(move |id| fill(id, r#""metadata":{"#, &|at| format!(r#""{at:x}":[]"#), "}}")),
        ),
        (
            "a long number",
            Box::new(move |id| {
                format!(
                    r#"{{"id":"h{id}","ip":"10.0.0.1","weight":0.{}}}"#,
                    "7".repeat(value_bytes - 100)
                )
                .into_bytes()
            }),
        ),
        (
            "long numbers",
            Box::new(move |id| {
                fill(
                    id,
                    r#""metadata":["#,
                    &|at| format!("0.{at}{}", "7".repeat(55)),
                    "]}",
                )
            }),
        ),
        (
            "deep lists",
            Box::new(move |id| {
                fill(
                    id,
                    r#""metadata":["#,
                    &|at| {
                        if at < 30 {
                            deep.clone()
                        } else {
                            "1".to_owned()
                        }
                    },
                    "]}",
                )
            }),
        ),
        (
            "escapes",
            Box::new(move |id| {
                fill(
                    id,
                    r#""metadata":["#,
                    &|_| format!(r#""{}""#, r"\u0001".repeat(9)),
                    "]}",
                )
            }),
        ),
    ]
}

/// The largest entries that are allowed.
fn largest_entries() {
    const ENTRIES: usize = 200;
    let EntryLimits {
        value_bytes,
        values,
        ..
    } = EntryLimits::default();
    // What may be kept of one entry: its texts, and a few machine words for each value.
    let most = 2 * value_bytes + 256 * values + 4 * KIB;
    for (name, value) in largest_values() {
        let mut group = group(EntryLimits::default());
        let mut longest = 0;
        let mut slowest = Duration::ZERO;
        let ((), left, _) = measured(|| {
            for id in 0..ENTRIES {
                let value = value(id);
                longest = longest.max(value.len());
                let put = entry(format!("registry/g/h{id}"), value, id as i64 + 1);
                let begun = worked();
                drop(group.apply(&[WatchEvent::Put(put)]));
                slowest = slowest.max(worked() - begun);
            }
        });
        assert_eq!(
            group.nodes().len(),
            ENTRIES,
            "{name}: {:?}",
            group.rejected_entries()
        );
        let ((), read, _) = measured(|| {
            for node in group.nodes().iter() {
                assert!(!node.metadata.is_boolean());
            }
        });
        let (kept, read) = (left / ENTRIES, (left + read) / ENTRIES);
        println!(
            "hostile: {name}: {longest} bytes in {} us, {kept} kept, {read} once its metadata is read as a value, {most} allowed",
            slowest.as_micros()
        );
        assert!(read <= most, "{name}");
        assert!(slowest < SLOWEST, "{name}: {slowest:?}");
    }
}

/// A listing of candidates whose values are as long as etcd allows.
fn listed_giants() {
    let mut group = group(EntryLimits::default());
    let page = |page: i64| {
        let entries = (0..4).map(move |at| {
            let revision = page * 4 + at + 1;
            let key = format!("election/g/{revision:08x}");
            entry(key, vec![b'x'; 1_000_000], revision)
        });
        entries.collect::<Vec<_>>()
    };
    let (changes, left, peak) = measured(|| group.list([], (0..200).map(page), 900));
    drop(changes);
    println!(
        "hostile: 800 candidates of a megabyte in a listing: at most {} KiB held, {} KiB left",
        peak / KIB,
        left / KIB
    );
    assert!(peak < 16 * KIB * KIB && group.sizes().queue == 0);
}

/// Malformed entries whose keys are longer than allowed.
fn malformed_keys() {
    let mut group = group(EntryLimits::default());
    let ((), left, _) = measured(|| {
        for at in 0..20_000_i64 {
            let key = format!("registry/g/{at}-{}", "k".repeat(8 * KIB));
            drop(group.apply(&[WatchEvent::Put(entry(key, b"{".to_vec(), at + 1))]));
        }
    });
    let sizes = group.sizes();
    println!(
        "hostile: 20000 malformed keys of 8 KiB: {} remembered, in {} KiB",
        sizes.logged,
        left / KIB
    );
    assert!(sizes.logged <= 10_000 && left < 1_024 * KIB);
    assert_eq!(group.rejected_entries().total(), 20_000);
}

/// Nodes that come and go as fast as possible, each with its own id.
fn flood() {
    let mut limits = EntryLimits::default();
    limits.nodes = 1_000;
    let mut group = group(limits);
    let mut most = 0;
    let ((), left, peak) = measured(|| {
        for at in 0..100_000_i64 {
            let value = format!(r#"{{"id":"f{at}","ip":"10.0.0.1"}}"#).into_bytes();
            let put = entry(format!("registry/g/f{at}"), value, at + 1);
            let mut events = vec![WatchEvent::Put(put)];
            // Some stay, so that sometimes few nodes leave and sometimes many.
            if at > 700 {
                events.push(WatchEvent::Delete {
                    key: format!("registry/g/f{}", at - 700),
                    revision: at + 1,
                });
            }
            drop(group.apply(&events));
            drop(group.pass(Duration::from_micros(100)));
            most = most.max(group.nodes().len());
        }
    });
    println!(
        "hostile: 100000 nodes come and go in 10 s: at most {most} of 1000 in the view, {} KiB held, {} KiB left",
        peak / KIB,
        left / KIB
    );
    assert!(most <= 1_000 && peak < 16 * KIB * KIB);
}

/// The part of a configuration that must be there.
const HEAD: &str = "cluster:\n  etcd: { endpoints: ['memory://x'] }\n  group: workers\n";

/// A name, the text, and whether it must be refused.
type Document = (&'static str, String, bool);

/// YAML that is much larger than it looks.
fn aliases() -> Vec<Document> {
    let mut laughs = "a0: &a0 ['x']\n".to_owned();
    for at in 1..30 {
        let aliases = vec![format!("*a{}", at - 1); 10].join(", ");
        writeln!(laughs, "a{at}: &a{at} [{aliases}]").unwrap();
    }
    let mut used = format!("{HEAD}  filter:\n    zones: &z0 ['x', 'y']\n");
    for at in 1..30 {
        let aliases = vec![format!("*z{}", at - 1); 10].join(", ");
        writeln!(used, "  zones{at}: &z{at} [{aliases}]").unwrap();
    }
    let mut merges = "b0: &b0 { k: 1 }\n".to_owned();
    for at in 1..200 {
        writeln!(merges, "b{at}: &b{at} {{ <<: *b{}, k{at}: 1 }}", at - 1).unwrap();
    }
    vec![
        ("aliases of aliases", format!("{laughs}{HEAD}"), true),
        ("aliases where lists belong", used, true),
        ("merges of merges", format!("{merges}{HEAD}"), false),
        ("an alias in itself", format!("a: &a [*a]\n{HEAD}"), true),
    ]
}

/// YAML that is very deep, or just large.
fn deep_or_large() -> Vec<Document> {
    let deep = 100_000;
    vec![
        (
            "deep lists",
            format!("{HEAD}  zone: {}1{}\n", "[".repeat(deep), "]".repeat(deep)),
            true,
        ),
        (
            "deep blocks",
            format!("{HEAD}  zone: {}1\n", "- ".repeat(deep)),
            true,
        ),
        (
            "deep objects",
            format!("{HEAD}  zone: {}1\n", "{a: ".repeat(deep)),
            true,
        ),
        (
            "a text of 8 MiB",
            format!("{HEAD}  zone: {}\n", "x".repeat(8 << 20)),
            false,
        ),
        (
            "a number of 1 MiB",
            format!("{HEAD}  retries: {}\n", "9".repeat(1 << 20)),
            true,
        ),
        (
            "a million lines",
            format!("{HEAD}{}", "#\n".repeat(1_000_000)),
            false,
        ),
        (
            "a million fields",
            format!(
                "{HEAD}{}",
                (0..1_000_000).fold(String::new(), |mut text, at| {
                    writeln!(text, "k{at}: 1").unwrap();
                    text
                })
            ),
            false,
        ),
        (
            "\"password\" many times",
            format!("{HEAD}  x: [{}", "password:".repeat(400_000)),
            true,
        ),
    ]
}

fn yaml() {
    for (name, text, is_refused) in aliases().into_iter().chain(deep_or_large()) {
        let begun = worked();
        let (result, _, peak) = measured(|| {
            let result = ClusterConfig::from_yaml(&text, "bomb.yaml").map(drop);
            #[cfg(feature = "pingora")]
            drop(pingora_etcd::config::server_conf(&text, "bomb.yaml"));
            result.map_err(|error| error.to_string())
        });
        let took = worked() - begun;
        let is_accepted = result.is_ok();
        let outcome = match result {
            Ok(()) => "accepted".to_owned(),
            Err(error) => error.replace('\n', " ").chars().take(80).collect(),
        };
        println!(
            "hostile: YAML, {name}, {} KiB: {} ms, {} KiB held, {outcome}",
            text.len() / KIB,
            took.as_millis(),
            peak / KIB
        );
        assert!(!is_refused || !is_accepted, "{name}");
        assert!(took < SLOWEST * 2, "{name} took {took:?}");
        // The parser has a limit of its own: 250,000 nodes.
        assert!(
            peak <= 16 * text.len() + 128 * KIB * KIB,
            "{name}: {peak} bytes"
        );
    }
}
