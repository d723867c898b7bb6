//! What a node does of its own accord: memory that was not used for a while goes back.

use std::rc::Rc;

use blockyard_storage::LocalFuture;

use crate::clock::Clock;
use crate::node::qcow2::Qcow2Node;

impl Qcow2Node {
    /// Cleans the caches again and again, as long as the node is there. `None`: it is never to be done.
    pub fn upkeep(&self, clock: Rc<dyn Clock>) -> Option<LocalFuture<'static, ()>> {
        let interval = self.mover().options.cache_clean_interval?;
        let node = Rc::downgrade(&self.mover);
        Some(Box::pin(async move {
            loop {
                clock.sleep_until(clock.now().after(interval)).await;
                let Some(node) = node.upgrade() else { return };
                let node = Rc::clone(&node.borrow());
                node.image.clean_caches();
                node.decompressed.clear();
            }
        }))
    }
}
