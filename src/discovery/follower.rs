//! One run of following a group: lists it, watches it from the next revision, and continues where it
//! stopped, or lists again. The decisions are those of [`State`]; here is the I/O.

mod fallback;

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{debug, info, info_span, warn};

use super::group::Group;
use super::history;
use super::listing::{ReadAt, list, no_key, selectors};
use super::outbox::Outbox;
use super::published::{Published, Update};
use super::retry::Retry;
use super::saver::Saver;
use super::settings::Settings;
use super::staged::Staged;
use super::state::{Input, News, Position, State};
use super::status::DiscoveryStatus;
use crate::error::ClusterError;
use crate::store::{Store, WatchRange, Watcher};
use crate::supervise::{in_span, new_span};
use crate::view::{Change, ClusterEvent};

/// How many times a listing is repeated at once because the history was compacted while it was read.
const REPEATED_LISTINGS: usize = 3;
/// How long to wait for the store before a snapshot file is used.
const FILE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a listing waits for the host names in it.
const NAMES_PATIENCE: Duration = Duration::from_secs(2);
/// How long after a listing a group is listed again because there is room for more of its nodes.
const LISTED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The maximum time that a run which ends takes to write the last changes to the snapshot file.
const FINAL_SAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Follows a group, and publishes what it sees.
pub(super) struct Follower<'d> {
    name: &'d str,
    settings: &'d Settings,
    published: &'d Published,
    store: &'d dyn Store,
    group: Group,
    state: State,
    outbox: Outbox,
    saver: Option<Saver>,
    listed_at: Instant,
}

impl<'d> Follower<'d> {
    pub(super) fn new(
        name: &'d str,
        settings: &'d Settings,
        published: &'d Published,
        store: &'d dyn Store,
    ) -> Self {
        let mut group = Group::new(
            settings.keys.clone(),
            settings.admission.clone(),
            settings.preserve,
        );
        // Readers still see the view of an earlier run, so they are sent the difference to it.
        group.adopt(
            &published.nodes.load_full(),
            published.leadership.load_full(),
            published.rejected_entries(),
        );
        let file = settings.snapshot.clone();
        Self {
            name,
            settings,
            published,
            store,
            group,
            state: State::start(published.is_ready(), file.is_some()),
            outbox: Outbox::new(settings.publish_interval, Instant::now()),
            saver: file.map(|file| {
                let failing = published.snapshot_failing.clone();
                Saver::new(file, settings.origin(name), failing)
            }),
            listed_at: Instant::now(),
        }
    }

    /// Follows the group until the future is dropped.
    pub(super) async fn follow(&mut self) {
        let settings = self.settings;
        tokio::select! {
            biased;
            () = settings.resolve_names() => {}
            () = self.follow_store() => {}
        }
    }

    async fn follow_store(&mut self) {
        let mut retry = Retry::new();
        loop {
            let error = match self.try_follow().await {
                Ok(()) => {
                    self.publish_pending();
                    continue;
                }
                Err(error) => error,
            };
            self.publish_pending();
            let was_watching = matches!(self.state, State::Watching { .. });
            let delay = retry.delay(&error, was_watching);
            self.failed(&error, delay);
            if self.state == State::Starting {
                self.read_file().await;
            }
            if self.settings.serializable_fallback && error.is_transient() {
                self.list_one_member().await;
            }
            self.rest(delay).await;
        }
    }

    /// Waits, and goes on following host names meanwhile.
    async fn rest(&mut self, delay: Duration) {
        let names = &self.settings.admission.names;
        let until = Instant::now() + delay;
        while timeout_at(until, names.changed.notified()).await.is_ok() {
            let changes = self.group.readdress(names);
            self.outbox.add(changes);
            self.publish_pending();
        }
    }

