//! An etcd cluster whose members are processes of this test: each can be killed, stopped (SIGSTOP)
//! and started again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions, ConnectOptions, GetOptions, KeyValue};

use super::common::etcd::Process;
use super::common::{DEADLINE, free_port, local};

/// How long to wait for one response of a member that is able to respond.
pub const RESPONSE_LIMIT: Duration = Duration::from_secs(1);
/// How long to wait until a member serves, or until the cluster has a leader.
const START: Duration = Duration::from_secs(30);

pub struct Member {
    client_port: u16,
    peer_port: u16,
    data: PathBuf,
    running: Option<Process>,
    paused: bool,
    client: Client,
}

pub struct Cluster {
    binary: PathBuf,
    quota: Option<u64>,
    pub members: Vec<Member>,
}

/// What a member reports about itself.
pub struct Status {
    pub member: u64,
    /// 0 if the member knows of no leader.
    pub leader: u64,
    pub revision: i64,
    pub size: i64,
}

impl Cluster {
    /// `quota` limits the size of the database, in bytes.
    pub async fn start(binary: &Path, size: usize, quota: Option<u64>) -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut members = Vec::new();
        for _ in 0..size {
            let client_port = free_port();
            let name = format!(
                "chaos-{}-{}",
                std::process::id(),
                COUNT.fetch_add(1, Ordering::Relaxed)
            );
            let options = ConnectOptions::default().with_connect_timeout(RESPONSE_LIMIT);
            // The client connects at its first request, and reconnects by itself.
            let client = Client::connect([url(client_port)], Some(options))
                .await
                .unwrap_or_else(|error| panic!("a client of {}: {error}", url(client_port)));
            members.push(Member {
                client_port,
                peer_port: free_port(),
                data: Path::new(env!("CARGO_TARGET_TMPDIR")).join(name),
                running: None,
                paused: false,
                client,
            });
        }
        let mut cluster = Cluster {
            binary: binary.to_owned(),
            quota,
            members,
        };
        for index in 0..size {
            cluster.launch(index);
        }
        cluster.wait_until_all_serve().await;
        cluster
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// `host:port` of each member.
    pub fn addresses(&self) -> Vec<String> {
        let ports = self.members.iter().map(|member| member.client_port);
        ports.map(|port| format!("{}:{port}", local())).collect()
    }

    pub fn client(&self, index: usize) -> Client {
        self.members[index].client.clone()
    }

    pub fn data(&self, index: usize) -> &Path {
        &self.members[index].data
    }

