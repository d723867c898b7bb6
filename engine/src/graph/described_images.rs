//! [`NamedImage`]: what the description of a node comes to that needs no more than names of files. Pure.
//!
//! Where a chain is another one than its headers tell, QEMU's daemon writes a description into the header of a new overlay, and
//! so does this one. One that tells of images in files, each by its name alone, leads nowhere that plain names in headers could not.

use std::path::PathBuf;

use crate::images::ImageFormat;
use crate::request::{
    BackingRef, CommonOptions, DriverSpec, FileSpec, NodeRef, NodeSpec, Qcow2Spec,
};

/// An image in a file, as another one names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedImage {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// What is below it.
    pub below: Below,
}

/// What is below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Below {
    /// What its header names.
    #[default]
    AsNamed,
    /// Nothing, whatever its header names.
    Nothing,
    /// This one, whatever its header names.
    Image(Box<NamedImage>),
}

impl NamedImage {
    /// The image that a description tells of; `None`: that asks for more than images in files, or for anything unusual.
    pub(crate) fn described(spec: &NodeSpec) -> Option<Self> {
        if spec.node_name.is_some() || spec.common != CommonOptions::default() {
            return None;
        }
        let (path, format, below) = match &spec.driver {
            DriverSpec::File(file) | DriverSpec::HostDevice(file) => {
                let path = file.filename.clone();
                let usual = FileSpec {
                    filename: path.clone(),
                    named_by: file.named_by.clone(),
                    ..FileSpec::default()
                };
                (*file == usual).then_some((path, ImageFormat::Raw, Below::Nothing))?
            }
            DriverSpec::Raw {
                file,
                offset: None,
                size: None,
            } => (file_of(file)?, ImageFormat::Raw, Below::Nothing),
            DriverSpec::Qcow2(spec) => {
                let usual = Qcow2Spec {
                    backing: spec.backing.clone(),
                    ..Qcow2Spec::over(spec.file.clone())
                };
                let below = match &spec.backing {
                    BackingRef::FromImage => Below::AsNamed,
                    BackingRef::Nothing => Below::Nothing,
                    BackingRef::Node(node) => Below::Image(Box::new(inline(node)?)),
                };
                let path = file_of(&spec.file)?;
                (**spec == usual).then_some((path, ImageFormat::Qcow2, below))?
            }
            _ => return None,
        };
        Some(Self {
            path,
            format,
            below,
        })
    }
}

/// The image of a node that is opened with its parent. One that has a name is none of the image's business.
fn inline(node: &NodeRef) -> Option<NamedImage> {
    match node {
        NodeRef::Inline(spec) => NamedImage::described(spec),
        NodeRef::Name(_) => None,
    }
}

/// The file that holds an image, not something that is in an image itself.
fn file_of(node: &NodeRef) -> Option<PathBuf> {
    let held = inline(node)?;
    (held.format == ImageFormat::Raw).then_some(held.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(driver: DriverSpec) -> NodeSpec {
        NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver,
        }
    }

    fn below(driver: DriverSpec) -> NodeRef {
        NodeRef::Inline(Box::new(node(driver)))
    }

    fn file(name: &str) -> FileSpec {
        FileSpec {
            filename: PathBuf::from(name),
            ..FileSpec::default()
        }
    }

    fn raw(name: &str) -> DriverSpec {
        DriverSpec::Raw {
            file: below(DriverSpec::File(file(name))),
            offset: None,
            size: None,
        }
    }

    fn qcow2(holder: DriverSpec, change: impl FnOnce(&mut Qcow2Spec)) -> DriverSpec {
        let mut spec = Qcow2Spec::over(below(holder));
        change(&mut spec);
        DriverSpec::Qcow2(Box::new(spec))
    }

    #[test]
    fn images_in_files_are_named() {
        let top = qcow2(raw("top"), |spec| {
            spec.backing = BackingRef::Node(below(raw("base")));
        });
        let base = NamedImage {
            path: PathBuf::from("base"),
            format: ImageFormat::Raw,
            below: Below::Nothing,
        };
        let expected = NamedImage {
            path: PathBuf::from("top"),
            format: ImageFormat::Qcow2,
            below: Below::Image(Box::new(base)),
        };
        assert_eq!(NamedImage::described(&node(top)), Some(expected));
    }

    #[test]
    fn whatever_else_is_asked_for_is_none() {
        let plain = || DriverSpec::File(file("a"));
        let unlocked = FileSpec {
            locking: Some(crate::request::OnOffAuto::Off),
            ..file("a")
        };
        let window = DriverSpec::Raw {
            file: below(plain()),
            offset: Some(512),
            size: None,
        };
        let named = |spec: &mut Qcow2Spec| spec.file = NodeRef::Name("n".to_owned());
        let outside = |spec: &mut Qcow2Spec| spec.data_file = Some(below(plain()));
        for driver in [
            DriverSpec::NullCo(crate::request::NullSpec::default()),
            DriverSpec::File(unlocked),
            window,
            qcow2(plain(), named),
            qcow2(plain(), outside),
            qcow2(plain(), |spec| spec.lazy_refcounts = Some(true)),
            qcow2(qcow2(plain(), |_| ()), |_| ()),
        ] {
            let below_another = qcow2(plain(), |spec| {
                spec.backing = BackingRef::Node(below(driver.clone()));
            });
            assert_eq!(NamedImage::described(&node(driver)), None);
            assert_eq!(NamedImage::described(&node(below_another)), None);
        }
        let mut writable = node(plain());
        writable.common.read_only = Some(false);
        assert_eq!(NamedImage::described(&writable), None);
        let mut known = node(plain());
        known.node_name = Some("n".to_owned());
        assert_eq!(NamedImage::described(&known), None);
    }
}