    /// Follows until that fails, or the group is to be listed again.
    async fn try_follow(&mut self) -> Result<(), ClusterError> {
        let position = match self.state.watch_from() {
            Some(position) => position.clone(),
            None => {
                let span = new_span(|| info_span!("listing"));
                in_span(&span, self.load()).await?
            }
        };
        let mut watcher = self.store.watch(position.ranges).await?;
        let (keys, cluster_id) = (&self.settings.keys, position.cluster_id);
        // Checked once the watch is open: it reports everything that happens after the check.
        let seen = watcher.position();
        let is_same = history::continues(self.store, keys, &self.group, cluster_id, seen).await?;
        if !is_same {
            warn!("the store has another history than before");
            return Err(ClusterError::Compacted { oldest: None });
        }
        self.end_silence();
        let news = self.transition(Input::WatchOpened);
        self.went_live(news);
        let from = watcher.position().first().map(|range| range.from);
        let span = new_span(|| info_span!("watch", from));
        let ended = in_span(&span, self.watch(&mut *watcher)).await;
        self.state.advance(watcher.position());
        if ended.is_ok() {
            info!("there is room for nodes that found none before; the group is listed again");
            // As after a compaction: from where it is, nothing leads to those nodes.
            self.transition(Input::Failed(&ClusterError::Compacted { oldest: None }));
        }
        ended
    }

    /// Applies the events of a watch until it fails, or the group is to be listed again.
    async fn watch(&mut self, watcher: &mut dyn Watcher) -> Result<(), ClusterError> {
        let names = &self.settings.admission.names;
        loop {
            let due = self.next_due();
            tokio::select! {
                biased;
                events = watcher.next() => match events {
                    Ok(events) if events.is_empty() => {}
                    Ok(events) => {
                        let changes = self.group.apply(&events, Instant::now());
                        self.outbox.add(changes);
                    }
                    Err(error) => return Err(error),
                },
                () = names.changed.notified() => {
                    let changes = self.group.readdress(names);
                    self.outbox.add(changes);
                }
                () = wait_until(due) => {}
                () = wait_for_write(&mut self.saver) => {}
            }
            self.do_due();
            if self.relist_due().is_some_and(|due| due <= Instant::now()) {
                return Ok(());
            }
        }
    }

    fn relist_due(&self) -> Option<Instant> {
        let has_room = self.group.has_room_again();
        has_room.then(|| self.listed_at + LISTED_AGAIN_AFTER)
    }

