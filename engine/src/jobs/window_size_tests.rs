//! How many requests settle on disks of several kinds.

use super::*;

/// Takes `lanes` requests at a time, and each so long.
struct Disk<F: Fn(usize) -> Duration> {
    lanes: usize,
    service: F,
    noise_percent: u64,
}

const MIB: u64 = 1 << 20;

/// For requests of 1 MiB each.
fn of_long(count_max: usize) -> WindowSize {
    let limits = WindowLimits {
        requests: count_max,
        bytes: count_max as u64 * MIB,
    };
    WindowSize::new(limits, MIB)
}

/// Runs so many requests; what was in flight over the last quarter of them, on average.
fn settled<F: Fn(usize) -> Duration>(size: &mut WindowSize, disk: &Disk<F>, requests: u64) -> f64 {
    settled_with(size, disk, requests, MIB)
}

/// The same of requests of so many bytes each.
fn settled_with<F: Fn(usize) -> Duration>(
    size: &mut WindowSize,
    disk: &Disk<F>,
    requests: u64,
    bytes: u64,
) -> f64 {
    let mut now = Duration::ZERO;
    let mut state = 7_u64;
    let mut lanes = vec![Duration::ZERO; disk.lanes];
    let mut flying: Vec<(Duration, Duration)> = Vec::new();
    let (mut sum, mut seen) = (0, 0);
    for number in 0..requests {
        while flying.len() < size.requests() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let noise = 100 + (state >> 33) % (disk.noise_percent + 1);
            let time = (disk.service)(flying.len() + 1) * u32::try_from(noise).unwrap() / 100;
            let lane = lanes.iter_mut().min().unwrap();
            *lane = now.max(*lane) + time;
            flying.push((*lane, now));
            size.begun(Moment::new(now), bytes);
        }
        flying.sort();
        let (end, begun) = flying.remove(0);
        let was_full = flying.len() + 1 >= size.requests();
        now = end;
        let took = end.saturating_sub(begun);
        size.took(took);
        if was_full {
            size.ended(Moment::new(now), bytes, took);
        }
        if number >= requests - requests / 4 {
            sum += size.requests();
            seen += 1;
        }
    }
    sum as f64 / f64::from(seen)
}

#[test]
fn a_far_end_gets_all_there_may_be_within_few_round_trips() {
    let far = Disk {
        lanes: 1000,
        service: |_| Duration::from_millis(10),
        noise_percent: 5,
    };
    for count_max in [1, 3, 16, 64] {
        let mut size = of_long(count_max);
        settled(&mut size, &far, 2 * count_max as u64);
        assert_eq!(size.requests(), count_max);
        let long = settled(&mut size, &far, 40_000);
        assert!(long > 0.7 * count_max as f64, "{long} of {count_max}");
    }
}

#[test]
fn a_far_end_gets_more_of_short_requests_and_no_more_bytes_of_long_ones() {
    let far = Disk {
        lanes: 1000,
        service: |_| Duration::from_millis(10),
        noise_percent: 5,
    };
    let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
    for _ in 0..3 {
        let short = settled_with(&mut size, &far, 4_000, 64 << 10);
        assert!(short > 0.7 * 64.0, "{short}");
        let middle = settled_with(&mut size, &far, 4_000, 512 << 10);
        assert!((0.7 * 32.0..=32.0).contains(&middle), "{middle}");
        let long = settled(&mut size, &far, 4_000);
        assert!((0.7 * 16.0..=16.0).contains(&long), "{long}");
    }
    // What is in flight while they become longer.
    settled_with(&mut size, &far, 4_000, 64 << 10);
    let mut flying = size.requests() as u64 * (64 << 10);
    for _ in 0..100 {
        size.begun(Moment::default(), MIB);
        // The oldest short one has ended.
        flying = (flying + MIB).saturating_sub(64 << 10);
        if flying.div_ceil(MIB) >= size.requests() as u64 {
            break;
        }
    }
    assert!(flying <= 24 * MIB, "{flying}");
}

#[test]
fn quick_short_requests_are_many_and_begun_by_handfuls() {
    let limits = WindowLimits::of(MIB);
    for (service, many, few) in [
        (20_u64, 48.0..=64.0, 12..=16),
        // Whoever reads there as well waits for all of them.
        (4_000, 1.0..=24.0, 1..=6),
    ] {
        let one = Disk {
            lanes: 1,
            service: |_| Duration::from_micros(service),
            noise_percent: 20,
        };
        let mut size = WindowSize::new(limits, MIB);
        let short = settled_with(&mut size, &one, 20_000, 64 << 10);
        assert!(many.contains(&short), "{short} of {service} us");
        assert!(few.contains(&size.handful()), "{}", size.handful());
        settled(&mut size, &one, 200);
        assert_eq!(size.handful(), 1, "they are long");
        settled_with(&mut size, &one, 200, 64 << 10);
        size.follow_writers();
        assert_eq!(size.handful(), 1, "writers wait for them");
    }
    let far = Disk {
        lanes: 1000,
        service: |_| Duration::from_millis(10),
        noise_percent: 5,
    };
    let mut size = WindowSize::new(limits, MIB);
    settled_with(&mut size, &far, 20_000, 64 << 10);
    assert_eq!(size.handful(), 1, "each that is missing is missed");
}

