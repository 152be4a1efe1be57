//! Which unusable entries have been logged already, so that each is logged once. Bounded, so that
//! nobody can fill the memory or the log by writing bad entries.

use std::collections::{HashMap, HashSet};

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// The maximum number of lines. Further refusals are only counted.
pub(super) const MAX_LINES: usize = 10_000;
/// The maximum number of lines for one key. More than one, because a mistake may be corrected into
/// another one; few, so that a key that changes every second leaves room for others.
const MAX_LINES_PER_KEY: u8 = 16;

/// The pairs of key and reason that have been logged. Kept as hashes, because a key may be as long as
/// the store allows; a collision suppresses one line.
#[derive(Debug, Default)]
pub(super) struct LogOnce {
    lines: HashSet<u64>,
    /// The number of lines for each key.
    keys: HashMap<u64, u8>,
}

impl LogOnce {
    /// Returns whether this has to be logged: neither this list nor the `earlier` one has it, and
    /// there is room. It is then remembered here.
    pub(super) fn is_first(&mut self, earlier: &Self, key: &str, reason: &str) -> bool {
        let hash = xxh3_64(key.as_bytes());
        let line = line(hash, reason);
        let is_known = self.lines.contains(&line) || earlier.lines.contains(&line);
        let lines_of_key = earlier.lines_of(hash).saturating_add(self.lines_of(hash));
        let is_full = earlier.lines.len() + self.lines.len() >= MAX_LINES;
        if is_known || is_full || lines_of_key >= MAX_LINES_PER_KEY {
            return false;
        }
        self.lines.insert(line);
        *self.keys.entry(hash).or_default() += 1;
        true
    }

    /// Adds what has been logged elsewhere.
    pub(super) fn extend(&mut self, other: Self) {
        let room = MAX_LINES.saturating_sub(self.lines.len());
        self.lines.extend(other.lines.into_iter().take(room));
        for (key, lines) in other.keys {
            let room = self.keys.len() < MAX_LINES;
            if room || self.keys.contains_key(&key) {
                let count = self.keys.entry(key).or_default();
                *count = count.saturating_add(lines);
            }
        }
    }

    /// The number of lines that are remembered.
    #[cfg(any(test, feature = "test-util"))]
    pub(super) fn len(&self) -> usize {
        self.lines.len()
    }

    fn lines_of(&self, key: u64) -> u8 {
        self.keys.get(&key).copied().unwrap_or(0)
    }
}

/// Hashes a line without its numbers: lengths, columns and times change with every write, but do not
/// make another reason.
fn line(key: u64, reason: &str) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(&key.to_le_bytes());
    for part in reason.split(|letter: char| letter.is_ascii_digit()) {
        hash.update(part.as_bytes());
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_logged_once_for_each_key() {
        let mut logged = LogOnce::default();
        let none = LogOnce::default();
        let mut is_first = |key: &str, reason: &str| logged.is_first(&none, key, reason);
        assert!(is_first("a", "port: invalid type at column 40"));
        assert!(!is_first("a", "port: invalid type at column 41"));
        assert!(is_first("a", "zone: invalid type at column 40"));
        assert!(
            !is_first("a", "port: invalid type at column 7"),
            "logged before"
        );
        assert!(is_first("b", "port: invalid type at column 40"));
    }

    #[test]
    fn one_key_does_not_fill_the_log_and_many_do_not_fill_the_memory() {
        let mut logged = LogOnce::default();
        let word = |at: usize| {
            char::from_u32('a' as u32 + at as u32 % 26)
                .unwrap()
                .to_string()
                .repeat(at / 26 + 1)
        };
        let lines = (0..1_000).filter(|at| logged.is_first(&LogOnce::default(), "a", &word(*at)));
        assert_eq!(lines.count(), usize::from(MAX_LINES_PER_KEY));
        let mut staged = LogOnce::default();
        for at in 0..3 * MAX_LINES {
            staged.is_first(&logged, &at.to_string(), "no JSON");
        }
        assert_eq!(staged.len() + logged.len(), MAX_LINES);
        logged.extend(staged);
        assert_eq!(logged.len(), MAX_LINES);
        assert!(!logged.is_first(&LogOnce::default(), "new", "no JSON"));
        assert!(logged.keys.len() <= MAX_LINES);
    }
}
