//! Copies where a side is a qcow2 image: of the whole disk, or of what a bitmap of SRC says has changed.
//!
//! ```text
//!   look at SRC, its bitmap, PREVIOUS -> make DST on PREVIOUS -> job -> close DST, sync -> verify -> manifest -> clear the bitmap
//! ```
//! SRC is opened for reading only until DST is durable, so that whatever ends the command earlier leaves its bitmap as it was.
//! If only clearing it fails DST stays: nobody can tell then which of the two the medium has.

use std::time::Instant;

use blockyard_engine::images::{CompareSpec, Difference, ImageReply, ImageWork, ManifestOntoSpec};
use blockyard_engine::request::{BackingRef, DetectZeroes, Discard, NamedBy, NodeRef};

use crate::size;
use crate::terminal::check::arguments::Format;
use crate::terminal::copy::arguments::{Asked, Changes, SOURCE, TARGET};
use crate::terminal::copy::ends::{Source, Target, cannot_use, shown};
use crate::terminal::copy::job::{Copied, add_source, add_target, check_unused, outcome_of};
use crate::terminal::copy::{check_manifest, check_unmodified};
use crate::terminal::display::Outcome;
use crate::terminal::embedded::{Embedded, ImageFile, NodeFile, Sharing};
use crate::terminal::images::Disk;
use crate::terminal::images::create::{check_options, make_in, name_from};
use crate::terminal::images::create_options::ImageOptions;

/// Name of the node of PREVIOUS.
const ONTO: &str = "onto";

/// Name of the node of its manifest.
const ONTO_MANIFEST: &str = "onto-manifest";

/// What is copied, and what it becomes.
struct Copy<'a> {
    asked: &'a Asked<'a>,
    source: Source,
    /// Of the target, if that is a qcow2 image.
    options: ImageOptions,
}

/// Copies one disk to another, or what has changed of it.
pub(super) async fn copy(embedded: &mut Embedded, asked: &Asked<'_>) -> Copied {
    let copy = match Copy::look(embedded, asked).await {
        Ok(copy) => copy,
        Err(text) => return Copied::refused(text),
    };
    let arguments = asked.copy;
    let target = match Target::claim(&arguments.target, arguments.force, Some(&copy.source)) {
        Ok(target) => target,
        Err(text) => return Copied::refused(text),
    };
    let options = arguments.options(asked.kind);
    let mut copied = match check_manifest(&options, &copy.source, &target) {
        Ok(()) => copy.copy_onto(embedded, &target).await,
        Err(text) => Copied::refused(text),
    };
    if copied.outcome != Outcome::Completed {
        copied.clean_up(&target, arguments.keep_partial);
        // That of an increment comes last, and only if all is well.
        if asked.changes.is_none() {
            copied.remove_manifest(&options);
        }
        return copied;
    }
    if let Err(text) = copy.clear_bitmap(embedded, &mut copied).await {
        copied.outcome = Outcome::failed(text);
    }
    copied
}

