//! Tests the example programs as processes, with the configuration files that are shipped.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::etcd::Etcd;
use super::common::programs::{Program, adapted, binary, config_file, until_nodes_answer, worker};
use super::common::stalls::Stalls;
use super::common::{DEADLINE, group};
#[cfg(feature = "tls")]
use super::common::{
    certificates::{Authority, Directory},
    free_port, local,
};
use super::{Load, client, until_it_answers};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_and_a_load_balancer_as_the_readme_runs_them() {
    let etcd = Etcd::shared();
    let (endpoint, group) = (&etcd.endpoints()[0], group("programs"));
    let mut workers = Vec::new();
    for id in ["w1", "w2", "w3"] {
        workers.push(worker(endpoint, &group, id));
    }
    let (file, url) = adapted("load_balancer.yaml", endpoint, &group);
    let mut balancer = Program::start("load_balancer", &["--conf", file.to_str().unwrap()]);
    until_it_answers(&url).await;
    until_nodes_answer(&url, 3).await;
    let client = client();

    // A request directly to a worker.
    let response = client.get(&workers[0].url).send().await.unwrap();
    assert_eq!(response.headers()["x-served-by"], "w1");
    assert_eq!(response.text().await.unwrap(), "w1\n");

    // The load that a worker is set to makes it slow, and is reported.
    let set = |url: &str, query: &str| {
        let request = client.put(format!("{url}/load?{query}"));
        async move { request.send().await.unwrap() }
    };
    let refused = set(&workers[0].url, "cpu=101").await;
    assert_eq!(refused.status(), 400);
    assert!(refused.text().await.unwrap().contains("cpu"));
    let done = set(&workers[0].url, "cpu=95&memory=40&queue=12").await;
    assert_eq!(done.status(), 200);
    let start = Instant::now();
    client.get(&workers[0].url).send().await.unwrap();
    assert!(
        start.elapsed() > Duration::from_millis(60),
        "20 times 2 ms for the CPU usage and 12 times 2 ms for the queue"
    );
    let mut unloaded = 0;
    let start = Instant::now();
    while unloaded < 100 {
        let response = client.get(&url).send().await.unwrap();
        unloaded = if response.headers()["x-upstream-node"] == "w1" {
            0
        } else {
            unloaded + 1
        };
        assert!(start.elapsed() < DEADLINE, "w1 is still picked");
    }
    set(&workers[0].url, "cpu=0&memory=0&queue=0").await;
    until_nodes_answer(&url, 3).await;

    // One worker is killed, one leaves, and one is made to crash, all under load: no GET may fail
    // while any worker is alive.
    let load = Load::start(&url, 16);
    load.goes_on(300).await;
    workers[0].program.signal("KILL");
    load.goes_on(300).await;
    let response = client
        .post(format!("{}/stop", workers[1].url))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let (status, took) = workers[1].program.ended().await;
    assert!(
        status.success() && took < Duration::from_secs(5),
        "{status} {took:?}"
    );
    load.goes_on(300).await;
    assert_eq!(load.stop().await, Vec::<String>::new());

    // The response may be lost in the crash.
    let _ = client
        .post(format!("{}/crash", workers[2].url))
        .send()
        .await;
    let (status, _) = workers[2].program.ended().await;
    assert!(!status.success(), "a crash must not exit with success");

    // SIGTERM leaves gracefully, SIGINT ends the balancer.
    let mut last = worker(endpoint, &group, "w4");
    until_nodes_answer(&url, 1).await;
    last.program.signal("TERM");
    let (status, took) = last.program.ended().await;
    assert!(
        status.success() && took < Duration::from_secs(5),
        "{status} {took:?}"
    );
    balancer.signal("INT");
    let (status, took) = balancer.ended().await;
    assert!(
        status.success() && took < Duration::from_secs(5),
        "{status} {took:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_routing_as_the_readme_runs_it() {
    let etcd = Etcd::shared();
    let (endpoint, group) = (&etcd.endpoints()[0], group("routing"));
    let (file, url) = adapted("leader_routing.yaml", endpoint, &group);
    let _routing = Program::start("leader_routing", &["--conf", file.to_str().unwrap()]);
    until_it_answers(&url).await;
    let client = client();
    let response = client.post(&url).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));

    let mut first = worker(endpoint, &group, "w1");
    let start = Instant::now();
    while !client
        .post(&url)
        .send()
        .await
        .unwrap()
        .status()
        .is_success()
    {
        assert!(start.elapsed() < DEADLINE, "w1 did not become leader");
    }
    let second = worker(endpoint, &group, "w2");
    until_nodes_answer(&url, 2).await;
    for _ in 0..10 {
        let response = client.post(&url).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-served-by"], "w1");
    }
    first.program.signal("TERM");
    first.program.ended().await;
    let response = client.post(&url).send().await.unwrap();
    assert_eq!(response.headers()["x-served-by"], "w2");

    // A worker refuses a token that is older than its own term.
    let stale = client.post(&second.url).header("x-leader-epoch", "1");
    assert_eq!(stale.send().await.unwrap().status(), 409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_serves_and_ends_with_ctrl_c() {
    let (file, url) = adapted("demo.yaml", "memory://demo", &group("demo"));
    let mut command = Command::new(binary("load_balancer"));
    command
        .args(["--conf", file.to_str().unwrap(), "--demo", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut demo = Program::spawn(&mut command);
    let output = BufReader::new(demo.child.stdout.take().unwrap());
    until_nodes_answer(&url, 3).await;
    // The suggested commands name the address that the demo listens on.
    let first = output.lines().next().unwrap().unwrap();
    assert!(first.contains(&url), "{first}");
    demo.signal("INT");
    let (status, took) = demo.ended().await;
    assert!(
        status.success() && took < Duration::from_secs(5),
        "{status} {took:?}"
    );
}

#[test]
fn wrong_configurations_are_explained() {
    let run = |text: &str| {
        let name = group("wrong");
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&file, text).unwrap();
        let output = Command::new(binary("load_balancer"))
            .args(["--test", "--conf", file.to_str().unwrap()])
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), message)
    };
    let good = std::fs::read_to_string(config_file("load_balancer.yaml")).unwrap();
    assert!(run(&good).0);
    for (wrong, explained) in [
        (
            good.replace("policy: adaptive", "policy: quickest"),
            "quickest",
        ),
        (good.replace("http://127", "htp://127"), "htp://127"),
        (good.replace("floor: 0.05", "floor: 5"), "headroom.floor"),
        (good.replace("version: 1 ", "version: 2 "), "version: 2"),
        (
            good.replace("client_bind_to_ipv4: []", "client_bind_to_ipv4: [1.2.3]"),
            "client_bind_to_ipv4: \"1.2.3\"",
        ),
        (
            good.replace("daemon: false", "daemon_wait_for_ready: false"),
            "line 8: the field daemon_wait_for_ready has no effect",
        ),
        (
            good.replace("\nuser: null", "\nuser: nobody"),
            "user: has an effect only with daemon",
        ),
        (
            good.replace("127.0.0.1:6188\"", "127.0.0.1:0\""),
            "cluster.listen",
        ),
        (
            good.replace("ready_path: null", "ready_path: ready"),
            "cluster.clients.ready_path",
        ),
    ] {
        let (succeeded, message) = run(&wrong);
        assert!(
            !succeeded && message.contains(explained),
            "{explained}: {message}"
        );
        assert!(!message.contains("panicked"), "{message}");
    }
    // A field that does not exist is named with its line.
    for (field, wrong) in [("  group:", "grupe"), ("threads:", "thread")] {
        let at = good.lines().position(|line| line.starts_with(field));
        let at = (at.unwrap() + 1).to_string();
        let renamed = field.replace(field.trim_matches([' ', ':']), wrong);
        let (succeeded, message) = run(&good.replacen(field, &renamed, 1));
        let mut lines = message.split("line ").skip(1);
        let is_there = lines.any(|rest| {
            let number = rest.split(|c: char| !c.is_ascii_digit()).next();
            number == Some(&*at)
        });
        let is_named =
            message.contains(&format!("{wrong:?}")) || message.contains(&format!("`{wrong}`"));
        assert!(
            !succeeded && is_named && is_there,
            "{wrong}, {at}: {message}"
        );
        assert!(!message.contains("panicked"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipe_can_be_the_configuration_and_one_that_nobody_writes_to_is_an_error() {
    let pipe = Path::new(env!("CARGO_TARGET_TMPDIR")).join(group("pipe"));
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).unwrap();
    let start = || {
        let mut command = Command::new(binary("load_balancer"));
        command.args(["--test", "--conf", pipe.to_str().unwrap()]);
        Program::spawn(command.stderr(Stdio::piped()))
    };
    let mut program = start();
    let good = std::fs::read_to_string(config_file("load_balancer.yaml")).unwrap();
    // In a thread, because it waits for a reader.
    let to = pipe.clone();
    std::thread::spawn(move || std::fs::write(to, good));
    let (status, _) = program.ended().await;
    assert!(status.success(), "{status}");
    let mut program = start();
    let (status, took) = program.ended().await;
    assert!(!status.success(), "{status} {took:?}");
    let output = program.child.stderr.take().unwrap();
    let message = std::io::read_to_string(output).unwrap();
    assert!(message.contains("nobody writes to it"), "{message}");
    std::fs::remove_file(&pipe).unwrap();
}

/// The shipped files must show every field.
#[test]
fn every_field_is_in_every_configuration_file() {
    let fields_of = |path: &str, bogus: &str| -> Vec<String> {
        let error = pingora_etcd::config::ClusterConfig::from_yaml(bogus, path).unwrap_err();
        let message = error.to_string();
        let (_, list) = message
            .split_once("these are known:")
            .unwrap_or_else(|| panic!("{message}"));
        let list = list.lines().next().unwrap();
        list.split(',')
            .map(|field| field.trim().to_owned())
            .collect()
    };
    let mut fields = fields_of("cluster", "cluster: { bogus: 1 }");
    fields.extend(fields_of("etcd", "cluster: { etcd: { bogus: 1 } }"));
    fields.extend(fields_of("tls", "cluster: { etcd: { tls: { bogus: 1 } } }"));
    for section in ["headroom", "adaptive", "consistent", "zones"] {
        fields.extend(fields_of(
            section,
            &format!("cluster: {{ {section}: {{ bogus: 1 }} }}"),
        ));
    }
    assert!(fields.len() > 20, "{fields:?}");
    // Of these the files show the fields in a line of their own, or where they say how the section is written.
    let sections = [
        "access_log",
        "admin",
        "backends",
        "clients",
        "filter",
        "health_check",
        "leader",
        "limits",
        "opentelemetry",
        "overload",
        "retry",
        "self_preservation",
        "snapshot",
        "timeouts",
        "tls",
    ];
    let mut of_sections = Vec::new();
    for section in sections {
        let bogus = format!("cluster: {{ {section}: {{ bogus: 1 }} }}");
        of_sections.extend(
            fields_of(section, &bogus)
                .into_iter()
                .map(|it| (section, it)),
        );
    }
    for (section, bogus) in [
        ("groups", "cluster: { groups: { a: { bogus: 1 } } }"),
        ("routes", "cluster: { routes: [{ bogus: 1 }] }"),
        (
            "further_listeners",
            "cluster: { further_listeners: [{ bogus: 1 }] }",
        ),
        ("registry", "cluster: { registry: { bogus: 1 } }"),
    ] {
        of_sections.extend(
            fields_of(section, bogus)
                .into_iter()
                .map(|it| (section, it)),
        );
    }
    assert!(of_sections.len() > 100, "{of_sections:?}");
    // The files must show Pingora's own fields as well, but those that are refused.
    let defaults = pingora::server::configuration::ServerConf::default().to_yaml();
    let is_refused = |field: &str| {
        let given = pingora_etcd::config::server_conf(&format!("{field}: null"), "a file");
        given.is_err_and(|error| error.to_string().contains("has no effect"))
    };
    fields.extend(defaults.lines().filter_map(|line| {
        let (field, _) = line.split_once(':')?;
        (!is_refused(field)).then(|| field.to_owned())
    }));
    assert!(fields.len() > 50, "{fields:?}");
    for file in ["load_balancer.yaml", "leader_routing.yaml", "demo.yaml"] {
        let text = std::fs::read_to_string(config_file(file)).unwrap();
        for field in &fields {
            let shown = text.lines().any(|line| {
                let line = line.trim_start();
                line.starts_with(&format!("{field}:"))
            });
            assert!(shown, "{file} does not show {field}");
        }
        // Routes have a file of their own.
        let with_routes =
            text.clone() + &std::fs::read_to_string(config_file("routes.yaml")).unwrap();
        let words = || with_routes.split([' ', '{', '(']);
        for (section, field) in &of_sections {
            let is_field = |word: &str| {
                let rest = word.strip_prefix(field.as_str());
                rest.is_some_and(|rest| rest.starts_with([':', ',']))
            };
            let shown = words().any(|word| is_field(word.trim()));
            assert!(shown, "{file} does not show {section}.{field}");
        }
        // And say what it is without it, and what it may be.
        for line in text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
        {
            let Some((field, comment)) = line.split_once('#') else {
                continue;
            };
            let (_, value) = field.split_once(':').unwrap_or_default();
            let said = ["Default", "Required", "always"]
                .iter()
                .any(|it| comment.contains(it));
            assert!(said || value.trim().is_empty(), "{file}: {line}");
            let is_number = value.trim().parse::<f64>().is_ok();
            let has_range = comment.contains("Range") || comment.contains("always");
            assert!(has_range || !is_number, "{file}: {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_told_to_stop_says_so_finishes_what_it_has_and_leaves() {
    let etcd = Etcd::shared();
    let (endpoint, group) = (&etcd.endpoints()[0], group("drains"));
    let mut leaving = worker(endpoint, &group, "w1");
    let _staying = worker(endpoint, &group, "w2");
    let discovery = pingora_etcd::ServiceDiscovery::new(etcd.endpoints(), group.clone());
    let running = discovery.clone();
    let following = tokio::spawn(async move { running.run(None).await });
    let (file, url) = adapted("load_balancer.yaml", endpoint, &group);
    let _balancer = Program::start("load_balancer", &["--conf", file.to_str().unwrap()]);
    until_it_answers(&url).await;
    until_nodes_answer(&url, 2).await;
    let client = client();
    let load = Load::start(&url, 8);
    load.goes_on(100).await;

    // From here on every request takes this worker two seconds.
    let set = client.put(format!("{}/load?queue=1000", leaving.url));
    assert_eq!(set.send().await.unwrap().status(), 200);
    // Starts a request every second, each before the previous one has ended, until the checks are
    // done.
    let (enough, mut is_enough) = tokio::sync::watch::channel(());
    let (asking, own) = (client.clone(), leaving.url.clone());
    let slow = tokio::spawn(async move {
        let mut answers = Vec::new();
        loop {
            answers.push(tokio::spawn(asking.get(&own).send()));
            let ended = tokio::time::timeout(Duration::from_secs(1), is_enough.changed()).await;
            if ended.is_ok() {
                return answers;
            }
        }
    });
    const AT_ONCE: Duration = Duration::from_secs(2);
    let (stalls, start) = (Stalls::watch(), Instant::now());
    leaving.program.signal("TERM");
    let state = |id: &str| {
        let nodes = discovery.nodes();
        nodes.get(id).map(|node| node.state)
    };
    super::common::eventually("w1 is shown as draining", || {
        state("w1") == Some(pingora_etcd::NodeState::Draining)
    })
    .await;
    assert!(
        start.elapsed() < AT_ONCE + stalls.so_far(),
        "w1 must drain at once"
    );
    load.goes_on(100).await;
    let mut in_a_row = 0;
    while in_a_row < 100 {
        let asked = start.elapsed();
        let answer = client.get(&url).send().await.unwrap();
        in_a_row += 1;
        if answer.headers()["x-upstream-node"] != "w2" {
            assert!(
                asked < AT_ONCE + stalls.so_far(),
                "the balancer still picks w1 after {asked:?}"
            );
            in_a_row = 0;
        }
    }
    assert!(
        state("w1").is_some(),
        "w1 must stay registered while it has requests in flight"
    );
    drop(enough);
    let start = Instant::now();
    for answer in slow.await.unwrap() {
        assert_eq!(answer.await.unwrap().unwrap().status(), 200);
    }
    let (status, _) = leaving.program.ended().await;
    assert!(status.success(), "{status}");
    super::common::eventually("w1 is not registered any more", || state("w1").is_none()).await;
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "w1 must end soon after its last request"
    );
    assert_eq!(load.stop().await, Vec::<String>::new());
    following.abort();
}

/// An etcd with TLS, whose users `w1`, `w2` and `balancer` have the rights they need for the group.
#[cfg(feature = "tls")]
async fn etcd_with_tls_and_users(ca: &Authority, server_files: &Directory, group: &str) -> Etcd {
    use etcd_client::{Certificate, Client, ConnectOptions, Permission, PermissionType};

    use super::common::etcd::Setup;

    server_files.write_pair("server", &ca.server(&["127.0.0.1"]));
    server_files.write("ca.pem", ca.pem());
    let etcd = Etcd::with(Setup {
        https: true,
        arguments: vec![
            "--cert-file={files}/server.pem".to_owned(),
            "--key-file={files}/server.key".to_owned(),
            "--bcrypt-cost=4".to_owned(),
        ],
        files: Some(server_files.path().to_owned()),
        ..Setup::default()
    });
    let tls = etcd_client::TlsOptions::new().ca_certificate(Certificate::from_pem(ca.pem()));
    let options = ConnectOptions::default().with_tls(tls);
    let mut root = Client::connect(etcd.endpoints(), Some(options))
        .await
        .unwrap();
    let both = |prefix: &str| {
        Permission::new(PermissionType::Readwrite, format!("{prefix}/{group}/")).with_prefix()
    };
    let own =
        |id: &str| Permission::new(PermissionType::Readwrite, format!("registry/{group}/{id}"));
    let read = |prefix: &str| Permission::read(prefix).with_prefix();
    for (user, permissions) in [
        ("root", vec![]),
        ("w1", vec![own("w1"), both("election")]),
        ("w2", vec![own("w2"), both("election")]),
        ("balancer", vec![read("registry/"), read("election/")]),
    ] {
        root.role_add(user).await.unwrap();
        for permission in permissions {
            root.role_grant_permission(user, permission).await.unwrap();
        }
        root.user_add(user, format!("password of {user}"), None)
            .await
            .unwrap();
        root.user_grant_role(user, user).await.unwrap();
    }
    root.auth_enable().await.unwrap();
    etcd
}

/// The programs get TLS and users by their flags, environment variables and configuration fields.
#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_and_a_load_balancer_over_tls_with_users() {
    let (server_files, files, group) = (Directory::new(), Directory::new(), group("secure"));
    let ca = Authority::new("CA");
    let etcd = etcd_with_tls_and_users(&ca, &server_files, &group).await;

    let ca_file = files.write("ca.pem", ca.pem());
    let (client_cert, client_key) = files.write_pair("client", &ca.client("client"));
    let endpoint = etcd.endpoints().remove(0);
    let start = |id: &str, more: &[&str], variables: &[(&str, &str)]| {
        let listen = format!("{}:{}", local(), free_port());
        let arguments = [
            &[
                "--etcd", &endpoint, "--group", &group, "--id", id, "--listen", &listen,
            ],
            &["--etcd-ca", ca_file.to_str().unwrap(), "--etcd-user", id][..],
            more,
        ];
        Program::start_with("worker", &arguments.concat(), variables)
    };
    let file = files.write("w1", "password of w1\n");
    let _first = start("w1", &["--etcd-password-file", file.to_str().unwrap()], &[]);
    let identity = [
        "--etcd-cert",
        client_cert.to_str().unwrap(),
        "--etcd-key",
        client_key.to_str().unwrap(),
    ];
    let _second = start("w2", &identity, &[("ETCD_PASSWORD", "password of w2")]);

    let password_file = files.write("balancer", "password of balancer\n");
    let for_its_user = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&password_file, for_its_user).unwrap();
    let in_environment = [("BALANCER", "password of balancer")];
    for (field, value, variables) in [
        ("password_env", "BALANCER", &in_environment[..]),
        ("password_file", password_file.to_str().unwrap(), &[]),
    ] {
        let (file, url) = adapted("load_balancer.yaml", &endpoint, &group);
        let text = std::fs::read_to_string(&file).unwrap();
        let fields = [
            (
                "\n      ca_file: null".to_owned(),
                format!("\n      ca_file: {}", ca_file.display()),
            ),
            (
                "\n    user: null".to_owned(),
                "\n    user: balancer".to_owned(),
            ),
            (
                format!("\n    {field}: null"),
                format!("\n    {field}: {value}"),
            ),
        ];
        let text = fields.iter().fold(text, |text, (from, to)| {
            assert_eq!(text.matches(from.as_str()).count(), 1, "{from}");
            text.replace(from.as_str(), to)
        });
        std::fs::write(&file, text).unwrap();
        let _balancer = Program::start_with(
            "load_balancer",
            &["--conf", file.to_str().unwrap()],
            variables,
        );
        until_it_answers(&url).await;
        until_nodes_answer(&url, 2).await;
    }
}
