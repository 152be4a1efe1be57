//! The node while the command is well.

use std::time::Duration;

use pingora_etcd::{ClusterError, ClusterNode};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

/// How long leaving may take while etcd does not answer. The lease ends by itself then.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// A node that runs, or none.
#[derive(Default)]
pub struct Member {
    running: Option<Running>,
    /// The one before, which is about to leave.
    leaving: Option<Leaving>,
}

struct Running {
    node: ClusterNode,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ClusterError>>,
}

/// A node on its way out, in a task of its own.
struct Leaving {
    hurry: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Member {
    /// Registers, and stays registered.
    pub fn join(&mut self, node: ClusterNode) {
        let before = self.leaving.take();
        let (stop, stopped) = oneshot::channel();
        let handle = node.clone();
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.task.await;
            }
            node.run_until(async { drop(stopped.await) }).await
        });
        self.running = Some(Running {
            node: handle,
            stop,
            task,
        });
    }

    /// Begins to leave: drains for this time, if anybody knows the node, and then leaves.
    pub fn leave(&mut self, drain: Duration) {
        let Some(Running {
            node,
            stop,
            mut task,
        }) = self.running.take()
        else {
            return;
        };
        let (hurry, hurried) = oneshot::channel();
        let until = Instant::now() + drain;
        let task = tokio::spawn(async move {
            if node.session_state().is_registered() {
                let draining = async {
                    let _ = node.drain().await;
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = draining => {}
                    () = sleep_until(until) => {}
                    // Also if nobody waits any more.
                    _ = hurried => {}
                }
            }
            let _ = stop.send(());
            match timeout(LEAVE_WITHIN, &mut task).await {
                Ok(_) => info!("the node has left"),
                Err(_) => task.abort(),
            }
        });
        self.leaving = Some(Leaving {
            hurry: Some(hurry),
            task,
        });
    }

    /// Ends the draining at once.
    pub fn hurry(&mut self) {
        if let Some(hurry) = self
            .leaving
            .as_mut()
            .and_then(|leaving| leaving.hurry.take())
        {
            let _ = hurry.send(());
        }
    }

    /// Waits until the node has left.
    pub async fn left(&mut self) {
        if let Some(leaving) = &mut self.leaving {
            let _ = (&mut leaving.task).await;
            self.leaving = None;
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
