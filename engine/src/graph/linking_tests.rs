//! Tests of changing edges: what follows from a change, what is refused, and that nothing else changes.

use std::sync::Arc;

use blockyard_ring::{HostFile, OpenMode};
use proptest::prelude::*;

use super::*;
use crate::data::ThreadId;
use crate::graph::disk_facts::DiskQuestion;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::HeldLocks;
use crate::graph::permissions::ExtraPermissions;
use crate::graph::records::{FILE_ROLE, ImageRecord};
use crate::job::context::JobKey;
use crate::request::{CommonOptions, DetectZeroes, NullSpec};

const READ: Permissions = Permissions::NONE.with(Permission::ConsistentRead);
const KEPT: Permissions = READ.with(Permission::WriteUnchanged);

fn node(records: &mut Records, name: &str, driver: &'static str) -> NodeId {
    let id = records.new_id();
    let options = crate::graph::add::null_options(NullSpec::default(), false);
    records.insert(NodeRecord {
        id,
        name: name.to_owned(),
        batch: None,
        driver,
        filename: FileName::default(),
        image: Some(ImageRecord::default()),
        read_only: false,
        inactive: false,
        said: CommonOptions::default(),
        inherits_from: None,
        opened_as: None,
        detect_zeroes: DetectZeroes::Off,
        cache_direct: false,
        cache_no_flush: false,
        monitor_owned: true,
        fixed_size: false,
        windowed: false,
        force_share: false,
        extra: ExtraPermissions::default(),
        exclusive: false,
        thread: ThreadId(0),
        plan: NodePlan::Null(options.expect("fits")),
        locked: None,
        bitmaps: Arc::default(),
        disk: DiskQuestion::default(),
    });
    id
}

fn edge(user: User, child: NodeId, role: &'static str) -> Edge {
    Edge {
        user,
        child,
        role,
        taken: Permissions::NONE,
        shared: Permissions::EVERY,
    }
}

fn link(
    records: &mut Records,
    parent: NodeId,
    child: NodeId,
    role: &'static str,
) -> Result<(), EngineError> {
    records.change_edges(|edges| edges.push(edge(User::Node(parent), child, role)))
}

fn between(records: &Records, parent: NodeId, child: NodeId) -> (Permissions, Permissions) {
    let edge = records.children(parent).find(|edge| edge.child == child);
    let edge = edge.expect("linked");
    (edge.taken, edge.shared)
}

fn text(outcome: Result<(), EngineError>) -> String {
    outcome.expect_err("refused").text
}

/// Overlay, file, backing: the backing is the youngest, as with one that an image names.
fn small_chain(records: &mut Records) -> (NodeId, NodeId, NodeId) {
    let file = node(records, "file", "file");
    let top = node(records, "top", "qcow2");
    let base = node(records, "base", "qcow2");
    link(records, top, file, FILE_ROLE).expect("free");
    link(records, top, base, BACKING_ROLE).expect("free");
    (top, file, base)
}

/// What qemu-storage-daemon 10.0 shows for the same chains.
#[test]
fn an_image_keeps_others_off_its_file_and_lets_them_have_its_backing() {
    let mut records = Records::default();
    let (top, file, base) = small_chain(&mut records);
    let writes = READ.with(Permission::Write).with(Permission::Resize);
    assert_eq!(between(&records, top, file), (writes, KEPT));
    assert_eq!(
        between(&records, top, base),
        (Permissions::NONE, Permissions::EVERY)
    );
    // A reader who wants what it reads to stay as it is.
    let reader = Edge {
        taken: READ,
        shared: KEPT,
        ..edge(User::Job(JobKey(1)), top, "root")
    };
    records
        .change_edges(|edges| edges.push(reader))
        .expect("free");
    assert_eq!(between(&records, top, base), (READ, KEPT));
    assert_eq!(between(&records, top, file), (writes, KEPT));
    records
        .change_edges(|edges| edges.retain(|edge| edge.role != "root"))
        .expect("less");
    assert_eq!(
        between(&records, top, base),
        (Permissions::NONE, Permissions::EVERY)
    );
}

/// Whoever leaves a node while that is still being given away takes no image lock from it.
#[test]
fn what_a_node_becomes_frees_its_image_when_it_has_become_that() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, [0; 512]).expect("written");
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let file = HostFile::open(&path, mode).expect("opened");
    let mut records = Records::default();
    let disk = node(&mut records, "disk", "file");
    let record = records.node_mut(disk).expect("there");
    record.locked = Some((file, HeldLocks::default()));
    let writes = READ.with(Permission::Write);
    let users = [RootId(1), RootId(2)].map(User::Root);
    let edges = users.map(|user| Edge {
        taken: writes,
        ..edge(user, disk, "root")
    });
    records.change_edges(|all| all.extend(edges)).expect("free");
    let held = |records: &Records| {
        let locked = records.node(disk).and_then(|node| node.locked.as_ref());
        locked.map(|(_, held)| held.used).expect("a file")
    };
    assert_eq!(held(&records), writes);
    let mut becomes = records.node(disk).expect("there").clone();
    becomes.inactive = true;
    let mut change = super::Change::new(vec![becomes], Vec::new());
    change.roots = [RootId(1), RootId(2)]
        .map(|id| RootAccess {
            id,
            taken: Permissions::NONE,
            shared: Permissions::EVERY,
        })
        .into();
    records.change_nodes(&mut change).expect("idle");
    assert_eq!(held(&records), writes, "it may still be written to");
    records
        .change_edges(|all| all.retain(|edge| edge.user != users[1]))
        .expect("fewer");
    assert_eq!(held(&records), writes, "somebody else has left");
    records.settle(&change).expect("it is that");
    assert_eq!(held(&records), Permissions::NONE);
}

