//! What has been told in the log of entries that cannot be used. Bounded: the memory and the log are
//! not for whoever writes nonsense to fill.

use std::collections::{HashMap, HashSet};

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// Lines in all. Beyond that refusals are only counted.
pub(super) const MOST_LINES: usize = 10_000;
/// Lines for one key: who corrects one mistake into another hears of both, who writes a new one each
/// second does not use up what is left for others.
const MOST_OF_A_KEY: u8 = 16;

/// Reasons by key. Both as hashes, for a key may be as long as the store allows; two of one hash cost
/// a line.
#[derive(Debug, Default)]
pub(crate) struct Told {
    lines: HashSet<u64>,
    /// How many lines each key has had.
    keys: HashMap<u64, u8>,
}

impl Told {
    /// Remembers what is told of `key`. Answers whether it is to be told: it is new, here and in
    /// `before`, and there is room.
    pub(super) fn tell(&mut self, before: &Self, key: &str, reason: &str) -> bool {
        let hash = xxh3_64(key.as_bytes());
        let line = line(hash, reason);
        let is_known = self.lines.contains(&line) || before.lines.contains(&line);
        let of_key = before.of(hash).saturating_add(self.of(hash));
        let is_full = before.lines.len() + self.lines.len() >= MOST_LINES;
        if is_known || is_full || of_key >= MOST_OF_A_KEY {
            return false;
        }
        self.lines.insert(line);
        *self.keys.entry(hash).or_default() += 1;
        true
    }

    /// Takes over what has been told elsewhere.
    pub(super) fn extend(&mut self, other: Self) {
        let room = MOST_LINES.saturating_sub(self.lines.len());
        self.lines.extend(other.lines.into_iter().take(room));
        for (key, lines) in other.keys {
            let room = self.keys.len() < MOST_LINES;
            if room || self.keys.contains_key(&key) {
                let count = self.keys.entry(key).or_default();
                *count = count.saturating_add(lines);
            }
        }
    }

    /// How many lines are remembered.
    #[cfg(any(test, feature = "test-util"))]
    pub(super) fn len(&self) -> usize {
        self.lines.len()
    }

    fn of(&self, key: u64) -> u8 {
        self.keys.get(&key).copied().unwrap_or(0)
    }
}

/// Numbers do not make another reason: lengths, columns and times change with every write.
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
    fn each_reason_is_told_once_for_each_key() {
        let mut told = Told::default();
        let none = Told::default();
        let mut tell = |key: &str, reason: &str| told.tell(&none, key, reason);
        assert!(tell("a", "port: invalid type at column 40"));
        assert!(!tell("a", "port: invalid type at column 41"));
        assert!(tell("a", "zone: invalid type at column 40"));
        assert!(!tell("a", "port: invalid type at column 7"), "told before");
        assert!(tell("b", "port: invalid type at column 40"));
    }

    #[test]
    fn one_key_does_not_fill_the_log_and_many_do_not_fill_the_memory() {
        let mut told = Told::default();
        let word = |at: usize| {
            char::from_u32('a' as u32 + at as u32 % 26)
                .unwrap()
                .to_string()
                .repeat(at / 26 + 1)
        };
        let lines = (0..1_000).filter(|at| told.tell(&Told::default(), "a", &word(*at)));
        assert_eq!(lines.count(), usize::from(MOST_OF_A_KEY));
        let mut staged = Told::default();
        for at in 0..3 * MOST_LINES {
            staged.tell(&told, &at.to_string(), "no JSON");
        }
        assert_eq!(staged.len() + told.len(), MOST_LINES);
        told.extend(staged);
        assert_eq!(told.len(), MOST_LINES);
        assert!(!told.tell(&Told::default(), "new", "no JSON"));
        assert!(told.keys.len() <= MOST_LINES);
    }
}
