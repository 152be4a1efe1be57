//! The node while the command is well.

use std::time::Duration;

use pingora_etcd::{ClusterError, ClusterNode};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::info;

/// How long leaving may take while etcd does not answer. The lease ends by itself then.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// A node that runs, or none.
#[derive(Default)]
pub struct Member {
    running: Option<Running>,
}

struct Running {
    node: ClusterNode,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ClusterError>>,
}

impl Member {
    /// Registers, and stays registered.
    pub fn join(&mut self, node: ClusterNode) {
        let (stop, stopped) = oneshot::channel();
        let handle = node.clone();
        let task = tokio::spawn(async move { node.run_until(async { drop(stopped.await) }).await });
        self.running = Some(Running {
            node: handle,
            stop,
            task,
        });
    }

    /// Drains for this time, and leaves.
    pub async fn leave(&mut self, drain: Duration) {
        let Some(Running {
            node,
            stop,
            mut task,
        }) = self.running.take()
        else {
            return;
        };
        if !drain.is_zero() {
            let _ = tokio::time::timeout(LEAVE_WITHIN, node.drain()).await;
            tokio::time::sleep(drain).await;
        }
        let _ = stop.send(());
        match tokio::time::timeout(LEAVE_WITHIN, &mut task).await {
            Ok(_) => info!("the node has left"),
            Err(_) => task.abort(),
        }
    }

    /// Waits until the node has ended by itself, with the reason.
    pub async fn failed(&mut self) -> String {
        let Some(running) = &mut self.running else {
            return std::future::pending().await;
        };
        let ended = (&mut running.task).await;
        self.running = None;
        match ended {
            Ok(Ok(())) => "it has ended".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        }
    }
}
