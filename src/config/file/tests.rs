use super::super::cluster::ClusterConfig;
#[cfg(feature = "pingora")]
use super::super::server::server_conf;
use super::super::values::HashOn;
use super::*;
use crate::balance::Policy;
use crate::store::{Credentials, EtcdOptions, Password};

const MINIMAL: &str = "
version: 1
threads: 2
cluster:
  etcd:
    endpoints: ['memory://x']
  group: workers
";

fn error(text: &str) -> String {
    ClusterConfig::from_yaml(text, "file.yaml")
        .unwrap_err()
        .to_string()
}

#[test]
fn fields_left_out_have_their_defaults() {
    let config = ClusterConfig::from_yaml(MINIMAL, "file.yaml").unwrap();
    assert_eq!(config.policy, Policy::Adaptive);
    assert_eq!(config.retries, 2);
    assert_eq!(
        config.etcd,
        EtcdOptions::new(["memory://x"]),
        "the defaults are written down twice"
    );
}

#[test]
fn unknown_fields_are_named_with_their_line() {
    for (at, line) in [
        ("  group: workers\n", 8),
        ("    endpoints: ['memory://x']\n", 7),
    ] {
        let indent = &at[..at.len() - at.trim_start().len()];
        let text = MINIMAL.replace(at, &format!("{at}{indent}grop: 1\n"));
        let error = error(&text);
        assert!(error.contains("grop"), "{error}");
        assert!(error.contains(&format!("line {line}")), "{line}: {error}");
        assert!(error.starts_with("file.yaml: "), "{error}");
    }
    let text = format!("{MINIMAL}  headroom: {{ cpu: 1, mem: 1 }}\n");
    assert!(error(&text).contains("mem"), "{}", error(&text));
}

#[test]
fn wrong_values_are_named() {
    for (field, named) in [
        ("policy: fastest", "fastest"),
        ("headroom: { cpu: -1 }", "cluster.headroom.cpu"),
        ("headroom: { cpu: much }", "cluster.headroom.cpu"),
        ("headroom: 7", "cluster.headroom"),
        ("headroom: { cpu: }", "cluster.headroom.cpu"),
        (
            "timeouts: { connect_ms: soon }",
            "cluster.timeouts.connect_ms",
        ),
        (
            "timeouts: { connect_ms: -1 }",
            "cluster.timeouts.connect_ms",
        ),
        ("clients: { headers: 1.5 }", "cluster.clients.headers"),
        (
            "routes: [{ name: a, hosts: [b] }, { name: c, hosts: 7 }]",
            "cluster.routes[1].hosts",
        ),
        (
            "groups: { orders: { retries: many } }",
            "cluster.groups.orders.retries",
        ),
        ("candidates: 99", "cluster.candidates"),
        (
            "adaptive: { metrics_gain: 2 }",
            "cluster.adaptive.metrics_gain",
        ),
        ("adaptive: { gain: 2 }", "invalid cluster.adaptive"),
        (
            "consistent: { balance_factor: 1 }",
            "cluster.consistent.balance_factor",
        ),
        ("zones: { spare: 0 }", "cluster.zones.spare"),
        ("zone: a\n  zone_of: n1", "cluster.zone_of"),
        ("zone: ''", "cluster.zone"),
        ("default_port: 0", "cluster.default_port"),
        ("retries: 3", "cluster.retries"),
        ("listen: nowhere", "cluster.listen"),
        (
            "health_check: { kind: tcp, status: [204] }",
            "health_check.status",
        ),
        ("health_check: { kind: tcp, host: a }", "health_check.host"),
        ("leader_wait_ms: 1000000", "cluster.leader_wait_ms"),
        ("hash_on: colour", "colour"),
        ("filter: { zone: a }", "zone"),
        (
            "allowed_networks: ['10.0.0.0/99']",
            "cluster.allowed_networks",
        ),
        ("allowed_ports: [80, 0]", "cluster.allowed_ports"),
        ("allowed_ports: ['9-8']", "cluster.allowed_ports"),
        ("limits: { depth: 1000 }", "cluster.limits.depth"),
        (
            "self_preservation: { part: 0 }",
            "cluster.self_preservation.part",
        ),
        (
            "snapshot: { file: /nowhere/at/all }",
            "cluster.snapshot.file",
        ),
        (
            "snapshot: { file: nodes, max_age_ms: 1 }",
            "cluster.snapshot.max_age_ms",
        ),
        ("snapshot: {}", "invalid cluster.snapshot"),
        (
            "sticky_cookie: node\n  groups: { a: { sticky_cookie: own }, b: { sticky_cookie: node } }",
            "cluster.groups.b.sticky_cookie",
        ),
        (
            "groups: { a: { sticky_cookie: own }, b: { sticky_cookie: own } }",
            "cluster.groups.b.sticky_cookie",
        ),
        (
            "backends: { protocol: https, server_name: my_app.service.consul }",
            "cluster.backends.server_name",
        ),
        ("publish_interval_ms: 10001", "cluster.publish_interval_ms"),
        (
            "registry: { format: kratos, prefix: /x }",
            "cluster.registry.prefix",
        ),
        (
            "registry: { format: kratos }\n  leader: { writes: true }",
            "cluster.leader.writes",
        ),
        (
            "registry: { format: kratos, scheme: https }",
            "cluster.backends.server_name",
        ),
        (
            "further_registries: [{ format: native }]",
            "cluster.further_registries[0].format",
        ),
        (
            "further_registries: [{ format: grpc }, { format: go-zero }]",
            "cluster.further_registries[1].prefix",
        ),
        ("name_servers: [localhost]", "cluster.name_servers"),
        (
            "load_report_metrics: { queue_depth: '' }",
            "cluster.load_report_metrics.queue_depth",
        ),
        ("load_report_format: xml", "xml"),
        ("hash_on: 'header:not valid'", "not valid"),
    ] {
        let error = error(&format!("{MINIMAL}  {field}\n"));
        assert!(error.contains(named), "{field}: {error}");
    }
    let error = error(&MINIMAL.replace("memory://x", "ftp://x"));
    assert!(error.contains("ftp://x"), "{error}");
    let slow = MINIMAL.replace("  group", "    keep_alive_interval_ms: 1\n  group");
    let shown = self::error(&slow);
    assert!(
        shown.contains("cluster.etcd.keep_alive_interval_ms"),
        "{shown}"
    );
    for field in ["silence_timeout_ms", "breaker_pause_ms", "breaker_failures"] {
        let wrong = MINIMAL.replace("  group", &format!("    {field}: 0\n  group"));
        let shown = self::error(&wrong);
        assert!(shown.contains(&format!("cluster.etcd.{field}")), "{shown}");
    }
    assert!(self::error("cluster:\n  group: g\n").contains("etcd"));
    assert!(self::error("version: 1\n").contains("cluster"));
    assert!(self::error(": : :").contains("file.yaml"));
}

