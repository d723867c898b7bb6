//! Exports: nodes that others use through a protocol. Which there are, how they come and go, and the server that offers them.
//!
//! Everything here runs on the manager's thread; borrows never cross an await. An export is a root of the graph, so that it follows
//! filters, overlays and mirrors, and what serves it lives on the data thread of its node.

mod nbd;
pub(crate) mod spec;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::constants::STRING_BYTES_MAX;
use blockyard_nbd::{BlockSizes, ExportFacts};
use futures_util::future::join_all;
use tokio::sync::Notify;

use crate::bitmap::{HeldBitmap, Need};
use crate::error::EngineError;
use crate::event::EventKind;
use crate::export::nbd::server::{NbdServer, TlsGate};
use crate::export::nbd::{Directory, NbdExport};
use crate::export::spec::{
    BitmapRef, ExportDeletion, ExportRequest, ExportSpec, LegacyExportSpec, NbdExportSpec,
    NbdServerSpec,
};
use crate::graph::permissions::Permissions;
use crate::graph::{Graph, RootPlace, is_identifier, not_found};
use crate::reply::{ExportView, Reply};
use crate::request::Permission;

/// How long clients of an export that is closed may take to leave. What they have asked for is carried out meanwhile.
const LEAVING_WAIT: Duration = Duration::from_secs(30);

/// How long an export counts as in use although nobody may use it any more: whoever hangs up is noticed by another thread.
const HANG_UP_WAIT: Duration = Duration::from_millis(200);

/// All exports.
pub(crate) struct Exports {
    graph: Rc<Graph>,
    tell: Box<dyn Fn(EventKind)>,
    /// In the order in which they came.
    list: RefCell<Vec<Rc<Export>>>,
    directory: Directory,
    server: RefCell<Server>,
    /// Told when an export has gone.
    gone: Notify,
}

/// What there is of the NBD server.
enum Server {
    Stopped,
    /// Somebody starts or stops it.
    Changing,
    Running(NbdServer),
}

/// One export.
struct Export {
    id: String,
    shared: Arc<NbdExport>,
    place: RootPlace,
    is_closing: Cell<bool>,
}

impl Exports {
    /// No exports yet. What clients have to hear is told to `tell`.
    pub(crate) fn new(graph: Rc<Graph>, tell: impl Fn(EventKind) + 'static) -> Self {
        Self {
            graph,
            tell: Box::new(tell),
            list: RefCell::default(),
            directory: Directory::new(),
            server: RefCell::new(Server::Stopped),
            gone: Notify::new(),
        }
    }

