//! The plot.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::routers::RouterKind;
use crate::runs::Runs;

/// Ratios above this are drawn as this.
const WORST: f64 = 100.0;
const LINE: i32 = 24;
const LEFT: i32 = 310;
const RIGHT: i32 = 40;
const WIDTH: i32 = 1000;

/// A line for each scenario and a mark for each router: the farther right, the farther from the
/// oracle.
pub fn plot(runs: &Runs, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let others = &runs.kinds[1..];
    let columns = 3;
    let top = 70 + 20 * (others.len() as i32).div_euclid(columns);
    let height = top + LINE * runs.rows.len() as i32 + 40;
    let root = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let title =
        "p99 latency, relative to an oracle that sees every queue (log scale; left is better)";
    root.draw(&Text::new(title, (12, 10), text(16)))?;
    let styles: Vec<_> = others
        .iter()
        .enumerate()
        .map(|(index, kind)| style(*kind, index))
        .collect();
    for (index, kind) in others.iter().enumerate() {
        let (column, line) = (index as i32 % columns, index as i32 / columns);
        let place = (20 + column * 300, 44 + line * 20);
        mark(&root, place, styles[index])?;
        root.draw(&Text::new(
            kind.name(),
            (place.0 + 12, place.1 - 6),
            text(13),
        ))?;
    }
    grid(&root, top, height - 30)?;
    for (row, described) in runs.rows.iter().enumerate() {
        let y = top + LINE * row as i32 + LINE / 2;
        let style = text(13)
            .into_text_style(&root)
            .pos(Pos::new(HPos::Right, VPos::Center));
        root.draw(&Text::new(described.scenario.name, (LEFT - 14, y), style))?;
        root.draw(&PathElement::new(
            [(LEFT, y), (WIDTH - RIGHT, y)],
            RGBColor(235, 235, 235),
        ))?;
        // The routers of this crate on top of the others.
        for (index, kind) in others.iter().enumerate().rev() {
            mark(&root, (at(runs.relative_p99(row, *kind)), y), styles[index])?;
        }
    }
    root.present()?;
    Ok(())
}

/// Where a ratio is drawn.
fn at(ratio: f64) -> i32 {
    let part = ratio.clamp(1.0, WORST).ln() / WORST.ln();
    LEFT + (part * f64::from(WIDTH - LEFT - RIGHT)) as i32
}

fn text(size: i32) -> FontDesc<'static> {
    ("sans-serif", size).into_font()
}

/// Vertical lines with their ratios.
fn grid(root: &Area<'_>, top: i32, bottom: i32) -> Result<(), Box<dyn std::error::Error>> {
    for ratio in [1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0] {
        let x = at(ratio);
        root.draw(&PathElement::new(
            [(x, top), (x, bottom)],
            RGBColor(225, 225, 225),
        ))?;
        let label = if ratio < WORST {
            format!("{ratio}")
        } else {
            format!("{ratio} +")
        };
        let style = text(12)
            .into_text_style(root)
            .pos(Pos::new(HPos::Center, VPos::Top));
        root.draw(&Text::new(label, (x, bottom + 6), style))?;
    }
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Style = (RGBColor, bool);

/// Filled marks are this crate's routers.
fn style(kind: RouterKind, index: usize) -> Style {
    const COLOURS: [RGBColor; 10] = [
        RGBColor(0, 114, 178),
        RGBColor(86, 180, 233),
        RGBColor(0, 158, 115),
        RGBColor(230, 159, 0),
        RGBColor(204, 121, 167),
        RGBColor(213, 94, 0),
        RGBColor(120, 94, 240),
        RGBColor(160, 120, 60),
        RGBColor(90, 90, 90),
        RGBColor(160, 160, 160),
    ];
    (COLOURS[index % COLOURS.len()], kind.is_ours())
}

fn mark(
    area: &Area<'_>,
    place: (i32, i32),
    (colour, full): Style,
) -> Result<(), Box<dyn std::error::Error>> {
    if full {
        area.draw(&Circle::new(place, 5, colour.filled()))?;
    } else {
        area.draw(&Circle::new(place, 4, colour.stroke_width(2)))?;
    }
    Ok(())
}
