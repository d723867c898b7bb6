//! Small images of every kind that QEMU makes, and where their metadata is.

use blockyard_images::qcow2::layout::entries::{OFFSET_MASK, word_at};
use blockyard_images::qcow2::layout::fields::{u32_at, u64_at};
use blockyard_images::qcow2::layout::header::{Access, Header};

use crate::oracle::Oracle;

/// How an image is made: options of `create`, its size, and commands one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    pub(crate) options: &'static str,
    pub(crate) size: &'static str,
    pub(crate) steps: &'static [Step],
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// Commands of qemu-io.
    Io(&'static [&'static str]),
    /// An internal snapshot.
    Snapshot(&'static str),
    /// A bitmap.
    Bitmap(&'static str),
    /// All of it again as compressed clusters.
    Compress,
}

const WRITES: Step = Step::Io(&[
    "write -P 1 0 40k",
    "write -P 2 300k 70k",
    "write -z 128k 64k",
]);
const LATER: Step = Step::Io(&["write -P 3 8k 24k", "write -P 4 1M 12k", "discard 300k 32k"]);

/// Every cluster size, width of counts and feature appears in one of them.
pub(crate) const RECIPES: &[Recipe] = &[
    recipe("", "4M", &[WRITES]),
    recipe(
        "",
        "64M",
        &[
            WRITES,
            Step::Snapshot("one"),
            LATER,
            Step::Snapshot("two"),
            WRITES,
        ],
    ),
    recipe("compat=0.10", "4M", &[WRITES, Step::Snapshot("one"), LATER]),
    recipe("compat=0.10,cluster_size=512", "1500k", &[WRITES, LATER]),
    recipe(
        "cluster_size=512",
        "2M",
        &[WRITES, Step::Snapshot("one"), LATER],
    ),
    recipe("cluster_size=512,refcount_bits=64", "2M", &[WRITES, LATER]),
    recipe("cluster_size=1k,refcount_bits=1", "2M", &[WRITES, LATER]),
    recipe(
        "cluster_size=2k,refcount_bits=2",
        "2M",
        &[WRITES, Step::Snapshot("one"), LATER],
    ),
    recipe(
        "cluster_size=4k,refcount_bits=4",
        "4M",
        &[WRITES, Step::Snapshot("one"), LATER],
    ),
    recipe(
        "cluster_size=8k,refcount_bits=8",
        "4M",
        &[WRITES, Step::Snapshot("one"), LATER],
    ),
    recipe("cluster_size=16k,refcount_bits=32", "4M", &[WRITES, LATER]),
    recipe("cluster_size=32k,lazy_refcounts=on", "4M", &[WRITES, LATER]),
    recipe("cluster_size=256k", "4M", &[WRITES, LATER]),
    recipe("cluster_size=2M", "16M", &[WRITES, LATER]),
    recipe(
        "extended_l2=on,cluster_size=16k",
        "4M",
        &[WRITES, Step::Snapshot("one"), LATER],
    ),
    recipe("extended_l2=on", "64M", &[WRITES, LATER]),
    recipe("cluster_size=4k", "4M", &[WRITES, Step::Compress]),
    recipe(
        "",
        "4M",
        &[WRITES, Step::Compress, LATER, Step::Snapshot("one"), WRITES],
    ),
    recipe("data_file=data.raw", "4M", &[WRITES, LATER]),
    recipe(
        "data_file=data.raw,data_file_raw=on,extended_l2=on",
        "4M",
        &[WRITES],
    ),
    recipe(
        "cluster_size=4k",
        "4M",
        &[WRITES, Step::Bitmap("b0"), Step::Bitmap("b1"), LATER],
    ),
    recipe("preallocation=metadata,cluster_size=4k", "2M", &[WRITES]),
];

const fn recipe(options: &'static str, size: &'static str, steps: &'static [Step]) -> Recipe {
    Recipe {
        options,
        size,
        steps,
    }
}

/// Name of the file that images are made in.
pub(crate) const NAME: &str = "image.qcow2";

impl Recipe {
    /// Makes the image and returns its bytes.
    pub(crate) fn make(&self, oracle: &Oracle) -> Vec<u8> {
        let _ = std::fs::remove_file(oracle.path("data.raw"));
        self.create(oracle, NAME);
        for step in self.steps {
            match step {
                Step::Io(commands) => {
                    let mut arguments = vec!["-d", "unmap", "-f", "qcow2"];
                    for command in *commands {
                        arguments.extend(["-c", command]);
                    }
                    arguments.push(NAME);
                    let output = oracle.run("qemu-io", &arguments);
                    assert!(output.status.success(), "{self:?}: {output:?}");
                }
                Step::Snapshot(name) => {
                    oracle.qemu_img(&["snapshot", "-c", name, NAME]);
                }
                Step::Bitmap(name) => {
                    oracle.qemu_img(&["bitmap", "--add", "-g", "512", NAME, name]);
                }
                Step::Compress => {
                    let mut arguments = vec!["convert", "-c", "-f", "qcow2", "-O", "qcow2"];
                    if !self.options.is_empty() {
                        arguments.extend(["-o", self.options]);
                    }
                    arguments.extend([NAME, "compressed.qcow2"]);
                    oracle.qemu_img(&arguments);
                    std::fs::rename(oracle.path("compressed.qcow2"), oracle.path(NAME))
                        .expect("renamed");
                }
            }
        }
        oracle.read(NAME)
    }

    fn create(&self, oracle: &Oracle, name: &str) {
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !self.options.is_empty() {
            arguments.extend(["-o", self.options]);
        }
        arguments.extend([name, self.size]);
        oracle.qemu_img(&arguments);
    }
}

/// An image in memory, to be damaged.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
}

