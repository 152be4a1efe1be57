//! List, then watch from the next revision; resume, or list again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::file::{About, Saver};
use super::snapshot::{Staged, View};
use super::{DiscoveryStatus, Shared};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::store::{Revision, Selector, Store, WatchRange, Watcher};
use crate::view::{Change, ClusterEvent};

/// How often a failure of a store that answers may be followed by a try at once: most often one
/// connection broke, or history moved on. When it goes on like that, the backoff takes over.
const AT_ONCE_EVERY: Duration = Duration::from_secs(15);
/// How often a list is begun again at once because history was compacted while it was read.
const LIST_AGAIN: usize = 3;
/// How long the store is waited for before a snapshot file is used.
const DISK_PATIENCE: Duration = Duration::from_secs(1);
/// How long a run that ends takes at most to write what has changed since the last snapshot.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// How far following has come.
enum Position {
    /// Nothing is known, or what is known cannot be continued: everything has to be listed.
    Unlisted,
    /// Everything before these revisions is in the view, of this cluster's history.
    Listed(u64, Vec<WatchRange>),
}

/// One run: it feeds the view, and publishes what comes of it.
pub(super) struct Follower<'s> {
    shared: &'s Shared,
    view: View,
    position: Position,
    /// Applied, and not published yet.
    pending: Vec<Change>,
    /// One of them is a change of leader.
    has_leader: bool,
    /// Since when the store is not heard.
    lost_at: Option<Instant>,
    is_published: bool,
    /// When more may be published.
    publish_at: Instant,
    saver: Option<Saver>,
    /// There is a file to read, should the store not answer.
    may_read_disk: bool,
    /// Which cluster the file was of.
    on_disk: Option<u64>,
    /// The view is one that a single member gave, without a quorum.
    is_borrowed: bool,
    cluster_id: u64,
}

impl<'s> Follower<'s> {
    pub(super) fn new(shared: &'s Shared) -> Self {
        let mut view = View::new(
            shared.keys.clone(),
            shared.admission.clone(),
            shared.preserve,
        );
        // An earlier run's view is still being served: the difference to it is told, not a view
        // that is empty for a moment.
        view.adopt(
            &shared.nodes.load_full(),
            shared.leadership.load_full(),
            *shared.lock_rejected(),
        );
        let saver = shared.snapshot.clone().map(|file| {
            let about = About {
                group: shared.group.clone(),
                key_prefix: shared.key_prefix.clone(),
                ..About::default()
            };
            Saver::new(file, about)
        });
        Self {
            shared,
            view,
            position: Position::Unlisted,
            pending: Vec::new(),
            has_leader: false,
            lost_at: None,
            is_published: true,
            publish_at: Instant::now(),
            may_read_disk: saver.is_some() && !*shared.ready.borrow(),
            saver,
            on_disk: None,
            is_borrowed: false,
            cluster_id: 0,
        }
    }

