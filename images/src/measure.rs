//! How much room an image will need, before it is made: the figures of `qemu-img measure`.

use blockyard_storage::ByteRange;

use crate::error::ImageError;
use crate::qcow2::bitmaps::{BitmapSize, clusters_at_most};
use crate::qcow2::create::{CreateOptions, CreatePlan, ImagePreallocation, Placement};
use crate::qcow2::layout::header::L1_TABLE_BYTES_MAX;
use crate::qcow2::units::{Geometry, Version};

/// Lengths of disks are whole sectors.
const SECTOR_BYTES: u64 = 512;

/// How much room an image needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measure {
    /// For what the source holds, in bytes.
    pub required_bytes: u64,
    /// When every byte of the disk has been written, in bytes.
    pub fully_allocated_bytes: u64,
    /// For copies of the source's bitmaps, in bytes; `None` where source or image cannot have any.
    pub bitmaps_bytes: Option<u64>,
}

/// A raw image of `size_bytes`.
pub fn raw(size_bytes: u64) -> Measure {
    let bytes = whole_sectors(size_bytes);
    Measure {
        required_bytes: bytes,
        fully_allocated_bytes: bytes,
        bitmaps_bytes: None,
    }
}

/// Measures a qcow2 image while its source is looked through.
#[derive(Clone, Debug)]
pub struct Qcow2Measure {
    geometry: Geometry,
    fully_allocated_bytes: u64,
    /// What the guest's clusters take when all are there.
    all_data_bytes: u64,
    /// All of it is needed, whatever the source holds.
    takes_all: bool,
    data_bytes: u64,
    /// Everything before is counted; the start of a cluster.
    counted_to: u64,
    bitmaps_bytes: Option<u64>,
}

impl Qcow2Measure {
    /// An image of this kind for a disk of so many bytes, of which nothing is written.
    ///
    /// # Errors
    /// [`ImageError::Refused`] as `qemu-img measure` says it.
    pub fn of_size(options: &CreateOptions) -> Result<Self, ImageError> {
        Self::new(options, options.preallocation >= ImagePreallocation::Falloc)
    }

    /// An image of this kind that takes what a source of that size holds: tell it by [`data`](Self::data) and
    /// [`bitmaps`](Self::bitmaps). With a backing file below it anything may have to be written.
    ///
    /// # Errors
    /// As [`of_size`](Self::of_size).
    pub fn of_source(options: &CreateOptions) -> Result<Self, ImageError> {
        let reserves = options.preallocation >= ImagePreallocation::Falloc;
        Self::new(options, reserves || options.backing_name.is_some())
    }

    fn new(options: &CreateOptions, takes_all: bool) -> Result<Self, ImageError> {
        let size_bytes = whole_sectors(options.size_bytes);
        let options = CreateOptions {
            size_bytes,
            // A source may be measured for an image that cannot be made in one go.
            preallocation: ImagePreallocation::Off,
            ..options.clone()
        };
        let geometry = options.check()?;
        let l1_entries = geometry.l1_entries_for(size_bytes);
        if l1_entries > L1_TABLE_BYTES_MAX / 8 || size_bytes > i64::MAX as u64 {
            return Err(ImageError::refused(
                "The image size is too large (try using a larger cluster size)",
            ));
        }
        let everything = Placement::InImage {
            whole_clusters: true,
        };
        let plan = CreatePlan::without_limits(geometry, size_bytes, everything);
        let in_bytes = |clusters: u64| clusters.saturating_mul(geometry.cluster_bytes());
        Ok(Self {
            geometry,
            fully_allocated_bytes: in_bytes(plan.used_clusters().0),
            all_data_bytes: in_bytes(geometry.clusters_for(size_bytes).0),
            takes_all,
            data_bytes: 0,
            counted_to: 0,
            bitmaps_bytes: None,
        })
    }

    /// The source holds data here that will be written. Ranges come in ascending order.
    pub fn data(&mut self, range: ByteRange) {
        let rest = ByteRange::between(range.offset().max(self.counted_to), range.end());
        if rest.is_empty() {
            return;
        }
        let clusters = rest.align_outward(self.geometry.cluster_bytes());
        self.data_bytes = self.data_bytes.saturating_add(clusters.length());
        self.counted_to = clusters.end();
    }

    /// The source has these bitmaps, or could have some.
    pub fn bitmaps(&mut self, size_bytes: u64, bitmaps: impl IntoIterator<Item = BitmapSize>) {
        if self.geometry.version() == Version::V2 {
            return;
        }
        let total = clusters_at_most(&self.geometry, size_bytes, bitmaps).0;
        self.bitmaps_bytes = Some(total.saturating_mul(self.geometry.cluster_bytes()));
    }

