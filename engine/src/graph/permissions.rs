//! Permissions on the edges of the graph: what users take, what they share, and when two of them cannot be. Pure.

use crate::request::Permission;

/// Every permission, in the order of texts and lock bytes.
pub const ALL: [Permission; 4] = [
    Permission::ConsistentRead,
    Permission::Write,
    Permission::WriteUnchanged,
    Permission::Resize,
];

/// A set of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// None.
    pub const NONE: Self = Self(0);
    /// Every one.
    pub const EVERY: Self = Self(0b1111);

    /// The set of these.
    pub fn of(list: &[Permission]) -> Self {
        list.iter().fold(Self::NONE, |set, one| set.with(*one))
    }

    /// The set and one more.
    pub const fn with(self, one: Permission) -> Self {
        Self(self.0 | 1 << one as u8)
    }

    /// The set less one.
    pub const fn without(self, one: Permission) -> Self {
        Self(self.0 & !(1 << one as u8))
    }

    /// Whether one is in it.
    pub const fn has(self, one: Permission) -> bool {
        self.0 & (1 << one as u8) != 0
    }

    /// What is in either.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is not in it.
    pub const fn complement(self) -> Self {
        Self(!self.0 & Self::EVERY.0)
    }

    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// As a list, in the order of texts.
    pub fn list(self) -> Vec<Permission> {
        ALL.into_iter().filter(|one| self.has(*one)).collect()
    }
}

/// What a client adds to the permissions of a node's edge to its child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtraPermissions {
    /// Taken as well.
    pub taken: Permissions,
    /// Not shared either.
    pub unshared: Permissions,
}

/// A permission as texts spell it.
pub const fn name_of(permission: Permission) -> &'static str {
    match permission {
        Permission::ConsistentRead => "consistent read",
        Permission::Write => "write",
        Permission::WriteUnchanged => "write unchanged",
        Permission::Resize => "resize",
    }
}

/// The names in a set, as texts list them.
pub fn names_of(set: Permissions) -> String {
    let names: Vec<_> = set.list().into_iter().map(name_of).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_every_kind() {
        for bits in 0..16_u8 {
            let set = Permissions(bits);
            assert_eq!(Permissions::of(&set.list()), set);
            assert!(set.intersection(set.complement()).is_empty());
            assert_eq!(set.union(set.complement()), Permissions::EVERY);
            for one in ALL {
                assert!(set.with(one).has(one) && !set.without(one).has(one));
            }
        }
        assert_eq!(
            names_of(Permissions::EVERY),
            "consistent read, write, write unchanged, resize"
        );
    }
}
