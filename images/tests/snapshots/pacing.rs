//! Progress and cancellation.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::qcow2::snapshot::SnapshotError;
use blockyard_images::{Cancelled, Pace};
use blockyard_simulator::run;
use blockyard_storage::{LocalFuture, Storage};

use crate::cases::{Judge, cases};

/// Cancels at one of its checkpoints.
#[derive(Default)]
struct Stopping {
    expected: Cell<u64>,
    done: Cell<u64>,
    asked: Cell<u64>,
    cancel_at: u64,
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
        let outcome = match self.asked.get() >= self.cancel_at {
            true => Err(Cancelled),
            false => Ok(()),
        };
        Box::pin(std::future::ready(outcome))
    }
}

#[test]
fn cancelled_anywhere_the_image_is_what_it_was() {
    let mut cancelled = 0;
    for case in cases() {
        let judge = Judge::of(&case);
        for cancel_at in 1.. {
            let told = format!("{} cancelled at {cancel_at}", case.told);
            let (world, disk) = case.disk(cancel_at);
            let file: Rc<dyn Storage> = disk.open();
            let pace = Stopping {
                cancel_at,
                ..Stopping::default()
            };
            let ended = run(case.run(&file, &pace), || world.step()).expect("it ends");
            let is_new = judge.look(&disk.bytes(), &told);
            match ended {
                Err(SnapshotError::Cancelled) => {
                    cancelled += 1;
                    assert!(!is_new, "{told}");
                    assert_eq!(disk.bytes().len(), case.image.len(), "{told}");
                }
                Err(error) => panic!("{told}: {error}"),
                Ok(()) => {
                    assert!(is_new, "{told}");
                    assert_eq!(pace.done.get(), pace.expected.get(), "{told}");
                    assert!(pace.done.get() > 0, "{told}");
                    break;
                }
            }
        }
    }
    assert!(cancelled > 100, "{cancelled}");
}
