//! [`recount`]: counts every reference of an image anew, knowing nothing of the code under test but the layout.

use std::collections::BTreeMap;

use blockyard_images::qcow2::layout::entries::{
    COMPRESSED, COPIED, CompressedAt, L1Entry, L2Entry, OFFSET_MASK, l2_entry_at, word_at,
};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, refcount_at};
use blockyard_images::qcow2::units::{Geometry, HostOffset};

/// What is wrong with an image.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// As sentences.
    pub(crate) corruptions: Vec<String>,
    /// Clusters with too many references.
    pub(crate) leaks: Vec<u64>,
}

/// The kinds of things that refer to a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Metadata,
    Data,
    Compressed,
}

struct Recount<'a> {
    file: &'a [u8],
    geometry: Geometry,
    has_data_file: bool,
    shares: bool,
    /// The refcount block that was looked at last, and its index.
    block: Option<(u64, Vec<u8>)>,
    references: BTreeMap<u64, (u64, Kind)>,
    /// Clusters that an entry in use says it has alone.
    alone: Vec<(u64, bool)>,
    findings: Findings,
}

/// A big-endian word of the file; zero behind its end.
fn word(file: &[u8], offset: u64) -> u64 {
    match file.get(offset as usize..) {
        Some(rest) => word_at(rest, 0).unwrap_or(0),
        None => 0,
    }
}

/// `length` bytes from `offset`, zeroes behind the end of the file.
pub(crate) fn bytes(file: &[u8], offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    let end = (offset + length).min(file.len() as u64);
    if offset < end {
        let held = &file[offset as usize..end as usize];
        bytes[..held.len()].copy_from_slice(held);
    }
    bytes
}

/// First bytes and lengths of the L1 tables of internal snapshots.
pub(crate) fn snapshot_tables(file: &[u8], header: &Header) -> Vec<(u64, u64)> {
    let mut at = header.snapshot_table.0;
    let mut tables = Vec::new();
    for _ in 0..header.snapshots {
        let head = bytes(file, at, 40);
        let word32 = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four"));
        let word16 = |at: usize| u16::from_be_bytes(head[at..at + 2].try_into().expect("two"));
        tables.push((word_at(&head, 0).expect("there"), u64::from(word32(8))));
        let length = 40 + word32(36) as u64 + u64::from(word16(12)) + u64::from(word16(14));
        at += length.next_multiple_of(8);
    }
    tables
}

/// Counts every reference of the image in `file`.
pub(crate) fn recount(file: &[u8]) -> Findings {
    let header = Header::parse(file, Access::Check).expect("an image");
    let mut recount = Recount {
        file,
        geometry: header.geometry,
        has_data_file: header.has_data_file(),
        shares: header.snapshots > 0,
        block: None,
        references: BTreeMap::new(),
        alone: Vec::new(),
        findings: Findings::default(),
    };
    let cluster_bytes = header.geometry.cluster_bytes();
    recount.add(0, cluster_bytes, Kind::Metadata);
    recount.add_l1(header.l1_table.0, u64::from(header.l1_entries), true);
    let mut snapshots_end = header.snapshot_table.0;
    for (at, entries) in snapshot_tables(file, &header) {
        recount.add_l1(at, entries, false);
        snapshots_end += 64;
    }
    if header.snapshots > 0 {
        let table = header.snapshot_table.0;
        recount.add(table, snapshots_end - table, Kind::Metadata);
    }
    let table_bytes = header.refcount_table_bytes();
    recount.add(header.refcount_table.0, table_bytes, Kind::Metadata);
    for index in 0..table_bytes / 8 {
        let at = word(file, header.refcount_table.0 + index * 8) & TABLE_OFFSET_MASK;
        if at != 0 {
            recount.aligned(at, "refcount block");
            recount.add(at, cluster_bytes, Kind::Metadata);
        }
    }
    recount.compare(&header);
    recount.findings
}