impl<'a> Copy<'a> {
    /// Opens all that is read, and finds out whether it can be done. Nothing has changed.
    async fn look(embedded: &mut Embedded, asked: &'a Asked<'a>) -> Result<Self, String> {
        let path = &asked.copy.source;
        let mut source = Source::open(path)?;
        let disk = Disk {
            node: SOURCE,
            path,
            format: asked.source_format(),
            option: "--source-format",
            read_only: true,
            sharing: Sharing::Readers,
            named_by: NamedBy::Client,
        };
        let source_format = disk.format()?;
        let cannot = |error: &dyn std::fmt::Display| cannot_use(path, &error.to_string());
        match source_format {
            Format::Raw => {
                add_source(embedded, &source).await?;
            }
            Format::Qcow2 => {
                let node = NodeFile {
                    read_only: true,
                    ..node_file(SOURCE, &source.path, source.is_device)
                };
                let added = embedded.add_qcow2_to_copy(&node, BackingRef::FromImage);
                added.await.map_err(|error| cannot(&error.text))?;
                let view = embedded.image_view(SOURCE).await;
                let view = view.map_err(|error| cannot(&error.text))?;
                source.disk_bytes = view.virtual_size_bytes;
            }
        }
        let mut options = ImageOptions::read(&asked.copy.options, Format::Qcow2)?;
        if options.size_bytes.is_some()
            || options.backing_file.is_some()
            || options.backing_format.is_some()
            || options.data_file.is_some()
        {
            let text = "DST is as long as SRC, its backing file is named by --onto, and it has no data file";
            return Err(text.to_owned());
        }
        let copy = Self {
            asked,
            source,
            options: ImageOptions::default(),
        };
        if let Some(changes) = asked.changes {
            copy.look_at_bitmap(embedded, changes).await?;
            if let Some((onto, format)) = changes.onto {
                copy.open_previous(embedded, changes).await?;
                options.backing_file = Some(name_from(&asked.copy.target, onto)?);
                options.backing_format = Some(
                    match format {
                        Format::Raw => "raw",
                        Format::Qcow2 => "qcow2",
                    }
                    .to_owned(),
                );
            }
        }
        if asked.target_format() == Format::Qcow2 {
            check_options(&options, copy.source.size_bytes())?;
        }
        Ok(Self { options, ..copy })
    }

    /// Whether the bitmap can be gone by: what it does not know of would be missing in the copy.
    async fn look_at_bitmap(
        &self,
        embedded: &Embedded,
        changes: Changes<'_>,
    ) -> Result<(), String> {
        let (name, path) = (changes.bitmap, shown(&self.source.path));
        let view = embedded.node_view(SOURCE).await;
        let view = view.map_err(|error| format!("cannot use {path}: {}", error.text))?;
        let bitmap = view
            .bitmaps
            .iter()
            .find(|bitmap| bitmap.name.as_deref() == Some(name));
        let Some(bitmap) = bitmap else {
            return Err(format!("{path} has no bitmap '{name}'"));
        };
        if bitmap.inconsistent {
            return Err(format!(
                "Bitmap '{name}' of {path} is inconsistent: {path} was not closed after its last use, and some changes may \
                 not be in it. Make a full backup, remove the bitmap and add a new one"
            ));
        }
        if !bitmap.recording && !changes.keeps_bitmap {
            return Err(format!(
                "Bitmap '{name}' of {path} is disabled: what has changed since is not in it. --keep-bitmap copies what is, \
                 and leaves it alone"
            ));
        }
        Ok(())
    }

    async fn open_previous(&self, embedded: &Embedded, changes: Changes<'_>) -> Result<(), String> {
        let Some((onto, format)) = changes.onto else {
            return Ok(());
        };
        if self.source.is_at(onto) {
            return Err(format!(
                "{} is SRC itself; --onto takes the backup before",
                shown(onto)
            ));
        }
        let disk = Disk {
            node: ONTO,
            path: onto,
            format: Some(format),
            option: "--onto-format",
            read_only: true,
            sharing: Sharing::Readers,
            named_by: NamedBy::Client,
        };
        disk.open(embedded).await?;
        let Some(path) = changes.onto_manifest else {
            return Ok(());
        };
        let manifest = Disk {
            node: ONTO_MANIFEST,
            path,
            format: Some(Format::Raw),
            option: "--onto-manifest",
            ..disk
        };
        manifest.open(embedded).await.map(drop)
    }

