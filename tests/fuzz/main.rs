//! Feeds damaged inputs to everything that reads what others write: nodes, candidates, metadata,
//! snapshot files, YAML, load reports, PROXY headers, and the connections of clients.
//!
//! ```text
//! fuzz [--inputs N] [--first S]          about N inputs, beginning with seed S
//! fuzz --target NAME [...]               inputs of one kind only
//! ```
//!
//! A seed determines the target, the inputs and their order; a failure prints how to replay its seed.
//! Most inputs are mutations of valid ones, some are valid, and some are random bytes. Before them come
//! some attacks that chance would not find.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

mod corpora;
mod front;
mod hostile;
mod mutate;
mod targets;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use fastrand::Rng;
use peak_alloc::PeakAlloc;
use rustix::time::{ClockId, clock_gettime};
use targets::{TARGETS, Target};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The maximum CPU time for one input.
const SLOWEST: Duration = Duration::from_secs(2);
/// The maximum memory that inputs may hold at a time, on all threads: an input has at most 256 KiB, and
/// a group 16 nodes.
const MOST_HELD: usize = 64 << 20;
/// The maximum growth of the process after the first tenth of the run.
const MOST_GROWTH: usize = 64 << 20;
/// With fewer inputs of a kind the share of accepted ones is not significant.
const ENOUGH: u64 = 2_000;

#[derive(Parser)]
struct Arguments {
    /// The minimum number of inputs.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    inputs: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Feeds only this kind of input.
    #[arg(long, value_parser = target)]
    target: Option<&'static Target>,
    /// Prints each seed before it runs, and uses one thread: to find inputs that abort the process, such
    /// as by a stack overflow.
    #[arg(long)]
    announce: bool,
}

fn target(name: &str) -> Result<&'static Target, String> {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.ok_or_else(|| format!("it is not one of {}", names.join(", ")))
}

/// The inputs so far.
#[derive(Default)]
pub(crate) struct Trace {
    inputs: u64,
    accepted: u64,
    slowest: Duration,
    slowest_seed: u64,
    longest: usize,
    seed: u64,
    /// The last input, and the CPU time of the thread when it began.
    last: Vec<u8>,
    begun: Option<Duration>,
    base: usize,
}

impl Trace {
    /// Begins the next input.
    pub(crate) fn input(&mut self, bytes: &[u8]) {
        self.last.clear();
        self.last.extend_from_slice(bytes);
        self.longest = self.longest.max(bytes.len());
        self.begun = Some(worked());
    }

    /// Ends the input, which was accepted or refused.
    pub(crate) fn done(&mut self, accepted: bool) {
        self.inputs += 1;
        self.accepted += u64::from(accepted);
        // The time of several inputs at once counts for the first.
        let took = self
            .begun
            .take()
            .map(|begun| worked().saturating_sub(begun));
        let took = took.unwrap_or_default();
        if took > self.slowest {
            self.slowest = took;
            self.slowest_seed = self.seed;
        }
        assert!(
            took <= SLOWEST,
            "it took {took:?}, at most {SLOWEST:?} allowed"
        );
        let held = MEMORY.peak_usage().saturating_sub(self.base);
        assert!(
            held <= MOST_HELD,
            "{held} bytes are held, at most {MOST_HELD} allowed"
        );
    }
}

struct Failure {
    seed: u64,
    target: &'static str,
    message: String,
    input: String,
}

struct Run<'a> {
    arguments: &'a Arguments,
    base: usize,
    next: AtomicU64,
    inputs: AtomicU64,
    stop: AtomicBool,
    traces: Mutex<[Trace; TARGETS.len()]>,
    failure: Mutex<Option<Failure>>,
    /// The memory of the process after a tenth of the run.
    early: Mutex<Option<usize>>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    catch_panics();
    if arguments.target.is_none() && catch_unwind(hostile::all).is_err() {
        println!("FAILED: {}", PANIC.take().unwrap_or_default());
        return ExitCode::FAILURE;
    }
    // Run once before measuring, because what is created only once is no growth.
    for target in &TARGETS {
        if arguments.target.is_none_or(|only| only.name == target.name)
            && let Some(failure) = one(target, arguments.first, &mut Trace::default())
        {
            return failed(&failure);
        }
    }
    let base = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let run = Run {
        arguments: &arguments,
        base,
        next: AtomicU64::new(0),
        inputs: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        traces: Mutex::default(),
        failure: Mutex::default(),
        early: Mutex::default(),
    };
    let start = Instant::now();
    let threads = match arguments.announce {
        true => 1,
        false => std::thread::available_parallelism().map_or(1, usize::from),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            // The stack size of a runtime's thread.
            let thread = std::thread::Builder::new().stack_size(2 << 20);
            thread.spawn_scoped(scope, || run.work()).unwrap();
        }
    });
    run.conclude(start.elapsed())
}

