//! Host names with several addresses. A connection that is made by such a name goes to the first
//! address that accepts it, even if that member never answers or is a learner. So each dial goes to
//! one address, and the next dial to the next address.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The endpoints whose names have several addresses, with the address to dial next.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeMap<String, Rotation>);

#[derive(Debug)]
struct Rotation {
    /// How many addresses there are.
    count: usize,
    next: usize,
}

impl Names {
    /// The number of addresses of all these endpoints, as far as it is known: at least one each.
    pub(super) fn addresses<'a>(&self, endpoints: impl Iterator<Item = &'a str>) -> usize {
        let counts =
            endpoints.map(|endpoint| self.0.get(endpoint).map_or(1, |rotation| rotation.count));
        counts.sum()
    }

    /// The index of the address to dial now, of `count` addresses.
    pub(super) fn take(&mut self, endpoint: &str, count: usize) -> usize {
        if count < 2 {
            self.0.remove(endpoint);
            return 0;
        }
        // A random start, so that not all processes dial the same address first.
        let rotation = self
            .0
            .entry(endpoint.to_owned())
            .or_insert_with(|| Rotation {
                count,
                next: fastrand::usize(..count),
            });
        rotation.count = count;
        let index = rotation.next % count;
        rotation.next = (index + 1) % count;
        index
    }

    /// The connection to the address that worked was given up: that address comes last now.
    pub(super) fn failed(&mut self, endpoint: &str) {
        if let Some(rotation) = self.0.get_mut(endpoint) {
            rotation.next = (rotation.next + 1) % rotation.count;
        }
    }

    /// This address works: it comes first the next time.
    pub(super) fn worked(&mut self, endpoint: &str, index: usize) {
        if let Some(rotation) = self.0.get_mut(endpoint) {
            rotation.next = index;
        }
    }
}

/// The addresses of an endpoint's host name.
pub(super) struct Resolved<'a> {
    scheme: &'a str,
    pub(super) host: &'a str,
    addresses: Vec<SocketAddr>,
}

impl Resolved<'_> {
    pub(super) fn count(&self) -> usize {
        self.addresses.len()
    }

    /// One of the addresses, as an endpoint.
    pub(super) fn endpoint(&self, index: usize) -> Option<String> {
        let address = self.addresses.get(index)?;
        Some(format!("{}{address}", self.scheme))
    }
}

/// Looks up the addresses of an endpoint's name. `None` if its host is an address, and if the lookup
/// fails: the client resolves the name again then, and returns the error.
pub(super) async fn resolve(endpoint: &str, within: Duration) -> Option<Resolved<'_>> {
    let (scheme, host, port) = host_name(endpoint)?;
    let lookup = tokio::net::lookup_host((host, port));
    let found = tokio::time::timeout(within, lookup).await.ok()?.ok()?;
    let mut addresses: Vec<SocketAddr> = found.collect();
    // A resolver may return them in another order each time.
    addresses.sort_unstable();
    addresses.dedup();
    Some(Resolved {
        scheme,
        host,
        addresses,
    })
}

/// Scheme, host and port; `None` if the host is an address.
fn host_name(endpoint: &str) -> Option<(&str, &str, u16)> {
    let (scheme, rest) = match endpoint.find("://") {
        Some(at) => endpoint.split_at(at + 3),
        None => ("", endpoint),
    };
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
    let is_address = host.starts_with('[') || host.parse::<IpAddr>().is_ok();
    (!is_address).then_some((scheme, host, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_looked_up() {
        assert_eq!(
            host_name("https://etcd.internal:2379/"),
            Some(("https://", "etcd.internal", 2379))
        );
        assert_eq!(host_name("etcd:1"), Some(("", "etcd", 1)));
        for address in [
            "http://10.0.0.1:2379",
            "http://[::1]:2379",
            "10.0.0.1:2379",
            "etcd",
        ] {
            assert_eq!(host_name(address), None, "{address}");
        }
    }

    #[test]
    fn addresses_are_dialled_in_turn_and_one_that_works_is_kept() {
        let mut names = Names::default();
        let endpoints = ["a:1", "b:1"];
        assert_eq!(names.addresses(endpoints.into_iter()), 2);
        let [first, second, third, again] = [(); 4].map(|()| names.take("a:1", 3));
        assert_eq!(again, first);
        assert_eq!((second, third), ((first + 1) % 3, (first + 2) % 3));
        assert_eq!(names.addresses(endpoints.into_iter()), 4);
        names.worked("a:1", 0);
        assert_eq!(names.take("a:1", 3), 0);
        names.worked("a:1", 0);
        names.failed("a:1");
        assert_eq!(names.take("a:1", 3), 1);
        // There are fewer now.
        assert_eq!(names.take("a:1", 1), 0);
        assert!(names.take("a:1", 2) < 2);
        assert_eq!(names.addresses(endpoints.into_iter()), 3);
    }
}
