//! A proxy whose backends are a list in a file, which is read again when it changes.
//!
//! ```text
//! echo '[{"id": "a", "ip": "127.0.0.1", "port": 9001}]' > nodes.json
//! cargo run --example nodes_from_file -- --file nodes.json --listen 127.0.0.1:6188
//! ```

mod sources;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use pingora_etcd::{Change, Source};
use tracing::{info, warn};

/// How often to look for a change.
const EVERY: Duration = Duration::from_millis(200);

/// A proxy whose backends are a list in a file.
#[derive(Parser)]
struct Arguments {
    /// The file: a JSON list of nodes.
    #[arg(long)]
    file: PathBuf,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:6188")]
    listen: String,
}

struct FileSource {
    file: PathBuf,
    /// What was read last, or why it could not be.
    last: Option<Result<Vec<u8>, String>>,
}

impl FileSource {
    /// The list, if it is another one than before.
    async fn read(&mut self) -> Option<Change> {
        let read = tokio::fs::read(&self.file).await;
        let read = read.map_err(|error| error.to_string());
        if self.last.as_ref() == Some(&read) {
            return None;
        }
        self.last = Some(read.clone());
        // With a file that is broken or gone, the last list stays in use.
        match read.and_then(|json| sources::nodes(&json)) {
            Ok(nodes) => {
                info!(nodes = nodes.len(), "the list of nodes has changed");
                Some(Change::all(nodes))
            }
            Err(error) => {
                warn!(file = %self.file.display(), error, "the list of nodes cannot be used");
                None
            }
        }
    }
}

impl Source for FileSource {
    async fn next(&mut self) -> Change {
        loop {
            if let Some(change) = self.read().await {
                return change;
            }
            tokio::time::sleep(EVERY).await;
        }
    }
}

fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
    let Arguments { file, listen } = Arguments::parse();
    sources::serve(&listen, FileSource { file, last: None })
}
