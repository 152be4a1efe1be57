//! The house as `CONTRIBUTING.md` describes it: which room is on which floor, and how long a file
//! and a function may be. Read from the sources.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

mod graph;
mod limits;
mod source;

use std::collections::BTreeMap;
use std::path::PathBuf;

use graph::{Graph, cycles};
use source::Crate;

/// The rooms of `src` and the floor of each. A file imports from lower floors and from its own room
/// only; on floor 0 rooms are plain values, which may be made of each other.
const FLOORS: &[(u8, &[&str])] = &[
    (
        0,
        &[
            "backoff",
            "error",
            "pem",
            "ids",
            "keys",
            "lifecycle",
            "load_report",
            "metadata",
            "node",
            "opaque",
            "private_file",
            "signal",
            "supervise",
            "sync",
            "validate",
        ],
    ),
    (1, &["store"]),
    (2, &["metrics", "view"]),
    (3, &["balance", "discovery", "worker"]),
    (4, &["cluster"]),
    (5, &["config", "operator"]),
    (6, &["pingora"]),
    (7, &["proxy"]),
    (8, &["admin"]),
];

/// Documentation and what the crate shows at its root: they name everything.
const ABOVE_ALL: &[&str] = &["lib", "guide"];

fn floor(room: &str) -> Option<u8> {
    let mut floors = FLOORS.iter();
    floors.find_map(|(floor, rooms)| rooms.contains(&room).then_some(*floor))
}

/// `src/store/etcd/dial.rs` is in the room `store`.
fn room(file: &str) -> &str {
    let inside = file.strip_prefix("src/").unwrap_or(file);
    let first = inside.split('/').next().unwrap_or(inside);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// What is wrong with the imports of a crate whose rooms are on [`FLOORS`].
fn upward_imports(graph: &Graph) -> Vec<String> {
    let mut wrong = Vec::new();
    for (from, to) in graph.edges() {
        let (upper, lower) = (room(from), room(to));
        if upper == lower || ABOVE_ALL.contains(&upper) {
            continue;
        }
        let floors = (floor(upper), floor(lower));
        let is_good = match floors {
            (Some(above), Some(below)) => below < above || (above == 0 && below == 0),
            _ => false,
        };
        if !is_good {
            let named = |floor: Option<u8>| {
                floor.map_or("on no floor".to_owned(), |n| format!("floor {n}"))
            };
            wrong.push(format!(
                "{from} ({}) imports {to} ({})",
                named(floors.0),
                named(floors.1)
            ));
        }
    }
    wrong
}

fn loops(graph: &Graph) -> Vec<String> {
    let described = cycles(graph).into_iter();
    described
        .map(|files| format!("a loop: {} -> {}", files.join(" -> "), files[0]))
        .collect()
}

/// Where the sources are: cargo says so when it runs a test.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(PathBuf::new, PathBuf::from)
}

fn library() -> Crate {
    Crate::read(&root(), "src/lib.rs").unwrap()
}

#[test]
fn every_room_is_on_a_floor() {
    let library = library();
    let mut rooms: Vec<&str> = library.files().map(room).collect();
    rooms.dedup();
    let homeless: Vec<_> = rooms
        .iter()
        .filter(|room| floor(room).is_none() && !ABOVE_ALL.contains(room))
        .collect();
    assert!(homeless.is_empty(), "on no floor: {homeless:?}");
    let listed = FLOORS.iter().flat_map(|(_, rooms)| *rooms);
    let gone: Vec<_> = listed.filter(|room| !rooms.contains(room)).collect();
    assert!(gone.is_empty(), "on a floor, but not in src: {gone:?}");
}

