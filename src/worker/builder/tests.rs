use super::*;
use crate::worker::state::WorkerState;
use proptest::prelude::*;

fn builder() -> ClusterNodeBuilder {
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    ClusterNodeBuilder::new(EtcdOptions::memory(""), "n", ip, "g")
}

#[test]
fn what_no_reader_takes_is_refused_by_name_and_limit() {
    let at = |ip: &str, id: &str, group: &str| {
        let etcd = EtcdOptions::memory("").key_prefix("p/");
        ClusterNodeBuilder::new(etcd, id, ip.parse().unwrap(), group)
    };
    let long = "x".repeat(512);
    let labels = |count: usize, length: usize| (0..count).map(move |at| format!("{at:0length$}"));
    for (builder, field, limit) in [
        (builder().zone("z".repeat(70_000)), "zone", "512"),
        (builder().zone("a\nb"), "zone", "control"),
        (builder().tags(["x".repeat(513)]), "tags", "512"),
        (builder().tags(["a\tb"]), "tags", "control"),
        (builder().tags(labels(2_000, 1_024)), "tags", "512"),
        (builder().tags(labels(100, 500)), "tags", "32768"),
        (builder().tags(labels(600, 4)), "tags", "512 allowed"),
        (builder().weight(-5.0), "weight", "0 (no traffic)"),
        (builder().weight(f64::NAN), "weight", "1,000,000"),
        (builder().weight(1e9), "weight", "1,000,000"),
        (at("0.0.0.0", "n", "g"), "node_ip", "unspecified"),
        (at("::", "n", "g"), "node_ip", "unspecified"),
        (at("::ffff:0.0.0.0", "n", "g"), "node_ip", "unspecified"),
        (at("224.0.0.1", "n", "g"), "node_ip", "multicast"),
        (at("255.255.255.255", "n", "g"), "node_ip", "broadcast"),
        (at("fe80::1", "n", "g"), "node_ip", "link-local"),
        (at("::1", &long, &long), "node_id", "1024"),
    ] {
        let error = builder.try_build().unwrap_err().to_string();
        let named = error.contains(&format!("invalid {field}: ")) && error.contains(limit);
        assert!(named && error.len() < 400, "{field}: {error}");
    }
    for builder in [
        builder().weight(0.0),
        builder().zone("\"".repeat(512)).tags(labels(60, 500)),
        builder().tags(labels(480, 10)),
        at("::1", &long, &"x".repeat(400)),
    ] {
        builder.try_build().unwrap();
    }
}

proptest! {
    #[test]
    fn an_entry_as_it_was_written_is_current(
        weight in 1e-6..1e6f64,
        priority: u16,
        port in proptest::option::of(1..=u16::MAX),
        zone in proptest::option::of("\\PC{0,40}"),
    ) {
        let ip: IpAddr = "::1".parse().unwrap();
        let builder = ClusterNodeBuilder::new(EtcdOptions::memory(""), "n", ip, "g")
            .weight(weight)
            .priority(priority);
        let mut config = builder.config;
        config.node.port = port;
        config.node.zone = zone;
        config.validate().unwrap();
        let mut node = config.node.clone();
        let state = WorkerState::new(config, None);
        prop_assert!(state.is_entry_current(&node.to_json()));
        node.priority = Some(priority ^ 1);
        prop_assert!(!state.is_entry_current(&node.to_json()));
    }
}
