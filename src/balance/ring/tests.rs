use super::*;
use proptest::prelude::*;

fn addr(host: u32) -> SocketAddr {
    let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + host);
    SocketAddr::new(ip.into(), 8080)
}

fn shares(weights: &[f64]) -> impl Iterator<Item = Share> {
    weights.iter().copied().map(Share::new)
}

fn ring_of(backends: impl IntoIterator<Item = (SocketAddr, f64)>) -> Ring {
    let backends = backends.into_iter();
    Ring::new(backends.map(|(addr, weight)| (addr, Share::new(weight))))
}

fn ring(weights: &[f64]) -> Ring {
    Ring::new((0..).map(addr).zip(shares(weights)))
}

/// How many cells each backend has.
fn cells(ring: &Ring, count: usize) -> Vec<usize> {
    let mut cells = vec![0; count];
    for owner in &ring.owners {
        cells[*owner as usize] += 1;
    }
    cells
}

/// Whether this number of cells is what a backend with this share gets, apart from chance.
fn is_share(cells: usize, share: f64) -> bool {
    let expected = share * CELLS as f64;
    // Five standard deviations of independent cells; the real ones are smaller.
    let chance = 5.0 * (expected * (1.0 - share)).max(0.0).sqrt() + 2.0;
    (cells as f64 - expected).abs() <= chance
}

#[test]
fn every_backend_visits_every_cell_once() {
    for host in 0..20 {
        let ring = ring_of([(addr(host), 1.0)]);
        let visitor = &ring.visitors[0];
        let mut visited = vec![false; CELLS];
        for rank in 0..CELLS as u32 {
            let cell = visitor.cell(rank);
            assert_eq!(visitor.rank(cell), rank);
            assert!(!std::mem::replace(&mut visited[cell as usize], true));
        }
    }
}

#[test]
fn times_are_the_order_statistics_of_exponential_ones() {
    // At the very end means differ from quantiles.
    for rank in (0..CELLS * 9 / 10).step_by(1_000) {
        let exact = -(-(rank as f64) / CELLS as f64).ln_1p();
        let time = f64::from(UNIT_TIMES[rank]);
        assert!((time - exact).abs() < 1e-3, "{rank}: {time} for {exact}");
    }
    assert!(UNIT_TIMES.windows(2).all(|pair| pair[0] < pair[1]));
}

/// The visits that were left out would not have won.
#[test]
fn the_earliest_visitor_wins_every_cell() {
    let ones = [1.0; 40];
    let steep: Vec<f64> = (-6..=6).map(|power| 10_f64.powi(power)).collect();
    for weights in [&[1.0][..], &[1.0, 1.0], &[5.0, 1.0, 1e-6], &ones, &steep] {
        let ring = ring(weights);
        assert_eq!(ring.owners.len(), CELLS);
        for (cell, owner) in (0..).zip(&ring.owners) {
            let least = winner(ring.visitors.iter(), &UNIT_TIMES, cell);
            assert_eq!(least, Some(*owner), "{weights:?}, {cell}");
        }
    }
}

#[test]
fn shares_are_proportional_whatever_the_unit() {
    for weights in [
        [1.0, 10.0],
        [100.0, 1_000.0],
        [1e-6, 1e-5],
        [1e5, 1e6],
        [0.3, 3.0],
    ] {
        let cells = cells(&ring(&weights), 2);
        let ratio = cells[1] as f64 / cells[0] as f64;
        assert!((ratio - 10.0).abs() < 0.4, "{weights:?}: 1 to {ratio}");
    }
    for (count, spread) in [(10, 0.03), (100, 0.1), (1_000, 0.3)] {
        let cells = cells(&ring(&vec![100.0; count]), count);
        let fair = (CELLS / count) as f64;
        for cells in cells {
            let off = (cells as f64 / fair - 1.0).abs();
            assert!(off < spread, "{count}: {cells} for {fair}");
        }
    }
}

/// On average over many groups; in a single group it is one cell or none.
#[test]
fn a_tiny_share_gets_its_part_on_average() {
    let share = 0.25;
    let groups = 200;
    let weight = share / CELLS as f64;
    let got: usize = (0..groups)
        .map(|group| {
            let backends = [(addr(9), 1.0), (addr(1_000 + group), weight)];
            cells(&ring_of(backends), 2)[1]
        })
        .sum();
    let mean = got as f64 / f64::from(groups);
    assert!((mean - share).abs() < 0.15, "{mean} cells");
}

