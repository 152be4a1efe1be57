//! Registration and election: read the state, do the one thing that is missing, wait for a change
//! that matters, read again.
//!
//! The recipe is that of etcd's own `concurrency` package, with its key layout, so that both mix:
//! each candidate creates `election/{group}/{lease}`; the one with the least create revision
//! leads; each other one watches the candidate just ahead of it, so that a leader's end wakes one
//! node and not all. Nothing is claimed from the answer to a write, which may be lost: only from a
//! read that came after it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::session::Session;
use super::{Command, Shared, refuse_while};
use crate::error::ClusterError;
use crate::node::{HealthStatus, Node};
use crate::store::{
    Condition, Entry, LeaseId, Revision, Selector, Store, Txn, WatchEvent, WatchRange, Watcher,
};

/// Where this node stands, read off the store at one revision.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// Something of it is missing there: `register` or `campaign` or both have to be written.
    Outside { register: bool, campaign: bool },
    /// Another process has registered under the same id since.
    Superseded { by: Option<LeaseId> },
    /// First in line.
    Leads { epoch: Revision },
    /// In line behind the candidate with this key.
    Waits { ahead: String },
    /// Registered, and not to campaign.
    Drained,
    /// Drains, but is still a candidate, or its entry does not say so yet.
    Drains,
}

/// What a standing is judged by.
struct View<'a> {
    registration: Option<&'a Entry>,
    candidates: &'a [Entry],
}

/// Who is asking.
struct Me<'a> {
    lease: LeaseId,
    candidacy: &'a str,
    /// The lease under which this process last saw itself registered.
    last_held: Option<LeaseId>,
    draining: bool,
}

fn standing(view: &View<'_>, me: &Me<'_>) -> Standing {
    let registered = match view.registration {
        None => false,
        Some(entry) if entry.lease == Some(me.lease) => true,
        // A process that starts takes its id over from its predecessor; one that held it and
        // lost it to another must not take it back, or the two would fight for ever.
        Some(entry) if me.last_held.is_none() || entry.lease == me.last_held => false,
        Some(entry) => return Standing::Superseded { by: entry.lease },
    };
    let own = view
        .candidates
        .iter()
        .find(|entry| entry.key == me.candidacy);
    if me.draining {
        let told = view.registration.is_some_and(|entry| {
            serde_json::from_slice::<Node>(&entry.value).is_ok_and(|node| !node.is_serving())
        });
        return match (registered, own) {
            (true, None) if told => Standing::Drained,
            (true, _) => Standing::Drains,
            (false, _) => Standing::Outside {
                register: true,
                campaign: false,
            },
        };
    }
    let Some(own) = own.filter(|_| registered) else {
        return Standing::Outside {
            register: !registered,
            campaign: own.is_none(),
        };
    };
    let ahead = view
        .candidates
        .iter()
        .filter(|entry| entry.create_revision < own.create_revision)
        .max_by_key(|entry| entry.create_revision);
    match ahead {
        None => Standing::Leads {
            epoch: own.create_revision,
        },
        Some(ahead) => Standing::Waits {
            ahead: ahead.key.clone(),
        },
    }
}

impl Shared {
    /// Keeps the node registered and in the election under this lease. Returns when the lease
    /// turns out to be gone, or when the very first registration fails for a lasting reason.
    pub(super) async fn take_part(
        &self,
        store: &dyn Store,
        session: &Arc<Session>,
        inbox: &mut mpsc::Receiver<Command>,
    ) -> ClusterError {
        loop {
            match self.step(store, session, inbox).await {
                Ok(()) => {}
                Err(error @ ClusterError::LeaseNotFound { .. }) => return error,
                Err(error) => {
                    if !session.is_registered() && !error.is_transient() {
                        return error;
                    }
                    let pause = Duration::from_millis(fastrand::u64(200..1000));
                    debug!(group = %self.config.group, node = %self.config.id, %error, ?pause, "cannot read or write the election");
                    refuse_while(sleep(pause), inbox, &error).await;
                }
            }
        }
    }

