//! What commands print for people and programs. Unlike log lines it is complete, however slowly it is read.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Writes a line to standard output. A reader that has seen enough, such as `head`, ends the process.
pub fn line(text: impl Display) -> io::Result<()> {
    let written = writeln!(io::stdout().lock(), "{text}");
    if let Err(error) = &written
        && error.kind() == ErrorKind::BrokenPipe
    {
        std::process::exit(0);
    }
    written
}
