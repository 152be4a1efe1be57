//! Why a TLS connection failed, from the text of the error: the types of `rustls` do not come through
//! all the layers above it.

use std::error::Error;
use std::io;

use super::tls::TlsOptions;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TlsFailure {
    /// etcd refuses the client certificate, or requires one.
    ClientCertificate,
    /// Anything else, as a text for the user.
    Other(String),
}

impl TlsFailure {
    /// The failure that the text of a transport error describes, if it is about TLS.
    pub(super) fn of_text(text: &str) -> Option<Self> {
        let has = |part: &str| text.contains(part);
        let reason = if has("UnknownIssuer") || has("BadSignature") {
            "its certificate is not signed by a CA in tls.ca_file, or by one that the system trusts \
             where that is not set"
                .to_owned()
        } else if has("certificate expired") || has("invalid peer certificate: Expired") {
            // Without the current time, with which each such error would be different.
            let end = number_after(text, "not valid after ", "; Unix time of its end: ");
            format!("its certificate has expired{end}")
        } else if has("certificate not valid yet") || has("NotValidYet") {
            let start = number_after(text, "not valid before ", "; Unix time of its start: ");
            format!("its certificate is not valid yet{start}")
        } else if has("certificate not valid for name") || has("NotValidForName") {
            let names = after(text, "certificate not valid for name");
            format!(
                "its certificate is for another name, see tls.server_name: not valid for name {names}"
            )
        } else if has("received fatal alert") {
            return Some(Self::of_alert(after(text, "received fatal alert: ")));
        } else if has("InvalidContentType") || has("tls handshake eof") {
            "it does not speak TLS there, perhaps an endpoint for http://".to_owned()
        } else if has("invalid peer certificate") {
            let why = after(text, "invalid peer certificate");
            format!("its certificate is refused: {why}")
        } else if has("no native certs found") {
            "the system has no CAs, set tls.ca_file".to_owned()
        } else if has("peer is incompatible") || has("peer misbehaved") || has("HTTP/2 was not neg")
        {
            text.to_owned()
        } else {
            return None;
        };
        Some(Self::Other(reason))
    }

    fn of_alert(alert: &str) -> Self {
        let of_certificate = ["Certificate", "UnknownCA", "AccessDenied"];
        if of_certificate.iter().any(|part| alert.contains(part)) {
            Self::ClientCertificate
        } else {
            Self::Other(format!("it sends the TLS alert {alert}"))
        }
    }

    /// The text for the user, whose TLS options these are.
    pub(super) fn reason(&self, tls: Option<&TlsOptions>) -> String {
        match (self, tls.and_then(|tls| tls.cert_file.as_ref())) {
            (Self::Other(reason), _) => reason.clone(),
            (Self::ClientCertificate, Some(path)) => {
                format!("etcd refuses the client certificate {}", path.display())
            }
            (Self::ClientCertificate, None) => {
                "etcd requires a client certificate, and tls.cert_file is not set".to_owned()
            }
        }
    }
}

/// Whether a connection that had been made was closed by the other side.
pub(super) fn is_closed(reason: &str) -> bool {
    [
        "broken pipe",
        "reset by peer",
        "operation was canceled",
        "closed",
        "eof",
    ]
    .iter()
    .any(|closed| reason.contains(closed))
}

/// The number that follows `part`, after `label`; empty if there is none.
fn number_after(text: &str, part: &str, label: &str) -> String {
    let rest = text.split_once(part).map_or("", |(_, rest)| rest);
    let end = rest.find(|c: char| !c.is_ascii_digit());
    match &rest[..end.unwrap_or(rest.len())] {
        "" => String::new(),
        number => format!("{label}{number}"),
    }
}

/// The text that follows `part`, up to the next error in the chain.
fn after<'t>(text: &'t str, part: &str) -> &'t str {
    let start = text.find(part).map_or(0, |start| start + part.len());
    let rest = text[start..].trim_start_matches([':', ' ']);
    rest.split(SEPARATOR).next().unwrap_or_default()
}

const SEPARATOR: &str = " <- ";

/// The texts of an error and of its causes.
pub(super) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        // Many errors repeat their cause, or say nothing.
        let is_empty = text == "transport error" && error.source().is_some();
        if !is_empty && !texts.iter().any(|before| before.contains(&text)) {
            texts.push(text);
        }
        // The `source` of an I/O error is not the error that it wraps, but the source of that one.
        let io = error.downcast_ref::<io::Error>();
        next = match io.and_then(|io| io.get_ref()) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    texts.join(SEPARATOR)
}

#[cfg(test)]
mod tests;
