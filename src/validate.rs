//! What an entry may be: one set of rules for who writes it and for who reads it. What a worker may
//! be built with, and what its collector may return, is what every reader takes, unless that reader
//! has been given narrower limits.

use std::fmt;
use std::io::{self, Write};
use std::net::IpAddr;

use serde_json::Value;

use crate::error::ClusterError;

/// Longest name (node id, group, zone, tag) in bytes. etcd has no limit of its own below its
/// request size; a name past this one is a mistake.
pub(crate) const NAME_BYTES: usize = 512;
/// Longest key in bytes.
pub(crate) const KEY_BYTES: usize = 1_024;
/// No reader can be told to take anything deeper: the parser stops soon after.
pub(crate) const MOST_DEPTH: usize = 100;
/// The range of static weights above 0, wide enough for any fleet and narrow enough to calculate
/// with.
const WEIGHTS: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// How much one entry may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
    pub(crate) values: usize,
}

impl Default for Bounds {
    /// What a reader takes that has not been told otherwise, and what a writer may write.
    fn default() -> Self {
        Self {
            bytes: 65_536,
            depth: 32,
            values: 1_024,
        }
    }
}

impl Bounds {
    /// What a worker may say of itself before its metrics come: they need room too.
    pub(crate) fn without_metadata() -> Self {
        let Self {
            bytes,
            depth,
            values,
        } = Self::default();
        Self {
            bytes: bytes / 2,
            depth,
            values: values / 2,
        }
    }

    /// Answers which bound JSON exceeds. Reads it once, and builds nothing.
    pub(crate) fn check(&self, json: &[u8]) -> Result<(), Excess> {
        Bound::Bytes.check(json.len(), self.bytes)?;
        self.check_shape(&Shape::of(json))
    }

    /// The same for a value that has not been written yet, however large and deep it is.
    pub(crate) fn check_value(&self, value: &Value) -> Result<(), Excess> {
        self.check_shape(&Shape::of_value(value))?;
        // It is as shallow as it has to be: writing it cannot run out of stack.
        let mut length = Length(0);
        let written = serde_json::to_writer(&mut length, value);
        debug_assert!(written.is_ok(), "a value is always JSON");
        Bound::Bytes.check(length.0, self.bytes)
    }

    fn check_shape(&self, shape: &Shape) -> Result<(), Excess> {
        Bound::Depth.check(shape.depth, self.depth)?;
        Bound::Values.check(shape.values, self.values)
    }
}

/// Which of the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    Bytes,
    Depth,
    Values,
}

impl Bound {
    fn check(self, found: usize, most: usize) -> Result<(), Excess> {
        if found <= most {
            return Ok(());
        }
        Err(Excess {
            bound: self,
            found,
            most,
        })
    }
}

/// What is too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Excess {
    pub(crate) bound: Bound,
    found: usize,
    most: usize,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { found, most, .. } = self;
        match self.bound {
            Bound::Bytes => write!(f, "it is {found} bytes long, at most {most} allowed"),
            Bound::Depth => write!(f, "it is {found} levels deep, at most {most} allowed"),
            Bound::Values => write!(f, "it has {found} values, at most {most} allowed"),
        }
    }
}

/// How big JSON is when it has been parsed: known before it is.
#[derive(Debug, Default, PartialEq)]
struct Shape {
    depth: usize,
    /// At least as many as there are.
    values: usize,
}

impl Shape {
    fn of(json: &[u8]) -> Self {
        let mut shape = Self {
            depth: 0,
            values: 1,
        };
        let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
        for byte in json {
            if in_text {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_text = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => in_text = true,
                b'{' | b'[' => {
                    depth += 1;
                    shape.depth = shape.depth.max(depth);
                    // The first in it; each other one has a comma before it.
                    shape.values += 1;
                }
                b'}' | b']' => depth = depth.saturating_sub(1),
                b',' => shape.values += 1,
                _ => {}
            }
        }
        shape
    }

