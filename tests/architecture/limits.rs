//! How long files and functions are: lines that have code, without comments and tests.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::Visit;
use syn::{Attribute, Block, ImplItem, Item};

use super::source::{Source, attributes, is_test};

pub const FILE: usize = 400;
pub const FUNCTION: usize = 60;

/// The file and its lines of code.
pub fn file_lines(source: &Source) -> (String, usize) {
    let mut lines = BTreeSet::new();
    for item in &source.items {
        add_item(item, &mut lines);
    }
    (source.file.clone(), lines.len())
}

fn add_item(item: &Item, lines: &mut BTreeSet<usize>) {
    if is_test(attributes(item)) {
        return;
    }
    if let Item::Mod(module) = item
        && let Some((_, items)) = &module.content
    {
        items.iter().for_each(|item| add_item(item, lines));
        return;
    }
    add_tokens(item.to_token_stream(), lines);
}

/// Doc comments are attributes: `#[doc = "…"]`.
fn add_tokens(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                let is_doc = matches!(tokens.peek(), Some(TokenTree::Group(group))
                    if group.stream().to_string().starts_with("doc ="));
                if is_doc {
                    tokens.next();
                } else {
                    lines.insert(punct.span().start().line);
                }
            }
            TokenTree::Group(group) => {
                lines.insert(group.span_open().start().line);
                lines.insert(group.span_close().end().line);
                add_tokens(group.stream(), lines);
            }
            other => lines.extend(other.span().start().line..=other.span().end().line),
        }
    }
}

/// Each function of the file, and the lines of code in its body.
pub fn function_lines(source: &Source) -> Vec<(String, usize)> {
    let mut functions = Functions {
        file: &source.file,
        found: Vec::new(),
    };
    source
        .items
        .iter()
        .for_each(|item| functions.visit_item(item));
    functions.found
}

struct Functions<'s> {
    file: &'s str,
    found: Vec<(String, usize)>,
}

impl Functions<'_> {
    fn add(&mut self, name: &syn::Ident, body: &Block, attributes: &[Attribute]) {
        if is_test(attributes) {
            return;
        }
        let mut lines = BTreeSet::new();
        for statement in &body.stmts {
            add_tokens(statement.to_token_stream(), &mut lines);
        }
        self.found
            .push((format!("{}: {name}", self.file), lines.len()));
    }
}

impl<'a> Visit<'a> for Functions<'_> {
    fn visit_item(&mut self, item: &'a Item) {
        if !is_test(attributes(item)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_fn(&mut self, function: &'a syn::ItemFn) {
        self.add(&function.sig.ident, &function.block, &function.attrs);
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item(&mut self, item: &'a ImplItem) {
        if let ImplItem::Fn(function) = item {
            self.add(&function.sig.ident, &function.block, &function.attrs);
        }
        syn::visit::visit_impl_item(self, item);
    }

    fn visit_trait_item_fn(&mut self, function: &'a syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.add(&function.sig.ident, body, &function.attrs);
        }
        syn::visit::visit_trait_item_fn(self, function);
    }
}
