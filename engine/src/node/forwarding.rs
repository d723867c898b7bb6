//! [`forward_to_child`]: what a filter has its child do, method by method. A filter that shows its child's bytes names here what it
//! has nothing to add to, and writes the rest down itself.
//!
//! The filter has a method `child` that returns the node below as of now; a request keeps the one that it began with.

/// Methods of [`Node`](super::Node) that a filter's child answers.
macro_rules! forward_to_child {
    ($($method:ident)*) => { $( $crate::node::forwarding::forwarded!($method); )* };
}

macro_rules! forwarded {
    (status) => {
        fn status(
            &self,
            range: ByteRange,
            extents_max: usize,
        ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
            Box::pin(async move { self.child().status(range, extents_max).await })
        }
    };
    (place) => {
        fn place(
            &self,
            range: ByteRange,
            finds_holes: bool,
        ) -> LocalFuture<'_, Result<Place, NodeError>> {
            Box::pin(async move { self.child().place(range, finds_holes).await })
        }
    };
    (has_clusters) => {
        fn has_clusters(&self, at_least: u64) -> LocalFuture<'_, Result<bool, NodeError>> {
            Box::pin(async move { self.child().has_clusters(at_least).await })
        }
    };
    (fill) => {
        fn fill(
            &self,
            range: ByteRange,
            with: Fill,
            memory: Option<Buffer>,
        ) -> LocalFuture<'_, Result<(), NodeError>> {
            Box::pin(async move { self.child().fill(range, with, memory).await })
        }
    };
    (flush) => {
        fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
            Box::pin(async move { self.child().flush().await })
        }
    };
    (resize) => {
        fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
            Box::pin(async move { self.child().resize(length_bytes).await })
        }
    };
    (resize_refusal) => {
        fn resize_refusal(&self, length_bytes: u64) -> Option<String> {
            self.child().resize_refusal(length_bytes)
        }
    };
    (exact_length_bytes) => {
        fn exact_length_bytes(&self) -> u64 {
            self.child().exact_length_bytes()
        }
    };
    (grows) => {
        fn grows(&self) -> bool {
            self.child().grows()
        }
    };
    (backing) => {
        fn backing(&self) -> Option<Rc<dyn Node>> {
            self.child().backing()
        }
    };
    (shown) => {
        fn shown(&self) -> Option<Rc<dyn Node>> {
            Some(self.child())
        }
    };
    (names_backing) => {
        fn names_backing(&self) -> bool {
            self.child().names_backing()
        }
    };
    (image_marks) => {
        fn image_marks(&self) -> Option<ImageMarks> {
            self.child().image_marks()
        }
    };
    (compresses) => {
        fn compresses(&self) -> bool {
            self.child().compresses()
        }
    };
    (listens) => {
        fn listens(&self) -> bool {
            self.child().listens()
        }
    };
    (hear) => {
        fn hear(&self, event: DebugEvent) {
            self.child().hear(event);
        }
    };
}

pub(super) use {forward_to_child, forwarded};
