//! Options of a new image, written `name=value,name=value` as for `qemu-img create -o`.

use std::path::PathBuf;

use blockyard_engine::request::{CreatePreallocation, CreateQcow2Spec, NodeRef};
use clap::ValueEnum;

use crate::keyval;
use crate::size;
use crate::terminal::check::arguments::Format;

/// What `-o help` prints for each format.
const RAW_HELP: &str = "\
Options of raw images:
  size=<size>               Length of the disk
  preallocation=<mode>      Reserve room: off, falloc, full
  nocow=<on/off>            Switch copy-on-write of the file system off for the file
  extent_size_hint=<size>   Hint for the file system's extents; 0: leave";

const QCOW2_HELP: &str = "\
Options of qcow2 images:
  size=<size>               Length of the disk
  backing_file=<name>       Image that holds what this one does not
  backing_fmt=<format>      Format of that image
  cluster_size=<size>       Unit of allocation, from 512 to 2M
  compat=<0.10/1.1>         Version of the format, also written v2 and v3
  compression_type=<type>   Compression of compressed clusters: zlib, zstd
  data_file=<name>          File for the data, outside of the image
  data_file_raw=<on/off>    That file reads as the disk does
  extended_l2=<on/off>      Tell 32 subclusters of each cluster apart
  lazy_refcounts=<on/off>   Let reference counts be written late
  preallocation=<mode>      Reserve room: off, metadata, falloc, full
  refcount_bits=<number>    Width of a reference count: 1, 2, 4, 8, 16, 32, 64
  nocow=<on/off>            Switch copy-on-write of the file system off for the file
  extent_size_hint=<size>   Hint for the file system's extents; 0: leave";

/// Ways to reserve room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PreallocationArgument {
    Off,
    Metadata,
    Falloc,
    Full,
}

impl From<PreallocationArgument> for CreatePreallocation {
    fn from(argument: PreallocationArgument) -> Self {
        match argument {
            PreallocationArgument::Off => CreatePreallocation::Off,
            PreallocationArgument::Metadata => CreatePreallocation::Metadata,
            PreallocationArgument::Falloc => CreatePreallocation::Falloc,
            PreallocationArgument::Full => CreatePreallocation::Full,
        }
    }
}

/// The options of a new image; what was not given is `None` or off.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ImageOptions {
    pub(crate) size_bytes: Option<u64>,
    pub(crate) backing_file: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) version_2: bool,
    pub(crate) zstd: bool,
    pub(crate) data_file: Option<PathBuf>,
    pub(crate) data_file_raw: bool,
    pub(crate) extended_l2: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) preallocation: Option<CreatePreallocation>,
    pub(crate) refcount_bits: Option<i64>,
    pub(crate) nocow: bool,
    pub(crate) extent_size_hint: Option<u64>,
}

