//! Mutates valid inputs into others.

use fastrand::Rng;
use serde_json::{Value, json};

/// Longer inputs are cut: four times the default limit of an entry.
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

/// Valid inputs of one kind, and the tokens that are inserted into them.
pub(crate) struct Corpus {
    pub(crate) small: Vec<Vec<u8>>,
    /// Chosen once in fifty times, because they take that much longer.
    pub(crate) big: Vec<Vec<u8>>,
    pub(crate) tokens: &'static [&'static str],
    pub(crate) is_json: bool,
}

impl Corpus {
    /// The next input, and the index of the small input that it is derived from, if there is one.
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
        // Two thirds of the JSON inputs stay valid JSON, to reach the code behind the parser.
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
                // The beginning of this input and the end of another one.
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
                // Sometimes it is not closed.
                if rng.u8(..4) != 0 {
                    text += &close.repeat(deep);
                }
                bytes.splice(at..at, text.into_bytes());
            }
            13 => {
                // Replaces a text between quotes.
                if let Some(open) = find(bytes, at, b'"')
                    && let Some(close) = find(bytes, open + 1, b'"')
                {
                    let text = text(rng);
                    bytes.splice(open + 1..close, text.into_bytes());
                }
            }
            14 => {
                // Repeats, removes or indents a line.
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
                // Replaces what follows a colon.
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

/// Changes a value into another one that is still JSON.
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

/// As many copies as fit the maximum length.
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
