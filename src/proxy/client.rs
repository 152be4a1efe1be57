//! Who the client is, and what backends are told about it.

use std::net::IpAddr;

use ::pingora::ErrorType::InternalError;
use ::pingora::http::RequestHeader;
use ::pingora::proxy::Session;
use ::pingora::{OrErr, Result};
use http::header::{FORWARDED, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::front::Connection;
use crate::config::Network;

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
/// RFC 9440.
const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");
const CLIENT_CERT_CHAIN: HeaderName = HeaderName::from_static("client-cert-chain");

/// Which load balancers in front of this process are believed what they say about their clients.
///
/// ```
/// use pingora_etcd::config::Network;
/// use pingora_etcd::proxy::TrustedProxies;
///
/// let trusted: Network = "10.0.0.0/8".parse().unwrap();
/// let trusted = TrustedProxies::new([trusted]);
/// let ip = |text: &str| text.parse().unwrap();
/// let says = |text: &str| http::HeaderMap::from_iter([(
///     http::HeaderName::from_static("x-forwarded-for"),
///     http::HeaderValue::from_str(text).unwrap(),
/// )]);
/// // What the client itself has written stands at the left of what the proxies have added.
/// let headers = says("6.6.6.6, 192.0.2.7, 10.0.0.3");
/// assert_eq!(trusted.client_of(ip("10.0.0.2"), &headers), ip("192.0.2.7"));
/// assert_eq!(trusted.client_of(ip("192.0.2.1"), &headers), ip("192.0.2.1"));
/// ```
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Vec<Network>);

impl TrustedProxies {
    /// Those with an address in one of these networks.
    pub fn new(networks: impl IntoIterator<Item = Network>) -> Self {
        Self(networks.into_iter().collect())
    }

    /// Whether this address is one of theirs.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }

    /// Whether the client's request came over TLS: here, unless a trusted proxy says how it came to that.
    pub(super) fn is_over_tls(&self, session: &Session) -> bool {
        let proto = session.req_header().headers.get(PROTO);
        let is_trusted = || peer_of(session).is_none_or(|peer| self.contains(peer));
        let said = proto.filter(|_| is_trusted()).and_then(says_tls);
        said.unwrap_or_else(|| is_tls(session))
    }

    /// The client's address: that of the peer, or, where the peer is trusted, the rightmost one in
    /// `X-Forwarded-For` that is not. What is no address ends the list. IPv4 addresses that are
    /// written as IPv6 ones are returned as IPv4 addresses, so that a client has one address on all
    /// listeners.
    pub fn client_of(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        if !self.contains(client) {
            return client;
        }
        let values = headers.get_all(FOR).into_iter().rev();
        // Each part by itself: a byte in what the client has written says nothing of what proxies have added.
        let parts = values.flat_map(|value| value.as_bytes().rsplit(|byte| *byte == b','));
        for part in parts {
            let text = std::str::from_utf8(part.trim_ascii()).ok();
            let Some(address) = text.and_then(address) else {
                break;
            };
            client = address;
            if !self.contains(client) {
                break;
            }
        }
        client
    }
}

