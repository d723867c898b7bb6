//! [`News`]: what nodes tell the manager without having been asked, in the order in which it happened.

use tokio::sync::mpsc;

use crate::event::EventKind;

/// Where nodes send what they have to tell. Unbounded, as each node has little to tell and tells it once.
#[derive(Clone, Debug)]
pub struct News {
    sender: mpsc::UnboundedSender<EventKind>,
}

impl News {
    /// A way to tell, and the end where it is heard.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<EventKind>) {
        let (sender, heard) = mpsc::unbounded_channel();
        (Self { sender }, heard)
    }

    /// Tells it; at the end of the daemon nobody may hear it any more.
    pub fn tell(&self, news: EventKind) {
        let _ = self.sender.send(news);
    }
}
