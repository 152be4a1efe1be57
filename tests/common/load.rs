//! HTTP requests for tests: a given number of them, or a continuous load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

/// A client that does not keep connections to servers that have ended.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap()
}

/// Sends `count` GET requests, `at_a_time` concurrently, and returns the failures.
pub async fn load(url: &str, count: u64, at_a_time: usize) -> Vec<String> {
    let load = Load::start(url, at_a_time);
    super::eventually("all GET requests were sent", || load.sent() >= count).await;
    load.stop().await
}

/// Continuous GET requests, a fixed number of them at a time.
pub struct Load {
    sent: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    clients: JoinSet<Vec<String>>,
}

impl Load {
    pub fn start(url: &str, at_a_time: usize) -> Self {
        let sent = Arc::new(AtomicU64::new(0));
        let stop = watch::Sender::new(false);
        let mut clients = JoinSet::new();
        for _ in 0..at_a_time {
            let (sent, stopped) = (sent.clone(), stop.subscribe());
            let (url, client) = (url.to_owned(), client());
            clients.spawn(async move {
                let mut failed = Vec::new();
                while !*stopped.borrow() {
                    sent.fetch_add(1, Ordering::Relaxed);
                    match client.get(&url).send().await {
                        Ok(response) if response.status().is_success() => {
                            drop(response.bytes().await);
                        }
                        Ok(response) => {
                            let status = response.status();
                            failed.push(format!("{status}: {:?}", response.text().await));
                        }
                        Err(error) => failed.push(format!("{error:?}")),
                    }
                }
                failed
            });
        }
        Self {
            sent,
            stop,
            clients,
        }
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until this many more requests were sent.
    pub async fn goes_on(&self, more: u64) {
        let until = self.sent() + more;
        super::eventually("more requests were sent", || self.sent() >= until).await;
    }

    /// Returns the failures.
    pub async fn stop(self) -> Vec<String> {
        self.stop.send_replace(true);
        self.clients
            .join_all()
            .await
            .into_iter()
            .flatten()
            .collect()
    }
}

/// Waits until the server responds, with any status.
pub async fn until_it_answers(url: &str) {
    let client = client();
    let start = std::time::Instant::now();
    while let Err(error) = client.get(url).send().await {
        assert!(start.elapsed() < super::DEADLINE, "{url}: {error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