/// What qemu-storage-daemon 10.0 shows for the same chain.
#[test]
fn an_inactive_image_lets_others_do_everything() {
    let mut records = Records::default();
    let (top, file, base) = small_chain(&mut records);
    records.node_mut(top).expect("there").inactive = true;
    let looks = edge(User::Command, top, "root");
    records
        .change_edges(|edges| edges.push(looks.clone()))
        .expect("free");
    assert_eq!(between(&records, top, file), (READ, Permissions::EVERY));
    let none = (Permissions::NONE, Permissions::EVERY);
    assert_eq!(between(&records, top, base), none);
    for (permission, name) in [
        (Permission::Write, "write"),
        (Permission::WriteUnchanged, "write unchanged"),
        (Permission::Resize, "resize"),
    ] {
        let takes = Edge {
            taken: READ.with(permission),
            ..looks.clone()
        };
        let refused = records.change_edges(|edges| edges.push(takes));
        let expected = format!("Permission '{name}' unavailable on inactive node");
        assert_eq!(text(refused), expected);
    }
    let above = node(&mut records, "above", "raw");
    let refused = link(&mut records, above, top, FILE_ROLE);
    let expected = "Inactive 'top' can't be a file child of active 'above'";
    assert_eq!(text(refused), expected);
    records.node_mut(above).expect("there").inactive = true;
    link(&mut records, above, top, FILE_ROLE).expect("inactive, too");
}

#[test]
fn an_image_that_is_only_read_lets_others_read_its_file() {
    let mut records = Records::default();
    let (top, file, _) = small_chain(&mut records);
    let data = node(&mut records, "data", "file");
    link(&mut records, top, data, DATA_FILE_ROLE).expect("free");
    records.node_mut(top).expect("there").read_only = true;
    records
        .change_edges(|edges| edges.push(edge(User::Command, top, "root")))
        .expect("free");
    assert_eq!(between(&records, top, file), (READ, KEPT));
    let shared = Permissions::EVERY.without(Permission::Resize);
    assert_eq!(between(&records, top, data), (Permissions::NONE, shared));
}

#[test]
fn a_data_file_is_used_as_the_image_is() {
    let mut records = Records::default();
    let (top, file, _) = small_chain(&mut records);
    let data = node(&mut records, "data", "file");
    link(&mut records, top, data, DATA_FILE_ROLE).expect("free");
    let shared = Permissions::EVERY.without(Permission::Resize);
    assert_eq!(between(&records, top, data), (Permissions::NONE, shared));
    // The target of a mirror.
    let unchanged = Permissions::NONE.with(Permission::WriteUnchanged);
    let target = Edge {
        taken: Permissions::NONE.with(Permission::Write),
        shared: unchanged,
        ..edge(User::Backend(JobKey(1)), top, "root")
    };
    records
        .change_edges(|edges| edges.push(target))
        .expect("free");
    let grows = Permissions::NONE
        .with(Permission::Write)
        .with(Permission::Resize);
    assert_eq!(between(&records, top, data), (grows, unchanged));
    let all = grows.with(Permission::ConsistentRead);
    assert_eq!(between(&records, top, file), (all, unchanged));
}

#[test]
fn one_file_does_not_hold_two_images() {
    let mut records = Records::default();
    let (_, file, _) = small_chain(&mut records);
    let other = node(&mut records, "other", "qcow2");
    let before = records.edges.clone();
    assert_eq!(
        text(link(&mut records, other, file, FILE_ROLE)),
        "Permission conflict on node 'file': permissions 'write, resize' are both required by \
         node 'top' (uses node 'file' as 'file' child) and unshared by node 'other' (uses node \
         'file' as 'file' child)."
    );
    assert_eq!(records.edges, before);
    let outcome = link(&mut records, other, file, DATA_FILE_ROLE);
    assert_eq!(
        text(outcome),
        "Permission conflict on node 'file': permissions 'resize' are both required by node 'top' \
         (uses node 'file' as 'file' child) and unshared by node 'other' (uses node 'file' as \
         'data-file' child)."
    );
    assert_eq!(records.edges, before);
}

