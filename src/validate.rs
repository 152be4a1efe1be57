//! The rules for entries, shared by writers and readers: whatever a worker accepts from its builder
//! and its collector, every reader accepts too, unless that reader was given narrower limits.

use std::fmt;
use std::io::{self, Write};
use std::net::IpAddr;

use serde_json::Value;

use crate::error::ClusterError;

/// Maximum length of a name (node id, group, zone, tag) in bytes. etcd itself has no limit below its
/// request size; a longer name is a mistake.
pub(crate) const NAME_BYTES: usize = 512;
/// Maximum length of a key in bytes.
pub(crate) const KEY_BYTES: usize = 1_024;
/// The maximum that a reader's limit of nesting can be set to: the parser itself stops soon after.
pub(crate) const MOST_DEPTH: usize = 100;
/// The range of static weights above 0: wide enough for any fleet, and narrow enough to calculate with
/// safely.
const WEIGHTS: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// The maximum size of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
    pub(crate) values: usize,
}

impl Default for Bounds {
    /// The limits of a reader by default, and of every writer.
    fn default() -> Self {
        Self {
            bytes: 65_536,
            depth: 32,
            values: 1_024,
        }
    }
}

impl Bounds {
    /// The limits for the fields of a worker without its metrics, which need room too.
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

    /// Checks JSON text in one pass, without parsing it into values.
    pub(crate) fn check(&self, json: &[u8]) -> Result<(), Excess> {
        Bound::Bytes.check(json.len(), self.bytes)?;
        self.check_shape(&Shape::of(json))
    }

    /// Checks a value that has not been written yet, however large and deep it is.
    pub(crate) fn check_value(&self, value: &Value) -> Result<(), Excess> {
        self.check_shape(&Shape::of_value(value))?;
        // The depth has been checked, so writing the value cannot run out of stack.
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

/// One of the [`Bounds`].
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

/// A bound that is exceeded.
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

/// The size that JSON will have once it is parsed, measured before that.
#[derive(Debug, Default, PartialEq)]
struct Shape {
    depth: usize,
    /// Never less than the number of values.
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
                    // The first element; each further one follows a comma.
                    shape.values += 1;
                }
                b'}' | b']' => depth = depth.saturating_sub(1),
                b',' => shape.values += 1,
                _ => {}
            }
        }
        shape
    }

    /// Without recursion: a value may be nested deeper than the stack allows.
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

/// Whether objects and lists are nested more than `than` levels deep. Recurses no deeper than that.
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

/// Drops a value level by level. The ordinary drop is recursive, and a program that runs out of stack
/// is aborted.
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

/// Counts the bytes that are written.
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

/// Checks a name: at most [`NAME_BYTES`] long, and without control characters, which would spoil
/// logs. Returns what is wrong with it.
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

/// Checks that clients can connect to an address. Returns why they cannot.
pub(crate) fn address(ip: IpAddr) -> Result<(), String> {
    // An IPv4-mapped IPv6 address is reached as the IPv4 address.
    let kind = match ip.to_canonical() {
        ip if ip.is_unspecified() => "unspecified",
        ip if ip.is_multicast() => "for multicast",
        IpAddr::V4(ip) if ip.is_broadcast() => "for broadcast",
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            "link-local, which is ambiguous without an interface"
        }
        _ => return Ok(()),
    };
    Err(format!("{ip} is {kind}: nobody can connect to it"))
}

/// The effective static weight: 1 if none is given, 0 for no traffic, otherwise the nearest value in
/// the range. A value that is not a weight (negative, or `NaN`) counts as 1: see [`weight_fault`].
#[cfg(any(test, feature = "balance"))]
pub(crate) fn weight(given: Option<f64>) -> f64 {
    match given {
        Some(weight) if weight > 0.0 => weight.clamp(*WEIGHTS.start(), *WEIGHTS.end()),
        Some(0.0) => 0.0,
        _ => 1.0,
    }
}

/// What is wrong with the weight of an entry, where `NaN` stands for a value that is not a number.
pub(crate) fn weight_fault(given: Option<f64>) -> Option<String> {
    let weight = given.filter(|weight| weight.is_nan() || *weight < 0.0)?;
    let given = if weight.is_nan() {
        "not a number".to_owned()
    } else {
        weight.to_string()
    };
    Some(format!(
        "weight: it is {given}, where 0 or a positive number is expected; it counts as 1"
    ))
}

/// Checks the static weight that a worker is built with.
pub(crate) fn check_weight(weight: f64) -> Result<(), ClusterError> {
    if weight == 0.0 || WEIGHTS.contains(&weight) {
        return Ok(());
    }
    let reason = format!("{weight} is out of range, 0 (no traffic), or 0.000001 to 1,000,000");
    Err(ClusterError::config("weight", reason))
}

#[cfg(test)]
mod tests;
