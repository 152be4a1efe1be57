//! Measuring and dropping values of any size; names, addresses and weights.

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
fn an_excess_names_the_bound() {
    let bounds = Bounds::default();
    let text = json!({ "a": "x".repeat(70_000) });
    let many = json!({ "a": vec![1; 1_100] });
    for (value, bound, named) in [
        (text, Bound::Bytes, "65536"),
        (many, Bound::Values, "1024"),
        (nested(130), Bound::Depth, "130 levels"),
    ] {
        let excess = bounds.check_value(&value).unwrap_err();
        assert_eq!(excess.bound, bound);
        assert!(excess.to_string().contains(named), "{excess}");
        let as_read = bounds.check(value.to_string().as_bytes()).unwrap_err();
        assert_eq!(as_read.bound, bound);
    }
    bounds.check_value(&json!({ "a": vec![1; 1_000] })).unwrap();
}

#[test]
fn addresses_that_nobody_can_connect_to_are_refused() {
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
    let fault = weight_fault(Some(-5.0)).unwrap();
    assert!(
        fault.starts_with("weight: ") && fault.contains("-5"),
        "{fault}"
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
    /// The count is never below the number of values that a parser builds.
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