#[test]
fn no_file_imports_from_a_higher_floor() {
    let wrong = upward_imports(&Graph::of(&library()));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_files_import_each_other() {
    let graph = Graph::of(&library());
    // Nothing found in nothing proves nothing.
    assert!(graph.edges().count() > 200, "the graph is too small");
    let wrong = loops(&graph);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_files_of_a_benchmark_import_each_other() {
    for main in ["benches/routing_quality/main.rs", "benches/scale/main.rs"] {
        let wrong = loops(&Graph::of(&Crate::read(&root(), main).unwrap()));
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// Prints the longest files and functions with `--nocapture`.
#[test]
fn files_and_functions_are_short() {
    let library = library();
    let mut wrong = Vec::new();
    let mut files: Vec<_> = library.sources().map(limits::file_lines).collect();
    files.sort_by_key(|(_, lines)| std::cmp::Reverse(*lines));
    let mut functions: Vec<_> = library.sources().flat_map(limits::function_lines).collect();
    functions.sort_by_key(|function| std::cmp::Reverse(function.1));
    println!(
        "the longest files (at most {} lines of code):",
        limits::FILE
    );
    for (file, lines) in files.iter().take(10) {
        println!("{lines:>5} {file}");
    }
    println!("the longest functions (at most {}):", limits::FUNCTION);
    for (function, lines) in functions.iter().take(10) {
        println!("{lines:>5} {function}");
    }
    let long_files = files.iter().filter(|(_, lines)| *lines > limits::FILE);
    wrong.extend(long_files.map(|(file, lines)| format!("{file} has {lines} lines of code")));
    let long_functions = functions
        .iter()
        .filter(|(_, lines)| *lines > limits::FUNCTION);
    wrong.extend(long_functions.map(|(name, lines)| format!("{name} has {lines} lines")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is in `tests/mutants` is put into a copy, never into what ships.
#[test]
fn no_deliberate_bug_is_in_the_sources() {
    for source in library().sources() {
        for trace in ["mutants::", "bugs::", "Bug::"] {
            assert!(!source.text.contains(trace), "{}: {trace}", source.file);
        }
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent: Vec<_> = library()
        .sources()
        .filter(|source| !source.text.trim_start().starts_with("//!"))
        .map(|source| source.file.clone())
        .collect();
    assert!(silent.is_empty(), "without //!: {silent:?}");
}

/// The checks themselves, on crates of a few lines.
mod checks {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Crate {
        let files: BTreeMap<String, String> = files
            .iter()
            .map(|(file, text)| ((*file).to_owned(), (*text).to_owned()))
            .collect();
        Crate::parse("src/lib.rs", &|file| files.get(file).cloned()).unwrap()
    }

    #[test]
    fn an_upward_import_is_found_with_both_files() {
        let wrong = upward_imports(&Graph::of(&of(&[
            ("src/lib.rs", "mod store; mod worker;"),
            ("src/store/mod.rs", "mod types;"),
            ("src/store/types.rs", "use crate::worker::Node;"),
            ("src/worker.rs", "pub struct Node;"),
        ])));
        assert_eq!(
            wrong,
            ["src/store/types.rs (floor 1) imports src/worker.rs (floor 3)"]
        );
    }

    #[test]
    fn siblings_on_one_floor_do_not_know_each_other() {
        let graph = Graph::of(&of(&[
            ("src/lib.rs", "mod worker; mod balance;"),
            ("src/worker.rs", "fn f() { crate::balance::pick(); }"),
            ("src/balance.rs", "pub fn pick() {}"),
        ]));
        assert_eq!(upward_imports(&graph).len(), 1);
    }

    #[test]
    fn a_loop_is_found_through_reexports_and_macros() {
        let graph = Graph::of(&of(&[
            ("src/lib.rs", "mod store;"),
            (
                "src/store/mod.rs",
                "mod a; mod b; pub use a::A; pub use self::b::B as C;",
            ),
            ("src/store/a.rs", "use super::C; pub struct A(C);"),
            (
                "src/store/b.rs",
                "pub struct B; fn f() { println!(\"{:?}\", crate::store::A) }",
            ),
        ]));
        assert_eq!(
            loops(&graph),
            ["a loop: src/store/a.rs -> src/store/b.rs -> src/store/a.rs"]
        );
    }

    #[test]
    fn a_loop_through_a_parent_module_is_found() {
        let graph = Graph::of(&of(&[
            ("src/lib.rs", "mod worker;"),
            (
                "src/worker/mod.rs",
                "mod run; struct Shared; fn f() { run::go(); }",
            ),
            ("src/worker/run.rs", "use super::Shared; pub fn go() {}"),
        ]));
        assert_eq!(loops(&graph).len(), 1);
    }

    #[test]
    fn tests_may_import_anything() {
        let graph = Graph::of(&of(&[
            ("src/lib.rs", "mod store; mod worker;"),
            (
                "src/store.rs",
                "#[cfg(test)] mod tests { use crate::worker::Node; }",
            ),
            ("src/worker.rs", "pub struct Node; use crate::store;"),
        ]));
        assert!(upward_imports(&graph).is_empty());
        assert!(loops(&graph).is_empty());
    }

    #[test]
    fn lines_of_code_are_neither_comments_nor_blank_nor_tests() {
        let library = of(&[(
            "src/lib.rs",
            "//! Docs.\n\n/// More.\nfn f() {\n    // Why.\n    g(\n        1,\n    );\n}\n\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n",
        )]);
        let source = library.sources().next().unwrap();
        assert_eq!(limits::file_lines(source).1, 5);
        assert_eq!(
            limits::function_lines(source),
            [("src/lib.rs: f".to_owned(), 3)]
        );
    }
}
