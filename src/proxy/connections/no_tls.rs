//! What stands for TLS to backends where the feature `proxy-tls` is off: nothing of it can exist.

use std::time::Duration;

use ::pingora::Result;
use tokio::net::TcpStream;

use super::socket::Socket;

#[derive(Debug)]
pub(in crate::proxy) struct Secure {
    pub(super) connect: Duration,
    never: Never,
}

#[derive(Debug)]
enum Never {}

impl Secure {
    pub(super) fn mark(&self) -> u64 {
        match self.never {}
    }

    pub(super) async fn handshake(&self, _: TcpStream) -> Result<Socket> {
        match self.never {}
    }
}
