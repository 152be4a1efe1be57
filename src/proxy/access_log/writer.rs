//! The thread that writes lines.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Stdout, Write, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use tracing::warn;

use super::entry::AccessLogEntry;
use super::statistics::AccessLogStatistics;
use crate::config::LogFormat;
use crate::proxy::shutdown::{Hold, Shutdown};
use crate::supervise::say;

/// How long a line may wait before it is in the file.
const FLUSH_AFTER: Duration = Duration::from_millis(200);

/// An entry, and what keeps the process from ending before the thread has it.
pub(super) type Line = (AccessLogEntry, Hold);

/// Writes lines until nobody gives any more.
pub(super) struct Writer {
    path: PathBuf,
    format: LogFormat,
    /// Lines for which there was no room.
    dropped: Arc<AtomicU64>,
    statistics: AccessLogStatistics,
    output: Option<Output>,
    /// How often logs had been asked to be opened again when this one was opened.
    generation: u64,
    /// Whether it has been said that it cannot be written to.
    is_reported: bool,
    /// Lines that may not be in the file yet, and those that were lost since that was said.
    unflushed: u64,
    lost: u64,
    /// The last write has failed, perhaps in the middle of a line.
    is_torn: bool,
}

enum Output {
    File(BufWriter<File>),
    Standard(BufWriter<Stdout>),
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Standard(standard) => standard.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Standard(standard) => standard.flush(),
        }
    }
}

impl Writer {
    pub(super) fn new(
        path: &Path,
        opened: Option<File>,
        format: LogFormat,
        (dropped, statistics): (Arc<AtomicU64>, AccessLogStatistics),
    ) -> Self {
        Self {
            path: path.to_owned(),
            format,
            dropped,
            statistics,
            output: opened.map(|mut file| {
                // A process before this one may have left a part of a line.
                let _ = end_line(path, &mut file);
                Output::File(BufWriter::new(file))
            }),
            generation: 0,
            is_reported: false,
            unflushed: 0,
            lost: 0,
            is_torn: false,
        }
    }

    pub(super) fn run(mut self, lines: &Receiver<Line>) {
        let process = Shutdown::of_process();
        loop {
            let received = lines.recv_timeout(FLUSH_AFTER);
            // In place of those that come with the lines: the process does not end before they are in the file.
            let _hold = process.writer();
            match received {
                Ok((entry, _)) => self.write(&entry),
                Err(RecvTimeoutError::Timeout) => self.open_if_asked(),
                Err(RecvTimeoutError::Disconnected) => return self.flush(),
            }
            let mut flushed = Instant::now();
            while let Ok((entry, _)) = lines.try_recv() {
                self.write(&entry);
                if flushed.elapsed() >= FLUSH_AFTER {
                    self.flush();
                    flushed = Instant::now();
                }
            }
            self.flush();
        }
    }

    fn write(&mut self, entry: &AccessLogEntry) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            say(|| warn!(dropped, "lines of the access log were dropped"));
        }
        self.open_if_asked();
        if self.output.is_none() {
            self.open();
        }
        let is_torn = std::mem::take(&mut self.is_torn);
        if is_torn {
            self.replace_torn();
        }
        self.unflushed += 1;
        let mut text = line(self.format, entry);
        if std::mem::take(&mut self.is_torn) {
            text.insert(0, b'\n');
        }
        match self.output.as_mut().map(|output| output.write_all(&text)) {
            Some(Ok(())) => {}
            Some(Err(error)) => self.fails(&error),
            None => self.loses_unflushed(),
        }
    }

    /// Opens it again if somebody has asked for that, also while there is nothing to write: the former file may have been
    /// moved, and whoever has moved it waits for a new one.
    fn open_if_asked(&mut self) {
        let generation = Shutdown::of_process().log_generation();
        if generation != self.generation {
            self.flush();
            self.generation = generation;
            self.open();
        }
    }

    /// Opens it again. If that fails, what is open stays in use: a daemon may not be allowed to make a new file.
    fn open(&mut self) {
        match self.path == Path::new("-") {
            true => self.output = Some(Output::Standard(BufWriter::new(stdout()))),
            false => match open(&self.path) {
                Ok(mut file) => {
                    // Only if that is a file.
                    let _ = end_line(&self.path, &mut file);
                    self.output = Some(Output::File(BufWriter::new(file)));
                }
                Err(error) if self.output.is_none() => self.fails(&error),
                Err(error) => {
                    let path = self.path.display().to_string();
                    say(
                        || warn!(path, %error, "the access log cannot be opened again; lines go on to the file that is open"),
                    );
                }
            },
        }
    }

    /// Opens the file again after a write that failed. Where that is not allowed, what is open stays in use, and the next
    /// line has to end the one before.
    fn replace_torn(&mut self) {
        match open(&self.path) {
            Ok(mut file) => {
                self.is_torn = end_line(&self.path, &mut file).is_err();
                self.output = Some(Output::File(BufWriter::new(file)));
            }
            Err(_) => self.is_torn = true,
        }
    }

    fn flush(&mut self) {
        match self.output.as_mut().map(Write::flush) {
            Some(Err(error)) => self.fails(&error),
            Some(Ok(())) if self.unflushed > 0 => {
                self.unflushed = 0;
                if std::mem::take(&mut self.is_reported) {
                    let lost = std::mem::take(&mut self.lost);
                    say(|| warn!(lost, "the access log can be written again"));
                }
            }
            Some(Ok(())) | None => {}
        }
    }

    fn loses_unflushed(&mut self) {
        let lines = std::mem::take(&mut self.unflushed);
        self.lost += lines;
        self.statistics.add(lines);
    }

    /// Lines that cannot be written are lost. The next one tries again.
    fn fails(&mut self, error: &std::io::Error) {
        self.loses_unflushed();
        if let Some(Output::File(file)) = self.output.take() {
            // Without what is in the buffer, which counts as lost. The file itself may be one that a daemon may not open again.
            let (file, _) = file.into_parts();
            self.output = Some(Output::File(BufWriter::new(file)));
            self.is_torn = true;
        }
        if !std::mem::replace(&mut self.is_reported, true) {
            let path = self.path.display().to_string();
            say(|| warn!(path, %error, "the access log cannot be written; lines are lost"));
        }
    }
}

/// Whether it could be opened, without making a file.
pub(super) fn check(file: &Path) -> std::io::Result<()> {
    match File::options().append(true).open(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let directory = file.parent().filter(|it| !it.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            access(directory, Access::WRITE_OK | Access::EXEC_OK)?;
            Ok(())
        }
        opened => opened.map(drop),
    }
}

pub(super) fn open(file: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).open(file)
}

/// Ends a line of which a disk that was full has taken a part only, so that the next one is whole.
fn end_line(path: &Path, file: &mut File) -> std::io::Result<()> {
    let mut written = File::open(path)?;
    let mut last = [b'\n'];
    // An empty file has no end to go back from.
    if written.seek(SeekFrom::End(-1)).is_ok() {
        written.read_exact(&mut last)?;
    }
    match last {
        [b'\n'] => Ok(()),
        _ => file.write_all(b"\n"),
    }
}

/// How an entry looks as a line.
fn line(format: LogFormat, entry: &AccessLogEntry) -> Vec<u8> {
    match format {
        LogFormat::Json => entry.json(),
        LogFormat::Combined => entry.combined(),
    }
}
