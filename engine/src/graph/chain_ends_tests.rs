//! A commit that cannot be completed leaves everybody where he was, and one that can takes everybody along.

use blockyard_ring::BackendChoice;
use blockyard_storage::buffer::BufferPool;
use tokio::task::LocalSet;

use super::*;
use crate::data::ThreadSet;
use crate::graph::permissions::Permissions;
use crate::graph::records::Edge;
use crate::image_policy::ImagePolicy;
use crate::node::news::News;
use crate::node::qcow2::tests::yard::{Setup, Yard};
use crate::request::{
    BackingRef, CommonOptions, DriverSpec, FileSpec, NodeRef, NodeSpec, Permission, Qcow2Spec,
};

const KEY: JobKey = JobKey(7);

/// An image on another node, if there is one, in a new file.
fn image(folder: &std::path::Path, name: &str, on: Option<&str>) -> NodeSpec {
    let filename = folder.join(name);
    std::fs::write(&filename, Yard::new(Setup::new(1, 16)).image.bytes()).expect("written");
    let file = NodeSpec {
        node_name: None,
        common: CommonOptions::default(),
        driver: DriverSpec::File(FileSpec {
            filename,
            ..FileSpec::default()
        }),
    };
    let mut spec = Qcow2Spec::over(NodeRef::Inline(Box::new(file)));
    if let Some(on) = on {
        spec.backing = BackingRef::Node(NodeRef::Name(on.to_owned()));
    }
    NodeSpec {
        node_name: Some(name.to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Qcow2(Box::new(spec)),
    }
}

/// Somebody on a node who does not let others write.
fn reader(id: NodeId) -> Edge {
    Edge {
        // Not a command's: whoever changes an image waits for those.
        user: User::Backend(JobKey(8)),
        child: id,
        role: "root",
        taken: Permissions::NONE,
        shared: Permissions::EVERY.without(Permission::Write),
    }
}

/// What is below a node, by the records and by its plan.
fn below(graph: &Graph, id: NodeId) -> [Option<NodeId>; 2] {
    let records = graph.records.borrow();
    let planned = match records.node(id).map(|node| node.plan.clone()) {
        Some(NodePlan::Qcow2 { backing, .. }) => backing,
        _ => None,
    };
    [records.backing(id), planned]
}

/// Runs a test in a graph of images, each on the one it is told to be on.
fn on_images(images: &[(&str, Option<&str>)], test: impl AsyncFnOnce(&Graph, &std::path::Path)) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().build().expect("a runtime");
    let pool = BufferPool::new(1 << 20);
    let threads = ThreadSet::start(1, BackendChoice::Threads, pool, News::channel().0);
    let threads = threads.expect("a thread");
    let folder = tempfile::tempdir().expect("a folder");
    LocalSet::new().block_on(&runtime, async {
        let graph = Graph::new(threads.clone(), ImagePolicy::default(), None);
        for (name, on) in images {
            graph
                .add(image(folder.path(), name, *on))
                .await
                .expect("added");
        }
        test(&graph, folder.path()).await;
    });
    threads.end();
}

#[test]
fn a_commit_whose_device_cannot_go_over_to_the_base_leaves_all_where_they_were() {
    let images = [
        ("base", None),
        ("top", Some("base")),
        ("o1", Some("top")),
        ("o2", Some("top")),
    ];
    on_images(&images, async |graph, _| {
        let id = |name: &str| graph.find(name).expect("there");
        let (base, top, overlays) = (id("base"), id("top"), [id("o1"), id("o2")]);
        let shared = Permissions::EVERY;
        let writer = graph
            .open_root("top", true, shared, false)
            .await
            .expect("opened");
        let nodes = JobNodes {
            source: Some(top),
            target: Some(base),
            filter: Some(top),
            ..JobNodes::default()
        };
        let own = reader(base);
        let reads = graph
            .records
            .borrow_mut()
            .change_edges(|edges| edges.push(own.clone()));
        reads.expect("nobody writes to it yet");
        let failed = graph
            .finish_active_commit(KEY, &nodes)
            .await
            .expect_err("refused");
        let text = failed.text;
        assert!(
            text.starts_with("Permission conflict on node 'base'"),
            "{text}"
        );
        assert!(!text.contains("shows the same"), "{text}");
        for overlay in overlays {
            assert_eq!(below(graph, overlay), [Some(top); 2]);
        }
        assert_eq!(graph.node_of_root(writer.id), Some(top));

        let gone = graph
            .records
            .borrow_mut()
            .change_edges(|edges| edges.retain(|edge| *edge != own));
        gone.expect("less is always possible");
        graph.finish_active_commit(KEY, &nodes).await.expect("done");
        for overlay in overlays {
            assert_eq!(below(graph, overlay), [Some(base); 2]);
        }
        assert_eq!(graph.node_of_root(writer.id), Some(base));
        graph.close_root(writer.id).await;
    });
}

/// What stays below a stream is what its last node stands on. Without that node there is no saying what it is: nothing is the one
/// answer that must not be given.
#[test]
fn a_stream_that_has_lost_its_last_node_leaves_the_chain_alone() {
    let images = [("base", None), ("mid", Some("base")), ("top", Some("mid"))];
    on_images(&images, async |graph, folder| {
        let id = |name: &str| graph.find(name).expect("there");
        let (base, mid, top) = (id("base"), id("mid"), id("top"));
        let stream = |last: NodeId| JobNodes {
            source: Some(top),
            target: Some(top),
            chain: Some(ChainPart {
                layers: 2,
                is_whole: false,
                device: top,
                inner: vec![mid, last],
                seen_bytes: 0,
                grows: false,
                named: NewBacking {
                    name: None,
                    mask_protocol: false,
                },
            }),
            ..JobNodes::default()
        };
        let before = std::fs::read(folder.join("top")).expect("read");
        let gone = NodeId(u64::MAX);
        graph
            .finish_chain(KEY, &stream(gone))
            .await
            .expect_err("it cannot know what stays");
        assert_eq!(below(graph, top), [Some(mid); 2]);
        let after = std::fs::read(folder.join("top")).expect("read");
        assert!(before == after, "its header has changed");

        graph.finish_chain(KEY, &stream(mid)).await.expect("done");
        assert_eq!(below(graph, top), [Some(base); 2]);
    });
}