    /// Follows the group for ever.
    pub(super) async fn follow(&mut self, store: &dyn Store) {
        let shared = self.shared;
        let mut backoff = Backoff::new();
        // One for each of the two: history moves on while a connection is broken.
        let mut at_once: [Option<Instant>; 2] = [None; 2];
        loop {
            let mut answered = false;
            let error = match self.try_follow(store, &mut answered).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.publish_pending();
            let missed = matches!(error, ClusterError::Compacted { .. });
            answered |= missed;
            let last = &mut at_once[usize::from(missed)];
            let rested = last.is_none_or(|last| last.elapsed() >= AT_ONCE_EVERY);
            let delay = if last.is_none() || (answered && rested) {
                backoff.reset();
                *last = Some(Instant::now());
                // Not at the same instant as every other watcher.
                Duration::from_millis(fastrand::u64(10..250))
            } else {
                backoff.after(&error)
            };
            let group = &shared.group;
            if missed {
                warn!(%group, %error, ?delay, "events were missed, will list again");
                if bugs::has(Bug::NoRelistAfterCompaction)
                    && let (Position::Listed(_, ranges), ClusterError::Compacted { oldest }) =
                        (&mut self.position, &error)
                {
                    ranges
                        .iter_mut()
                        .for_each(|range| range.from = oldest.unwrap_or(0));
                } else {
                    self.position = Position::Unlisted;
                }
            } else if shared.went_stale() {
                warn!(%group, %error, ?delay, "disconnected, the last view stays");
                let _ = shared.events.send(ClusterEvent::Disconnected);
            } else if shared.has_view() {
                debug!(%group, %error, ?delay, "still disconnected");
            } else {
                warn!(%group, %error, ?delay, "cannot load the group yet");
            }
            if matches!(error, ClusterError::TooLarge { .. }) {
                // A watch cannot get past it, but a list can: entry by entry, if it has to.
                self.position = Position::Unlisted;
            }
            if self.may_read_disk {
                self.read_disk().await;
            }
            if shared.serializable_fallback && error.is_transient() {
                self.borrow_view(store).await;
            }
            sleep(delay).await;
        }
    }

    async fn try_follow(
        &mut self,
        store: &dyn Store,
        answered: &mut bool,
    ) -> Result<Infallible, ClusterError> {
        let (cluster_id, ranges) = match &self.position {
            Position::Listed(cluster_id, ranges) => (*cluster_id, ranges.clone()),
            Position::Unlisted => {
                let (cluster_id, ranges) = self.load_or_read(store).await?;
                self.position = Position::Listed(cluster_id, ranges.clone());
                (cluster_id, ranges)
            }
        };
        let ranges = if bugs::has(Bug::ResumeFromNow) {
            let from_now = |range: WatchRange| WatchRange { from: 0, ..range };
            ranges.into_iter().map(from_now).collect()
        } else {
            ranges
        };
        let mut watcher = store.watch(ranges).await?;
        // Looked at when the watch is open: what the store does then, it tells.
        let is_same = self
            .is_same_history(store, cluster_id, watcher.position())
            .await?;
        *answered = true;
        if !is_same && !bugs::has(Bug::HistoryNotChecked) {
            warn!(group = %self.shared.group, "the store's history is another one");
            return Err(ClusterError::Compacted { oldest: None });
        }
        self.is_heard();
        self.shared.went_live(false);
        let error = self.watch(&mut *watcher).await;
        self.lost_at = Some(Instant::now());
        self.position = Position::Listed(cluster_id, watcher.position().to_vec());
        Err(error)
    }

    /// The store is heard, perhaps again: those who are suspects by now could not register meanwhile.
    fn is_heard(&mut self) {
        if let Some(lost_at) = self.lost_at.take() {
            self.view.was_away(lost_at.elapsed());
        }
    }

