//! Tests of programs in other languages, which register by the protocol of the guide.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::common::etcd::Etcd;
use super::common::group;
use super::common::programs::{Program, is_installed};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Balancer, Setup, registered, until};

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples/register")
        .join(name)
}

async fn answer(balancer: &Balancer) -> String {
    let mut client = Raw::to(balancer).await;
    status(&client.get("").await).to_owned()
}

/// A program registers, publishes, survives a lost lease and an etcd that is away, drains, and leaves; and if it is
/// killed, its entry ends.
async fn lives_a_whole_life(name: &str, mut command: Command) {
    let (etcd, group) = (Etcd::own(), group(name));
    let mut keys = etcd.raw_client().await;
    let backend = RawBackend::start(ok).await;
    let port = backend.address.port().to_string();
    let endpoint = &etcd.endpoints()[0];
    command.args([endpoint, &group, "w1", "127.0.0.1", &port, "5"]);
    let mut program = Program::spawn(&mut command);
    let balancer = Setup::new(etcd.endpoints(), &group).listening().await;
    until("it is used", async || answer(&balancer).await == "200").await;
    let (entry, lease) = registered(&mut keys, &group, "w1").await.unwrap();
    assert!(lease > 0, "{entry}");
    let metadata = entry["metadata"].as_object().unwrap();
    assert!(
        metadata.values().all(serde_json::Value::is_number),
        "{entry}"
    );
    assert!(!metadata.is_empty());
    let written = async |keys: &mut etcd_client::Client| {
        let entry = registered(keys, &group, "w1").await;
        entry.map(|(entry, _)| entry["last_seen"].as_i64().unwrap())
    };
    let first = written(&mut keys).await;
    let mut again = etcd.raw_client().await;
    until("it is published again", async || {
        written(&mut again).await > first
    })
    .await;

    keys.lease_revoke(lease).await.unwrap();
    until("it is registered under another lease", async || {
        let now = registered(&mut again, &group, "w1").await;
        now.is_some_and(|(_, now)| now != lease)
    })
    .await;
    until("it is used again", async || {
        answer(&balancer).await == "200"
    })
    .await;

    etcd.stop();
    // Longer than a call of its takes.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(program.lives(), "while etcd is away");
    etcd.start();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = i64::try_from(now.unwrap().as_millis()).unwrap();
    until("it publishes again", async || {
        let entry = registered(&mut again, &group, "w1").await;
        entry.is_some_and(|(entry, _)| entry["last_seen"].as_i64() > Some(now))
    })
    .await;
    until("it is used again", async || {
        answer(&balancer).await == "200"
    })
    .await;

    program.signal("USR1");
    until("it gets no more requests", async || {
        answer(&balancer).await == "503"
    })
    .await;
    assert!(
        registered(&mut keys, &group, "w1").await.is_some(),
        "it only drains"
    );
    program.signal("TERM");
    assert!(program.ended().await.0.success());
    assert!(
        registered(&mut keys, &group, "w1").await.is_none(),
        "it leaves at once"
    );

    let killed = Program::spawn(&mut command);
    until("it is registered", async || {
        registered(&mut again, &group, "w1").await.is_some()
    })
    .await;
    drop(killed);
    until("its lease ends the entry", async || {
        registered(&mut again, &group, "w1").await.is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_in_go_is_a_member() {
    if is_installed("go") {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("register-go");
        let mut build = Command::new("go");
        build.arg("build").arg("-o").arg(&program);
        let built = build.arg(example("register.go")).status();
        assert!(built.unwrap().success());
        lives_a_whole_life("go", Command::new(program)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_in_python_is_a_member() {
    if is_installed("python3") {
        lives_a_whole_life("python", Command::new(example("register.py"))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shell_with_curl_is_a_member() {
    if is_installed("curl") {
        lives_a_whole_life("curl", Command::new(example("register.sh"))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shell_with_etcdctl_is_a_member() {
    let given = std::env::var("ETCDCTL").unwrap_or_else(|_| "etcdctl".to_owned());
    // It has no `--version`, but ends well with it all the same if it is there.
    if is_installed(&given) {
        let mut command = Command::new(example("register_etcdctl.sh"));
        command.env("ETCDCTL", given);
        lives_a_whole_life("etcdctl", command).await;
    }
}