#[test]
fn tls_and_user() {
    let with = |fields: &str| {
        let text = MINIMAL.replace("  group", &format!("    {fields}\n  group"));
        ClusterConfig::from_yaml(&text, "file.yaml")
    };
    let config = with("user: u\n    password: 'hunter2'").unwrap();
    let options = &config.etcd;
    let expected = Credentials::new("u", Password::Text("hunter2".to_owned()));
    assert_eq!(options.credentials, Some(expected));
    assert!(!format!("{config:?} {options:?}").contains("hunter2"));
    // The fields as the configuration files in `config` show them.
    let nothing = "tls: { ca_file: null, cert_file: null, key_file: null, server_name: null }
    user: null
    password: null
    password_file: null
    password_env: null";
    let config = with(nothing).unwrap();
    assert_eq!(config.etcd, EtcdOptions::new(["memory://x"]));

    for (fields, named) in [
        ("user: u", "cluster.etcd.user"),
        ("password: hunter2", "cluster.etcd.user"),
        (
            "user: u\n    password: hunter2\n    password_env: HOME",
            "cluster.etcd.user",
        ),
        ("user: ''\n    password: hunter2", "cluster.etcd.user"),
        ("user: u\n    password: ''", "cluster.etcd.password"),
        (
            "user: u\n    password_file: /no/such/file",
            "cluster.etcd.password_file: /no/such/file",
        ),
        (
            "user: u\n    password_env: PINGORA_ETCD_NO_SUCH",
            "cluster.etcd.password_env",
        ),
        ("user: u\n    password: [hunter2]", "password"),
        ("user: u\n    password: { hunter2: 1 }", "password"),
        ("user: u\n    password: !x hunter2\n    tlss: 1", "tlss"),
        ("password: hunter2\n    user: [", "file.yaml"),
        ("password: 'hunter2\n    user: u", "file.yaml"),
        ("password: !!int hunter2\n    user: u", "file.yaml"),
        ("tls: { ca: x }", "ca_file"),
        ("tls: { ca_file: /no/such }", "cluster.etcd.tls"),
        ("tls: { cert_file: /no/such }", "cluster.etcd.tls.key_file"),
    ] {
        let error = with(fields).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(named), "{fields}: {shown}");
        assert!(!shown.contains("hunter2"), "{fields}: {shown}");
    }
    // A number is not a text.
    let shown = with("user: u\n    password: 20261124").map_err(|error| error.to_string());
    match shown {
        Ok(config) => assert!(!format!("{config:?}").contains("20261124")),
        Err(shown) => assert!(!shown.contains("20261124"), "{shown}"),
    }
}

