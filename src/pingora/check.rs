//! One check of one node.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ::pingora::connectors::TransportConnector;
use ::pingora::connectors::http::Connector;
use ::pingora::http::RequestHeader;
use ::pingora::lb::Backend;
use ::pingora::lb::health_check::HealthCheck as PingoraCheck;
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorType, Result};
use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http::header::{CONTENT_TYPE, HOST, TE};

use super::exchange::{Exchanged, exchange};
use super::short_error::shorten_error;
use super::system_cas::with_system_cas;
use crate::config::{CheckKind, HealthCheck};
use crate::error::ClusterError;

/// Bytes of a response that are looked at.
const KEPT: usize = 65_536;

/// Asks nodes whether they are well, as a [`HealthCheck`] describes. Also a check for a stock `LoadBalancer` of
/// Pingora:
///
/// ```
/// use pingora::lb::LoadBalancer;
/// use pingora::lb::selection::RoundRobin;
/// use pingora_etcd::config::HealthCheck;
/// use pingora_etcd::pingora::NodeCheck;
///
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// let mut load_balancer = LoadBalancer::<RoundRobin>::try_from_iter(["10.0.0.1:80"])?;
/// let mut check = HealthCheck::default();
/// check.path = "/healthz".to_owned();
/// load_balancer.set_health_check(Box::new(NodeCheck::new(check)?));
/// # Ok::<(), Box<dyn std::error::Error>>(()) })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct NodeCheck {
    config: Arc<HealthCheck>,
    transport: Arc<TransportConnector>,
    connector: Arc<Connector>,
}

impl fmt::Debug for NodeCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeCheck").field(&self.config).finish()
    }
}

impl NodeCheck {
    /// A check that is described so.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field, also when the CAs of the system, which Pingora
    /// reads in any case, cannot be used.
    pub fn new(config: HealthCheck) -> Result<Self, ClusterError> {
        config.validate("health_check")?;
        with_system_cas("health_check", || Self {
            config: Arc::new(config),
            transport: Arc::new(TransportConnector::new(None)),
            connector: Arc::new(Connector::new(None)),
        })
    }

    /// What it was made from.
    pub fn config(&self) -> &HealthCheck {
        &self.config
    }

    /// Asks the node at this peer. The error is why it is not well, in words.
    ///
    /// # Errors
    ///
    /// When there is no connection, no response in time, or not the one that was expected.
    pub async fn check(&self, peer: &HttpPeer) -> Result<(), String> {
        let within = Duration::from_millis(self.config.timeout_ms);
        match tokio::time::timeout(within, self.ask(peer)).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {} ms", self.config.timeout_ms)),
        }
    }

    async fn ask(&self, peer: &HttpPeer) -> Result<(), String> {
        let failed = |mut error: Box<Error>| {
            shorten_error(&mut error);
            match &error.context {
                Some(context) => format!("{}: {}", error.etype().as_str(), context.as_str()),
                None => error.etype().as_str().to_owned(),
            }
        };
        if self.config.kind == CheckKind::Tcp {
            let connected = self.transport.new_stream(peer).await;
            return connected.map(drop).map_err(failed);
        }
        let mut peer = peer.clone();
        // A connection of its own for each: one that is left over says nothing about a new one.
        peer.options.idle_timeout = Some(Duration::ZERO);
        // Pingora keeps a connection of HTTP/2 that has room for others, also after a failure.
        peer.options.max_h2_streams = 1;
        if self.config.kind == CheckKind::Grpc {
            peer.options.set_http_version(2, 2);
        }
        let (head, body) = self.request(&peer).map_err(failed)?;
        // The caller keeps the time of the check.
        let within = Duration::from_millis(self.config.timeout_ms) + Duration::from_secs(1);
        let answer = exchange(&self.connector, &peer, (head, body), KEPT, within).await;
        let answer = answer.map_err(failed)?;
        match self.config.kind {
            CheckKind::Grpc => is_serving(&answer),
            CheckKind::Http | CheckKind::Tcp => self.is_expected(&answer),
        }
    }

    fn request(&self, peer: &HttpPeer) -> Result<(RequestHeader, Bytes)> {
        let config = &self.config;
        let is_grpc = config.kind == CheckKind::Grpc;
        let (method, path) = match is_grpc {
            true => ("POST", "/grpc.health.v1.Health/Check"),
            false => (config.method.as_str(), config.path.as_str()),
        };
        let mut head = RequestHeader::build(method, path.as_bytes(), None)?;
        let host = config.host.clone();
        head.insert_header(HOST, host.unwrap_or_else(|| peer._address.to_string()))?;
        head.insert_header(
            "user-agent",
            concat!("pingora-etcd/", env!("CARGO_PKG_VERSION")),
        )?;
        for (name, value) in &config.headers {
            head.insert_header(name.clone(), value.as_str())?;
        }
        if !is_grpc {
            return Ok((head, Bytes::new()));
        }
        head.insert_header(CONTENT_TYPE, "application/grpc")?;
        head.insert_header(TE, "trailers")?;
        Ok((head, health_request(&config.service)))
    }

    fn is_expected(&self, answer: &Exchanged) -> Result<(), String> {
        let status = answer.head.status.as_u16();
        if !self
            .config
            .status
            .iter()
            .any(|range| range.contains(status))
        {
            return Err(format!("status {status}"));
        }
        match &self.config.body {
            Some(pattern)
                if !pattern
                    .regex()
                    .is_match(&String::from_utf8_lossy(&answer.body)) =>
            {
                Err("the body is not the expected one".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// The message of a call: no compression, its length, and, if it is not empty, field 1 as a text.
fn health_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_slice(&[0x0a, service.len() as u8]);
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len() as u32);
    frame.put_slice(&message);
    frame.freeze()
}

/// Whether the answer of a health service says `SERVING`, which is 1 in field 1.
fn is_serving(answer: &Exchanged) -> Result<(), String> {
    let status = |fields: &HeaderMap| {
        let value = fields.get("grpc-status")?;
        value.to_str().ok().map(str::to_owned)
    };
    let trailers = answer.trailers.as_ref().and_then(status);
    match trailers.or_else(|| status(&answer.head.headers)).as_deref() {
        Some("0") => {}
        Some(other) => return Err(format!("grpc-status {other}")),
        None => {
            return Err(format!(
                "status {} without a grpc-status",
                answer.head.status.as_u16()
            ));
        }
    }
    match answer.body.get(5..) {
        Some([0x08, 1, ..]) => Ok(()),
        _ => Err("it is not serving".to_owned()),
    }
}

/// Over plain text; for nodes with TLS there is
/// [`BalancerService::health_check_at`](super::BalancerService::health_check_at).
#[async_trait]
impl PingoraCheck for NodeCheck {
    async fn check(&self, target: &Backend) -> Result<()> {
        let peer = HttpPeer::new(target.addr.clone(), false, String::new());
        let result = Self::check(self, &peer).await;
        result.map_err(|reason| Error::explain(ErrorType::Custom("the check failed"), reason))
    }

    fn health_threshold(&self, success: bool) -> usize {
        let count = if success {
            self.config.rise
        } else {
            self.config.fall
        };
        count as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_names_its_service() {
        assert_eq!(&health_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(
            &health_request("ab")[..],
            [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']
        );
    }
}
