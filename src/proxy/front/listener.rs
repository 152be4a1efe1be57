//! Where clients connect.

use std::net::SocketAddr;

use crate::config::ListenerAt;
use crate::error::ClusterError;
use crate::proxy::tls::ClientTls;

/// An address that clients connect to.
#[derive(Clone)]
pub(crate) struct FrontListener {
    pub(crate) address: SocketAddr,
    /// TLS to them.
    pub(crate) tls: Option<ClientTls>,
}

impl FrontListener {
    /// These, in their order.
    ///
    /// # Errors
    ///
    /// When an address cannot be understood, or a file for TLS cannot be used.
    pub(crate) fn all<'a>(
        listeners: impl Iterator<Item = ListenerAt<'a>>,
    ) -> Result<Vec<Self>, ClusterError> {
        listeners.map(|listener| Self::new(&listener)).collect()
    }

    /// The same of one.
    ///
    /// # Errors
    ///
    /// As for all.
    pub(crate) fn new(listener: &ListenerAt<'_>) -> Result<Self, ClusterError> {
        let tls = listener.tls;
        let tls = tls.map(|tls| ClientTls::new(tls, &listener.field("tls")));
        Ok(Self {
            address: listener.address()?,
            tls: tls.transpose()?,
        })
    }

    /// The one that a connection to this address came to: one that is for this address alone comes before one for all
    /// addresses of the machine.
    pub(super) fn of(listeners: &[Self], local: SocketAddr) -> Option<&Self> {
        let with_port = || {
            listeners
                .iter()
                .filter(|it| it.address.port() == local.port())
        };
        let local = match local {
            // Two addresses of one link only may differ by their scope.
            SocketAddr::V6(mut own) if own.ip().to_ipv4_mapped().is_none() => {
                own.set_flowinfo(0);
                own.into()
            }
            other => SocketAddr::new(other.ip().to_canonical(), other.port()),
        };
        let is_own = |it: &&Self| it.address == local;
        let is_any = |it: &&Self| it.address.ip().is_unspecified();
        with_port()
            .find(is_own)
            .or_else(|| with_port().find(is_any))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_belongs_to_the_listener_of_its_address() {
        let addresses = [
            "0.0.0.0:80",
            "[::1]:80",
            "[::]:443",
            "127.0.0.1:81",
            "127.0.0.2:81",
            "[fe80::1%1]:84",
            "[fe80::1%2]:84",
        ];
        let listeners = addresses.map(|address| FrontListener {
            address: address.parse().unwrap(),
            tls: None,
        });
        for (local, expected) in [
            ("127.0.0.1:80", Some("0.0.0.0:80")),
            ("[::1]:80", Some("[::1]:80")),
            ("[::ffff:127.0.0.1]:443", Some("[::]:443")),
            ("127.0.0.1:443", Some("[::]:443")),
            ("127.0.0.2:81", Some("127.0.0.2:81")),
            ("127.0.0.3:81", None),
            ("127.0.0.1:82", None),
            ("[fe80::1%2]:84", Some("[fe80::1%2]:84")),
        ] {
            let found = FrontListener::of(&listeners, local.parse().unwrap());
            let found = found.map(|listener| listener.address.to_string());
            assert_eq!(found.as_deref(), expected, "{local}");
        }
    }
}