#[test]
fn a_share_of_zero_owns_nothing() {
    let some = ring(&[0.0, 1.0, f64::NAN, -1.0, 2.0, f64::INFINITY]);
    let cells = cells(&some, 6);
    assert_eq!(cells[1] + cells[4], CELLS);
    assert!(is_share(cells[1], 1.0 / 3.0), "{cells:?}");
    assert_eq!(some.owner_among(b"k", |index| index == 0), None);
    for weights in [&[][..], &[0.0, 0.0]] {
        let none = ring(weights);
        assert_eq!(none.owners(b"k").next(), None);
        assert_eq!(none.owner_among(b"k", |_| true), None);
    }
}

#[test]
fn the_owner_among_some_is_the_owner_without_the_others() {
    let weights = [3.0, 1.0, 1e-6, 2.0, 2e-6];
    let all = ring(&weights);
    for gone in [&[0][..], &[0, 1], &[0, 1, 3]] {
        let left = |index: usize| !gone.contains(&index);
        let kept = (0..weights.len()).filter(|index| left(*index));
        let of_left = kept.clone().map(|at| (addr(at as u32), weights[at]));
        let without = ring_of(of_left);
        let kept: Vec<_> = kept.collect();
        for key in 0..500_u32 {
            let key = key.to_le_bytes();
            let owner = without.owners(&key).next().map(|index| kept[index]);
            assert_eq!(all.owner_among(&key, left), owner);
        }
    }
}

fn weight() -> impl Strategy<Value = f64> {
    prop_oneof![
        3 => Just(1.0),
        1 => 0.1..10.0_f64,
        1 => (-6.0..6.0_f64).prop_map(|power| 10_f64.powf(power)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Cell by cell: a backend that joins takes its share from the others, and nothing else moves;
    /// if it leaves again, all is as before; if its share changes, cells move to it or from it
    /// only. The order of the backends plays no part.
    #[test]
    fn keys_move_no_further_than_they_must(
        weights in prop::collection::vec(weight(), 1..30),
        joins in weight(),
        becomes in weight(),
    ) {
        let new = weights.len() as u32;
        let with = |weight: f64| {
            let mut with = weights.clone();
            with.push(weight);
            let backends = (0..).map(addr).zip(with).collect::<Vec<_>>();
            // From last to first.
            let ring = ring_of(backends.into_iter().rev());
            ring.owners.iter().map(|owner| new - owner).collect::<Vec<_>>()
        };
        let total: f64 = weights.iter().sum();
        let before = ring(&weights).owners;
        let (after, later) = (with(joins), with(becomes));
        let mut moved = [0, 0];
        for cell in 0..CELLS {
            if after[cell] != before[cell] {
                prop_assert_eq!(after[cell], new, "of a join");
                moved[0] += 1;
            }
            if after[cell] != later[cell] {
                let winner = if becomes > joins { later[cell] } else { after[cell] };
                prop_assert_eq!(winner, new, "of a weight");
                moved[1] += 1;
            }
        }
        let share = |weight: f64| weight / (total + weight);
        prop_assert!(is_share(moved[0], share(joins)), "{} cells", moved[0]);
        let change = (share(joins) - share(becomes)).abs();
        prop_assert!(is_share(moved[1], change), "{} cells", moved[1]);
    }

    /// Cells are in proportion to shares, whatever their unit.
    #[test]
    fn proportional(weights in prop::collection::vec(weight(), 1..30), unit in -3.0..3.0_f64) {
        let plain = ring(&weights);
        let total: f64 = weights.iter().sum();
        for (cells, weight) in cells(&plain, weights.len()).into_iter().zip(&weights) {
            prop_assert!(is_share(cells, weight / total), "{cells} of {weight} in {total}");
        }
        let scaled: Vec<f64> = weights.iter().map(|weight| weight * 10_f64.powf(unit)).collect();
        let scaled = ring(&scaled);
        let pairs = plain.owners.iter().zip(&scaled.owners);
        // Apart from rounding, where two times are almost equal.
        prop_assert!(pairs.filter(|(a, b)| a != b).count() <= 20);
    }
}
