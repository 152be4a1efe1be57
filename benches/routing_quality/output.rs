//! What came of it: a table, checks of the limits, JSON and a plot.

use std::fmt;
use std::path::PathBuf;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Runs;
use crate::routers::RouterKind;
use crate::scenarios::{AGAINST_LEAST_OF_TWO, SPECIALS};

const OURS: RouterKind = RouterKind::Adaptive { candidates: 5 };
const LEAST_OF_TWO: RouterKind = RouterKind::LeastOfTwo;

/// In Markdown, as the README has it.
pub fn table(runs: &Runs) -> String {
    let others = &runs.kinds[1..];
    let mut table = String::from("| p99 / oracle |");
    for kind in others {
        table += &format!(" {} |", kind.name());
    }
    table += &format!("\n|---|{}", "---|".repeat(others.len()));
    for (row, described) in runs.rows.iter().enumerate() {
        table += &format!("\n| {} |", described.scenario.name);
        for kind in others {
            table += &format!(" {} |", short(runs.relative_p99(row, *kind)));
        }
    }
    table.push('\n');
    table
}

fn short(ratio: f64) -> String {
    match ratio {
        _ if ratio < 9.995 => format!("{ratio:.2}"),
        _ => format!("{ratio:.0}"),
    }
}

/// A limit, and what was measured.
pub struct Check {
    scenario: &'static str,
    what: String,
    measured: f64,
    limit: f64,
}

impl Check {
    pub fn holds(&self) -> bool {
        self.measured <= self.limit
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scenario,
            what,
            measured,
            limit,
        } = self;
        let mark = if self.holds() { "ok    " } else { "BROKEN" };
        write!(f, "{mark} {measured:6.3} <= {limit:<5} {what}: {scenario}")
    }
}

pub fn checks(runs: &Runs) -> Vec<Check> {
    let mut checks = Vec::new();
    for (row, described) in runs.rows.iter().enumerate() {
        let scenario = described.scenario.name;
        if let Some(limit) = described.limit {
            checks.push(Check {
                scenario,
                what: "p99 / oracle".to_owned(),
                measured: runs.relative_p99(row, OURS),
                limit,
            });
        }
        checks.push(Check {
            scenario,
            what: "p99 / choice of two".to_owned(),
            measured: runs.relative_p99(row, OURS) / runs.relative_p99(row, LEAST_OF_TWO),
            limit: AGAINST_LEAST_OF_TWO,
        });
        for special in SPECIALS
            .iter()
            .filter(|special| special.scenario == scenario)
        {
            checks.push(Check {
                scenario,
                what: special.what.to_owned(),
                measured: runs.median(row, OURS, special.measure),
                limit: special.limit,
            });
        }
    }
    checks
}

/// Writes the JSON and the plot.
pub fn write(runs: &Runs, checks: &[Check]) -> Result<(), Box<dyn std::error::Error>> {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let target = target.parent().unwrap_or(&target);
    let json = target.join("routing_quality.json");
    std::fs::write(&json, serde_json::to_vec_pretty(&as_json(runs, checks))?)?;
    let svg = target.join("routing_quality.svg");
    plot(runs, &svg)?;
    println!("written: {} and {}", json.display(), svg.display());
    Ok(())
}

fn as_json(runs: &Runs, checks: &[Check]) -> serde_json::Value {
    let scenario = |(row, described): (usize, &crate::Row)| {
        let router = |kind: &RouterKind| {
            let of = |measure: fn(&crate::Figures) -> f64| {
                runs.median(row, *kind, |figures, _| measure(figures))
            };
            serde_json::json!({
                "router": kind.name(),
                "requests": of(|figures| figures.requests as f64),
                "p50_ms": of(|figures| figures.p50) * 1e3,
                "p99_ms": of(|figures| figures.p99) * 1e3,
                "p99_by_oracle": runs.relative_p99(row, *kind),
                "errors": of(|figures| figures.errors),
                "share_of_first_server": of(|figures| figures.first),
                "share_in_own_zone": of(|figures| figures.near),
                "variation_of_utilisation": of(|figures| figures.variation),
            })
        };
        serde_json::json!({
            "scenario": described.scenario.name,
            "details": format!("{:?}", described.scenario),
            "routers": runs.kinds.iter().map(router).collect::<Vec<_>>(),
        })
    };
    let check = |check: &Check| {
        serde_json::json!({
            "scenario": check.scenario,
            "what": check.what,
            "measured": check.measured,
            "limit": check.limit,
            "holds": check.holds(),
        })
    };
    serde_json::json!({
        "seeds": runs.seeds,
        "scenarios": runs.rows.iter().enumerate().map(scenario).collect::<Vec<_>>(),
        "limits": checks.iter().map(check).collect::<Vec<_>>(),
    })
}

/// Beyond this, how bad it is does not matter any more.
const WORST: f64 = 100.0;
const LINE: i32 = 24;
const LEFT: i32 = 310;
const RIGHT: i32 = 40;
const WIDTH: i32 = 1000;

/// A line for each scenario, a mark for each router; how far right is how far from the oracle.
fn plot(runs: &Runs, path: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let others = &runs.kinds[1..];
    let columns = 3;
    let top = 70 + 20 * (others.len() as i32).div_euclid(columns);
    let height = top + LINE * runs.rows.len() as i32 + 40;
    let root = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font();
    let at = |ratio: f64| {
        let part = ratio.clamp(1.0, WORST).ln() / WORST.ln();
        LEFT + (part * f64::from(WIDTH - LEFT - RIGHT)) as i32
    };
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
    let bottom = height - 30;
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
            .into_text_style(&root)
            .pos(Pos::new(HPos::Center, VPos::Top));
        root.draw(&Text::new(label, (x, bottom + 6), style))?;
    }
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
        // What the limits are for on top of the others.
        for (index, kind) in others.iter().enumerate().rev() {
            mark(&root, (at(runs.relative_p99(row, *kind)), y), styles[index])?;
        }
    }
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Style = (RGBColor, bool);

/// Full marks are this crate's.
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
