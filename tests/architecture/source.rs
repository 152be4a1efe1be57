//! A crate's sources, parsed: its modules, what each defines and imports.

use std::collections::BTreeMap;
use std::path::Path;

use syn::{Attribute, Item, ItemMod, UseTree};

/// A module's place in the crate: `crate::store::etcd` is `["store", "etcd"]`.
pub type ModulePath = Vec<String>;

/// One file.
pub struct Source {
    pub file: String,
    pub text: String,
    /// Without what is compiled for tests only.
    pub items: Vec<Item>,
}

/// A name that a module has.
pub enum Name {
    /// Defined here.
    Item,
    /// A module below this one.
    Module(ModulePath),
    /// Imported: a path as it was written.
    Import(Vec<String>),
}

/// One module, in a file of its own or inside one.
pub struct Module {
    pub file: String,
    pub names: BTreeMap<String, Name>,
    /// `use path::*`.
    pub globs: Vec<Vec<String>>,
}

/// Every module of a crate, and every file.
pub struct Crate {
    pub modules: BTreeMap<ModulePath, Module>,
    sources: Vec<Source>,
}

type Read<'r> = dyn Fn(&str) -> Option<String> + 'r;

impl Crate {
    pub fn read(root: &Path, main: &str) -> Result<Self, String> {
        Self::parse(main, &|file| std::fs::read_to_string(root.join(file)).ok())
    }

    pub fn parse(main: &str, read: &Read<'_>) -> Result<Self, String> {
        let mut all = Self {
            modules: BTreeMap::new(),
            sources: Vec::new(),
        };
        let (folder, _) = main.rsplit_once('/').unwrap_or(("", main));
        all.file(main, folder, Vec::new(), read)?;
        Ok(all)
    }

    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|source| source.file.as_str())
    }

    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        self.sources.iter()
    }

    fn file(
        &mut self,
        file: &str,
        folder: &str,
        path: ModulePath,
        read: &Read<'_>,
    ) -> Result<(), String> {
        let text = read(file).ok_or_else(|| format!("{file} cannot be read"))?;
        let parsed = syn::parse_file(&text).map_err(|error| format!("{file}: {error}"))?;
        let items: Vec<Item> = parsed
            .items
            .into_iter()
            .filter(|item| !is_test(attributes(item)))
            .collect();
        self.module(file, folder, &path, &items, read)?;
        self.sources.push(Source {
            file: file.to_owned(),
            text,
            items,
        });
        Ok(())
    }

    fn module(
        &mut self,
        file: &str,
        folder: &str,
        path: &ModulePath,
        items: &[Item],
        read: &Read<'_>,
    ) -> Result<(), String> {
        let mut module = Module {
            file: file.to_owned(),
            names: BTreeMap::new(),
            globs: Vec::new(),
        };
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            match item {
                Item::Mod(inner) => {
                    let child = below(path, &inner.ident.to_string());
                    let name = Name::Module(child.clone());
                    module.names.insert(inner.ident.to_string(), name);
                    self.child(file, folder, child, inner, read)?;
                }
                Item::Use(import) => imports(&import.tree, &mut Vec::new(), &mut module),
                other => {
                    if let Some(name) = name_of(other) {
                        module.names.insert(name, Name::Item);
                    }
                }
            }
        }
        self.modules.insert(path.clone(), module);
        Ok(())
    }

    fn child(
        &mut self,
        file: &str,
        folder: &str,
        path: ModulePath,
        child: &ItemMod,
        read: &Read<'_>,
    ) -> Result<(), String> {
        let inside = format!("{folder}/{}", child.ident);
        if let Some((_, items)) = &child.content {
            return self.module(file, &inside, &path, items, read);
        }
        if let Some(elsewhere) = path_attribute(&child.attrs) {
            let file = normal(&format!("{folder}/{elsewhere}"));
            let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
            return self.file(&file, folder, path, read);
        }
        let alone = format!("{inside}.rs");
        if read(&alone).is_some() {
            return self.file(&alone, &inside, path, read);
        }
        self.file(&format!("{inside}/mod.rs"), &inside, path, read)
    }
}

/// `a/b/../c` is `a/c`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    let attribute = attributes.iter().find(|a| a.path().is_ident("path"))?;
    let syn::Meta::NameValue(named) = &attribute.meta else {
        return None;
    };
    match &named.value {
        syn::Expr::Lit(literal) => match &literal.lit {
            syn::Lit::Str(path) => Some(path.value()),
            _ => None,
        },
        _ => None,
    }
}

pub fn below(path: &ModulePath, child: &str) -> ModulePath {
    let mut path = path.clone();
    path.push(child.to_owned());
    path
}

/// Whether it is compiled for this crate's tests only.
pub fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && attribute
                    .parse_args::<syn::Ident>()
                    .is_ok_and(|condition| condition == "test")
    })
}

pub fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name_of(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

fn imports(tree: &UseTree, prefix: &mut Vec<String>, module: &mut Module) {
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            imports(&path.tree, prefix, module);
            prefix.pop();
        }
        UseTree::Name(name) => {
            let mut path = prefix.clone();
            let mut named = name.ident.to_string();
            if named == "self" {
                named = prefix.last().cloned().unwrap_or_default();
            } else {
                path.push(named.clone());
            }
            module.names.insert(named, Name::Import(path));
        }
        UseTree::Rename(rename) => {
            let mut path = prefix.clone();
            if rename.ident != "self" {
                path.push(rename.ident.to_string());
            }
            // `_` imports a trait without a name: still an import.
            let named = match rename.rename.to_string().as_str() {
                "_" => format!("_{}", path.join("::")),
                named => named.to_owned(),
            };
            module.names.insert(named, Name::Import(path));
        }
        UseTree::Glob(_) => module.globs.push(prefix.clone()),
        UseTree::Group(group) => {
            for tree in &group.items {
                imports(tree, prefix, module);
            }
        }
    }
}
