//! Names of nodes: what clients may choose, and what is made up.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::error::EngineError;
use crate::graph::records::Records;
use crate::limits::NODE_NAME_BYTES_MAX;

/// Checks a name that a client chose.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check(records: &Records, name: &str) -> Result<(), EngineError> {
    if !is_identifier(name) {
        return Err(EngineError::generic(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > NODE_NAME_BYTES_MAX {
        return Err(EngineError::generic("Node name too long"));
    }
    if records.is_taken(name) {
        return Err(EngineError::generic(format!(
            "Duplicate nodes with node-name='{name}'"
        )));
    }
    Ok(())
}

/// Whether a text is a letter followed by letters, digits, `-`, `.` and `_`: the form of every id.
pub(crate) fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

/// A name that no client could choose and none can predict.
pub(super) fn made_up(number: u64) -> String {
    let random = RandomState::new().build_hasher().finish() % 100;
    format!("#block{number}{random:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_texts() {
        let mut records = Records {
            reserved: vec!["taken".to_owned()],
            ..Records::default()
        };
        let text = |name: &str| check(&records, name).err().map(|error| error.text);
        assert_eq!(text("a-b.c_1"), None);
        assert_eq!(text("1bad").as_deref(), Some("Invalid node-name: '1bad'"));
        assert_eq!(text("").as_deref(), Some("Invalid node-name: ''"));
        assert_eq!(
            text("#block012").as_deref(),
            Some("Invalid node-name: '#block012'")
        );
        assert_eq!(text(&"a".repeat(31)), None);
        assert_eq!(text(&"a".repeat(32)).as_deref(), Some("Node name too long"));
        assert_eq!(
            text("taken").as_deref(),
            Some("Duplicate nodes with node-name='taken'")
        );
        records.reserved.clear();
        assert_eq!(check(&records, "taken"), Ok(()));
        assert!(made_up(7).starts_with("#block7") && made_up(7).len() == 9);
    }
}
