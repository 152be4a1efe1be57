//! The PROXY protocol (versions 1 and 2): which client a load balancer in front of this one speaks
//! for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ::pingora::protocols::Stream;
use bytes::{Buf, BytesMut};
use proxy_header::{Error, ParseConfig, ProxiedAddress, ProxyHeader};
use tokio::io::AsyncReadExt;

use crate::config::Network;

/// The longest header of version 1, and more than any of version 2 that carries what proxies send.
const LONGEST_V1: usize = 107;
const LONGEST_V2: usize = 4_096;

/// From whom headers are expected.
#[derive(Debug, Clone)]
pub(crate) struct ProxyHeaderRule {
    pub(crate) from: Vec<Network>,
    pub(crate) within: Duration,
}

/// What the start of a connection says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// The connection is another client's: its address, and the address that it connected to.
    Proxied(SocketAddr, SocketAddr),
    /// The connection is the load balancer's own, such as a health check.
    Local,
    /// There is no whole header yet.
    Incomplete,
    /// This is no header.
    Invalid,
}

impl ProxyHeaderRule {
    /// Whether a connection from this address begins with a header.
    pub(super) fn applies_to(&self, peer: IpAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer))
    }

    /// Reads the header; what follows it stays in `ahead`.
    pub(super) async fn read(
        &self,
        stream: &mut Stream,
        ahead: &mut BytesMut,
    ) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
        let reading = async {
            loop {
                match parse(ahead) {
                    (Start::Proxied(client, server), length) => {
                        ahead.advance(length);
                        return Ok(Some((client, server)));
                    }
                    (Start::Local, length) => {
                        ahead.advance(length);
                        return Ok(None);
                    }
                    (Start::Invalid, _) => return Err(io::ErrorKind::InvalidData.into()),
                    (Start::Incomplete, _) => {}
                }
                if stream.read_buf(ahead).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        };
        tokio::time::timeout(self.within, reading).await?
    }
}

/// What these bytes say, and the length of the header.
fn parse(bytes: &[u8]) -> (Start, usize) {
    let config = ParseConfig {
        include_tlvs: false,
        ..ParseConfig::default()
    };
    let may_grow = match bytes.first() {
        // A whole line is a whole header.
        Some(b'P') => bytes.len() < LONGEST_V1 && !bytes.contains(&b'\n'),
        _ => bytes.len() < LONGEST_V2,
    };
    match ProxyHeader::parse(bytes, config) {
        Ok((header, length)) => match header.proxied_address() {
            Some(ProxiedAddress {
                source,
                destination,
                ..
            }) => (Start::Proxied(*source, *destination), length),
            None => (Start::Local, length),
        },
        Err(Error::BufferTooShort) if may_grow => (Start::Incomplete, 0),
        Err(_) => (Start::Invalid, 0),
    }
}

/// Entry point for `tests/fuzz`: the length of the header with which these bytes begin.
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub fn proxy_header_length(bytes: &[u8]) -> Option<usize> {
    match parse(bytes) {
        (Start::Proxied(..) | Start::Local, length) => Some(length),
        (Start::Incomplete | Start::Invalid, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(client: &str, server: &str) -> Start {
        Start::Proxied(client.parse().unwrap(), server.parse().unwrap())
    }

    #[test]
    fn both_versions_are_read_up_to_their_end() {
        let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 80\r\n";
        let expected = addresses("192.0.2.1:5000", "192.0.2.2:80");
        let request = [&v1[..], b"GET / HTTP/1.1\r\n"].concat();
        assert_eq!(parse(&request), (expected, v1.len()));
        assert_eq!(parse(b"PROXY UNKNOWN\r\n").0, Start::Local);

        let mut v2 = Vec::new();
        let (client, server) = ("[2001:db8::1]:5000", "[2001:db8::2]:443");
        let address = ProxiedAddress::stream(client.parse().unwrap(), server.parse().unwrap());
        ProxyHeader::with_address(address)
            .encode_v2(&mut v2)
            .unwrap();
        assert_eq!(parse(&v2), (addresses(client, server), v2.len()));
        let mut local = Vec::new();
        ProxyHeader::with_local().encode_v2(&mut local).unwrap();
        assert_eq!(parse(&local).0, Start::Local);

        for whole in [&v1[..], &v2[..]] {
            for length in 0..whole.len() {
                assert_eq!(parse(&whole[..length]).0, Start::Incomplete, "{length}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_not_waited_for() {
        let endless = [b'P'; LONGEST_V1 + 1];
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"PROXY TCP5 x\r\n",
            &endless,
        ] {
            assert_eq!(parse(bytes).0, Start::Invalid, "{bytes:?}");
        }
        let mut long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".to_vec();
        long.resize(LONGEST_V2, 0);
        assert_eq!(parse(&long).0, Start::Invalid);
    }
}
