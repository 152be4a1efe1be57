//! The faults that are injected into an etcd of a single member.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, DeleteOptions};
use tokio::time::sleep;

use super::common::DEADLINE;
use super::etcd_cluster::{Cluster, RESPONSE_LIMIT, answered, repeated};
use super::faults::{EXPIRY_LIMIT, Found};
use super::world::World;

/// The limit of etcd's database, in bytes.
pub const QUOTA: u64 = 16 << 20;
const CHUNK: usize = 1 << 20;

/// Kills etcd and starts it again with its data, after longer than the TTL.
pub async fn restart(world: &mut World, _: &mut Found) {
    world.cluster.kill(0);
    let lasts = world.longer_than_ttl();
    sleep(lasts).await;
    world.cluster.restart(0).await;
}

/// Fills etcd's database, so that it refuses every write that takes space: metrics, registrations,
/// leases. etcd still renews leases and deletes keys, so the workers must stay registered and the
/// leader must keep leading; and when the leader crashes the next candidate must become leader,
/// because that takes no write.
pub async fn no_space(world: &mut World, found: &mut Found) {
    let filled = fill(&world.cluster).await;
    found.check(filled);
    let connections = |world: &World| -> usize {
        let workers = world.fleet.workers.iter();
        workers.map(|worker| worker.links.connections()).sum()
    };
    let before = connections(world);
    let leader = world.leading_worker().await;
    let start = Instant::now();
    let lasts = world.longer_than_ttl();
    let mut lost = false;
    while start.elapsed() < lasts {
        lost |= !world.fleet.workers[leader].is_leader();
        sleep(Duration::from_millis(2)).await;
    }
    if lost {
        found.note("the leader changed although its lease could be renewed");
    }
    let again = connections(world) - before;
    found.note(format!(
        "30 workers made {again} new connections in {lasts:.0?}"
    ));
    // A lease that is lost cannot be replaced while the disk is full, so waiting hides nothing.
    let start = Instant::now();
    for watching in &world.fleet.watching {
        let seen = || watching.discovery.nodes().len();
        while seen() != world.fleet.workers.len() {
            if start.elapsed() > EXPIRY_LIMIT {
                found.failures.push(format!(
                    "with a full disk, a discovery has {} nodes",
                    seen()
                ));
                break;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    let leader = world.leading_worker().await;
    world.fleet.workers[leader].crash();
    world.fleet.changed();
    let id = world.fleet.workers[leader].id.clone();
    found.gone(world.fleet.until_gone(&id, EXPIRY_LIMIT).await);
    let next = world.leading_worker().await;
    found.note(format!(
        "{} leads after the crash",
        world.fleet.workers[next].id
    ));

    let made_room = make_room(&world.cluster).await;
    found.check(made_room);
    world.fleet.workers[leader].start().await;
    world.fleet.changed();
}

async fn fill(cluster: &Cluster) -> Result<(), String> {
    let mut client = cluster.client(0);
    let chunk = vec![b'x'; CHUNK];
    let start = Instant::now();
    // Until etcd refuses a write: deleted keys have left free pages in the file, which are used
    // first.
    for index in 0.. {
        let key = format!("fill/{index}");
        match answered("write", client.put(key, chunk.clone(), None)).await {
            Ok(_) if start.elapsed() < DEADLINE => {}
            Ok(_) => {
                let size = cluster.status(0).await?.size;
                return Err(format!(
                    "etcd exceeds its quota: {size} of {QUOTA} bytes after {index} writes"
                ));
            }
            Err(error) if error.contains("space exceeded") => return Ok(()),
            // etcd may be slow because the machine is busy with other tests.
            Err(error) if error.contains("no response") && start.elapsed() < DEADLINE => {}
            Err(error) => return Err(format!("filling etcd: {error}")),
        }
    }
    Ok(())
}

async fn make_room(cluster: &Cluster) -> Result<(), String> {
    let mut client = cluster.client(0);
    let deleted = repeated("deleting", RESPONSE_LIMIT, async || {
        let all = DeleteOptions::new().with_prefix();
        client.delete("fill/", Some(all)).await
    })
    .await?;
    let header = deleted.header().ok_or("a response without a header")?;
    cluster.compact(header.revision(), true).await?;
    // Until etcd accepts writes: a write that etcd judged before there was room raises the alarm
    // again.
    let start = Instant::now();
    loop {
        // Defragmentation frees only what compaction has already removed from the file.
        cluster.defragment(0).await?;
        let alarms = repeated("alarms", RESPONSE_LIMIT, async || {
            let get = AlarmAction::Get;
            client.alarm(get, AlarmType::Nospace, None).await
        })
        .await?;
        for alarm in alarms.alarms() {
            let mut member = AlarmOptions::new();
            member.with_member(alarm.member_id());
            repeated("disarming", RESPONSE_LIMIT, async || {
                let (disarm, member) = (AlarmAction::Deactivate, Some(member.clone()));
                client.alarm(disarm, AlarmType::Nospace, member).await
            })
            .await?;
        }
        // Longer than writes that were in progress at that time.
        sleep(Duration::from_millis(300)).await;
        match answered("write", client.put("fill/again", "", None)).await {
            Ok(_) => break,
            Err(error) if start.elapsed() > DEADLINE => {
                return Err(format!("etcd still refuses writes: {error}"));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Restores a copy of the data after the cluster has moved on: revisions and fencing tokens
/// decrease, leases that had ended exist again, and newer leases do not exist.
pub async fn restore(world: &mut World, found: &mut Found) {
    let data = world.cluster.data(0).to_owned();
    let copy = data.with_extension("copy");
    world.cluster.kill(0);
    found.check(copy_all(&data, &copy));
    world.cluster.restart(0).await;
    if let Err(problems) = world.heal().await {
        found.failures.extend(problems);
    }

    // The cluster moves on: another leader, a worker that left, a worker on another port.
    let leader = world.leading_worker().await;
    if let Some(node) = world.fleet.workers[leader].node()
        && let Err(error) = node.resign().await
    {
        found.failures.push(format!("resigning: {error}"));
    }
    let moved = world.other_worker().await;
    world.fleet.workers[moved].stop().await;
    world.fleet.workers[moved].start().await;
    let mut left = world.other_worker().await;
    while left == moved {
        left = world.other_worker().await;
    }
    world.fleet.workers[left].stop().await;
    world.fleet.changed();
    if let Err(problems) = world.heal().await {
        found.failures.extend(problems);
    }

    world.monitor.allow_smaller_tokens(true);
    let newest = world.cluster.status(0).await;
    world.cluster.kill(0);
    let restored = std::fs::remove_dir_all(&data)
        .map_err(|error| format!("removing {}: {error}", data.display()))
        .and_then(|()| copy_all(&copy, &data));
    found.check(restored);
    let start = Instant::now();
    world.cluster.restart(0).await;
    if let (Ok(newest), Ok(now)) = (newest, world.cluster.status(0).await) {
        found.note(format!(
            "revision {} after {}",
            now.revision, newest.revision
        ));
        if now.revision >= newest.revision {
            found
                .failures
                .push("the restored data is not older".to_owned());
        }
    }
    // This worker left, but the copy still has its registration and its lease.
    let id = world.fleet.workers[left].id.clone();
    let back = Instant::now();
    while world.fleet.watching[0].discovery.nodes().get(&id).is_none() {
        if back.elapsed() > EXPIRY_LIMIT {
            found.note(format!("no discovery showed {id} again"));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    let gone = world.fleet.until_gone(&id, EXPIRY_LIMIT).await;
    found.gone(gone.map(|_| start.elapsed()));
    world.fleet.workers[left].start().await;
    world.fleet.changed();
    let removed = std::fs::remove_dir_all(&copy);
    found.check(removed.map_err(|error| format!("removing {}: {error}", copy.display())));
}

fn copy_all(from: &Path, to: &Path) -> Result<(), String> {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    match copied {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("cp {}: {other:?}", from.display())),
    }
}
