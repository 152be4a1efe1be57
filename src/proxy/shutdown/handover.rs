//! Handing listening sockets over to another process.
//!
//! The successor is started with `--upgrade`. As soon as it could serve, it listens on the upgrade
//! socket. The predecessor, asked by SIGQUIT, sends the listening sockets there, which both of them
//! have then, and goes on accepting connections until the successor confirms that it accepts them, too.
//! So no connection waits for anybody, whichever of the two dies in between. Both only deal with
//! processes of their own user, or of root.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use ::pingora::server::{Fds, ListenFds};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::listeners::{is_in_use, listen_error};
use super::process::Shutdown;
use crate::proxy::learned;
use crate::supervise::say;

/// How long the predecessor waits for a successor to be ready.
const SUCCESSOR_WITHIN: Duration = Duration::from_secs(60);
/// How long it waits for the confirmation.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(10);
/// How long the successor waits for a message on a connection, and then looks whether the
/// predecessor is still there.
const MESSAGE_WITHIN: Duration = Duration::from_secs(1);
/// How old what was learned may be that the predecessor leaves.
const LEAVES_EVERY: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(20);
const CONFIRMATION: u8 = b'1';
/// What Pingora sends at most.
const MOST_SOCKETS: usize = 32;
const MOST_BYTES: usize = 2_048;

/// The predecessor's part: sends the sockets, and waits until the successor accepts connections.
pub(super) async fn hand_over(shutdown: &Shutdown, path: &Path) -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("that works on Linux only".to_owned());
    }
    let Some(sockets) = shutdown.listeners().open_sockets() else {
        return Err("this process does not listen yet".to_owned());
    };
    say(|| info!(path = %path.display(), "waiting for a successor that is ready"));
    let handed_over = hand_sockets_over(&sockets, path).await;
    learned::has_handed_over(path, handed_over.is_ok());
    handed_over
}

