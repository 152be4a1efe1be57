//! Checks the checker: the simulation has to catch each deliberate bug of this folder.
//!
//! A bug is a file `*.toml`: its name, what is wrong with it, and texts of the sources to replace.
//! They are put into a copy of the tree, each behind a switch, so that one build serves all of them.
//! Nothing of this is in what ships.
//!
//! ```text
//! mutants [--seeds N] [--first S] [--only NAME]
//! ```

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

mod copy;
mod mutant;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use clap::Parser;

use copy::{Tree, put_in};
use mutant::read_all;

#[derive(Parser)]
struct Arguments {
    /// How many seeds each bug is given to be caught by.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only this bug.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(missed) => {
            println!("FAILED: {missed} bugs were not caught");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("FAILED: {error}");
            ExitCode::from(2)
        }
    }
}

/// Returns how many bugs were not caught.
fn run(arguments: &Arguments) -> Result<usize, String> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let root = root.ok_or("cargo has to run this: make mutants")?;
    let mutants = read_all(&root.join("tests/mutants"))?;
    let target = target(&root)?;
    let tree = Tree::of(&root, &target)?;
    put_in(&tree, &mutants)?;
    let simulation = build(&tree, &target)?;
    // Without a bug the copy is the original.
    if let Some(failure) = simulate(&simulation, None, arguments)? {
        return Err(format!("the simulation fails without any bug: {failure}"));
    }
    let mut names: Vec<&str> = mutants.iter().map(|mutant| mutant.bug.as_str()).collect();
    names.dedup();
    if let Some(only) = &arguments.only {
        names.retain(|name| name == only);
        if names.is_empty() {
            return Err(format!("there is no bug {only:?}"));
        }
    }
    let mut missed = 0;
    for name in &names {
        let start = Instant::now();
        let caught = simulate(&simulation, Some(name), arguments)?;
        let took = start.elapsed().as_secs_f64();
        match caught {
            Some(failure) => {
                let failure: String = failure.chars().take(120).collect();
                println!("caught in {took:>5.1} s: {name}: {failure}");
            }
            None => {
                missed += 1;
                println!(
                    "NOT CAUGHT by {} seeds in {took:.1} s: {name}",
                    arguments.seeds
                );
            }
        }
    }
    if missed == 0 {
        println!("all {} bugs were caught", names.len());
    }
    Ok(missed)
}

/// Cargo's target directory, so that dependencies are not built a second time.
fn target(root: &Path) -> Result<PathBuf, String> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(root)
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"]);
    let output = cargo
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let target = metadata["target_directory"].as_str();
    Ok(PathBuf::from(
        target.ok_or("cargo metadata names no target directory")?,
    ))
}

/// Builds the simulation of the copy. Returns the program.
fn build(tree: &Tree, target: &Path) -> Result<PathBuf, String> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(&tree.root)
        .env("CARGO_TARGET_DIR", target)
        .args([
            "test",
            "--profile=bench",
            // Dependencies as they are. The copy is built for a minute of simulation: optimising it all takes longer.
            "--config=profile.bench.package.pingora-etcd.opt-level=1",
            "--all-features",
            "--test=simulation",
        ])
        .args(["--no-run", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit());
    // What cargo tells this program about its package. Build scripts look at it, and dependencies
    // would be built again for each of the two packages in turn.
    let inherited = std::env::vars_os().map(|(name, _)| name);
    for name in inherited.filter(|name| is_of_package(&name.to_string_lossy())) {
        cargo.env_remove(name);
    }
    let output = cargo
        .output()
        .map_err(|error| format!("cargo test: {error}"))?;
    if !output.status.success() {
        return Err("the copy with the bugs does not compile".to_owned());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == "simulation";
        message["executable"]
            .as_str()
            .filter(|_| is_it)
            .map(PathBuf::from)
    });
    program.ok_or_else(|| "cargo built no simulation".to_owned())
}

fn is_of_package(variable: &str) -> bool {
    let of_package = [
        "CARGO_BIN",
        "CARGO_CRATE",
        "CARGO_MANIFEST",
        "CARGO_PKG",
        "CARGO_TARGET_TMP",
    ];
    of_package.iter().any(|start| variable.starts_with(start))
}

/// Runs seeds with this bug. Returns what the simulation found, if it found anything.
fn simulate(
    program: &Path,
    bug: Option<&str>,
    arguments: &Arguments,
) -> Result<Option<String>, String> {
    let mut simulation = Command::new(program);
    simulation
        .args(["--seeds", &arguments.seeds.to_string()])
        .args(["--first", &arguments.first.to_string()])
        .env_remove("MUTANT")
        .stderr(Stdio::null());
    if let Some(bug) = bug {
        simulation.env("MUTANT", bug);
    }
    let output = simulation
        .output()
        .map_err(|error| format!("the simulation: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let failure = text.lines().find_map(|line| line.strip_prefix("FAILED: "));
    match (output.status.success(), failure) {
        (true, None) => Ok(None),
        (false, Some(failure)) => Ok(Some(failure.to_owned())),
        // It has to say what it found: a crash of the simulation is not a bug that was caught.
        _ => Err(format!(
            "the simulation ended with {}: {text}",
            output.status
        )),
    }
}
