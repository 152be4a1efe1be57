//! Names with several addresses. A connection that is made by such a name goes to the first address that
//! accepts it, whatever it is good for: one that then says nothing, or is a learner's, would be all there
//! is. So each dial is to one address, and the next dial to the next.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::EtcdStore;

/// The endpoints whose names have several addresses.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeMap<String, Turn>);

#[derive(Debug)]
struct Turn {
    /// How many addresses there are.
    count: usize,
    next: usize,
}

impl Names {
    /// Of all these endpoints, as far as it is known: at least one of each.
    pub(super) fn addresses<'a>(&self, endpoints: impl Iterator<Item = &'a str>) -> usize {
        let counts = endpoints.map(|endpoint| self.0.get(endpoint).map_or(1, |turn| turn.count));
        counts.sum()
    }

    /// Whose turn it is of so many.
    fn take(&mut self, endpoint: &str, count: usize) -> usize {
        if count < 2 {
            self.0.remove(endpoint);
            return 0;
        }
        // Not all processes at the same one.
        let turn = self.0.entry(endpoint.to_owned()).or_insert_with(|| Turn {
            count,
            next: fastrand::usize(..count),
        });
        turn.count = count;
        let index = turn.next % count;
        turn.next = (index + 1) % count;
        index
    }

    /// A connection to the one that worked was given up, although it may answer a dial: it comes last.
    pub(super) fn failed(&mut self, endpoint: &str) {
        if let Some(turn) = self.0.get_mut(endpoint) {
            turn.next = (turn.next + 1) % turn.count;
        }
    }

    /// This one works: it comes first the next time.
    pub(super) fn worked(&mut self, endpoint: &str, index: usize) {
        if let Some(turn) = self.0.get_mut(endpoint) {
            turn.next = index;
        }
    }
}

/// One address of an endpoint's name.
pub(super) struct Address {
    /// As an endpoint.
    pub(super) endpoint: String,
    pub(super) index: usize,
    /// What its certificate is for.
    pub(super) name: String,
}

/// Scheme, host and port; nothing where the host is an address.
fn named(endpoint: &str) -> Option<(&str, &str, u16)> {
    let (scheme, rest) = match endpoint.find("://") {
        Some(at) => endpoint.split_at(at + 3),
        None => ("", endpoint),
    };
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
    let is_address = host.starts_with('[') || host.parse::<IpAddr>().is_ok();
    (!is_address).then_some((scheme, host, port.parse().ok()?))
}

impl EtcdStore {
    /// Which address is to be dialled, if the endpoint's name has several. One that cannot be resolved
    /// is left to the client, which says so.
    pub(super) async fn address_of(&self, endpoint: &str, within: Duration) -> Option<Address> {
        let (scheme, host, port) = named(endpoint)?;
        let looking = tokio::net::lookup_host((host, port));
        let found = tokio::time::timeout(within, looking).await.ok()?.ok()?;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in found {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        // A resolver may give them in another order each time.
        addresses.sort_unstable();
        let index = self.link().names.take(endpoint, addresses.len());
        (addresses.len() > 1).then(|| Address {
            endpoint: format!("{scheme}{}", addresses[index]),
            index,
            name: host.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_looked_up() {
        assert_eq!(
            named("https://etcd.internal:2379/"),
            Some(("https://", "etcd.internal", 2379))
        );
        assert_eq!(named("etcd:1"), Some(("", "etcd", 1)));
        for address in [
            "http://10.0.0.1:2379",
            "http://[::1]:2379",
            "10.0.0.1:2379",
            "etcd",
        ] {
            assert_eq!(named(address), None, "{address}");
        }
    }

    #[test]
    fn each_has_its_turn_and_one_that_works_keeps_it() {
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
