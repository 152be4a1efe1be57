//! TLS to clients and to backends, with files that are read again when they change.

#[cfg(not(feature = "proxy-tls"))]
mod absent;
#[cfg(feature = "proxy-tls")]
mod backends;
#[cfg(feature = "proxy-tls")]
mod client;
#[cfg(feature = "proxy-tls")]
mod clients;
#[cfg(feature = "proxy-tls")]
mod files;
#[cfg(feature = "proxy-tls")]
mod reload;
#[cfg(feature = "proxy-tls")]
mod shown;

#[cfg(not(feature = "proxy-tls"))]
pub(super) use absent::{BackendTls, ClientTls, Reload};
#[cfg(feature = "proxy-tls")]
pub(super) use backends::BackendTls;
#[cfg(feature = "proxy-tls")]
pub(super) use clients::ClientTls;
#[cfg(feature = "proxy-tls")]
pub(super) use reload::Reload;
