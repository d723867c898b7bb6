//! [`StateDir`]: what has to be found again after the daemon was killed: small records in a directory that one daemon uses at a time.
//!
//! Everything there is done by a thread of its own, in the order in which it was asked for, so that neither clients nor data wait
//! for a file system inside a call. A record that was written is durable; a crash leaves the old one or the new one, whole:
//!
//! ```text
//!   1  DIR/KIND/.new written and synced
//!   2  renamed to DIR/KIND/NAME; the folder synced
//! ```
//! A directory that does not answer in time is not waited for any more: what is asked for fails from then on, though it may yet be done.
//!
//! A record is what [`record`] says; behind it a file may have a field of bits, of which each goes from 0 to 1 in its place
//! ([`MarkedRecord`]).

mod answer;
mod marks;
mod record;

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};

use crate::error::EngineError;

use answer::{Answer, Patience};
pub(crate) use marks::{MarkField, MarkedRecord};
use marks::{Marking, carry_out};
use record::{decode, encode};

/// The file that says that a daemon uses the directory.
const LOCK_NAME: &str = "lock";
/// A record that is being written.
const NEW_NAME: &str = ".new";
/// What the name of a record ends with that only has marks which belong to the record without it.
pub(crate) const MARKS_SUFFIX: &str = "-touched";
/// Longest name of a record in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Bytes of a region of a disk whose changes are recorded. After a crash each region that was written counts as changed; each costs
/// a sync once.
const REGION_BYTES: u64 = 16 << 20;
/// Longest record in bytes: the bits of all bitmaps of an image.
const RECORD_BYTES_MAX: u64 = 8 << 30;

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
    /// The directory's thread, and what ends waiting for it.
    Thread(Sender<Work>, Patience),
    /// Whoever asks, where a test owns what happens when.
    #[cfg(test)]
    Here(Arc<tests::Here>),
}

/// What the directory's thread is asked for.
enum Work {
    Call(Box<dyn FnOnce(&Folder) + Send>),
    Mark(Marking),
}

/// The directory, on its thread.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Its lock ends with it.
    _lock: File,
}

impl StateDir {
    /// Takes a directory for this process alone; it is made if it is not there. Waits for the file system.
    ///
    /// # Errors
    /// Another daemon uses it; what the file system says.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let folder = Folder::open(path)?;
        let (work, asked) = channel();
        let thread = || {
            let patience = Patience::start()?;
            std::thread::Builder::new()
                .name("state".to_owned())
                .spawn(move || serve(&folder, &asked))?;
            Ok(patience)
        };
        let patience =
            thread().map_err(|error| failed(path, "its thread cannot be started", error))?;
        Ok(Self {
            hand: Hand::Thread(work, patience),
            held: Arc::default(),
        })
    }

    /// The same, where everything is done at once by whoever asks.
    #[cfg(test)]
    pub(crate) fn open_here(path: &Path) -> Result<Self, EngineError> {
        let here = tests::Here::new(Folder::open(path)?);
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

    /// Bytes of a region of a disk whose changes are recorded here, at least.
    pub(crate) const fn region_bytes(&self) -> u64 {
        match self.hand {
            Hand::Thread(..) => REGION_BYTES,
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
        let name = checked(name)?;
        self.call(move |folder| folder.write(kind, &name, &bytes, None).map(drop))
            .await
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
        self.call(move |folder| folder.read(kind, &name)).await
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
        self.call(move |folder| folder.remove(kind, &name)).await
    }

    /// Has `call` done on the directory's thread.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Folder) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, outcome) = Answer::new();
        let done = answer.clone();
        let work = Work::Call(Box::new(move |folder| {
            done.give(call(folder));
        }));
        self.give(work, answer)?;
        outcome.await.map_err(|_| gone())?
    }

    fn give<T: Send + 'static>(&self, work: Work, answer: Answer<T>) -> io::Result<()> {
        match &self.hand {
            Hand::Thread(thread, patience) => {
                patience.check()?;
                thread.send(work).map_err(|_| gone())?;
                patience.watch(answer);
                Ok(())
            }
            #[cfg(test)]
            Hand::Here(here) => here.take(work),
        }
    }
}

