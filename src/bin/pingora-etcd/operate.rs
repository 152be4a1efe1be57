//! `drain`, `undrain`, `weight`, `transfer` and `evict`: what an operator does to a node.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use pingora_etcd::{ClusterError, Operator};
use tokio::runtime::Runtime;

use crate::connection::Connection;
use crate::{Failure, Result, output};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// The id of the node.
    id: String,
    /// How long to wait for etcd, and for a transfer, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

#[derive(Args)]
pub struct Weight {
    #[command(flatten)]
    node: Arguments,
    /// The weight: 0 for no traffic, or 0.000001 to 1000000; `own` for the one that the node has registered.
    #[arg(value_parser = new_weight)]
    weight: NewWeight,
}

#[derive(Clone, Copy)]
enum NewWeight {
    Own,
    Fixed(f64),
}

fn new_weight(text: &str) -> std::result::Result<NewWeight, String> {
    match text.parse() {
        _ if text == "own" => Ok(NewWeight::Own),
        Ok(weight) if weight == 0.0 || (1e-6..=1e6).contains(&weight) => {
            Ok(NewWeight::Fixed(weight))
        }
        _ => Err("it is not a weight; use 0 (no traffic), 0.000001 to 1000000, or own".into()),
    }
}

#[derive(Args)]
pub struct Evict {
    #[command(flatten)]
    node: Arguments,
    /// Also if it leads the group: if its process lives and is only cut off, there may be two leaders for a while.
    #[arg(long)]
    force: bool,
}

/// Does something to a node, within the time.
fn with_node(
    arguments: &Arguments,
    act: impl AsyncFnOnce(&Operator, &str) -> std::result::Result<String, ClusterError>,
) -> Result {
    let target = arguments.connection.target()?;
    let runtime = Runtime::new()?;
    let within = Duration::from_secs(arguments.timeout);
    let done = runtime.block_on(async {
        let operator = target.operator(&target.cluster()?)?;
        match tokio::time::timeout(within, act(&operator, &arguments.id)).await {
            Ok(done) => Ok(done?),
            Err(_) => Err(format!("no answer from etcd within {within:?}").into()),
        }
    });
    // A DNS server that does not answer does not keep the command.
    runtime.shutdown_background();
    match done {
        Ok(said) => output::line(said)?,
        Err(Failure::Error(error)) if is_missing(&*error) => {
            return Err(Failure::NotFound(error.to_string()));
        }
        Err(failure) => return Err(failure),
    }
    Ok(ExitCode::SUCCESS)
}

fn is_missing(error: &(dyn std::error::Error + 'static)) -> bool {
    let refused = error.downcast_ref::<ClusterError>();
    refused.is_some_and(|error| matches!(error, ClusterError::NotRegistered { .. }))
}

pub fn drain(arguments: &Arguments) -> Result {
    with_node(arguments, async |operator, id| {
        operator.drain(id).await?;
        Ok(format!("{id} gets no new requests"))
    })
}

pub fn undrain(arguments: &Arguments) -> Result {
    with_node(arguments, async |operator, id| {
        operator.undrain(id).await?;
        Ok(format!("{id} gets requests again"))
    })
}

pub fn weight(arguments: &Weight) -> Result {
    let weight = match arguments.weight {
        NewWeight::Own => None,
        NewWeight::Fixed(weight) => Some(weight),
    };
    with_node(&arguments.node, async |operator, id| {
        operator.set_weight(id, weight).await?;
        Ok(match weight {
            Some(weight) => format!("{id} has the weight {weight}"),
            None => format!("{id} has its own weight"),
        })
    })
}

pub fn transfer(arguments: &Arguments) -> Result {
    // A little less than for the whole, so that the reason is known.
    let within = Duration::from_secs(arguments.timeout).mul_f64(0.9);
    with_node(arguments, async |operator, id| {
        let epoch = operator.transfer(id, within).await?;
        Ok(format!("{id} leads, with the fencing token {epoch}"))
    })
}

pub fn evict(arguments: &Evict) -> Result {
    with_node(&arguments.node, async |operator, id| {
        operator.evict(id, arguments.force).await?;
        Ok(format!("{id} is removed"))
    })
}
