//! What a node does of its own accord: memory that was not used for a while goes back.

use std::rc::Rc;

use crate::data::DataContext;
use crate::node::qcow2::Qcow2Node;

impl Qcow2Node {
    /// Lets the caches be cleaned again and again, as long as the node is there and that is to be done. To be called once, and
    /// again when it is to be done from now on.
    pub(super) fn begin_upkeep(&self, context: &DataContext) {
        let Some(mut interval) = self.mover().options.cache_clean_interval else {
            return;
        };
        let clock = context.clock().clone();
        let node = Rc::downgrade(&self.mover);
        context.spawner().spawn(Box::pin(async move {
            loop {
                clock.sleep_until(clock.now().after(interval)).await;
                let Some(node) = node.upgrade() else { return };
                let node = Rc::clone(&node.borrow());
                node.image.clean_caches();
                node.decompressed.clear();
                let Some(next) = node.options.cache_clean_interval else {
                    return;
                };
                interval = next;
            }
        }));
    }
}