impl Recount<'_> {
    fn wrong(&mut self, text: String) {
        self.findings.corruptions.push(text);
    }

    fn aligned(&mut self, at: u64, what: &str) {
        if !self.geometry.is_cluster_start(HostOffset(at)) {
            self.wrong(format!("{what} at {at:#x} is not aligned"));
        }
    }

    fn add(&mut self, at: u64, length: u64, kind: Kind) {
        if length == 0 {
            return;
        }
        let bits = self.geometry.cluster_bits();
        for cluster in at >> bits..=(at + length - 1) >> bits {
            let (count, other) = *self.references.get(&cluster).unwrap_or(&(0, kind));
            let shared = kind != Kind::Compressed && count > 0;
            if other != kind || shared && !self.shares {
                self.wrong(format!("cluster {cluster} is {other:?} and {kind:?}"));
            }
            self.references.insert(cluster, (count + 1, kind));
        }
    }

    fn add_l1(&mut self, at: u64, entries: u64, active: bool) {
        self.add(at, entries * 8, Kind::Metadata);
        for index in 0..entries {
            let entry = L1Entry(word(self.file, at + index * 8));
            let Some(table) = entry.table() else {
                continue;
            };
            self.aligned(table.0, "L2 table");
            self.add(table.0, self.geometry.cluster_bytes(), Kind::Metadata);
            if active {
                self.alone.push((table.0, entry.is_copied()));
            }
            let slice = bytes(self.file, table.0, self.geometry.cluster_bytes());
            for index in 0..self.geometry.l2_entries() as usize {
                let entry = l2_entry_at(&self.geometry, &slice, index).expect("in the table");
                self.add_l2_entry(&entry, active);
            }
        }
    }

    fn add_l2_entry(&mut self, entry: &L2Entry, active: bool) {
        if entry.is_invalid(&self.geometry) {
            self.wrong(format!("invalid entry {entry:x?}"));
        }
        if entry.word & COMPRESSED != 0 {
            let place = CompressedAt::decode(&self.geometry, entry.word);
            if entry.word & COPIED != 0 {
                self.wrong(format!("compressed and alone: {entry:x?}"));
            }
            self.add(place.at.0, place.length_bytes, Kind::Compressed);
            return;
        }
        let at = entry.word & OFFSET_MASK;
        if at == 0 || self.has_data_file {
            return;
        }
        self.aligned(at, "data");
        if at >= self.file.len() as u64 {
            self.wrong(format!("cluster at {at:#x} is behind the end of the file"));
        }
        self.add(at, self.geometry.cluster_bytes(), Kind::Data);
        if active {
            self.alone.push((at, entry.is_copied()));
        }
    }

    fn stored(&mut self, header: &Header, cluster: u64) -> u64 {
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        if self.block.as_ref().is_none_or(|(held, _)| *held != index) {
            let at = match index * 8 < header.refcount_table_bytes() {
                true => word(self.file, header.refcount_table.0 + index * 8) & TABLE_OFFSET_MASK,
                false => 0,
            };
            let block = match at {
                0 => vec![0; self.geometry.cluster_bytes() as usize],
                at => bytes(self.file, at, self.geometry.cluster_bytes()),
            };
            self.block = Some((index, block));
        }
        let (_, block) = self.block.as_ref().expect("put there");
        refcount_at(&self.geometry, block, (cluster % per_block) as usize).expect("in the block")
    }

    fn compare(&mut self, header: &Header) {
        let last = self.references.keys().next_back().copied().unwrap_or(0);
        let clusters = (self.file.len() as u64) >> self.geometry.cluster_bits();
        for cluster in 0..=last.max(clusters + 1) {
            let counted = self.references.get(&cluster).map_or(0, |(count, _)| *count);
            let stored = self.stored(header, cluster);
            if stored < counted {
                self.wrong(format!(
                    "cluster {cluster} has {counted} references and a count of {stored}"
                ));
            } else if stored > counted {
                self.findings.leaks.push(cluster);
            }
        }
        for (at, alone) in std::mem::take(&mut self.alone) {
            let count = self.stored(header, at >> self.geometry.cluster_bits());
            if alone != (count == 1) {
                self.wrong(format!("{at:#x}: alone is {alone}, its count is {count}"));
            }
        }
    }
}
