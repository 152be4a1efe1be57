//! How a connection begins: whether it is one of HTTP/2.

use std::io;

use ::pingora::protocols::{Peek, Ssl};
use async_trait::async_trait;
use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use super::{ClientStream, PREFACE};
use crate::proxy::front::connection::Phase;

impl ClientStream {
    /// Whether the connection is one of HTTP/2, as its client has agreed with TLS, or may begin without (`takes_h2c`). `None` if
    /// the client has left, or does not keep its word.
    pub(in crate::proxy::front) async fn begins_http_2(&mut self, takes_h2c: bool) -> Option<bool> {
        let has_agreed = self.is_http2;
        // With TLS it is one only if that was agreed.
        if !has_agreed && (!takes_h2c || self.get_ssl_digest().is_some()) {
            return Some(false);
        }
        let mut start = [0; PREFACE.len()];
        self.try_peek(&mut start).await.ok()?;
        (self.is_http2 || !has_agreed).then_some(self.is_http2)
    }
}

#[async_trait]
impl Peek for ClientStream {
    /// Whether the connection begins with the preface of HTTP/2. Reads no further than the first byte
    /// that differs, so that a short request does not wait for more of it.
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        self.is_peeking = true;
        let mut start = [0; PREFACE.len()];
        let mut count = 0;
        while count < PREFACE.len() && start[..count] == PREFACE[..count] {
            match self.read(&mut start[count..]).await? {
                0 => break,
                read => count += read,
            }
        }
        self.is_peeking = false;
        self.is_http2 = start == *PREFACE;
        if self.is_http2 {
            self.enter(Phase::Answer);
        } else if count > 0 {
            self.count_request();
        }
        self.ahead = BytesMut::from_iter(start[..count].iter().chain(&self.ahead));
        // What was read is read again from `ahead`.
        self.head_bytes = 0;
        let shown = buffer.len().min(count);
        buffer[..shown].copy_from_slice(&start[..shown]);
        Ok(true)
    }
}
