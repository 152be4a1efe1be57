//! Which file imports which. A path through a re-export leads to the file that defines the item.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::Item;

use super::source::{Crate, ModulePath, Name, attributes, below, is_test};

/// For each file those that it imports from.
#[derive(Default)]
pub struct Graph(BTreeMap<String, BTreeSet<String>>);

impl Graph {
    pub fn of(all: &Crate) -> Self {
        let mut graph = Self::default();
        for (path, module) in &all.modules {
            let imported = module.names.values().filter_map(|name| match name {
                Name::Import(import) => Some(import),
                _ => None,
            });
            for import in imported.chain(&module.globs) {
                graph.add(&module.file, all.find(path, import));
            }
        }
        for source in all.sources() {
            // The module whose file this is: the one with the shortest path.
            let modules = all
                .modules
                .iter()
                .filter(|(_, module)| module.file == source.file);
            let path = modules.map(|(path, _)| path).min_by_key(|path| path.len());
            if let Some(path) = path {
                graph.uses(all, &source.file, path, &source.items);
            }
        }
        graph
    }

    /// Paths that are written out where they are used, in macros too.
    fn uses(&mut self, all: &Crate, file: &str, path: &ModulePath, items: &[Item]) {
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            match item {
                Item::Use(_) => {}
                Item::Mod(inner) => {
                    if let Some((_, items)) = &inner.content {
                        self.uses(all, file, &below(path, &inner.ident.to_string()), items);
                    }
                }
                item => {
                    for used in paths(item.to_token_stream()) {
                        self.add(file, all.find(path, &used));
                    }
                }
            }
        }
    }

    fn add(&mut self, from: &str, to: Option<&str>) {
        if let Some(to) = to.filter(|to| *to != from) {
            self.0
                .entry(from.to_owned())
                .or_default()
                .insert(to.to_owned());
        }
    }

    /// (importing file, imported file)
    pub fn edges(&self) -> impl Iterator<Item = (&str, &str)> {
        let edges = self.0.iter();
        edges.flat_map(|(from, to)| to.iter().map(|to| (from.as_str(), to.as_str())))
    }
}

impl Crate {
    /// The file that defines what this path names, seen from this module. `None` for other crates.
    fn find(&self, from: &ModulePath, path: &[String]) -> Option<&str> {
        self.resolve(from, path, 0)
    }

    fn resolve(&self, from: &ModulePath, path: &[String], depth: usize) -> Option<&str> {
        if depth > 20 {
            return None;
        }
        let (first, mut rest) = path.split_first()?;
        let mut at: ModulePath = match first.as_str() {
            "crate" => Vec::new(),
            "self" => from.clone(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            "" => return None,
            name => match self.modules.get(from)?.names.get(name)? {
                Name::Module(module) => module.clone(),
                Name::Item => return Some(&self.modules.get(from)?.file),
                // `use a::b` in this very module: what is asked for is behind it.
                Name::Import(import) if import.as_slice() != path => {
                    let behind: Vec<String> = import.iter().chain(rest).cloned().collect();
                    return self.resolve(from, &behind, depth + 1);
                }
                // Named like the crate that it comes from.
                Name::Import(_) => return None,
            },
        };
        while let Some((name, behind)) = rest.split_first() {
            let module = self.modules.get(&at)?;
            match module.names.get(name) {
                _ if name == "super" => drop(at.pop()),
                Some(Name::Module(inner)) => at.clone_from(inner),
                Some(Name::Item) => return Some(&module.file),
                Some(Name::Import(import)) => {
                    let path: Vec<String> = import.iter().chain(behind).cloned().collect();
                    return self.resolve(&at, &path, depth + 1);
                }
                None => {
                    let through = module.globs.iter().find_map(|glob| {
                        let path: Vec<String> = glob.iter().chain(rest).cloned().collect();
                        self.resolve(&at, &path, depth + 1)
                    });
                    // Made by a macro of that file, or an associated item.
                    return through.or(Some(&module.file));
                }
            }
            rest = behind;
        }
        Some(&self.modules.get(&at)?.file)
    }
}

/// Every `a::b::c` in the tokens.
fn paths(tokens: TokenStream) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut current: Vec<String> = Vec::new();
    let mut colons = 0;
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => {
                if colons != 2 {
                    found.push(std::mem::take(&mut current));
                }
                current.push(ident.to_string());
                colons = 0;
            }
            TokenTree::Punct(punct) if punct.as_char() == ':' => {
                colons += 1;
                if colons == 2 && current.is_empty() {
                    // `::name` is another crate.
                    current.push(String::new());
                }
            }
            TokenTree::Group(group) => {
                found.push(std::mem::take(&mut current));
                colons = 0;
                // `pub(in crate::balance)` says who may import, and imports nothing.
                let starts_with_in = matches!(group.stream().into_iter().next(),
                    Some(TokenTree::Ident(first)) if first == "in");
                if !starts_with_in {
                    found.extend(paths(group.stream()));
                }
            }
            _ => {
                found.push(std::mem::take(&mut current));
                colons = 0;
            }
        }
    }
    found.push(current);
    found.retain(|path| path.len() > 1);
    found
}

/// For each group of files that import each other, the shortest way round: `[a, b]` if `a` imports
/// `b` and `b` imports `a`.
pub fn cycles(graph: &Graph) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut round: Vec<Vec<String>> = graph
        .0
        .keys()
        .filter_map(|file| way_back(graph, file))
        .collect();
    round.sort_by_key(Vec::len);
    for cycle in round {
        if !found.iter().flatten().any(|file| cycle.contains(file)) {
            found.push(cycle);
        }
    }
    found
}

/// The shortest way from a file back to itself, breadth first.
fn way_back(graph: &Graph, start: &str) -> Option<Vec<String>> {
    let mut seen = BTreeSet::new();
    let mut ways = VecDeque::from([vec![start]]);
    while let Some(way) = ways.pop_front() {
        for next in graph.0.get(*way.last()?).into_iter().flatten() {
            if next == start {
                return Some(way.into_iter().map(str::to_owned).collect());
            }
            if seen.insert(next.as_str()) {
                let mut longer = way.clone();
                longer.push(next);
                ways.push_back(longer);
            }
        }
    }
    None
}