    /// Starts a member, without waiting until it serves.
    pub fn launch(&mut self, index: usize) {
        let peers: Vec<_> = self
            .members
            .iter()
            .enumerate()
            .map(|(index, member)| format!("m{index}={}", url(member.peer_port)))
            .collect();
        let member = &self.members[index];
        let (client, peer) = (url(member.client_port), url(member.peer_port));
        let mut command = Command::new(&self.binary);
        let arguments = [
            ["--name", &format!("m{index}")],
            ["--listen-client-urls", &client],
            ["--advertise-client-urls", &client],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &peers.join(",")],
            ["--heartbeat-interval", "100"],
            ["--election-timeout", "1000"],
            ["--log-level", "error"],
        ];
        command.args(arguments.as_flattened());
        command.arg("--unsafe-no-fsync");
        command.arg("--data-dir").arg(&member.data);
        if let Some(quota) = self.quota {
            command.arg(format!("--quota-backend-bytes={quota}"));
        }
        self.members[index].running = Some(Process::spawn(&command, &member.data));
    }

    /// Kills a member with SIGKILL; its data is kept.
    pub fn kill(&mut self, index: usize) {
        let process = self.members[index].running.take();
        process.expect("the member to kill runs").end(true);
    }

    /// Starts a killed member and waits until every member serves.
    pub async fn restart(&mut self, index: usize) {
        self.launch(index);
        self.wait_until_all_serve().await;
    }

    /// Sends SIGSTOP: the member closes no connection and responds to nothing.
    pub fn pause(&mut self, index: usize) {
        self.signal(index, "STOP");
        self.members[index].paused = true;
    }

    pub fn resume(&mut self, index: usize) {
        self.signal(index, "CONT");
        self.members[index].paused = false;
    }

    fn signal(&self, index: usize, signal: &str) {
        let process = self.members[index].running.as_ref();
        process.expect("the member to signal runs").signal(signal);
    }

    pub async fn status(&self, index: usize) -> Result<Status, String> {
        let mut client = self.client(index);
        let name = format!("status of member {index}");
        let status = answered(&name, client.status()).await?;
        let header = status.header().ok_or("a status without a header")?;
        Ok(Status {
            member: header.member_id(),
            leader: status.leader(),
            revision: header.revision(),
            size: status.db_size(),
        })
    }

    /// The member that leads etcd, according to its own status.
    pub async fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            let mut seen = Vec::new();
            for index in self.running() {
                match self.status(index).await {
                    Ok(status) if status.leader == status.member => return index,
                    Ok(status) => seen.push(format!("member {index} sees {:x}", status.leader)),
                    Err(error) => seen.push(error),
                }
            }
            assert!(start.elapsed() < START, "etcd has no leader: {seen:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        let members = self.members.iter().enumerate();
        members
            .filter(|(_, member)| member.running.is_some() && !member.paused)
            .map(|(index, _)| index)
    }

    /// Waits until every running member responds to a linearizable read.
    pub async fn wait_until_all_serve(&self) {
        let start = Instant::now();
        for index in self.running() {
            let mut client = self.client(index);
            while let Err(error) = answered("read", client.get("any", None)).await {
                assert!(
                    start.elapsed() < START,
                    "member {index} is not serving: {error}"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// The keys under a prefix, by a linearizable read.
    pub async fn list(&self, prefix: &str) -> Result<Vec<KeyValue>, String> {
        let mut last = "no member is running".to_owned();
        for index in self.running() {
            let mut client = self.client(index);
            let options = GetOptions::new().with_prefix();
            match answered("list", client.get(prefix, Some(options))).await {
                Ok(mut listed) => return Ok(listed.take_kvs()),
                Err(error) => last = format!("member {index}: {error}"),
            }
        }
        Err(last)
    }

    /// The same, as soon as a member responds.
    pub async fn until_listed(&self, prefix: &str) -> Result<Vec<KeyValue>, String> {
        let start = Instant::now();
        loop {
            match self.list(prefix).await {
                Err(error) if start.elapsed() > DEADLINE => return Err(error),
                Err(_) => {}
                listed => return listed,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes the history before a revision. `physical`: from the file, too, before it returns.
    pub async fn compact(&self, revision: i64, physical: bool) -> Result<(), String> {
        let mut client = self.client(0);
        repeated("compaction", RESPONSE_LIMIT, async || {
            let options = physical.then(|| CompactionOptions::new().with_physical());
            match client.compact(revision, options).await {
                // A former attempt was carried out, although its response did not come in time.
                Err(error) if error.to_string().contains("has been compacted") => Ok(()),
                compacted => compacted.map(drop),
            }
        })
        .await
    }

    /// Makes the file of a member smaller, which may take long on a busy disk.
    pub async fn defragment(&self, index: usize) -> Result<(), String> {
        let mut client = self.client(index);
        let request = async || client.defragment().await.map(drop);
        repeated("defragmentation", DEADLINE, request).await
    }
}

/// Waits for the response to a request, for at most `RESPONSE_LIMIT`.
pub async fn answered<T>(
    what: &str,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, String> {
    answered_within(RESPONSE_LIMIT, what, request).await
}

async fn answered_within<T>(
    limit: Duration,
    what: &str,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, request).await {
        Ok(result) => result.map_err(|error| format!("{what}: {error}")),
        Err(_) => Err(format!("{what}: no response within {limit:?}")),
    }
}

/// Repeats a request by which the test itself prepares something, until it succeeds. One attempt may take as long as
/// `limit`.
pub async fn repeated<T>(
    what: &str,
    limit: Duration,
    mut request: impl AsyncFnMut() -> Result<T, etcd_client::Error>,
) -> Result<T, String> {
    let start = Instant::now();
    loop {
        match answered_within(limit, what, request()).await {
            Err(error) if start.elapsed() > DEADLINE => return Err(error),
            Err(_) => {}
            answer => return answer,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn url(port: u16) -> String {
    format!("http://{}:{port}", local())
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(process) = member.running.take() {
                process.end(false);
            }
        }
    }
}