    async fn step(
        &self,
        store: &dyn Store,
        session: &Arc<Session>,
        inbox: &mut mpsc::Receiver<Command>,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        let registration = self.keys.registration(&self.config.id);
        let candidacy = self.keys.candidacy(lease);
        let (revision, held, candidates) = self.read(store, &registration).await?;
        let view = View {
            registration: held.as_ref(),
            candidates: &candidates,
        };
        let me = Me {
            lease,
            candidacy: &candidacy,
            last_held: self.last_held(),
            draining: self.is_draining(),
        };
        let standing = standing(&view, &me);
        debug!(group = %self.config.group, node = %self.config.id, revision, ?standing, "election read");

        let mut watched = vec![registration.clone()];
        match standing {
            Standing::Outside { register, campaign } => {
                self.end_term();
                return self.enter(store, session, register, campaign).await;
            }
            Standing::Drains => {
                self.end_term();
                return self.write_draining(store, session).await;
            }
            Standing::Superseded { by } => {
                self.end_term();
                self.withdraw(store, &candidacy, lease).await?;
                session.set_registered(false);
                self.set_health(HealthStatus::Unhealthy);
                let by = by.map(|lease| lease.to_string());
                warn!(group = %self.config.group, node = %self.config.id, by, "another process has registered this id; waiting until it leaves");
            }
            Standing::Drained => self.end_term(),
            Standing::Leads { epoch } => {
                watched.push(candidacy.clone());
                if session.is_valid() {
                    self.begin_term(epoch, session);
                }
            }
            Standing::Waits { ahead } => {
                self.end_term();
                watched.push(candidacy.clone());
                watched.push(ahead);
            }
        }
        if held.is_some_and(|entry| entry.lease == Some(lease)) {
            self.set_last_held(lease);
            if !session.set_registered(true) {
                info!(group = %self.config.group, node = %self.config.id, %lease, "node is registered");
                self.set_health(HealthStatus::Healthy);
            }
        }

        let ranges = watched.into_iter().map(|key| WatchRange {
            keys: Selector::Key(key),
            from: revision + 1,
        });
        let mut watcher = store.watch(ranges.collect()).await?;
        tokio::select! {
            changed = until_it_matters(&mut *watcher, &registration, lease) => changed,
            () = session.recheck_asked() => Ok(()),
            Some(command) = inbox.recv() => {
                self.obey(command, store, session).await;
                Ok(())
            }
        }
    }

    /// The registration and the candidates, oldest first, at one revision.
    async fn read(
        &self,
        store: &dyn Store,
        registration: &str,
    ) -> Result<(Revision, Option<Entry>, Vec<Entry>), ClusterError> {
        let election = Selector::Prefix(self.keys.election_prefix().to_owned());
        let listing = store.list(&election, None).await?;
        let own = Selector::Key(registration.to_owned());
        let held = store.list(&own, Some(listing.revision)).await?;
        let mut candidates = listing.entries;
        candidates.retain(|entry| self.keys.is_candidacy(&entry.key));
        candidates.sort_by_key(|entry| entry.create_revision);
        Ok((
            listing.revision,
            held.entries.into_iter().next(),
            candidates,
        ))
    }

    async fn enter(
        &self,
        store: &dyn Store,
        session: &Session,
        register: bool,
        campaign: bool,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        let mut txn = Txn::new();
        if register {
            let key = self.keys.registration(&self.config.id);
            txn = txn.put(key, self.fresh_entry(), Some(lease));
        }
        if campaign {
            let key = self.keys.candidacy(lease);
            txn = txn.when(Condition::Absent(key.clone())).put(
                key,
                self.config.id.clone().into_bytes(),
                Some(lease),
            );
        }
        store.txn(txn).await.map(drop)
    }

    async fn withdraw(
        &self,
        store: &dyn Store,
        candidacy: &str,
        lease: LeaseId,
    ) -> Result<(), ClusterError> {
        let resign = Txn::new()
            .when(Condition::HeldBy(candidacy.to_owned(), lease))
            .delete(candidacy);
        store.txn(resign).await.map(drop)
    }

    async fn write_draining(
        &self,
        store: &dyn Store,
        session: &Session,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        let registration = self.keys.registration(&self.config.id);
        let announce = Txn::new()
            .when(Condition::HeldBy(registration.clone(), lease))
            .put(registration, self.fresh_entry(), Some(lease));
        store.txn(announce).await?;
        self.withdraw(store, &self.keys.candidacy(lease), lease)
            .await
    }

    /// Carries out what the application asked for. In each case leadership ends here before
    /// anything is written, so that it never overlaps with the successor's.
    async fn obey(&self, command: Command, store: &dyn Store, session: &Session) {
        match command {
            Command::Resign(reply) => {
                self.end_term();
                let candidacy = self.keys.candidacy(session.lease.id);
                let result = self.withdraw(store, &candidacy, session.lease.id).await;
                answer(reply, result);
            }
            Command::Drain(reply) => {
                self.set_draining();
                self.end_term();
                answer(reply, self.write_draining(store, session).await);
            }
            Command::Transfer(target, reply) => {
                answer(reply, self.transfer(store, session, target).await);
            }
        }
    }

