//! `Via`: a mark of this process on requests, by which it recognises one that comes back.

use std::fmt::Write;

use http::header::VIA;
use http::{HeaderMap, HeaderValue};

/// The mark of this process.
#[derive(Debug)]
pub(super) struct ViaMark {
    name: String,
    value: HeaderValue,
}

impl ViaMark {
    /// A mark that no other process has.
    pub(super) fn new() -> Self {
        let mut name = "pingora-etcd-".to_owned();
        // Writing to a text cannot fail.
        let _ = write!(name, "{:016x}", fastrand::u64(..));
        let value = HeaderValue::from_str(&format!("1.1 {name}"));
        Self {
            value: value.unwrap_or(HeaderValue::from_static("1.1 pingora-etcd")),
            name,
        }
    }

    /// Whether the request has already been through this process.
    pub(super) fn is_on(&self, headers: &HeaderMap) -> bool {
        headers.get_all(VIA).into_iter().any(|value| {
            let text = value.to_str().unwrap_or_default();
            text.split([',', ' ']).any(|word| word == self.name)
        })
    }

    pub(super) fn add_to(&self, headers: &mut HeaderMap) {
        headers.append(VIA, self.value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_comes_back_is_recognised() {
        let (ours, other) = (ViaMark::new(), ViaMark::new());
        let mut headers = HeaderMap::new();
        headers.insert(VIA, HeaderValue::from_static("1.0 fred, 1.1 p.example.net"));
        other.add_to(&mut headers);
        assert!(!ours.is_on(&headers) && other.is_on(&headers));
        ours.add_to(&mut headers);
        assert!(ours.is_on(&headers));
    }
}
