//! Groups in virtual time: who passes when, what wakes whom, and how much passes in all.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{join, join_all};
use proptest::prelude::*;

use crate::clock::{Clock, Moment};
use crate::jobs::test_support::VirtualClock;
use crate::throttle::Direction::{self, Read, Write};
use crate::throttle::group::{Member, ThrottleGroup};
use crate::throttle::limits::{Counted, Limits, LimitsChange};

fn change(counted: Counted, average: i64) -> LimitsChange {
    let mut change = LimitsChange::default();
    change.rates[counted as usize].average = Some(average);
    change
}

fn group(counted: Counted, average: i64) -> std::sync::Arc<ThrottleGroup> {
    let limits = Limits::default().with(&change(counted, average));
    ThrottleGroup::new("group".to_owned(), limits.expect("makes sense"))
}

fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Fills the room that may be used at once.
async fn fill(member: &Member, direction: Direction, clock: &VirtualClock) {
    member.pass(direction, 1_000_000, clock).await;
}

#[test]
fn members_take_turns_and_each_keeps_its_order() {
    let clock = VirtualClock::default();
    let group = group(Counted::Bytes, 1_000_000);
    let members = [group.join(), group.join(), group.join()];
    let order = RefCell::new(Vec::new());
    let pass = async |member: usize, number: u32| {
        members[member].pass(Write, 500_000, &clock).await;
        order.borrow_mut().push((member, number));
    };
    clock.block_on(async {
        fill(&members[0], Write, &clock).await;
        let came = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (2, 1)];
        join_all(came.map(|(member, number)| pass(member, number))).await;
    });
    let expected = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3), (0, 4)];
    assert_eq!(*order.borrow(), expected);
    // One second and a half for the first, as a tenth of a second is free, then half a second for each but the last.
    let now = clock.now().since_start();
    assert!((3.85..3.95).contains(&now.as_secs_f64()), "{now:?}");
}

/// Users of several members for a while, each with requests one behind the other: bytes that each has passed.
fn compete(
    group: &std::sync::Arc<ThrottleGroup>,
    users: &[(usize, Direction, u64)],
    seconds: u64,
) -> Vec<u64> {
    let clock = VirtualClock::default();
    let count = users.iter().map(|user| user.0).max().unwrap_or(0) + 1;
    let members: Vec<_> = (0..count).map(|_| group.join()).collect();
    let end = Moment::new(Duration::from_secs(seconds));
    let passed: Vec<Cell<u64>> = users.iter().map(|_| Cell::new(0)).collect();
    let user = async |index: usize| {
        let (member, direction, bytes) = users[index];
        loop {
            members[member].pass(direction, bytes, &clock).await;
            if clock.now() >= end {
                return;
            }
            passed[index].set(passed[index].get() + bytes);
        }
    };
    clock.block_on(join_all((0..users.len()).map(user)));
    passed.iter().map(Cell::get).collect()
}

#[test]
fn what_is_shared_is_shared_in_equal_parts() {
    // Three members, the last with two users; reads and writes under one limit.
    let both = group(Counted::Requests, 120);
    let users = [
        (0, Write, 1),
        (1, Write, 1),
        (2, Write, 1),
        (2, Write, 1),
        (0, Read, 1),
    ];
    let passed = compete(&both, &users, 100);
    let total: u64 = passed.iter().sum();
    assert!((11_950..=12_100).contains(&total), "{passed:?}");
    let shares = [2000, 2000, 1000, 1000, 6000];
    for (passed, share) in passed.iter().zip(shares) {
        assert!(passed.abs_diff(share) <= share / 20, "{passed} of {share}");
    }
    // Limits on one of them leave the other alone, and let both pass at their own rates.
    let mut limits = change(Counted::BytesRead, 1000);
    limits.rates[Counted::BytesWritten as usize].average = Some(3000);
    let limits = Limits::default().with(&limits).expect("makes sense");
    let own = ThrottleGroup::new("own".to_owned(), limits);
    let passed = compete(
        &own,
        &[(0, Read, 100), (0, Write, 100), (1, Write, 50)],
        100,
    );
    for (passed, share) in [(passed[0], 100_000), (passed[1] + passed[2], 300_000)] {
        assert!(passed.abs_diff(share) <= share / 20, "{passed} of {share}");
    }
}

