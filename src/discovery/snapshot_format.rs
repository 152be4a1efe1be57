//! The format of a snapshot file: a line with the name and version of the format, one JSON object,
//! and a line with the checksum of the JSON.

use std::io::{BufWriter, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::node::Node;
use crate::store::Revision;
use crate::view::Nodes;

const HEADER: &str = "pingora-etcd snapshot 1\n";
const HEADER_WITHOUT_VERSION: &str = "pingora-etcd snapshot ";
/// Length of the last line with the line feed before it: a line feed, the checksum, a line feed.
const TRAILER: usize = 18;

/// What the nodes of a snapshot file belong to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) group: String,
    pub(super) key_prefix: String,
    /// Who writes the entries; empty for this crate.
    pub(super) format: String,
    pub(super) cluster_id: u64,
    pub(super) revision: Revision,
}

/// The contents of a snapshot file.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) origin: Origin,
    pub(super) written: SystemTime,
    pub(super) nodes: Vec<Node>,
}

#[derive(Serialize, Deserialize)]
struct Contents<Text, Entry> {
    group: Text,
    key_prefix: Text,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Text>,
    cluster_id: u64,
    revision: Revision,
    /// Unix time in milliseconds.
    written: u64,
    nodes: Vec<Stored<Entry>>,
}

#[derive(Serialize, Deserialize)]
struct Stored<Entry> {
    incarnation: i64,
    node: Entry,
}

/// Parses the bytes of a file. Returns why they are not a valid snapshot, whatever the bytes are.
pub(super) fn decode(bytes: &[u8]) -> Result<Snapshot, String> {
    let rest = bytes
        .strip_prefix(HEADER.as_bytes())
        .ok_or_else(|| other_format(bytes))?;
    let damaged = || "it is damaged: its checksum does not match its contents".to_owned();
    let end = rest.len().checked_sub(TRAILER).ok_or_else(damaged)?;
    let (json, trailer) = rest.split_at(end);
    if trailer != trailer_of(xxh3_64(json)).as_bytes() {
        return Err(damaged());
    }
    let contents: Contents<String, Node> =
        serde_json::from_slice(json).map_err(|error| format!("it cannot be parsed: {error}"))?;
    let written = UNIX_EPOCH.checked_add(Duration::from_millis(contents.written));
    Ok(Snapshot {
        origin: Origin {
            group: contents.group,
            key_prefix: contents.key_prefix,
            format: contents.format.unwrap_or_default(),
            cluster_id: contents.cluster_id,
            revision: contents.revision,
        },
        written: written.ok_or("its time is out of range")?,
        nodes: contents
            .nodes
            .into_iter()
            .map(|stored| stored.node.with_incarnation(stored.incarnation))
            .collect(),
    })
}

fn other_format(bytes: &[u8]) -> String {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or(bytes);
    let text = std::str::from_utf8(line).ok();
    match text.and_then(|line| line.strip_prefix(HEADER_WITHOUT_VERSION)) {
        Some(version) if line.len() < 40 => {
            format!("it has format version {version:?}, and this version reads only 1")
        }
        _ => "it is not a snapshot of nodes".to_owned(),
    }
}

fn trailer_of(checksum: u64) -> String {
    format!("\n{checksum:016x}\n")
}

/// Writes a snapshot. The JSON is streamed, so that it is never held in memory as a whole.
pub(super) fn encode(
    out: impl Write,
    origin: &Origin,
    written: SystemTime,
    nodes: &Nodes,
) -> std::io::Result<()> {
    let nodes = nodes.iter().map(|node| Stored {
        incarnation: node.incarnation(),
        node: &**node,
    });
    let contents = Contents {
        group: &origin.group,
        key_prefix: &origin.key_prefix,
        format: Some(&origin.format).filter(|format| !format.is_empty()),
        cluster_id: origin.cluster_id,
        revision: origin.revision,
        written: written.duration_since(UNIX_EPOCH).map_or(0, |time| {
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
        }),
        nodes: nodes.collect(),
    };
    let mut out = Summing {
        inner: BufWriter::new(out),
        checksum: Xxh3::new(),
    };
    out.inner.write_all(HEADER.as_bytes())?;
    serde_json::to_writer(&mut out, &contents)?;
    let trailer = trailer_of(out.checksum.digest());
    out.inner.write_all(trailer.as_bytes())?;
    out.inner.flush()
}

/// The bytes of a file with this JSON and the right checksum, whatever the JSON is.
#[cfg(any(test, feature = "test-util"))]
pub(super) fn seal(json: &[u8]) -> Vec<u8> {
    [
        HEADER.as_bytes(),
        json,
        trailer_of(xxh3_64(json)).as_bytes(),
    ]
    .concat()
}

/// Calculates the checksum of what is written.
struct Summing<W> {
    inner: W,
    checksum: Xxh3,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.checksum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(json: &str) -> Vec<u8> {
        seal(json.as_bytes())
    }

    pub(in crate::discovery) const GOOD: &str = r#"{"group":"g","key_prefix":"","cluster_id":7,"revision":9,"written":1700000000000,"nodes":[{"incarnation":5,"node":{"id":"n","ip":"10.0.0.1"}}]}"#;

    #[test]
    fn a_good_file_is_read() {
        let snapshot = decode(&bytes(GOOD)).unwrap();
        assert_eq!(
            (snapshot.origin.cluster_id, snapshot.origin.revision),
            (7, 9)
        );
        let node = &snapshot.nodes[0];
        assert_eq!((node.id.as_str(), node.incarnation()), ("n", 5));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut nodes = Nodes::default();
        nodes.insert(
            Node::new("n", "10.0.0.1".parse().unwrap())
                .with_incarnation(-3)
                .into(),
        );
        let origin = Origin {
            group: "g".to_owned(),
            key_prefix: "p/".to_owned(),
            format: "Kratos".to_owned(),
            cluster_id: u64::MAX,
            revision: 4,
        };
        let written = UNIX_EPOCH + Duration::from_millis(1_700_000_000_001);
        let mut file = Vec::new();
        encode(&mut file, &origin, written, &nodes).unwrap();
        let snapshot = decode(&file).unwrap();
        assert_eq!((snapshot.origin, snapshot.written), (origin, written));
        assert_eq!(snapshot.nodes.len(), 1);
        assert!(!snapshot.nodes[0].differs(nodes.get("n").unwrap()));
    }

    #[test]
    fn each_damage_is_named() {
        let good = bytes(GOOD);
        let error = |bytes: &[u8]| decode(bytes).unwrap_err();
        assert!(error(&good[..good.len() - 1]).contains("checksum"));
        let mut flipped = good.clone();
        flipped[60] ^= 1;
        assert!(error(&flipped).contains("checksum"));
        let newer = String::from_utf8(good).unwrap();
        let newer = newer.replace("snapshot 1", "snapshot 2");
        assert!(error(newer.as_bytes()).contains("version \"2\""));
        assert!(error(b"").contains("not a snapshot"));
        assert!(error(b"#!/bin/sh\n").contains("not a snapshot"));
        assert!(error(&bytes("{}")).contains("group"));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(decode(&bytes).is_err());
        }

        /// Also with the right checksum.
        #[test]
        fn any_contents(json in ".{0,200}") {
            prop_assert!(decode(&bytes(&json)).is_err());
        }
    }
}
