//! [`StateDir`]: what has to be found again after the daemon was killed: small records in a directory that one daemon uses at a time.
//!
//! Everything there is done by two threads of its own, so that neither clients nor data wait for a file system inside a call: one for
//! records, in the order in which they were asked for, and one for bits, which disks wait for, however long a record may take.
//! A record that was written is durable; a crash leaves the old one or the new one, whole:
//!
//! ```text
//!   1  DIR/KIND/.new written and synced
//!   2  renamed to DIR/KIND/NAME; the folder synced
//! ```
//! A thread that gets nowhere is not waited for until it does ([`lane`]): what is asked for fails meanwhile, though it may yet be done.
//!
//! A record is what [`record`] says; behind it a file may have a field of bits, of which each goes from 0 to 1 in its place
//! ([`MarkedRecord`]).

mod folder;
mod lane;
mod marks;
mod record;

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::error::EngineError;

use folder::{Folder, failed};
use lane::{Answer, Asked, Lane, PATIENCE, Pulse};
pub(crate) use marks::{MarkField, MarkedRecord};
use marks::{Marking, carry_out};

/// What the name of a record ends with that only has marks which belong to the record without it.
pub(crate) const MARKS_SUFFIX: &str = "-touched";
/// What the name of a record ends with that only says since when the record without it waits to be asked for.
pub(crate) const LEFT_SUFFIX: &str = "-left";
/// Longest name of a record in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Bytes of a region of a disk whose changes are recorded. After a crash each region that was written counts as changed; each costs
/// a sync once.
const REGION_BYTES: u64 = 16 << 20;

/// What a record is about; each kind has a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordKind {
    /// The bitmaps of an image that is being written.
    Bitmaps,
    /// What has been decided of checkpoints.
    Checkpoints,
}

impl RecordKind {
    const ALL: [Self; 2] = [Self::Bitmaps, Self::Checkpoints];

    const fn folder(self) -> &'static str {
        match self {
            Self::Bitmaps => "bitmaps",
            Self::Checkpoints => "checkpoints",
        }
    }
}

/// A state directory; all of its clones are the same. It is given back when the last one is dropped.
#[derive(Clone, Debug)]
pub struct StateDir {
    hand: Hand,
    held: Arc<Mutex<HashSet<String>>>,
}

/// A name of a record that somebody uses, as long as it is there.
#[derive(Debug)]
pub(crate) struct HeldName {
    name: String,
    all: Arc<Mutex<HashSet<String>>>,
}

impl Drop for HeldName {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.name);
    }
}

/// Who does what is asked for.
#[derive(Clone, Debug)]
enum Hand {
    /// The directory's threads.
    Threads(Lane<Call>, Lane<Marking>),
    /// Whoever asks, where a test owns what happens when.
    #[cfg(test)]
    Here(Arc<tests::Here>),
}

/// What is done in the directory.
type Call = Box<dyn FnOnce(&Folder, &Pulse) + Send>;

