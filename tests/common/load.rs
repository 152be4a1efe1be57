//! Requests, one or without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

/// A client that keeps no connection to a server that is gone.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap()
}

/// `count` GETs, so many at a time. Answers with what failed.
pub async fn load(url: &str, count: u64, at_a_time: usize) -> Vec<String> {
    let load = Load::start(url, at_a_time);
    super::eventually("so many GETs", || load.sent() >= count).await;
    load.stop().await
}

/// GETs without end, so many at a time.
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

    /// Waits until so many more have been sent: the load goes on.
    pub async fn goes_on(&self, more: u64) {
        let until = self.sent() + more;
        super::eventually("the load goes on", || self.sent() >= until).await;
    }

    /// Answers with what failed.
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

/// Waits until something answers there, with any status.
pub async fn until_it_answers(url: &str) {
    let client = client();
    let start = std::time::Instant::now();
    while let Err(error) = client.get(url).send().await {
        assert!(start.elapsed() < super::DEADLINE, "{url}: {error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
