//! The command `pingora-etcd`: the bundled load balancer, a look at a group and a hand on its nodes, and a
//! member without a line of code.

mod connection;
mod effective;
mod generate;
mod log;
mod operate;
mod output;
mod register;
mod serve;
mod show;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Load balancing over the nodes that are registered in etcd.
///
/// Exit status: 0 when all is well, 1 after an error, 2 for wrong arguments, 3 when what was asked for
/// does not exist, such as a leader. `register` ends with the status of its command.
#[derive(Parser)]
#[command(name = "pingora-etcd", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the load balancer that a file describes.
    Serve(serve::Arguments),
    /// List the nodes of a group.
    Nodes(show::Arguments),
    /// Show the leader of a group, with its fencing token.
    Leader(show::Arguments),
    /// Print what happens in a group, until Ctrl-C.
    Watch(show::Arguments),
    /// Send no new requests to a node, until its process ends or `undrain`.
    Drain(operate::Arguments),
    /// Send requests to a node again.
    Undrain(operate::Arguments),
    /// Give a node another static weight, until its process ends.
    Weight(operate::Weight),
    /// Make a candidate the leader of its group, without a time between the two.
    Transfer(operate::Arguments),
    /// Remove a node that is gone, or that nobody can stop. One that lives registers again.
    Evict(operate::Evict),
    /// Run a command as a member of a group.
    Register(Box<register::Arguments>),
    /// Print the JSON Schema of the file that `serve` takes.
    Schema,
    /// Print a completion script for a shell.
    Completions(generate::Completions),
    /// Print the manual page, or write the pages of all commands into a folder.
    Man(generate::Man),
}

/// Why a command has failed.
enum Failure {
    /// What was asked for does not exist.
    NotFound(String),
    Error(Box<dyn std::error::Error>),
}

impl<E: Into<Box<dyn std::error::Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

type Result<T = ExitCode> = std::result::Result<T, Failure>;

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    log::init(match command {
        Command::Serve(_) | Command::Register(_) => log::FOR_SERVICES,
        // Which entries were refused, and nothing else that is no error.
        _ => "error,pingora_etcd::discovery=warn",
    });
    let done = match command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Nodes(arguments) => show::nodes(&arguments),
        Command::Leader(arguments) => show::leader(&arguments),
        Command::Watch(arguments) => show::watch(&arguments),
        Command::Drain(arguments) => operate::drain(&arguments),
        Command::Undrain(arguments) => operate::undrain(&arguments),
        Command::Weight(arguments) => operate::weight(&arguments),
        Command::Transfer(arguments) => operate::transfer(&arguments),
        Command::Evict(arguments) => operate::evict(&arguments),
        Command::Register(arguments) => register::run(*arguments),
        Command::Schema => generate::schema(),
        Command::Completions(arguments) => generate::completions(&arguments),
        Command::Man(arguments) => generate::man(&arguments),
    };
    match done {
        Ok(status) => status,
        Err(Failure::NotFound(what)) => {
            log::print_error(format_args!("pingora-etcd: {what}"));
            ExitCode::from(3)
        }
        Err(Failure::Error(error)) => {
            log::print_error(format_args!("pingora-etcd: {error}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }
}