    async fn copy_onto(&self, embedded: &mut Embedded, target: &Target) -> Copied {
        if let Err(copied) = self.open_target(embedded, target).await {
            return copied;
        }
        let started = Instant::now();
        let id = self.asked.kind.name();
        let job = match embedded.run_job(id, self.asked.work(), true).await {
            Ok(job) => job,
            Err(error) => return Copied::refused(error.text),
        };
        let mut copied = Copied {
            outcome: outcome_of(embedded, &job),
            bytes: match self.asked.changes {
                Some(_) => job.current_progress,
                // A job counts in units of its own.
                None => self.source.disk_bytes,
            },
            took: None,
            job: Some(job),
            facts: Vec::new(),
        };
        if copied.outcome == Outcome::Completed {
            match self.finish(embedded, target).await {
                Ok(()) => copied.took = Some(started.elapsed()),
                Err(text) => copied.outcome = Outcome::failed(text),
            }
        }
        if copied.outcome != Outcome::Completed {
            if let Some(job) = &copied.job
                && copied.took.is_none()
                && job.error.is_none()
            {
                // What was copied is not known to be there.
                copied.bytes = 0;
            }
            return copied;
        }
        if let Some(allocated) = target.allocated_bytes() {
            let text = format!("{} on disk", size::shown(allocated));
            copied.tell("allocated-bytes", allocated, text);
        }
        let verifies = self.asked.copy.verify;
        if verifies {
            self.verify(embedded, target, &mut copied).await;
        }
        if copied.outcome == Outcome::Completed {
            check_unmodified(embedded, &self.source, target, verifies, &mut copied);
        }
        if copied.outcome == Outcome::Completed
            && let Err(outcome) = self.write_manifest(embedded).await
        {
            copied.outcome = outcome;
        }
        copied
    }

    /// Puts down what the whole disk holds, if that is wanted and the job has not: what has changed is read again.
    async fn write_manifest(&self, embedded: &mut Embedded) -> Result<(), Outcome> {
        let options = self.asked.copy.options(self.asked.kind);
        let (Some(changes), Some(path)) = (self.asked.changes, options.integrity.manifest) else {
            return Ok(());
        };
        let work = ImageWork::ManifestOnto(ManifestOntoSpec {
            previous: ONTO_MANIFEST.to_owned(),
            bitmap: changes.bitmap.to_owned(),
            path,
            replaces: options.integrity.replaces_manifest,
        });
        let written = embedded.work_on_image("manifest", SOURCE, work, |_, _| ());
        match written.await {
            Ok(_) => Ok(()),
            Err(_) if embedded.interrupt.is_asked() => Err(Outcome::Cancelled),
            Err(error) => Err(Outcome::failed(error.text)),
        }
    }

    /// Gives the target what it needs of room and tables, and opens its node.
    async fn open_target(&self, embedded: &mut Embedded, target: &Target) -> Result<(), Copied> {
        let cannot = |text: &str| Copied::refused(cannot_use(&target.path, text));
        if self.asked.target_format() == Format::Raw {
            let options = self.asked.copy.options(self.asked.kind);
            let added = add_target(embedded, &options, &self.source, target).await;
            return added.map(drop);
        }
        if target.is_device {
            return Err(cannot(
                "a qcow2 image is made in a file, not on a block device",
            ));
        }
        if !target.is_new {
            let unused = check_unused(embedded, target).await;
            unused.map_err(|error| cannot(&error.text))?;
        }
        let size_bytes = self.source.size_bytes();
        let made = make_in(embedded, target, self.options.clone(), size_bytes).await;
        made.map_err(|text| match embedded.interrupt.is_asked() {
            true => Copied {
                outcome: Outcome::Cancelled,
                ..Copied::refused("")
            },
            false => Copied::refused(text),
        })?;
        let backing = match self.options.backing_file {
            Some(_) => BackingRef::Node(NodeRef::Name(ONTO.to_owned())),
            None => BackingRef::Nothing,
        };
        let node = NodeFile {
            detect_zeroes: self.asked.copy.detect_zeroes.into(),
            // Zeroes are told by tables; the room is given back as well only if that is wanted.
            discard: match self.asked.copy.detect_zeroes.into() {
                DetectZeroes::Unmap => Discard::Unmap,
                _ => Discard::Ignore,
            },
            ..node_file(TARGET, &target.path, false)
        };
        let added = embedded.add_qcow2_to_copy(&node, backing).await;
        added.map(drop).map_err(|error| cannot(&error.text))
    }

    /// Closes the target. It is durable when this returns.
    async fn finish(&self, embedded: &Embedded, target: &Target) -> Result<(), String> {
        match self.asked.target_format() {
            Format::Raw => target.finish(self.source.disk_bytes),
            Format::Qcow2 => {
                let closed = embedded.delete_node(TARGET).await;
                closed.map_err(|error| {
                    format!("cannot finish {}: {}", shown(&target.path), error.text)
                })?;
                target.make_durable(None)
            }
        }
    }

