//! Text in columns.

/// The rows below the names of their columns, each column as wide as it has to be.
pub fn table<const N: usize>(names: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([names[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths);
        let padded: Vec<_> = padded
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let rows = rows
        .iter()
        .map(|row| line(std::array::from_fn(|column| &*row[column])));
    let lines: Vec<_> = std::iter::once(line(names)).chain(rows).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let rows = [
            ["a".to_owned(), "long text".to_owned()],
            ["änother".to_owned(), String::new()],
        ];
        let text = table(["ID", "X"], &rows);
        assert_eq!(text, "ID       X\na        long text\nänother");
    }
}
