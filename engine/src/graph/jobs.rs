//! What jobs need of the graph: the checks before a job exists, its filter, its edges, the place where both sides meet.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;

use crate::bitmap::{FrozenBitmap, JobEnd};
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::amending::AmendEffect;
use crate::graph::chain_jobs::ChainPart;
use crate::graph::creating::{Opened, image_edges};
use crate::graph::new_targets::TargetBacking;
use crate::graph::permissions::{ExtraPermissions, Permissions};
use crate::graph::records::{
    BACKING_ROLE, Blocker, Edge, FILE_ROLE, JobLabel, NodeRecord, TARGET_ROLE, User,
};
use crate::graph::{Graph, Records, names};
use crate::job::context::JobKey;
use crate::job::verb::JobType;
use crate::node::build::NodePlan;
use crate::node::filter_node::FilterKind;
use crate::request::{CommonOptions, CreateSpec, DetectZeroes, NodeRef, Permission, WorkSpec};

/// How long a job's end waits until its source's bitmap is written down.
const RECORD_WAIT: Duration = Duration::from_secs(5);

/// The nodes of one job.
#[derive(Clone, Debug, Default)]
pub struct JobNodes {
    /// Where it reads.
    pub source: Option<NodeId>,
    /// Where it writes.
    pub target: Option<NodeId>,
    /// What it put above the source.
    pub filter: Option<NodeId>,
    /// Where it writes guest data of an image that keeps it outside.
    pub data_file: Option<NodeId>,
    /// What such an image calls that node.
    pub data_file_name: Option<String>,
    /// The target becomes an image.
    pub makes_image: bool,
    /// The bitmap of the source that it goes by, or that goes by it.
    pub bitmap: Option<Arc<FrozenBitmap>>,
    /// What becomes of the target's image, if it is amended.
    pub amends: Option<AmendEffect>,
    /// What was opened for it, and goes with it.
    pub opened: Opened,
    /// What it takes of a chain, if it moves data within one.
    pub chain: Option<ChainPart>,
    /// What comes below the target of a mirror in the end, if it was opened for that.
    pub(super) target_backing: Option<TargetBacking>,
}

impl Graph {
    /// Opens what a job's description describes inline. Opening may take long: the graph must not be held.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open then.
    pub async fn open_for_job(&self, work: &WorkSpec) -> Result<Opened, EngineError> {
        match work {
            WorkSpec::Create(CreateSpec::Raw {
                file: NodeRef::Inline(spec),
                ..
            }) => Ok(Opened {
                target: Some(self.open_unowned((**spec).clone()).await?),
                data_file: None,
            }),
            WorkSpec::Create(CreateSpec::Qcow2(spec)) => self.open_for_qcow2(spec).await,
            WorkSpec::Backup(spec) => self.open_for_backup(spec).await,
            WorkSpec::Mirror(spec) => self.open_for_mirror(spec).await,
            _ => Ok(Opened::default()),
        }
    }

