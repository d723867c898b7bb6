//! Dirty bitmaps of real files while writers write: each holds the granules that were changed as long as it recorded, and no more.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::Path;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::reply::{BitmapView, Reply};
use blockyard_engine::request::{
    BitmapChange, BitmapName, CommonOptions, Discard, DriverSpec, FileSpec, NodeRef, NodeSpec,
    Request,
};
use blockyard_engine::root_handle::RootHandle;
use blockyard_storage::ByteRange;

const LENGTH: u64 = (1 << 20) + 512;
const NODE: &str = "n";

/// Numbers by seed (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn range(&mut self) -> ByteRange {
        let longest = [1, 512, 4096, 200_000][self.below(4) as usize];
        let length = 1 + self.below(longest);
        let offset = self.below(LENGTH - length + 1);
        ByteRange::new(offset, length)
    }
}

/// What a bitmap has to hold.
struct Model {
    granularity_bytes: u64,
    records: bool,
    granules: BTreeSet<u64>,
}

impl Model {
    fn mark(&mut self, range: ByteRange) {
        let granularity = self.granularity_bytes;
        self.granules
            .extend(range.offset() / granularity..range.end().div_ceil(granularity));
    }

    fn merge(&mut self, granules: &BTreeSet<u64>, granularity_bytes: u64) {
        for granule in granules {
            let range = ByteRange::new(granule * granularity_bytes, granularity_bytes);
            self.mark(range.clamp_end(LENGTH));
        }
    }
}

fn bitmap(index: usize) -> BitmapName {
    BitmapName {
        node: NODE.to_owned(),
        name: format!("b{index}"),
    }
}

async fn change(engine: &EngineHandle, change: BitmapChange) {
    let changed = engine.call(Request::ChangeBitmap(change)).await;
    changed.expect("the bitmap is changed");
}

/// Adds a raw node on a new file.
async fn add_node(engine: &EngineHandle, path: &Path) {
    let file = std::fs::File::create(path).expect("made");
    file.set_len(LENGTH).expect("sized");
    let common = CommonOptions {
        discard: Some(Discard::Unmap),
        ..CommonOptions::default()
    };
    let spec = NodeSpec {
        node_name: Some(NODE.to_owned()),
        common,
        driver: DriverSpec::Raw {
            file: NodeRef::Inline(Box::new(NodeSpec {
                node_name: None,
                common,
                driver: DriverSpec::File(FileSpec {
                    filename: path.to_owned(),
                    ..FileSpec::default()
                }),
            })),
            offset: None,
            size: None,
        },
    };
    let added = engine.call(Request::BlockdevAdd(spec)).await;
    added.expect("the node is added");
}

/// The bitmaps of the node, oldest first.
async fn bitmaps(engine: &EngineHandle) -> Vec<BitmapView> {
    let query = Request::QueryNamedBlockNodes { flat: true };
    let Ok(Reply::Nodes(mut nodes)) = engine.call(query).await else {
        panic!("the nodes are told");
    };
    let place = nodes.iter().position(|node| node.node_name == NODE);
    let mut found = nodes.remove(place.expect("the node")).bitmaps;
    found.reverse();
    found
}

/// Changes something through the root.
async fn write(root: &RootHandle, dice: &mut Dice) -> ByteRange {
    let range = dice.range();
    let done = match dice.below(4) {
        0 => root.zero(range, dice.below(2) == 0).await,
        1 => root.discard(range).await,
        _ => {
            let bytes = vec![dice.below(256) as u8; range.length() as usize];
            root.write(range.offset(), bytes).await
        }
    };
    done.expect("written");
    range
}

