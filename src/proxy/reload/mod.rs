//! Taking over another configuration while requests are served.

mod difference;
mod file;
mod group;
mod reloader;
mod status;

pub use file::ConfigFile;
pub use reloader::{Reloader, ServedGroup, ServedRoute};
pub use status::{ReloadStatus, Reloaded};
