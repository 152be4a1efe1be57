//! The store over etcd, and the only folder that uses `etcd-client`.
//!
//! There is one connection at a time, to one endpoint. It is made when the first call needs it, in a
//! task of its own, so that nobody waits for another caller's future to be polled; the task runs on the
//! runtime of that call. A call that finds the connection dead or silent discards it, and the next call
//! uses the next endpoint. How long an answer may take depends on measured times. Streams (one for all
//! watches, one for each lease) end with their connection, and are opened again by their users.

mod breaker;
mod call;
#[cfg(feature = "tls")]
mod cert_reload;
mod connect;
mod connector;
mod convert;
mod credentials;
mod dial;
mod dialler;
mod endpoint;
mod files;
mod grants;
mod handle;
#[cfg(feature = "tls")]
mod handshake;
mod keep_alive;
mod lease_keeper;
mod link;
mod listing;
mod members;
mod names;
mod options;
mod pace;
mod paging;
mod password;
mod round;
mod round_trips;
mod silence;
mod status;
mod tls;
mod tls_failure;
#[cfg(feature = "tls")]
mod tls_files;
mod token;
mod token_refresh;
mod version;
mod watch_response;
mod watch_stream;
mod watch_table;
mod watcher;

pub use credentials::{Credentials, Password};
pub use handle::EtcdStore;
pub use options::EtcdOptions;
pub use tls::TlsOptions;
