//! What of a new configuration can be taken over, and what needs a restart. Pure.

use std::collections::BTreeMap;

use crate::config::{ClusterConfig, ListenerTls, Route};
use crate::error::ClusterError;

/// What Pingora got at the start, and keeps for clients of HTTP/2: over HTTP/1 these are taken over.
#[derive(Debug, Clone, Copy)]
pub(super) struct AtStart {
    head_bytes: usize,
    headers: usize,
}

impl AtStart {
    pub(super) fn of(config: &ClusterConfig) -> Self {
        Self {
            head_bytes: config.clients.head_bytes,
            headers: config.clients.headers,
        }
    }
}

/// The new configuration, with the values of the old one in the fields that need a restart, and the names of
/// those of them that differ.
pub(super) fn usable(
    old: &ClusterConfig,
    new: &ClusterConfig,
    at_start: AtStart,
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
        access_log,
        opentelemetry,
        admin,
        drain_delay_ms,
        clients.h2c,
        clients.requests_per_connection
    );
    keep_addresses(&mut usable, old, &mut kept);
    let now = AtStart::of(&usable);
    for (field, differs) in [
        ("clients.head_bytes", now.head_bytes != at_start.head_bytes),
        ("clients.headers", now.headers != at_start.headers),
    ] {
        if differs {
            kept.push(format!("cluster.{field} (over HTTP/2)"));
        }
    }
    (usable, kept)
}

/// Checks that no new route sends clients to where nobody listens before a restart.
pub(super) fn check_listeners_of_routes(
    used: &ClusterConfig,
    old: &ClusterConfig,
    new: &ClusterConfig,
) -> Result<(), ClusterError> {
    let has_tls = |config: &ClusterConfig| config.listeners().any(|it| it.tls.is_some());
    if has_tls(used) || !has_tls(new) {
        return Ok(());
    }
    let is_for_tls = |route: &&Route| {
        let redirect = route.redirect.as_ref();
        redirect.is_some_and(|redirect| redirect.to.starts_with("https:"))
    };
    let mut routes = new.routes.iter().enumerate();
    let first = routes.find(|(_, route)| is_for_tls(route) && !old.routes.contains(route));
    match first {
        Some((index, _)) => Err(ClusterError::config(
            format!("cluster.routes[{index}].redirect"),
            "sends clients to a listener with TLS, which needs a restart: nothing is taken over before that",
        )),
        None => Ok(()),
    }
}

