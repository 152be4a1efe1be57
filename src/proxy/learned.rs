//! What was learned of backends goes along when sockets are handed over.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use tracing::warn;

use crate::pingora::{
    BalancerService, LearnedByGroup, read_learned, teach_learned, within_learned, write_learned,
};
use crate::supervise::say;
use crate::sync::lock;

/// The balancers of this process.
static BALANCERS: Mutex<Vec<Weak<BalancerService>>> = Mutex::new(Vec::new());

/// This balancer takes part.
pub(super) fn include(balancer: &Arc<BalancerService>) {
    let mut balancers = lock(&BALANCERS);
    balancers.retain(|other| other.strong_count() > 0);
    let is_new = |other: &Weak<_>| !std::ptr::addr_eq(other.as_ptr(), Arc::as_ptr(balancer));
    if balancers.iter().all(is_new) {
        balancers.push(Arc::downgrade(balancer));
    }
}

fn balancers() -> Vec<Arc<BalancerService>> {
    lock(&BALANCERS).iter().filter_map(Weak::upgrade).collect()
}

/// The file, beside the upgrade socket.
fn file_beside(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".learned");
    path.into()
}

/// The predecessor's part: leaves for its successor what it has learned.
pub(super) async fn hand_over(socket: &Path) {
    let now = Instant::now();
    let mut groups = LearnedByGroup::new();
    for balancer in balancers() {
        // Several may follow one group, with other filters.
        let group = groups.entry(balancer.discovery().group_name().to_owned());
        group.or_default().extend(balancer.learned(now));
    }
    let path = file_beside(socket);
    if let Err(error) = within_learned(&path, move |path| write_learned(&path, groups)).await {
        say(|| {
            warn!(error, path = %path.display(), "the successor has to learn of the backends anew");
        });
    }
}

/// Whether a successor serves from now on, which writes what it learns itself; if not, nothing is left for one.
pub(super) fn has_handed_over(socket: &Path, is_done: bool) {
    for balancer in balancers() {
        balancer.keep_learned_file(!is_done);
    }
    if !is_done {
        let _ = std::fs::remove_file(file_beside(socket));
    }
}

/// The successor's part: begins with that.
pub(super) async fn take_over(socket: &Path) {
    let path = file_beside(socket);
    match within_learned(&path, |path| read_learned(&path)).await {
        Ok(None) => {}
        Ok(Some((groups, age))) => {
            for balancer in balancers() {
                teach_learned(&groups, age, balancer.discovery().group_name(), &balancer);
            }
        }
        Err(error) => say(|| {
            warn!(error, path = %path.display(), "what the predecessor has learned cannot be read");
        }),
    }
    let _ = std::fs::remove_file(&path);
}