    /// The figures.
    pub fn finish(&self) -> Measure {
        let data_bytes = match self.takes_all {
            true => self.all_data_bytes,
            false => self.data_bytes,
        };
        let metadata_bytes = self.fully_allocated_bytes - self.all_data_bytes;
        Measure {
            required_bytes: metadata_bytes.saturating_add(data_bytes),
            fully_allocated_bytes: self.fully_allocated_bytes,
            bitmaps_bytes: self.bitmaps_bytes,
        }
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(SECTOR_BYTES)
        .unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `qemu-img measure` 10.0 said: changed options, length of the disk, required, fully allocated.
    #[test]
    fn the_figures_of_qemu_img_for_a_size() {
        type Change = fn(&mut CreateOptions);
        const CASES: [(Change, u64, u64, u64); 9] = [
            (|_| {}, 0, 196_608, 196_608),
            (|_| {}, 1000, 327_680, 393_216),
            (|_| {}, 1 << 30, 393_216, 1_074_135_040),
            (
                |o| o.preallocation = ImagePreallocation::Metadata,
                1 << 30,
                393_216,
                1_074_135_040,
            ),
            (
                |o| o.preallocation = ImagePreallocation::Falloc,
                1 << 30,
                1_074_135_040,
                1_074_135_040,
            ),
            (
                |o| {
                    o.cluster_bytes = 512;
                    o.refcount_bits = 64;
                },
                1 << 30,
                34_629_120,
                1_108_370_944,
            ),
            (|o| o.extended_l2 = true, 1_000_000, 327_680, 1_376_256),
            (
                |o| o.data_file_name = Some(b"foo".to_vec()),
                1 << 30,
                393_216,
                1_074_135_040,
            ),
            (
                |o| o.backing_name = Some(b"x".to_vec()),
                1 << 30,
                393_216,
                1_074_135_040,
            ),
        ];
        for (change, size, required_bytes, fully_allocated_bytes) in CASES {
            let mut options = CreateOptions::new(size);
            change(&mut options);
            let measure = Qcow2Measure::of_size(&options).expect("possible").finish();
            let expected = Measure {
                required_bytes,
                fully_allocated_bytes,
                bitmaps_bytes: None,
            };
            assert_eq!(measure, expected, "{options:?}");
        }
        let mut options = CreateOptions::new(1 << 40);
        options.cluster_bytes = 512;
        let error = Qcow2Measure::of_size(&options).expect_err("too large");
        let text = "The image size is too large (try using a larger cluster size)";
        assert_eq!(error.to_string(), text);
        assert_eq!(raw(1000).required_bytes, 1024);
    }

    #[test]
    fn clusters_of_a_source_count_once() {
        // What qemu-img said of a file of 10 MiB with three extents.
        let extents = [
            ByteRange::new(0, 4096),
            ByteRange::new(1 << 20, 4096),
            ByteRange::new(5000 << 10, 1 << 20),
        ];
        for (cluster_bytes, required_bytes) in [(65_536, 1_572_864), (512, 1_266_688)] {
            let mut options = CreateOptions::new(10 << 20);
            options.cluster_bytes = cluster_bytes;
            let mut measure = Qcow2Measure::of_source(&options).expect("possible");
            for extent in extents {
                measure.data(extent);
                measure.data(extent);
            }
            assert_eq!(measure.finish().required_bytes, required_bytes);
            options.backing_name = Some(b"x".to_vec());
            let below = Qcow2Measure::of_source(&options)
                .expect("possible")
                .finish();
            assert_eq!(below.required_bytes, below.fully_allocated_bytes);
        }
    }

    #[test]
    fn bitmaps_take_data_tables_and_a_directory() {
        let size = 10 << 20;
        let bitmap = |granularity_bytes| BitmapSize {
            granularity_bytes,
            name_bytes: 2,
        };
        for (cluster_bytes, expected) in [(65_536, 327_680), (512, 4608)] {
            let mut options = CreateOptions::new(size);
            options.cluster_bytes = cluster_bytes;
            let mut measure = Qcow2Measure::of_source(&options).expect("possible");
            measure.bitmaps(size, [bitmap(65_536), bitmap(512)]);
            assert_eq!(measure.finish().bitmaps_bytes, Some(expected));
            measure.bitmaps(size, []);
            assert_eq!(measure.finish().bitmaps_bytes, Some(0));
            options.version = Version::V2;
            let mut measure = Qcow2Measure::of_source(&options).expect("possible");
            measure.bitmaps(size, [bitmap(512)]);
            assert_eq!(measure.finish().bitmaps_bytes, None);
        }
    }
}