    /// Takes over what a watch tells, until it fails.
    async fn watch(&mut self, watcher: &mut dyn Watcher) -> ClusterError {
        loop {
            let due = self.next_due();
            tokio::select! {
                biased;
                events = watcher.next() => match events {
                    Ok(events) => {
                        let changes = self.view.apply(&events, Instant::now());
                        self.add(changes);
                        self.is_published &= events.is_empty();
                    }
                    Err(error) => return error,
                },
                () = at(due) => {}
                () = saved(&mut self.saver) => {}
            }
            self.do_due();
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let publish = (!self.is_published).then_some(self.publish_at);
        let save = self.saver.as_ref().and_then(Saver::due);
        [publish, save, self.view.next_due()]
            .into_iter()
            .flatten()
            .min()
    }

    fn do_due(&mut self) {
        let now = Instant::now();
        if self.view.next_due().is_some_and(|due| due <= now) {
            let changes = self.view.expire(now);
            self.add(changes);
            self.is_published = false;
        }
        if !self.is_published {
            let is_due = now >= self.publish_at;
            // Nobody should wait for a leader, and a leader does not make others wait.
            if is_due || self.has_leader {
                let is_alone = self.has_leader && self.pending.len() == 1;
                self.publish_pending();
                if is_due && !is_alone {
                    self.publish_at = now + self.shared.publish_interval;
                }
            }
        }
        if let Some(saver) = &mut self.saver
            && saver.due().is_some_and(|due| due <= now)
        {
            saver.start(self.view.nodes(), self.cluster_id, SystemTime::now());
        }
    }

    fn add(&mut self, changes: Vec<Change>) {
        let is_leader = |change: &Change| matches!(change, Change::Leader(_));
        self.has_leader |= changes.iter().any(is_leader);
        self.pending.extend(changes);
    }

    /// What is left to do when the run ends.
    pub(super) async fn finish(&mut self) {
        self.publish_pending();
        // What it holds is as old as the last word of the store.
        let as_of = match *self.shared.status.borrow() {
            DiscoveryStatus::Live => SystemTime::now(),
            DiscoveryStatus::Stale { since } if !self.is_borrowed => since,
            _ => return,
        };
        if let Some(saver) = &mut self.saver {
            let write = saver.finish(self.view.nodes(), self.cluster_id, as_of);
            let _ = timeout(LAST_WRITE, write).await;
        }
    }

    /// Whether the store goes on with what has been seen of it. One that was restored may be another
    /// cluster, or not have come as far: a watch would wait in silence for it to catch up. Or it has
    /// come as far again, with other changes: then the key that was written last here was not
    /// written then.
    async fn is_same_history(
        &self,
        store: &dyn Store,
        cluster_id: u64,
        seen: &[WatchRange],
    ) -> Result<bool, ClusterError> {
        let any = Selector::Key(self.shared.keys.registry_prefix().to_owned());
        let now = store.list(&any, None).await?;
        if now.cluster_id != cluster_id || seen.iter().any(|range| range.from > now.revision + 1) {
            return Ok(false);
        }
        let Some(witness) = self.view.witness() else {
            return Ok(true);
        };
        let key = witness.key().to_owned();
        let of_it = seen.iter().find(|range| range.keys.matches(&key));
        let at = of_it.map(|range| range.from - 1);
        let Some(at) = at.filter(|at| *at >= witness.written()) else {
            return Ok(true);
        };
        let then = store.list(&Selector::Key(key), Some(at)).await?;
        let entry = then.entries.first();
        Ok(entry.is_some_and(|entry| witness.is(entry)))
    }

    /// Loads the group, or if that takes too long reads it from disk first.
    async fn load_or_read(
        &mut self,
        store: &dyn Store,
    ) -> Result<(u64, Vec<WatchRange>), ClusterError> {
        if self.may_read_disk {
            // One key: a group that is large takes longer, and need not be read twice.
            let any = Selector::Key(self.shared.keys.registry_prefix().to_owned());
            if timeout(DISK_PATIENCE, store.list(&any, None))
                .await
                .is_err()
            {
                self.read_disk().await;
            }
        }
        self.load(store).await
    }

    /// Lists nodes and candidates at one revision. Answers with what to watch from there.
    async fn load(&mut self, store: &dyn Store) -> Result<(u64, Vec<WatchRange>), ClusterError> {
        let mut again = 0;
        let (staged, (revision, cluster_id)) = loop {
            let mut staged = Staged::default();
            let error = match self.list(store, &mut staged).await {
                Ok(read) => break (staged, read),
                Err(error) => error,
            };
            self.view.remember(staged.take_refused());
            match error {
                ClusterError::Compacted { oldest } if again < LIST_AGAIN => {
                    again += 1;
                    debug!(group = %self.shared.group, oldest, "compacted while it was listed, will list again");
                }
                error => return Err(error),
            }
        };
        self.is_heard();
        let changes = self.view.reset(staged, revision, Instant::now());
        let (nodes, suspects) = (self.view.nodes().len(), self.view.nodes().suspects());
        if let Some(on_disk) = self.on_disk.take().filter(|on_disk| *on_disk != cluster_id) {
            warn!(group = %self.shared.group, cluster_id, on_disk, "the snapshot was of another etcd cluster");
        }
        self.cluster_id = cluster_id;
        self.may_read_disk = false;
        let was_borrowed = std::mem::take(&mut self.is_borrowed);
        self.publish(changes, true);
        self.shared.went_live(was_borrowed);
        self.shared.went_ready();
        // Said when it is done: whatever becomes of a log, the view is there.
        info!(group = %self.shared.group, revision, nodes, suspects, "group loaded");
        let from = revision + 1;
        let ranges = self.selectors().map(|keys| WatchRange { keys, from });
        Ok((cluster_id, ranges.into()))
    }

    fn selectors(&self) -> [Selector; 2] {
        let keys = &self.shared.keys;
        [keys.registry_prefix(), keys.election_prefix()]
            .map(|prefix| Selector::Prefix(prefix.to_owned()))
    }

    /// Page by page, so that the whole group is never held twice. The view stays as it is meanwhile.
    async fn list(
        &self,
        store: &dyn Store,
        staged: &mut Staged,
    ) -> Result<(Revision, u64), ClusterError> {
        let mut read: Option<(Revision, u64)> = None;
        for (index, keys) in self.selectors().iter().enumerate() {
            let mut start = None;
            loop {
                let at = read.map(|(revision, _)| revision);
                let page = store.list_page(keys, start, at).await?;
                let listing = &page.listing;
                let (_, cluster_id) = *read.get_or_insert((listing.revision, listing.cluster_id));
                if cluster_id != listing.cluster_id {
                    // Another cluster answers now: its revisions mean something else.
                    return Err(ClusterError::Compacted { oldest: None });
                }
                match index {
                    0 => self.view.stage(staged, &listing.entries),
                    _ => self.view.stage_candidates(staged, &listing.entries),
                }
                start = page.next;
                if start.is_none() {
                    break;
                }
            }
        }
        Ok(read.unwrap_or_default())
    }

    /// Serves from the snapshot file, if it can be used.
    async fn read_disk(&mut self) {
        self.may_read_disk = false;
        let shared = self.shared;
        let Some(file) = shared.snapshot.clone() else {
            return;
        };
        let group = &shared.group;
        let (of_group, prefix) = (group.clone(), shared.key_prefix.clone());
        let read = move || file.read(&of_group, &prefix, SystemTime::now());
        let loaded = match tokio::task::spawn_blocking(read).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => {
                warn!(%group, %error, "the store cannot be reached, and the snapshot cannot be used");
                return;
            }
            // The runtime ends.
            Err(_) => return,
        };
        let written = loaded.written;
        let age = SystemTime::now()
            .duration_since(written)
            .unwrap_or_default();
        self.on_disk = Some(loaded.cluster_id);
        let changes = self.view.restore(loaded.nodes, loaded.revision);
        let nodes = self.view.nodes().len();
        warn!(%group, nodes, ?age, "the store cannot be reached: serving from the snapshot");
        self.publish(changes, true);
        shared
            .status
            .send_replace(DiscoveryStatus::FromDisk { written });
        shared.went_ready();
    }

