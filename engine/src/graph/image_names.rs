//! Which names that stand in images are followed, and to what. Pure.
//!
//! A client vouches for the images it names, not for what stands in them: whoever can write to a disk as a guest may have
//! written it. So a name leads to a plain file whose format the image states, or it is refused and the error says how to name
//! the node instead. A description of a node that leads no further counts as such a name. `--image-names qemu` follows names as
//! QEMU does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::EngineError;
use crate::graph::described_images::NamedImage;
use crate::image_policy::{ImagePolicy, NamesInImages};
use crate::request::{
    BackingRef, CommonOptions, DriverSpec, NamedBy, NodeRef, NodeSpec, Qcow2Spec,
};

/// Places that lead to what a process has open, or show the kernel.
const KERNEL_PLACES: [&str; 7] = [
    "/proc",
    "/sys",
    "/dev/fd",
    "/dev/fdset",
    "/dev/stdin",
    "/dev/stdout",
    "/dev/stderr",
];

/// How clients of a daemon go on without following a name.
const BACKING_ADVICE: &str = "open it by a command of its own and give its node as 'backing', or \
                              give null";

/// What an image says about its backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackingName {
    /// The name as it stands in the header.
    pub(crate) name: Vec<u8>,
    /// The format that the header states.
    pub(crate) format: Option<String>,
}

/// What a name comes to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Followed {
    /// A file in a format.
    File {
        /// Its path.
        path: PathBuf,
        /// Its format; `None`: whatever its first bytes look like.
        format: Option<BackingFormat>,
    },
    /// A node that the name describes.
    Node(Box<NodeSpec>),
}

/// Formats that a backing file can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BackingFormat {
    Qcow2,
    Raw,
    /// The file itself is the disk.
    File,
}

impl BackingName {
    /// The name as queries show it.
    pub(super) fn shown(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// The same for an image in `folder` (with its slash), where it is relative to that.
    pub(super) fn from(&self, folder: &str) -> String {
        match protocol(&self.name) {
            Some(_) => self.shown(),
            None => in_folder(&self.name, folder).display().to_string(),
        }
    }

    /// The file that the name stands for, for an image in `folder` (with its slash) that is shown as `image`.
    ///
    /// # Errors
    /// The name is not followed: says why, and how to go on.
    pub(crate) fn follow(
        &self,
        policy: &ImagePolicy,
        image: &str,
        folder: &str,
    ) -> Result<Followed, EngineError> {
        let refuse = |what: &str| Err(self.refused(policy, image, what));
        let as_qemu = policy.names == NamesInImages::AsQemu;
        let shown = self.shown();
        if let Some((options, read)) = shown.strip_prefix("json:").zip(policy.read_options) {
            return self.described(read(options, self.format.as_deref()), policy, image);
        }
        let mut name = self.name.as_slice();
        if let Some(protocol) = protocol(name) {
            if !as_qemu {
                return refuse("is not the name of a file");
            }
            let protocol = String::from_utf8_lossy(protocol).into_owned();
            if protocol != "file" {
                return Err(EngineError::generic(format!(
                    "Unknown protocol '{protocol}'"
                )));
            }
            name = name.get(protocol.len() + 1..).unwrap_or(&[]);
        }
        let path = in_folder(name, folder);
        if !as_qemu && is_kernel_place(&path) {
            return refuse("belongs to a process or the kernel");
        }
        let format = match self.format.as_deref() {
            Some("qcow2") => Some(BackingFormat::Qcow2),
            Some("raw") => Some(BackingFormat::Raw),
            Some("file") => Some(BackingFormat::File),
            Some(other) => {
                return Err(EngineError::generic(format!("Unknown driver '{other}'")));
            }
            None if as_qemu => None,
            None => return refuse("is there without its format"),
        };
        Ok(Followed::File { path, format })
    }

    /// The node that the name describes.
    fn described(
        &self,
        read: Result<NodeSpec, EngineError>,
        policy: &ImagePolicy,
        image: &str,
    ) -> Result<Followed, EngineError> {
        if policy.names == NamesInImages::AsQemu {
            let mut spec = read?;
            if !policy.roots.is_empty() {
                mark_files(&mut spec);
            }
            return Ok(Followed::Node(Box::new(spec)));
        }
        let mut spec = read.map_err(|error| {
            self.refused(policy, image, &format!("is not understood ({error})"))
        })?;
        if NamedImage::described(&spec).is_none() {
            return Err(self.refused(policy, image, "asks for more than images in files"));
        }
        mark_files(&mut spec);
        Ok(Followed::Node(Box::new(spec)))
    }

    fn refused(&self, policy: &ImagePolicy, image: &str, what: &str) -> EngineError {
        let advice = policy.advice.unwrap_or(BACKING_ADVICE);
        EngineError::generic(format!(
            "'{}' in the header of '{image}' {what} and is not followed; {advice}",
            self.shown()
        ))
    }
}

impl BackingFormat {
    /// The node on a file, as it would be described in `blockdev-add`.
    pub(super) fn describe(self, file: DriverSpec) -> NodeSpec {
        let node = |driver| NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver,
        };
        let file_node = node(file);
        let inline = |spec| NodeRef::Inline(Box::new(spec));
        match self {
            BackingFormat::File => file_node,
            BackingFormat::Raw => node(DriverSpec::Raw {
                file: inline(file_node),
                offset: None,
                size: None,
            }),
            BackingFormat::Qcow2 => node(DriverSpec::Qcow2(Box::new(Qcow2Spec {
                backing: BackingRef::FromImage,
                ..Qcow2Spec::over(inline(file_node))
            }))),
        }
    }
}

