//! [`Ordered`]: a target that stands on the very disk that is saved into it shows the disk's own bytes where nothing has been saved
//! yet. Whoever reads those there, and the saving of the same range, take turns: a reader has the old bytes from the disk before
//! they may change, or from the target.

use std::rc::Rc;

use crate::node::Node;

/// As long as it is there, readers of these nodes and those who change them take turns.
pub(super) struct Ordered(Vec<Rc<dyn Node>>);

impl Ordered {
    /// From the target down to the source, which need not be below it: it may be put there later.
    pub(super) fn new(target: &Rc<dyn Node>, source: &Rc<dyn Node>) -> Self {
        let mut nodes = Vec::new();
        let mut next = Some(Rc::clone(target));
        while let Some(node) = next.filter(|node| !Rc::ptr_eq(node, source)) {
            node.order_reads(true);
            next = node.shown().or_else(|| node.backing());
            nodes.push(node);
        }
        Self(nodes)
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        for node in &self.0 {
            node.order_reads(false);
        }
    }
}
