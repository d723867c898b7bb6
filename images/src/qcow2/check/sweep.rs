//! How often each place is covered by ranges that may overlap in any way, in one pass over the places.
//!
//! A hostile image lets 65536 snapshots share bytes of their L1 tables. Going through the union of all tables, knowing how
//! many cover each piece, costs no more than reading those bytes once.

/// A run of places that the same number of ranges cover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::qcow2) struct Covered {
    pub(super) start: u64,
    pub(super) end: u64,
    /// How many ranges; at least one.
    pub(super) times: u64,
    /// How many of them belong to the active table.
    pub(super) active: u64,
}

/// A half-open range of places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stretch {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) active: bool,
}

/// The runs in ascending order. Takes 48 bytes of memory for each range.
pub(super) fn sweep(stretches: Vec<Stretch>) -> impl Iterator<Item = Covered> {
    let mut edges: Vec<(u64, bool, bool)> = stretches
        .into_iter()
        .filter(|stretch| stretch.start < stretch.end)
        .flat_map(|stretch| {
            [
                (stretch.start, true, stretch.active),
                (stretch.end, false, stretch.active),
            ]
        })
        .collect();
    edges.sort_unstable();
    let mut edges = edges.into_iter().peekable();
    let (mut times, mut active) = (0_u64, 0_u64);
    std::iter::from_fn(move || {
        loop {
            let (start, _, _) = *edges.peek()?;
            while let Some((_, begins, is_active)) = edges.next_if(|edge| edge.0 == start) {
                let change = |count: u64, counts: bool| match (counts, begins) {
                    (false, _) => count,
                    (true, true) => count.saturating_add(1),
                    (true, false) => count.saturating_sub(1),
                };
                (times, active) = (change(times, true), change(active, is_active));
            }
            let (end, _, _) = *edges.peek()?;
            if times > 0 {
                return Some(Covered {
                    start,
                    end,
                    times,
                    active,
                });
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn every_place_is_covered_as_often_as_it_should(
            ranges in proptest::collection::vec((0_u64..40, 0_u64..12, proptest::bool::ANY), 0..20),
        ) {
            let stretches: Vec<Stretch> = ranges
                .iter()
                .map(|(start, length, active)| Stretch { start: *start, end: start + length, active: *active })
                .collect();
            let runs: Vec<Covered> = sweep(stretches.clone()).collect();
            proptest::prop_assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for place in 0..60 {
                let of = |active_only: bool| stretches
                    .iter()
                    .filter(|one| one.start <= place && place < one.end && (one.active || !active_only))
                    .count() as u64;
                let run = runs.iter().find(|run| run.start <= place && place < run.end);
                proptest::prop_assert_eq!(run.map_or(0, |run| run.times), of(false));
                proptest::prop_assert_eq!(run.map_or(0, |run| run.active), of(true));
            }
        }
    }
}