/// Goes on listening where the old configuration says, with the TLS that the new one has for each of these addresses;
/// the old one, where it has none.
fn keep_addresses(usable: &mut ClusterConfig, old: &ClusterConfig, kept: &mut Vec<String>) {
    let new: BTreeMap<String, Option<ListenerTls>> = usable
        .listeners()
        .map(|listener| (listener.listen.to_owned(), listener.tls.cloned()))
        .collect();
    let had = |listen: &str| old.listeners().any(|listener| listener.listen == listen);
    let has = |listen: &str| new.contains_key(listen);
    let is_first_other = !had(&usable.listen) || !has(&old.listen);
    let further = |config: &ClusterConfig| {
        let further = config.further_listeners.iter();
        further
            .map(|listener| listener.listen.clone())
            .collect::<Vec<_>>()
    };
    let is_any_other = further(usable).iter().any(|listen| !had(listen))
        || further(old).iter().any(|listen| !has(listen));
    let others = [
        ("listen", is_first_other),
        ("further_listeners", is_any_other),
    ];
    let others = others.iter().filter(|(_, is_other)| *is_other);
    kept.extend(others.map(|(field, _)| format!("cluster.{field}")));
    let tls_at = |listen: &str, before: &Option<ListenerTls>| {
        let now = new.get(listen);
        now.unwrap_or(before).clone()
    };
    usable.listen.clone_from(&old.listen);
    usable.tls = tls_at(&old.listen, &old.tls);
    usable.further_listeners.clone_from(&old.further_listeners);
    for listener in &mut usable.further_listeners {
        listener.tls = tls_at(&listener.listen, &listener.tls);
    }
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
    use crate::config::Listener;

    fn config(more: &str) -> ClusterConfig {
        let yaml = format!("cluster:\n  etcd: {{ endpoints: ['http://a:1'] }}\n  group: g\n{more}");
        ClusterConfig::from_yaml(&yaml, "test").unwrap()
    }

    #[test]
    fn what_needs_a_restart_keeps_its_value_and_is_named() {
        let old = config("");
        let new =
            config("  listen: 127.0.0.1:7\n  retries: 1\n  clients: { h2c: false, headers: 9 }\n");
        let idle = AtStart::of(&old);
        let (usable, kept) = usable(&old, &new, idle);
        let of_http_2 = "cluster.clients.headers (over HTTP/2)";
        assert_eq!(kept, ["cluster.clients.h2c", "cluster.listen", of_http_2]);
        assert_eq!((&usable.listen, usable.clients.h2c), (&old.listen, true));
        assert_eq!((usable.retries, usable.clients.headers), (1, 9));
        assert_eq!(super::usable(&old, &old, idle), (old.clone(), Vec::new()));
    }

    /// Addresses, each with the file of its certificate, or without TLS.
    fn at(listeners: &[(&str, Option<&str>)]) -> ClusterConfig {
        let mut config = config("");
        let mut all = listeners.iter().map(|(listen, file)| {
            let tls = file.map_or("null".to_owned(), |file| {
                format!("{{ certificates: [{{ cert_file: {file}, key_file: k }}] }}")
            });
            let yaml = format!("{{ listen: '{listen}', tls: {tls} }}");
            serde_saphyr::from_str::<Listener>(&yaml).unwrap()
        });
        let first = all.next().unwrap();
        (config.listen, config.tls) = (first.listen, first.tls);
        config.further_listeners = all.collect();
        config
    }

    #[test]
    fn addresses_need_a_restart_and_their_certificates_do_not() {
        let (a, b, none) = (Some("a"), Some("b"), None);
        let (plain, tls, other) = ("127.0.0.1:80", "127.0.0.1:443", "127.0.0.1:8");
        let [first, further] = ["cluster.listen", "cluster.further_listeners"];
        for (old, new, expected, named) in [
            (
                &[(plain, none), (tls, a)][..],
                &[(plain, none), (tls, b)][..],
                &[(plain, none), (tls, b)][..],
                &[][..],
            ),
            // The other way round is the same.
            (
                &[(plain, none), (tls, a)],
                &[(tls, b), (plain, none)],
                &[(plain, none), (tls, b)],
                &[],
            ),
            // From one to two, and back: each address does what it did.
            (
                &[(tls, a)],
                &[(plain, none), (tls, b)],
                &[(tls, b)],
                &[first],
            ),
            (
                &[(plain, none), (tls, a)],
                &[(tls, b)],
                &[(plain, none), (tls, b)],
                &[first],
            ),
            // One more, one less, and another one beside one that changes.
            (
                &[(plain, none), (tls, a)],
                &[(plain, none), (tls, b), (other, none)],
                &[(plain, none), (tls, b)],
                &[further],
            ),
            (
                &[(plain, none), (tls, a), (other, a)],
                &[(plain, none), (tls, b)],
                &[(plain, none), (tls, b), (other, a)],
                &[further],
            ),
            (
                &[(plain, none), (tls, a)],
                &[(other, none)],
                &[(plain, none), (tls, a)],
                &[first, further],
            ),
        ] {
            let (old, new) = (at(old), at(new));
            let (usable, kept) = usable(&old, &new, AtStart::of(&old));
            assert_eq!(kept, named, "{new:?}");
            assert_eq!(usable, at(expected));
        }
    }

    #[test]
    fn what_is_taken_over_in_part_is_named_until_it_is_what_it_was() {
        let (first, second) = (config(""), config("  clients: { headers: 50 }\n"));
        let at_start = AtStart::of(&first);
        for (old, new, is_named) in [
            (&first, &second, true),
            (&second, &second, true),
            (&second, &first, false),
        ] {
            let (usable, kept) = usable(old, new, at_start);
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

    #[test]
    fn no_route_sends_clients_to_a_listener_that_is_there_only_after_a_restart() {
        let (plain, tls) = ("127.0.0.1:80", "127.0.0.1:443");
        let old = at(&[(plain, None)]);
        let routed = |mut config: ClusterConfig| {
            let route = "{ redirect: { to: 'https://a.test' } }";
            config.routes.push(serde_saphyr::from_str(route).unwrap());
            config
        };
        let checked = |old: &ClusterConfig, new: &ClusterConfig| {
            let (used, _) = usable(old, new, AtStart::of(old));
            check_listeners_of_routes(&used, old, new)
        };
        let new = routed(at(&[(plain, None), (tls, Some("a"))]));
        let error = checked(&old, &new).unwrap_err().to_string();
        assert!(error.contains("cluster.routes[0].redirect"), "{error}");
        // Another process may listen there.
        checked(&old, &routed(old.clone())).unwrap();
        // It is there, or was meant before.
        checked(&at(&[(plain, None), (tls, Some("a"))]), &new).unwrap();
        checked(&routed(old.clone()), &new).unwrap();
    }
}