    /// Without recursion: a value may be deeper than a stack is.
    fn of_value(value: &Value) -> Self {
        let mut shape = Self::default();
        let mut rest = vec![(value, 0)];
        while let Some((value, outside)) = rest.pop() {
            shape.values += 1;
            let depth = outside + 1;
            match value {
                Value::Array(values) => rest.extend(values.iter().map(|value| (value, depth))),
                Value::Object(fields) => rest.extend(fields.values().map(|value| (value, depth))),
                _ => continue,
            }
            shape.depth = shape.depth.max(depth);
        }
        shape
    }
}

/// Whether objects and lists are nested deeper than so many levels. Goes no deeper itself.
pub(crate) fn is_deeper(value: &Value, than: usize) -> bool {
    let inside = |value: &Value| match than.checked_sub(1) {
        Some(than) => is_deeper(value, than),
        None => true,
    };
    match value {
        Value::Array(values) => than == 0 || values.iter().any(inside),
        Value::Object(fields) => than == 0 || fields.values().any(inside),
        _ => false,
    }
}

/// Drops a value level by level. Dropping it as it is would use stack for each level, and a program
/// that runs out of stack is gone.
pub(crate) fn take_apart(value: Value) {
    let mut rest = vec![value];
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(values) => rest.extend(values),
            Value::Object(fields) => rest.extend(fields.into_iter().map(|(_, value)| value)),
            _ => {}
        }
    }
}

/// Counts what is written.
struct Length(usize);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.saturating_add(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A name that people and logs have to live with: no longer than [`NAME_BYTES`], and without control
/// characters. Answers what is wrong with it.
pub(crate) fn name(name: &str) -> Result<(), String> {
    if name.len() > NAME_BYTES {
        let length = name.len();
        return Err(format!(
            "is {length} bytes long, at most {NAME_BYTES} allowed"
        ));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("{name:?} contains a control character"));
    }
    Ok(())
}

/// An address that a client can connect to. Answers why it is none.
pub(crate) fn address(ip: IpAddr) -> Result<(), String> {
    // An IPv4 address in IPv6 clothes is reached as what it is.
    let kind = match ip.to_canonical() {
        ip if ip.is_unspecified() => "unspecified",
        ip if ip.is_multicast() => "for multicast",
        IpAddr::V4(ip) if ip.is_broadcast() => "for broadcast",
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            "link-local, which says nothing without an interface"
        }
        _ => return Ok(()),
    };
    Err(format!("{ip} is {kind}: nobody can connect to it"))
}

/// What a static weight counts as: 1 where there is none, 0 for no traffic, else the nearest that can
/// be calculated with. What is no weight (negative, or `NaN`) counts as 1: see [`weight_fault`].
pub(crate) fn weight(given: Option<f64>) -> f64 {
    match given {
        Some(weight) if weight > 0.0 => weight.clamp(*WEIGHTS.start(), *WEIGHTS.end()),
        Some(0.0) => 0.0,
        _ => 1.0,
    }
}

/// What is wrong with the weight of an entry: `NaN` stands for what is no number.
pub(crate) fn weight_fault(given: Option<f64>) -> Option<String> {
    let weight = given.filter(|weight| weight.is_nan() || *weight < 0.0)?;
    let given = if weight.is_nan() {
        "no number".to_owned()
    } else {
        weight.to_string()
    };
    Some(format!(
        "weight: it is {given}, which is neither 0 nor above it, and counts as 1"
    ))
}

