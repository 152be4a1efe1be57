//! A proxy whose backends are a list behind HTTP, which is asked for every second; with an `ETag`, an unchanged list is
//! not sent again.
//!
//! ```text
//! cargo run --example nodes_from_http -- --url http://127.0.0.1:8000/nodes.json --listen 127.0.0.1:6188
//! ```

mod sources;

use std::time::Duration;

use clap::Parser;
use pingora_etcd::{Change, Source};
use reqwest::StatusCode;
use reqwest::header::{ETAG, HeaderValue, IF_NONE_MATCH};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

const EVERY: Duration = Duration::from_secs(1);

/// A proxy whose backends are a list behind HTTP.
#[derive(Parser)]
struct Arguments {
    /// Where the list is: a JSON list of nodes.
    #[arg(long)]
    url: String,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:6188")]
    listen: String,
}

struct HttpSource {
    client: reqwest::Client,
    url: String,
    /// Of the list that was read last.
    tag: Option<HeaderValue>,
    /// When to ask again.
    due: Option<Instant>,
    /// Whether it has been said that there is no list.
    is_failing: bool,
}

impl HttpSource {
    /// The list; `None` if it is the same as before.
    async fn ask(&mut self) -> Result<Option<Change>, String> {
        let mut request = self.client.get(&self.url);
        if let Some(tag) = &self.tag {
            request = request.header(IF_NONE_MATCH, tag);
        }
        let words = |error: reqwest::Error| error.to_string();
        let response = request.send().await.map_err(words)?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let response = response.error_for_status().map_err(words)?;
        let tag = response.headers().get(ETAG).cloned();
        let nodes = sources::nodes(&response.bytes().await.map_err(words)?)?;
        info!(nodes = nodes.len(), "a list of nodes has come");
        self.tag = tag;
        Ok(Some(Change::all(nodes)))
    }
}

impl Source for HttpSource {
    async fn next(&mut self) -> Change {
        loop {
            if let Some(due) = self.due {
                sleep_until(due).await;
            }
            let asked = self.ask().await;
            self.due = Some(Instant::now() + EVERY);
            // Without an answer, the last list stays in use.
            let was_failing = std::mem::replace(&mut self.is_failing, asked.is_err());
            match asked {
                Ok(Some(change)) => return change,
                Ok(None) => {}
                Err(error) if was_failing => drop(error),
                Err(error) => warn!(error, "there is no list of nodes"),
            }
        }
    }
}

fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
    let Arguments { url, listen } = Arguments::parse();
    let source = HttpSource {
        client: reqwest::Client::builder().timeout(EVERY * 5).build()?,
        url,
        tag: None,
        due: None,
        is_failing: false,
    };
    sources::serve(&listen, source)
}
