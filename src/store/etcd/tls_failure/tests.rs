//! Tests of the texts of TLS failures, with errors of `rustls` itself.

use super::*;

#[test]
fn other_transport_errors_are_not_about_tls() {
    assert_eq!(
        TlsFailure::of_text("transport error <- tcp connect error"),
        None
    );
}

/// The texts of `rustls` are not promised to stay.
#[cfg(feature = "tls")]
#[test]
fn failures_of_tls() {
    use std::time::Duration;

    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::{AlertDescription, CertificateError as C, Error, InvalidMessage};
    let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let expired = |now| C::ExpiredContext {
        time: at(now),
        not_after: at(1000),
    };
    let early = C::NotValidYetContext {
        time: at(1),
        not_before: at(1000),
    };
    let other_name = C::NotValidForNameContext {
        expected: ServerName::try_from("a.example").unwrap(),
        presented: vec!["b.example".to_owned()],
    };
    let client_certificate = "requires a client certificate";
    for (error, part) in [
        (C::UnknownIssuer.into(), "tls.ca_file"),
        (C::Expired.into(), "has expired"),
        (
            expired(2000).into(),
            "has expired; Unix time of its end: 1000",
        ),
        (C::NotValidYet.into(), "not valid yet"),
        (early.into(), "not valid yet; Unix time of its start: 1000"),
        (C::NotValidForName.into(), "tls.server_name"),
        (other_name.into(), "a.example"),
        (C::Revoked.into(), "is refused: Revoked"),
        (
            Error::AlertReceived(AlertDescription::CertificateRequired),
            client_certificate,
        ),
        (
            Error::AlertReceived(AlertDescription::BadCertificate),
            client_certificate,
        ),
        (
            Error::AlertReceived(AlertDescription::ProtocolVersion),
            "TLS alert ProtocolVersion",
        ),
        (
            Error::InvalidMessage(InvalidMessage::InvalidContentType),
            "does not speak TLS",
        ),
    ] {
        // As the transport returns it: inside an I/O error.
        let text = error_chain(&io::Error::other(error));
        let failure = TlsFailure::of_text(&text).unwrap_or_else(|| panic!("{text}"));
        let reason = failure.reason(None);
        assert!(reason.contains(part), "{text}: {reason}");
    }
    let failure = |now| TlsFailure::of_text(&error_chain(&Error::from(expired(now))));
    assert_eq!(
        failure(2000),
        failure(3000),
        "it is logged once, so its text must not change"
    );
}
