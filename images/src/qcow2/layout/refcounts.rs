//! Reference counts in a refcount block, of every width.
//!
//! Spec: qcow2, "Host cluster management", "Refcount block entry": widths below 8 bits begin with the least significant bits of
//! a byte, wider ones are big-endian.

use crate::qcow2::units::Geometry;

/// Bits of a host offset in an entry of the refcount table.
pub const TABLE_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// The count at `index` of (a piece of) a refcount block; `None` behind its end.
pub fn refcount_at(geometry: &Geometry, block: &[u8], index: usize) -> Option<u64> {
    let order = geometry.refcount_order();
    if order < 3 {
        let per_byte_order = 3 - order;
        let byte = *block.get(index >> per_byte_order)?;
        let place = index & ((1 << per_byte_order) - 1);
        let mask = u8::MAX >> (8 - geometry.refcount_bits());
        return Some(u64::from(byte >> (place << order) & mask));
    }
    let width = 1_usize << (order - 3);
    let start = index.checked_mul(width)?;
    let bytes = block.get(start..start.checked_add(width)?)?;
    Some(
        bytes
            .iter()
            .fold(0, |count, byte| count << 8 | u64::from(*byte)),
    )
}

/// Puts a count at `index` of (a piece of) a refcount block; `false`, and nothing done, behind its end or where the count is
/// too large for its width.
#[must_use]
pub fn put_refcount(geometry: &Geometry, block: &mut [u8], index: usize, count: u64) -> bool {
    if count > geometry.refcount_max() {
        return false;
    }
    let order = geometry.refcount_order();
    if order < 3 {
        let per_byte_order = 3 - order;
        let Some(byte) = block.get_mut(index >> per_byte_order) else {
            return false;
        };
        let shift = (index & ((1 << per_byte_order) - 1)) << order;
        let mask = u8::MAX >> (8 - geometry.refcount_bits());
        // Below the width's maximum, which is below 256.
        let count = (count & 0xff) as u8;
        *byte = *byte & !(mask << shift) | count << shift;
        return true;
    }
    let width = 1_usize << (order - 3);
    let place = index.checked_mul(width);
    let Some(bytes) = place.and_then(|start| block.get_mut(start..start.checked_add(width)?))
    else {
        return false;
    };
    bytes.copy_from_slice(&count.to_be_bytes()[8 - width..]);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::units::Version;

    proptest::proptest! {
        #[test]
        fn neighbours_stay_as_they_are(order in 0_u32..=6, index in 0_usize..64, count: u64, fill: u8) {
            let geometry = Geometry::new(Version::V3, 16, order, false).expect("allowed");
            let mut block = vec![fill; 512];
            let before: Vec<_> = (0..64).map(|i| refcount_at(&geometry, &block, i)).collect();
            let fits = count <= geometry.refcount_max();
            proptest::prop_assert_eq!(put_refcount(&geometry, &mut block, index, count), fits);
            for (place, old) in before.into_iter().enumerate() {
                let now = refcount_at(&geometry, &block, place);
                let expected = if place == index && fits { Some(count) } else { old };
                proptest::prop_assert_eq!(now, expected);
            }
            let entries = (512 * 8) >> order;
            proptest::prop_assert_eq!(refcount_at(&geometry, &block, entries), None);
        }
    }

    #[test]
    fn narrow_counts_begin_with_the_low_bits() {
        let geometry = Geometry::new(Version::V3, 16, 1, false).expect("allowed");
        let mut block = [0; 1];
        assert!(put_refcount(&geometry, &mut block, 1, 3));
        assert_eq!(block, [0b1100]);
    }
}
