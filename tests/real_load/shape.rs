//! What the workers are, and what happens to them while they are under load.

use std::time::Duration;

/// Something that happens to a worker.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// It has this number of slots from now on.
    Slots(usize, u32),
    /// It is asked to end, and started again when it has ended.
    Restart(usize),
    /// It stands still, and goes on.
    Freeze(usize),
    Thaw(usize),
}

/// A fleet, and what happens to it.
#[derive(Debug, Clone)]
pub struct Shape {
    pub name: &'static str,
    /// The slots of each worker.
    pub slots: &'static [u32],
    pub balancers: usize,
    /// Each at a part of the measured time, in this order. They also divide it into phases.
    pub events: Vec<(f64, Event)>,
    /// The requests are calls of gRPC that answer with streams, nine of ten short, the others long.
    pub are_streams: bool,
    /// The slots that there are on average.
    pub mean_slots: f64,
    pub measure: Duration,
}

const FOUR: &[u32] = &[8, 6, 4, 2];
const TEN: &[u32] = &[8, 6, 4, 2, 8, 6, 4, 2, 6, 4];

fn sum(slots: &[u32]) -> f64 {
    f64::from(slots.iter().sum::<u32>())
}

/// The first worker has all of its slots for a third of the time, half of them for a third, and all of them again.
pub fn loses_half(name: &'static str, slots: &'static [u32], balancers: usize) -> Shape {
    Shape {
        name,
        slots,
        balancers,
        are_streams: false,
        events: vec![
            (1.0 / 3.0, Event::Slots(0, slots[0] / 2)),
            (2.0 / 3.0, Event::Slots(0, slots[0])),
        ],
        mean_slots: sum(slots) - f64::from(slots[0] / 2) / 3.0,
        measure: Duration::from_secs(9),
    }
}

pub fn usual() -> Shape {
    loses_half("one loses half", FOUR, 2)
}

pub fn all() -> Vec<Shape> {
    let four = Shape {
        mean_slots: sum(FOUR),
        ..usual()
    };
    vec![
        usual(),
        loses_half("10 workers, 4 balancers", TEN, 4),
        Shape {
            name: "rolling restart",
            events: (0..4)
                .map(|at| (0.1 + 0.2 * at as f64, Event::Restart(at)))
                .collect(),
            measure: Duration::from_secs(15),
            // One of them is away for about a second at a time.
            mean_slots: sum(FOUR) * 0.9,
            ..four.clone()
        },
        Shape {
            name: "one hangs",
            events: vec![(1.0 / 3.0, Event::Freeze(2)), (2.0 / 3.0, Event::Thaw(2))],
            mean_slots: sum(FOUR) - f64::from(FOUR[2]) / 3.0,
            ..four
        },
        Shape {
            name: "gRPC streams",
            are_streams: true,
            ..usual()
        },
    ]
}
