//! Opening `qcow2` nodes: the file, the header, the data file, the image; then its chain, layer by layer.
//!
//! ```text
//!   file open -> name kept -> edge "file" (locks) -> header -> options -> data file -> image -> backing -> the next layer
//! ```
//! That is QEMU's order, in which its errors come. No layer is opened inside another: a chain as long as an image likes to
//! claim costs no stack.

use blockyard_images::qcow2::layout::header::Header;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::{Below, Reserved, Site, check_stays};
use crate::graph::image_names::{BackingName, no_data_file};
use crate::graph::image_options::image_options;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::permissions::Permissions;
use crate::graph::records::{
    BACKING_ROLE, DATA_FILE_ROLE, Edge, FILE_ROLE, ImageRecord, NodeRecord, User,
};
use crate::limits::{CHAIN_LAYERS_MAX, OPENED_TABLES_BYTES_MAX};
use crate::node::build::NodePlan;
use crate::node::qcow2::opening::{Qcow2Plan, header_on, refusal};
use crate::request::{BackingRef, CommonOptions, DriverSpec, NodeRef, NodeSpec, Qcow2Spec};

/// What QEMU puts before an error about a backing file, once for each layer above.
const BACKING_PREFIX: &str = "Could not open backing file: ";

/// A layer of a chain that is being opened.
struct Layer {
    id: NodeId,
    resolved: Resolved,
    backing: BackingRef,
}

/// What is below a layer.
struct LayerBelow {
    node: Below,
    /// It is what the image names.
    by_image: bool,
    /// It is an image that has something below it in turn, perhaps.
    layer: Option<Layer>,
}

impl Graph {
    /// Opens an image and its chain.
    pub(super) async fn open_qcow2(
        &self,
        name: Option<&str>,
        spec: Qcow2Spec,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let top = self.open_layer(name, spec, resolved, site).await?;
        let id = top.id;
        match self.open_chain(top, site).await {
            Ok(()) => Ok(id),
            Err(error) => {
                self.close_unused(id).await;
                Err(error)
            }
        }
    }

    /// Opens what is below an image that is open without it, as its header names it. An edge of the caller keeps the image
    /// where it is.
    ///
    /// # Errors
    /// In QEMU's words; there is nothing below the image then.
    pub(super) async fn open_named_backing(&self, id: NodeId) -> Result<(), EngineError> {
        let (batch, said) = {
            let mut records = self.records.borrow_mut();
            let said = records.node(id).map(|node| CommonOptions {
                // What it was opened as counts for nothing.
                active: Some(!node.inactive),
                ..node.said
            });
            (records.new_batch(), said.unwrap_or_default())
        };
        let site = Site {
            batch,
            thread: self.thread_of(id),
            inherits: None,
        };
        let layer = Layer {
            id,
            resolved: Resolved::new(said, None)?,
            backing: BackingRef::FromImage,
        };
        let opened = self.open_chain(layer, site).await;
        match opened {
            Ok(()) => self.records.borrow_mut().publish(batch),
            Err(_) => {
                let below = self.records.borrow().backing(id);
                if let Some(below) = below {
                    self.set_backing_live(id, None).await?;
                    self.close_unused(below).await;
                }
            }
        }
        opened
    }

    /// Opens an image without its backing.
    async fn open_layer(
        &self,
        name: Option<&str>,
        spec: Qcow2Spec,
        resolved: Resolved,
        site: Site,
    ) -> Result<Layer, EngineError> {
        let inherits = Inherits::Held(resolved);
        let file = self.open_below(spec.file.clone(), inherits, site).await?;
        let outcome = async {
            let reserved = self.reserve(name)?;
            let id = self.begin_layer(reserved, &file, resolved, site).await?;
            match self.open_image(id, &spec, resolved, site).await {
                Ok(()) => Ok(id),
                Err(error) => {
                    self.close(id).await;
                    Err(error)
                }
            }
        }
        .await;
        let id = self.settle(file, outcome).await?;
        Ok(Layer {
            id,
            resolved,
            backing: spec.backing,
        })
    }

    /// Gives an image that is going to be opened its place above its file, so that others keep off the file from here on.
    async fn begin_layer(
        &self,
        reserved: Reserved<'_>,
        file: &Below,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let _held = self.hold_still(&[file], site.batch).await;
        let child = self.child_now(file, site.batch)?;
        let record = NodeRecord {
            thread: self.thread_of(child),
            image: Some(ImageRecord::default()),
            plan: NodePlan::Opening,
            ..reserved.record("qcow2", resolved, site)?
        };
        let id = self.record(record, Some((child, FILE_ROLE)))?;
        self.adopt(id, file);
        Ok(id)
    }

