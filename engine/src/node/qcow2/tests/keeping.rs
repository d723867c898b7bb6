//! Bitmaps that the image keeps, while its disk is written, opened in other ways, and the power goes: none that is valid afterwards
//! has missed a change.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::{Buffer, ByteRange, ZeroMode};

use super::reopening::plan;
use super::yard::{DataFile, Setup, Yard};
use crate::bitmap::{Bitmap, Need, NodeBitmaps};
use crate::node::Node;
use crate::node::build::build;
use crate::node::dirty_map::DirtyMap;

const NAME: &str = "b";
const GRANULE: u64 = 512;

/// The image as a node with what it keeps.
struct Opened {
    node: Rc<dyn Node>,
    bitmaps: Arc<NodeBitmaps>,
}

async fn open(yard: &Yard, read_only: bool) -> Opened {
    let bitmaps: Arc<NodeBitmaps> = Arc::default();
    let plan = plan(yard, read_only, 1 << 16);
    let built = build(&yard.context, "image", &plan, Arc::clone(&bitmaps)).await;
    Opened {
        node: built.expect("an image").node,
        bitmaps,
    }
}

impl Opened {
    async fn close(&self) {
        self.node.flush().await.expect("flushed");
        self.node.store_bitmaps().await.expect("stored");
        self.node.close().await.expect("closed");
    }

    async fn content(&self) -> Vec<u8> {
        let length = self.node.facts().length_bytes as usize;
        let read = self.node.read(0, Buffer::zeroed(length)).await;
        read.outcome.expect("read");
        read.buffer.as_slice().to_vec()
    }

    /// What the bitmap says has changed; `None`: nothing can be said.
    fn changed(&self) -> Option<DirtyMap> {
        let map = self.bitmaps.with(NAME, Need::Read, |one| one.map().clone());
        map.ok()
    }
}

/// Writes, and whatever else comes to a node, until it is closed. What may have changed is put among `written` before.
async fn session(yard: &Yard, dice: &Seed, written: &RefCell<Vec<ByteRange>>) {
    let opened = open(yard, false).await;
    assert!(opened.changed().is_some(), "it was stored");
    let length = opened.node.facts().length_bytes;
    for _ in 0..dice.below(8) {
        let offset = GRANULE * dice.below(length / GRANULE);
        let longest = (length - offset).min(5 << 10);
        let range = ByteRange::new(offset, 1 + dice.below(longest));
        match dice.below(8) {
            0 => opened.node.flush().await.expect("flushed"),
            1 => {
                for read_only in [true, false] {
                    let plan = plan(yard, read_only, 1 << 14);
                    let reopened = opened.node.reopen(&yard.context, &plan).await;
                    reopened.expect("opened in another way");
                }
            }
            2 => {
                written.borrow_mut().push(range);
                let zeroed = opened.node.zero(range, ZeroMode::default()).await;
                zeroed.expect("zeroed");
            }
            _ => {
                written.borrow_mut().push(range);
                let fill = dice.any() as u8;
                let bytes = vec![fill; range.length() as usize];
                let wrote = opened.node.write(offset, Buffer::copy_of(&bytes)).await;
                wrote.outcome.expect("written");
            }
        }
    }
    opened.close().await;
}

/// Every granule that is another than it was has changed according to the map, and none that nobody has written to.
fn look(map: &DirtyMap, before: &[u8], now: &[u8], written: &[ByteRange], told: &str) {
    for (index, (old, new)) in before.chunks(512).zip(now.chunks(512)).enumerate() {
        let granule = ByteRange::new(index as u64 * GRANULE, GRANULE);
        let is_dirty = map.run_in(granule).is_some();
        assert!(
            old == new || is_dirty,
            "{told}: a change at {granule:?} is missed"
        );
        let is_written = written.iter().any(|range| range.overlaps(&granule));
        assert!(
            is_written || !is_dirty,
            "{told}: {granule:?} is what it was"
        );
    }
}

#[test]
fn no_bitmap_that_is_valid_has_missed_a_change() {
    let seen = RefCell::new([0_u32; 3]);
    each_seed(
        "blockyard-engine",
        "no_bitmap_has_missed_a_change",
        60,
        |seed| {
            let any = Setup::random(seed);
            let setup = Setup {
                version: Version::V3,
                data_file: DataFile::Inside,
                // A disk without length keeps none.
                size_bytes: any.size_bytes.max(GRANULE),
                ..any
            };
            let dice = Seed::new(seed ^ 0xb17);
            let yard = Yard::new(setup);
            let before = yard.drive(async {
                let opened = open(&yard, false).await;
                let length = opened.node.facts().length_bytes;
                let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
                bitmap.keep();
                opened.bitmaps.add(bitmap).expect("added");
                opened.close().await;
                opened.content().await
            });
            let written = RefCell::default();
            for number in 0..4 {
                let told = format!("seed {seed} session {number}");
                let end = match dice.below(3) {
                    0 => yard.world.steps() + dice.below(60),
                    _ => u64::MAX,
                };
                let work = session(&yard, &dice, &written);
                let ended = yard.drive_while(work, || yard.world.steps() < end);
                if ended.is_none() {
                    yard.cut_power();
                }
                let (map, now) = yard.drive(async {
                    let opened = open(&yard, true).await;
                    (opened.changed(), opened.content().await)
                });
                let Some(map) = map else {
                    assert!(ended.is_none(), "{told}: it was closed");
                    seen.borrow_mut()[0] += 1;
                    return;
                };
                look(&map, &before, &now, &written.borrow(), &told);
                seen.borrow_mut()[1 + usize::from(ended.is_none())] += 1;
            }
        },
    );
    let seen = seen.into_inner();
    assert!(seen.iter().all(|count| *count > 1), "{seen:?}");
}