/// The path of the data file that an image names. As with QEMU it is relative to where the daemon runs; that it is then in the
/// image's folder is seen when it is opened.
///
/// # Errors
/// The name is not followed.
pub(super) fn data_file_path(name: &[u8], policy: NamesInImages) -> Result<PathBuf, EngineError> {
    let path = Path::new(OsStr::from_bytes(name));
    let plain = protocol(name).is_none() && !is_kernel_place(path);
    if plain || policy == NamesInImages::AsQemu {
        return Ok(path.to_owned());
    }
    Err(no_data_file(Some(name)))
}

/// What a client hears when the image's own data file is not used.
pub(super) fn no_data_file(name: Option<&[u8]>) -> EngineError {
    let text = "'data-file' is required for this image";
    EngineError::generic(match name {
        None => text.to_owned(),
        Some(name) => format!(
            "{text}: '{}' in its header is not followed, as it is not a file beside it",
            String::from_utf8_lossy(name)
        ),
    })
}

/// Every file in a description is one that an image has named.
fn mark_files(spec: &mut NodeSpec) {
    if let DriverSpec::File(file) | DriverSpec::HostDevice(file) = &mut spec.driver {
        file.named_by = NamedBy::Image { folder: None };
    }
    for child in spec.driver.children_mut() {
        if let NodeRef::Inline(child) = child {
            mark_files(child);
        }
    }
}

/// What stands before a colon that comes before any slash.
pub(super) fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    let (protocol, rest) = name.split_at_checked(end)?;
    rest.starts_with(b":").then_some(protocol)
}

pub(super) fn in_folder(name: &[u8], folder: &str) -> PathBuf {
    if name.starts_with(b"/") {
        return PathBuf::from(OsString::from_vec(name.to_vec()));
    }
    let mut path = folder.as_bytes().to_vec();
    path.extend_from_slice(name);
    PathBuf::from(OsString::from_vec(path))
}