#[test]
fn a_password_in_an_endpoint_is_not_repeated() {
    for (endpoints, named) in [
        ("['http://root:s3cret@h:1']", "http://...@h:1"),
        ("['http://root:p@s3cret@h:1', 1]", "file.yaml"),
        ("[root:s3cret@h]", "...@h"),
        ("http://root:s3cret@h:1", "line 6"),
        ("{ 'http://root:s3cret@h:1': 1 }", "line 6"),
        ("[['http://root:s3cret@h:1']]", "line 6"),
        ("['http://root:s3cret@h:1'", "file.yaml"),
        ("['http://root:s3cret@h:1]", "file.yaml"),
        ("[]\n    'http://root:s3cret@h:1': 1", "line 7"),
        ("['http://root:s3cret@h:1']\n    colour: red", "colour"),
        ("['http://root:s3cret@h:1']\n    tls: 1", "line 7"),
    ] {
        let text = MINIMAL.replace("['memory://x']", endpoints);
        let error = ClusterConfig::from_yaml(&text, "file.yaml").unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(named), "{endpoints}: {shown}");
        assert!(!shown.contains("s3cret"), "{endpoints}: {shown}");
        #[cfg(feature = "pingora")]
        if let Err(error) = server_conf(&text.replace("threads", "thread"), "file.yaml") {
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("s3cret"), "{endpoints}: {shown}");
        }
    }
    let file: File =
        serde_saphyr::from_str(&MINIMAL.replace("memory://x", "http://u:s3cret@h:1")).unwrap();
    assert!(!format!("{:?}", file.cluster).contains("s3cret"));
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    for (etcd, named) in [
        ("user: u, password:s3cret", "this is no field"),
        ("user: u, password=s3cret", "this is no field"),
        ("user: u, Password: s3cret", "`Password`"),
        ("user: u, passwd: s3cret", "`passwd`"),
        ("user: u, password: s3cret, colour: red", "`colour`"),
        ("user: a#b, passwd: s3cret", "`passwd`"),
        ("user: u, password: [s3cret]", "cluster.etcd.password"),
    ] {
        let endpoints = format!("endpoints: ['memory://x'], {etcd}");
        let text = format!("cluster:\n  group: a\n  etcd: {{ {endpoints} }}\n");
        let shown = error(&text);
        assert!(shown.contains(named), "{etcd}: {shown}");
        assert!(!shown.contains("s3cret"), "{etcd}: {shown}");
    }
    let text = MINIMAL.replace("  group", "    user: u\n    password: x${s3cret!}\n  group");
    let shown = error(&text);
    assert!(shown.contains("between ${ and } is no name"), "{shown}");
    assert!(!shown.contains("s3cret"), "{shown}");
    // In quotes it is no variable.
    let text = MINIMAL.replace("  group", "    user: u\n    password: '${A}'\n  group");
    let shown = error(&text);
    assert!(
        shown.contains("cluster.etcd.password") && shown.contains("without quotes"),
        "{shown}"
    );
    // Values of variables may be secret wherever they stand.
    for value in ["\n    ${CARGO_PKG_NAME}", "&a ${CARGO_PKG_NAME}"] {
        let shown = error(&format!("{MINIMAL}  listen: {value}\n"));
        assert!(shown.contains("cluster.listen"), "{shown}");
        assert!(!shown.contains(env!("CARGO_PKG_NAME")), "{shown}");
    }
    // What is in a header may be one, too.
    for headers in [
        "{ authorization: \"s3cret\" }",
        "{ x-api-key: s3cret }",
        "{ x-auth: 'Bearer s3cret' }",
        "{ cookie: session=s3cret }",
    ] {
        let check = format!("{MINIMAL}  health_check: {{ headers: {headers} }}\n  colour: red\n");
        let shown = error(&check);
        assert!(shown.contains("`colour`"), "{shown}");
        assert!(!shown.contains("s3cret"), "{headers}: {shown}");
    }
    // Their names are none, nor is that of a cookie.
    let shown = error(&format!("{MINIMAL}  sticky_cookie: node\n  colour: red\n"));
    assert!(shown.contains("sticky_cookie: node"), "{shown}");
    // One that is used says nothing about others.
    for (field, named) in [
        ("policy: fastest", "invalid cluster.policy"),
        ("colour: red", "these are known"),
        ("hash_on: 'header:not valid'", "invalid cluster.hash_on"),
    ] {
        let shown = error(&format!(
            "{MINIMAL}  zone: ${{CARGO_PKG_NAME}}\n  {field}\n"
        ));
        assert!(shown.contains(named), "{field}: {shown}");
        assert!(!shown.contains("interpolated"), "{field}: {shown}");
    }
}

