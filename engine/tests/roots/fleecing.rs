//! Nodes that save what is about to be changed, and show what was there, on real files.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockyard_engine::error::EngineError;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{
    CbwBitmap, CbwOptions, CbwSpec, CommonOptions, DriverSpec, NodeRef, NodeSpec, Request,
};
use blockyard_storage::ByteRange;

use crate::write_until;
use crate::yard::*;

fn cbw(file: &str, target: &str) -> CbwSpec {
    CbwSpec {
        file: NodeRef::Name(file.to_owned()),
        target: NodeRef::Name(target.to_owned()),
        bitmap: None,
        options: CbwOptions::default(),
        min_cluster_size: 0,
    }
}

async fn add(yard: &Yard, name: &str, driver: DriverSpec) -> Result<Reply, EngineError> {
    let spec = NodeSpec {
        node_name: Some(name.to_owned()),
        common: CommonOptions::default(),
        driver,
    };
    yard.call(Request::BlockdevAdd(spec)).await
}

async fn refused(yard: &Yard, spec: CbwSpec) -> String {
    let added = add(yard, "x", DriverSpec::CopyBeforeWrite(Box::new(spec))).await;
    added.expect_err("refused").text
}

#[test]
fn a_disk_is_read_as_it_was_while_a_thread_writes_to_it() {
    for is_image in [false, true] {
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        block_on(async {
            let yard = Yard::new();
            let source = yard.add("s", 1).await;
            match is_image {
                true => yard.add_image("t").await,
                false => drop(yard.add("t", 2).await),
            }
            let filter = DriverSpec::CopyBeforeWrite(Box::new(cbw("s", "t")));
            add(&yard, "c", filter).await.expect("added");
            let file = NodeRef::Name("c".to_owned());
            let shown = DriverSpec::SnapshotAccess { file };
            add(&yard, "sa", shown).await.expect("added");
            let root = yard.engine.open_root("c", true).await.expect("opened");
            let reader = yard.engine.open_root("sa", false).await.expect("opened");
            let text = "Permission conflict on node 's': permissions 'write' are both required by \
                        an unnamed block device (uses node 's' as 'root' child) and unshared by \
                        node 'c' (uses node 's' as 'file' child).";
            let writer = yard.engine.open_root("s", true).await.map(drop);
            assert_eq!(writer.expect_err("refused").text, text);
            let model = std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().build();
                    let runtime = runtime.expect("a runtime");
                    runtime.block_on(write_until(&root, &stop, &written))
                });
                let reads = scope.spawn(|| {
                    block_on(async {
                        while written.load(Ordering::Acquire) < 300 {
                            let all = reader.read(ByteRange::new(0, LENGTH)).await;
                            let all = all.expect("read");
                            assert!(all.iter().all(|byte| *byte == 1), "not what was there");
                        }
                    });
                });
                let read = reads.join();
                stop.store(true, Ordering::Release);
                read.expect("only what was there");
                writer.join().expect("the writer")
            });
            root.flush().await.expect("flushed");
            assert!(std::fs::read(source).expect("read") == model);
            let used = yard.remove("t").await.expect_err("in use");
            assert_eq!(used.text, "Block device t is in use");
            reader.close().await.expect("closed");
            root.close().await.expect("closed");
            let used = yard.remove("c").await.expect_err("in use");
            assert_eq!(used.text, "Block device c is in use");
            for name in ["sa", "c", "s", "t"] {
                yard.remove(name).await.expect("nobody uses it");
            }
        });
    }
}

#[test]
fn what_cannot_be_saved_there_is_told_when_the_node_is_added() {
    block_on(async {
        let yard = Yard::new();
        yard.add("s", 1).await;
        yard.add("t", 2).await;
        let bitmap = |node: &str| CbwSpec {
            bitmap: Some(CbwBitmap {
                node: node.to_owned(),
                name: "b".to_owned(),
            }),
            ..cbw("s", "t")
        };
        let unit = |min_cluster_size| CbwSpec {
            min_cluster_size,
            ..cbw("s", "t")
        };
        let block = "Cannot create block-copy-state: min-cluster-size";
        for (spec, text) in [
            (bitmap("s"), "Dirty bitmap 'b' not found".to_owned()),
            (bitmap("zz"), "Node 'zz' not found".to_owned()),
            (unit(3), format!("{block} needs to be a power of 2")),
            (
                unit(1 << 63),
                format!("{block} too large: 9223372036854775808 > 9223372036854775807"),
            ),
            (
                cbw("s", "none"),
                "Cannot find device='none' nor node-name='none'".to_owned(),
            ),
        ] {
            assert_eq!(refused(&yard, spec).await, text);
        }
        for name in ["s", "t"] {
            yard.remove(name).await.expect("nothing is left above it");
        }
    });
}