fn is_kernel_place(path: &Path) -> bool {
    // Components, so that doubled slashes and single dots do not hide one.
    let path: PathBuf = path.components().collect();
    KERNEL_PLACES.iter().any(|place| path.starts_with(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: NamesInImages = NamesInImages::Files;
    const AS_QEMU: NamesInImages = NamesInImages::AsQemu;

    fn follow(name: &str, format: Option<&str>, policy: NamesInImages) -> Result<String, String> {
        let backing = BackingName {
            name: name.as_bytes().to_vec(),
            format: format.map(str::to_owned),
        };
        let policy = ImagePolicy {
            names: policy,
            ..ImagePolicy::default()
        };
        match backing.follow(&policy, "i.qcow2", "folder/") {
            Ok(Followed::File { path, format }) => Ok(format!("{} {format:?}", path.display())),
            Ok(Followed::Node(spec)) => Ok(format!("node {}", spec.driver.name())),
            Err(error) => Err(error.text),
        }
    }

    #[test]
    fn plain_files_with_a_format_are_followed() {
        for (name, path) in [
            ("base", "folder/base"),
            ("../base", "folder/../base"),
            ("/x/base", "/x/base"),
            ("./nbd:host", "folder/./nbd:host"),
            ("a/b:c", "folder/a/b:c"),
        ] {
            for policy in [FILES, AS_QEMU] {
                let followed = follow(name, Some("qcow2"), policy);
                assert_eq!(followed, Ok(format!("{path} Some(Qcow2)")), "{name}");
            }
        }
        assert_eq!(
            follow("b", Some("raw"), FILES),
            Ok("folder/b Some(Raw)".to_owned())
        );
        assert_eq!(
            follow("b", Some("file"), FILES),
            Ok("folder/b Some(File)".to_owned())
        );
        let unknown = follow("b", Some("vmdk"), FILES);
        assert_eq!(unknown, Err("Unknown driver 'vmdk'".to_owned()));
    }

    #[test]
    fn everything_else_is_refused_with_a_way_to_go_on() {
        let advice = format!("and is not followed; {BACKING_ADVICE}");
        for (names, why) in [
            (
                [
                    "json:{\"driver\": \"file\", \"filename\": \"/etc/shadow\"}",
                    "nbd:localhost:1",
                    "nbd+unix:///x?socket=s",
                    "http://host/x",
                    "file:base",
                    "fd:3",
                    ":",
                ],
                "is not the name of a file",
            ),
            (
                [
                    "/proc/self/fd/3",
                    "/proc/self/environ",
                    "//proc/./self/environ",
                    "/sys/kernel/x",
                    "/dev/fd/3",
                    "/dev/fdset/1",
                    "/dev/stdin",
                ],
                "belongs to a process or the kernel",
            ),
        ] {
            for name in names {
                let text = format!("'{name}' in the header of 'i.qcow2' {why} {advice}");
                assert_eq!(follow(name, Some("raw"), FILES), Err(text));
            }
        }
        let text = format!("'b' in the header of 'i.qcow2' is there without its format {advice}");
        assert_eq!(follow("b", None, FILES), Err(text));
    }

    #[test]
    fn qemus_ways_can_be_had() {
        let followed = follow("file:base", Some("raw"), AS_QEMU);
        assert_eq!(followed, Ok("folder/base Some(Raw)".to_owned()));
        assert_eq!(follow("b", None, AS_QEMU), Ok("folder/b None".to_owned()));
        let unknown = follow("foo:bar", Some("raw"), AS_QEMU);
        assert_eq!(unknown, Err("Unknown protocol 'foo'".to_owned()));
    }

    #[test]
    fn names_that_are_no_text_are_followed_as_they_are() {
        let backing = BackingName {
            name: vec![b'a', 0xff],
            format: Some("raw".to_owned()),
        };
        let Ok(Followed::File { path, .. }) = backing.follow(&ImagePolicy::default(), "i", "")
        else {
            panic!("followed")
        };
        assert_eq!(path.as_os_str().as_bytes(), [b'a', 0xff]);
    }

    #[test]
    fn data_files_are_files() {
        let path = |name: &str, policy| data_file_path(name.as_bytes(), policy).ok();
        assert_eq!(path("d.raw", FILES), Some(PathBuf::from("d.raw")));
        for name in ["json:{}", "nbd:x", "/proc/self/environ"] {
            let error = data_file_path(name.as_bytes(), FILES).expect_err("refused");
            assert!(
                error
                    .text
                    .starts_with("'data-file' is required for this image: ")
            );
            assert_eq!(path(name, AS_QEMU), Some(PathBuf::from(name)));
        }
        assert_eq!(
            no_data_file(None).text,
            "'data-file' is required for this image"
        );
    }
}
