//! What the proxy changes in the fields of each message, as a part for a proxy of one's own.

use std::net::IpAddr;

use ::pingora::Result;
use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::proxy::Session;
use http::HeaderMap;

use super::client::{TrustedProxies, peer_of, remove_lookalikes, set_forwarded};
use super::headers::{LEADER_EPOCH, change_fields, change_response_fields};
use super::hop_by_hop::remove_hop_by_hop;
use super::via::ViaMark;

/// What a backend is told of the client, and what of the connection to a backend does not reach the client. The
/// bundled proxy does this with each message. Make one for the process, and share it.
///
/// ```
/// use async_trait::async_trait;
/// use pingora::http::{RequestHeader, ResponseHeader};
/// use pingora::prelude::{HttpPeer, ProxyHttp, Result, Session};
/// use pingora::{Error, ErrorType};
/// use pingora_etcd::proxy::{HeaderPolicy, TrustedProxies};
///
/// struct Proxy {
///     headers: HeaderPolicy,
/// }
///
/// #[async_trait]
/// impl ProxyHttp for Proxy {
///     type CTX = ();
///     fn new_ctx(&self) {}
///
///     async fn request_filter(&self, session: &mut Session, _: &mut ()) -> Result<bool> {
///         // A node that is registered at this proxy's own address.
///         if self.headers.has_come_back(session) {
///             return Err(Error::new(ErrorType::HTTPStatus(508)));
///         }
///         Ok(false)
///     }
///
///     async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
///         Ok(Box::new(HttpPeer::new("10.0.0.1:8080", false, String::new())))
///     }
///
///     async fn upstream_request_filter(
///         &self,
///         session: &mut Session,
///         request: &mut RequestHeader,
///         _: &mut (),
///     ) -> Result<()> {
///         self.headers.change_request(session, request)
///     }
///
///     async fn upstream_response_filter(
///         &self,
///         _: &mut Session,
///         response: &mut ResponseHeader,
///         _: &mut (),
///     ) -> Result<()> {
///         self.headers.change_response(response);
///         Ok(())
///     }
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let trusted = TrustedProxies::new(["10.0.0.0/8".parse()?]);
/// let proxy = Proxy { headers: HeaderPolicy::new(trusted) };
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct HeaderPolicy {
    trusted: TrustedProxies,
    sends_forwarded: bool,
    via: ViaMark,
}

impl HeaderPolicy {
    /// Believes what these load balancers say about their clients.
    pub fn new(trusted: TrustedProxies) -> Self {
        Self {
            trusted,
            sends_forwarded: false,
            via: ViaMark::new(),
        }
    }

    /// Whether backends get `Forwarded` (RFC 7239), too. Default: false.
    #[must_use]
    pub fn forwarded(mut self, sends: bool) -> Self {
        self.sends_forwarded = sends;
        self
    }

    /// The client's address: see [`TrustedProxies::client_of`]. `None` for a client at a Unix socket.
    pub fn client_of(&self, session: &Session) -> Option<IpAddr> {
        let headers = &session.req_header().headers;
        peer_of(session).map(|peer| self.trusted.client_of(peer, headers))
    }

    /// Whether the request has been through this process before, by its `Via`: answer it with 508.
    pub fn has_come_back(&self, session: &Session) -> bool {
        self.via.is_on(&session.req_header().headers)
    }

    /// For [`upstream_request_filter`](::pingora::proxy::ProxyHttp::upstream_request_filter). Sets `X-Forwarded-For`,
    /// `-Proto`, `-Host` and `-Port`, keeps what was in them only if a trusted proxy has sent it, and adds `Via`.
    /// Removes `x-leader-epoch`, which no client may set: insert the token of your own afterwards; and fields that CGI,
    /// WSGI and Rack cannot tell from any of these, such as `x_leader_epoch`. Names are in lower case afterwards.
    ///
    /// # Errors
    ///
    /// `InternalError` if a list in a field would be no valid value.
    pub fn change_request(&self, session: &Session, request: &mut RequestHeader) -> Result<()> {
        change_fields(request, |headers| {
            let said = (&self.trusted, self.sends_forwarded, &self.via);
            headers.remove(&LEADER_EPOCH);
            tell_backend(session, headers, said)
        })
    }

    /// For [`upstream_response_filter`](::pingora::proxy::ProxyHttp::upstream_response_filter). Removes `Keep-Alive`,
    /// `Trailer`, `Proxy-*` and the fields that `Connection` names (RFC 9110, section 7.6.1). Returns after how many
    /// seconds the backend closes an idle connection, if it says so. Names are in lower case afterwards.
    pub fn change_response(&self, response: &mut ResponseHeader) -> Option<u64> {
        let status = response.status;
        change_response_fields(response, |headers| remove_hop_by_hop(status, headers))
    }
}

/// What each backend is told of the client and of this process.
pub(super) fn tell_backend(
    session: &Session,
    headers: &mut HeaderMap,
    (trusted, sends_forwarded, via): (&TrustedProxies, bool, &ViaMark),
) -> Result<()> {
    remove_lookalikes(headers);
    set_forwarded(trusted, session, headers, sends_forwarded)?;
    via.add_to(headers);
    Ok(())
}
