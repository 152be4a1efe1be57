//! All addresses that clients connect to.

use std::net::SocketAddr;

use super::cluster::ClusterConfig;
use super::listener::Listener;
use super::tls::ListenerTls;
use crate::error::{ClusterError, in_range};

/// Of one process. A hand-over of its sockets has room for 32 addresses, with those of `listen` and the page.
const MOST_FURTHER: usize = 30;

/// An address that clients connect to, and the section of the file that says so.
#[derive(Debug, Clone)]
pub(crate) struct ListenerAt<'a> {
    pub(crate) section: String,
    pub(crate) listen: &'a str,
    pub(crate) tls: Option<&'a ListenerTls>,
}

impl ListenerAt<'_> {
    pub(crate) fn field(&self, name: &str) -> String {
        format!("{}.{name}", self.section)
    }

    /// An address of IPv4 that is written as one of IPv6 is returned as one of IPv4.
    pub(crate) fn address(&self) -> Result<SocketAddr, ClusterError> {
        let reason = match self.listen.parse::<SocketAddr>() {
            Ok(address) if address.port() > 0 => return Ok(canonical(address)),
            Ok(_) => "has port 0, so nobody would know which one it is",
            Err(_) => "is not an address and a port",
        };
        let reason = format!("{:?} {reason}", self.listen);
        Err(ClusterError::config(self.field("listen"), reason))
    }
}

/// Those of a list that has this name.
pub(crate) fn listed<'a>(
    name: &'a str,
    listeners: &'a [Listener],
) -> impl Iterator<Item = ListenerAt<'a>> {
    let listeners = listeners.iter().enumerate();
    listeners.map(move |(index, listener)| ListenerAt {
        section: format!("{name}[{index}]"),
        listen: &listener.listen,
        tls: listener.tls.as_ref(),
    })
}

impl ClusterConfig {
    /// All addresses that clients connect to; first the one of the section itself.
    pub(crate) fn listeners(&self) -> impl Iterator<Item = ListenerAt<'_>> {
        let first = ListenerAt {
            section: "cluster".to_owned(),
            listen: &self.listen,
            tls: self.tls.as_ref(),
        };
        let further = listed("cluster.further_listeners", &self.further_listeners);
        std::iter::once(first).chain(further)
    }

    /// Checks all addresses that are listened on, with that of the page.
    pub(super) fn check_listeners(&self) -> Result<(), ClusterError> {
        let further = self.further_listeners.len();
        in_range("cluster", "further_listeners", further, 0..=MOST_FURTHER)?;
        let mut taken = check_all(self.listeners())?;
        match &self.admin {
            Some(admin) => {
                let address = canonical(admin.listen);
                take(&mut taken, "cluster.admin.listen".to_owned(), address)
            }
            None => Ok(()),
        }
    }
}

type Taken = Vec<(String, SocketAddr)>;

/// Checks these, and returns their addresses.
pub(crate) fn check_all<'a>(
    listeners: impl Iterator<Item = ListenerAt<'a>>,
) -> Result<Taken, ClusterError> {
    let mut taken = Taken::new();
    for listener in listeners {
        let address = listener.address()?;
        if let Some(tls) = listener.tls {
            tls.validate(&listener.field("tls"))?;
        }
        take(&mut taken, listener.field("listen"), address)?;
    }
    Ok(taken)
}

fn canonical(mut address: SocketAddr) -> SocketAddr {
    // That of a network of one link only has a scope.
    if address.ip().to_canonical().is_ipv4() {
        address.set_ip(address.ip().to_canonical());
    }
    address
}

/// Two listeners cannot have one port, unless each has an address of its own.
fn take(taken: &mut Taken, field: String, address: SocketAddr) -> Result<(), ClusterError> {
    // That of IPv6 is for both.
    let is_in = |one: SocketAddr, other: SocketAddr| {
        other.ip().is_unspecified() && (other.is_ipv6() || one.is_ipv4())
    };
    let is_same = |other: SocketAddr| {
        address == other
            || address.port() == other.port() && (is_in(address, other) || is_in(other, address))
    };
    if let Some((by, other)) = taken.iter().find(|(_, other)| is_same(*other)) {
        let reason = format!("{address} is also taken by {by}, which is {other}");
        return Err(ClusterError::config(field, reason));
    }
    taken.push((field, address));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(listen: &str, further: &[&str]) -> String {
        let further: String = further
            .iter()
            .map(|further| format!("    - listen: '{further}'\n"))
            .collect();
        let yaml = format!(
            "cluster:\n  etcd: {{ endpoints: ['http://a:1'] }}\n  group: g\n  listen: '{listen}'\n  further_listeners:\n{further}"
        );
        match ClusterConfig::from_yaml(&yaml, "test") {
            Ok(config) => {
                let all: Vec<_> = config.listeners().map(|it| it.listen.to_owned()).collect();
                all.join(" ")
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn each_listener_has_an_address_of_its_own() {
        for (listen, further, expected) in [
            (
                "0.0.0.0:80",
                &["[::ffff:127.0.0.1]:80"][..],
                "also taken by",
            ),
            (
                "[fe80::1%1]:80",
                &["[fe80::1%2]:80"],
                "[fe80::1%1]:80 [fe80::1%2]:80",
            ),
            ("127.0.0.1:80", &["${X}"], "contains ${"),
            (
                "127.0.0.1:80",
                &["127.0.0.1:443"][..],
                "127.0.0.1:80 127.0.0.1:443",
            ),
            (
                "127.0.0.1:80",
                &["127.0.0.2:80"],
                "127.0.0.1:80 127.0.0.2:80",
            ),
            ("0.0.0.0:80", &["[::1]:80"], "0.0.0.0:80 [::1]:80"),
            (
                "0.0.0.0:80",
                &["127.0.0.1:80"],
                "also taken by cluster.listen",
            ),
            ("127.0.0.1:80", &["[::]:80"], "also taken by cluster.listen"),
            ("127.0.0.1:80", &["[::ffff:127.0.0.1]:80"], "also taken by"),
            (
                "127.0.0.1:80",
                &["127.0.0.1:81", "127.0.0.1:81"],
                "also taken by cluster.further_listeners[0].listen",
            ),
            (
                "127.0.0.1:80",
                &["localhost:81"],
                "further_listeners[0].listen",
            ),
            ("127.0.0.1:80", &["127.0.0.1:0"], "has port 0"),
        ] {
            let found = error(listen, further);
            assert!(found.contains(expected), "{listen} {further:?}: {found}");
        }
        let many: Vec<_> = (1..=31).map(|port| format!("127.0.0.1:{port}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let found = error("127.0.0.1:80", &many);
        assert!(
            found.contains("cluster.further_listeners") && found.contains("30"),
            "{found}"
        );
    }
}
