//! A copy of the tree, and the bugs in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::mutant::{Mutant, Replacement};

/// What `mutants::active` is: one bug for the whole process, named by the environment.
const SWITCH: &str = r#"//! Which deliberate bug is in.

use std::sync::OnceLock;

/// Whether this process is to have this bug.
pub(crate) fn active(bug: &str) -> bool {
    static ACTIVE: OnceLock<Option<String>> = OnceLock::new();
    let active = ACTIVE.get_or_init(|| std::env::var("MUTANT").ok());
    active.as_deref() == Some(bug)
}
"#;

pub struct Tree {
    pub root: PathBuf,
}

impl Tree {
    /// A fresh copy of what cargo needs, in the target directory.
    pub fn of(root: &Path, target: &Path) -> Result<Self, String> {
        let copy = target.join("mutants");
        for part in [
            "src",
            "tests",
            "benches",
            "examples",
            "config",
            "Cargo.toml",
            "Cargo.lock",
            "README.md",
        ] {
            let (from, to) = (root.join(part), copy.join(part));
            let copied = refresh(&from, &to);
            copied.map_err(|error| format!("copying {}: {error}", from.display()))?;
        }
        Ok(Self { root: copy })
    }
}

/// Makes `to` what `from` is, without touching files that are the same already: cargo goes by their
/// times.
fn refresh(from: &Path, to: &Path) -> std::io::Result<()> {
    if from.is_dir() {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(to)? {
            let old = entry?;
            if from.join(old.file_name()).exists() {
                continue;
            }
            if old.path().is_dir() {
                std::fs::remove_dir_all(old.path())?;
            } else {
                std::fs::remove_file(old.path())?;
            }
        }
        for entry in std::fs::read_dir(from)? {
            let name = entry?.file_name();
            refresh(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    write(to, &std::fs::read(from)?)
}

fn write(to: &Path, content: &[u8]) -> std::io::Result<()> {
    match std::fs::read(to) {
        Ok(old) if old == content => Ok(()),
        _ => std::fs::write(to, content),
    }
}

/// Replaces the texts of all bugs. Each has to be found exactly once, and none in another.
pub fn put_in(tree: &Tree, mutants: &[Mutant]) -> Result<(), String> {
    let mut files: BTreeMap<&str, Vec<(&str, &Replacement)>> = BTreeMap::new();
    for mutant in mutants {
        for change in &mutant.changes {
            let changes = files.entry(&change.file).or_default();
            changes.push((&mutant.bug, change));
        }
    }
    for (file, changes) in files {
        let path = tree.root.join(file);
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{file}: {error}"))?;
        let text = replaced(&text, &changes).map_err(|error| format!("{file}: {error}"))?;
        std::fs::write(&path, text).map_err(|error| format!("{file}: {error}"))?;
    }
    let library = tree.root.join("src/lib.rs");
    let text = std::fs::read_to_string(&library).map_err(|error| format!("src/lib.rs: {error}"))?;
    let text = format!("{text}\nmod mutants;\n");
    let written = std::fs::write(&library, text)
        .and_then(|()| std::fs::write(tree.root.join("src/mutants.rs"), SWITCH));
    written.map_err(|error| format!("src/mutants.rs: {error}"))
}

fn replaced(text: &str, changes: &[(&str, &Replacement)]) -> Result<String, String> {
    let mut places = Vec::new();
    for (bug, change) in changes {
        let found: Vec<usize> = text.match_indices(&change.find).map(|(at, _)| at).collect();
        match found[..] {
            [at] => places.push((at, *bug, *change)),
            _ => {
                let times = found.len();
                return Err(format!(
                    "the text of {bug} is there {times} times, not once: {:?}",
                    change.find
                ));
            }
        }
    }
    places.sort_by_key(|(at, _, _)| *at);
    let mut result = String::with_capacity(text.len());
    let mut done = 0;
    for (at, bug, change) in places {
        let between = text
            .get(done..at)
            .ok_or_else(|| format!("{bug} overlaps another bug"))?;
        result.push_str(between);
        result.push_str(&change.replace);
        done = at + change.find.len();
    }
    result.push_str(&text[done..]);
    Ok(result)
}
