//! A line of the access log.

use std::fmt::Write;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use ::pingora::Error;
use ::pingora::proxy::Session;
use chrono::{DateTime, SecondsFormat, Utc};
use http::header::{HOST, REFERER, USER_AGENT};
use http::{HeaderName, Version};
use serde::Serialize;
use serde::ser::Serializer;

use crate::proxy::client::peer_of;
use crate::proxy::front::RefusedRequest;
use crate::proxy::outcome::{Outcome, final_status};
use crate::proxy::trace::traceparent;

/// A line of the access log: what is known of a request when it has ended.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AccessLogEntry {
    /// When it began.
    #[serde(serialize_with = "as_time")]
    pub time: SystemTime,
    /// The client, behind trusted proxies; none for one at a Unix socket.
    pub client: Option<IpAddr>,
    /// The method; empty if the request was refused before it was read.
    pub method: String,
    /// The target, as it was sent; empty if the request was refused before it was read.
    pub target: String,
    /// The host that was asked for.
    pub host: Option<String>,
    /// `HTTP/1.0`, `HTTP/1.1` or `HTTP/2.0`.
    pub protocol: &'static str,
    /// Whether it came over TLS.
    pub tls: bool,
    /// Of the response; none if the client has got none.
    pub status: Option<u16>,
    /// The length of the request's body.
    pub bytes_received: usize,
    /// The length of the response's body.
    pub bytes_sent: usize,
    /// The name of the group that served it, or could not; none if no route leads to one.
    pub group: Option<String>,
    /// The name of the route that was for it.
    pub route: Option<String>,
    /// The id of the node that it was sent to last.
    pub node: Option<String>,
    /// Its address.
    pub upstream: Option<String>,
    /// How many backends were tried, or the same one again.
    pub tries: usize,
    /// What the end of the request says about its backend.
    pub outcome: Outcome,
    /// From its head to the end of its response.
    #[serde(rename = "duration_ms", serialize_with = "as_milliseconds")]
    pub duration: Duration,
    /// From when the backend had the request until it answered.
    #[serde(rename = "upstream_ms", serialize_with = "as_some_milliseconds")]
    pub latency: Option<Duration>,
    /// The status of a call of gRPC.
    pub grpc_status: Option<u16>,
    /// The trace (W3C Trace Context).
    pub traceparent: Option<String>,
    /// `Referer`.
    pub referer: Option<String>,
    /// `User-Agent`.
    pub user_agent: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

impl AccessLogEntry {
    /// What Pingora knows of a request that began at this instant and has ended now; for the hook
    /// [`logging`](::pingora::proxy::ProxyHttp::logging). The client is the peer; nothing is said of the backend but the
    /// outcome.
    pub fn of(session: &Session, started: Instant, error: Option<&Error>) -> Self {
        let request = session.req_header();
        let field = |name: HeaderName| {
            let value = request.headers.get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let duration = started.elapsed();
        Self {
            time: SystemTime::now() - duration,
            client: peer_of(session),
            method: request.method.as_str().to_owned(),
            target: String::from_utf8_lossy(request.raw_path()).into_owned(),
            host: field(HOST).or_else(|| Some(request.uri.authority()?.to_string())),
            protocol: match request.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2.0",
                _ => "HTTP/1.1",
            },
            tls: session
                .digest()
                .is_some_and(|digest| digest.ssl_digest.is_some()),
            status: final_status(session).map(|status| status.as_u16()),
            bytes_received: session.body_bytes_read(),
            bytes_sent: session.body_bytes_sent(),
            group: None,
            route: None,
            node: None,
            upstream: None,
            tries: 0,
            outcome: Outcome::of(session, error),
            duration,
            latency: None,
            grpc_status: None,
            traceparent: traceparent(&request.headers).map(str::to_owned),
            referer: field(REFERER),
            user_agent: field(USER_AGENT),
            error: error.map(ToString::to_string),
        }
    }
}

impl From<RefusedRequest> for AccessLogEntry {
    /// Of a request that was not whole, or none at all, neither method nor target is known.
    fn from(refused: RefusedRequest) -> Self {
        let reason = match refused.status {
            408 => "the request did not arrive in time",
            431 => "the head of the request is too large",
            _ => "the request cannot be served",
        };
        Self {
            time: SystemTime::now() - refused.lasted,
            client: refused.client,
            method: String::new(),
            target: String::new(),
            host: None,
            protocol: "HTTP/1.1",
            tls: refused.is_over_tls,
            status: Some(refused.status),
            bytes_received: 0,
            bytes_sent: 0,
            group: None,
            route: None,
            node: None,
            upstream: None,
            tries: 0,
            outcome: Outcome::Unknown,
            duration: refused.lasted,
            latency: None,
            grpc_status: None,
            traceparent: None,
            referer: None,
            user_agent: None,
            error: Some(reason.to_owned()),
        }
    }
}