/// A weight that a worker may be given.
pub(crate) fn check_weight(weight: f64) -> Result<(), ClusterError> {
    if weight == 0.0 || WEIGHTS.contains(&weight) {
        return Ok(());
    }
    let reason = format!("{weight} is out of range, 0 (no traffic), or 0.000001 to 1,000,000");
    Err(ClusterError::config("weight", reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn nested(levels: usize) -> Value {
        (0..levels).fold(Value::Null, |inner, _| Value::Array(vec![inner]))
    }

    #[test]
    fn values_of_any_depth_are_measured_and_dropped() {
        let value = nested(1_000_000);
        let excess = Bounds::default().check_value(&value).unwrap_err();
        assert_eq!((excess.bound, excess.found), (Bound::Depth, 1_000_000));
        assert!(is_deeper(&value, MOST_DEPTH));
        take_apart(value);
        assert!(is_deeper(&nested(3), 2) && !is_deeper(&nested(3), 3));
        assert!(is_deeper(&json!({"a": {}}), 1) && !is_deeper(&json!(1), 0));
    }

    #[test]
    fn what_is_too_much_is_named() {
        let bounds = Bounds::default();
        let text = json!({ "a": "x".repeat(70_000) });
        let many = json!({ "a": vec![1; 1_100] });
        for (value, bound, told) in [
            (text, Bound::Bytes, "65536"),
            (many, Bound::Values, "1024"),
            (nested(130), Bound::Depth, "130 levels"),
        ] {
            let excess = bounds.check_value(&value).unwrap_err();
            assert_eq!(excess.bound, bound);
            assert!(excess.to_string().contains(told), "{excess}");
            let as_read = bounds.check(value.to_string().as_bytes()).unwrap_err();
            assert_eq!(as_read.bound, bound);
        }
        bounds.check_value(&json!({ "a": vec![1; 1_000] })).unwrap();
    }

    #[test]
    fn addresses_that_are_no_backends() {
        for text in [
            "0.0.0.0",
            "::",
            "::ffff:0.0.0.0",
            "224.0.0.1",
            "239.255.255.255",
            "ff02::1",
            "::ffff:224.0.0.1",
            "255.255.255.255",
            "::ffff:255.255.255.255",
            "fe80::1",
            "febf::1",
        ] {
            let reason = address(text.parse().unwrap()).unwrap_err();
            assert!(reason.contains(text), "{reason}");
        }
        for text in [
            "127.0.0.1",
            "::1",
            "10.0.0.255",
            "169.254.1.1",
            "fec0::1",
            "fd00::1",
            "240.0.0.1",
            "::ffff:10.0.0.1",
        ] {
            address(text.parse().unwrap()).unwrap();
        }
    }

    #[test]
    fn weights() {
        for (given, counts) in [
            (None, 1.0),
            (Some(0.0), 0.0),
            (Some(-0.0), 0.0),
            (Some(2.5), 2.5),
            (Some(1e-9), 1e-6),
            (Some(f64::MIN_POSITIVE / 4.0), 1e-6),
            (Some(1e9), 1e6),
            (Some(f64::INFINITY), 1e6),
            (Some(-5.0), 1.0),
            (Some(f64::NEG_INFINITY), 1.0),
            (Some(f64::NAN), 1.0),
        ] {
            assert_eq!(weight(given), counts, "{given:?}");
            let is_fault = given.is_some_and(|weight| weight.is_nan() || weight < 0.0);
            assert_eq!(weight_fault(given).is_some(), is_fault, "{given:?}");
        }
        let told = weight_fault(Some(-5.0)).unwrap();
        assert!(
            told.starts_with("weight: ") && told.contains("-5"),
            "{told}"
        );
        check_weight(0.0).unwrap();
        for weight in [-1.0, 1e-7, 1e7, f64::NAN, f64::INFINITY] {
            let error = check_weight(weight).unwrap_err().to_string();
            assert!(
                error.contains("weight") && error.contains("0 (no traffic)"),
                "{error}"
            );
        }
    }

    fn count(value: &Value) -> (usize, usize) {
        let inner: Vec<_> = match value {
            Value::Array(values) => values.iter().map(count).collect(),
            Value::Object(fields) => fields.values().map(count).collect(),
            _ => return (0, 1),
        };
        let depth = inner.iter().map(|inner| inner.0).max().unwrap_or(0);
        (
            depth + 1,
            1 + inner.iter().map(|inner| inner.1).sum::<usize>(),
        )
    }

    proptest! {
        /// What is counted is what a parser would build, or a little more.
        #[test]
        fn shape(depth in 0_usize..6, width in 0_usize..6, text in ".*") {
            let mut value = Value::from(text);
            for _ in 0..depth {
                value = Value::Array(vec![value; width]);
            }
            let shape = Shape::of(value.to_string().as_bytes());
            let (depth, values) = count(&value);
            prop_assert_eq!(shape.depth, depth);
            prop_assert!(shape.values >= values);
            prop_assert_eq!(Shape::of_value(&value), Shape { depth, values });
            prop_assert!(!is_deeper(&value, depth));
            prop_assert!(depth == 0 || is_deeper(&value, depth - 1));
        }
    }
}