impl Run<'_> {
    fn work(&self) {
        let mut traces: [Trace; TARGETS.len()] = Default::default();
        let Arguments { first, inputs, .. } = *self.arguments;
        while !self.stop.load(Ordering::Relaxed) && self.inputs.load(Ordering::Relaxed) < inputs {
            let seed = first.wrapping_add(self.next.fetch_add(1, Ordering::Relaxed));
            let (index, target) = match self.arguments.target {
                Some(target) => (0, target),
                None => chosen(seed),
            };
            if self.arguments.announce {
                println!("seed {seed}, target {}", target.name);
            }
            let trace = &mut traces[index];
            trace.base = self.base;
            let before = trace.inputs;
            if let Some(failure) = one(target, seed, trace) {
                self.stop.store(true, Ordering::Relaxed);
                let mut least = self.failure.lock().unwrap();
                if least.as_ref().is_none_or(|least| seed < least.seed) {
                    *least = Some(failure);
                }
                break;
            }
            let new = trace.inputs - before;
            let all = self.inputs.fetch_add(new, Ordering::Relaxed) + new;
            if all >= inputs / 10 && all - new < inputs / 10 {
                *self.early.lock().unwrap() = resident();
            }
        }
        let mut all = self.traces.lock().unwrap();
        for (all, own) in all.iter_mut().zip(traces) {
            all.inputs += own.inputs;
            all.accepted += own.accepted;
            all.longest = all.longest.max(own.longest);
            if own.slowest > all.slowest {
                all.slowest = own.slowest;
                all.slowest_seed = own.slowest_seed;
            }
        }
    }

    fn conclude(self, took: Duration) -> ExitCode {
        let traces = self.traces.into_inner().unwrap();
        let inputs: u64 = traces.iter().map(|trace| trace.inputs).sum();
        let seeds = self.next.into_inner();
        println!(
            "fuzz: {inputs} inputs of {seeds} seeds from {} on, in {:.1} s, {:.0} per second",
            self.arguments.first,
            took.as_secs_f64(),
            inputs as f64 / took.as_secs_f64(),
        );
        let mut is_fine = true;
        for (index, trace) in traces.iter().enumerate() {
            let target = match self.arguments.target {
                Some(target) => target,
                None => &TARGETS[index],
            };
            if trace.inputs == 0 {
                continue;
            }
            let accepted = trace.accepted as f64 / trace.inputs as f64 * 100.0;
            println!(
                "  {:<9} {:>9} inputs, {accepted:>4.1} % accepted, longest {:>6} bytes, slowest {:>6.1} ms (seed {})",
                target.name,
                trace.inputs,
                trace.longest,
                trace.slowest.as_secs_f64() * 1e3,
                trace.slowest_seed,
            );
            let (least, most) = target.accepted;
            if trace.inputs >= ENOUGH && !(least..=most).contains(&accepted) {
                println!(
                    "FAILED: {least} to {most} % of {} should be accepted",
                    target.name
                );
                is_fine = false;
            }
        }
        let held = MEMORY.peak_usage().saturating_sub(self.base);
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        println!("  memory: at most {:.1} MiB held at a time", mib(held));
        if let (Some(early), Some(late)) = (self.early.into_inner().unwrap(), resident()) {
            let growth = late.saturating_sub(early);
            println!(
                "  the process: {:.1} MiB after a tenth of the run, {:.1} MiB at its end",
                mib(early),
                mib(late)
            );
            if growth > MOST_GROWTH {
                println!("FAILED: it grew by {:.1} MiB", mib(growth));
                is_fine = false;
            }
        }
        if let Some(failure) = self.failure.into_inner().unwrap() {
            return failed(&failure);
        }
        if is_fine {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// The target of a seed.
fn chosen(seed: u64) -> (usize, &'static Target) {
    let shares: u64 = TARGETS.iter().map(|target| target.share).sum();
    // Not the generator of the target: the choice would depend on its first inputs.
    let mut at = Rng::with_seed(seed ^ 0x5bd1_e995).u64(..shares);
    for (index, target) in TARGETS.iter().enumerate() {
        match at.checked_sub(target.share) {
            None => return (index, target),
            Some(rest) => at = rest,
        }
    }
    (0, &TARGETS[0])
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| PANIC.set(Some(panic.to_string()))));
}

/// Runs one seed. Any panic is a failure.
fn one(target: &Target, seed: u64, trace: &mut Trace) -> Option<Failure> {
    trace.seed = seed;
    trace.begun = None;
    let feed = AssertUnwindSafe(|| (target.feed)(&mut Rng::with_seed(seed), trace));
    catch_unwind(feed).err()?;
    let shown = &trace.last[..trace.last.len().min(4_000)];
    let more = match trace.last.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more bytes"),
    };
    Some(Failure {
        seed,
        target: target.name,
        message: PANIC.take().unwrap_or_default(),
        input: format!("{}{more}", shown.escape_ascii()),
    })
}

fn failed(failure: &Failure) -> ExitCode {
    let Failure {
        seed,
        target,
        message,
        input,
    } = failure;
    println!("FAILED: seed {seed}, target {target}: {message}");
    println!("the input: {input}");
    println!("replay it with: make fuzz INPUTS=1 FIRST={seed} TARGET={target}");
    println!("which runs: fuzz --first {seed} --inputs 1 --target {target}");
    ExitCode::FAILURE
}

/// The CPU time of this thread.
fn worked() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The resident memory of the process in bytes, if the system reports it.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