impl StateDir {
    /// Takes a directory for this process alone; it is made if it is not there. Waits for the file system.
    ///
    /// # Errors
    /// Another daemon uses it; what the file system says.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let folder = Folder::open(path, SystemTime::now())?;
        let threads = || {
            let calls = Lane::start("state", PATIENCE, move |asked| serve(&folder, asked))?;
            Ok((calls, Lane::start("state-marks", PATIENCE, serve_marks)?))
        };
        let (calls, marks) =
            threads().map_err(|error| failed(path, "its threads cannot be started", error))?;
        Ok(Self {
            hand: Hand::Threads(calls, marks),
            held: Arc::default(),
        })
    }

    /// The same, where everything is done at once by whoever asks.
    #[cfg(test)]
    pub(crate) fn open_here(path: &Path) -> Result<Self, EngineError> {
        let here = tests::Here::new(Folder::open(path, SystemTime::now())?);
        Ok(Self {
            hand: Hand::Here(Arc::new(here)),
            held: Arc::default(),
        })
    }

    /// Whether somebody [holds](Self::hold) a name.
    pub(crate) fn is_held(&self, name: &str) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.contains(name)
    }

    /// Says that a name is in use, which nobody else uses.
    pub(crate) fn hold(&self, name: &str) -> HeldName {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(name.to_owned());
        HeldName {
            name: name.to_owned(),
            all: Arc::clone(&self.held),
        }
    }

    /// Whether marks of a directory of [`open_here`](Self::open_here) fail from now on.
    #[cfg(test)]
    pub(crate) fn fail_marks(&self, fail: bool) {
        if let Hand::Here(here) = &self.hand {
            here.fail_marks(fail);
        }
    }

    /// A directory of [`open_here`](Self::open_here) does so much more, and leaves everything after that undone and unanswered, as if
    /// the power had gone; what was left undone before is forgotten.
    #[cfg(test)]
    pub(crate) fn stop_after(&self, works: u64) {
        if let Hand::Here(here) = &self.hand {
            here.stop_after(works);
        }
    }

    /// Bytes of a region of a disk whose changes are recorded here, at least.
    pub(crate) const fn region_bytes(&self) -> u64 {
        match self.hand {
            Hand::Threads(..) => REGION_BYTES,
            #[cfg(test)]
            Hand::Here(_) => tests::REGION_BYTES,
        }
    }

    /// Writes a record, instead of the one of this name if there is one. It is durable afterwards.
    ///
    /// # Errors
    /// What the file system says; the old record is there then, or the new one.
    ///
    /// # Cancel safety
    /// It is written all the same.
    pub(crate) async fn write(
        &self,
        kind: RecordKind,
        name: &str,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        self.write_made(kind, name, move || bytes).await
    }

    /// The same, made on the directory's thread: nobody else waits for that.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    /// As [`write`](Self::write).
    pub(crate) async fn write_made(
        &self,
        kind: RecordKind,
        name: &str,
        make: impl FnOnce() -> Vec<u8> + Send + 'static,
    ) -> io::Result<()> {
        let name = checked(name)?;
        let written = self.call(move |folder, pulse| {
            let file = folder.write((kind, &name), &make(), None, pulse);
            file.map(drop)
        });
        written.await
    }

    /// The record of this name; `None`: there is none, which is certain.
    ///
    /// # Errors
    /// `InvalidData` if it is not what was written; what the file system says: it may be there then, and readable later.
    pub(crate) async fn read(&self, kind: RecordKind, name: &str) -> io::Result<Option<Vec<u8>>> {
        let record = self.read_marked(kind, name).await?;
        Ok(record.map(|(bytes, _)| bytes))
    }

    /// The record of this name, and the bits behind it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) async fn read_marked(
        &self,
        kind: RecordKind,
        name: &str,
    ) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let name = checked(name)?;
        self.call(move |folder, pulse| folder.read((kind, &name), pulse))
            .await
    }

    /// Takes a record away, durably. It need not be there.
    ///
    /// # Errors
    /// What the file system says.
    ///
    /// # Cancel safety
    /// It is taken away all the same.
    pub(crate) async fn remove(&self, kind: RecordKind, name: &str) -> io::Result<()> {
        let name = checked(name)?;
        self.call(move |folder, _| folder.remove(kind, &name)).await
    }

    /// Has `call` done on the directory's thread.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Folder, &Pulse) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, outcome) = Answer::new();
        let done = answer.clone();
        let call: Call = Box::new(move |folder, pulse| {
            done.give(call(folder, pulse));
        });
        match &self.hand {
            Hand::Threads(calls, _) => calls.ask(call, answer)?,
            #[cfg(test)]
            Hand::Here(here) => here.call(call),
        }
        outcome.await.map_err(|_| gone())?
    }

    fn mark(&self, marking: Marking, answer: Answer<()>) -> io::Result<()> {
        match &self.hand {
            Hand::Threads(_, marks) => marks.ask(marking, answer),
            #[cfg(test)]
            Hand::Here(here) => here.mark(marking),
        }
    }
}

/// Does what is asked for until nobody can ask any more.
fn serve(folder: &Folder, asked: &Asked<Call>) {
    while let Some(call) = asked.next() {
        call(folder, asked.pulse());
        asked.pulse().beat();
    }
}

/// Sets bits until nobody can ask any more. Those that wait together are synced together.
fn serve_marks(asked: &Asked<Marking>) {
    while let Some(first) = asked.next() {
        let mut markings = vec![first];
        markings.extend(std::iter::from_fn(|| asked.next_now()));
        carry_out(markings, asked.pulse());
    }
}

/// A name that is one in any folder.
fn checked(name: &str) -> io::Result<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_plain) {
        true => Ok(name.to_owned()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("'{name}' cannot be the name of a record"),
        )),
    }
}

