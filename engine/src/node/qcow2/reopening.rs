//! Opening the image of a node that is in use in another way: with other options, for writing or not any more, on other nodes.
//! Requests wait, the image is written back, and opened anew.

use std::rc::Rc;

use blockyard_images::qcow2::layout::header::Header;

use crate::bitmap::NodeBitmaps;
use crate::data::DataContext;
use crate::error::EngineError;
use crate::node::build::{NodePlan, child_of};
use crate::node::gate::Way;
use crate::node::qcow2::keeping::{self, store};
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::opening::{self, in_time, open_image, refusal};
use crate::node::qcow2::{Qcow2Files, Qcow2Node};
use crate::node::{Reopened, cannot_become};

impl Qcow2Node {
    /// See [`Node::reopen`](crate::node::Node::reopen).
    pub(super) async fn open_again(
        &self,
        context: &DataContext,
        plan: &NodePlan,
    ) -> Result<(), EngineError> {
        let name = self.mover().name.clone();
        let NodePlan::Qcow2 {
            file,
            data_file,
            backing,
            plan,
        } = plan
        else {
            return Err(cannot_become(&name));
        };
        let child_of = |child| child_of(context, &name, child);
        let files = Qcow2Files::new(child_of(*file)?, data_file.map(child_of).transpose()?);
        let backing = backing.map(child_of).transpose()?;
        // Those who change something read as well, so they are waited for first.
        let closing = async {
            let writers = self.gate.close(Way::Write).await;
            Ok((writers, self.gate.close(Way::Read).await))
        };
        let _closed = in_time(context, Box::pin(closing)).await?;
        let old = self.mover();
        if old.lost.get() {
            let text =
                format!("The image of node '{name}' was changed and could not be read since");
            return Err(EngineError::generic(text));
        }
        if plan.image.read_only && !old.read_only() {
            let stored = store(&old.image, &self.bitmaps).await;
            if let Err(error) = stored {
                // Some may have been stored all the same.
                old.goes_on_with(&self.bitmaps).await;
                return Err(refusal(error));
            }
        }
        if let Err(error) = old.close().await {
            old.goes_on_with(&self.bitmaps).await;
            return Err(EngineError::generic(error.to_string()));
        }
        let is_other_file = !Rc::ptr_eq(files.file.node(), old.files.file.node());
        if is_other_file && !self.bitmaps.kept_names_bytes().is_empty() {
            let file = Rc::clone(files.file.node());
            let header = opening::header_on(context, file, plan.image.read_only).await;
            let same = header.map(|header| is_same_image(&header, &old.image.header()));
            if !matches!(same, Ok(true)) {
                old.goes_on_with(&self.bitmaps).await;
                return Err(same.err().unwrap_or_else(|| EngineError::generic(format!(
                    "Node '{name}' keeps bitmaps, which say nothing of another image; delete it and add it anew"
                ))));
            }
        }
        let opened = open_image(context, &files, *plan, &self.bitmaps).await;
        let is_taken_over = old.options.inactive && !plan.node.inactive;
        let image = match opened {
            Ok(image) => image,
            Err(error) if is_taken_over => {
                self.bitmaps.release_kept();
                return Err(error.prefixed("Could not reopen qcow2 layer: "));
            }
            Err(error) => {
                old.goes_on_with(&self.bitmaps).await;
                return Err(error);
            }
        };
        if plan.node.inactive {
            // The image has them.
            self.bitmaps.release_kept();
        }
        let mover = Mover::new(
            name.clone(),
            image.image,
            files,
            backing,
            plan.node,
            context,
        );
        mover.told.set(old.told.get());
        let cleans = |mover: &Mover| mover.options.cache_clean_interval.is_some();
        let begins_to_clean = cleans(&mover) && !cleans(&old);
        self.mover.replace(Rc::new(mover));
        if begins_to_clean {
            self.begin_upkeep(context);
        }
        self.amended.replace(Some(Reopened {
            info: image.info,
            backing: image.backing,
            options: plan.image,
        }));
        Ok(())
    }
}

impl Mover {
    /// What was stored, or opened in another way, is written on after all.
    async fn goes_on_with(&self, bitmaps: &NodeBitmaps) {
        if self.read_only() {
            return;
        }
        bitmaps.set_read_only(false);
        let going_on = keeping::go_on(&self.image, bitmaps).await;
        if let Err(error) = going_on {
            // It takes no change then, either.
            tracing::error!(%error, node = self.name, "bitmaps cannot be marked as in use");
            self.lost.set(true);
        }
    }
}

/// Whether both are headers of one image that nobody has changed in between.
fn is_same_image(one: &Header, other: &Header) -> bool {
    let places = |header: &Header| {
        let tables = (
            header.l1_table,
            header.refcount_table,
            header.snapshot_table,
        );
        let bitmaps = (header.extensions.bitmaps, header.activity());
        (header.size_bytes, header.l1_entries, tables, bitmaps)
    };
    places(one) == places(other) && one.geometry == other.geometry
}