/// What this `X-Forwarded-Proto` says of that; of several values, the first one is of the client. Traefik has `ws` and
/// `wss` for a WebSocket.
fn says_tls(proto: &HeaderValue) -> Option<bool> {
    let first = proto.as_bytes().split(|byte| *byte == b',').next()?;
    let is_one_of = |names: [&str; 2]| {
        let first = first.trim_ascii();
        names
            .iter()
            .any(|name| first.eq_ignore_ascii_case(name.as_bytes()))
    };
    match (is_one_of(["https", "wss"]), is_one_of(["http", "ws"])) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

/// An address, possibly with a port or in brackets.
fn address(text: &str) -> Option<IpAddr> {
    let plain = text.parse::<IpAddr>().ok();
    let with_port = || text.parse().map(|socket: std::net::SocketAddr| socket.ip());
    let in_brackets = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    let address = plain.or_else(|| with_port().ok()).or_else(in_brackets)?;
    Some(address.to_canonical())
}

/// The address that a request came from, without a port; `None` for a Unix socket.
pub(super) fn peer_of(session: &Session) -> Option<IpAddr> {
    let address = session.client_addr()?.as_inet()?;
    Some(address.ip().to_canonical())
}

fn is_tls(session: &Session) -> bool {
    session
        .digest()
        .is_some_and(|digest| digest.ssl_digest.is_some())
}

/// Sets `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`. What was in them is kept only if a trusted
/// proxy sent it; `Forwarded` is not set, and kept under the same condition.
pub(super) fn set_forwarded(
    trusted: &TrustedProxies,
    session: &Session,
    headers: &mut HeaderMap,
    sends_forwarded: bool,
) -> Result<()> {
    let Some(peer) = peer_of(session) else {
        // Whoever can connect to a Unix socket of this machine is trusted.
        return Ok(());
    };
    let is_trusted = trusted.contains(peer);
    let connection = Connection::of(session);
    if !is_trusted {
        headers.remove(FORWARDED);
        while let Some(name) = headers.keys().find(is_hearsay).cloned() {
            headers.remove(&name);
        }
    }
    set_client_cert(session, headers, is_trusted);
    let list = match is_trusted {
        true => {
            let list = joined(headers.get_all(FOR), &peer.to_string());
            HeaderValue::from_bytes(&list).or_err(InternalError, "the list of clients")?
        }
        // The same for each request of the connection.
        false => match connection {
            Some(connection) => connection.peer_value(|| value_of(peer)).clone(),
            None => value_of(peer),
        },
    };
    headers.insert(FOR, list);
    let is_missing = |headers: &HeaderMap, name| !is_trusted || !headers.contains_key(name);
    if is_missing(headers, PROTO) {
        let proto = if is_tls(session) { "https" } else { "http" };
        headers.insert(PROTO, HeaderValue::from_static(proto));
    }
    if is_missing(headers, FORWARDED_HOST) {
        match host(session.req_header()) {
            Some(host) => headers.insert(FORWARDED_HOST, host),
            None => headers.remove(FORWARDED_HOST),
        };
    }
    if sends_forwarded {
        let proto = headers.get(PROTO).and_then(|value| value.to_str().ok());
        let host = host(session.req_header());
        let host = host.as_ref().and_then(|value| value.to_str().ok());
        let element = forwarded(peer, host, proto);
        let list = joined(headers.get_all(FORWARDED), &element);
        let list = HeaderValue::from_bytes(&list).or_err(InternalError, "the list of hops")?;
        headers.insert(FORWARDED, list);
    }
    if is_missing(headers, PORT) {
        match session.server_addr().and_then(|address| address.as_inet()) {
            Some(address) => {
                let value = || HeaderValue::from(address.port());
                headers.insert(
                    PORT,
                    connection
                        .map_or_else(value, |connection| connection.port_value(value).clone()),
                )
            }
            None => headers.remove(PORT),
        };
    }
    Ok(())
}

/// What this process knows of the hop before it, as RFC 7239 has it.
fn forwarded(peer: IpAddr, host: Option<&str>, proto: Option<&str>) -> String {
    let mut element = match peer {
        IpAddr::V4(address) => format!("for={address}"),
        IpAddr::V6(address) => format!("for=\"[{address}]\""),
    };
    // A colon and brackets need quotes; neither has any in it.
    if let Some(host) = host.filter(|host| !host.contains(['"', '\\'])) {
        element.push_str(&format!(";host=\"{host}\""));
    }
    if let Some(proto) =
        proto.filter(|proto| proto.bytes().all(|byte| byte.is_ascii_alphanumeric()))
    {
        element.push_str(&format!(";proto={proto}"));
    }
    element
}

/// Sets `Client-Cert` to what the client has shown here. What was in it is kept only if a trusted proxy
/// sent it.
fn set_client_cert(session: &Session, headers: &mut HeaderMap, is_trusted: bool) {
    let shown = Connection::of(session).and_then(|connection| connection.certificate());
    let is_certificate = |name: &HeaderName| name.as_str().starts_with("client-cert");
    if (shown.is_some() || !is_trusted) && headers.keys().any(is_certificate) {
        headers.remove(CLIENT_CERT);
        headers.remove(CLIENT_CERT_CHAIN);
    }
    if let Some(certificate) = shown {
        headers.insert(CLIENT_CERT, certificate.clone());
    }
}

fn value_of(peer: IpAddr) -> HeaderValue {
    // Digits, dots and colons are always a value.
    HeaderValue::from_str(&peer.to_string()).unwrap_or(HeaderValue::from_static("unknown"))
}

/// The host that the client asked for, with a port if it named one.
fn host(request: &RequestHeader) -> Option<HeaderValue> {
    let from_header = request.headers.get(HOST).cloned();
    from_header.or_else(|| HeaderValue::from_str(request.uri.authority()?.as_str()).ok())
}

/// The bytes as they came: what one part of a list is, does not matter to the others.
fn joined<'a>(values: impl IntoIterator<Item = &'a HeaderValue>, last: &str) -> Vec<u8> {
    let mut list = Vec::new();
    for value in values {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(last.as_bytes());
    list
}

/// Whether a field says of a client what only this proxy may say, or one that it trusts.
pub(super) fn is_claim(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name != "via" && SET_HERE.contains(&&*name) || name.starts_with(FORWARDED_PREFIX)
}

/// Takes out of a request what its client has no right to say, before something is decided by that, and says what is known
/// here: the certificate that the client has shown.
pub(super) fn replace_claims(trusted: &TrustedProxies, session: &mut Session) -> Result<()> {
    let is_trusted = peer_of(session).is_none_or(|peer| trusted.contains(peer));
    let shown = Connection::of(session).and_then(|connection| connection.certificate());
    let shown = shown.cloned();
    let request = session.req_header_mut();
    for name in SET_HERE.iter().filter(|name| is_claim(name)) {
        if !is_trusted || *name == "x-leader-epoch" {
            request.remove_header(*name);
        }
    }
    while !is_trusted && let Some(name) = request.headers.keys().find(is_hearsay).cloned() {
        request.remove_header(&name);
    }
    if let Some(certificate) = shown {
        request.remove_header(&CLIENT_CERT_CHAIN);
        request.insert_header(CLIENT_CERT, certificate)?;
    }
    Ok(())
}

/// Whether a field is one of those by which proxies speak of their clients, and this proxy does not set it.
fn is_hearsay(name: &&HeaderName) -> bool {
    let name = name.as_str();
    name == "x-real-ip" || name.starts_with(FORWARDED_PREFIX) && !SET_HERE.contains(&name)
}

const FORWARDED_PREFIX: &str = "x-forwarded-";

/// The headers that backends believe, because this proxy sets them, or takes them away from clients that it does not trust.
const SET_HERE: [&str; 10] = [
    "x-real-ip",
    "client-cert",
    "client-cert-chain",
    "x-leader-epoch",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "forwarded",
    "via",
];

/// Removes fields that CGI, WSGI and Rack cannot tell from these, which themselves stay: see [`remove_lookalikes`].
pub(super) fn remove_alike(headers: &mut HeaderMap, names: &[HeaderName]) {
    let folded = |byte: u8| {
        if byte.is_ascii_alphanumeric() {
            byte
        } else {
            b'-'
        }
    };
    let is_alike = |one: &HeaderName, other: &HeaderName| {
        let (one, other) = (one.as_str().bytes(), other.as_str().bytes());
        one.len() == other.len() && one.map(folded).eq(other.map(folded))
    };
    let is_lookalike = |name: &&HeaderName| {
        let is_set_here = names.contains(name) || SET_HERE.contains(&name.as_str());
        !is_set_here && names.iter().any(|ours| is_alike(name, ours))
    };
    while let Some(name) = headers.keys().find(is_lookalike).cloned() {
        headers.remove(&name);
    }
}

/// Removes headers that CGI, WSGI and Rack cannot tell from those that this proxy sets: they make
/// `X_LEADER_EPOCH` of `x-leader-epoch` and of `x_leader_epoch`.
pub(super) fn remove_lookalikes(headers: &mut HeaderMap) {
    // Names are in lower case.
    let is_plain = |byte: u8| byte.is_ascii_lowercase() | byte.is_ascii_digit() | (byte == b'-');
    let is_lookalike = |name: &&HeaderName| {
        let name = name.as_str().as_bytes();
        // Without a branch for each byte: there are a hundred or two in a request.
        let all_plain = name.iter().fold(true, |all, byte| all & is_plain(*byte));
        !all_plain
            && SET_HERE.iter().any(|ours| {
                let folded = name
                    .iter()
                    .map(|byte| if is_plain(*byte) { *byte } else { b'-' });
                folded.eq(ours.bytes())
            })
    };
    while let Some(name) = headers.keys().find(is_lookalike).cloned() {
        headers.remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_looks_like_a_name_is_removed_and_the_name_stays() {
        let mut headers = HeaderMap::new();
        let given = [
            "x-tenant",
            "x_tenant",
            "x.tenant",
            "x-tenant-id",
            "x-admin",
            "x-own",
        ];
        for name in given {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static("1"));
        }
        headers.insert("x-leader-epoch", HeaderValue::from_static("7"));
        let names = ["x-tenant", "x_admin", "x_leader_epoch"].map(HeaderName::from_static);
        remove_alike(&mut headers, &names);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["x-leader-epoch", "x-own", "x-tenant", "x-tenant-id"]);
    }

    #[test]
    fn the_client_is_the_first_from_the_right_that_is_not_trusted() {
        let networks = ["10.0.0.0/8", "::1"].map(|text| text.to_owned().try_into().unwrap());
        let trusted = TrustedProxies::new(networks);
        for (peer, values, client) in [
            ("192.0.2.1", &["1.1.1.1"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("::ffff:10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("::1", &["6.6.6.6", "1.1.1.1, 10.0.0.9"], "1.1.1.1"),
            ("10.0.0.1", &["10.0.0.2,10.0.0.3"], "10.0.0.2"),
            ("10.0.0.1", &["1.1.1.1, unknown, 10.0.0.3"], "10.0.0.3"),
            ("10.0.0.1", &["[2001:db8::1]:80"], "2001:db8::1"),
            ("10.0.0.1", &["[2001:db8::1]"], "2001:db8::1"),
            ("10.0.0.1", &["1.1.1.1:5000"], "1.1.1.1"),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(FOR, HeaderValue::from_str(value).unwrap());
            }
            assert_eq!(
                trusted.client_of(ip(peer), &headers),
                ip(client),
                "{values:?}"
            );
        }
    }

    /// Such a byte is allowed in a field, and whoever is trusted adds its part in the same one.
    #[test]
    fn what_a_client_has_written_hides_nothing_that_a_proxy_has_added() {
        let trusted = TrustedProxies::new(["10.0.0.0/8".parse().unwrap()]);
        let value = HeaderValue::from_bytes(b"\xff, 203.0.113.9").unwrap();
        let headers = HeaderMap::from_iter([(FOR, value.clone())]);
        assert_eq!(
            trusted.client_of(ip("10.0.0.2"), &headers),
            ip("203.0.113.9")
        );
        let list = joined(headers.get_all(FOR), "10.0.0.2");
        assert_eq!(list, b"\xff, 203.0.113.9, 10.0.0.2");
        let headers =
            HeaderMap::from_iter([(FOR, HeaderValue::from_bytes(b"1.1.1.1, \xff").unwrap())]);
        assert_eq!(trusted.client_of(ip("10.0.0.2"), &headers), ip("10.0.0.2"));
    }

    #[test]
    fn what_only_a_proxy_may_say_is_a_claim() {
        for name in [
            "Client-Cert",
            "x-real-ip",
            "X-Forwarded-Ssl",
            "forwarded",
            "x-leader-epoch",
        ] {
            assert!(is_claim(name), "{name}");
        }
        for name in ["via", "x-tenant", "x-forwarded", "cookie"] {
            assert!(!is_claim(name), "{name}");
        }
    }

    #[test]
    fn the_first_protocol_is_that_of_the_client() {
        for (text, expected) in [
            ("https", Some(true)),
            ("HTTPS , http", Some(true)),
            ("wss", Some(true)),
            ("http, https", Some(false)),
            ("ws", Some(false)),
            ("", None),
            ("h2", None),
        ] {
            assert_eq!(says_tls(&HeaderValue::from_static(text)), expected);
        }
    }

    #[test]
    fn names_that_differ_by_underscores_are_removed() {
        let mut headers = HeaderMap::new();
        for name in [
            "x_leader_epoch",
            "X-Leader_Epoch",
            "x.forwarded.for",
            "x_custom",
            "x-forwarded-for",
        ] {
            let name: HeaderName = name.parse().unwrap();
            headers.insert(name, HeaderValue::from_static("1"));
        }
        remove_lookalikes(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["x-forwarded-for", "x_custom"]);
    }
}
