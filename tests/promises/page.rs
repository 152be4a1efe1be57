//! Tests of the live page with a real browser, and of the metrics with a real Prometheus.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};

use super::common::certificates::{Authority, Directory};
use super::common::etcd::Etcd;
use super::common::programs::{COMMAND, Program, is_installed};
use super::common::{free_port, group, local};
use super::raw::{Raw, RawBackend, status};
use super::tls::certificates;
use super::world::{
    Backend, Balancer, Log, Setup, Worker, delete, entry, put, scratch, until, until_registered,
};

const SECOND: Duration = Duration::from_secs(1);

/// A browser that has the page open.
struct Browser {
    client: Client,
    _driver: Program,
    profile: PathBuf,
}

impl Browser {
    async fn open(url: &str) -> Self {
        let port = free_port();
        let mut driver = Command::new("chromedriver");
        driver.arg(format!("--port={port}"));
        driver.stdout(Stdio::null()).stderr(Stdio::null());
        let driver = Program::spawn(&mut driver);
        let profile = scratch(&format!("browser-{port}"));
        let arguments = [
            "--headless=new".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--window-size=1500,1000".to_owned(),
            format!("--user-data-dir={}", profile.display()),
        ];
        let options = json!({ "goog:chromeOptions": { "args": arguments } });
        let address = format!("http://{}:{port}", local());
        let start = Instant::now();
        let client = loop {
            let mut builder = ClientBuilder::new(HttpConnector::new());
            builder.capabilities(options.as_object().unwrap().clone());
            match builder.connect(&address).await {
                Ok(client) => break client,
                Err(error) => assert!(start.elapsed() < 30 * SECOND, "no browser: {error}"),
            }
            tokio::time::sleep(SECOND / 10).await;
        };
        client.goto(url).await.unwrap();
        Self {
            client,
            _driver: driver,
            profile,
        }
    }

    async fn run(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.unwrap()
    }

