//! What others write, broken in every way: nodes, candidates, metadata, snapshot files, YAML, load
//! reports.
//!
//! ```text
//! fuzz [--inputs N] [--first S]          about N inputs from seed S on, and how to replay one that fails
//! fuzz --target NAME [...]               of one kind only
//! ```
//!
//! A seed fixes the target, the inputs and their order. Each is one that is valid, mutated, now and
//! then as it is, and now and then bytes by chance. First some attacks are tried that chance would not
//! find.

mod hostile;
mod input;
mod targets;

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

/// The longest that one input may keep its thread at work; how busy the machine is does not count.
const SLOWEST: Duration = Duration::from_secs(2);
/// The most that inputs may hold at a time, on all threads: one is 256 KiB at most, and a group has
/// 16 nodes.
const MOST_HELD: usize = 64 << 20;
/// How much larger the process may become after the first tenth of the run.
const MOST_GROWTH: usize = 64 << 20;
/// Fewer inputs of a kind say nothing about how many are accepted.
const ENOUGH: u64 = 2_000;

#[derive(Parser)]
struct Arguments {
    /// How many inputs, at least.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    inputs: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only this kind.
    #[arg(long, value_parser = target)]
    target: Option<&'static Target>,
    /// Prints each seed before it runs, on one thread: for what ends the whole process, such as a
    /// stack overflow.
    #[arg(long)]
    announce: bool,
}

fn target(name: &str) -> Result<&'static Target, String> {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.ok_or_else(|| format!("it is none of {}", names.join(", ")))
}

/// What has been fed.
#[derive(Default)]
pub(crate) struct Trace {
    inputs: u64,
    accepted: u64,
    slowest: Duration,
    slowest_seed: u64,
    longest: usize,
    seed: u64,
    /// The last input, and when it was begun.
    last: Vec<u8>,
    begun: Option<Duration>,
    base: usize,
}

impl Trace {
    /// This comes next.
    pub(crate) fn input(&mut self, bytes: &[u8]) {
        self.last.clear();
        self.last.extend_from_slice(bytes);
        self.longest = self.longest.max(bytes.len());
        self.begun = Some(worked());
    }

    /// It is through, and was taken in or refused.
    pub(crate) fn done(&mut self, accepted: bool) {
        self.inputs += 1;
        self.accepted += u64::from(accepted);
        // Of several at once the time counts for the first.
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
    /// Of the process, after a tenth of the run.
    early: Mutex<Option<usize>>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    catch_panics();
    if arguments.target.is_none() && catch_unwind(hostile::all).is_err() {
        println!("FAILED: {}", PANIC.take().unwrap_or_default());
        return ExitCode::FAILURE;
    }
    // What is made once is no growth.
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
            // The stack of a runtime's thread.
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
                    "FAILED: {least} to {most} % of {} have to be accepted",
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
    let parts: u64 = TARGETS.iter().map(|target| target.part).sum();
    // Not the generator that the target is given: it would say which inputs it starts with.
    let mut at = Rng::with_seed(seed ^ 0x5bd1_e995).u64(..parts);
    for (index, target) in TARGETS.iter().enumerate() {
        match at.checked_sub(target.part) {
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

/// Runs one seed. A panic is a failure, wherever it comes from.
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

/// How long this thread has been at work.
fn worked() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Bytes of the process in memory, where the system tells.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
