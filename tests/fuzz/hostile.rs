//! Attacks on purpose: as large as the limits allow, and as many as anybody can write. One at a
//! time, so that memory can be counted exactly.

use std::fmt::Write as _;
use std::time::Duration;

use pingora_etcd::config::ClusterConfig;
use pingora_etcd::discovery::fuzzing::Group;
use pingora_etcd::discovery::{EntryLimits, NodeFilter, SelfPreservation};
use pingora_etcd::store::{Entry, LeaseId, WatchEvent};

use crate::{MEMORY, SLOWEST, worked};

const KIB: usize = 1 << 10;

/// Runs each, and prints what it cost.
pub(crate) fn all() {
    largest_entries();
    listed_giants();
    malformed_keys();
    flood();
    bombs();
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

/// What a call leaves behind, and the most it holds meanwhile.
fn measured<T>(call: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let answer = call();
    let left = MEMORY.current_usage().saturating_sub(before);
    (answer, left, MEMORY.peak_usage().saturating_sub(before))
}

/// Entries that are just allowed, of the kinds that grow most in memory.
fn largest_entries() {
    const ENTRIES: usize = 200;
    let EntryLimits {
        value_bytes,
        values,
        ..
    } = EntryLimits::default();
    let fill = |id: usize, head: &str, part: &dyn Fn(usize) -> String, tail: &str| {
        let mut text = format!(r#"{{"id":"h{id}","ip":"10.0.0.1",{head}"#);
        let mut count = 12;
        for at in 0.. {
            let part = part(at);
            // As the limits count.
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
    };
    let long = "x".repeat(value_bytes - 100);
    let deep = format!("{}1{}", "[".repeat(28), "]".repeat(28));
    type Kind<'k> = (&'static str, Box<dyn Fn(usize) -> Vec<u8> + 'k>);
    let kinds: [Kind; 8] = [
        (
            "one long text",
            Box::new(|id| {
                format!(r#"{{"id":"h{id}","ip":"10.0.0.1","zone":"{long}"}}"#).into_bytes()
            }),
        ),
        (
            "many numbers",
            Box::new(|id| {
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
            Box::new(|id| fill(id, r#""tags":["#, &|at| format!(r#""t{at:055}""#), "]}")),
        ),
        (
            "many short keys",
            Box::new(|id| fill(id, r#""metadata":{"#, &|at| format!(r#""{at:x}":[]"#), "}}")),
        ),
        (
            "a long number",
            Box::new(|id| {
                format!(
                    r#"{{"id":"h{id}","ip":"10.0.0.1","weight":0.{}}}"#,
                    "7".repeat(value_bytes - 100)
                )
                .into_bytes()
            }),
        ),
        (
            "long numbers",
            Box::new(|id| {
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
            Box::new(|id| {
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
            Box::new(|id| {
                fill(
                    id,
                    r#""metadata":["#,
                    &|_| format!(r#""{}""#, r"\u0001".repeat(9)),
                    "]}",
                )
            }),
        ),
    ];
    // What may be kept of one: its texts, and a few words for each value.
    let most = 2 * value_bytes + 256 * values + 4 * KIB;
    for (name, value) in kinds {
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

/// Candidates whose values are as long as etcd takes, in a listing.
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

/// Keys of which nothing can be made, longer than allowed.
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

/// Nodes that come and go, each under a name of its own, as fast as can be.
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
            // A few stay, so that leaving is now and then that of a few and then of many.
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

/// YAML that is much larger than it looks, much deeper, or just large.
fn bombs() {
    let head = "cluster:\n  etcd: { endpoints: ['memory://x'] }\n  group: workers\n";
    let mut laughs = "a0: &a0 ['x']\n".to_owned();
    for at in 1..30 {
        let aliases = vec![format!("*a{}", at - 1); 10].join(", ");
        writeln!(laughs, "a{at}: &a{at} [{aliases}]").unwrap();
    }
    let mut used = format!("{head}  filter:\n    zones: &z0 ['x', 'y']\n");
    for at in 1..30 {
        let aliases = vec![format!("*z{}", at - 1); 10].join(", ");
        writeln!(used, "  zones{at}: &z{at} [{aliases}]").unwrap();
    }
    let mut merges = "b0: &b0 { k: 1 }\n".to_owned();
    for at in 1..200 {
        writeln!(merges, "b{at}: &b{at} {{ <<: *b{}, k{at}: 1 }}", at - 1).unwrap();
    }
    let deep = 100_000;
    let documents = [
        ("aliases of aliases", format!("{laughs}{head}"), true),
        ("aliases where lists belong", used, true),
        ("merges of merges", format!("{merges}{head}"), false),
        ("an alias in itself", format!("a: &a [*a]\n{head}"), true),
        (
            "deep lists",
            format!("{head}  zone: {}1{}\n", "[".repeat(deep), "]".repeat(deep)),
            true,
        ),
        (
            "deep blocks",
            format!("{head}  zone: {}1\n", "- ".repeat(deep)),
            true,
        ),
        (
            "deep objects",
            format!("{head}  zone: {}1\n", "{a: ".repeat(deep)),
            true,
        ),
        (
            "a text of 8 MiB",
            format!("{head}  zone: {}\n", "x".repeat(8 << 20)),
            false,
        ),
        (
            "a number of 1 MiB",
            format!("{head}  retries: {}\n", "9".repeat(1 << 20)),
            true,
        ),
        (
            "a million lines",
            format!("{head}{}", "#\n".repeat(1_000_000)),
            false,
        ),
        (
            "a million fields",
            format!(
                "{head}{}",
                (0..1_000_000).fold(String::new(), |mut text, at| {
                    writeln!(text, "k{at}: 1").unwrap();
                    text
                })
            ),
            false,
        ),
        (
            "\"password\" many times",
            format!("{head}  x: [{}", "password:".repeat(400_000)),
            true,
        ),
    ];
    for (name, text, is_refused) in documents {
        let begun = worked();
        let (told, _, peak) = measured(|| {
            let told = ClusterConfig::from_yaml(&text, "bomb.yaml").map(drop);
            #[cfg(feature = "pingora")]
            drop(pingora_etcd::config::server_conf(&text, "bomb.yaml"));
            told.map_err(|error| error.to_string())
        });
        let took = worked() - begun;
        let told = match told {
            Ok(()) => "taken in".to_owned(),
            Err(told) => told.replace('\n', " ").chars().take(80).collect(),
        };
        println!(
            "hostile: YAML, {name}, {} KiB: {} ms, {} KiB held, {told}",
            text.len() / KIB,
            took.as_millis(),
            peak / KIB
        );
        assert!(!is_refused || told != "taken in", "{name}");
        assert!(took < SLOWEST * 2, "{name} took {took:?}");
        // The parser stops at 250,000 nodes, which is its own budget.
        assert!(
            peak <= 16 * text.len() + 128 * KIB * KIB,
            "{name}: {peak} bytes"
        );
    }
}
