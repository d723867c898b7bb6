//! How exports and the NBD server are described, as plain data.

use crate::bitmap::BitmapName;
use crate::sockets::Address;

/// What is asked of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportRequest {
    /// Start the NBD server.
    ServerStart(NbdServerSpec),
    /// Stop the NBD server, and all exports with it.
    ServerStop,
    /// Export a node.
    Add(ExportSpec),
    /// Export a node in the older way.
    AddLegacy(LegacyExportSpec),
    /// Delete an export.
    Del {
        /// Its id.
        id: String,
        /// Whether it may be in use.
        how: ExportDeletion,
    },
    /// All exports, newest first.
    Query,
}

/// How the NBD server is to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServerSpec {
    /// Where it listens.
    pub address: Address,
    /// How long a client may take to choose an export, in seconds; 0: as long as it likes.
    pub handshake_seconds_max: u32,
    /// Id of the object with keys and certificates; `None`: no TLS.
    pub tls_creds: Option<String>,
    /// Id of the object that decides who may come in.
    pub tls_authz: Option<String>,
    /// Connections at once; 0: as many as come.
    pub connections_max: u32,
}

/// How a node is to be exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// Id of the export.
    pub id: String,
    /// Name of the node.
    pub node_name: String,
    /// Clients may write.
    pub writable: bool,
    /// Every write is durable before it is answered.
    pub writethrough: bool,
    /// The node may be inactive, or become so: clients read only then. Without it the node is made active.
    pub allow_inactive: bool,
    /// Id of the object whose thread is to serve it; `None`: the thread that the node is on.
    pub iothread: Option<String>,
    /// It is an error if the node cannot go there.
    pub fixed_iothread: bool,
    /// What NBD wants to know.
    pub nbd: NbdExportSpec,
}

/// How a node is exported by NBD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NbdExportSpec {
    /// Name that clients ask for; `None`: that of the node.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Bitmaps that are shown.
    pub bitmaps: Vec<BitmapRef>,
    /// Show which layer of its chain holds what.
    pub allocation_depth: bool,
}

/// A bitmap, as an export names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapRef {
    /// Of the exported node, or of the first node below it that has one of this name.
    InChain(String),
    /// Of a node.
    OfNode(BitmapName),
}

/// An export as the older commands describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegacyExportSpec {
    /// Name of the node.
    pub device: String,
    /// Name of the export, and its id; `None`: that of the node.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Clients may write, unless the node is read-only.
    pub writable: bool,
    /// A bitmap that is shown.
    pub bitmap: Option<String>,
}

/// How much an export may be in use when it is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportDeletion {
    /// Not at all.
    #[default]
    Safe,
    /// Its clients are cut off.
    Hard,
}
