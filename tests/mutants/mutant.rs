//! A deliberate bug, as its file describes it.

use std::path::Path;

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// Its name. A bug that needs changes in several files may have several files here.
    pub bug: String,
    /// What is wrong with it.
    #[serde(rename = "what")]
    _what: String,
    #[serde(rename = "change")]
    pub changes: Vec<Replacement>,
}

/// A text of the sources, whole lines, and what takes its place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replacement {
    pub file: String,
    pub find: String,
    pub replace: String,
}

/// Every bug of this folder, in the order of names.
pub fn read_all(folder: &Path) -> Result<Vec<Mutant>, String> {
    let entries =
        std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut mutants = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| named(&error))?;
        let mutant: Mutant = toml::from_str(&text).map_err(|error| named(&error))?;
        for change in &mutant.changes {
            let named_here = change.replace.contains(&format!("\"{}\"", mutant.bug));
            if !named_here || !change.replace.contains("crate::mutants::active") {
                return Err(named(&"a replacement is not behind crate::mutants::active"));
            }
        }
        mutants.push(mutant);
    }
    if mutants.is_empty() {
        return Err(format!("{}: no bugs", folder.display()));
    }
    mutants.sort_by(|a, b| a.bug.cmp(&b.bug));
    Ok(mutants)
}
