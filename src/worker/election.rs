//! Registration and election: read the state, do the one thing that is missing, wait for a change
//! that matters, read again.
//!
//! The recipe is that of etcd's own `concurrency` package, with its key layout, so that both mix:
//! each candidate creates `election/{group}/{lease}`; the one with the least create revision
//! leads; each other one watches the candidate just ahead of it, so that a leader's end wakes one
//! node and not all. Nothing is claimed from the answer to a write, which may be lost: only from a
//! read that came after it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::session::Session;
use super::{Command, Shared};
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
    Superseded {
        by: LeaseId,
        candidacy: Option<Revision>,
    },
    /// First in line.
    Leads { epoch: Revision },
    /// In line behind the candidate with this key.
    Waits { ahead: String },
    /// Registered, and not to campaign.
    Drained,
    /// Drains, but is still a candidate (created then), or its entry does not say so yet.
    Drains { candidacy: Option<Revision> },
    /// Still a candidate, although it has resigned.
    Abandoned { candidacy: Revision },
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
    /// Leases that this process has had.
    own_leases: &'a VecDeque<LeaseId>,
    /// It has seen itself registered before.
    was_registered: bool,
    /// The candidacy it has given up, by its create revision.
    abandoned: Revision,
    draining: bool,
}

fn standing(view: &View<'_>, me: &Me<'_>) -> Standing {
    let own = view
        .candidates
        .iter()
        .find(|entry| entry.key == me.candidacy);
    let candidacy = own.map(|entry| entry.create_revision);
    let registered = match view.registration.map(|entry| entry.lease) {
        None => false,
        Some(Some(lease)) if lease == me.lease => true,
        // Under no lease: nobody who lives holds it.
        Some(None) => false,
        // A process that starts takes its id over from its predecessor; one that held it and
        // lost it to another must not take it back, or the two would fight for ever.
        Some(Some(lease)) if !me.was_registered || me.own_leases.contains(&lease) => false,
        Some(Some(by)) => return Standing::Superseded { by, candidacy },
    };
    if me.draining {
        let told = view.registration.is_some_and(|entry| {
            serde_json::from_slice::<Node>(&entry.value).is_ok_and(|node| !node.is_serving())
        });
        return match (registered, candidacy) {
            (true, None) if told => Standing::Drained,
            (true, candidacy) => Standing::Drains { candidacy },
            (false, _) => Standing::Outside {
                register: true,
                campaign: false,
            },
        };
    }
    if let Some(candidacy) = candidacy.filter(|created| *created == me.abandoned) {
        return Standing::Abandoned { candidacy };
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
                    self.refuse_while(sleep(pause), inbox, &error).await;
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
        let own = candidates.iter().find(|entry| entry.key == candidacy);
        let own = own.map(|entry| entry.create_revision);
        let standing = {
            let past = self.past();
            let me = Me {
                lease,
                candidacy: &candidacy,
                own_leases: &past.leases,
                was_registered: past.was_registered,
                abandoned: session.abandoned(),
                draining: self.is_draining(),
            };
            standing(&view, &me)
        };
        debug!(group = %self.config.group, node = %self.config.id, revision, ?standing, "election read");

        let mut watched = vec![registration.clone()];
        match &standing {
            Standing::Outside { register, campaign } => {
                self.end_term();
                let held = held.as_ref().filter(|_| *register);
                return self.enter(store, session, *register, held, *campaign).await;
            }
            Standing::Drains { candidacy } => {
                self.end_term();
                return self.write_draining(store, session, *candidacy).await;
            }
            Standing::Abandoned { candidacy } => {
                self.end_term();
                return self.withdraw(store, session, *candidacy).await;
            }
            Standing::Superseded { by, candidacy } => {
                self.end_term();
                if let Some(candidacy) = candidacy {
                    self.withdraw(store, session, *candidacy).await?;
                }
                session.set_registered(false);
                if self.set_health(HealthStatus::Unhealthy) {
                    warn!(group = %self.config.group, node = %self.config.id, %by, "another process has registered this id; waiting until it leaves");
                }
            }
            Standing::Drained => self.end_term(),
            Standing::Leads { epoch } => {
                watched.push(candidacy.clone());
                if session.is_valid() {
                    self.begin_term(*epoch, session);
                }
            }
            Standing::Waits { ahead } => {
                self.end_term();
                watched.push(candidacy.clone());
                watched.push(ahead.clone());
            }
        }
        let holder = held.and_then(|entry| entry.lease);
        if holder == Some(lease) {
            self.past().was_registered = true;
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
            changed = until_it_matters(&mut *watcher, &registration, holder) => changed,
            () = session.recheck_asked() => Ok(()),
            Some(command) = inbox.recv() => {
                self.obey(command, store, session, own).await;
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

    /// Registers in place of `held`, campaigns, or both; or neither, if that is not how things
    /// are any more: the next reading will tell.
    async fn enter(
        &self,
        store: &dyn Store,
        session: &Session,
        register: bool,
        held: Option<&Entry>,
        campaign: bool,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        let mut txn = Txn::new();
        if register {
            let key = self.keys.registration(&self.config.id);
            txn = txn.when(match held {
                None => Condition::Absent(key.clone()),
                Some(entry) => match entry.lease {
                    Some(lease) => Condition::HeldBy(key.clone(), lease),
                    None => Condition::CreatedAt(key.clone(), entry.create_revision),
                },
            });
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

    /// Gives up the candidacy that was created then, and no later one: this request may be
    /// carried out long after it was given up on.
    async fn withdraw(
        &self,
        store: &dyn Store,
        session: &Session,
        created: Revision,
    ) -> Result<(), ClusterError> {
        session.abandon(created);
        let candidacy = self.keys.candidacy(session.lease.id);
        let resign = Txn::new()
            .when(Condition::CreatedAt(candidacy.clone(), created))
            .delete(candidacy);
        store.txn(resign).await.map(drop)
    }

    async fn write_draining(
        &self,
        store: &dyn Store,
        session: &Session,
        candidacy: Option<Revision>,
    ) -> Result<(), ClusterError> {
        let lease = session.lease.id;
        let registration = self.keys.registration(&self.config.id);
        let announce = Txn::new()
            .when(Condition::HeldBy(registration.clone(), lease))
            .put(registration, self.fresh_entry(), Some(lease));
        store.txn(announce).await?;
        match candidacy {
            Some(created) => self.withdraw(store, session, created).await,
            None => Ok(()),
        }
    }

    /// Carries out what the application asked for. In each case leadership ends here before
    /// anything is written, so that it never overlaps with the successor's; and if the answer gets
    /// lost, the candidacy stays given up.
    async fn obey(
        &self,
        command: Command,
        store: &dyn Store,
        session: &Session,
        candidacy: Option<Revision>,
    ) {
        match command {
            Command::Resign(reply) => {
                self.end_term();
                let result = match candidacy {
                    Some(created) => self.withdraw(store, session, created).await,
                    None => Ok(()),
                };
                answer(reply, result);
            }
            Command::Drain(reply) => {
                self.set_draining();
                self.end_term();
                let result = self.write_draining(store, session, candidacy).await;
                answer(reply, result);
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
        let Some(epoch) = self.epoch() else {
            return Err(ClusterError::NotLeader {
                node: self.config.id.clone(),
                group: self.config.group.clone(),
            });
        };
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
        let candidacy = self.keys.candidacy(session.lease.id);
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
        session.abandon(epoch);
        let hand_over = Txn::new()
            .when(Condition::CreatedAt(candidacy.clone(), epoch))
            .when(Condition::CreatedAt(next.key.clone(), next.create_revision))
            .delete(candidacy);
        if store.txn(hand_over).await?.is_some() {
            return Ok(());
        }
        // Nothing was written, and nothing will be: the next reading finds this node still first,
        // and its term goes on.
        session.abandon(0);
        refused("it has just left".to_owned())
    }
}

fn answer(reply: oneshot::Sender<Result<(), ClusterError>>, result: Result<(), ClusterError>) {
    // Whoever asked may have stopped waiting.
    let _ = reply.send(result);
}

/// Waits for any change of the watched keys but updates of the registration by its holder: this
/// process, or the one that has replaced it.
async fn until_it_matters(
    watcher: &mut dyn Watcher,
    registration: &str,
    holder: Option<LeaseId>,
) -> Result<(), ClusterError> {
    loop {
        let events = watcher.next().await?;
        let update = |event: &WatchEvent| {
            matches!(event, WatchEvent::Put(entry)
                if entry.key == registration && entry.lease == holder)
        };
        if !events.iter().all(update) {
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

    static NONE: VecDeque<LeaseId> = VecDeque::new();

    fn me() -> Me<'static> {
        Me {
            lease: ME,
            candidacy: "e/7",
            own_leases: &NONE,
            was_registered: false,
            abandoned: 0,
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
            was_registered: true,
            ..me()
        };
        assert_eq!(
            judge(Some(&other), &[], &replaced),
            Standing::Superseded {
                by: LeaseId(3),
                candidacy: None
            }
        );
        // Its own registration of an earlier session, whose lease has not run out yet.
        let own_leases = VecDeque::from([LeaseId(3), ME]);
        let earlier = Me {
            own_leases: &own_leases,
            ..replaced
        };
        assert!(matches!(
            judge(Some(&other), &[], &earlier),
            Standing::Outside { register: true, .. }
        ));
        // Written by hand, under no lease: nobody lives there.
        let nobodys = Entry {
            lease: None,
            ..other
        };
        assert!(matches!(
            judge(Some(&nobodys), &[], &replaced),
            Standing::Outside { register: true, .. }
        ));
    }

    #[test]
    fn a_candidacy_given_up_never_leads() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        let resigned = Me {
            abandoned: 6,
            ..me()
        };
        assert_eq!(
            judge(Some(&registration), &candidacy, &resigned),
            Standing::Abandoned { candidacy: 6 }
        );
        let later = [entry("e/7", "n", 8, 7)];
        assert_eq!(
            judge(Some(&registration), &later, &resigned),
            Standing::Leads { epoch: 8 }
        );
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
        let drains = |candidacy| Standing::Drains { candidacy };
        assert_eq!(judge(Some(&serving), &[], &draining), drains(None));
        assert_eq!(judge(Some(&told), &candidacy, &draining), drains(Some(6)));
        assert_eq!(judge(Some(&told), &[], &draining), Standing::Drained);
    }
}