#[test]
fn key_prefix() {
    let with = |prefix: &str| {
        let text = MINIMAL.replace("  group", &format!("    key_prefix: '{prefix}'\n  group"));
        ClusterConfig::from_yaml(&text, "file.yaml")
    };
    let options = with("prod").unwrap().etcd;
    assert_eq!(options.prefix(), "prod/");
    for wrong in [" ", "prod//"] {
        let error = with(wrong).unwrap_err().to_string();
        assert!(error.contains("cluster.etcd.key_prefix"), "{error}");
    }
}

#[test]
fn hash_on() {
    let text = format!("{MINIMAL}  policy: consistent\n  hash_on: header:X-User\n");
    let config = ClusterConfig::from_yaml(&text, "file.yaml").unwrap();
    let header = http::HeaderName::from_static("x-user");
    assert_eq!(config.hash_on, HashOn::Header(header));
}

#[cfg(feature = "pingora")]
#[test]
fn the_part_of_pingora_is_strict_too() {
    let conf = server_conf(MINIMAL, "file.yaml").unwrap();
    assert_eq!(
        (conf.threads, conf.upstream_keepalive_pool_size),
        (2, 4_096)
    );
    let own = format!("upstream_keepalive_pool_size: 7\n{MINIMAL}");
    let conf = server_conf(&own, "file.yaml").unwrap();
    assert_eq!(conf.upstream_keepalive_pool_size, 7);
    // One thread has nobody to share its work with; what the file says holds.
    for (threads, says, shares) in [
        ("2", "", true),
        ("1", "", false),
        ("1", "work_stealing: true\n", true),
        ("2", "work_stealing: false\n", false),
    ] {
        let text = MINIMAL.replace("threads: 2", &format!("threads: {threads}"));
        let conf = server_conf(&format!("{says}{text}"), "file.yaml").unwrap();
        assert_eq!(conf.threads.to_string(), threads);
        assert_eq!(conf.work_stealing, shares, "{threads} {says}");
    }
    let error = server_conf(
        &format!("runtime_enable_alt_timer: true\n{MINIMAL}"),
        "file.yaml",
    );
    assert!(error.unwrap_err().to_string().contains("has no effect"));
    let text = MINIMAL.replace("threads", "thread");
    let error = server_conf(&text, "file.yaml").unwrap_err().to_string();
    assert!(
        error.contains("line 3") && error.contains("\"thread\""),
        "{error}"
    );
    for (wrong, named) in [
        ("threads: many", "line 3"),
        ("threads: many", "invalid threads"),
        ("threads: 0", "line 3: threads: 0 is out of range"),
        (
            "threads: 100000000",
            "threads: 100000000 is out of range, 1 to 1024",
        ),
        ("threads: 2\nuser: a", "line 4: user"),
        (
            "max_retries: 15",
            "max_retries: 15 is out of range, 16 to 1024",
        ),
        (
            "upstream_connect_offload_threadpools: 2",
            "upstream_connect_offload_threadpools: has no effect without upstream_connect_offload_thread_per_pool",
        ),
        (
            "upstream_connect_offload_thread_per_pool: 0",
            "upstream_connect_offload_thread_per_pool: 0 is out of range",
        ),
        ("listener_tasks_per_fd: 0", "listener_tasks_per_fd"),
    ] {
        let text = MINIMAL.replace("threads: 2", wrong);
        let error = server_conf(&text, "file.yaml").unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn errors_say_what_is_expected() {
    for (field, said) in [
        (
            "timeouts: { connect_ms: soon }",
            "invalid cluster.timeouts.connect_ms: line 8 column 27: a whole number, 0 or more, is expected",
        ),
        (
            "default_port: 70000",
            "a whole number from 0 to 65535 is expected",
        ),
        ("headroom: { cpu: }", "a number is expected"),
        ("load_reports: perhaps", "true or false is expected"),
        ("headroom: 7", "fields and their values are expected"),
        ("allowed_ports: 80", "a list is expected"),
        (
            "allowed_ports: [-1]",
            "a port such as 8080 or a range such as 9000-9100 is expected",
        ),
        (
            "health_check: { kind: http, status: [1.5] }",
            "a status such as 200 or a range such as 200-299 is expected",
        ),
        ("group: [a]", "one value is expected"),
        (
            "headroom: { mem: 1 }",
            "there is no field `mem` here; these are known: cpu, ",
        ),
        ("snapshot: {}", "the field `file` is missing"),
        (
            "policy: fastest",
            "`fastest` is unknown; these are known: round_robin, ",
        ),
        (
            "zone: ${NO_SUCH_VARIABLE}",
            "the environment variable NO_SUCH_VARIABLE is not set",
        ),
        ("zone: a\n  zone: b", "the field `zone` is given twice"),
    ] {
        let text = format!("{MINIMAL}  {field}\n").replace(
            "  group: workers\n",
            if field.starts_with("group") {
                ""
            } else {
                "  group: workers\n"
            },
        );
        let error = error(&text);
        assert!(error.contains(said), "{field}: {error}");
        assert!(error.contains("\n --> file.yaml:"), "{error}");
        // Of a variable, it is not known in which field it stands.
        let is_nowhere = !error.contains("invalid cluster");
        assert_eq!(is_nowhere, field.contains("${"), "{error}");
        assert!(!error.contains('?'), "{error}");
    }
}

#[test]
fn errors_are_for_those_who_write_files() {
    let twice = MINIMAL.replace("  group: workers\n", "  group: workers\n  group: others\n");
    let nothing = MINIMAL.replace("group: workers", "group: null");
    let several = format!("{MINIMAL}---\n{MINIMAL}");
    for text in [twice, nothing, several] {
        let error = error(&text);
        for word in ["Option", "Policy", "from_", "::"] {
            assert!(!error.contains(word), "{error}");
        }
    }
}

#[test]
fn the_shipped_routes_are_read_and_an_error_in_them_names_its_line() {
    let text = include_str!("../../../config/routes.yaml");
    let config = ClusterConfig::from_yaml(text, "routes.yaml").unwrap();
    assert_eq!(config.routes.len(), 6);
    let canary = config.of_group("canary").unwrap();
    assert_eq!((&*canary.group, canary.retries), ("api", 1));
    let api = config.of_group("api").unwrap();
    assert_eq!(api.timeouts.response_ms, 2_000);
    assert_eq!(api.retry.on_status, [502, 503, 504]);
    assert!(config.of_group("orders").unwrap().leader.writes);
    assert_eq!(config.of_group("default").unwrap().group, "web");
    assert!(config.of_group("unknown").is_none());

    let line = |part: &str| 1 + text.lines().position(|line| line.contains(part)).unwrap();
    let route = line("- name: canary-by-header");
    for (from, to, field, at) in [
        (
            "group: canary\n      rew",
            "group: canry\n      rew",
            "cluster.routes[3].group",
            route + 4,
        ),
        (
            "x-canary: \"*\"",
            "'x canary': y",
            "cluster.routes[3].headers",
            route + 2,
        ),
        (
            "path: /healthz\n      answer",
            "path: healthz\n      answer",
            "cluster.routes[0].path",
            line("- name: health") + 1,
        ),
        (
            "path: /healthz\n      answer",
            "path: /\n      answer",
            "cluster.routes[3]",
            route,
        ),
        (
            "retries: 0",
            "retries: 9",
            "cluster.routes[5].retries",
            line("retries: 0"),
        ),
        (
            "max_in_flight: 500",
            "queue_timeout_ms: 0",
            "cluster.groups.orders.overload",
            line("max_in_flight"),
        ),
        (
            "    orders:\n      health",
            "    default:\n      health",
            "cluster.groups.default",
            line("    orders:"),
        ),
        (
            "    orders:\n      health",
            "    web:\n      health",
            "cluster.groups.web",
            line("    orders:"),
        ),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        let error = error(&changed);
        assert!(
            error.contains(field) && error.contains(&format!("line {at}:")),
            "{field} {at}: {error}"
        );
    }
    // Where the structure itself is wrong, the parser says so.
    let error = error(&text.replace("status: 301", "sttus: 301"));
    assert!(error.contains("sttus") && error.contains("line"), "{error}");
}

#[test]
fn values_without_quotes_may_be_environment_variables() {
    // Cargo sets these for its tests.
    let text = "cluster:\n  etcd: { endpoints: [http://a:1] }\n  group: ${CARGO_PKG_NAME}\n  \
                retries: ${CARGO_PKG_VERSION_MAJOR}\n  zone: ${CARGO_PKG_NAME}\n  \
                sticky_cookie: ${PINGORA_ETCD_UNSET:-other}\n";
    let config = ClusterConfig::from_yaml(text, "file.yaml").unwrap();
    assert_eq!((&*config.group, config.retries), ("pingora-etcd", 0));
    assert_eq!(config.zone.as_deref(), Some("pingora-etcd"));
    assert_eq!(config.sticky_cookie.as_deref(), Some("other"));

    let missing = error(&text.replace(
        "${CARGO_PKG_NAME}\n  retries",
        "${PINGORA_ETCD_UNSET}\n  retries",
    ));
    assert!(
        missing.contains("PINGORA_ETCD_UNSET") && missing.contains("line 3"),
        "{missing}"
    );
    for (value, quoted) in [
        ("http://a:1", "'http://${CARGO_PKG_NAME}:1'"),
        ("zone: ${CARGO_PKG_NAME}", "zone: '${CARGO_PKG_NAME}'"),
    ] {
        let quoted = error(&text.replace(value, quoted));
        assert!(quoted.contains("without quotes"), "{quoted}");
    }
    // What is wrong with a value is said without the value.
    let wrong = error(&text.replace("${CARGO_PKG_VERSION_MAJOR}", "${CARGO_MANIFEST_DIR}"));
    let secret = std::env::var("CARGO_MANIFEST_DIR").unwrap();
    assert!(
        !wrong.contains(&secret) && wrong.contains("CARGO_MANIFEST_DIR"),
        "{wrong}"
    );
}

#[test]
fn a_group_in_another_registry_has_a_prefix_of_its_own_and_no_leader() {
    let text = format!(
        "{MINIMAL}  registry: {{ format: kratos, prefix: /m/workers/ }}
  further_registries: [{{ format: go-zero }}]
  groups:
    orders: {{}}
    native: {{ registry: {{ format: native }} }}
"
    );
    let config = ClusterConfig::from_yaml(&text, "file.yaml").unwrap();
    let orders = config.of_group("orders").unwrap();
    assert_eq!(orders.registry.format, config.registry.format);
    assert_eq!(
        orders.registry.prefix, None,
        "two groups are never the same nodes"
    );
    assert!(orders.further_registries.is_empty());
    for (to, is_refused) in [("orders", true), ("native", false)] {
        let routed = format!("{text}  routes: [{{ group: {to}, leader: true }}]\n");
        let result = ClusterConfig::from_yaml(&routed, "file.yaml");
        assert_eq!(result.is_err(), is_refused, "{to}");
        if let Err(error) = result {
            assert!(
                error.to_string().contains("cluster.routes[0].leader"),
                "{error}"
            );
        }
    }
}

#[cfg(feature = "admin")]
#[test]
fn two_listeners_cannot_have_one_port() {
    for (listen, admin, is_taken) in [
        ("127.0.0.1:6189", "127.0.0.1:6189", true),
        ("0.0.0.0:6189", "127.0.0.1:6189", true),
        ("127.0.0.1:6189", "[::]:6189", true),
        ("127.0.0.1:6189", "127.0.0.2:6189", false),
        ("0.0.0.0:6189", "[::1]:6189", false),
        ("127.0.0.1:6188", "127.0.0.1:6189", false),
    ] {
        let text = format!(
            "{MINIMAL}  listen: '{listen}'\n  admin: {{ listen: '{admin}', public: true }}\n"
        );
        let read = ClusterConfig::from_yaml(&text, "file.yaml");
        assert_eq!(read.is_err(), is_taken, "{listen} {admin}: {read:?}");
        if let Err(error) = read {
            assert!(
                error.to_string().contains("cluster.admin.listen"),
                "{error}"
            );
        }
    }
}
