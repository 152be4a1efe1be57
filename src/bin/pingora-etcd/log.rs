//! Where log lines and other output of the command and of the examples go.
//!
//! Output that nobody accepts is lost, and nothing else is affected: a full disk, a pipe whose
//! reader has ended, or a pipe that nobody reads. `println!` and `eprintln!` panic when they cannot
//! write, which ends the calling task, and so does the formatter of `tracing-subscriber` when it
//! reports that it could not write. A full pipe would block the task, possibly indefinitely.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A pipe that has room at all accepts this many bytes without blocking.
const CHUNK: usize = 4096;

/// For programs that run for long: lines of this crate and its programs, and warnings of other crates. Those of Pingora
/// are a line for each request that a client or a backend ends in some ways, as often as they like.
pub const FOR_SERVICES: &str = "warn,pingora_core=error,pingora_proxy=error,pingora_pool=error,pingora_etcd=info,load_balancer=info,worker=info";

/// Writes log lines to standard error. `RUST_LOG` overrides the filter.
pub fn init(filter: &str) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| filter.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| NonBlocking)
        // Colour codes are for a terminal: a file or a pipe gets plain text.
        .with_ansi(io::stderr().is_terminal())
        // Otherwise the formatter reports write errors with `eprintln!`.
        .log_internal_errors(false)
        .init();
}

/// Writes a line to standard error, if it can be written.
#[allow(dead_code)] // not every program uses it
pub fn print_error(line: impl std::fmt::Display) {
    let _ = NonBlocking.write(format!("{line}\n").as_bytes());
}

/// Writes a line to standard output, if it can be written.
#[allow(dead_code)]
pub fn print(line: impl std::fmt::Display) {
    write_what_fits(&io::stdout(), format!("{line}\n").as_bytes());
}

/// Standard error without blocking: writes what fits and drops the rest. It never fails, and only
/// blocks if another process fills the same pipe between the check and the write.
struct NonBlocking;

impl Write for NonBlocking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_what_fits(&io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_what_fits(output: &impl AsFd, mut bytes: &[u8]) {
    // One writer at a time, because the room that was found must not be used by another thread.
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
