//! What has happened, for those who look at the page.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::broadcast;

use crate::sync::lock;

/// How many are kept for those who come later.
const KEPT: usize = 200;

/// Something that has happened in a group.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Event {
    /// Unix time in milliseconds.
    pub(super) time_ms: u64,
    pub(super) group: String,
    pub(super) text: String,
}

impl Event {
    pub(super) fn now(group: &str, text: String) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            group: group.to_owned(),
            text,
        }
    }
}

/// The latest events.
#[derive(Debug)]
pub(super) struct Events {
    kept: Mutex<VecDeque<Event>>,
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            sender: broadcast::Sender::new(KEPT),
        }
    }
}

impl Events {
    pub(super) fn add(&self, event: Event) {
        let mut kept = lock(&self.kept);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Nobody may be looking.
        let _ = self.sender.send(event);
    }

    /// Those that are kept, and all that follow.
    pub(super) fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let kept = lock(&self.kept);
        (kept.iter().cloned().collect(), self.sender.subscribe())
    }
}
