//! Runs a worker process in its own network namespace and drops all its packets. This needs root
//! and `ip`; without them the fault is skipped, and the report says so.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::common::etcd::Process;
use super::common::link::Link;
use super::common::namespace::Namespace;
use super::faults::{EXPIRY_LIMIT, Found};
use super::fleet::TTL;
use super::traffic::example;
use super::world::World;

const ID: &str = "netns";
const PORT: u16 = 8080;

pub async fn drop_packets(world: &mut World, found: &mut Found) {
    let namespace = match Namespace::create() {
        Ok(namespace) => namespace,
        Err(reason) => {
            println!("network namespaces: not available, skipped ({reason})");
            found.skipped = Some(reason);
            return;
        }
    };
    let mut links = Vec::new();
    for member in world.cluster.addresses() {
        links.push(Link::at(namespace.outer_ip.into(), member).await);
    }
    let endpoints = links
        .iter()
        .map(|link| format!("http://{}", link.address()));
    let endpoints: Vec<_> = endpoints.collect();
    let files = format!("{}-netns", world.fleet.group);
    let mut command = namespace.command(example("worker"));
    command
        .args(["--etcd", &endpoints.join(",")])
        .args(["--group", &world.fleet.group, "--id", ID])
        .args(["--listen", &format!("{}:{PORT}", namespace.inner_ip)])
        .args(["--ttl", &TTL.to_string()]);
    let worker = Process::spawn(
        &command,
        &Path::new(env!("CARGO_TARGET_TMPDIR")).join(files),
    );
    world.fleet.others.insert(ID.to_owned(), PORT);
    let result = async {
        let well = world.heal().await;
        well.map_err(|problems| format!("with a worker in a namespace: {problems:?}"))?;
        let lasts = world.longer_than_ttl();
        let start = Instant::now();
        namespace.cut()?;
        world.fleet.until_gone(ID, EXPIRY_LIMIT).await?;
        found.gone_after = Some(start.elapsed());
        sleep(lasts.saturating_sub(start.elapsed())).await;
        namespace.mend()?;
        let well = world.heal().await;
        let healed = well.map_err(|problems| format!("after packets pass again: {problems:?}"))?;
        found.healed_after = Some(healed.after);
        Ok::<_, String>(())
    };
    let result = result.await;
    found.check(result);
    world.fleet.others.remove(ID);
    worker.signal("TERM");
    let left = world
        .fleet
        .until_gone(ID, Duration::from_secs(TTL + 10))
        .await;
    found.check(left.map(drop));
    worker.end(false);
}
