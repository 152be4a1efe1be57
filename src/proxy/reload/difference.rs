//! What of a new configuration can be taken over, and what needs a restart. Pure.

use crate::config::ClusterConfig;

/// The new configuration, with the values of the old one in the fields that need a restart, and the names of
/// those of them that differ. `idle_at_start` is the value of `timeouts.client_idle_ms` at the start.
pub(super) fn usable(
    old: &ClusterConfig,
    new: &ClusterConfig,
    idle_at_start: u64,
) -> (ClusterConfig, Vec<String>) {
    let mut usable = new.clone();
    let mut kept = Vec::new();
    macro_rules! keep {
        ($($($field:ident).+),*) => {
            $(if usable.$($field).+ != old.$($field).+ {
                usable.$($field).+.clone_from(&old.$($field).+);
                kept.push(concat!("cluster", $(".", stringify!($field)),+).to_owned());
            })*
        };
    }
    keep!(
        etcd,
        listen,
        access_log,
        opentelemetry,
        admin,
        drain_delay_ms,
        clients.h2c,
        clients.requests_per_connection
    );
    let addresses = |config: &ClusterConfig| {
        let listeners = config.further_listeners.iter();
        let addresses = listeners.map(|listener| listener.listen.clone());
        addresses.collect::<Vec<_>>()
    };
    if addresses(new) != addresses(old) {
        usable.further_listeners.clone_from(&old.further_listeners);
        kept.push("cluster.further_listeners".to_owned());
    }
    if usable.timeouts.client_idle_ms != idle_at_start {
        // Over HTTP/1 it is taken over; Pingora keeps that of HTTP/2.
        kept.push("cluster.timeouts.client_idle_ms (over HTTP/2)".to_owned());
    }
    (usable, kept)
}

/// Whether both follow the same nodes in the same way, so that one discovery serves for both.
pub(super) fn have_one_discovery(old: &ClusterConfig, new: &ClusterConfig) -> bool {
    old.group == new.group
        && old.registry == new.registry
        && old.further_registries == new.further_registries
        && old.name_servers == new.name_servers
        && old.filter == new.filter
        && old.allowed_networks == new.allowed_networks
        && old.allowed_ports == new.allowed_ports
        && old.limits == new.limits
        && old.self_preservation == new.self_preservation
        && old.snapshot == new.snapshot
        && old.publish_interval_ms == new.publish_interval_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> ClusterConfig {
        let yaml = format!("cluster:\n  etcd: {{ endpoints: ['http://a:1'] }}\n  group: g\n{more}");
        ClusterConfig::from_yaml(&yaml, "test").unwrap()
    }

    #[test]
    fn what_needs_a_restart_keeps_its_value_and_is_named() {
        let old = config("");
        let new =
            config("  listen: 127.0.0.1:7\n  retries: 1\n  clients: { h2c: false, headers: 9 }\n");
        let idle = old.timeouts.client_idle_ms;
        let (usable, kept) = usable(&old, &new, idle);
        assert_eq!(kept, ["cluster.listen", "cluster.clients.h2c"]);
        assert_eq!((&usable.listen, usable.clients.h2c), (&old.listen, true));
        assert_eq!((usable.retries, usable.clients.headers), (1, 9));
        assert_eq!(super::usable(&old, &old, idle), (old.clone(), Vec::new()));
    }

    #[test]
    fn addresses_need_a_restart_and_their_certificates_do_not() {
        let further = |listen: &str, tls: &str| {
            config(&format!(
                "  further_listeners: [{{ listen: '{listen}', tls: {tls} }}]\n"
            ))
        };
        let tls =
            |file: &str| format!("{{ certificates: [{{ cert_file: {file}, key_file: k }}] }}");
        let old = further("127.0.0.1:7", "null");
        let idle = old.timeouts.client_idle_ms;
        let moved = further("127.0.0.1:8", "null");
        for new in [&moved, &config("")] {
            let (usable, kept) = usable(&old, new, idle);
            assert_eq!(kept, ["cluster.further_listeners"]);
            assert_eq!(usable.further_listeners, old.further_listeners);
        }
        if cfg!(feature = "proxy-tls") {
            let new = further("127.0.0.1:7", &tls("a.pem"));
            let (usable, kept) = usable(&old, &new, idle);
            assert!(kept.is_empty(), "{kept:?}");
            assert_eq!(usable, new);
        }
    }

    #[test]
    fn what_is_taken_over_in_part_is_named_until_it_is_what_it_was() {
        let (first, second) = (config(""), config("  timeouts: { client_idle_ms: 5000 }\n"));
        let idle = first.timeouts.client_idle_ms;
        for (old, new, is_named) in [
            (&first, &second, true),
            (&second, &second, true),
            (&second, &first, false),
        ] {
            let (usable, kept) = usable(old, new, idle);
            assert_eq!(usable, *new);
            assert_eq!(!kept.is_empty(), is_named);
        }
    }

    #[test]
    fn another_policy_needs_no_other_discovery() {
        let old = config("");
        assert!(have_one_discovery(
            &old,
            &config("  policy: random\n  zone: a\n")
        ));
        for more in [
            "  filter: { zones: [a] }\n",
            "  allowed_networks: [10.0.0.0/8]\n",
            "  publish_interval_ms: 1\n",
        ] {
            assert!(!have_one_discovery(&old, &config(more)), "{more}");
        }
    }
}