    /// Serves what one member has of the registrations, while there is nothing better: a view from
    /// before the quorum was lost is. Nobody leads.
    async fn borrow_view(&mut self, store: &dyn Store) {
        let shared = self.shared;
        let has_own = matches!(*shared.status.borrow(), DiscoveryStatus::Stale { .. });
        if has_own && !self.is_borrowed {
            return;
        }
        let [registry, _] = self.selectors();
        let listing = match store.list_stale(&registry).await {
            Ok(listing) => listing,
            Err(error) => {
                debug!(group = %shared.group, %error, "no member gives its own view");
                return;
            }
        };
        let mut staged = Staged::default();
        self.view.stage(&mut staged, &listing.entries);
        let changes = self.view.reset(staged, listing.revision, Instant::now());
        if !self.is_borrowed {
            let (revision, nodes) = (listing.revision, self.view.nodes().len());
            warn!(group = %shared.group, revision, nodes, "without a quorum: serving what one member has, which may be out of date");
        }
        self.is_borrowed = true;
        self.publish(changes, true);
        shared.status.send_replace(DiscoveryStatus::Stale {
            since: SystemTime::now(),
        });
        shared.went_ready();
    }

    fn publish_pending(&mut self) {
        if !self.is_published {
            let changes = std::mem::take(&mut self.pending);
            self.publish(changes, false);
        }
    }

