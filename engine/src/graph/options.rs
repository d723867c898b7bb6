//! [`Resolved`]: the options that every node has, with what a node takes from the one it is described with. Pure.

use crate::error::EngineError;
use crate::request::{CommonOptions, DetectZeroes, Discard};

/// Options of one node with the defaults and the parent's values filled in.
#[derive(Clone, Copy)]
pub(super) struct Resolved {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) force_share: bool,
    pub(super) cache_direct: bool,
    pub(super) cache_no_flush: bool,
    pub(super) discard: Discard,
    pub(super) detect_zeroes: DetectZeroes,
    /// Somebody else may own it.
    pub(super) inactive: bool,
    /// That is so because of the node above, or what is described below is to take it from this one.
    pub(super) passes_inactive: bool,
    /// What its client says, without what comes from elsewhere.
    pub(super) said: CommonOptions,
}

/// What a node that is opened with its parent is to it, which decides what it takes from it.
#[derive(Clone, Copy)]
pub(super) enum Inherits {
    /// It shows what the parent shows.
    Filtered(Resolved),
    /// It holds the parent's bytes: formats decide themselves what they discard.
    Held(Resolved),
    /// It is what the parent does not hold, and nobody writes it.
    Backing(Resolved),
}

impl Resolved {
    /// Nodes that are described with their parent take from it what they do not say.
    pub(super) fn new(
        options: CommonOptions,
        inherits: Option<Inherits>,
    ) -> Result<Self, EngineError> {
        let parent = inherits.map(|inherits| match inherits {
            Inherits::Filtered(parent) => parent,
            Inherits::Held(parent) => Resolved {
                discard: Discard::Unmap,
                ..parent
            },
            Inherits::Backing(parent) => Resolved {
                read_only: true,
                auto_read_only: false,
                discard: Discard::Ignore,
                passes_inactive: parent.inactive,
                ..parent
            },
        });
        let of_parent = |pick: fn(&Resolved) -> bool| parent.as_ref().is_some_and(pick);
        let or_parent = |own: Option<bool>, pick| own.unwrap_or_else(|| of_parent(pick));
        let discard = parent.map_or(Discard::Ignore, |parent| parent.discard);
        let passes_inactive = of_parent(|parent| parent.passes_inactive);
        let resolved = Self {
            read_only: or_parent(options.read_only, |parent| parent.read_only),
            auto_read_only: or_parent(options.auto_read_only, |parent| parent.auto_read_only),
            force_share: or_parent(options.force_share, |parent| parent.force_share),
            cache_direct: or_parent(options.cache_direct, |parent| parent.cache_direct),
            cache_no_flush: or_parent(options.cache_no_flush, |parent| parent.cache_no_flush),
            discard: options.discard.unwrap_or(discard),
            detect_zeroes: options.detect_zeroes.unwrap_or_default(),
            inactive: passes_inactive || options.active == Some(false),
            passes_inactive,
            said: options,
        };
        if resolved.detect_zeroes == DetectZeroes::Unmap && resolved.discard != Discard::Unmap {
            return Err(EngineError::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            ));
        }
        if resolved.force_share && !resolved.read_only {
            let text = "force-share=on can only be used with read-only images";
            return Err(EngineError::generic(text));
        }
        Ok(resolved)
    }

    /// The same for whoever is inactive if this one is. As in QEMU, that is what is described below but for the `file`, which is
    /// only if the node is for what is above it.
    pub(super) fn passing_inactive(self) -> Self {
        Self {
            passes_inactive: self.inactive,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every flag set one way or the other, and discards passed on.
    fn parent(flags: bool) -> Resolved {
        Resolved {
            read_only: flags,
            auto_read_only: flags,
            force_share: flags,
            cache_direct: flags,
            cache_no_flush: flags,
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Unmap,
            inactive: flags,
            passes_inactive: false,
            said: CommonOptions::default(),
        }
    }

    fn resolved(inherits: Option<Inherits>) -> Resolved {
        Resolved::new(CommonOptions::default(), inherits).expect("fits")
    }

    #[test]
    fn what_is_not_said_comes_from_the_node_above() {
        let alone = resolved(None);
        assert!(!alone.read_only && !alone.cache_direct && alone.discard == Discard::Ignore);
        for flags in [false, true] {
            let parent = parent(flags);
            let held = resolved(Some(Inherits::Held(parent)));
            let filtered = resolved(Some(Inherits::Filtered(parent)));
            for child in [held, filtered] {
                let taken = (child.read_only, child.auto_read_only, child.force_share);
                assert_eq!(taken, (flags, flags, flags));
                assert_eq!((child.cache_direct, child.cache_no_flush), (flags, flags));
                assert_eq!(child.detect_zeroes, DetectZeroes::Off);
            }
            let backing = resolved(Some(Inherits::Backing(parent)));
            let taken = (
                backing.read_only,
                backing.auto_read_only,
                backing.force_share,
            );
            assert_eq!(taken, (true, false, flags));
            assert_eq!(
                (backing.cache_direct, backing.cache_no_flush),
                (flags, flags)
            );
            assert_eq!(backing.discard, Discard::Ignore);
        }
    }

    #[test]
    fn a_file_is_inactive_only_with_all_that_is_above() {
        let inactive = |inherits| resolved(Some(inherits)).inactive;
        let top = parent(true);
        assert!(!inactive(Inherits::Held(top)) && !inactive(Inherits::Filtered(top)));
        assert!(inactive(Inherits::Backing(top)));
        assert!(inactive(Inherits::Held(top.passing_inactive())));
        let backing = resolved(Some(Inherits::Backing(top)));
        assert!(inactive(Inherits::Held(backing)) && inactive(Inherits::Backing(backing)));
        let active = parent(false);
        assert!(!inactive(Inherits::Backing(active)) && !inactive(Inherits::Held(active)));
        let said = |active| CommonOptions {
            active: Some(active),
            ..CommonOptions::default()
        };
        let own = |active, inherits| Resolved::new(said(active), inherits).expect("fits");
        assert!(own(false, None).inactive && !own(true, None).inactive);
        // What is above decides.
        assert!(own(true, Some(Inherits::Backing(top))).inactive);
    }

    #[test]
    fn formats_decide_what_their_files_discard() {
        let parent = Resolved {
            discard: Discard::Ignore,
            ..parent(false)
        };
        assert_eq!(
            resolved(Some(Inherits::Held(parent))).discard,
            Discard::Unmap
        );
        assert_eq!(
            resolved(Some(Inherits::Filtered(parent))).discard,
            Discard::Ignore
        );
        let options = CommonOptions {
            discard: Some(Discard::Ignore),
            read_only: Some(true),
            ..CommonOptions::default()
        };
        let child = Resolved::new(options, Some(Inherits::Held(parent))).expect("fits");
        assert!(child.read_only && child.discard == Discard::Ignore);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let text = |options: CommonOptions| Resolved::new(options, None).err().map(|e| e.text);
        let zeroes = CommonOptions {
            detect_zeroes: Some(DetectZeroes::Unmap),
            ..CommonOptions::default()
        };
        assert_eq!(
            text(zeroes).as_deref(),
            Some(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap"
            )
        );
        let shared = CommonOptions {
            force_share: Some(true),
            ..CommonOptions::default()
        };
        assert_eq!(
            text(shared).as_deref(),
            Some("force-share=on can only be used with read-only images")
        );
    }
}