async fn one_seed(engine: &EngineHandle, path: &Path, seed: u64) {
    let mut dice = Dice(seed * 2 + 1);
    add_node(engine, path).await;
    let root = engine.open_root(NODE, true).await.expect("a writer");
    let mut models = Vec::new();
    for index in 0..3 {
        let granularity_bytes = 512 << dice.below(9);
        let disabled = dice.below(4) == 0;
        models.push(Model {
            granularity_bytes,
            records: !disabled,
            granules: BTreeSet::new(),
        });
        change(
            engine,
            BitmapChange::Add {
                bitmap: bitmap(index),
                granularity_bytes: u32::try_from(granularity_bytes).ok(),
                persistent: false,
                disabled,
            },
        )
        .await;
    }
    for _ in 0..40 {
        let index = dice.below(3) as usize;
        let other = dice.below(3) as usize;
        match dice.below(10) {
            0 => {
                change(engine, BitmapChange::Clear(bitmap(index))).await;
                models[index].granules.clear();
            }
            1 => {
                change(engine, BitmapChange::Enable(bitmap(index))).await;
                models[index].records = true;
            }
            2 => {
                change(engine, BitmapChange::Disable(bitmap(index))).await;
                models[index].records = false;
            }
            3 => {
                change(
                    engine,
                    BitmapChange::Merge {
                        target: bitmap(index),
                        sources: vec![bitmap(other)],
                    },
                )
                .await;
                let (granules, unit) = {
                    let from = &models[other];
                    (from.granules.clone(), from.granularity_bytes)
                };
                models[index].merge(&granules, unit);
            }
            _ => {
                let range = write(&root, &mut dice).await;
                for model in models.iter_mut().filter(|model| model.records) {
                    model.mark(range);
                }
            }
        }
    }
    let expected: Vec<(u64, bool)> = models
        .iter()
        .map(|model| {
            let granules = model.granules.len() as u64;
            (granules * model.granularity_bytes, model.records)
        })
        .collect();
    let found: Vec<(u64, bool)> = bitmaps(engine)
        .await
        .iter()
        .map(|view| (view.count_bytes, view.recording))
        .collect();
    assert_eq!(found, expected, "seed {seed}");
    root.close().await.expect("closed");
    let node_name = NODE.to_owned();
    let deleted = engine.call(Request::BlockdevDel { node_name }).await;
    deleted.expect("the node is deleted");
}

#[tokio::test]
async fn what_is_written_while_a_bitmap_records_is_in_it() {
    let engine = Engine::start(EngineConfig::default()).expect("the engine starts");
    let handle = engine.handle();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    for seed in 1..=200 {
        one_seed(&handle, &folder.path().join("n.img"), seed).await;
    }
}

/// Several writers at once, while a bitmap is cleared again and again into another: nothing that was written is in neither.
#[tokio::test]
async fn no_write_is_missed_beside_changes_of_a_bitmap() {
    let engine = Engine::start(EngineConfig::default()).expect("the engine starts");
    let handle = engine.handle();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    add_node(&handle, &folder.path().join("n.img")).await;
    for index in 0..2 {
        change(
            &handle,
            BitmapChange::Add {
                bitmap: bitmap(index),
                granularity_bytes: Some(512),
                persistent: false,
                disabled: false,
            },
        )
        .await;
    }
    let writer = |seed: u64| {
        let handle = handle.clone();
        async move {
            let root = handle.open_root(NODE, true).await.expect("a writer");
            let mut dice = Dice(seed);
            let mut written = Vec::new();
            for _ in 0..200 {
                written.push(write(&root, &mut dice).await);
            }
            root.close().await.expect("closed");
            written
        }
    };
    let switching = async {
        for _ in 0..100 {
            // Off and on again: whoever records all the time holds what is written meanwhile.
            change(&handle, BitmapChange::Disable(bitmap(1))).await;
            change(
                &handle,
                BitmapChange::Merge {
                    target: bitmap(1),
                    sources: vec![bitmap(0)],
                },
            )
            .await;
            change(&handle, BitmapChange::Enable(bitmap(1))).await;
        }
    };
    let (first, second, third, ()) = tokio::join!(writer(3), writer(5), writer(7), switching);
    change(
        &handle,
        BitmapChange::Merge {
            target: bitmap(1),
            sources: vec![bitmap(0)],
        },
    )
    .await;
    let mut model = Model {
        granularity_bytes: 512,
        records: true,
        granules: BTreeSet::new(),
    };
    for range in first.into_iter().chain(second).chain(third) {
        model.mark(range);
    }
    let expected = model.granules.len() as u64 * 512;
    let counts: Vec<u64> = bitmaps(&handle)
        .await
        .iter()
        .map(|view| view.count_bytes)
        .collect();
    assert_eq!(counts, [expected, expected]);
}
