//! [`FreshTables`]: tables that have a place in the file but were not written as a whole yet. Nothing on the medium leads to
//! them, so they may be written before everything else.

use std::collections::BTreeMap;

use crate::qcow2::units::HostOffset;

/// Which table a fresh one is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TableKind {
    /// An L2 table.
    L2,
    /// A refcount block.
    RefcountBlock,
}

/// Where the bytes of a slice come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SliceSource {
    /// It stands in the file at its own place.
    File,
    /// It is new and empty.
    Zeroes,
    /// It is new and begins as a copy of what stands here.
    Copy(HostOffset),
}

/// Tables that were not written yet.
#[derive(Default)]
pub(super) struct FreshTables(BTreeMap<u64, FreshTable>);

struct FreshTable {
    kind: TableKind,
    origin: Option<HostOffset>,
    slice_bytes: u64,
    /// Slices that have been in the cache, and are there until the table has been written.
    loaded: Vec<bool>,
}

/// What of a fresh table is in no cache.
pub(super) struct FreshPart {
    /// First byte.
    pub(super) at: HostOffset,
    /// Length in bytes.
    pub(super) length_bytes: u64,
    /// What it begins as a copy of; `None`: zeroes.
    pub(super) origin: Option<HostOffset>,
}

impl FreshTables {
    /// A table of `table_bytes` is going to stand at `at`, empty or a copy of another.
    pub(super) fn add(
        &mut self,
        at: HostOffset,
        kind: TableKind,
        origin: Option<HostOffset>,
        table_bytes: u64,
        slice_bytes: usize,
    ) {
        let slice_bytes = (slice_bytes as u64).max(1);
        let slices = usize::try_from(table_bytes / slice_bytes).unwrap_or(0);
        let table = FreshTable {
            kind,
            origin,
            slice_bytes,
            loaded: vec![false; slices],
        };
        self.0.insert(at.0, table);
    }

    /// Where the slice at `at`, of the table at `table`, is to be read from.
    pub(super) fn source(&self, table: HostOffset, at: HostOffset) -> SliceSource {
        let Some(fresh) = self.0.get(&table.0) else {
            return SliceSource::File;
        };
        match fresh.origin {
            Some(origin) => SliceSource::Copy(origin.plus(at.0.saturating_sub(table.0))),
            None => SliceSource::Zeroes,
        }
    }

    /// The slice at `at` is in the cache from now on.
    pub(super) fn loaded(&mut self, table: HostOffset, at: HostOffset) {
        let Some(fresh) = self.0.get_mut(&table.0) else {
            return;
        };
        let index = at.0.saturating_sub(table.0) / fresh.slice_bytes;
        let slice = usize::try_from(index).ok();
        if let Some(loaded) = slice.and_then(|index| fresh.loaded.get_mut(index)) {
            *loaded = true;
        }
    }

    /// Whether the table at `table` is one of them.
    pub(super) fn contains(&self, table: HostOffset) -> bool {
        self.0.contains_key(&table.0)
    }

    /// What the table at `table` begins as a copy of.
    pub(super) fn origin(&self, table: HostOffset) -> Option<HostOffset> {
        self.0.get(&table.0)?.origin
    }

    /// Where those of a kind are.
    pub(super) fn places(&self, kind: TableKind) -> Vec<HostOffset> {
        let tables = self.0.iter().filter(|(_, table)| table.kind == kind);
        tables.map(|(at, _)| HostOffset(*at)).collect()
    }

    /// What of a table is in no cache, neighbours together.
    pub(super) fn parts(&self, table: HostOffset) -> Vec<FreshPart> {
        let Some(fresh) = self.0.get(&table.0) else {
            return Vec::new();
        };
        let mut parts: Vec<FreshPart> = Vec::new();
        let missing = fresh
            .loaded
            .iter()
            .enumerate()
            .filter(|(_, loaded)| !**loaded);
        for (index, _) in missing {
            let skip = index as u64 * fresh.slice_bytes;
            let at = table.plus(skip);
            match parts.last_mut() {
                Some(last) if last.at.plus(last.length_bytes) == at => {
                    last.length_bytes += fresh.slice_bytes;
                }
                _ => parts.push(FreshPart {
                    at,
                    length_bytes: fresh.slice_bytes,
                    origin: fresh.origin.map(|origin| origin.plus(skip)),
                }),
            }
        }
        parts
    }

    /// A table stands in the file as a whole, or is not wanted any more.
    pub(super) fn remove(&mut self, table: HostOffset) {
        self.0.remove(&table.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_loaded_is_named_with_its_origin() {
        let mut tables = FreshTables::default();
        let (at, origin) = (HostOffset(0x40000), HostOffset(0x20000));
        tables.add(at, TableKind::L2, Some(origin), 0x10000, 0x1000);
        let slice = at.plus(0x2000);
        assert_eq!(
            tables.source(at, slice),
            SliceSource::Copy(origin.plus(0x2000))
        );
        tables.loaded(at, slice);
        let parts = tables.parts(at);
        let shape = |part: &FreshPart| (part.at.0, part.length_bytes, part.origin);
        assert_eq!(
            parts.iter().map(shape).collect::<Vec<_>>(),
            [
                (0x40000, 0x2000, Some(HostOffset(0x20000))),
                (0x43000, 0xd000, Some(HostOffset(0x23000))),
            ]
        );
        tables.remove(at);
        assert_eq!(tables.source(at, slice), SliceSource::File);
    }
}
