//! Header fields that a route removes and sets.

use ::pingora::Result;
use ::pingora::http::{RequestHeader, ResponseHeader};
use http::{HeaderName, HeaderValue};

use super::client::remove_alike;
use super::headers::change_fields;
use crate::config;

/// What is removed, and then what is set.
#[derive(Debug, Default)]
pub(super) struct HeaderChanges {
    /// All that are removed or set.
    names: Vec<HeaderName>,
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
}

impl HeaderChanges {
    /// What the file says, which has been checked.
    pub(super) fn new(config: &config::HeaderChanges) -> Self {
        let removed = config.remove.iter().filter_map(|name| name.parse().ok());
        let set = config.set.iter().filter_map(|(name, value)| {
            let value = HeaderValue::from_str(value).ok()?;
            Some((name.parse().ok()?, value))
        });
        let (remove, set) = (removed.collect::<Vec<_>>(), set.collect::<Vec<_>>());
        let names = set.iter().map(|(name, _)| name).chain(&remove);
        Self {
            names: names.cloned().collect(),
            remove,
            set,
        }
    }

    /// Changes the fields that a backend gets. What it may take for one of these is removed, too.
    pub(super) fn change_request(&self, request: &mut RequestHeader) -> Result<()> {
        if !self.names.is_empty() {
            change_fields(request, |headers| {
                remove_alike(headers, &self.names);
                Ok(())
            })?;
        }
        for name in &self.remove {
            request.remove_header(name);
        }
        for (name, value) in &self.set {
            request.insert_header(name.clone(), value.clone())?;
        }
        Ok(())
    }

    /// Changes the fields that a client gets.
    pub(super) fn change_response(&self, response: &mut ResponseHeader) -> Result<()> {
        for name in &self.remove {
            response.remove_header(name);
        }
        for (name, value) in &self.set {
            response.insert_header(name.clone(), value.clone())?;
        }
        Ok(())
    }
}
