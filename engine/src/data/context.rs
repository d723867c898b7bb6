//! [`DataContext`]: what the tasks of one data thread share, without locks because it never leaves the thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use blockyard_ring::{HostFile, Socket};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{LocalFuture, Storage};

use crate::clock::Clock;
use crate::data::{CpuPool, Spawner};
use crate::node::Node;
use crate::node::news::News;
use crate::node::root::{Root, RootId};

/// A node inside the engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// A data thread; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ThreadId(pub u64);

/// How a data thread reaches the host's files and sockets.
pub trait HostFiles {
    /// An open file as a storage on this thread.
    fn storage(&self, file: &HostFile, read_only: bool) -> Rc<dyn Storage>;

    /// A connected socket on this thread. It is shut down when it is dropped.
    ///
    /// # Errors
    /// When there is nothing to wait for it with.
    fn socket(&self, socket: OwnedFd) -> io::Result<Rc<dyn Socket>>;

    /// Carries out a call that may block somewhere else; ends with it.
    fn blocking(&self, call: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()>;
}

/// What the tasks of one data thread share.
pub struct DataContext {
    clock: Rc<dyn Clock>,
    pool: BufferPool,
    cpu: CpuPool,
    news: News,
    spawner: Spawner,
    files: Rc<dyn HostFiles>,
    nodes: RefCell<HashMap<NodeId, Rc<dyn Node>>>,
    roots: RefCell<HashMap<RootId, Rc<Root>>>,
}

impl DataContext {
    /// A context without nodes.
    pub fn new(
        clock: Rc<dyn Clock>,
        pool: BufferPool,
        cpu: CpuPool,
        news: News,
        files: Rc<dyn HostFiles>,
    ) -> Self {
        Self {
            clock,
            pool,
            cpu,
            news,
            spawner: Spawner::of_the_task_set(),
            files,
            nodes: RefCell::default(),
            roots: RefCell::default(),
        }
    }

    /// The same, which hands work that nobody waits for to another spawner than that of the thread's tasks.
    pub fn with_spawner(self, spawner: Spawner) -> Self {
        Self { spawner, ..self }
    }

    /// Takes work that is to be brought to its end.
    pub fn spawner(&self) -> &Spawner {
        &self.spawner
    }

    /// The host's files.
    pub fn files(&self) -> &Rc<dyn HostFiles> {
        &self.files
    }

    /// The thread's time.
    pub fn clock(&self) -> &Rc<dyn Clock> {
        &self.clock
    }

    /// Where transfer buffers come from.
    pub fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// Threads for work that keeps a core busy.
    pub fn cpu(&self) -> &CpuPool {
        &self.cpu
    }

    /// Where nodes tell what clients have to know.
    pub fn news(&self) -> &News {
        &self.news
    }

    /// The node, if it lives on this thread.
    pub fn node(&self, id: NodeId) -> Option<Rc<dyn Node>> {
        self.nodes.borrow().get(&id).cloned()
    }

    /// Takes a node in.
    pub fn insert_node(&self, id: NodeId, node: Rc<dyn Node>) {
        self.nodes.borrow_mut().insert(id, node);
    }

    /// Lets a node go; whoever still holds it keeps it until done.
    pub fn remove_node(&self, id: NodeId) -> Option<Rc<dyn Node>> {
        self.nodes.borrow_mut().remove(&id)
    }

    /// The root, if it is on this thread.
    pub fn root(&self, id: RootId) -> Option<Rc<Root>> {
        self.roots.borrow().get(&id).cloned()
    }

    /// Takes a root in.
    pub fn insert_root(&self, id: RootId, root: Rc<Root>) {
        self.roots.borrow_mut().insert(id, root);
    }

    /// Lets a root go; whoever still holds it keeps it until done.
    pub fn remove_root(&self, id: RootId) -> Option<Rc<Root>> {
        self.roots.borrow_mut().remove(&id)
    }
}