    /// Compares both disks, the target's as its file has it; the outcome is another one if they differ.
    async fn verify(&self, embedded: &mut Embedded, target: &Target, copied: &mut Copied) {
        let path = shown(&target.path);
        if self.asked.target_format() == Format::Qcow2 {
            let disk = Disk {
                node: TARGET,
                path: &target.path,
                format: Some(Format::Qcow2),
                option: "--target-format",
                read_only: true,
                sharing: Sharing::Readers,
                named_by: NamedBy::Client,
            };
            if let Err(text) = disk.open(embedded).await {
                copied.outcome = Outcome::failed(text);
                return;
            }
        }
        let work = ImageWork::Compare(CompareSpec {
            other: TARGET.to_owned(),
            strict: false,
        });
        let compared = embedded
            .work_on_image("verify", SOURCE, work, |_, _| ())
            .await;
        let failed = |error: String, offset: u64| Outcome::Failed {
            error,
            failed_at: Some(format!("first at byte {offset}")),
        };
        let source = shown(&self.source.path);
        copied.outcome = match compared {
            Ok(ImageReply::Compared(view)) => match view.difference {
                None => return,
                Some(Difference::Content { offset }) => {
                    failed(format!("{path} differs from {source}"), offset)
                }
                Some(Difference::Unreadable {
                    first,
                    offset,
                    reason,
                    ..
                }) => {
                    let unread = if first { &source } else { &path };
                    failed(format!("cannot read {unread}: {reason}"), offset)
                }
                Some(Difference::Length | Difference::Allocation { .. }) => {
                    Outcome::failed(format!("{path} differs from {source}"))
                }
            },
            Ok(_) => Outcome::failed("Internal error: another reply (bug)"),
            Err(_) if embedded.interrupt.is_asked() => Outcome::Cancelled,
            Err(error) => Outcome::failed(error.text),
        };
        copied.tell("verified", false, String::new());
    }

    /// The copy is durable: what it has is no longer new. Adds what is to be told.
    async fn clear_bitmap(&self, embedded: &Embedded, copied: &mut Copied) -> Result<(), String> {
        let Some(changes) = self.asked.changes else {
            return Ok(());
        };
        let name = changes.bitmap;
        copied.tell("bitmap", name, String::new());
        let Some(clear) = self.asked.forgotten() else {
            copied.tell("bitmap-cleared", false, format!("bitmap '{name}' kept"));
            return Ok(());
        };
        let source = ImageFile {
            name: SOURCE,
            path: self.source.path.clone(),
            is_device: self.source.is_device,
            read_only: false,
            sharing: Sharing::Readers,
            discard: Discard::Ignore,
            named_by: NamedBy::Client,
        };
        let cleared = async {
            let layers = embedded.chain(SOURCE).await?;
            let backing = || match layers.get(1) {
                Some(below) => BackingRef::Node(NodeRef::Name(below.node_name.clone())),
                None => BackingRef::FromImage,
            };
            // Nobody else could write to it meanwhile.
            embedded.reopen_qcow2(&source, backing()).await?;
            embedded.change_bitmap(clear).await?;
            embedded.make_qcow2_read_only(&source, backing()).await
        };
        cleared.await.map_err(|error| {
            format!(
                "{} is whole and stays, but bitmap '{name}' of {} may not be cleared: {}; the next backup by it copies \
                 too much, and nothing is lost",
                shown(&self.asked.copy.target),
                shown(&self.source.path),
                error.text
            )
        })?;
        copied.tell("bitmap-cleared", true, format!("bitmap '{name}' cleared"));
        Ok(())
    }
}

/// A file that is written; whoever is not to write it says so.
fn node_file(name: &'static str, path: &std::path::Path, is_device: bool) -> NodeFile {
    NodeFile {
        name,
        path: path.to_owned(),
        is_device,
        read_only: false,
        size_bytes: 0,
        discard: Discard::Ignore,
        detect_zeroes: DetectZeroes::Off,
    }
}