/// The directory's thread has ended, which is a bug.
fn gone() -> io::Error {
    io::Error::other("the state directory is not served any more (this is a bug)")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use futures_util::future::join_all;
    use tempfile::tempdir;

    use super::*;

    const KIND: RecordKind = RecordKind::Bitmaps;

    const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

    /// For disks of some KiB.
    pub(super) const REGION_BYTES: u64 = 4096;

    /// Does what is asked for at once.
    #[derive(Debug)]
    pub(super) struct Here {
        folder: Folder,
        marks_fail: AtomicBool,
        works_left: AtomicU64,
        undone: Mutex<Vec<Undone>>,
    }

    /// What is dropped is answered.
    enum Undone {
        Call(#[expect(dead_code, reason = "it is kept")] Call),
        Mark(#[expect(dead_code, reason = "it is kept")] Marking),
    }

    impl std::fmt::Debug for Undone {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Undone")
        }
    }

    impl Here {
        pub(super) fn new(folder: Folder) -> Self {
            Self {
                folder,
                marks_fail: AtomicBool::new(false),
                works_left: AtomicU64::new(u64::MAX),
                undone: Mutex::default(),
            }
        }

        pub(super) fn stop_after(&self, works: u64) {
            self.works_left.store(works, Ordering::Relaxed);
            let mut undone = self.undone.lock().expect("nobody has panicked");
            undone.clear();
        }

        /// Whether one more is done.
        fn goes_on(&self) -> bool {
            let less = |left: u64| left.checked_sub(1);
            let left = self
                .works_left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            left.is_ok()
        }

        fn leave(&self, undone: Undone) {
            let mut all = self.undone.lock().expect("nobody has panicked");
            all.push(undone);
        }

        pub(super) fn fail_marks(&self, fail: bool) {
            self.marks_fail.store(fail, Ordering::Relaxed);
        }

        pub(super) fn call(&self, call: Call) {
            if !self.goes_on() {
                return self.leave(Undone::Call(call));
            }
            call(&self.folder, &Pulse::default());
        }

        pub(super) fn mark(&self, marking: Marking) -> io::Result<()> {
            if self.marks_fail.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if !self.goes_on() {
                self.leave(Undone::Mark(marking));
                return Ok(());
            }
            carry_out(vec![marking], &Pulse::default());
            Ok(())
        }
    }

    #[tokio::test]
    async fn records_are_found_again_and_replaced_whole() {
        let folder = tempdir().expect("a folder");
        let path = folder.path().join("deep/state");
        let state = StateDir::open(&path).expect("made");
        assert_eq!(state.read(KIND, "a").await.expect("read"), None);
        for bytes in [b"one".to_vec(), Vec::new(), vec![7; 100_000]] {
            state
                .write(KIND, "a", bytes.clone())
                .await
                .expect("written");
            assert_eq!(state.read(KIND, "a").await.expect("read"), Some(bytes));
        }
        state.write(KIND, "b", vec![1]).await.expect("written");
        state.remove(KIND, "a").await.expect("removed");
        state.remove(KIND, "a").await.expect("it is not there");
        assert_eq!(state.read(KIND, "a").await.expect("read"), None);
        let other = state.read(KIND, "b").await.expect("read");
        assert_eq!(other, Some(vec![1]));
        let long = "x".repeat(65);
        for name in ["", "..", "a/b", ".new", "ä", &long] {
            let refused = state.write(KIND, name, Vec::new()).await;
            assert_eq!(
                refused.expect_err("refused").kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }

    #[test]
    fn what_is_half_done_goes() {
        let folder = tempdir().expect("a folder");
        fs::create_dir(folder.path().join("bitmaps")).expect("made");
        for name in ["a", "a-touched", "b-touched", "b-left", "c", ".new"] {
            fs::write(folder.path().join("bitmaps").join(name), "").expect("written");
        }
        let opened = StateDir::open(folder.path()).expect("it is there");
        let files = fs::read_dir(folder.path().join("bitmaps")).expect("a folder");
        let names = files.map(|file| file.expect("read").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.into_string().expect("text"))
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "a-left", "a-touched", "c", "c-left"]);
        drop(opened);
    }

    /// Records that nobody asks for go in the end, counted from the first start at which they were there; none goes that was asked for.
    #[test]
    fn what_nobody_asks_for_goes_half_a_year_later() {
        let folder = tempdir().expect("a folder");
        let now = SystemTime::now();
        let bitmaps = folder.path().join("bitmaps");
        fs::create_dir(&bitmaps).expect("made");
        let is_there = |name: &str| bitmaps.join(name).exists();
        for name in ["a", "a-touched", "b", "b-touched"] {
            let file = fs::File::create(bitmaps.join(name)).expect("written");
            // However long nothing was touched while the daemon ran.
            file.set_modified(now - 1000 * DAY).expect("older");
        }
        let start = |days: u32| drop(Folder::open(folder.path(), now + days * DAY).expect("there"));
        start(0);
        start(179);
        assert!(
            ["a", "a-touched", "a-left", "b"]
                .iter()
                .all(|name| is_there(name))
        );
        // Its image was opened.
        fs::remove_file(bitmaps.join("b-left")).expect("noted");
        start(180);
        assert!(
            ["a", "a-touched", "a-left"]
                .iter()
                .all(|name| !is_there(name))
        );
        assert!(
            ["b", "b-touched", "b-left"]
                .iter()
                .all(|name| is_there(name))
        );
        // A clock that was put back takes nothing away.
        start(0);
        assert!(is_there("b"));
        start(360);
        assert!(!is_there("b") && !is_there("b-left"));
    }

    #[tokio::test]
    async fn one_daemon_uses_a_directory() {
        let folder = tempdir().expect("a folder");
        let first = StateDir::open(folder.path()).expect("made");
        let second = StateDir::open(folder.path())
            .expect_err("in use")
            .to_string();
        let shown = folder.path().display();
        assert_eq!(
            second,
            format!("State directory '{shown}' is in use by another daemon")
        );
        first.write(KIND, "a", vec![1]).await.expect("still there");
        let third = StateDir::open(&folder.path().join("lock/x")).expect_err("no folder");
        assert!(third.to_string().contains("it cannot be made"), "{third}");
    }

    /// Whatever a crash or somebody else has made of a record, it is not taken for another one.
    #[tokio::test]
    async fn garbled_records_are_told_apart() {
        let folder = tempdir().expect("a folder");
        let state = StateDir::open(folder.path()).expect("made");
        state
            .write(KIND, "a", b"text".to_vec())
            .await
            .expect("written");
        let path = folder.path().join("bitmaps/a");
        let whole = fs::read(&path).expect("read");
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).expect("cut");
            let error = state.read(KIND, "a").await.expect_err("cut off");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        for byte in 0..whole.len() {
            let mut other = whole.clone();
            other[byte] ^= 1;
            fs::write(&path, &other).expect("changed");
            state.read(KIND, "a").await.expect_err("changed");
        }
    }

    #[tokio::test]
    async fn marks_are_found_behind_the_record() {
        let folder = tempdir().expect("a folder");
        let state = StateDir::open(folder.path()).expect("made");
        let field = MarkField::new(20_000);
        let record = state
            .write_marked(KIND, "a", b"text".to_vec(), field)
            .await
            .expect("written");
        let found = async || {
            let read = state.read_marked(KIND, "a").await.expect("read");
            let (bytes, field) = read.expect("it is there");
            assert_eq!(bytes, b"text");
            let field = MarkField::found(20_000, &field).expect("as long");
            (0..20_000)
                .filter(|bit| field.has(*bit))
                .collect::<Vec<u64>>()
        };
        assert!(found().await.is_empty());
        let marks = [0..1, 19_999..20_000, 17..40, 30..35].map(|bits| record.mark(bits));
        for done in join_all(marks).await {
            done.expect("marked");
        }
        let wanted: Vec<u64> = [0].into_iter().chain(17..40).chain([19_999]).collect();
        assert_eq!(found().await, wanted);
        record.mark(3..3).await.expect("nothing");
        let beyond = record.mark(19_990..20_001).await.expect_err("too far");
        assert_eq!(beyond.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(found().await, wanted);
    }

    /// However long a record takes, no disk waits for it.
    #[tokio::test]
    async fn marks_pass_a_record_that_is_being_written() {
        let folder = tempdir().expect("a folder");
        let state = StateDir::open(folder.path()).expect("made");
        let record = state.write_marked(KIND, "a", Vec::new(), MarkField::new(8));
        let record = record.await.expect("written");
        let (go_on, waits) = std::sync::mpsc::channel::<()>();
        let slow = state.clone();
        let slow = tokio::spawn(async move {
            let wait = move |_: &Folder, _: &Pulse| {
                let _ = waits.recv();
                Ok(())
            };
            slow.call(wait).await
        });
        tokio::task::yield_now().await;
        record.mark(3..4).await.expect("marked");
        assert!(!slow.is_finished());
        drop(go_on);
        slow.await.expect("no panic").expect("done");
        let read = state.read_marked(KIND, "a").await.expect("read");
        assert_eq!(read, Some((Vec::new(), vec![8])));
    }
}