fn as_time<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let time = DateTime::<Utc>::from(*time);
    serializer.serialize_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn as_milliseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(milliseconds(*time))
}

fn as_some_milliseconds<S: Serializer>(
    time: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => as_milliseconds(time, serializer),
        None => serializer.serialize_none(),
    }
}

impl AccessLogEntry {
    /// One JSON object.
    pub(super) fn json(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }

    /// The combined log format, and after it the node, the tries, and the durations in seconds.
    pub(super) fn combined(&self) -> Vec<u8> {
        let client = self
            .client
            .map_or("-".to_owned(), |client| client.to_string());
        let time = DateTime::<Utc>::from(self.time).format("%d/%b/%Y:%H:%M:%S +0000");
        let status = self
            .status
            .map_or("-".to_owned(), |status| status.to_string());
        let latency = self
            .latency
            .map_or("-".to_owned(), |time| format!("{:.3}", time.as_secs_f64()));
        let line = format!(
            "{client} - - [{time}] \"{} {} {}\" {status} {} \"{}\" \"{}\" {} {} {:.3} {latency}\n",
            quoted(
                Some(&self.method)
                    .filter(|it| !it.is_empty())
                    .map(|it| &**it)
            ),
            quoted(
                Some(&self.target)
                    .filter(|it| !it.is_empty())
                    .map(|it| &**it)
            ),
            self.protocol,
            self.bytes_sent,
            quoted(self.referer.as_deref()),
            quoted(self.user_agent.as_deref()),
            quoted(self.node.as_deref()),
            self.tries,
            self.duration.as_secs_f64(),
        );
        line.into_bytes()
    }
}

/// A text between quotes: what would end it, or the line, is escaped as nginx does.
fn quoted(text: Option<&str>) -> String {
    let mut quoted = String::new();
    for character in text.unwrap_or("-").chars() {
        if character.is_control() || matches!(character, '"' | '\\' | ' ') && character != ' ' {
            let mut bytes = [0; 4];
            for byte in character.encode_utf8(&mut bytes).bytes() {
                // Writing to a text cannot fail.
                let _ = write!(quoted, "\\x{byte:02X}");
            }
        } else {
            quoted.push(character);
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> AccessLogEntry {
        AccessLogEntry {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            client: "192.0.2.7".parse().ok(),
            method: "GET".to_owned(),
            target: "/a\"b\n?x=1".to_owned(),
            host: Some("a".to_owned()),
            protocol: "HTTP/1.1",
            tls: false,
            status: Some(200),
            bytes_received: 0,
            bytes_sent: 12,
            group: None,
            route: None,
            node: Some("w1".to_owned()),
            upstream: Some("10.0.0.1:80".to_owned()),
            tries: 2,
            outcome: Outcome::Succeeded,
            duration: Duration::from_micros(12_345),
            latency: Some(Duration::from_micros(2_500)),
            grpc_status: None,
            traceparent: None,
            referer: None,
            user_agent: Some("curl \\".to_owned()),
            error: None,
        }
    }

    #[test]
    fn what_was_refused_has_a_line_without_a_target() {
        let mut entry = AccessLogEntry::from(RefusedRequest {
            client: "192.0.2.7".parse().ok(),
            is_over_tls: false,
            status: 408,
            lasted: Duration::from_secs(30),
        });
        entry.time = SystemTime::UNIX_EPOCH;
        let combined = String::from_utf8(entry.combined()).unwrap();
        assert_eq!(
            combined,
            "192.0.2.7 - - [01/Jan/1970:00:00:00 +0000] \"- - HTTP/1.1\" 408 0 \"-\" \"-\" - 0 30.000 -\n"
        );
    }

    #[test]
    fn a_line_is_one_line_whatever_the_client_has_sent() {
        let combined = String::from_utf8(entry().combined()).unwrap();
        assert_eq!(
            combined,
            "192.0.2.7 - - [14/Nov/2023:22:13:20 +0000] \"GET /a\\x22b\\x0A?x=1 HTTP/1.1\" 200 12 \"-\" \
             \"curl \\x5C\" w1 2 0.012 0.003\n"
        );
        let json = String::from_utf8(entry().json()).unwrap();
        assert_eq!(json.matches('\n').count(), 1);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["time"], "2023-11-14T22:13:20.123Z");
        assert_eq!(read["target"], "/a\"b\n?x=1");
        assert_eq!(read["duration_ms"], 12.345);
        assert_eq!(read["upstream_ms"], 2.5);
        assert!(read["error"].is_null());
    }
}
