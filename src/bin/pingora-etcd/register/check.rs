//! Whether the command serves.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

#[derive(Args)]
#[group(id = "check")]
pub struct Options {
    /// The command is well if it answers a GET of this path with 2xx or 3xx.
    #[arg(long, value_name = "PATH", conflicts_with = "check_tcp")]
    check_http: Option<String>,
    /// The command is well if it accepts connections.
    #[arg(long)]
    check_tcp: bool,
    /// Milliseconds from one check to the next.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(50..=600_000))]
    check_interval_ms: u64,
    /// How long a check may take, in milliseconds.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    check_timeout_ms: u64,
    /// How many checks in a row have to pass before a node that was taken out comes back.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    rise: u32,
    /// How many checks in a row have to fail before the node is taken out.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    fall: u32,
}

/// What the checks say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Good,
    /// With the reason.
    Bad(String),
}

enum Kind {
    /// The command is well as long as it runs.
    None,
    Tcp(SocketAddr),
    Http(reqwest::Client, reqwest::Url),
}

/// While a command starts it is looked at more often.
const START_INTERVAL: Duration = Duration::from_millis(100);

pub struct Check {
    kind: Kind,
    interval: Duration,
    timeout: Duration,
    counts: Counts,
}

/// Decides by the checks so far. No I/O.
#[derive(Debug)]
struct Counts {
    rise: u32,
    fall: u32,
    /// `None` before the first one that passed.
    is_good: Option<bool>,
    /// How many in a row say otherwise.
    others: u32,
}

impl Counts {
    /// Counts a check. Returns whether the health has changed.
    fn count(&mut self, passed: bool) -> bool {
        let is_good = self.is_good == Some(true);
        if passed == is_good {
            self.others = 0;
            return false;
        }
        self.others += 1;
        let enough = match (self.is_good, passed) {
            // A command that has just been started serves as soon as it can.
            (None, _) => 1,
            (_, true) => self.rise,
            (_, false) => self.fall,
        };
        if self.others < enough {
            return false;
        }
        self.others = 0;
        self.is_good = Some(passed);
        true
    }
}

impl Check {
    /// Checks the command on the address where others reach it: what serves only on another one is of
    /// no use to them.
    pub fn new(options: &Options, address: SocketAddr) -> Result<Self, Box<dyn std::error::Error>> {
        let kind = match &options.check_http {
            Some(path) => {
                let path = path.trim_start_matches('/');
                let url = format!("http://{address}/{path}").parse()?;
                let client = reqwest::Client::builder()
                    .redirect(reqwest::redirect::Policy::none())
                    .no_proxy();
                Kind::Http(client.build()?, url)
            }
            None if options.check_tcp => Kind::Tcp(address),
            None => Kind::None,
        };
        Ok(Self {
            kind,
            interval: Duration::from_millis(options.check_interval_ms),
            timeout: Duration::from_millis(options.check_timeout_ms),
            counts: Counts {
                rise: options.rise,
                fall: options.fall,
                is_good: None,
                others: 0,
            },
        })
    }

    /// Checks from now on, in a task of its own, so that nothing that this program does meanwhile puts a
    /// check off. Each change of the health is sent.
    pub fn start(mut self) -> mpsc::Receiver<Health> {
        let (to, changes) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let health = self.changed().await;
                if to.send(health).await.is_err() {
                    return;
                }
            }
        });
        changes
    }

    async fn changed(&mut self) -> Health {
        loop {
            match (&self.kind, self.counts.is_good) {
                (Kind::None, None) => {}
                (Kind::None, Some(_)) => return std::future::pending().await,
                (_, None) => sleep(START_INTERVAL.min(self.interval)).await,
                (_, Some(_)) => sleep(self.interval).await,
            }
            let result = timeout(self.timeout, self.try_once()).await;
            let result = result.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            if self.counts.count(result.is_ok()) {
                return result.map_or_else(Health::Bad, |()| Health::Good);
            }
        }
    }

    async fn try_once(&self) -> Result<(), String> {
        match &self.kind {
            Kind::None => Ok(()),
            Kind::Tcp(address) => {
                let connected = TcpStream::connect(address).await;
                connected.map(drop).map_err(|error| error.to_string())
            }
            Kind::Http(client, url) => {
                let response = client.get(url.clone()).send().await;
                let status = response.map_err(|error| error.to_string())?.status();
                match status.is_success() || status.is_redirection() {
                    true => Ok(()),
                    false => Err(format!("it answers {status}")),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_changes_after_enough_checks_in_a_row() {
        let mut counts = Counts {
            rise: 2,
            fall: 3,
            is_good: None,
            others: 0,
        };
        let changes = |counts: &mut Counts, checks: &[bool]| {
            let changed = checks.iter().map(|passed| counts.count(*passed));
            changed.collect::<Vec<_>>()
        };
        // The first one counts.
        assert_eq!(changes(&mut counts, &[true, true]), [true, false]);
        let failing = [false, false, true, false, false, false, false];
        let expected = [false, false, false, false, false, true, false];
        assert_eq!(changes(&mut counts, &failing), expected);
        assert_eq!(
            changes(&mut counts, &[true, false, true, true]),
            [false, false, false, true]
        );
    }
}
