//! Handing listening sockets over to another process.
//!
//! The successor is started with `--upgrade`. As soon as it could serve, it listens on the upgrade
//! socket. The predecessor, asked by SIGQUIT, sends the listening sockets there, which both of them
//! have then, and goes on accepting connections until the successor confirms that it accepts them, too.
//! So no connection waits for anybody, whichever of the two dies in between.

use std::path::Path;
use std::time::Duration;

use ::pingora::server::ListenFds;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::listeners::check_address;
use super::process::Shutdown;
use crate::supervise::say;

/// How long the predecessor waits for a successor to be ready.
const SUCCESSOR_WITHIN: Duration = Duration::from_secs(60);
/// How long it waits for the confirmation.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(20);
const CONFIRMATION: u8 = b'1';

/// The predecessor's part: sends the sockets, and waits until the successor accepts connections.
pub(super) async fn hand_over(shutdown: &Shutdown, path: &Path) -> Result<(), String> {
    let Some(sockets) = shutdown.listeners().sockets() else {
        return Err("this process does not listen yet".to_owned());
    };
    if !cfg!(target_os = "linux") {
        return Err("that works on Linux only".to_owned());
    }
    say(|| info!(path = %path.display(), "waiting for a successor that is ready"));
    let deadline = Instant::now() + SUCCESSOR_WITHIN;
    loop {
        // Before, because sending complains in the log about a socket that does not exist.
        if path.exists() && send(&sockets, path).await? {
            break;
        }
        if Instant::now() > deadline {
            return Err(format!(
                "no successor was ready within {SUCCESSOR_WITHIN:?}"
            ));
        }
        sleep(STEP).await;
    }
    say(|| info!("the sockets are sent"));
    timeout(CONFIRMED_WITHIN, confirmed(path))
        .await
        .map_err(|_| {
            format!("the successor did not accept connections within {CONFIRMED_WITHIN:?}")
        })
}

/// Sends the sockets; `false` if nobody takes them.
async fn send(sockets: &ListenFds, path: &Path) -> Result<bool, String> {
    let (sockets, path) = (sockets.clone(), path.display().to_string());
    let sending = tokio::task::spawn_blocking(move || {
        let sent = sockets.lock().send_to_sock(path.as_str());
        sent.is_ok()
    });
    sending.await.map_err(|error| error.to_string())
}

/// Waits for the successor's word. The socket that took the sockets may still be there: whoever
/// connects to it reads nothing.
async fn confirmed(path: &Path) {
    loop {
        if let Ok(mut stream) = UnixStream::connect(path).await
            && matches!(stream.read_u8().await, Ok(CONFIRMATION))
        {
            return;
        }
        sleep(STEP).await;
    }
}

/// The successor's part: waits until the sockets are handed over, or until nobody listens on the
/// address any more. `false` if there is nothing to take over.
pub(in crate::proxy) async fn take_over(sockets: &ListenFds, path: &str, address: &str) -> bool {
    // One listener takes the sockets of all.
    static TAKING: Mutex<()> = Mutex::const_new(());
    let _taking = TAKING.lock().await;
    loop {
        if sockets.lock().get(address).is_some() {
            return true;
        }
        if check_address(address).is_ok() {
            say(|| {
                info!(
                    address,
                    "nobody listens there, so there is nothing to take over"
                );
            });
            return false;
        }
        say(|| {
            info!(
                address,
                path, "ready to take the sockets over, at SIGQUIT to the process that has them"
            );
        });
        if !receive(sockets, path).await {
            continue;
        }
        for closed in Shutdown::of_process().listeners().were_taken_over(sockets) {
            say(|| warn!(address = closed, "nobody listens on this address any more"));
        }
        if sockets.lock().get(address).is_none() {
            say(|| warn!(address, "no socket for this address was handed over"));
            return false;
        }
    }
}

/// Waits some seconds for sockets; `false` if none came.
async fn receive(sockets: &ListenFds, path: &str) -> bool {
    let (sockets, path) = (sockets.clone(), path.to_owned());
    // Not into the table at once: it must not be locked for so long.
    let receiving = tokio::task::spawn_blocking(move || {
        let mut received = ::pingora::server::Fds::new();
        received.get_from_sock(path.as_str()).ok()?;
        let (names, descriptors) = received.serialize();
        sockets.lock().deserialize(names, descriptors);
        Some(())
    });
    matches!(receiving.await, Ok(Some(())))
}

/// Tells the predecessor that this process accepts connections.
pub(in crate::proxy) async fn confirm(path: &str) {
    // What took the sockets has removed it already.
    let _ = std::fs::remove_file(path);
    let confirming = async {
        let listener = UnixListener::bind(path)?;
        let (mut stream, _) = listener.accept().await?;
        stream.write_u8(CONFIRMATION).await
    };
    let confirmed = timeout(CONFIRMED_WITHIN, confirming).await;
    let _ = std::fs::remove_file(path);
    match confirmed {
        Ok(Ok(())) => say(|| info!("the predecessor knows that this process serves")),
        Ok(Err(error)) => {
            say(|| warn!(%error, "the predecessor cannot be told that this process serves"));
        }
        Err(_) => say(|| warn!("the predecessor did not ask whether this process serves")),
    }
}
