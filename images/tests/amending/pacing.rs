//! Progress, pauses and cancellation.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use blockyard_images::qcow2::amend::{AmendError, amend};
use blockyard_images::{Cancelled, Pace};
use blockyard_simulator::run;
use blockyard_storage::{LocalFuture, Storage};

use crate::crashes::{Judge, cases, disk_of};
use crate::verdict::ours;

/// Cancels, or pauses, at one of its checkpoints.
#[derive(Default)]
struct Stopping {
    expected: Cell<u64>,
    done: Cell<u64>,
    asked: Cell<u64>,
    cancel_at: Option<u64>,
    pause_at: Option<u64>,
    paused: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

impl Stopping {
    fn resume(&self) {
        self.paused.set(false);
        self.waker.take().expect("it waits").wake();
    }
}

impl Pace for Stopping {
    fn expect(&self, bytes: u64) {
        self.expected.set(self.expected.get() + bytes);
    }

    fn done(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        assert!(self.done.get() <= self.expected.get(), "more than all");
    }

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        self.asked.set(self.asked.get() + 1);
        if self.pause_at == Some(self.asked.get()) {
            self.paused.set(true);
        }
        Box::pin(async {
            poll_fn(|cx| match self.paused.get() {
                true => {
                    self.waker.set(Some(cx.waker().clone()));
                    Poll::Pending
                }
                false => Poll::Ready(()),
            })
            .await;
            match self.cancel_at.is_some_and(|at| self.asked.get() >= at) {
                true => Err(Cancelled),
                false => Ok(()),
            }
        })
    }
}

#[test]
fn cancelled_anywhere_the_image_is_whole_and_nothing_leaks() {
    let mut cancelled = 0;
    for case in cases() {
        let judge = Judge::of(&case);
        for at in 1.. {
            let told = format!("{} cancelled at {at}", case.told);
            let (world, disk) = disk_of(&case, at);
            let file: Rc<dyn Storage> = disk.open();
            let pace = Stopping {
                cancel_at: Some(at),
                ..Stopping::default()
            };
            let ended = run(amend(&file, &case.options, &pace), || world.step());
            let ended = ended.expect("it ends");
            let bytes = disk.bytes();
            let is_new = judge.look(&bytes, &told);
            assert_eq!(is_new, ended.is_ok(), "{told}");
            let report = ours(&bytes).expect("checked").report;
            let wrong = (report.corruptions, report.check_errors, report.leaks);
            assert_eq!(wrong, (0, 0, 0), "{told}");
            let cut = disk.bytes_after_cut(at);
            judge.look(&cut, &format!("{told}, then the power went"));
            if bytes.starts_with(&case.image[..case.image.len().min(512)]) {
                assert_eq!(bytes.len(), case.image.len(), "{told}: room was kept");
            }
            match ended {
                Err(AmendError::Cancelled) => cancelled += 1,
                ended => {
                    ended.expect("amended");
                    break;
                }
            }
        }
    }
    assert!(cancelled > 100, "{cancelled}");
}

#[test]
fn progress_ends_at_all_of_it() {
    for case in cases() {
        let (world, disk) = disk_of(&case, 1);
        let file: Rc<dyn Storage> = disk.open();
        let pace = Stopping::default();
        let ended = run(amend(&file, &case.options, &pace), || world.step());
        ended.expect("it ends").expect("amended");
        assert!(pace.done.get() > 0, "{}", case.told);
        assert_eq!(pace.done.get(), pace.expected.get(), "{}", case.told);
    }
}

#[test]
fn nothing_is_written_during_a_pause() {
    let mut pauses = 0;
    for case in cases() {
        for at in 1.. {
            let (world, disk) = disk_of(&case, at);
            let file: Rc<dyn Storage> = disk.open();
            let pace = Stopping {
                pause_at: Some(at),
                ..Stopping::default()
            };
            let at_pause = Cell::new(None);
            let ended = run(amend(&file, &case.options, &pace), || {
                if !pace.paused.get() {
                    return world.step();
                }
                let bytes = at_pause.take().unwrap_or_else(|| disk.bytes());
                assert!(disk.bytes() == bytes, "{} {at}", case.told);
                at_pause.set(Some(bytes));
                // Reads that are in flight come to their end.
                if !world.step() {
                    pauses += 1;
                    pace.resume();
                }
                true
            });
            ended.expect("it ends").expect("amended");
            if pace.asked.get() < at {
                break;
            }
        }
    }
    assert!(pauses > 100, "{pauses}");
}