impl Image {
    pub(crate) fn header(&self) -> Header {
        Header::parse(&self.bytes, Access::Check).expect("sound")
    }

    pub(crate) fn word(&self, offset: usize) -> u64 {
        u64_at(&self.bytes, offset)
    }

    pub(crate) fn set_word(&mut self, offset: usize, word: u64) {
        self.bytes[offset..offset + 8].copy_from_slice(&word.to_be_bytes());
    }

    pub(crate) fn set_half(&mut self, offset: usize, half: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&half.to_be_bytes());
    }

    pub(crate) fn cluster_bytes(&self) -> usize {
        self.header().geometry.cluster_bytes() as usize
    }

    /// Where the active L1 table is.
    pub(crate) fn l1(&self) -> usize {
        self.header().l1_table.0 as usize
    }

    /// Where the L2 table of the first active L1 entry is.
    pub(crate) fn l2(&self) -> usize {
        (self.word(self.l1()) & OFFSET_MASK) as usize
    }

    pub(crate) fn refcount_table(&self) -> usize {
        self.header().refcount_table.0 as usize
    }

    /// Where the first refcount block is.
    pub(crate) fn refcount_block(&self) -> usize {
        (self.word(self.refcount_table()) & OFFSET_MASK) as usize
    }

    pub(crate) fn snapshots(&self) -> usize {
        self.header().snapshot_table.0 as usize
    }

    /// Where the metadata is: offset and length of each table, clipped to the file.
    pub(crate) fn tables(&self) -> Vec<(usize, usize)> {
        let header = self.header();
        let cluster = self.cluster_bytes();
        let mut tables = vec![(0, 112)];
        let l1_bytes = (header.l1_entries as usize * 8).min(64 * 8);
        tables.push((self.l1(), l1_bytes));
        let mut l1_tables = vec![(self.l1(), l1_bytes)];
        if header.snapshots > 0 {
            tables.push((self.snapshots(), 160));
            let l1 = self.word(self.snapshots()) as usize;
            let entries = u32_at(&self.bytes, self.snapshots() + 8) as usize;
            l1_tables.push((l1, (entries * 8).min(64 * 8)));
        }
        for (l1, bytes) in l1_tables {
            tables.push((l1, bytes));
            for index in 0..bytes / 8 {
                let l2 = self.word(l1 + index * 8) & OFFSET_MASK;
                if l2 != 0 {
                    tables.push((l2 as usize, cluster.min(2048)));
                }
            }
        }
        tables.push((self.refcount_table(), 32.min(cluster)));
        for index in 0..4 {
            let block = word_at(&self.bytes, self.refcount_table() / 8 + index).unwrap_or(0);
            if block != 0 {
                tables.push((block as usize, cluster.min(256)));
            }
        }
        if let Some(bitmaps) = header.extensions.bitmaps {
            let directory = bitmaps.directory.0 as usize;
            tables.push((directory, bitmaps.directory_bytes as usize));
            tables.push((self.word(directory) as usize, 8));
        }
        let length = self.bytes.len();
        tables.retain(|(offset, bytes)| offset + bytes <= length);
        tables
    }
}
