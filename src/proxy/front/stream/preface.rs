//! How a connection begins: whether it is one of HTTP/2.

use std::io;

use ::pingora::protocols::Peek;
use async_trait::async_trait;
use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use super::{ClientStream, PREFACE};
use crate::proxy::front::connection::Phase;

impl ClientStream {
    /// Whether a client that has agreed on HTTP/2 begins with it.
    pub(in crate::proxy::front) async fn keeps_its_word(&mut self) -> bool {
        if !self.is_http2 {
            return true;
        }
        let mut start = [0; PREFACE.len()];
        self.try_peek(&mut start).await.is_ok() && self.is_http2
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