    async fn transfer(
        &self,
        store: &dyn Store,
        session: &Session,
        target: String,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        if self.epoch().is_none() {
            return Err(ClusterError::NotLeader {
                node: self.config.id.clone(),
                group: self.config.group.clone(),
            });
        }
        if target == self.config.id {
            return Ok(());
        }
        let refused = |reason: String| {
            Err(ClusterError::TransferRefused {
                target: target.clone(),
                reason,
            })
        };
        let registration = self.keys.registration(&self.config.id);
        let candidacy = self.keys.candidacy(lease);
        let (_, _, candidates) = self.read(store, &registration).await?;
        let mut others = candidates.iter().filter(|entry| entry.key != candidacy);
        let Some(next) = others.next() else {
            return refused("there is no other candidate".to_owned());
        };
        if next.value != target.as_bytes() {
            let ahead = String::from_utf8_lossy(&next.value);
            return if others.any(|entry| entry.value == target.as_bytes()) {
                refused(format!("{ahead:?} is ahead of it in the queue"))
            } else {
                refused("it is not a candidate".to_owned())
            };
        }
        self.end_term();
        let hand_over = Txn::new()
            .when(Condition::HeldBy(candidacy.clone(), lease))
            .when(Condition::CreatedAt(next.key.clone(), next.create_revision))
            .delete(candidacy);
        match store.txn(hand_over).await? {
            Some(_) => Ok(()),
            // The next reading finds this node still first, and its term goes on.
            None => refused("it has just left".to_owned()),
        }
    }
}

fn answer(reply: oneshot::Sender<Result<(), ClusterError>>, result: Result<(), ClusterError>) {
    // Whoever asked may have stopped waiting.
    let _ = reply.send(result);
}

/// Waits for any change of the watched keys but this node's own updates of its entry.
async fn until_it_matters(
    watcher: &mut dyn Watcher,
    registration: &str,
    lease: LeaseId,
) -> Result<(), ClusterError> {
    loop {
        let events = watcher.next().await?;
        let own_update = |event: &WatchEvent| {
            matches!(event, WatchEvent::Put(entry)
                if entry.key == registration && entry.lease == Some(lease))
        };
        if !events.iter().all(own_update) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: LeaseId = LeaseId(7);

    fn entry(key: &str, value: &str, create_revision: Revision, lease: i64) -> Entry {
        Entry {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
            create_revision,
            mod_revision: create_revision,
            lease: Some(LeaseId(lease)),
        }
    }

    fn judge(registration: Option<&Entry>, candidates: &[Entry], me: &Me<'_>) -> Standing {
        let view = View {
            registration,
            candidates,
        };
        standing(&view, me)
    }

    fn me() -> Me<'static> {
        Me {
            lease: ME,
            candidacy: "e/7",
            last_held: None,
            draining: false,
        }
    }

    #[test]
    fn enters_what_is_missing() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        let outside = |register, campaign| Standing::Outside { register, campaign };
        assert_eq!(judge(None, &[], &me()), outside(true, true));
        assert_eq!(judge(Some(&registration), &[], &me()), outside(false, true));
        assert_eq!(judge(None, &candidacy, &me()), outside(true, false));
    }

    #[test]
    fn least_create_revision_leads_and_others_watch_the_one_ahead() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidates = [
            entry("e/9", "a", 2, 9),
            entry("e/8", "b", 4, 8),
            entry("e/7", "n", 6, 7),
            entry("e/6", "c", 8, 6),
        ];
        assert_eq!(
            judge(Some(&registration), &candidates, &me()),
            Standing::Waits {
                ahead: "e/8".to_owned()
            }
        );
        assert_eq!(
            judge(Some(&registration), &candidates[2..], &me()),
            Standing::Leads { epoch: 6 }
        );
    }

    #[test]
    fn never_leads_without_its_own_live_registration() {
        let candidacy = [entry("e/7", "n", 6, 7)];
        assert!(matches!(
            judge(None, &candidacy, &me()),
            Standing::Outside { .. }
        ));
    }

    #[test]
    fn a_starting_process_takes_over_and_a_replaced_one_stands_back() {
        let other = entry("r/n", "{}", 5, 3);
        assert!(matches!(
            judge(Some(&other), &[], &me()),
            Standing::Outside { register: true, .. }
        ));
        let replaced = Me {
            last_held: Some(ME),
            ..me()
        };
        assert_eq!(
            judge(Some(&other), &[], &replaced),
            Standing::Superseded {
                by: Some(LeaseId(3))
            }
        );
        // Its own registration of an earlier session, whose lease has not run out yet.
        let earlier = Me {
            last_held: Some(LeaseId(3)),
            ..me()
        };
        assert!(matches!(
            judge(Some(&other), &[], &earlier),
            Standing::Outside { register: true, .. }
        ));
    }

    #[test]
    fn draining_leaves_the_election_and_says_so() {
        let draining = Me {
            draining: true,
            ..me()
        };
        let serving = entry("r/n", r#"{"id":"n","ip":"::1"}"#, 5, 7);
        let told = entry("r/n", r#"{"id":"n","ip":"::1","state":"draining"}"#, 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        assert_eq!(judge(Some(&serving), &[], &draining), Standing::Drains);
        assert_eq!(judge(Some(&told), &candidacy, &draining), Standing::Drains);
        assert_eq!(judge(Some(&told), &[], &draining), Standing::Drained);
    }
}
