//! Damaged images by the hundred, without QEMU or us having to know how: every number that opening looks at, replaced by others.
//! Used by the tests and, with its path, by the benches.

/// What makes the image `sound`: programs and their arguments.
pub(crate) const MAKING: [(&str, &[&str]); 6] = [
    (
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            "sound",
            "1M",
        ],
    ),
    (
        "qemu-io",
        &["-f", "qcow2", "-c", "write -q -P 7 0 64k", "sound"],
    ),
    ("qemu-img", &["snapshot", "-c", "one", "sound"]),
    ("qemu-img", &["snapshot", "-c", "two", "sound"]),
    ("qemu-img", &["bitmap", "--add", "sound", "one"]),
    ("qemu-img", &["bitmap", "--add", "sound", "two"]),
];

/// An image with snapshots and bitmaps, and everything in it that opening looks at.
pub(crate) struct Sound {
    bytes: Vec<u8>,
    fields: Vec<Field>,
}

/// A number in an image.
#[derive(Clone, Copy)]
struct Field {
    name: &'static str,
    at: usize,
    width: usize,
}

/// One damaged image.
pub(crate) struct Damaged {
    /// What was done to it.
    pub(crate) what: String,
    /// All of it.
    pub(crate) bytes: Vec<u8>,
}

impl Sound {
    /// One that [`MAKING`] has made.
    ///
    /// Spec: qcow2, "Header", "Snapshots", "Bitmaps".
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let mut sound = Self {
            bytes,
            fields: Vec::new(),
        };
        // The first extension is that of the bitmaps: clusters are too small for one with the names of features.
        let extension = 112;
        let (l1, refcounts) = (sound.place(40), sound.place(48));
        let (snapshot, bitmap) = (sound.place(64), sound.place(extension + 24));
        sound.fields = [
            ("magic", 0, 4),
            ("version", 4, 4),
            ("backing name", 8, 8),
            ("length of the backing name", 16, 4),
            ("cluster bits", 20, 4),
            ("size", 24, 8),
            ("encryption", 32, 4),
            ("entries of the L1 table", 36, 4),
            ("L1 table", 40, 8),
            ("refcount table", 48, 8),
            ("clusters of the refcount table", 56, 4),
            ("snapshots", 60, 4),
            ("snapshot table", 64, 8),
            ("incompatible features", 72, 8),
            ("compatible features", 80, 8),
            ("autoclear features", 88, 8),
            ("refcount order", 96, 4),
            ("header length", 100, 4),
            ("compression", 104, 1),
            ("extension", extension, 4),
            ("length of the extension", extension + 4, 4),
            ("bitmaps", extension + 8, 4),
            ("reserved", extension + 12, 4),
            ("bytes of the bitmap directory", extension + 16, 8),
            ("bitmap directory", extension + 24, 8),
            ("first L1 entry", l1, 8),
            ("first refcount table entry", refcounts, 8),
            ("L1 table of a snapshot", snapshot, 8),
            ("L1 entries of a snapshot", snapshot + 8, 4),
            ("length of a snapshot's id", snapshot + 12, 2),
            ("length of a snapshot's name", snapshot + 14, 2),
            ("extra data of a snapshot", snapshot + 36, 4),
            ("table of a bitmap", bitmap, 8),
            ("entries of a bitmap's table", bitmap + 8, 4),
            ("flags of a bitmap", bitmap + 12, 4),
            ("type of a bitmap", bitmap + 16, 1),
            ("granularity of a bitmap", bitmap + 17, 1),
            ("length of a bitmap's name", bitmap + 18, 2),
            ("extra data of a bitmap", bitmap + 20, 4),
        ]
        .map(|(name, at, width)| Field { name, at, width })
        .to_vec();
        sound
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn number(&self, at: usize, width: usize) -> u64 {
        let bytes = self.bytes[at..at + width].iter();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn place(&self, at: usize) -> usize {
        usize::try_from(self.number(at, 8)).expect("small")
    }

    /// The image with one number in each place replaced by others, and cut off at several lengths.
    pub(crate) fn damaged(&self) -> Vec<Damaged> {
        let mut all = Vec::new();
        for Field { name, at, width } in &self.fields {
            let was = self.number(*at, *width);
            let most = u64::MAX >> (64 - 8 * width);
            // Nothing, one more, half of what there can be, very much, all there can be, and for places the end of the file.
            let mut others = vec![
                0,
                was.wrapping_add(1),
                1 << (8 * width - 1),
                1 << (7 * width),
                most,
            ];
            others.push(self.bytes.len() as u64);
            others.retain(|other| *other != was && *other <= most);
            others.sort_unstable();
            others.dedup();
            for other in others {
                let mut bytes = self.bytes.clone();
                bytes[*at..at + width].copy_from_slice(&other.to_be_bytes()[8 - width..]);
                let what = format!("{name} {other:#x} instead of {was:#x}");
                all.push(Damaged { what, bytes });
            }
        }
        for length in [0, 3, 71, 104, 112, 511, 4096, self.bytes.len() / 2] {
            all.push(Damaged {
                what: format!("only the first {length} bytes"),
                bytes: self.bytes[..length].to_vec(),
            });
        }
        all
    }
}