    /// Does what was asked for.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(crate) async fn handle(
        self: &Rc<Self>,
        request: ExportRequest,
    ) -> Result<Reply, EngineError> {
        match request {
            ExportRequest::ServerStart(spec) => self.start_server(spec).await?,
            ExportRequest::ServerStop => self.stop_server().await?,
            ExportRequest::Add(spec) => self.add(spec).await?,
            ExportRequest::AddLegacy(spec) => self.add_legacy(spec).await?,
            ExportRequest::Del { id, how } => self.delete(&id, how).await?,
            ExportRequest::Query => return Ok(Reply::Exports(self.views())),
        }
        Ok(Reply::Done)
    }

    /// All exports, newest first.
    fn views(&self) -> Vec<ExportView> {
        let list = self.list.borrow();
        let views = list.iter().rev().map(|export| ExportView {
            id: export.id.clone(),
            node_name: self.graph.node_name_of_root(export.place.id),
            shutting_down: export.is_closing.get(),
        });
        views.collect()
    }

    /// Starts the NBD server.
    ///
    /// # Errors
    /// In QEMU's words: it runs already, or cannot be started.
    ///
    /// # Cancel safety
    /// Not to be dropped midway: it would count as changing for ever.
    async fn start_server(&self, spec: NbdServerSpec) -> Result<(), EngineError> {
        {
            let mut server = self.server.borrow_mut();
            if !matches!(*server, Server::Stopped) {
                return Err(EngineError::generic("NBD server already running"));
            }
            *server = Server::Changing;
        }
        let tls = spec.tls_creds.as_deref().map(|id| {
            let credentials = self.graph.credentials(id)?;
            Ok(TlsGate {
                config: credentials.server_config().map_err(EngineError::generic)?,
                authorizations: self.graph.authorizations(),
                list: spec.tls_authz.clone(),
            })
        });
        let started = NbdServer::start(spec, self.directory.clone(), tls).await;
        let (server, outcome) = match started {
            Ok(server) => (Server::Running(server), Ok(())),
            Err(error) => (Server::Stopped, Err(error)),
        };
        self.server.replace(server);
        outcome
    }

    /// Stops the NBD server; all exports are gone afterwards.
    ///
    /// # Errors
    /// In QEMU's words: it does not run.
    ///
    /// # Cancel safety
    /// As [`start_server`](Self::start_server).
    async fn stop_server(&self) -> Result<(), EngineError> {
        let running = {
            let mut server = self.server.borrow_mut();
            match std::mem::replace(&mut *server, Server::Changing) {
                Server::Running(running) => running,
                other => {
                    *server = other;
                    return Err(not_running());
                }
            }
        };
        running.stop().await;
        self.close_all().await;
        self.server.replace(Server::Stopped);
        Ok(())
    }

    /// Closes everything, at the end of the daemon.
    pub(crate) async fn end(&self) {
        if self.stop_server().await.is_err() {
            self.close_all().await;
        }
    }

    /// Exports a node.
    ///
    /// # Errors
    /// In QEMU's words and order.
    async fn add(&self, spec: ExportSpec) -> Result<(), EngineError> {
        self.check_id(&spec.id)?;
        let read_only = self.graph.is_read_only(&spec.node_name);
        let read_only = read_only.ok_or_else(|| not_found("", &spec.node_name))?;
        if let Some(iothread) = &spec.iothread {
            self.move_to(&spec, iothread).await?;
        }
        if read_only && spec.writable {
            let text = "Cannot export read-only node as writable";
            return Err(EngineError::generic(text));
        }
        if !spec.allow_inactive {
            self.graph.make_active(&spec.node_name).await?;
        }
        let shared = Permissions::EVERY.without(Permission::Resize);
        let (writable, rests) = (spec.writable, spec.allow_inactive);
        let place = self
            .graph
            .open_root(&spec.node_name, writable, shared, rests)
            .await?;
        let added = self.add_opened(spec, place.clone()).await;
        if added.is_err() {
            self.graph.close_root(place.id).await;
        }
        added
    }

    async fn add_opened(&self, spec: ExportSpec, place: RootPlace) -> Result<(), EngineError> {
        self.multi_conn()?;
        let name = spec.nbd.name.clone();
        let name = name.unwrap_or_else(|| spec.node_name.clone());
        check_length("export name", &name)?;
        check_length("description", spec.nbd.description.as_deref().unwrap_or(""))?;
        self.check_name(&name)?;
        let bitmaps = self.hold_bitmaps(&spec)?;
        let node = self.graph.root_facts(&place).await?;
        // Some of it may have changed while the node was asked.
        let multi_conn = self.multi_conn()?;
        self.check_id(&spec.id)?;
        let transfer_max = node.transfer_max_bytes;
        let facts = ExportFacts {
            length_bytes: node.length_bytes,
            writable: spec.writable,
            multi_conn,
            description: spec.nbd.description,
            block_sizes: BlockSizes::of_node(node.request_alignment, transfer_max),
            allocation_depth: spec.nbd.allocation_depth,
            dirty_bitmaps: bitmaps.iter().map(|one| one.name().to_owned()).collect(),
        };
        let writethrough = spec.writethrough;
        let export = NbdExport::new(name.clone(), facts, place.clone(), writethrough, bitmaps);
        let shared = Arc::new(export);
        if !self.directory.insert(&shared) {
            return Err(name_taken(&name));
        }
        let export = Export {
            id: spec.id,
            shared,
            place,
            is_closing: Cell::new(false),
        };
        self.list.borrow_mut().push(Rc::new(export));
        Ok(())
    }

    /// Exports a node in the older way.
    ///
    /// # Errors
    /// In QEMU's words.
    async fn add_legacy(&self, spec: LegacyExportSpec) -> Result<(), EngineError> {
        let read_only = self.graph.is_read_only(&spec.device);
        let read_only = read_only.ok_or_else(|| not_found(&spec.device, &spec.device))?;
        let name = spec.name.unwrap_or_else(|| spec.device.clone());
        let bitmaps = spec.bitmap.map(BitmapRef::InChain);
        self.add(ExportSpec {
            id: name.clone(),
            node_name: spec.device,
            writable: spec.writable && !read_only,
            writethrough: false,
            allow_inactive: false,
            iothread: None,
            fixed_iothread: false,
            nbd: NbdExportSpec {
                name: Some(name),
                description: spec.description,
                bitmaps: bitmaps.into_iter().collect(),
                allocation_depth: false,
            },
        })
        .await
    }

    /// Deletes an export. It is gone when this returns, but for one whose clients are still carrying something out after a while:
    /// that goes by itself.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, it is going already, or it is in use.
    async fn delete(self: &Rc<Self>, id: &str, how: ExportDeletion) -> Result<(), EngineError> {
        let export = {
            let list = self.list.borrow();
            let found = list.iter().find(|export| export.id == id).cloned();
            found.ok_or_else(|| EngineError::generic(format!("Export '{id}' is not found")))?
        };
        let is_in_use = how == ExportDeletion::Safe && {
            let unused = export.shared.until_unused();
            tokio::time::timeout(HANG_UP_WAIT, unused).await.is_err()
        };
        if export.is_closing.get() {
            let text = format!("Export '{id}' is already shutting down");
            return Err(EngineError::generic(text));
        }
        if is_in_use {
            let text = format!("export '{id}' still in use");
            return Err(EngineError::generic(text));
        }
        self.start_closing(&export);
        if export.shared.clients() == 0 {
            self.finish_closing(&export).await;
            return Ok(());
        }
        let exports = Rc::clone(self);
        tokio::task::spawn_local(async move { exports.finish_closing(&export).await });
        Ok(())
    }

    async fn close_all(&self) {
        let list: Vec<_> = self.list.borrow().iter().rev().cloned().collect();
        let mine = list.iter().filter(|export| !export.is_closing.get());
        let mine: Vec<_> = mine.collect();
        for export in &mine {
            self.start_closing(export);
        }
        // All leave at the same time, and are told of in one order.
        join_all(mine.iter().map(|export| self.let_go(export))).await;
        for export in mine {
            self.forget(export);
        }
        for export in &list {
            // Somebody else closes it.
            loop {
                let gone = self.gone.notified();
                if !self.has(export) {
                    break;
                }
                gone.await;
            }
        }
    }

    /// Lets nobody in any more.
    fn start_closing(&self, export: &Export) {
        export.is_closing.set(true);
        self.directory.remove(&export.shared);
        export.shared.close();
    }

    async fn finish_closing(&self, export: &Rc<Export>) {
        self.let_go(export).await;
        self.forget(export);
    }

    /// Waits until nobody uses it, and lets the node go. What clients still have to write does not wait for limits.
    async fn let_go(&self, export: &Export) {
        let unlimited = self.graph.suspend_limits_of_root(export.place.id);
        until_unused(export).await;
        self.graph.close_root(export.place.id).await;
        drop(unlimited);
    }

    /// It is gone, which clients are told.
    fn forget(&self, export: &Rc<Export>) {
        self.list
            .borrow_mut()
            .retain(|left| !Rc::ptr_eq(left, export));
        (self.tell)(EventKind::BlockExportDeleted {
            id: export.id.clone(),
        });
        self.gone.notify_waiters();
    }

    fn has(&self, export: &Rc<Export>) -> bool {
        let list = self.list.borrow();
        list.iter().any(|other| Rc::ptr_eq(other, export))
    }

    fn check_id(&self, id: &str) -> Result<(), EngineError> {
        if !is_identifier(id) {
            return Err(EngineError::generic("Invalid block export id"));
        }
        if self.list.borrow().iter().any(|export| export.id == id) {
            let text = format!("Block export id '{id}' is already in use");
            return Err(EngineError::generic(text));
        }
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), EngineError> {
        use blockyard_nbd::ExportDirectory;
        match self.directory.find(name) {
            Some(_) => Err(name_taken(name)),
            None => Ok(()),
        }
    }

    /// The bitmaps that an export shows, which nobody else changes as long as it is there.
    ///
    /// # Errors
    /// In QEMU's words.
    fn hold_bitmaps(&self, spec: &ExportSpec) -> Result<Vec<HeldBitmap>, EngineError> {
        let node = self.graph.find(&spec.node_name);
        let is_frozen = !spec.writable && self.graph.is_read_only(&spec.node_name) == Some(false);
        let hold = |bitmap: &BitmapRef| {
            let (bitmaps, name) = match bitmap {
                BitmapRef::InChain(name) => {
                    let found = node.and_then(|node| self.graph.bitmaps_in_chain(node, name));
                    let missing = || EngineError::generic(format!("Bitmap '{name}' is not found"));
                    (found.ok_or_else(missing)?, name)
                }
                BitmapRef::OfNode(bitmap) => (self.graph.bitmaps_of(bitmap)?, &bitmap.name),
            };
            let records = bitmaps.with(name, Need::Read, |one| one.records())?;
            if records && is_frozen {
                return Err(EngineError::generic(format!(
                    "Enabled bitmap '{name}' incompatible with readonly export"
                )));
            }
            Ok((bitmaps, name.clone()))
        };
        // One may be shown twice: all are checked before the first is in use.
        let checked: Vec<_> = spec
            .nbd
            .bitmaps
            .iter()
            .map(hold)
            .collect::<Result<_, _>>()?;
        let held = checked.iter().map(|(bitmaps, name)| bitmaps.hold(name));
        held.collect()
    }

    /// Whether the server lets a client have several connections.
    fn multi_conn(&self) -> Result<bool, EngineError> {
        match &*self.server.borrow() {
            Server::Running(server) => Ok(server.multi_conn()),
            Server::Stopped | Server::Changing => Err(not_running()),
        }
    }

    /// Brings a node to the thread of an object.
    async fn move_to(&self, spec: &ExportSpec, iothread: &str) -> Result<(), EngineError> {
        if !self.graph.has_iothread(iothread) {
            let text = format!("iothread \"{iothread}\" not found");
            return Err(EngineError::generic(text));
        }
        let name = Some(iothread.to_owned());
        let moved = self.graph.set_iothread(&spec.node_name, name, false).await;
        match moved {
            Err(error) if spec.fixed_iothread => Err(error),
            _ => Ok(()),
        }
    }
}

async fn until_unused(export: &Export) {
    let unused = tokio::time::timeout(LEAVING_WAIT, export.shared.until_unused());
    if unused.await.is_err() {
        tracing::error!(id = export.id, "clients of an export do not leave");
    }
}

fn check_length(what: &str, text: &str) -> Result<(), EngineError> {
    match text.len() > STRING_BYTES_MAX {
        true => Err(EngineError::generic(format!("{what} '{text}' too long"))),
        false => Ok(()),
    }
}

fn name_taken(name: &str) -> EngineError {
    EngineError::generic(format!("NBD server already has export named '{name}'"))
}

fn not_running() -> EngineError {
    EngineError::generic("NBD server not running")
}
