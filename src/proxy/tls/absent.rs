//! What stands for TLS where the feature `proxy-tls` is off: nothing of it can exist.

use std::path::Path;
use std::time::Duration;

use ::pingora::protocols::Stream;
use ::pingora::server::ShutdownWatch;
use ::pingora::services::background::BackgroundService;
use ::pingora::upstreams::peer::HttpPeer;
use async_trait::async_trait;
use bytes::BytesMut;
use http::HeaderValue;

use crate::config::{Backends, ListenerTls};
use crate::error::ClusterError;
use crate::proxy::CertificateFile;
use crate::proxy::connections::Secure;

#[derive(Clone)]
pub(in crate::proxy) enum ClientTls {}

#[derive(Clone)]
pub(in crate::proxy) enum BackendTls {}

pub(in crate::proxy) enum Files {}

fn absent(field: &str) -> ClusterError {
    ClusterError::config(field, "TLS needs the feature proxy-tls of this crate")
}

impl ClientTls {
    pub(in crate::proxy) fn new(_: &ListenerTls, field: &str) -> Result<Self, ClusterError> {
        Err(absent(field))
    }

    pub(in crate::proxy) fn files(&self) -> Vec<Files> {
        match *self {}
    }

    pub(in crate::proxy) async fn handshake(
        &self,
        _: Stream,
        _: &BytesMut,
    ) -> Result<(Stream, Option<HeaderValue>), String> {
        match *self {}
    }
}

impl BackendTls {
    pub(in crate::proxy) fn new(_: &Backends, field: &str) -> Result<Self, ClusterError> {
        Err(absent(field))
    }

    pub(in crate::proxy) fn files(&self) -> Vec<Files> {
        match *self {}
    }

    pub(in crate::proxy) fn add_to(&self, _: &mut HttpPeer) {
        match *self {}
    }

    pub(in crate::proxy) fn secure(&self, _: &str, _: Duration, _: Duration) -> Option<Secure> {
        match *self {}
    }
}

/// Checks no files.
#[derive(Clone, Default)]
pub(in crate::proxy) struct Reload(());

impl Reload {
    pub(in crate::proxy) fn add(&self, files: &[Files]) {
        if let Some(file) = files.first() {
            match *file {}
        }
    }

    pub(in crate::proxy) fn show<'a>(&self, _: impl Iterator<Item = (&'a str, &'a Path)>) {}

    pub(in crate::proxy) fn certificates(&self) -> Vec<CertificateFile> {
        Vec::new()
    }
}

#[async_trait]
impl BackgroundService for Reload {
    async fn start(&self, _: ShutdownWatch) {}
}