    /// Keeps every other change of the graph waiting, once none of a job's nodes is on its way to another thread. What a backup
    /// needs is on one thread by then, if that is possible: its filter keeps writers waiting until it begins, and whoever came
    /// in between to drain them would wait for a job that waits for the graph.
    ///
    /// # Cancel safety
    /// Nothing is held then.
    pub async fn hold_for(&self, work: &WorkSpec, opened: &Opened) -> MutexGuard<'_, ()> {
        fn name(node: Option<&NodeRef>) -> Option<&str> {
            match node {
                Some(NodeRef::Name(name)) => Some(name),
                Some(NodeRef::Inline(_)) | None => None,
            }
        }
        let names = match work {
            WorkSpec::Backup(spec) => {
                let target = spec.new_target.is_none().then_some(&*spec.target);
                [Some(&*spec.device), target, None]
            }
            WorkSpec::Mirror(spec) => {
                let target = spec.new_target.is_none().then_some(&*spec.target);
                [Some(&*spec.device), target, spec.replaces.as_deref()]
            }
            WorkSpec::Create(CreateSpec::Raw { file, .. }) => [name(Some(file)), None, None],
            WorkSpec::Create(CreateSpec::Qcow2(spec)) => {
                [name(Some(&spec.file)), name(spec.data_file.as_ref()), None]
            }
            WorkSpec::Create(_) => [None; 3],
            WorkSpec::Commit(spec) => [Some(&*spec.device), None, None],
            WorkSpec::Stream(spec) => [Some(&*spec.device), None, None],
            WorkSpec::Amend(spec) => [Some(&*spec.node), None, None],
        };
        let in_chain = matches!(work, WorkSpec::Commit(_) | WorkSpec::Stream(_));
        let needed = |records: &Records| -> Vec<NodeId> {
            let names = names.iter().flatten();
            let named = names.filter_map(|name| records.by_name(name, None));
            let named = named.flat_map(|node| match in_chain {
                true => records.component(node.id),
                false => vec![node.id],
            });
            named.chain(opened.all()).collect()
        };
        let held = self.hold_while(needed).await;
        let WorkSpec::Backup(spec) = work else {
            return held;
        };
        let target = opened.target.or_else(|| self.find(&spec.target));
        let (Some(source), Some(target)) = (self.find(&spec.device), target) else {
            return held;
        };
        match self.join(held, source, target, 0, None).await {
            Ok(held) => held,
            // The job is told when it gets its thread, after all that else may be wrong with it.
            Err(_) => self.hold_while(needed).await,
        }
    }

    /// Every check that comes before a job exists, in QEMU's order, and the filter above the source. What was `opened`
    /// for the job is the job's from here on.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed then, and nothing stays open.
    pub async fn prepare_job(
        &self,
        work: &WorkSpec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        match work {
            WorkSpec::Backup(spec) => self.prepare_backup(spec, opened).await,
            WorkSpec::Mirror(spec) => self.prepare_mirror(spec, opened).await,
            WorkSpec::Commit(spec) => self.prepare_commit(spec).await,
            WorkSpec::Stream(spec) => self.prepare_stream(spec).await,
            WorkSpec::Create(CreateSpec::File { .. }) => Ok(JobNodes::default()),
            WorkSpec::Create(CreateSpec::Raw { file, size, .. }) => {
                self.prepare_create_raw(file, *size, opened).await
            }
            WorkSpec::Create(CreateSpec::Qcow2(spec)) => {
                self.prepare_create_qcow2(spec, opened).await
            }
            WorkSpec::Create(CreateSpec::Unsupported { .. }) => Err(EngineError::generic(
                "Driver does not support blockdev-create",
            )),
            WorkSpec::Amend(spec) => self.prepare_amend(spec),
        }
    }

    async fn prepare_create_raw(
        &self,
        file: &NodeRef,
        size: u64,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let checked = async {
            let target = match (file, opened.target) {
                (NodeRef::Name(name), _) => self.look_up(name)?,
                (NodeRef::Inline(_), Some(opened)) => opened,
                (NodeRef::Inline(_), None) => {
                    return Err(EngineError::generic("The node was not opened (bug)"));
                }
            };
            self.records.borrow().check_free(target)?;
            self.check_length(target, size).await?;
            Ok(target)
        };
        match checked.await {
            Ok(target) => Ok(JobNodes {
                target: Some(target),
                opened,
                ..JobNodes::default()
            }),
            Err(error) => {
                self.close_opened(&opened).await;
                Err(error)
            }
        }
    }

    /// Puts a job's filter above its source; the source's users move to it, roots while none of their requests is in flight. A
    /// filter that saves old data has the target below it too, which may stand on the source: it goes on to. What is to happen at
    /// the same point in time is done `at_once` with it.
    pub(super) async fn insert_filter<T>(
        &self,
        source: NodeId,
        target: Option<NodeId>,
        driver: &'static str,
        kind: FilterKind,
        name: Option<&str>,
        at_once: impl FnOnce() -> Result<T, EngineError>,
    ) -> Result<(NodeId, T), EngineError> {
        let roots = self.drain_roots(source).await?;
        let done = at_once()?;
        // What saves old data is a node of a client's in QEMU, and told of as such.
        let cannot = |what: &'static str| {
            move |error: EngineError| match target {
                Some(_) => error.prefixed(what),
                None => error,
            }
        };
        let (create, replace) = ("Could not create node: ", "Could not replace node: ");
        let id = {
            let mut records = self.records.borrow_mut();
            let id = records.new_id();
            let name = match name {
                Some(name) => {
                    names::check(&records, name).map_err(cannot(create))?;
                    name.to_owned()
                }
                None => names::made_up(id.0),
            };
            let below = records.node(source).cloned();
            let below = below.ok_or_else(|| EngineError::generic("The source node is gone"))?;
            if target.is_some_and(|target| records.node(target).is_none()) {
                return Err(EngineError::generic("The target node is gone"));
            }
            records.insert(NodeRecord {
                id,
                name,
                driver,
                said: CommonOptions::default(),
                inherits_from: None,
                opened_as: None,
                detect_zeroes: DetectZeroes::Off,
                image: None,
                monitor_owned: false,
                fixed_size: false,
                windowed: false,
                force_share: false,
                cache_direct: false,
                cache_no_flush: false,
                extra: ExtraPermissions::default(),
                exclusive: false,
                inactive: false,
                plan: NodePlan::Filter {
                    child: source,
                    kind,
                },
                // As QEMU shows them; whoever writes through one is refused below it.
                read_only: match driver {
                    "commit_top" => true,
                    "mirror_top" => false,
                    _ => below.read_only,
                },
                locked: None,
                bitmaps: Arc::default(),
                ..below
            });
            let role = match driver {
                "mirror_top" | "commit_top" => BACKING_ROLE,
                _ => FILE_ROLE,
            };
            let below_filter = records.parents_first(target);
            let linked = records.change_edges(|edges| {
                edges.push(Edge {
                    user: User::Node(id),
                    child: source,
                    role,
                    taken: Permissions::NONE,
                    shared: Permissions::EVERY,
                });
                edges.extend(target.map(|target| {
                    edge(
                        User::Node(id),
                        target,
                        TARGET_ROLE,
                        Permissions::NONE.with(Permission::Write),
                        Permissions::EVERY.without(Permission::Resize),
                    )
                }));
            });
            let linked = linked.map_err(cannot(create)).and_then(|()| {
                let moved = records.change_edges(|edges| {
                    for edge in edges.iter_mut().filter(|edge| edge.child == source) {
                        let moves = match edge.user {
                            User::Node(user) => user != id && !below_filter.contains(&user),
                            User::Root(_) => true,
                            _ => false,
                        };
                        if moves {
                            edge.child = id;
                        }
                    }
                });
                moved.map_err(cannot(replace))
            });
            if let Err(error) = linked {
                let unlinked = records.change_edges(|edges| {
                    edges.retain(|edge| edge.user != User::Node(id));
                });
                if let Err(error) = unlinked {
                    tracing::error!(%error, "a filter could not be unlinked");
                }
                records.nodes.retain(|node| node.id != id);
                return Err(error);
            }
            id
        };
        self.threads.load(self.thread_of(id), 1);
        let brought_up = match self.bring_up(id).await {
            Ok(()) => roots.put_on(id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = brought_up {
            drop(roots);
            self.remove_filter(id).await;
            return Err(error);
        }
        Ok((id, done))
    }

    /// Takes a filter out: its users go back to what is below it, and it leaves the list in the same step. Requests that are
    /// inside it end there, with what they have asked of the node below.
    async fn remove_filter(&self, id: NodeId) {
        let thread = self.thread_of(id);
        let name = self.records.borrow().name_of(id).to_owned();
        self.let_writes_pass(id, &name).await;
        let (roots, below) = {
            let mut records = self.records.borrow_mut();
            let below = records.primary(id);
            let roots = records.roots_on(&[id]);
            let unlinked = records.change_edges(|edges| {
                edges.retain(|edge| edge.user != User::Node(id));
                if let Some(below) = below {
                    // What a command holds it lets go where it took it.
                    let goes = |edge: &&mut Edge| edge.child == id && edge.user != User::Command;
                    for edge in edges.iter_mut().filter(goes) {
                        edge.child = below;
                    }
                }
            });
            if let Err(error) = unlinked {
                tracing::error!(%error, "a filter could not be unlinked");
            }
            records.nodes.retain(|node| node.id != id);
            (roots, below)
        };
        if let Some(below) = below
            && let Err(error) = self.put_on(&roots, below).await
        {
            tracing::error!(%error, "users of a node stay on a job's filter");
        }
        self.threads.load(thread, -1);
        self.forget_named(thread, id, &name).await;
    }

    /// Nobody waits in front of a filter that goes: its job may never have begun.
    async fn let_writes_pass(&self, filter: NodeId, name: &str) {
        let passed = self.threads.run(self.thread_of(filter), move |context| {
            Box::pin(async move {
                let saver = context.node(filter).and_then(|filter| filter.saver());
                saver.inspect(|saver| saver.end());
            })
        });
        if let Err(error) = passed.await {
            self.tell_lost(&error, name, "a job's filter is out of reach");
        }
    }

    /// Takes back what [`prepare_job`](Self::prepare_job) did.
    pub async fn abandon(&self, nodes: &JobNodes) {
        self.take_away(nodes).await;
    }

    /// Takes away what was put into the graph for a job.
    async fn take_away(&self, nodes: &JobNodes) {
        if let Some(bitmap) = &nodes.bitmap {
            // One whose job has ended well is settled.
            bitmap.settle(JobEnd::Failure);
        }
        if let Some(filter) = nodes.filter {
            self.remove_filter(filter).await;
        }
        self.close_opened(&nodes.opened).await;
    }

    /// Gives an existing job its edges and keeps others off its nodes.
    ///
    /// # Errors
    /// A conflict of permissions or locks, in QEMU's words.
    pub async fn attach_job(
        &self,
        key: JobKey,
        id: &str,
        job_type: JobType,
        nodes: &JobNodes,
    ) -> Result<(), EngineError> {
        let mut records = self.records.borrow_mut();
        // Until here nothing keeps others from taking the target away.
        let written = [nodes.target, nodes.data_file];
        if written
            .into_iter()
            .flatten()
            .any(|id| records.node(id).is_none())
        {
            return Err(EngineError::generic("The target node is gone"));
        }
        records.jobs.push(JobLabel {
            key,
            id: id.to_owned(),
            job_type,
        });
        let Some(target) = nodes.target else {
            return Ok(());
        };
        let source = nodes.source.unwrap_or(target);
        let read = Permissions::NONE.with(Permission::ConsistentRead);
        let write = Permissions::NONE.with(Permission::Write);
        let keeps_length = Permissions::EVERY.without(Permission::Resize);
        let above = nodes.filter.unwrap_or(source);
        let job = |node, role, taken, shared| edge(User::Job(key), node, role, taken, shared);
        let (none, every) = (Permissions::NONE, Permissions::EVERY);
        let edges = match job_type {
            JobType::Commit | JobType::Stream => match &nodes.chain {
                Some(part) => records.chain_edges(key, nodes, part),
                None => Vec::new(),
            },
            JobType::Backup => vec![
                job(above, "main node", none, every),
                job(target, TARGET_ROLE, none, every),
            ],
            JobType::Amend => {
                let effect = nodes.amends.unwrap_or(AmendEffect::Length);
                let (taken, shared) = effect.permissions();
                vec![edge(User::Backend(key), target, "root", taken, shared)]
            }
            JobType::Create if nodes.makes_image => {
                match image_edges(&mut records, key, nodes, target) {
                    Ok(edges) => edges,
                    Err(error) => {
                        records.jobs.retain(|job| job.key != key);
                        return Err(error);
                    }
                }
            }
            JobType::Create => vec![edge(
                User::Backend(key),
                target,
                "root",
                write.with(Permission::Resize),
                read.with(Permission::WriteUnchanged),
            )],
            _ => vec![
                job(above, "main node", read, keeps_length),
                job(source, "source", none, keeps_length),
                job(target, TARGET_ROLE, none, every),
                edge(
                    User::Backend(key),
                    target,
                    "root",
                    write,
                    none.with(Permission::WriteUnchanged),
                ),
            ],
        };
        // One after the other, so that the first conflict is told that a client meets elsewhere too.
        for edge in edges {
            let Err(error) = records.change_edges(|all| all.push(edge)) else {
                continue;
            };
            records.jobs.retain(|job| job.key != key);
            let taken_back = records.change_edges(|all| all.retain(|edge| !edge.is_of(key)));
            if let Err(error) = taken_back {
                tracing::error!(%error, "a job that never began keeps its edges");
            }
            return Err(error);
        }
        if let Some(part) = &nodes.chain {
            records.guard_chain(key, job_type, nodes, part);
            return Ok(());
        }
        let blocked = match job_type {
            JobType::Create => vec![target],
            JobType::Amend if nodes.amends == Some(AmendEffect::None) => Vec::new(),
            JobType::Backup => vec![above, target],
            _ => vec![above, source, target],
        };
        let blocked = blocked.into_iter().chain(nodes.data_file);
        records.blockers.extend(blocked.map(|node| Blocker {
            node,
            job: key,
            job_type,
        }));
        Ok(())
    }

    /// A job's edges and filter go, and its nodes are free again.
    pub async fn detach_job(&self, key: JobKey, nodes: &JobNodes) {
        {
            let mut records = self.records.borrow_mut();
            records.blockers.retain(|blocker| blocker.job != key);
            records.frozen.retain(|frozen| frozen.job != key);
            let detached = records.change_edges(|edges| {
                edges.retain(|edge| !edge.is_of(key));
            });
            if let Err(error) = detached {
                tracing::error!(%error, "a job could not be detached");
            }
        }
        if nodes.amends.is_some()
            && let Some(target) = nodes.target
        {
            self.take_in_amended(target).await;
        }
        self.take_away(nodes).await;
        if nodes.bitmap.is_some()
            && let Some(source) = nodes.source
        {
            // Until it is done, what is written down says more than has changed: a slow disk holds no job up for that.
            let recorded = self.record_bitmaps_of(source);
            if tokio::time::timeout(RECORD_WAIT, recorded).await.is_err() {
                tracing::warn!("bitmaps are not written down yet after a job");
            }
        }
        if let Some(part) = &nodes.chain {
            self.close_for_writing(key).await;
            self.drop_out_of_chain(part).await;
        }
    }

    /// A dismissed job is not shown any more.
    pub fn release_job(&self, key: JobKey) {
        let mut records = self.records.borrow_mut();
        records.jobs.retain(|job| job.key != key);
    }
}

pub(super) fn edge(
    user: User,
    child: NodeId,
    role: &'static str,
    taken: Permissions,
    shared: Permissions,
) -> Edge {
    Edge {
        user,
        child,
        role,
        taken,
        shared,
    }
}
