//! Conversions between this crate's types and those of `etcd-client`.

use etcd_client::{
    Compare, CompareOp, Event, EventType, KeyValue, PutOptions, ResponseHeader, TxnOp,
};

use crate::ids::{LeaseId, Revision};
use crate::store::types::{Condition, Entry, Selector, WatchEvent, Write};

pub(super) fn entry(kv: &KeyValue) -> Entry {
    Entry {
        // A key that is not UTF-8 is not one of this crate's, and its conversion matches no node id.
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: kv.value().to_vec(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        lease: (kv.lease() != 0).then_some(LeaseId(kv.lease())),
    }
}

pub(super) fn watch_event(event: &Event) -> Option<WatchEvent> {
    let entry = entry(event.kv()?);
    Some(match event.event_type() {
        EventType::Put => WatchEvent::Put(entry),
        EventType::Delete => WatchEvent::Delete {
            key: entry.key,
            revision: entry.mod_revision,
        },
    })
}

pub(super) fn compare(condition: &Condition) -> Compare {
    match condition {
        Condition::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Condition::HeldBy(key, lease) => Compare::lease(key.as_str(), CompareOp::Equal, lease.0),
        Condition::CreatedAt(key, revision) => {
            Compare::create_revision(key.as_str(), CompareOp::Equal, *revision)
        }
        Condition::ChangedAt(key, revision) => {
            Compare::mod_revision(key.as_str(), CompareOp::Equal, *revision)
        }
    }
}

pub(super) fn operation(write: Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key, value, options)
        }
        Write::Delete { key } => TxnOp::delete(key, None),
    }
}

/// The first key of a selection, and the end of its range if it is one.
pub(super) fn key_range(keys: &Selector) -> (Vec<u8>, Option<Vec<u8>>) {
    match keys {
        Selector::Key(key) => (key.clone().into_bytes(), None),
        Selector::Prefix(prefix) => (prefix.clone().into_bytes(), Some(prefix_end(prefix))),
    }
}

/// The end of the range of keys with this prefix: the prefix with its last byte below 0xff increased
/// by one. For an empty prefix, or one of 0xff only, etcd's value for "every key from here on".
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// The revision that an answer was given at; 0 if it does not say.
pub(super) fn revision_of(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(0, ResponseHeader::revision)
}

/// The cluster that an answer comes from.
pub(super) fn cluster_of(header: Option<&ResponseHeader>) -> Option<u64> {
    header
        .map(ResponseHeader::cluster_id)
        .filter(|cluster| *cluster != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(prefix_end("registry/app/"), b"registry/app0");
        assert_eq!(prefix_end(""), [0]);
    }
}
