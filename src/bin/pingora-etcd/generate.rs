//! Completions, manual pages and the schema of the file, made from the code.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{Arguments, Result, output};

#[derive(Args)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

#[derive(Args)]
pub struct Man {
    /// Write the pages of all commands into this folder, which must exist.
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn completions(arguments: &Completions) -> Result {
    let mut text = Vec::new();
    let mut command = Arguments::command();
    clap_complete::generate(arguments.shell, &mut command, "pingora-etcd", &mut text);
    output::line(String::from_utf8_lossy(&text).trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// The schema of the file, for an editor.
pub fn schema() -> Result {
    output::line(format!("{:#}", pingora_etcd::config::schema()))?;
    Ok(ExitCode::SUCCESS)
}

pub fn man(arguments: &Man) -> Result {
    let command = Arguments::command();
    match &arguments.out {
        Some(folder) => clap_mangen::generate_to(command, folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?,
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            output::line(String::from_utf8_lossy(&page).trim_end())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