/// Does what is asked for until nobody can ask any more. Marks that wait together are synced together.
fn serve(folder: &Folder, asked: &Receiver<Work>) {
    let mut next = asked.recv().ok();
    while let Some(work) = next.take() {
        match work {
            Work::Call(call) => call(folder),
            Work::Mark(first) => {
                let mut markings = vec![first];
                loop {
                    match asked.try_recv() {
                        Ok(Work::Mark(more)) => markings.push(more),
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                carry_out(markings);
            }
        }
        if next.is_none() {
            next = asked.recv().ok();
        }
    }
}

fn failed(path: &Path, what: &str, error: io::Error) -> EngineError {
    let shown = path.display();
    EngineError::generic(format!("State directory '{shown}': {what}: {error}"))
}

impl Folder {
    fn open(path: &Path) -> Result<Self, EngineError> {
        let folders = [path.to_owned()].into_iter();
        let kinds = RecordKind::ALL.map(|kind| path.join(kind.folder()));
        for folder in folders.chain(kinds) {
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder);
            made.map_err(|error| failed(path, "it cannot be made", error))?;
        }
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK_NAME))
            .map_err(|error| failed(path, "it cannot be locked", error))?;
        flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).map_err(
            |errno| match errno {
                rustix::io::Errno::WOULDBLOCK => EngineError::generic(format!(
                    "State directory '{}' is in use by another daemon",
                    path.display()
                )),
                errno => failed(path, "it cannot be locked", errno.into()),
            },
        )?;
        // The new folders have to be there after a crash, too.
        sync_folder(path).map_err(|error| failed(path, "it cannot be synced", error))?;
        let folder = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        let tidied = RecordKind::ALL
            .iter()
            .try_for_each(|kind| folder.tidy(*kind));
        tidied.map_err(|error| failed(path, "it cannot be read", error))?;
        Ok(folder)
    }

    /// Takes away what a crash has left half done.
    fn tidy(&self, kind: RecordKind) -> io::Result<()> {
        for entry in fs::read_dir(self.path.join(kind.folder()))? {
            let Ok(name) = entry?.file_name().into_string() else {
                continue;
            };
            let record = name.strip_suffix(MARKS_SUFFIX);
            let is_alone = record.map(|record| self.place(kind, record).try_exists());
            if name == NEW_NAME || matches!(is_alone.transpose()?, Some(false)) {
                fs::remove_file(self.place(kind, &name))?;
            }
        }
        Ok(())
    }

    fn place(&self, kind: RecordKind, name: &str) -> PathBuf {
        self.path.join(kind.folder()).join(name)
    }

    /// Writes a record with a field of bits behind it; the file is what further bits go to.
    fn write(
        &self,
        kind: RecordKind,
        name: &str,
        bytes: &[u8],
        field: Option<&[u8]>,
    ) -> io::Result<File> {
        let new = self.place(kind, NEW_NAME);
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .open(&new)?;
        let written = write_whole(&file, bytes, field).and_then(|()| {
            fs::rename(&new, self.place(kind, name))?;
            sync_folder(&self.path.join(kind.folder()))
        });
        if written.is_err() {
            // A full disk is not to be filled by what nobody reads.
            let _ = fs::remove_file(&new);
        }
        written.map(|()| file)
    }

    fn read(&self, kind: RecordKind, name: &str) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let mut file = match File::open(self.place(kind, name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() > RECORD_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        decode(bytes).map(Some)
    }

    fn remove(&self, kind: RecordKind, name: &str) -> io::Result<()> {
        match fs::remove_file(self.place(kind, name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_folder(&self.path.join(kind.folder())),
        }
    }
}

fn write_whole(mut file: &File, bytes: &[u8], field: Option<&[u8]>) -> io::Result<()> {
    for piece in encode(bytes, field) {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures_util::future::join_all;
    use tempfile::tempdir;

    use super::*;

    const KIND: RecordKind = RecordKind::Bitmaps;

    /// For disks of some KiB.
    pub(super) const REGION_BYTES: u64 = 4096;

    /// Does what is asked for at once.
    #[derive(Debug)]
    pub(super) struct Here {
        folder: Folder,
        marks_fail: AtomicBool,
    }

    impl Here {
        pub(super) fn new(folder: Folder) -> Self {
            Self {
                folder,
                marks_fail: AtomicBool::new(false),
            }
        }

        pub(super) fn fail_marks(&self, fail: bool) {
            self.marks_fail.store(fail, Ordering::Relaxed);
        }

        pub(super) fn take(&self, work: Work) -> io::Result<()> {
            match work {
                Work::Call(call) => call(&self.folder),
                Work::Mark(_) if self.marks_fail.load(Ordering::Relaxed) => {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                Work::Mark(marking) => carry_out(vec![marking]),
            }
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
        for name in ["a", "a-touched", "b-touched", "c", ".new"] {
            fs::write(folder.path().join("bitmaps").join(name), "").expect("written");
        }
        let opened = StateDir::open(folder.path()).expect("it is there");
        let files = fs::read_dir(folder.path().join("bitmaps")).expect("a folder");
        let names = files.map(|file| file.expect("read").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.into_string().expect("text"))
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "a-touched", "c"]);
        drop(opened);
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
}