    fn next_due(&self) -> Option<Instant> {
        let save = self.saver.as_ref().and_then(Saver::due);
        [
            self.outbox.due(),
            save,
            self.group.next_due(),
            self.relist_due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn do_due(&mut self) {
        let now = Instant::now();
        if self.group.next_due().is_some_and(|due| due <= now) {
            let changes = self.group.expire(now);
            self.outbox.add(changes);
        }
        if let Some(changes) = self.outbox.take_due(now) {
            self.publish(changes, false);
        }
        if let Some(saver) = &mut self.saver
            && saver.due().is_some_and(|due| due <= now)
            && let Some(cluster_id) = self.state.cluster_id()
        {
            saver.start(self.group.nodes(), cluster_id, SystemTime::now());
        }
    }

    /// Publishes and saves what is left when the run ends.
    pub(super) async fn finish(&mut self) {
        self.publish_pending();
        let (Some(saver), Some(cluster_id)) = (&mut self.saver, self.state.cluster_id()) else {
            return;
        };
        let as_of = match self.published.status() {
            DiscoveryStatus::Stale { since } => since,
            _ => SystemTime::now(),
        };
        let write = saver.finish(self.group.nodes(), cluster_id, as_of);
        let _ = timeout(FINAL_SAVE_TIMEOUT, write).await;
    }

    /// Lists the group, and publishes it. Returns from where to watch.
    async fn load(&mut self) -> Result<Position, ClusterError> {
        if self.state == State::Starting {
            // A single key: a large group may take longer, and need not be read from the file first.
            let any = no_key(&self.settings.keys);
            let answer = timeout(FILE_PATIENCE, self.store.list(&any, None));
            if answer.await.is_err() {
                self.read_file().await;
            }
        }
        let (
            staged,
            ReadAt {
                revision,
                cluster_id,
            },
        ) = self.list().await?;
        self.end_silence();
        self.listed_at = Instant::now();
        let mut changes = self.group.reset(staged, revision, self.listed_at);
        if self.settings.admission.resolves() {
            // A view without the nodes whose names are resolved next would be one without backends.
            let names = &self.settings.admission.names;
            let _ = timeout(NAMES_PATIENCE, names.until_settled()).await;
            changes.extend(self.group.readdress(names));
        }
        let on_disk = self.state.on_disk();
        if let Some(on_disk) = on_disk.filter(|on_disk| *on_disk != cluster_id) {
            warn!(
                cluster_id,
                on_disk, "the snapshot file was of another etcd cluster"
            );
        }
        let from = revision + 1;
        let ranges = selectors(&self.settings.keys);
        let ranges = ranges.into_iter().map(|keys| WatchRange { keys, from });
        let position = Position {
            cluster_id,
            ranges: ranges.collect(),
        };
        let news = self.transition(Input::Listed(position.clone()));
        self.publish_reset(changes);
        self.went_live(news);
        self.published.set_ready();
        // After publishing, so that the view is there whatever happens to the log.
        let (nodes, suspects) = (self.group.nodes().len(), self.group.nodes().suspects());
        info!(revision, nodes, suspects, "group loaded");
        Ok(position)
    }

    async fn list(&mut self) -> Result<(Staged, ReadAt), ClusterError> {
        let mut repeated = 0;
        loop {
            let mut staged = Staged::default();
            let keys = &self.settings.keys;
            let error = match list(self.store, keys, &self.group, &mut staged).await {
                Ok(read_at) => return Ok((staged, read_at)),
                Err(error) => error,
            };
            self.group.discard(staged);
            match error {
                ClusterError::Compacted { oldest } if repeated < REPEATED_LISTINGS => {
                    repeated += 1;
                    debug!(
                        oldest,
                        "the listing is repeated: its revision cannot be read any more"
                    );
                }
                error => return Err(error),
            }
        }
    }

    fn transition(&mut self, input: Input<'_>) -> Option<News> {
        let (state, news) = std::mem::take(&mut self.state).next(input, Instant::now());
        self.state = state;
        news
    }

    fn failed(&mut self, error: &ClusterError, delay: Duration) {
        let news = self.transition(Input::Failed(error));
        if news == Some(News::Disconnected) {
            let since = SystemTime::now();
            self.published.set_status(DiscoveryStatus::Stale { since });
            warn!(%error, ?delay, "disconnected; the last view stays in use");
            self.published.send(ClusterEvent::Disconnected);
        } else if matches!(error, ClusterError::Compacted { .. }) {
            warn!(%error, ?delay, "events were missed, or the history is another one; the group will be listed again");
        } else if self.published.is_ready() {
            debug!(%error, ?delay, "still disconnected");
        } else {
            warn!(%error, ?delay, "the group cannot be loaded yet");
        }
    }

    /// The store is reached. Suspects could not register while it was silent.
    fn end_silence(&mut self) {
        if let Some(since) = self.state.silent_since() {
            self.group.was_away(since.elapsed());
        }
    }

    fn went_live(&self, news: Option<News>) {
        self.published.set_status(DiscoveryStatus::Live);
        match news {
            Some(News::Connected) => info!("connected"),
            Some(News::Reconnected) => {
                info!("reconnected");
                self.published.send(ClusterEvent::Reconnected);
            }
            Some(News::Disconnected) | None => {}
        }
    }

    fn publish_pending(&mut self) {
        if let Some(changes) = self.outbox.take() {
            self.publish(changes, false);
        }
    }

    fn publish_reset(&mut self, listed: Vec<Change>) {
        let changes = self.outbox.take_before(listed);
        self.publish(changes, true);
    }

    fn publish(&mut self, changes: Vec<Change>, is_reset: bool) {
        if let Some(saver) = &mut self.saver
            && (is_reset || !changes.is_empty())
        {
            saver.changed();
        }
        self.published.publish(Update {
            nodes: self.group.nodes(),
            leader: self.group.leader(),
            rejected: self.group.rejected_entries(),
            changes,
            is_reset,
        });
    }
}

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn wait_for_write(saver: &mut Option<Saver>) {
    match saver {
        Some(saver) => saver.done().await,
        None => std::future::pending().await,
    }
}
