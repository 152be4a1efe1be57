//! What a replacement refers to in the pattern whose matches it replaces.

use regex::Regex;

/// The text of a replacement without what it refers to. The error is a name that the pattern does not have.
pub(super) fn without_references(replacement: &str, pattern: &Regex) -> Result<String, String> {
    let mut text = String::new();
    let mut rest = replacement;
    while let Some((before, after)) = rest.split_once('$') {
        text.push_str(before);
        // Two of them are one.
        if let Some(after) = after.strip_prefix('$') {
            rest = after;
            continue;
        }
        let is_named = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, after) = match after
            .strip_prefix('{')
            .and_then(|after| after.split_once('}'))
        {
            Some(named) => named,
            None => after.split_at(after.find(|c| !is_named(c)).unwrap_or(after.len())),
        };
        let is_known = match name.parse::<usize>() {
            Ok(number) => number < pattern.captures_len(),
            Err(_) => pattern.capture_names().flatten().any(|known| known == name),
        };
        // A sign that refers to nothing stands for itself.
        if !name.is_empty() && !is_known {
            return Err(name.to_owned());
        }
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}
