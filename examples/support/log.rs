//! Where log lines go, and what else a program says.
//!
//! To nowhere, where nobody takes them: a disk that is full, a pipe whose reader has ended, one whose
//! reader does not read. A line that is lost is lost, and nothing else is: `println!` and `eprintln!`
//! panic when they cannot write, which takes the task along that was about to say something, and so
//! does the formatter of `tracing-subscriber` when it reports that it could not write. A pipe that is
//! full would make the task wait, for ever perhaps.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// So much can be written to a pipe that has room at all.
const CHUNK: usize = 4096;

/// Log lines of this crate and its examples, and warnings of others, to standard error; `RUST_LOG`
/// overrides.
pub fn init() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "warn,pingora_etcd=info,load_balancer=info,worker=info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lossy)
        // Otherwise it tells by `eprintln!` that a line could not be written.
        .log_internal_errors(false)
        .init();
}

/// A line on standard error, if that can be written.
#[allow(dead_code)] // not every program says something
pub fn complain(line: impl std::fmt::Display) {
    let _ = Lossy.write(format!("{line}\n").as_bytes());
}

/// A line on standard output, if that can be written.
#[allow(dead_code)]
pub fn say(line: impl std::fmt::Display) {
    write_what_fits(&io::stdout(), format!("{line}\n").as_bytes());
}

/// Standard error, which takes what it takes now. Never fails, and never waits, unless another process
/// fills the same pipe in the instant between looking and writing.
struct Lossy;

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_what_fits(&io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_what_fits(output: &impl AsFd, mut bytes: &[u8]) {
    // One at a time: the room that one has been told of is not another's.
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    while !bytes.is_empty() && has_room(output) {
        match rustix::io::write(output, &bytes[..bytes.len().min(CHUNK)]) {
            Ok(written @ 1..) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

fn has_room(output: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(output, PollFlags::OUT)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut fds, Some(&at_once)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(1..) => return fds[0].revents().contains(PollFlags::OUT),
            Ok(0) | Err(_) => return false,
        }
    }
}