impl ImageOptions {
    /// Reads options for an image of a format; later ones count.
    ///
    /// # Errors
    /// In QEMU's words where it has some.
    pub(crate) fn read(texts: &[String], format: Format) -> Result<Self, String> {
        let mut options = Self::default();
        for text in texts {
            for part in keyval::parts(text) {
                let (name, value) = keyval::pair(&part).map_err(|error| error.to_string())?;
                options.set(&name, value, format)?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: String, format: Format) -> Result<(), String> {
        match name {
            "size" => self.size_bytes = Some(size_of(name, &value)?),
            "preallocation" => self.preallocation = Some(preallocation(&value)?),
            "nocow" => self.nocow = switch(name, &value)?,
            "extent_size_hint" => self.extent_size_hint = Some(size_of(name, &value)?),
            _ if format == Format::Raw => return Err(format!("Invalid parameter '{name}'")),
            "backing_file" => self.backing_file = Some(value),
            "backing_fmt" => self.backing_format = Some(value),
            "cluster_size" => self.cluster_size = Some(size_of(name, &value)?),
            "compat" => {
                self.version_2 = match value.as_str() {
                    "0.10" | "v2" => true,
                    "1.1" | "v3" => false,
                    _ => return Err(not_accepted(name, &value)),
                }
            }
            "compression_type" => {
                self.zstd = match value.as_str() {
                    "zlib" => false,
                    "zstd" => true,
                    _ => return Err(not_accepted(name, &value)),
                }
            }
            "data_file" => self.data_file = Some(value.into()),
            "data_file_raw" => self.data_file_raw = switch(name, &value)?,
            "extended_l2" => self.extended_l2 = switch(name, &value)?,
            "lazy_refcounts" => self.lazy_refcounts = switch(name, &value)?,
            "refcount_bits" => {
                let bits = value.parse();
                let text = format!("Parameter '{name}' expects a number");
                self.refcount_bits = Some(bits.map_err(|_| text)?);
            }
            "encryption" => {
                if switch(name, &value)? {
                    return Err(NO_ENCRYPTION.to_owned());
                }
            }
            _ if name.starts_with("encrypt.") => return Err(NO_ENCRYPTION.to_owned()),
            _ => return Err(format!("Invalid parameter '{name}'")),
        }
        Ok(())
    }

    /// A qcow2 image of these options on the node `file`, for a disk of so many bytes. Its data file, if it has one, is on
    /// the node of that name.
    pub(crate) fn qcow2_spec(&self, file: String, size_bytes: u64) -> CreateQcow2Spec {
        CreateQcow2Spec {
            file: NodeRef::Name(file),
            data_file: self
                .data_file
                .as_ref()
                .map(|_| NodeRef::Name(DATA_FILE_NODE.to_owned())),
            data_file_raw: self.data_file_raw,
            extended_l2: self.extended_l2,
            size: size_bytes,
            version_2: self.version_2,
            backing_file: self.backing_file.clone(),
            backing_fmt: self.backing_format.clone(),
            encrypt: None,
            cluster_size: self.cluster_size,
            preallocation: self.preallocation,
            lazy_refcounts: self.lazy_refcounts,
            refcount_bits: self.refcount_bits,
            zstd: self.zstd,
        }
    }
}

/// Name of the node with a data file.
pub(crate) const DATA_FILE_NODE: &str = "data-file";

const NO_ENCRYPTION: &str = "Encrypted qcow2 images cannot be made here";

/// What the options of a format are.
pub(crate) const fn help(format: Format) -> &'static str {
    match format {
        Format::Raw => RAW_HELP,
        Format::Qcow2 => QCOW2_HELP,
    }
}

/// A number of bytes as an argument.
///
/// # Errors
/// What is expected.
pub(crate) fn byte_count(text: &str) -> Result<u64, String> {
    size::parse(text).ok_or_else(|| format!("expected {}", size::EXPECTED))
}

fn size_of(name: &str, value: &str) -> Result<u64, String> {
    size::parse(value).ok_or_else(|| {
        format!(
            "Parameter '{name}' expects a non-negative number below 2^64; expected {}",
            size::EXPECTED
        )
    })
}

fn switch(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
    }
}

fn preallocation(value: &str) -> Result<CreatePreallocation, String> {
    let mode = PreallocationArgument::from_str(value, false);
    mode.map(Into::into)
        .map_err(|_| not_accepted("preallocation", value))
}

fn not_accepted(name: &str, value: &str) -> String {
    format!("Parameter '{name}' does not accept value '{value}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str], format: Format) -> Result<ImageOptions, String> {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        ImageOptions::read(&texts, format)
    }

    #[test]
    fn options_add_up_and_the_last_counts() {
        let options = read(
            &[
                "cluster_size=4k,compat=0.10",
                "backing_file=a,,b,cluster_size=2M,preallocation=full",
            ],
            Format::Qcow2,
        );
        let expected = ImageOptions {
            cluster_size: Some(2 << 20),
            version_2: true,
            backing_file: Some("a,b".to_owned()),
            preallocation: Some(CreatePreallocation::Full),
            ..ImageOptions::default()
        };
        assert_eq!(options, Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_said_as_qemu_says_it() {
        for (text, expected) in [
            ("foo=1", "Invalid parameter 'foo'"),
            (
                "preallocation=foo",
                "Parameter 'preallocation' does not accept value 'foo'",
            ),
            ("compat=2", "Parameter 'compat' does not accept value '2'"),
            (
                "lazy_refcounts=maybe",
                "Parameter 'lazy_refcounts' expects 'on' or 'off'",
            ),
            (
                "refcount_bits=x",
                "Parameter 'refcount_bits' expects a number",
            ),
            ("encrypt.format=luks", NO_ENCRYPTION),
            ("size", "Expected '=' after parameter 'size'"),
        ] {
            assert_eq!(read(&[text], Format::Qcow2), Err(expected.to_owned()));
        }
        let raw = read(&["cluster_size=4k"], Format::Raw);
        assert_eq!(raw, Err("Invalid parameter 'cluster_size'".to_owned()));
        assert!(
            read(&["size=x"], Format::Raw)
                .expect_err("no size")
                .starts_with("Parameter 'size' expects a non-negative number below 2^64")
        );
    }
}