    /// What stands in the cell of a node, below a title.
    async fn cell(&self, node: &str, title: &str) -> String {
        let script = format!(
            "const titles = [...document.querySelectorAll('th')].map((head) => head.textContent);
             const row = document.querySelector('tr[data-node=\"{node}\"]');
             return row ? row.children[titles.indexOf('{title}')].textContent : 'no row';"
        );
        self.run(&script)
            .await
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    async fn nodes(&self) -> Vec<String> {
        let script =
            "return [...document.querySelectorAll('tr[data-node]')].map((row) => row.dataset.node)";
        serde_json::from_value(self.run(script).await).unwrap()
    }

    async fn text(&self, selector: &str) -> String {
        let script =
            format!("return document.querySelector('{selector}')?.innerText ?? 'not there'");
        self.run(&script)
            .await
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Keeps a picture of what is shown, for people.
    async fn picture(&self, name: &str) {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
        std::fs::create_dir_all(&folder).unwrap();
        let picture = self.client.screenshot().await.unwrap();
        std::fs::write(folder.join(format!("{name}.png")), picture).unwrap();
    }

    async fn close(self) {
        self.client.close().await.unwrap();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

/// A balancer with a page, and the address of the page.
async fn with_page(setup: Setup) -> (Balancer, String) {
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!("admin: {{ listen: '{listen}' }}");
    let balancer = setup.with(&fields).serving().await;
    (balancer, format!("http://{listen}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_nodes_load_events_and_that_etcd_is_away() {
    if !is_installed("chromium") || !is_installed("chromedriver") {
        return;
    }
    let (etcd, group) = (Etcd::own(), group("page"));
    let mut keys = etcd.raw_client().await;
    let [a, b, c] = [
        Backend::start("a").await,
        Backend::start("b").await,
        Backend::start("c").await,
    ];
    for backend in [&a, &b, &c] {
        let more = json!({ "zone": "z1", "metadata": { "cpu_usage_percent": 12.5 } });
        put(&mut keys, &group, &backend.entry(more), None).await;
    }
    let setup = Setup::new(etcd.endpoints(), &group).with("policy: round_robin");
    let (balancer, url) = with_page(setup).await;
    balancer.until_served_by(&["a", "b", "c"]).await;
    let browser = Browser::open(&url).await;
    until("three nodes are shown", async || {
        browser.nodes().await == ["a", "b", "c"]
    })
    .await;
    assert_eq!(browser.cell("a", "CPU %").await, "12.5");
    assert_eq!(browser.cell("a", "State").await, "serving");
    assert_eq!(browser.cell("a", "Zone").await, "z1");
    browser.picture("nodes").await;

    // Load moves the rates, the shares and the history.
    let number = |text: &str| text.trim_end_matches(" %").parse::<f64>().unwrap_or(0.0);
    until("load is shown", async || {
        balancer.gets(30).await;
        let rate = number(&browser.cell("a", "Requests/s").await);
        let share = number(&browser.cell("a", "Share of traffic").await);
        rate > 1.0 && (share - 100.0 / 3.0).abs() < 5.0
    })
    .await;
    let points = "return document.querySelector('tr[data-node=a] polyline').getAttribute('points')";
    let points = browser.run(points).await.as_str().unwrap().to_owned();
    assert!(points.split(' ').count() >= 2, "{points}");
    assert!(number(&browser.cell("a", "p50 ms").await) > 0.0);
    browser.picture("load").await;
    // Then all of it goes to one.
    for backend in [&b, &c] {
        put(
            &mut keys,
            &group,
            &backend.entry(json!({ "weight": 0 })),
            None,
        )
        .await;
    }
    until("the share has moved", async || {
        balancer.gets(30).await;
        number(&browser.cell("a", "Share of traffic").await) > 90.0
    })
    .await;
    assert_eq!(browser.cell("b", "State").await, "unused");

    // One that drains, and one that leaves, with its event.
    put(
        &mut keys,
        &group,
        &b.entry(json!({ "state": "draining" })),
        None,
    )
    .await;
    until("it drains", async || {
        browser.cell("b", "State").await == "draining"
    })
    .await;
    delete(&mut keys, &group, "c").await;
    until("it is gone", async || browser.nodes().await == ["a", "b"]).await;
    until("its event is shown", async || {
        browser.text("#events").await.contains("node c left")
    })
    .await;
    browser.picture("left").await;

    // Without etcd.
    assert_eq!(browser.text("#banner").await, "");
    etcd.stop();
    until("that is said", async || {
        browser.text("#banner").await.contains("etcd is away")
    })
    .await;
    browser.picture("away").await;
    etcd.start();
    until("it is back", async || {
        browser.text("#banner").await.is_empty()
    })
    .await;

    // A process that is gone.
    drop(balancer);
    until("that is said, too", async || {
        browser.text("#banner").await.contains("does not answer")
    })
    .await;
    browser.picture("gone").await;
    browser.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_who_leads_and_can_be_used_by_keyboard_only_with_a_thousand_nodes() {
    if !is_installed("chromium") || !is_installed("chromedriver") {
        return;
    }
    let (etcd, group) = (Etcd::shared(), group("thousand"));
    let mut keys = etcd.raw_client().await;
    let lease = keys.lease_grant(600, None).await.unwrap().id();
    for index in 0..1_000_u16 {
        let id = format!("n{index:04}");
        let zone = if index % 2 == 0 { "even" } else { "odd" };
        let entry = entry(&id, Some(1_000 + index), json!({ "zone": zone }));
        put(&mut keys, &group, &entry, (index == 7).then_some(lease)).await;
    }
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!("admin: {{ listen: '{listen}' }}");
    let balancer = Setup::shared(&group).with(&fields).listening().await;
    let browser = Browser::open(&format!("http://{listen}")).await;
    until("all are counted", async || {
        browser.text(".tools span").await == "1000 nodes"
    })
    .await;
    let candidacy = format!("election/{group}/{lease:x}");
    let options = etcd_client::PutOptions::new().with_lease(lease);
    keys.put(candidacy, "n0007", Some(options)).await.unwrap();
    until("the leader has a crown", async || {
        browser.cell("n0007", "Node").await == "♛ n0007"
    })
    .await;
    // Only rows that can be seen are drawn.
    assert!(browser.nodes().await.len() < 100);

    // By keyboard: to the filter, and to the head of a column.
    browser.run("document.activeElement.blur()").await;
    let focused = async || {
        let script =
            "const now = document.activeElement; return now.placeholder || now.textContent";
        browser
            .run(script)
            .await
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let keys_to = async |text: &str| {
        let active = browser.client.active_element().await.unwrap();
        active.send_keys(text).await.unwrap();
    };
    let mut tabs = 0;
    while focused().await != "Filter nodes" {
        keys_to(&char::from(Key::Tab).to_string()).await;
        tabs += 1;
        assert!(
            tabs < 10,
            "the filter cannot be reached: {}",
            focused().await
        );
    }
    keys_to("odd").await;
    until("they are filtered", async || {
        browser.text(".tools span").await == "500 of 1000 nodes"
    })
    .await;
    while focused().await != "Node" {
        keys_to(&char::from(Key::Tab).to_string()).await;
        tabs += 1;
        assert!(tabs < 20, "the head of the column cannot be reached");
    }
    keys_to(&char::from(Key::Enter).to_string()).await;
    until("they are sorted", async || {
        browser.nodes().await.first().map(String::as_str) == Some("n0999")
    })
    .await;
    let sorted = "return document.querySelector('th').getAttribute('aria-sort')";
    assert_eq!(browser.run(sorted).await, "descending");
    browser.picture("thousand").await;

    // Each update takes less than 100 ms, in the median of ten.
    let mut frames = Vec::new();
    until("ten updates", async || {
        let frame = browser.run("return document.body.dataset.frame").await;
        let frame: Option<f64> = frame.as_str().and_then(|frame| frame.parse().ok());
        if let Some(frame) = frame.filter(|frame| frames.last() != Some(frame)) {
            frames.push(frame);
        }
        frames.len() >= 10
    })
    .await;
    frames.sort_by(f64::total_cmp);
    println!("an update of 1,000 nodes takes {frames:?} ms");
    assert!(frames[frames.len() / 2] < 100.0, "{frames:?}");

    // On a phone, and in the dark.
    browser.client.set_window_size(500, 900).await.unwrap();
    let wide =
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth";
    until("it fits a phone", async || browser.run(wide).await == true).await;
    browser.picture("phone").await;
    let input = browser
        .client
        .find(Locator::Css("main input"))
        .await
        .unwrap();
    assert!(input.attr("aria-label").await.unwrap().is_some());
    browser.close().await;
    drop(balancer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_drained_and_led_by_buttons_and_a_reload_shows_its_error() {
    if !is_installed("chromium") || !is_installed("chromedriver") {
        return;
    }
    let (etcd, group) = (Etcd::shared(), group("buttons"));
    let mut keys = etcd.raw_client().await;
    let mut workers = Vec::new();
    for id in ["w1", "w2", "w3"] {
        let endpoint = &etcd.endpoints()[0];
        workers.push(Worker::start(endpoint, &group, id, &[], Log::File));
        until_registered(&mut keys, &group, id, |_, _| true).await;
    }
    let token = scratch(&format!("{group}.token"));
    std::fs::write(&token, "the-token-of-the-page").unwrap();
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!(
        "admin: {{ listen: '{listen}', token_file: {} }}\nroutes:\n- {{ name: hello, path: /hello, answer: {{ body: hello }} }}",
        token.display()
    );
    let setup = Setup::shared(&group).program(COMMAND).with(&fields);
    let balancer = setup.serving().await;
    balancer.until_served_by(&["w1", "w2", "w3"]).await;
    let browser = Browser::open(&format!("http://{listen}")).await;
    until("the first one leads", async || {
        browser.cell("w1", "Node").await == "♛ w1"
    })
    .await;
    let on = async |selector: &str| browser.client.find(Locator::Css(selector)).await.unwrap();
    let act = async |node: &str, action: &str| {
        let row = on(&format!("tr[data-node={node}] td")).await;
        row.click().await.unwrap();
        on(".operation select")
            .await
            .select_by_value(action)
            .await
            .unwrap();
        on(".operation button").await.click().await.unwrap();
    };
    // Without the token it is refused, and says so.
    act("w2", "drain").await;
    until("it is refused", async || {
        browser.text("#done").await.contains("not the token")
    })
    .await;
    on("#token")
        .await
        .send_keys("the-token-of-the-page")
        .await
        .unwrap();
    act("w2", "drain").await;
    until("it drains", async || {
        browser.cell("w2", "State").await == "draining"
    })
    .await;
    until("it is said", async || {
        browser.text("#done").await == "Done: drain w2"
    })
    .await;
    balancer.until_served_by(&["w1", "w3"]).await;
    until("the event says who it was", async || {
        browser
            .text("#events")
            .await
            .contains("an operator: drain w2")
    })
    .await;
    browser.picture("drained").await;
    act("w2", "undrain").await;
    until("it serves", async || {
        browser.cell("w2", "State").await == "serving"
    })
    .await;

    act("w3", "transfer").await;
    until("the crown has moved", async || {
        browser.cell("w3", "Node").await == "♛ w3" && browser.cell("w1", "Node").await == "w1"
    })
    .await;
    browser.picture("crown").await;

    // Routes with their requests, and a file that is refused.
    assert_eq!(browser.text("#routes-list th").await, "hello");
    let conf = std::fs::read_to_string(&balancer.conf).unwrap();
    std::fs::write(&balancer.conf, format!("{conf}  nonsense: 1\n")).unwrap();
    on("#reload").await.click().await.unwrap();
    until("the error is shown", async || {
        let banner = browser.text("#banner").await;
        banner.contains("was refused") && banner.contains("nonsense")
    })
    .await;
    browser.picture("refused").await;
    std::fs::write(&balancer.conf, conf).unwrap();
    on("#reload").await.click().await.unwrap();
    until("the banner is cleared", async || {
        browser.text("#banner").await.is_empty()
    })
    .await;
    browser.close().await;
}

/// What the names of others lead to, and what is written by nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_shown_and_one_that_has_ended_is_pointed_at() {
    if !is_installed("chromium") || !is_installed("chromedriver") {
        return;
    }
    let (etcd, group) = (Etcd::shared(), group("certificates"));
    let backend = Backend::start("a").await;
    put(
        &mut etcd.raw_client().await,
        &group,
        &backend.entry(json!({})),
        None,
    )
    .await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let good = files.write_pair("good", &authority.server(&["good.test"]));
    let old = files.write_pair(
        "old",
        &authority.expired_server(&["old.test", "older.test"]),
    );
    let pairs = certificates(&[(&good.0, &good.1), (&old.0, &old.1)]);
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!("tls: {{ certificates: {pairs} }}\nadmin: {{ listen: '{listen}' }}");
    let setup = Setup::shared(&group).with(&fields);
    let _balancer = setup.listening().await;
    let url = format!("http://{listen}");
    until("the page is there", async || {
        reqwest::get(&url).await.is_ok()
    })
    .await;
    let browser = Browser::open(&url).await;
    until("the banner is there", async || {
        let banner = browser.text("#banner").await;
        banner.contains("The certificate of old.test, older.test") && banner.contains("has ended")
    })
    .await;
    assert!(!browser.text("#banner").await.contains("good.test"));
    let listed = browser.text("#certificates-list").await;
    assert!(
        listed.contains("good.test") && listed.contains("ends in"),
        "{listed}"
    );
    until("a round trip is shown", async || {
        browser.text("#groups").await.contains("Round trip to etcd")
    })
    .await;
    browser.picture("certificates").await;
    browser.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_for_its_own_names_and_only_reads() {
    let group = group("names");
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!("admin: {{ listen: '{listen}', hosts: [balancer.test] }}");
    let balancer = Setup::shared(&group).with(&fields).listening().await;
    let client = reqwest::Client::new();
    let page = format!("http://{listen}/");
    until("the page is there", async || {
        client.get(&page).send().await.is_ok()
    })
    .await;
    let get = async |path: &str, host: &str| {
        let request = client
            .get(format!("http://{listen}{path}"))
            .header("host", host);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    for (host, status) in [
        (&*listen, 200),
        ("localhost:1", 200),
        ("balancer.test", 200),
        ("evil.test", 421),
        ("127.0.0.1.evil.test", 421),
    ] {
        for path in ["/", "/metrics", "/api/v1/status", "/healthz"] {
            assert_eq!(get(path, host).await.0, status, "{host} {path}");
        }
    }
    // Without nodes it is not ready.
    assert_eq!(get("/readyz", &listen).await.0, 503);
    let backend = Backend::start("a").await;
    let mut keys = Etcd::shared().raw_client().await;
    put(&mut keys, &group, &backend.entry(json!({})), None).await;
    until("it is ready", async || {
        get("/readyz", &listen).await.0 == 200
    })
    .await;
    for path in ["/", "/api/v1/status", "/metrics"] {
        let post = client.post(format!("http://{listen}{path}")).send();
        assert_eq!(post.await.unwrap().status(), 405, "{path}");
    }
    drop(balancer);
    // An address that others can reach has to be meant, and one that is taken is an error.
    let taken = std::net::TcpListener::bind((local(), 0)).unwrap();
    for (listen, reason) in [
        ("0.0.0.0:6189".to_owned(), "say public: true"),
        (
            taken.local_addr().unwrap().to_string(),
            "Address already in use",
        ),
    ] {
        let fields = format!("admin: {{ listen: '{listen}' }}");
        let mut refused = Setup::shared(&group).with(&fields).start();
        assert!(!refused.program.ended().await.0.success());
        assert!(
            refused.log_text().contains(reason),
            "{}",
            refused.log_text()
        );
    }
}

/// The new process is asked for, and not the one that still has a request to serve and a page that is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_goes_over_to_a_successor_at_once() {
    let (etcd, group) = (Etcd::shared(), group("page-successor"));
    let backend = RawBackend::start_slow(8 * SECOND).await;
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let page = format!("{}:{}", local(), free_port());
    let fields = format!("admin: {{ listen: '{page}' }}");
    let setup = Setup::shared(&group).server("grace_period_seconds: 20");
    let setup = setup.with(&fields);
    let mut old = setup.listening().await;
    let started = async || {
        let answer = reqwest::get(format!("http://{page}/api/v1/status")).await;
        let text = answer.ok()?.text().await.ok()?;
        serde_json::from_str::<Value>(&text).ok()?["started_ms"].as_u64()
    };
    until("the page is there", async || started().await.is_some()).await;
    let before = started().await.unwrap();
    let events = reqwest::get(format!("http://{page}/api/v1/events")).await;
    let open_page = events.unwrap();
    let mut slow = Raw::to(&old).await;
    slow.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", async || !backend.requests().is_empty()).await;

    let new = setup.clone().listen(&old.listen).argument("--upgrade");
    let new = new.start();
    until("it is ready", async || {
        new.log_text().contains("ready to take the sockets over")
    })
    .await;
    old.program.signal("QUIT");
    until("the new one shows its page", async || {
        started().await.is_some_and(|now| now != before)
    })
    .await;
    // The old one is still there.
    assert!(old.program.child.try_wait().unwrap().is_none());
    assert_eq!(status(&slow.rest().await), "200");
    drop((open_page, new));
}

/// The value of a metric with these labels.
fn value(text: &str, name: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(name));
    let found = found.unwrap_or_else(|| panic!("{name} in {text}"));
    found.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_those_of_the_requests_and_prometheus_reads_them() {
    let (etcd, group) = (Etcd::shared(), group("metrics"));
    let mut keys = etcd.raw_client().await;
    let [a, b] = [Backend::start("a").await, Backend::start("b").await];
    put(&mut keys, &group, &a.entry(json!({})), None).await;
    let listen = format!("{}:{}", local(), free_port());
    let fields = format!(
        "policy: round_robin\nretries: 0\nadmin: {{ listen: '{listen}', metrics_nodes: 1 }}"
    );
    let balancer = Setup::shared(&group).with(&fields).serving().await;
    let scrape = async || {
        let response = reqwest::get(format!("http://{listen}/metrics"))
            .await
            .unwrap();
        response.text().await.unwrap()
    };
    let ended = |text: &str, class: &str| {
        let name = "pingora_etcd_request_duration_seconds_count";
        value(
            text,
            &format!("{name}{{group=\"{group}\",status=\"{class}\"}}"),
        )
    };
    let node = |text: &str, what: &str, node: &str| {
        value(
            text,
            &format!("pingora_etcd_node_{what}{{group=\"{group}\",node=\"{node}\"}}"),
        )
    };
    // A request is counted after the client has its response, and so is the one by which the balancer showed that it
    // serves.
    let mut before = String::new();
    until("those of the start are counted", async || {
        before = scrape().await;
        let in_flight = format!("pingora_etcd_requests_in_flight{{group=\"{group}\"}}");
        let answered = node(&before, "answered_total", "a");
        value(&before, &in_flight) == 0.0 && answered > 0.0 && answered == ended(&before, "2xx")
    })
    .await;
    balancer.gets(20).await;
    a.set_status(500);
    balancer.gets(5).await;
    until("all are counted", async || {
        let after = scrape().await;
        let more = |count: &dyn Fn(&str) -> f64| count(&after) - count(&before);
        more(&|text| ended(text, "2xx")) == 20.0
            && more(&|text| ended(text, "5xx")) == 5.0
            && more(&|text| node(text, "failed_total", "a")) == 5.0
            && more(&|text| node(text, "answered_total", "a")) == 20.0
    })
    .await;
    a.set_status(200);
    put(&mut keys, &group, &b.entry(json!({})), None).await;
    balancer.until_served_by(&["a", "b"]).await;
    // Only one has figures of its own.
    let text = scrape().await;
    assert!(
        text.contains("node=\"a\"") && !text.contains("node=\"b\""),
        "{text}"
    );
    let view = |name: &str| value(&text, &format!("pingora_etcd_{name}{{group=\"{group}\"}}"));
    assert_eq!((view("view_live"), view("view_stale_seconds")), (1.0, 0.0));
    assert_eq!(view("has_leader"), 0.0);

    rules_and_board_use_metrics_that_exist(&text);
    if !is_installed("promtool") || !is_installed("prometheus") {
        return;
    }
    check_with_promtool(&text);
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/prometheus/rules.yaml");
    let checked = Command::new("promtool")
        .args(["check", "rules"])
        .arg(rules)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let found = scraped(&listen, "sum(pingora_etcd_request_duration_seconds_count)").await;
    assert!(found >= 25.0, "{found}");
}

/// Each metric that a rule or the board names is one that a balancer has.
fn rules_and_board_use_metrics_that_exist(text: &str) {
    let names = |text: &str| -> BTreeSet<String> {
        let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let starts = text
            .match_indices("pingora_etcd_")
            .map(|(at, _)| &text[at..]);
        let names = starts.map(|rest| rest.split(|letter| !is_part(letter)).next().unwrap());
        names.map(str::to_owned).collect()
    };
    let there = names(text);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/prometheus");
    let mut used = BTreeSet::new();
    for file in ["rules.yaml", "board.json"] {
        let text = std::fs::read_to_string(folder.join(file)).unwrap();
        for name in names(&text) {
            assert!(
                there.contains(&name),
                "{file} names {name}, which does not exist"
            );
            used.insert(name);
        }
    }
    let board = std::fs::read_to_string(folder.join("board.json")).unwrap();
    serde_json::from_str::<Value>(&board).unwrap();
    assert!(used.len() > 12, "{used:?}");
}

/// The linter of Prometheus has nothing to say about names, units and help.
fn check_with_promtool(text: &str) {
    let mut checking = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = checking.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, text.as_bytes()).unwrap();
    drop(input);
    let output = checking.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
}

/// What a Prometheus that scrapes this address says to a query.
async fn scraped(target: &str, query: &str) -> f64 {
    let port = free_port();
    let (file, data) = (
        scratch(&format!("prometheus-{port}.yml")),
        scratch(&format!("prometheus-{port}")),
    );
    let config = format!(
        "global: {{ scrape_interval: 1s }}\nscrape_configs:\n- job_name: balancer\n  static_configs: [{{ targets: ['{target}'] }}]\n"
    );
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new("prometheus");
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", data.display()))
        .arg(format!("--web.listen-address={}:{port}", local()));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let prometheus = Program::spawn(&mut command);
    let url = format!("http://{}:{port}/api/v1/query?query={query}", local());
    let mut found = None;
    until("it has scraped", async || {
        let Ok(response) = reqwest::get(&url).await else {
            return false;
        };
        let text = response.text().await.unwrap_or_default();
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let value = answer["data"]["result"][0]["value"][1].as_str();
        found = value.and_then(|value| value.parse().ok());
        found.is_some()
    })
    .await;
    drop(prometheus);
    let _ = std::fs::remove_dir_all(&data);
    let _ = std::fs::remove_file(&file);
    found.unwrap()
}