#[test]
fn nothing_is_its_own_backing() {
    let mut records = Records::default();
    let (top, _, base) = small_chain(&mut records);
    let before = records.edges.clone();
    assert_eq!(
        text(link(&mut records, top, top, BACKING_ROLE)),
        "Making 'top' a backing child of 'top' would create a cycle"
    );
    let outcome = link(&mut records, base, top, BACKING_ROLE);
    assert!(text(outcome).ends_with("would create a cycle"));
    assert_eq!(records.edges, before);
}

#[test]
fn an_overlay_keeps_its_backing_busy() {
    let mut records = Records::default();
    let (top, file, base) = small_chain(&mut records);
    assert_eq!(records.check_free(top), Ok(()));
    assert_eq!(records.check_free(file), Ok(()));
    assert_eq!(records.check_no_job(base), Ok(()));
    let busy = "Node 'base' is busy: node is used as backing hd of 'top'";
    assert_eq!(text(records.check_free(base)), busy);
}

#[test]
fn a_chain_of_any_length_is_walked() {
    let mut records = Records::default();
    let mut above = node(&mut records, "top", "qcow2");
    let top = above;
    for layer in 0..600 {
        let below = node(&mut records, &format!("n{layer}"), "qcow2");
        link(&mut records, above, below, BACKING_ROLE).expect("free");
        above = below;
    }
    assert_eq!(records.chain_depth(top), 600);
    let component = records.component(top);
    assert_eq!(component.first(), Some(&above));
    assert_eq!(component.last(), Some(&top));
    let reader = Edge {
        taken: READ,
        shared: KEPT,
        ..edge(User::Job(JobKey(1)), top, "root")
    };
    records
        .change_edges(|edges| edges.push(reader))
        .expect("free");
    let users: Vec<_> = records
        .users(above)
        .map(|edge| (edge.taken, edge.shared))
        .collect();
    assert_eq!(users, [(READ, KEPT)]);
}

#[test]
fn memory_of_images_counts_for_the_command_that_opens_them() {
    let mut records = Records::default();
    let (one, other) = (records.new_batch(), records.new_batch());
    for (name, batch, tables_bytes) in [
        ("a", Some(one), 1 << 20),
        ("b", Some(one), 3 << 20),
        ("c", Some(other), 5 << 20),
        ("d", None, 7 << 20),
    ] {
        let id = node(&mut records, name, "qcow2");
        let record = records.node_mut(id).expect("there");
        record.batch = batch;
        record.image = Some(ImageRecord {
            tables_bytes,
            ..ImageRecord::default()
        });
    }
    assert_eq!(records.memory_bytes(one), 4 << 20);
    assert_eq!(records.memory_bytes(other), 5 << 20);
    records.publish(one);
    assert_eq!(records.memory_bytes(one), 0);
}

const DRIVERS: [&str; 4] = ["qcow2", "raw", "copy-before-write", "file"];
const ROLES: [&str; 3] = [FILE_ROLE, BACKING_ROLE, DATA_FILE_ROLE];
const NODES: usize = 8;

/// One change: an edge between two nodes comes, or the n-th edge goes, or a job takes and shares something.
#[derive(Clone, Debug)]
enum Change {
    Link(usize, usize, usize),
    Cut(usize),
    Use(usize, u8, u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..NODES, 0..NODES, 0..ROLES.len()).prop_map(|(a, b, c)| Change::Link(a, b, c)),
        2 => (0..16_usize).prop_map(Change::Cut),
        2 => (0..NODES, 0..16_u8, 0..16_u8).prop_map(|(a, b, c)| Change::Use(a, b, c)),
    ]
}

fn set(bits: u8) -> Permissions {
    crate::graph::permissions::ALL
        .into_iter()
        .filter(|one| bits & 1 << *one as u8 != 0)
        .fold(Permissions::NONE, Permissions::with)
}

proptest! {
    /// What is worked out for a part of the graph is what working out all of it comes to.
    #[test]
    fn a_change_reaches_all_that_follows_from_it(
        drivers in proptest::collection::vec(0..DRIVERS.len(), NODES),
        changes in proptest::collection::vec(change(), 1..40),
    ) {
        let mut records = Records::default();
        let nodes: Vec<NodeId> = drivers
            .iter()
            .map(|driver| node(&mut records, "n", DRIVERS[*driver]))
            .collect();
        for change in changes {
            let before = records.edges.clone();
            let outcome = records.change_edges(|edges| match &change {
                Change::Link(parent, child, role) => {
                    edges.push(edge(User::Node(nodes[*parent]), nodes[*child], ROLES[*role]));
                }
                Change::Cut(place) => {
                    if !edges.is_empty() {
                        edges.remove(place % edges.len());
                    }
                }
                Change::Use(child, taken, shared) => edges.push(Edge {
                    taken: set(*taken),
                    shared: set(*shared),
                    ..edge(User::Job(JobKey(1)), nodes[*child], "root")
                }),
            });
            match outcome {
                Err(_) => prop_assert_eq!(&records.edges, &before),
                Ok(()) => {
                    let after = records.edges.clone();
                    let all = nodes.iter().copied().collect();
                    prop_assert!(records.recompute(&all).is_ok());
                    prop_assert_eq!(&records.edges, &after);
                }
            }
        }
    }
}
