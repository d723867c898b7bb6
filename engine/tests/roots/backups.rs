//! Backups beside writers on threads of their own: what is on the target is what the source was at one moment of its start.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::request::{BackupSpec, SyncMode, WorkSpec};
use blockyard_engine::root_handle::RootHandle;
use blockyard_storage::ByteRange;

use crate::yard::*;

/// One thread's part of the disk, in bytes.
const PART: u64 = LENGTH / 2;

/// What one thread has done to its part.
type History = Mutex<Vec<(ByteRange, u8)>>;

/// Writes here and there in one part until it is told to stop.
async fn write_part(root: &RootHandle, part: u64, stop: &AtomicBool, history: &History) {
    let mut number = 0_u64;
    while !stop.load(Ordering::Acquire) {
        number += 1;
        let mixed = (number + part).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let length = 1 + mixed
            % match number.is_multiple_of(8) {
                true => 150_000,
                false => 5000,
            };
        let range = ByteRange::new(part * PART + mixed % (PART - length), length);
        let byte = match number % 7 {
            0 => 0,
            _ => (number % 251) as u8 + 3,
        };
        match byte {
            0 => root.zero(range, true).await.expect("zeroed"),
            byte => {
                let bytes = vec![byte; range.length() as usize];
                root.write(range.offset(), bytes).await.expect("written");
            }
        }
        history.lock().expect("one of two").push((range, byte));
    }
}

/// That a part is what it was after one of these operations.
fn assert_was(
    part: u64,
    found: &[u8],
    history: &[(ByteRange, u8)],
    when: std::ops::RangeInclusive<usize>,
) {
    let place = part as usize * PART as usize;
    let mut model = vec![1; PART as usize];
    for count in 0..=*when.end() {
        if when.contains(&count) && model == found {
            return;
        }
        let Some((range, byte)) = history.get(count) else {
            break;
        };
        let start = range.offset() as usize - place;
        model[start..start + range.length() as usize].fill(*byte);
    }
    panic!("part {part} is what it never was between {when:?}");
}

/// Starts a backup beside two writers, and has `until` bring it to its end. What the target shows, and what was done before and
/// during the start.
fn beside_writers(spec: BackupSpec, is_image: bool, until: impl AsyncFn(&Yard) + Sync) {
    let stop = AtomicBool::new(false);
    let histories: [History; 2] = Default::default();
    let counts = || -> Vec<usize> {
        let counted = histories.iter();
        counted
            .map(|one| one.lock().expect("one of two").len())
            .collect()
    };
    let go_on = |more: usize| {
        let goal: Vec<usize> = counts().iter().map(|count| count + more).collect();
        while counts().iter().zip(&goal).any(|(count, goal)| count < goal) {
            std::thread::yield_now();
        }
    };
    block_on(async {
        let yard = Yard::new();
        let source = yard.add("s", 1).await;
        match is_image {
            true => yard.add_image("t").await,
            false => drop(yard.add("t", 2).await),
        }
        let root = yard.engine.open_root("s", true).await.expect("opened");
        let (before, after) = std::thread::scope(|scope| {
            let writers = [0, 1].map(|part| {
                let (root, stop, history) = (&root, &stop, &histories[part as usize]);
                scope.spawn(move || block_on(write_part(root, part, stop, history)))
            });
            let jobs = scope.spawn(|| {
                let mut counted = (Vec::new(), Vec::new());
                block_on(async {
                    go_on(20);
                    counted.0 = counts();
                    let started_job = yard.start(WorkSpec::Backup(spec.clone()));
                    started_job.await.expect("started");
                    // One more of each thread may be on its way.
                    counted.1 = counts().iter().map(|count| count + 1).collect();
                    go_on(40);
                    until(&yard).await;
                    go_on(20);
                });
                stop.store(true, Ordering::Release);
                counted
            });
            let counted = jobs.join();
            stop.store(true, Ordering::Release);
            for writer in writers {
                writer.join().expect("a writer");
            }
            counted.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        assert_eq!(yard.roots().await, ["s"], "back where it was");
        root.flush().await.expect("flushed");
        root.close().await.expect("closed");
        let target = yard.engine.open_root("t", false).await.expect("opened");
        let target = target.read(ByteRange::new(0, LENGTH)).await.expect("read");
        let source = std::fs::read(source).expect("read");
        for (part, history) in histories.iter().enumerate() {
            let history = history.lock().expect("the last one");
            let place = part * PART as usize..(part + 1) * PART as usize;
            let all = history.len()..=history.len();
            assert_was(part as u64, &source[place.clone()], &history, all);
            if spec.sync == SyncMode::Full {
                let when = before[part]..=after[part];
                assert_was(part as u64, &target[place], &history, when);
            }
        }
    });
}

fn full() -> BackupSpec {
    match backup() {
        WorkSpec::Backup(spec) => spec,
        _ => unreachable!("it is a backup"),
    }
}

#[test]
fn a_backup_is_one_moment_of_what_two_threads_write() {
    for is_image in [false, true] {
        let slow = BackupSpec {
            speed: 8 << 20,
            ..full()
        };
        for spec in [full(), slow] {
            beside_writers(spec, is_image, async |yard| yard.until(Status::Null));
        }
    }
}

#[test]
fn a_paused_backup_holds_no_writer_and_stays_what_it_was() {
    let slow = BackupSpec {
        speed: 1 << 20,
        ..full()
    };
    beside_writers(slow, true, async |yard| {
        yard.verb(VerbCall::Pause).await;
        yard.until(Status::Paused);
        yard.verb(VerbCall::SetSpeed { speed: 0 }).await;
        yard.verb(VerbCall::Resume).await;
        yard.until(Status::Null);
    });
}

#[test]
fn a_backup_of_what_is_overwritten_ends_when_it_is_told_to() {
    let none = BackupSpec {
        sync: SyncMode::None,
        ..full()
    };
    beside_writers(none, true, async |yard| {
        yard.verb(VerbCall::Cancel { force: true }).await;
        yard.until(Status::Null);
    });
}
