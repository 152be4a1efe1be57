//! Reading and writing entries, also those that others write.

use super::*;
use crate::metadata::metadata_keys;

#[test]
fn the_json_of_a_plain_node_is_that_of_the_predecessor() {
    let node = Node::new("n1", "192.168.1.10".parse().unwrap());
    assert_eq!(
        serde_json::to_string(&node).unwrap(),
        r#"{"id":"n1","ip":"192.168.1.10","last_seen":0}"#
    );
}

#[test]
fn unknown_fields_are_ignored() {
    let node: Node = serde_json::from_str(
        r#"{"id":"n1","ip":"::1","last_seen":7,"metadata":{"cpu_usage_percent":45.2},"new":[1]}"#,
    )
    .unwrap();
    assert_eq!(node.last_seen, 7);
    assert_eq!(node.metric(metadata_keys::CPU_USAGE_PERCENT), Some(45.2));
    assert_eq!(node.addr(8080), "[::1]:8080".parse().unwrap());
    assert!(node.is_serving());
}

#[test]
fn a_round_trip_keeps_every_field() {
    let node = Node::new("n1", "10.0.0.1".parse().unwrap())
        .with_port(81)
        .with_zone("a")
        .with_tags(["x", "y"])
        .with_weight(2.5)
        .with_state(NodeState::Draining)
        .with_priority(7)
        .with_run(0xab)
        .with_metadata(serde_json::json!({"queue_depth": 3}));
    let read: Node = serde_json::from_slice(&serde_json::to_vec(&node).unwrap()).unwrap();
    assert!(!read.differs(&node));
}

#[test]
fn different_runs_are_distinguished_whatever_they_are() {
    let run = |json: &str| {
        let node: Node =
            serde_json::from_str(&format!(r#"{{"id":"n","ip":"::1","run":{json}}}"#)).unwrap();
        let again = serde_json::to_vec(&node).unwrap();
        let again: Node = serde_json::from_slice(&again).unwrap();
        assert_eq!(again.run(), node.run(), "{json}");
        node.run()
    };
    assert_eq!(run(r#""00000000000000ff""#), Some(255));
    assert_eq!(run("null"), None);
    let all = [
        run(r#""pod-1""#),
        run(r#""pod-2""#),
        run("17"),
        run("[1]"),
        run(r#""ff""#),
    ];
    let different: BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), all.len());
    assert!(!different.contains(&None));
}

#[test]
fn a_life_is_a_run_or_else_a_lease() {
    let node = |lease, run| {
        Node::new("n", "::1".parse().unwrap())
            .with_incarnation(lease)
            .with_run(run)
    };
    assert!(node(1, 7).is_same_life(&node(2, 7)), "another lease");
    assert!(!node(1, 7).is_same_life(&node(2, 8)));
    assert!(
        !node(1, 7).is_same_life(&node(1, 8)),
        "run again on one lease"
    );
    assert!(node(1, 0).is_same_life(&node(1, 0)));
    assert!(!node(1, 0).is_same_life(&node(2, 0)));
}

#[test]
fn an_unknown_state_serves() {
    let node: Node = serde_json::from_str(r#"{"id":"n","ip":"::1","state":"warming"}"#).unwrap();
    assert!(node.is_serving());
}

#[test]
fn null_is_absence() {
    let node: Node = serde_json::from_str(
        r#"{"id":"n","ip":"::1","last_seen":null,"metadata":null,"port":null,"zone":null,
            "tags":null,"weight":null,"state":null,"priority":null,"leaving":null}"#,
    )
    .unwrap();
    assert!(!node.differs(&Node::new("n", "::1".parse().unwrap())));
    assert!(node.last_seen == 0 && !node.is_leaving());
}

#[test]
fn values_of_other_writers_are_read() {
    let read = |field: &str| {
        let text = format!(r#"{{"id":"n","ip":"::1",{field}}}"#);
        serde_json::from_str::<Node>(&text).unwrap()
    };
    for (time, millis) in [
        ("1700000000000.75", 1_700_000_000_000),
        ("-3", 0),
        ("-0.5", 0),
        ("1e300", i64::MAX),
    ] {
        let node = read(&format!(r#""last_seen":{time}"#));
        assert_eq!(node.last_seen, millis, "{time}");
    }
    for state in ["draining", "DRAINING", "Draining"] {
        assert!(!read(&format!(r#""state":"{state}""#)).is_serving());
    }
    for (weight, counts) in [("0", Some(0.0)), ("-5", Some(-5.0)), ("null", None)] {
        assert_eq!(read(&format!(r#""weight":{weight}"#)).weight, counts);
    }
    for weight in [r#""0""#, "[0]", "{}", "true"] {
        let node = read(&format!(r#""weight":{weight}"#));
        assert!(node.weight.is_some_and(f64::is_nan), "{weight}");
        assert!(!node.differs(&node), "{weight}");
        let text = serde_json::to_string(&node).unwrap();
        assert!(!text.contains("weight"), "{text}");
    }
}

#[test]
fn the_published_schema_accepts_what_is_read_and_refuses_what_is_not() {
    let schema = include_str!("../../../config/node.schema.json");
    let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
    let options = jsonschema::options().should_validate_formats(true);
    let schema = options.build(&schema).unwrap();
    let field = |field: &str| format!(r#"{{"id":"n","ip":"10.0.0.1",{field}}}"#);
    let full = field(
        r#""port":8080,"last_seen":1755000000000,"state":"draining","weight":2.5,"zone":"a","tags":["x"],
           "metadata":{"cpu_usage_percent":37.5},"priority":3,"leaving":true,"unknown":[]"#,
    );
    let nulls = field(
        r#""port":null,"last_seen":null,"state":null,"zone":null,"tags":null,"leaving":null"#,
    );
    let mut cases = vec![
        full,
        nulls,
        "[]".to_owned(),
        "{}".to_owned(),
        r#"{"id":"n"}"#.to_owned(),
    ];
    for ip in [
        "::1",
        "10.0.0.1:80",
        "[::1]",
        "a.test",
        "fe80::1%eth0",
        "10.0.0",
    ] {
        cases.push(format!(r#"{{"id":"n","ip":"{ip}"}}"#));
    }
    for one in [
        r#""port":65536"#,
        r#""port":"80""#,
        r#""port":-1"#,
        r#""port":1.5"#,
        r#""last_seen":"1""#,
        r#""last_seen":1.5"#,
        r#""state":7"#,
        r#""weight":"1""#,
        r#""zone":1"#,
        r#""tags":"a""#,
        r#""tags":[1]"#,
        r#""priority":-1"#,
        r#""leaving":"yes""#,
        r#""metadata":"text""#,
    ] {
        cases.push(field(one));
    }
    for case in cases {
        let value = serde_json::from_str(&case).unwrap();
        let is_read = serde_json::from_str::<Node>(&case);
        assert_eq!(
            schema.is_valid(&value),
            is_read.is_ok(),
            "{case}: {is_read:?}"
        );
    }
}