    /// Reads the header, opens the data file, and brings the image up.
    async fn open_image(
        &self,
        id: NodeId,
        spec: &Qcow2Spec,
        resolved: Resolved,
        site: Site,
    ) -> Result<(), EngineError> {
        let file = self.records.borrow().primary(id);
        let file =
            file.ok_or_else(|| EngineError::generic("The file of an image is gone (bug)"))?;
        let read_only = resolved.read_only || resolved.inactive;
        let header = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move {
                let node = context.node(file);
                let node = node.ok_or_else(|| EngineError::generic("A file is lost (bug)"))?;
                header_on(&context, node, read_only).await
            })
        });
        let header = header.await??;
        let (image, node) = image_options(spec, &header, resolved).map_err(refusal)?;
        let tables_bytes = self.check_memory(&header, read_only, site)?;
        let name = header.extensions.data_file_name.as_deref();
        let outside = (header.has_data_file(), name);
        let data_file = self
            .open_data_file(id, spec, outside, resolved, site)
            .await?;
        {
            let mut records = self.records.borrow_mut();
            if let Some(record) = records.node_mut(id) {
                record.plan = NodePlan::Qcow2 {
                    file,
                    data_file,
                    backing: None,
                    plan: Qcow2Plan { image, node },
                };
                let name = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
                let format = header.extensions.backing_format.as_deref().map(name);
                let backing = header.backing_name;
                record.image = Some(ImageRecord {
                    own_backing: backing.as_deref().map(name).unwrap_or_default(),
                    backing: backing.map(|name| BackingName { name, format }),
                    tables_bytes,
                    info: None,
                });
            }
        }
        self.bring_up(id).await
    }

    /// That the tables of an image can be read, beside those of what was opened with it. Returns their length in bytes.
    fn check_memory(
        &self,
        header: &Header,
        read_only: bool,
        site: Site,
    ) -> Result<u64, EngineError> {
        let counts = match read_only {
            true => 0,
            false => header.refcount_table_bytes(),
        };
        let tables_bytes = header.l1_table_bytes().saturating_add(counts);
        let taken = self.records.borrow().memory_bytes(site.batch);
        if taken.saturating_add(tables_bytes) > OPENED_TABLES_BYTES_MAX {
            return Err(EngineError::generic(format!(
                "The tables of all these images would take more than {} MiB",
                OPENED_TABLES_BYTES_MAX >> 20
            )));
        }
        Ok(tables_bytes)
    }

    /// Opens the data file of an image whose header says whether it needs one, and how that is called.
    async fn open_data_file(
        &self,
        id: NodeId,
        spec: &Qcow2Spec,
        (needed, name): (bool, Option<&[u8]>),
        resolved: Resolved,
        site: Site,
    ) -> Result<Option<NodeId>, EngineError> {
        let data_file = match &spec.data_file {
            Some(data_file) => data_file.clone(),
            None if !needed => return Ok(None),
            None => {
                let name = name.ok_or_else(|| no_data_file(None))?;
                let records = self.records.borrow();
                NodeRef::Inline(Box::new(self.named_data_file(name, records.folder(id))?))
            }
        };
        let inherits = Inherits::Held(resolved.passing_inactive());
        let opened = self.open_below(data_file, inherits, site).await?;
        let outcome = async {
            if !needed {
                return Err(EngineError::generic(
                    "'data-file' can only be set for images with an external data file",
                ));
            }
            let follows = (Permissions::NONE, Permissions::EVERY);
            self.attach(id, &opened, DATA_FILE_ROLE, follows, site)
                .await
                .map(Some)
        }
        .await;
        self.settle(opened, outcome).await
    }

    /// Links a node that is being opened to another child, on one thread with it, which takes and shares this if that does not
    /// follow from what is above.
    pub(super) async fn attach(
        &self,
        id: NodeId,
        child: &Below,
        role: &'static str,
        (taken, shared): (Permissions, Permissions),
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let held = self.hold_still(&[child], site.batch).await;
        let below = child;
        let child = self.child_now(below, site.batch)?;
        let _held = self.join(held, id, child, 0, Some(site.batch)).await?;
        let mut records = self.records.borrow_mut();
        if records.node(child).is_none() {
            return Err(EngineError::generic("The node has been closed meanwhile"));
        }
        check_stays(&records, child)?;
        records.change_edges(|edges| {
            edges.push(Edge {
                user: User::Node(id),
                child,
                role,
                taken,
                shared,
            });
        })?;
        if let Below::Opened(child) = below {
            records.adopt(id, *child);
        }
        Ok(child)
    }

    /// Opens what is below an image, and below that, and so on.
    async fn open_chain(&self, top: Layer, site: Site) -> Result<(), EngineError> {
        let mut layers = vec![top.id];
        let mut own = Vec::new();
        let mut next = Some(top);
        while let Some(layer) = next {
            let (above, depth) = (layer.id, layers.len());
            let below = self.open_backing(&layers, layer, site).await;
            let Some(below) = below.map_err(|error| prefixed(error, depth))? else {
                break;
            };
            let attached = self.attach_backing(above, &below.node, depth, site).await;
            let attached = self.settle(below.node, attached).await;
            layers.push(attached.map_err(|error| prefixed(error, depth - 1))?);
            own.extend(below.by_image.then_some(above));
            next = below.layer;
        }
        let mut records = self.records.borrow_mut();
        for id in layers.into_iter().rev() {
            if own.contains(&id) {
                records.adopt_backing(id);
            }
            records.name_image(id);
        }
        Ok(())
    }

    /// Opens what is right below the last of these layers; the next layer if that is an image, too.
    async fn open_backing(
        &self,
        layers: &[NodeId],
        layer: Layer,
        site: Site,
    ) -> Result<Option<LayerBelow>, EngineError> {
        let inherits = Inherits::Backing(layer.resolved);
        let (spec, by_image) = match layer.backing {
            BackingRef::Nothing => return Ok(None),
            BackingRef::Node(NodeRef::Name(name)) => {
                let named = self.open_below(NodeRef::Name(name), inherits, site).await?;
                return Ok(Some(LayerBelow {
                    node: named,
                    by_image: false,
                    layer: None,
                }));
            }
            BackingRef::Node(NodeRef::Inline(spec)) => (*spec, false),
            BackingRef::FromImage => match self.described_by_image(layer.id).await? {
                Some(spec) => (spec, true),
                None => return Ok(None),
            },
        };
        let inherits = Some(inherits);
        let site = Site { inherits, ..site };
        let (id, next) = match spec.driver {
            DriverSpec::Qcow2(image) => {
                let resolved = Resolved::new(spec.common, inherits)?;
                let name = spec.node_name.as_deref();
                let next = self.open_layer(name, *image, resolved, site).await?;
                (next.id, Some(next))
            }
            _ => (self.open(spec, site).await?, None),
        };
        if by_image && let Err(error) = self.check_new(layers, id) {
            self.close_unused(id).await;
            return Err(error);
        }
        Ok(Some(LayerBelow {
            node: Below::Opened(id),
            by_image,
            layer: next,
        }))
    }

    /// The node below an image, as the image describes it.
    async fn described_by_image(&self, id: NodeId) -> Result<Option<NodeSpec>, EngineError> {
        let (backing, image, folder) = {
            let records = self.records.borrow();
            let record = records.node(id);
            let backing = record.and_then(|node| node.image.as_ref()?.backing.clone());
            let Some(backing) = backing else {
                return Ok(None);
            };
            let file = records.primary(id).and_then(|file| records.node(file));
            let image = file.map(|file| file.filename.to_string());
            let folder = records.folder(id).map(str::to_owned);
            (backing, image.unwrap_or_default(), folder)
        };
        self.describe(&backing, &image, folder.as_deref())
            .await
            .map(Some)
    }

    /// That an image leads to none of the layers above it, and that those are not too many.
    fn check_new(&self, layers: &[NodeId], id: NodeId) -> Result<(), EngineError> {
        let records = self.records.borrow();
        let identity = |id| records.host_file(id).map(|file| file.identity());
        let mine = identity(id);
        if mine.is_some() && layers.iter().any(|above| identity(*above) == mine) {
            let file = records.primary(id).and_then(|file| records.node(file));
            let name = file.map(|file| file.filename.to_string());
            return Err(EngineError::generic(format!(
                "'{}' is a layer of its own backing chain",
                name.unwrap_or_default()
            )));
        }
        Ok(())
    }

    async fn attach_backing(
        &self,
        parent: NodeId,
        child: &Below,
        layers_above: usize,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let follows = (Permissions::NONE, Permissions::EVERY);
        let child = self
            .attach(parent, child, BACKING_ROLE, follows, site)
            .await?;
        let depth = {
            let records = self.records.borrow();
            usize::try_from(records.chain_depth(child)).unwrap_or(usize::MAX)
        };
        // The edge goes with its node.
        if layers_above + 1 + depth > CHAIN_LAYERS_MAX {
            return Err(EngineError::generic(format!(
                "The backing chain would have more than {CHAIN_LAYERS_MAX} layers"
            )));
        }
        if let Some(record) = self.records.borrow_mut().node_mut(parent)
            && let NodePlan::Qcow2 { backing, .. } = &mut record.plan
        {
            *backing = Some(child);
        }
        let linked = self.threads.run(self.thread_of(parent), move |context| {
            Box::pin(async move {
                match (context.node(parent), context.node(child)) {
                    (Some(parent), Some(child)) => {
                        parent.set_backing(Some(child));
                        true
                    }
                    _ => false,
                }
            })
        });
        match linked.await? {
            true => Ok(child),
            false => Err(EngineError::generic("A node is lost (bug)")),
        }
    }
}

fn prefixed(error: EngineError, layers: usize) -> EngineError {
    error.prefixed(&BACKING_PREFIX.repeat(layers))
}