async fn hand_sockets_over(sockets: &ListenFds, path: &Path) -> Result<(), String> {
    let deadline = Instant::now() + SUCCESSOR_WITHIN;
    let mut left_at: Option<Instant> = None;
    loop {
        // Before, because sending complains in the log about a socket that does not exist.
        if is_there(path)? {
            // The file of a successor that has died may be there for long.
            if left_at.is_none_or(|at| at.elapsed() > LEAVES_EVERY) {
                learned::hand_over(path).await;
                left_at = Some(Instant::now());
            }
            if send(sockets, path).await? {
                break;
            }
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

/// Whether somebody who may have the sockets has made this file.
fn is_there(path: &Path) -> Result<bool, String> {
    let Ok(file) = std::fs::symlink_metadata(path) else {
        return Ok(false);
    };
    match is_trusted(file.uid()) {
        true => Ok(true),
        false => Err(format!("{} belongs to another user", path.display())),
    }
}

fn is_trusted(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

/// Sends the sockets; `false` if nobody takes them.
async fn send(sockets: &ListenFds, path: &Path) -> Result<bool, String> {
    // A copy of the table, because sending may take seconds.
    let (addresses, descriptors) = sockets.lock().serialize();
    let path = path.display().to_string();
    let sending = tokio::task::spawn_blocking(move || {
        let mut sent = Fds::new();
        sent.deserialize(addresses, descriptors);
        sent.send_to_sock(path.as_str()).is_ok()
    });
    sending.await.map_err(|error| error.to_string())
}

/// Waits for the successor's word.
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

/// The successor's end of the upgrade socket.
#[derive(Debug)]
pub(in crate::proxy) struct Successor {
    listener: UnixListener,
    path: String,
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The successor's part: waits until the sockets are handed over, or until nobody listens on any of these
/// addresses any more; then there is nothing to take over. Whoever has taken them gets the socket on
/// which to confirm that they are accepted. Not all of the addresses need to be among those that are handed over.
pub(in crate::proxy) async fn take_over(
    sockets: &ListenFds,
    path: &str,
    addresses: &[String],
) -> Result<Option<Successor>, String> {
    // One service takes the sockets of all.
    static TAKING: Mutex<()> = Mutex::const_new(());
    let _taking = TAKING.lock().await;
    let listeners = Shutdown::of_process().listeners();
    let mut successor = None;
    while !listeners.are_taken_over() {
        if !is_any_in_use(addresses)? {
            say(|| {
                info!(
                    ?addresses,
                    "nobody listens there, so there is nothing to take over"
                );
            });
            return Ok(None);
        }
        let successor = match &mut successor {
            Some(successor) => successor,
            none => {
                let made = Successor::new(path).map_err(|error| {
                    format!("cannot listen on the upgrade socket {path}: {error}")
                })?;
                say(|| {
                    info!(
                        ?addresses,
                        path,
                        "ready to take the sockets over, at SIGQUIT to the process that has them"
                    );
                });
                none.insert(made)
            }
        };
        if let Ok(received) = timeout(MESSAGE_WITHIN, successor.receive()).await {
            learned::take_over(Path::new(path)).await;
            take(sockets, received);
        }
    }
    Ok(successor)
}

/// Whether somebody listens on one of these addresses. An error if one cannot be listened on for another reason.
fn is_any_in_use(addresses: &[String]) -> Result<bool, String> {
    let mut is_any = false;
    for address in addresses {
        match listen_error(address) {
            None => {}
            Some(error) if is_in_use(&error) => is_any = true,
            Some(error) => return Err(format!("cannot listen on {address}: {error}")),
        }
    }
    Ok(is_any)
}

/// Puts the sockets on our addresses into the table, and closes the others: clients would wait there
/// for ever. The predecessor still has them.
fn take(sockets: &ListenFds, received: Vec<(String, OwnedFd)>) {
    let listeners = Shutdown::of_process().listeners();
    for (address, socket) in received {
        let mut table = sockets.lock();
        if !listeners.wants(&address) {
            say(|| warn!(address, "this address is not listened on any more"));
        } else if table.get(&address).is_none() {
            table.add(address, socket.into_raw_fd());
            listeners.take_over();
        }
    }
}

impl Successor {
    fn new(path: &str) -> io::Result<Self> {
        // What a former process has left; one that is in use belongs to another successor.
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(ErrorKind::AddrInUse.into());
        }
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// The next connection of somebody who may hand sockets over.
    async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            if is_trusted(stream.peer_cred()?.uid()) {
                return Ok(stream);
            }
        }
    }

    /// Waits for sockets. Whoever connects and sends none has none.
    async fn receive(&self) -> Vec<(String, OwnedFd)> {
        loop {
            let received = match self.accept().await {
                Ok(stream) => timeout(MESSAGE_WITHIN, receive_from(&stream)).await,
                Err(error) => Ok(Err(error)),
            };
            match received {
                Ok(Ok(received)) if !received.is_empty() => return received,
                other => {
                    debug!(?other, "no sockets came");
                    sleep(STEP).await;
                }
            }
        }
    }

    /// Tells the predecessor that this process accepts connections.
    pub(in crate::proxy) async fn confirm(self) {
        let confirming = async {
            loop {
                let told = match self.accept().await {
                    Ok(mut stream) => stream.write_u8(CONFIRMATION).await,
                    Err(error) => Err(error),
                };
                match told {
                    Ok(()) => return,
                    Err(_) => sleep(STEP).await,
                }
            }
        };
        match timeout(CONFIRMED_WITHIN, confirming).await {
            Ok(()) => say(|| info!("the predecessor knows that this process serves")),
            Err(_) => say(|| warn!("the predecessor did not ask whether this process serves")),
        }
    }
}

/// One message: addresses, and a socket for each.
async fn receive_from(stream: &UnixStream) -> io::Result<Vec<(String, OwnedFd)>> {
    let (text, sockets) = stream
        .async_io(Interest::READABLE, || {
            let mut text = vec![0; MOST_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(stream.as_fd(), &mut parts, &mut control, flags)?;
            let mut sockets: Vec<OwnedFd> = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    sockets.extend(rights);
                }
            }
            text.truncate(received.bytes);
            Ok((text, sockets))
        })
        .await?;
    let addresses = String::from_utf8_lossy(&text).into_owned();
    let addresses: Vec<_> = addresses
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect();
    match addresses.len() == sockets.len() {
        true => Ok(addresses.into_iter().zip(sockets).collect()),
        false => {
            let (addresses, sockets) = (addresses.len(), sockets.len());
            say(|| warn!(addresses, sockets, "there is not a socket for each address"));
            Err(ErrorKind::InvalidData.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Pingora sends is read, and what it does not send is nothing.
    #[tokio::test]
    async fn sockets_are_received_from_those_who_send_some() {
        let path = std::env::temp_dir().join(format!("handover-{}", fastrand::u64(..)));
        let path = path.to_str().unwrap();
        let successor = Successor::new(path).unwrap();
        assert!(Successor::new(path).is_err(), "the socket is in use");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let to = path.to_owned();
        let name = address.clone();
        let sending = tokio::task::spawn_blocking(move || {
            // They say nothing, or something else.
            drop(std::os::unix::net::UnixStream::connect(&to).unwrap());
            let mut other = std::os::unix::net::UnixStream::connect(&to).unwrap();
            std::io::Write::write_all(&mut other, b"127.0.0.1:80").unwrap();
            let mut sent = Fds::new();
            sent.add(name, listener.into_raw_fd());
            sent.send_to_sock(to.as_str()).unwrap();
        });
        let received = timeout(Duration::from_secs(20), successor.receive()).await;
        let received = received.unwrap();
        sending.await.unwrap();
        assert_eq!(received.len(), 1);
        assert_eq!(received[0].0, address);
        let path = successor.path.clone();
        let asking = tokio::spawn(async move { confirmed(Path::new(&path)).await });
        successor.confirm().await;
        asking.await.unwrap();
    }
}