#[test]
fn a_worker_less_is_a_worker_less() {
    let limits = WindowLimits::of(MIB).with_requests(3);
    let far = Disk {
        lanes: 1000,
        service: |_| Duration::from_millis(10),
        noise_percent: 5,
    };
    let mut size = WindowSize::new(limits, MIB);
    for bytes in [4096, MIB, 4096] {
        let few = settled_with(&mut size, &far, 1_000, bytes);
        assert!((2.0..=3.0).contains(&few), "{few}");
    }
    let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
    settled_with(&mut size, &far, 1_000, 4096);
    size.follow_writers();
    assert!(size.requests() <= FOLLOWING_MAX, "{}", size.requests());
    let one = WindowLimits::of(MIB).with_bytes(1);
    assert_eq!(WindowSize::new(one, MIB).requests(), 1);
}

#[test]
fn a_disk_that_takes_one_after_the_other_gets_few() {
    for noise_percent in [0, 10, 40] {
        let one = Disk {
            lanes: 1,
            service: |waiting| Duration::from_micros(280 + 6 * waiting as u64),
            noise_percent,
        };
        let mut size = of_long(16);
        settled(&mut size, &one, 64);
        assert!(size.requests() <= 8, "{}", size.requests());
        let long = settled(&mut size, &one, 20_000);
        assert!(long <= 6.0, "{long} with {noise_percent} % of noise");
    }
}

#[test]
fn a_disk_of_eight_lanes_gets_about_eight() {
    for noise_percent in [0, 10, 40] {
        let lanes = Disk {
            lanes: 8,
            service: |_| Duration::from_millis(1),
            noise_percent,
        };
        let mut size = of_long(64);
        let long = settled(&mut size, &lanes, 40_000);
        assert!(
            (6.0..=16.0).contains(&long),
            "{long} with {noise_percent} % of noise"
        );
    }
}

#[test]
fn slow_requests_make_it_few_if_they_wait_for_each_other_and_quick_ones_many_again() {
    for (bytes, many) in [(MIB, 16), (64 << 10, 64)] {
        let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
        let slow = Disk {
            lanes: 1,
            service: |_| Duration::from_millis(300),
            noise_percent: 10,
        };
        let few = settled_with(&mut size, &slow, 400, bytes);
        assert!(few <= 3.0, "{few}");
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(10),
            noise_percent: 0,
        };
        settled_with(&mut size, &far, 4_000, bytes);
        assert!(size.requests() * 4 >= many * 3, "{}", size.requests());
    }
}

#[test]
fn however_far_an_end_is_it_gets_all_there_may_be() {
    for (milliseconds, noise_percent) in [
        (90, 20),
        (150, 20),
        (1_000, 20),
        (10, 200),
        (40, 100),
        (90, 100),
        (90, 200),
        (150, 400),
    ] {
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(milliseconds),
            noise_percent,
        };
        for requests in [400, 4_000, 40_000] {
            let mut size = of_long(16);
            let many = settled(&mut size, &far, requests);
            assert!(
                many > 12.0,
                "{many} at {milliseconds} ms with {noise_percent} % of noise after {requests}"
            );
        }
    }
}

#[test]
fn a_disk_that_becomes_slow_gets_few_and_many_again_when_it_turns_out_to_be_far() {
    let mut size = of_long(16);
    let quick = Disk {
        lanes: 4,
        service: |_| Duration::from_millis(1),
        noise_percent: 10,
    };
    settled(&mut size, &quick, 1_000);
    let far = Disk {
        lanes: 1000,
        service: |_| Duration::from_millis(300),
        noise_percent: 10,
    };
    settled(&mut size, &far, 2_000);
    assert!(size.requests() > 8, "{}", size.requests());
}

#[test]
fn a_copy_that_something_else_holds_up_is_no_measure() {
    let mut size = of_long(16);
    for second in 0..1_000 {
        size.begun(Moment::new(Duration::from_secs(second)), MIB);
        size.took(Duration::from_millis(1));
        size.ended(
            Moment::new(Duration::from_secs(second)),
            MIB,
            Duration::ZERO,
        );
        size.interrupted();
    }
    assert!(size.requests() >= START, "{}", size.requests());
}
