//! A line of the access log.

use std::fmt::Write;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde::ser::Serializer;

/// What is known of a request when it has ended.
#[derive(Debug, Clone, Serialize)]
pub(in crate::proxy) struct Entry {
    #[serde(serialize_with = "as_time")]
    pub(in crate::proxy) time: SystemTime,
    /// Behind trusted proxies.
    pub(in crate::proxy) client: Option<IpAddr>,
    pub(in crate::proxy) method: String,
    pub(in crate::proxy) target: String,
    pub(in crate::proxy) host: Option<String>,
    pub(in crate::proxy) protocol: &'static str,
    pub(in crate::proxy) tls: bool,
    /// Of the response; none if the client has got none.
    pub(in crate::proxy) status: Option<u16>,
    pub(in crate::proxy) bytes_received: usize,
    pub(in crate::proxy) bytes_sent: usize,
    pub(in crate::proxy) node: Option<String>,
    pub(in crate::proxy) upstream: Option<String>,
    /// How many backends were tried, or the same one again.
    pub(in crate::proxy) tries: usize,
    pub(in crate::proxy) outcome: &'static str,
    #[serde(rename = "duration_ms", serialize_with = "as_milliseconds")]
    pub(in crate::proxy) duration: Duration,
    /// From when the backend had the request until it answered.
    #[serde(rename = "upstream_ms", serialize_with = "as_some_milliseconds")]
    pub(in crate::proxy) latency: Option<Duration>,
    pub(in crate::proxy) grpc_status: Option<u16>,
    pub(in crate::proxy) traceparent: Option<String>,
    pub(in crate::proxy) referer: Option<String>,
    pub(in crate::proxy) user_agent: Option<String>,
    pub(in crate::proxy) error: Option<String>,
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

impl Entry {
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
            quoted(Some(&self.method)),
            quoted(Some(&self.target)),
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

    fn entry() -> Entry {
        Entry {
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
            node: Some("w1".to_owned()),
            upstream: Some("10.0.0.1:80".to_owned()),
            tries: 2,
            outcome: "succeeded",
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
