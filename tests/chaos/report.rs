//! Prints what was measured as a table, writes it as lines of JSON, and decides the exit code.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::faults::{Fault, Found};
use super::measure::Stats;
use super::targets::Target;
use super::traffic::Requests;
use super::world::Healed;

/// A recovery that takes longer is explained in the output.
const SLOW: Duration = Duration::from_secs(2);

/// How long a worker may take to learn from etcd that its lease was revoked too early, while the machine runs.
const REVOCATION_NOTICE: Duration = Duration::from_millis(500);
/// The balancer's error when every lease of a group was revoked.
const NO_BACKEND: &str = "no backend is registered";

pub struct Row {
    pub fault: Fault,
    pub lasted: Duration,
    /// For how long this machine stood still.
    pub stalled: Duration,
    pub found: Found,
    pub stats: Stats,
    pub requests: Requests,
    /// How the cluster recovered, or what is still problems.
    pub healed: Result<Healed, Vec<String>>,
}

/// Collects results from several tasks at once.
pub struct Report {
    seen: Mutex<Seen>,
    file: PathBuf,
}

#[derive(Default)]
struct Seen {
    rows: Vec<Row>,
    skipped: Vec<(Fault, String)>,
    failures: Vec<String>,
}

impl Report {
    pub fn new() -> Self {
        let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let file = tmp.parent().unwrap_or(tmp).join("chaos.json");
        // The file contains only this run. An error in writing it is reported with the first line.
        let _ = std::fs::remove_file(&file);
        Self {
            seen: Mutex::default(),
            file,
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn fail(&self, failure: String) {
        println!("FAILED: {failure}");
        self.seen().failures.push(failure);
    }

    pub fn skip(&self, fault: Fault, reason: String) {
        let skipped = &mut self.seen().skipped;
        if !skipped.iter().any(|(other, _)| *other == fault) {
            skipped.push((fault, reason));
        }
    }

    pub fn row(&self, row: Row) {
        let name = row.fault.name();
        print_result(&row);
        let (failures, caused_by_etcd) = failures_of(&row);
        let revoked = row.found.revoked;
        if revoked > 0 {
            println!(
                "  etcd revoked {revoked} leases that were being renewed; consequences: {caused_by_etcd:?}"
            );
        }
        self.write(&row, &failures);
        for failure in failures {
            self.fail(format!("{name}: {failure}"));
        }
        self.seen().rows.push(row);
    }

    fn write(&self, row: &Row, failures: &[String]) {
        let healed = row.healed.as_ref().ok();
        let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
        let line = serde_json::json!({
            "fault": row.fault.name(),
            "lasted_ms": ms(row.lasted),
            "two_leaders_ms": ms(row.stats.two_leaders),
            "no_leader_ms": ms(row.stats.no_leader),
            "terms": row.stats.terms,
            "tokens_back": row.stats.token_decreases.len(),
            "blind_ms": ms(row.stats.blind),
            "gone_after_ms": row.found.gone_after.map(ms),
            "healed_after_ms": healed.map(|healed| ms(healed.after)),
            "balancer_after_ms": healed.map(|healed| ms(healed.balancer)),
            "lost": count(row, "lost"),
            "phantom": count(row, "phantom"),
            "requests": row.requests.sent,
            "failed": row.requests.failed.len(),
            "slowest_ms": ms(row.requests.slowest),
            "revoked_by_etcd": row.found.revoked,
            "notes": row.found.notes,
            "failures": failures,
        });
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.file);
        let written = file.and_then(|mut file| writeln!(file, "{line}"));
        if let Err(error) = written {
            println!("cannot write {}: {error}", self.file.display());
        }
    }

    pub fn print(&self) {
        println!(
            "\n{:<24} {:>3} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>5} {:>8} {:>9} {:>6} {:>8}",
            "fault",
            "n",
            "2 lead",
            "no lead",
            "tokens",
            "gone in",
            "healed",
            "balancer",
            "lost",
            "phantom",
            "requests",
            "failed",
            "slowest"
        );
        let seen = self.seen();
        let mut names: Vec<_> = seen.rows.iter().map(|row| row.fault.name()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let rows = seen.rows.iter().filter(|row| row.fault.name() == name);
            line(name, &rows.collect::<Vec<_>>());
        }
        line("all", &seen.rows.iter().collect::<Vec<_>>());
        println!(
            "the longest of each; 2 lead: two nodes report that they lead; no lead: none does; tokens: \
             decreased; gone in: from a\ncrash or cut until no discovery has the node; healed: \
             from the end of the fault; balancer: until every node responded"
        );
        let blind = seen.rows.iter().map(|row| row.stats.blind).max();
        println!(
            "longest time between two samples of who leads: {:.1?}",
            blind.unwrap_or_default()
        );
        let revoked: usize = seen.rows.iter().map(|row| row.found.revoked).sum();
        if revoked > 0 {
            println!(
                "etcd revoked {revoked} leases that were being renewed (etcd-io/etcd#15247): two \
                 leaders for less than {REVOCATION_NOTICE:?},\nand requests without a backend right then, are \
                 counted above and are no failures of this test"
            );
        }
        for (fault, reason) in &seen.skipped {
            println!("skipped: {} ({reason})", fault.name());
        }
        println!("one line of JSON per fault: {}", self.file.display());
    }

    /// `binding`: whether a missed target is a failure.
    pub fn targets(&self, targets: Vec<Target>, binding: bool) {
        for target in targets {
            let met = if target.met() { "ok" } else { "MISSED" };
            let (name, figure, limit, unit) =
                (&target.name, target.figure, target.limit, target.unit);
            println!(
                "{name:<60} {figure:>8.1} {unit:<2} limit {limit:>6} {unit:<2} {met:<6} ({})",
                target.detail
            );
            if binding && !target.met() {
                self.fail(format!("{name}: {figure:.1} {unit}, limit {limit}"));
            }
        }
    }

    pub fn end(&self) -> ExitCode {
        let failures = &self.seen().failures;
        if failures.is_empty() {
            println!("\ntest result: ok. 1 passed; 0 failed; 0 ignored");
            return ExitCode::SUCCESS;
        }
        println!("\n{} failures:", failures.len());
        for failure in failures {
            println!("  {failure}");
        }
        println!("\ntest result: FAILED. 0 passed; 1 failed; 0 ignored");
        ExitCode::FAILURE
    }
}

fn print_result(row: &Row) {
    let name = row.fault.name();
    let requests = &row.requests;
    let healed = match &row.healed {
        Ok(healed) => format!("well after {}", seconds(healed.after)),
        Err(_) => "NOT WELL".to_owned(),
    };
    println!(
        "{name}: {}, {healed}, {} of {} requests failed{}",
        seconds(row.lasted),
        requests.failed.len(),
        requests.sent,
        row.found
            .notes
            .iter()
            .map(|note| format!("; {note}"))
            .collect::<String>(),
    );
    if let Ok(healed) = &row.healed
        && healed.after > SLOW
    {
        let some: Vec<_> = healed.last.iter().take(3).collect();
        println!(
            "  problems until then: {some:?} and {} more",
            healed.last.len() - some.len()
        );
    }
}

/// The failures of the test, and those that are etcd's fault.
fn failures_of(row: &Row) -> (Vec<String>, Vec<String>) {
    let (stats, requests) = (&row.stats, &row.requests);
    let mut failures = row.found.failures.clone();
    if let Err(problems) = &row.healed {
        failures.extend(problems.iter().take(20).cloned());
    }
    failures.extend(stats.token_decreases.iter().take(5).cloned());
    failures.extend(stats.mixed.iter().take(5).cloned());
    // Direct consequences of etcd revoking leases that were being renewed are attributed to
    // etcd.
    let revoked = row.found.revoked;
    let mut caused_by_etcd = Vec::new();
    if stats.two_leaders > Duration::ZERO {
        let (time, who) = (
            stats.two_leaders,
            stats.two_leaders_names.as_deref().unwrap_or("?"),
        );
        let failure = format!("two leaders for {time:.1?}: {who}");
        if revoked > 0 && time < REVOCATION_NOTICE + row.stalled {
            caused_by_etcd.push(failure);
        } else {
            failures.push(failure);
        }
    }
    let (empty, others): (Vec<_>, Vec<_>) = requests
        .failed
        .iter()
        .partition(|reason| revoked > 0 && reason.contains(NO_BACKEND));
    if !empty.is_empty() {
        caused_by_etcd.push(format!("{} requests failed: {NO_BACKEND}", empty.len()));
    }
    let reasons: BTreeSet<_> = others.into_iter().take(20).collect();
    failures.extend(
        reasons
            .into_iter()
            .map(|reason| format!("a request failed: {reason}")),
    );
    (failures, caused_by_etcd)
}

fn line(name: &str, rows: &[&Row]) {
    let longest = |time: &dyn Fn(&Row) -> Option<Duration>| {
        let most = rows.iter().filter_map(|row| time(row)).max();
        most.map_or("-".to_owned(), seconds)
    };
    let sum = |of: &dyn Fn(&Row) -> usize| rows.iter().map(|row| of(row)).sum::<usize>();
    println!(
        "{name:<24} {:>3} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>5} {:>8} {:>9} {:>6} {:>8}",
        rows.len(),
        longest(&|row| Some(row.stats.two_leaders)),
        longest(&|row| Some(row.stats.no_leader)),
        sum(&|row| row.stats.token_decreases.len()),
        longest(&|row| row.found.gone_after),
        longest(&|row| Some(row.healed.as_ref().ok()?.after)),
        longest(&|row| Some(row.healed.as_ref().ok()?.balancer)),
        sum(&|row| count(row, "lost")),
        sum(&|row| count(row, "phantom")),
        sum(&|row| row.requests.sent as usize),
        sum(&|row| row.requests.failed.len()),
        longest(&|row| Some(row.requests.slowest)),
    );
}

/// How many nodes were still lost, or left over, when the time to recover was over.
fn count(row: &Row, what: &str) -> usize {
    let problems = row.healed.as_ref().err().into_iter().flatten();
    problems
        .filter(|problems| problems.contains(&format!(": {what} ")))
        .count()
}

fn seconds(time: Duration) -> String {
    if time.is_zero() {
        return "0".to_owned();
    }
    format!("{:.3} s", time.as_secs_f64())
}
