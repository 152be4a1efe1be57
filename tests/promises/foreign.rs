//! Requests by the clients of others: curl, nghttp and h2load, where they are installed.

use std::process::Stdio;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::common::certificates::{Authority, Directory};
use super::common::local;
use super::common::programs::is_installed;
use super::tls::{before, certificates};
use super::world::{Balancer, scratch};

/// A server that answers how long the body of a request was.
async fn counting() -> (u16, JoinSet<()>) {
    // More connections at once than the usual 128 may wait: the kernel would drop what asks for one, and ask again
    // after a second, which is as long as the proxy waits.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((local(), 0).into()).unwrap();
    let listener = socket.listen(1_024).unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = async |body: Bytes| body.len().to_string();
    let app = Router::new()
        .fallback(count)
        .layer(DefaultBodyLimit::disable());
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (port, serving)
}

/// Runs a program, with five bytes as its input, and returns what it printed.
async fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).kill_on_drop(true);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // A program that reads nothing may have ended.
    let _ = input.write_all(b"hello").await;
    drop(input);
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output());
    let output = output.await.expect("it ends").unwrap();
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {printed}"
    );
    printed
}

/// A balancer with and without TLS, and the file of its certificate authority.
async fn balancers(name: &str, port: u16) -> (Balancer, Balancer, Directory, String) {
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let pair = files.write_pair("server", &authority.server(&["localhost", "127.0.0.1"]));
    let ca = files.write("ca.pem", authority.pem());
    let plain = before(port, name, "").await;
    let fields = format!(
        "tls: {{ certificates: {} }}",
        certificates(&[(&pair.0, &pair.1)])
    );
    let tls = before(port, &format!("{name}-tls"), &fields).await;
    (plain, tls, files, ca.display().to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_speaks_every_version_and_sends_large_bodies() {
    if !is_installed("curl") {
        return;
    }
    let (port, _serving) = counting().await;
    let (plain, tls, _files, ca) = balancers("curl", port).await;
    let secure = format!("https://{}/", tls.listen);
    let body = scratch(&format!("{}.body", plain.group));
    std::fs::write(&body, vec![b'x'; 3 << 20]).unwrap();
    let upload = format!("@{}", body.display());
    let show = [
        "-sS",
        "-w",
        " %{http_version} %{http_code}",
        "--max-time",
        "30",
    ];
    for (version, url, more) in [
        ("1.0", &*plain.url, &["--http1.0"][..]),
        ("1.1", &plain.url, &["--http1.1"]),
        ("2", &plain.url, &["--http2-prior-knowledge"]),
        ("1.1", &secure, &["--http1.1", "--cacert", &ca]),
        ("2", &secure, &["--http2", "--cacert", &ca]),
    ] {
        for (sent, answer) in [
            (&[][..], "0"),
            (&["--data-binary", &upload], "3145728"),
            (
                &["--data-binary", &upload, "-H", "Expect: 100-continue"],
                "3145728",
            ),
            (&["-T", "-", "-X", "POST"], "5"),
        ] {
            // HTTP/1.0 has no chunks.
            if version == "1.0" && answer == "5" {
                continue;
            }
            let arguments = [&show[..], more, sent, &[url]].concat();
            let printed = run("curl", &arguments).await;
            // A server answers in the version that it speaks.
            let version = if version == "1.0" { "1.1" } else { version };
            assert_eq!(printed, format!("{answer} {version} 200"), "{arguments:?}");
        }
        let head = run("curl", &[&show[..], more, &["--head", url]].concat()).await;
        assert!(head.contains(" 200"), "{head}");
    }
    std::fs::remove_file(&body).unwrap();
    // Two requests, one connection.
    let twice = [
        &show[..],
        &[&plain.url, &plain.url, "-w", "%{num_connects} "],
    ]
    .concat();
    let printed = run("curl", &twice).await;
    assert!(
        printed.contains("1 ") && printed.contains("0 "),
        "{printed}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nghttp_and_h2load_get_all_answers_over_http2() {
    if !is_installed("nghttp") || !is_installed("h2load") {
        return;
    }
    let (port, _serving) = counting().await;
    let (plain, tls, _files, _) = balancers("h2", port).await;
    let secure = format!("https://{}", tls.listen);
    for url in [&*plain.url, &secure] {
        let (one, two) = (format!("{url}/1"), format!("{url}/2"));
        let printed = run("nghttp", &["-nv", &one, &two]).await;
        assert_eq!(
            printed.matches(":status: 200").count(),
            2,
            "{url}: {printed}"
        );
        // Many streams on few connections, over both versions.
        for version in [&[][..], &["--h1"]] {
            let load = ["-n", "3000", "-c", "10", "-m", "20", "-t", "1"];
            let printed = run("h2load", &[&load, version, &[url]].concat()).await;
            assert!(
                printed.contains("3000 succeeded, 0 failed, 0 errored, 0 timeout"),
                "{url} {version:?}: {printed}"
            );
        }
    }
    let errors = plain.log_text() + &tls.log_text();
    assert_eq!(errors.matches("ERROR").count(), 0, "{errors}");
}
