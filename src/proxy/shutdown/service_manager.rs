//! What a service manager such as systemd is told (`sd_notify(3)`), where it has asked for it.

use std::sync::atomic::{AtomicBool, Ordering};

use sd_notify::NotifyState;
use tracing::warn;

use crate::supervise::say;

/// What a service manager is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// Every address is listened on.
    Ready,
    /// The same, and this process is the main one of the service now.
    ReadyInsteadOfPredecessor,
    /// The process is about to end.
    Stopping,
}

/// This process is, or was, the main one of the service.
static HAS_SERVED: AtomicBool = AtomicBool::new(false);

/// Tells the service manager, if there is one. Who has never been the service does not say that it stops: a successor that
/// is called off before it has taken over.
pub(super) fn notify(notice: Notice) {
    match notice {
        Notice::Ready | Notice::ReadyInsteadOfPredecessor => {
            HAS_SERVED.store(true, Ordering::Relaxed);
        }
        Notice::Stopping if !HAS_SERVED.load(Ordering::Relaxed) => return,
        Notice::Stopping => {}
    }
    let own = NotifyState::MainPid(std::process::id());
    let told = match notice {
        Notice::Ready => sd_notify::notify(&[NotifyState::Ready]),
        Notice::ReadyInsteadOfPredecessor => sd_notify::notify(&[own, NotifyState::Ready]),
        Notice::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
    };
    if let Err(error) = told {
        say(|| warn!(?notice, %error, "the service manager cannot be told"));
    }
}
