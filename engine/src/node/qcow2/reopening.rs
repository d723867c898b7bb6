//! Opening the image of a node that is in use in another way: with other options, for writing or not any more, on other nodes.
//! Requests wait, the image is written back, and opened anew.

use std::rc::Rc;

use crate::data::DataContext;
use crate::error::EngineError;
use crate::node::build::{NodePlan, child_of};
use crate::node::gate::Way;
use crate::node::qcow2::keeping::store;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::opening::{in_time, open_image, refusal};
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
            stored.map_err(refusal)?;
        }
        let written = old.close().await;
        written.map_err(|error| EngineError::generic(error.to_string()))?;
        let image = open_image(context, &files, *plan, &self.bitmaps).await?;
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