#[test]
fn other_limits_hold_at_once_for_what_waits() {
    let clock = VirtualClock::default();
    let group = group(Counted::Bytes, 1);
    let member = group.join();
    clock.block_on(fill(&member, Read, &clock));
    let begun = clock.now();
    let changing = async {
        clock.sleep_until(begun.after(Duration::from_secs(5))).await;
        group
            .change_limits(&change(Counted::Bytes, 1_000_000))
            .expect("makes sense");
    };
    // Each of these would have waited for days.
    let both = async {
        let (read, write) = (
            member.pass(Read, 500_000, &clock),
            member.pass(Write, 500_000, &clock),
        );
        join(read, write).await;
        member.pass(Read, 1, &clock).await;
    };
    clock.block_on(join(changing, both));
    let waited = clock.now().since(begun).as_secs_f64();
    assert!((5.8..=5.95).contains(&waited), "{waited}");
    let refused = group.change_limits(&change(Counted::BytesRead, 1));
    assert!(refused.is_err());
    assert_eq!(group.limits().rate(Counted::Bytes).average, 1_000_000);
    group
        .change_limits(&change(Counted::Bytes, 0))
        .expect("none");
    let begun = clock.now();
    clock.block_on(async {
        for _ in 0..1000 {
            fill(&member, Write, &clock).await;
        }
    });
    assert_eq!(clock.now(), begun);
}

#[test]
fn nothing_waits_of_a_member_that_is_suspended_but_it_counts() {
    let clock = VirtualClock::default();
    let group = group(Counted::Bytes, 1000);
    let (one, other) = (group.join(), group.join());
    clock.block_on(fill(&one, Write, &clock));
    let begun = clock.now();
    let mut waits = [
        Box::pin(one.pass(Write, 1_000_000, &clock)),
        Box::pin(one.pass(Read, 1_000_000, &clock)),
    ];
    assert!(
        waits
            .iter_mut()
            .all(|wait| poll(wait.as_mut()).is_pending())
    );
    let mut waits_still = pin!(other.pass(Write, 1, &clock));
    assert!(poll(waits_still.as_mut()).is_pending());
    let twice = (one.suspend(), one.suspend());
    drop(twice.0);
    clock.block_on(join_all(waits));
    clock.block_on(one.pass(Write, 1, &clock));
    assert_eq!(clock.now(), begun);
    assert!(poll(waits_still.as_mut()).is_pending());
    drop(twice.1);
    assert!(poll(pin!(one.pass(Write, 1, &clock))).is_pending());
    clock.block_on(waits_still);
    let waited = clock.now().since(begun).as_secs();
    assert!((2990..=3010).contains(&waited), "{waited}");
    one.suspend_for_good();
    clock.block_on(fill(&one, Write, &clock));
    clock.block_on(one.pass(Write, 1, &clock));
    assert_eq!(clock.now().since(begun).as_secs(), waited);
}

#[test]
fn who_gives_up_is_not_waited_for() {
    let clock = VirtualClock::default();
    let group = group(Counted::Bytes, 1000);
    let (one, other) = (group.join(), group.join());
    clock.block_on(fill(&one, Write, &clock));
    let passed = Rc::new(Cell::new(false));
    {
        let mut first = pin!(one.pass(Write, 1_000_000, &clock));
        assert!(poll(first.as_mut()).is_pending());
        let mut behind = pin!(async {
            other.pass(Write, 1, &clock).await;
            passed.set(true);
        });
        assert!(poll(behind.as_mut()).is_pending());
        let mut another = pin!(one.pass(Write, 1, &clock));
        assert!(poll(another.as_mut()).is_pending());
    }
    assert!(!passed.get());
    // All of them are gone: this one is the first.
    clock.block_on(other.pass(Read, 1, &clock));
    let waited = clock.now().since_start().as_secs();
    assert!((999..=1001).contains(&waited), "{waited}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever shares a limit in whatever way: what passes in all is the limit within 5 %.
    #[test]
    fn the_group_keeps_its_rate(
        counted in proptest::sample::select(Counted::ALL.to_vec()),
        users in proptest::collection::vec((0_usize..4, any::<bool>(), 512_u64..65_536), 1..8),
    ) {
        let is_bytes = matches!(counted, Counted::Bytes | Counted::BytesRead | Counted::BytesWritten);
        let average = if is_bytes { 4_000_000 } else { 200 };
        let counts = |direction| !matches!(
            (counted, direction),
            (Counted::BytesRead | Counted::Reads, Write) | (Counted::BytesWritten | Counted::Writes, Read)
        );
        let direction = |reads: &bool| if *reads { Read } else { Write };
        let users: Vec<_> = users
            .iter()
            .map(|(member, reads, bytes)| (*member, direction(reads), *bytes))
            // Nothing would let time pass in others.
            .filter(|(_, direction, _)| counts(*direction))
            .collect();
        prop_assume!(!users.is_empty());
        let passed = compete(&group(counted, average), &users, 60);
        let amount: u64 = match is_bytes {
            true => passed.iter().sum(),
            false => passed.iter().zip(&users).map(|(bytes, user)| bytes / user.2).sum(),
        };
        let expected = average.unsigned_abs() * 60;
        prop_assert!(amount.abs_diff(expected) <= expected / 20, "{} of {}", amount, expected);
    }
}
