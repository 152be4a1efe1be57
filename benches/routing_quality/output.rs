//! The results as a table, as JSON and as a plot.

use std::path::PathBuf;

use crate::checks::Check;
use crate::figures::Figures;
use crate::plot::plot;
use crate::routers::RouterKind;
use crate::runs::Runs;
use crate::scenarios::Row;

/// The table of all figures, in Markdown.
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
        _ if ratio.is_nan() => "-".to_owned(),
        _ if ratio < 9.995 => format!("{ratio:.2}"),
        _ => format!("{ratio:.0}"),
    }
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
    let scenario = |(row, described): (usize, &Row)| {
        let router = |kind: &RouterKind| {
            let of = |measure: fn(&Figures) -> f64| {
                runs.median(row, *kind, |figures, _| measure(figures))
            };
            serde_json::json!({
                "router": kind.name(),
                "requests": of(|figures| figures.requests as f64),
                "p50_ms": of(|figures| figures.p50) * 1e3,
                "p99_ms": of(|figures| figures.p99) * 1e3,
                "p99_by_oracle": runs.relative_p99(row, *kind),
                "errors": of(|figures| figures.errors),
                "share_of_failing_servers": of(|figures| figures.faulty),
                "share_in_own_zone": of(|figures| figures.near),
                "variation_of_utilisation": of(|figures| figures.variation),
            })
        };
        serde_json::json!({
            "scenario": described.scenario.name,
            "seeds": runs.seeds_of(row),
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
