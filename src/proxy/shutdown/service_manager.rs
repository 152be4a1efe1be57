//! What a service manager such as systemd is told (`sd_notify(3)`), where it has asked for it.

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

/// Tells the service manager, if there is one.
pub(super) fn notify(notice: Notice) {
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