    /// Makes the view and the changes that led to it visible together. Readers see the new state
    /// before they are told of it.
    fn publish(&mut self, mut changes: Vec<Change>, reset: bool) {
        if reset {
            // What is not published yet has been overtaken, but not its events.
            changes.splice(0..0, self.pending.drain(..));
        }
        self.has_leader = false;
        self.is_published = true;
        if let Some(saver) = &mut self.saver
            && (reset || !changes.is_empty())
        {
            saver.changed();
        }
        let shared = self.shared;
        let _publishing = shared.lock_publishing();
        let nodes = Arc::new(self.view.nodes().clone());
        let leadership = self.view.leader().cloned();
        let leader = leadership
            .as_ref()
            .map(|leadership| leadership.node.clone());
        *shared.lock_rejected() = self.view.rejected_entries();
        let suspects = shared.nodes.swap(nodes.clone()).suspects();
        let before = shared.leadership.swap(leadership.clone().map(Arc::new));
        if reset || !changes.is_empty() || suspects != nodes.suspects() {
            shared.nodes_watch.send_replace(nodes);
        }
        let same = match (before.as_deref(), &leadership) {
            (Some(before), Some(now)) => {
                before.epoch == now.epoch && Arc::ptr_eq(&before.node, &now.node)
            }
            (None, None) => true,
            _ => false,
        };
        if !same {
            shared.leader_watch.send_replace(leader);
        }
        if shared.events.receiver_count() > 0 {
            for event in changes.iter().filter_map(Change::event) {
                // Nobody may be listening any more; the same below.
                let _ = shared.events.send(event);
            }
        }
        if reset && !bugs::has(Bug::NoResetAfterRelist) {
            for change in shared.state_as_changes() {
                let _ = shared.changes.send(change);
            }
        } else if !reset && shared.changes.receiver_count() > 0 {
            for change in changes {
                let _ = shared.changes.send(change);
            }
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn saved(saver: &mut Option<Saver>) {
    match saver {
        Some(saver) => saver.done().await,
        None => std::future::pending().await,
    }
}

impl Shared {
    /// `was_borrowed`: nobody was told that it was not.
    fn went_live(&self, was_borrowed: bool) {
        let before = self.status.send_replace(DiscoveryStatus::Live);
        match before {
            DiscoveryStatus::Stale { .. } if was_borrowed => {
                info!(group = %self.group, "connected");
            }
            DiscoveryStatus::Stale { .. } => {
                info!(group = %self.group, "reconnected");
                let _ = self.events.send(ClusterEvent::Reconnected);
            }
            DiscoveryStatus::FromDisk { .. } => info!(group = %self.group, "connected"),
            DiscoveryStatus::Connecting | DiscoveryStatus::Live | DiscoveryStatus::Ended { .. } => {
            }
        }
    }

    fn went_ready(&self) {
        if !self.ready.send_replace(true) {
            let _ = self.events.send(ClusterEvent::Ready);
        }
    }

    fn has_view(&self) -> bool {
        *self.ready.borrow()
    }
}
