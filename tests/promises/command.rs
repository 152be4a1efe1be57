//! Tests of the command `pingora-etcd`, on the release program.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::programs::{COMMAND, Program, is_installed, optimised};
use super::common::{free_port, group, local};
use super::world::{Setup, delete, entry, put, registered, scratch, until, until_registered};

const SECOND: Duration = Duration::from_secs(1);

/// The command with the arguments that name etcd and the group.
fn command(etcd: &Etcd, group: &str, name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(optimised(COMMAND));
    command
        .arg(name)
        .args(["--endpoints", &etcd.endpoints().join(",")]);
    command.args(["--group", group]).args(arguments);
    command
}

fn run(etcd: &Etcd, group: &str, name: &str, arguments: &[&str]) -> (Output, String) {
    let output = command(etcd, group, name, arguments).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_shows_nodes_and_leader_and_what_happens() {
    let (etcd, group) = (Etcd::shared(), group("shown"));
    let mut keys = etcd.raw_client().await;
    let (none, text) = run(&etcd, &group, "leader", &[]);
    assert_eq!((status(&none), &*text), (3, ""), "{none:?}");
    let (none, text) = run(&etcd, &group, "nodes", &["--json"]);
    assert_eq!((status(&none), text.trim()), (0, "[]"));

    let mut watching = command(&etcd, &group, "watch", &["--json"]);
    let file = scratch(&format!("{group}.watch"));
    watching.stdout(std::fs::File::create(&file).unwrap());
    let mut watching = Program::spawn(&mut watching);
    let events = || -> Vec<Value> {
        let text = std::fs::read_to_string(&file).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let has = |event: &str, id: Option<&str>| {
        let is_it = |line: &Value| line["event"] == event && line["node"]["id"].as_str() == id;
        events().iter().any(is_it)
    };
    until("it watches", async || has("live", None)).await;
    let more = json!({ "zone": "z1", "weight": 2, "metadata": { "cpu_usage_percent": 12.5 } });
    put(&mut keys, &group, &entry("a", Some(80), more), None).await;
    let draining = json!({ "state": "draining" });
    put(&mut keys, &group, &entry("b", None, draining), None).await;
    until("both are seen", async || {
        has("joined", Some("a")) && has("joined", Some("b"))
    })
    .await;

    let (_, table) = run(&etcd, &group, "nodes", &[]);
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let lines: Vec<_> = table.lines().map(words).collect();
    assert_eq!(
        lines[1][..5],
        ["a", "127.0.0.1:80", "serving", "z1", "2"],
        "{table}"
    );
    assert_eq!(lines[1][5], "12.5", "{table}");
    assert_eq!(lines[2][..3], ["b", "127.0.0.1", "draining"], "{table}");
    let (_, text) = run(&etcd, &group, "nodes", &["--json"]);
    let nodes: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(nodes[1]["state"], "draining", "{nodes}");
    assert_eq!(nodes[0]["leader"], false);

    delete(&mut keys, &group, "a").await;
    until("it is gone", async || has("left", Some("a"))).await;
    // Programs know each of these words.
    let known = [
        "connecting",
        "live",
        "reset",
        "joined",
        "updated",
        "left",
        "no_leader",
    ];
    for line in events() {
        assert!(known.iter().any(|known| line["event"] == *known), "{line}");
    }
    watching.signal("INT");
    assert!(watching.ended().await.0.success());
    std::fs::remove_file(&file).unwrap();

    // Nobody is there.
    let nowhere = format!("http://{}:{}", local(), free_port());
    let started = Instant::now();
    let away = Command::new(optimised(COMMAND))
        .args(["nodes", "--timeout", "1", "--endpoints", &nowhere])
        .output()
        .unwrap();
    assert_eq!(status(&away), 1);
    assert!(started.elapsed() < 5 * SECOND);
    for wrong in [
        &["nodse"][..],
        &["weight", "a", "heavy"],
        &["weight", "a", "NaN"],
        &["weight", "a", "1000001"],
        &["transfer", "a", "--timeout", "0"],
    ] {
        let output = Command::new(optimised(COMMAND)).args(wrong).output();
        assert_eq!(status(&output.unwrap()), 2, "{wrong:?}");
    }
}

/// A member that is some other program: the example `worker`, which registers elsewhere.
struct Member {
    program: Program,
    port: u16,
    log: std::path::PathBuf,
}

impl Member {
    fn start(etcd: &Etcd, group: &str, arguments: &[&str], child: &[&str]) -> Self {
        let port = free_port();
        let port_text = port.to_string();
        let listen = format!("{}:{port}", local());
        let log = scratch(&format!("{group}-{port}.log"));
        let fixed = [
            "--id",
            "m",
            "--port",
            &port_text,
            "--ip",
            "127.0.0.1",
            "--ttl",
            "2",
        ];
        let mut command = command(etcd, group, "register", &fixed);
        command.env("ETCD_PASSWORD", "secret");
        command.args(arguments).arg("--");
        match child {
            [] => {
                let worker = optimised("worker");
                let arguments = ["--etcd", "memory://m", "--id", "m", "--listen", &listen];
                command.arg(worker).args(arguments);
            }
            child => {
                command.args(child);
            }
        }
        command
            .stderr(std::fs::File::create(&log).unwrap())
            .stdout(Stdio::null());
        Self {
            program: Program::spawn(&mut command),
            port,
            log,
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_program_is_a_member_with_its_load_and_is_taken_out_while_its_check_fails() {
    let (etcd, group) = (Etcd::shared(), group("member"));
    let mut keys = etcd.raw_client().await;
    let queue = scratch(&format!("{group}.queue"));
    std::fs::write(&queue, "4\n").unwrap();
    let file = queue.to_str().unwrap();
    let arguments = [
        "--check-http",
        "/",
        "--check-interval-ms",
        "100",
        "--check-timeout-ms",
        "200",
        "--zone",
        "z",
        "--tags",
        "x,y",
        "--weight",
        "3",
        "--drain",
        "3",
        "--metrics-file",
        file,
    ];
    let mut member = Member::start(&etcd, &group, &arguments, &[]);
    until_registered(&mut keys, &group, "m", |entry, _| {
        let metadata = &entry["metadata"];
        entry["port"] == member.port
            && entry["zone"] == "z"
            && entry["weight"] == 3.0
            && metadata["queue_depth"] == 4.0
            && metadata["memory_usage_percent"].is_number()
            && metadata["cpu_usage_percent"].is_number()
    })
    .await;
    let balancer = Setup::shared(&group).serving().await;
    assert_eq!(balancer.get().await, "m");
    std::fs::write(&queue, "50").unwrap();
    until_registered(&mut keys, &group, "m", |entry, _| {
        entry["metadata"]["queue_depth"] == 50.0
    })
    .await;

    // A program that answers nothing any more, and then does. What an operator says of it still holds then.
    let (weighed, _) = run(&etcd, &group, "weight", &["m", "7"]);
    assert_eq!(status(&weighed), 0, "{weighed:?}");
    let id = std::process::id();
    let worker = child_of(member.program.child.id());
    assert!(worker != id);
    signal(worker, "STOP");
    until("it is out", async || {
        registered(&mut keys, &group, "m").await.is_none()
    })
    .await;
    assert!(
        member
            .log()
            .contains("the node leaves until its check passes again")
    );
    signal(worker, "CONT");
    until_registered(&mut keys, &group, "m", |_, _| true).await;
    let (_, table) = run(&etcd, &group, "nodes", &[]);
    assert!(table.contains("weight 7"), "{table}");
    balancer.until_served_by(&["m"]).await;

    // First it drains, then it leaves, then its program gets the signal.
    member.program.signal("TERM");
    until_registered(&mut keys, &group, "m", |entry, _| {
        entry["state"] == "draining"
    })
    .await;
    assert!(is_alive(worker));
    let (status, _) = member.program.ended().await;
    assert_eq!(status.code(), Some(0), "{}", member.log());
    assert!(registered(&mut keys, &group, "m").await.is_none());
    assert!(!is_alive(worker));
    let log = member.log();
    let place = |what: &str| log.find(what).unwrap_or_else(|| panic!("{what} in {log}"));
    assert!(
        place("the node has left") < place("the command has ended"),
        "{log}"
    );
    std::fs::remove_file(&queue).unwrap();
}

fn child_of(parent: u32) -> u32 {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task"))
        .unwrap()
        .flatten();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let all = texts.chain(children).collect::<String>();
    all.split_whitespace().next().unwrap().parse().unwrap()
}

fn signal(process: u32, name: &str) {
    let arguments = [format!("-{name}"), process.to_string()];
    assert!(
        Command::new("kill")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

fn is_alive(process: u32) -> bool {
    Path::new(&format!("/proc/{process}")).exists()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_with_the_status_of_its_program_whatever_happens() {
    let (etcd, group) = (Etcd::shared(), group("ends"));
    let mut keys = etcd.raw_client().await;
    // A script makes this file once it is ready for a signal.
    let ready = scratch(&format!("{group}.ready"));
    let with_script = |arguments: &[&str], script: &str| {
        let _ = std::fs::remove_file(&ready);
        let child = ["sh", "-c", script, ready.to_str().unwrap()];
        Member::start(&etcd, &group, arguments, &child)
    };
    let is_ready = async || ready.exists();
    for (script, signal, arguments, code) in [
        ("sleep 1; exit 3", None, &[][..], 3),
        ("kill -9 $$", None, &[], 137),
        (
            "trap 'exit 5' TERM; touch \"$0\"; while :; do sleep 0.05; done",
            Some("TERM"),
            &["--drain", "0"],
            5,
        ),
        (
            "trap '' TERM; touch \"$0\"; while :; do sleep 0.05; done",
            Some("TERM"),
            &["--grace", "1"],
            137,
        ),
        (
            "trap 'exit 6' HUP; touch \"$0\"; while :; do sleep 0.05; done",
            Some("HUP"),
            &[],
            6,
        ),
    ] {
        let mut member = with_script(arguments, script);
        if let Some(signal) = signal {
            until_registered(&mut keys, &group, "m", |_, _| true).await;
            until("the script is ready", is_ready).await;
            member.program.signal(signal);
        }
        let (status, _) = member.program.ended().await;
        assert_eq!(status.code(), Some(code), "{script}: {}", member.log());
        assert!(
            registered(&mut keys, &group, "m").await.is_none(),
            "{script}"
        );
    }
    // A second signal is passed on at once, however long the node would drain, which leaves nevertheless.
    let script = "trap 'exit 8' INT; touch \"$0\"; while :; do sleep 0.05; done";
    let mut member = with_script(&["--drain", "600"], script);
    until_registered(&mut keys, &group, "m", |_, _| true).await;
    until("the script is ready", is_ready).await;
    member.program.signal("TERM");
    until_registered(&mut keys, &group, "m", |entry, _| {
        entry["state"] == "draining"
    })
    .await;
    member.program.signal("INT");
    assert_eq!(
        member.program.ended().await.0.code(),
        Some(8),
        "{}",
        member.log()
    );
    assert!(registered(&mut keys, &group, "m").await.is_none());

    // What the command leaves behind ends, too; and the password is not for it.
    let file = scratch(&format!("{group}.pid"));
    let script = format!(
        "sleep 600 & echo $! > {}; test -z \"$ETCD_PASSWORD\" && exit 9",
        file.display()
    );
    let mut member = Member::start(&etcd, &group, &[], &["sh", "-c", &script]);
    assert_eq!(
        member.program.ended().await.0.code(),
        Some(9),
        "{}",
        member.log()
    );
    let left: u32 = std::fs::read_to_string(&file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    until("it has ended", async || !is_alive(left)).await;
    std::fs::remove_file(&file).unwrap();

    // Signals reach what is left, too.
    let script = "(trap '' TERM; trap 'exit 0' HUP; touch \"$0\"; while :; do sleep 0.05; done) &
                  until test -e \"$0\"; do sleep 0.05; done; exit 4";
    let mut member = with_script(&["--grace", "600"], script);
    until("the command has ended", async || {
        member.log().contains("the command has ended")
    })
    .await;
    member.program.signal("HUP");
    let (status, _) = member.program.ended().await;
    assert_eq!(status.code(), Some(4), "{}", member.log());
    let _ = std::fs::remove_file(&ready);

    let mut missing = Member::start(&etcd, &group, &[], &["/no/such/program"]);
    let (status, _) = missing.program.ended().await;
    assert_eq!(status.code(), Some(1));
    assert!(
        missing.log().contains("/no/such/program cannot be started"),
        "{}",
        missing.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_serves_from_the_file_and_says_where_each_value_comes_from() {
    let (etcd, group) = (Etcd::shared(), group("served"));
    let mut keys = etcd.raw_client().await;
    let log = scratch(&format!("{group}.access"));
    let fields = format!(
        "timeouts: {{ connect_ms: 77 }}\naccess_log: {{ file: {} }}",
        log.display()
    );
    let mut setup = Setup::shared(&group).with(&fields);
    setup.program = COMMAND;
    let backend = super::world::Backend::start("a").await;
    put(&mut keys, &group, &backend.entry(json!({})), None).await;
    let balancer = setup.serving().await;
    assert_eq!(balancer.get().await, "a");
    let conf = balancer.conf.to_str().unwrap();
    std::fs::remove_file(&log).unwrap();
    let output = Command::new(optimised(COMMAND))
        .args(["serve", "--check", "--conf", conf])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(!log.exists(), "a check changes nothing");
    let line = |field: &str| {
        let found = text.lines().find(|line| line.starts_with(field));
        found
            .unwrap_or_else(|| panic!("{field} in {text}"))
            .to_owned()
    };
    assert!(
        line("cluster.timeouts.connect_ms: 77").contains(".yaml:"),
        "{text}"
    );
    assert!(
        line("cluster.timeouts.handshake_ms: 1000").ends_with("# default"),
        "{text}"
    );
}

/// What can be said of the unit without a systemd that runs as the first process.
#[test]
fn the_unit_is_one_that_systemd_takes() {
    if !is_installed("systemd-analyze") {
        return;
    }
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/pingora-etcd.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let installed = "/usr/local/bin/pingora-etcd";
    assert!(text.contains(installed));
    let text = text.replace(installed, optimised(COMMAND).to_str().unwrap());
    let file = scratch(&format!("unit-{}.service", std::process::id()));
    std::fs::write(&file, text).unwrap();
    let output = Command::new("systemd-analyze")
        .arg("verify")
        .arg(&file)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // Other units of the machine may have faults of their own.
    let about_it = said.lines().filter(|line| line.contains("unit-"));
    assert_eq!(about_it.collect::<Vec<_>>(), [""; 0], "{said}");
    std::fs::remove_file(&file).unwrap();
}
