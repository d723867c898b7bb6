//! [`FaultRules`]: which requests a `blkdebug` node fails. Pure: states, events and rules, no I/O.
//!
//! An event first looks at the rules that wait for it in the state as of now. If there are faults among them, they take
//! the place of those armed before; then the state changes. A request fails by the first armed fault that fits it.

use blockyard_storage::ByteRange;

use crate::limits::SECTOR_BYTES;
use crate::request::{BlkdebugIo, InjectError, SetState};

/// `EIO`, as a rule has it.
const EIO: i64 = blockyard_storage::error::EIO as i64;

/// What a fault script may wait for, as far as it comes about here. The formats' own events are theirs to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugEvent {
    /// The node has been opened.
    None,
    /// A format above is about to read data.
    ReadAio,
    /// A format above is about to write data.
    WriteAio,
    /// An image above is about to read from its backing.
    ReadBackingAio,
    /// An image above is about to read a compressed cluster.
    ReadCompressed,
    /// An image above is about to write a compressed cluster.
    WriteCompressed,
    /// An image above is about to read what a new cluster has to be filled up with.
    CowRead,
    /// An image above is about to write that, apart from the data.
    CowWrite,
    /// A write begins.
    Pwritev,
    /// A zero request begins.
    PwritevZero,
    /// A write or zero request has ended, well or not.
    PwritevDone,
    /// The block at the start of an unaligned write is about to be read.
    PwritevRmwHead,
    /// It has been read.
    PwritevRmwAfterHead,
    /// The block at its end is about to be read.
    PwritevRmwTail,
    /// It has been read.
    PwritevRmwAfterTail,
    /// A format above is about to write back what it holds.
    FlushToOs,
    /// It is about to make that durable.
    FlushToDisk,
}

impl DebugEvent {
    /// As rules name it.
    pub const fn name(self) -> &'static str {
        match self {
            DebugEvent::None => "none",
            DebugEvent::ReadAio => "read_aio",
            DebugEvent::WriteAio => "write_aio",
            DebugEvent::ReadBackingAio => "read_backing_aio",
            DebugEvent::ReadCompressed => "read_compressed",
            DebugEvent::WriteCompressed => "write_compressed",
            DebugEvent::CowRead => "cow_read",
            DebugEvent::CowWrite => "cow_write",
            DebugEvent::Pwritev => "pwritev",
            DebugEvent::PwritevZero => "pwritev_zero",
            DebugEvent::PwritevDone => "pwritev_done",
            DebugEvent::PwritevRmwHead => "pwritev_rmw_head",
            DebugEvent::PwritevRmwAfterHead => "pwritev_rmw_after_head",
            DebugEvent::PwritevRmwTail => "pwritev_rmw_tail",
            DebugEvent::PwritevRmwAfterTail => "pwritev_rmw_after_tail",
            DebugEvent::FlushToOs => "flush_to_os",
            DebugEvent::FlushToDisk => "flush_to_disk",
        }
    }
}

/// How one request is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Error number.
    pub errno: i32,
    /// Without letting others go first.
    pub immediately: bool,
}

/// Which bytes a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Anywhere,
    /// Requests that hold this byte; `None`: a place that no request can reach.
    Byte(Option<u64>),
}

#[derive(Debug)]
struct FaultRule {
    event: String,
    state: i64,
    /// `None`: every kind but questions about allocation.
    iotype: Option<BlkdebugIo>,
    /// 0: fits, and lets the request pass.
    errno: i32,
    place: Place,
    once: bool,
    immediately: bool,
    armed: bool,
}

/// The rules of one node and where it is in them.
#[derive(Debug)]
pub struct FaultRules {
    state: i64,
    /// In the order of definition, which is also that of precedence.
    faults: Vec<FaultRule>,
    changes: Vec<SetState>,
}

impl FaultRules {
    /// Rules that have heard of the node's opening.
    ///
    /// # Errors
    /// The name of a member, and its value, that no rule can have.
    pub fn new(
        faults: &[InjectError],
        changes: Vec<SetState>,
    ) -> Result<Self, (&'static str, i64)> {
        let mut rules = Self {
            state: 1,
            faults: faults.iter().map(fault_rule).collect::<Result<_, _>>()?,
            changes,
        };
        rules.hear(DebugEvent::None);
        Ok(rules)
    }

    /// An event has come about.
    pub fn hear(&mut self, event: DebugEvent) {
        let (name, state) = (event.name(), self.state);
        let concerns = |of: &str, wanted: i64| of == name && (wanted == 0 || wanted == state);
        if self
            .faults
            .iter()
            .any(|rule| concerns(&rule.event, rule.state))
        {
            for rule in &mut self.faults {
                rule.armed = concerns(&rule.event, rule.state);
            }
        }
        let change = self
            .changes
            .iter()
            .find(|change| concerns(&change.event, change.state.unwrap_or(0)));
        if let Some(change) = change {
            self.state = change.new_state;
        }
    }

    /// Whether a request fails now. `range` is what it touches; `None` for flushes.
    pub fn check(&mut self, io: BlkdebugIo, range: Option<ByteRange>) -> Option<Fault> {
        let found = self
            .faults
            .iter()
            .position(|rule| rule.armed && rule.fits(io, range))?;
        let rule = &self.faults[found];
        let fault = Fault {
            errno: rule.errno,
            immediately: rule.immediately,
        };
        if fault.errno == 0 {
            return None;
        }
        if rule.once {
            self.faults.remove(found);
        }
        Some(fault)
    }
}

impl FaultRule {
    fn fits(&self, io: BlkdebugIo, range: Option<ByteRange>) -> bool {
        let fits_kind = match self.iotype {
            Some(wanted) => wanted == io,
            None => io != BlkdebugIo::BlockStatus,
        };
        fits_kind
            && match (self.place, range) {
                (Place::Anywhere, _) => true,
                (Place::Byte(Some(byte)), Some(range)) => range.contains(&ByteRange::new(byte, 1)),
                (Place::Byte(_), _) => false,
            }
    }
}

fn fault_rule(spec: &InjectError) -> Result<FaultRule, (&'static str, i64)> {
    let errno = spec.errno.unwrap_or(EIO);
    let place = match spec.sector {
        None | Some(-1) => Place::Anywhere,
        Some(sector) => Place::Byte(
            u64::try_from(sector)
                .ok()
                .and_then(|sector| sector.checked_mul(SECTOR_BYTES)),
        ),
    };
    Ok(FaultRule {
        event: spec.event.clone(),
        state: spec.state.unwrap_or(0),
        iotype: spec.iotype,
        // The numbers that a kernel can answer with; any other would be taken for success further up.
        errno: i32::try_from(errno)
            .ok()
            .filter(|errno| (0..4096).contains(errno))
            .ok_or(("errno", errno))?,
        place,
        once: spec.once.unwrap_or(false),
        immediately: spec.immediately.unwrap_or(false),
        armed: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(event: &str, errno: i64) -> InjectError {
        InjectError {
            event: event.to_owned(),
            errno: Some(errno),
            ..InjectError::default()
        }
    }

    fn change(event: &str, state: i64, new_state: i64) -> SetState {
        SetState {
            event: event.to_owned(),
            state: Some(state),
            new_state,
        }
    }

    fn rules(faults: &[InjectError], changes: &[SetState]) -> FaultRules {
        FaultRules::new(faults, changes.to_vec()).expect("rules that can be")
    }

    /// The error number of a request for one sector.
    fn request(rules: &mut FaultRules, io: BlkdebugIo, sector: u64) -> Option<i32> {
        let range = ByteRange::new(sector * SECTOR_BYTES, SECTOR_BYTES);
        let range = (io != BlkdebugIo::Flush).then_some(range);
        rules.check(io, range).map(|fault| fault.errno)
    }

    fn write(rules: &mut FaultRules) -> Option<i32> {
        request(rules, BlkdebugIo::Write, 0)
    }

    #[test]
    fn kinds_of_requests() {
        for kind in BlkdebugIo::ALL {
            let mut only = rules(
                &[InjectError {
                    iotype: Some(kind),
                    ..fault("none", 28)
                }],
                &[],
            );
            let mut all = rules(&[fault("none", 28)], &[]);
            for io in BlkdebugIo::ALL {
                let hit = |hit: bool| hit.then_some(28);
                assert_eq!(
                    request(&mut only, io, 0),
                    hit(io == kind),
                    "{kind:?} {io:?}"
                );
                let by_default = io != BlkdebugIo::BlockStatus;
                assert_eq!(request(&mut all, io, 0), hit(by_default), "{io:?}");
            }
        }
    }

    #[test]
    fn sectors() {
        let at = |sector| {
            rules(
                &[InjectError {
                    sector: Some(sector),
                    ..fault("none", 5)
                }],
                &[],
            )
        };
        let mut seven = at(7);
        for (offset, length, hit) in [
            (0, 7 * 512, false),
            (0, 7 * 512 + 1, true),
            (7 * 512, 512, true),
            (7 * 512, 0, false),
            (7 * 512 + 1, 4096, false),
            (4096, 4096, false),
        ] {
            let range = ByteRange::new(offset, length);
            let found = seven.check(BlkdebugIo::Read, Some(range)).is_some();
            assert_eq!(found, hit, "{range}");
        }
        assert_eq!(seven.check(BlkdebugIo::Flush, None), None);
        assert_eq!(request(&mut at(-1), BlkdebugIo::Read, 9), Some(5));
        assert_eq!(request(&mut at(-1), BlkdebugIo::Flush, 0), Some(5));
        for nowhere in [-2, i64::MIN, i64::MAX] {
            let all = Some(ByteRange::new(0, u64::MAX));
            assert_eq!(at(nowhere).check(BlkdebugIo::Read, all), None);
        }
    }

    #[test]
    fn the_first_fault_that_fits_decides() {
        let reads = InjectError {
            iotype: Some(BlkdebugIo::Read),
            ..fault("none", 28)
        };
        let mut two = rules(&[reads.clone(), fault("none", 1)], &[]);
        assert_eq!(request(&mut two, BlkdebugIo::Read, 0), Some(28));
        assert_eq!(write(&mut two), Some(1));
        let passes = InjectError {
            errno: Some(0),
            once: Some(true),
            ..reads
        };
        let mut masked = rules(&[passes, fault("none", 1)], &[]);
        for _ in 0..2 {
            assert_eq!(request(&mut masked, BlkdebugIo::Read, 0), None);
            assert_eq!(write(&mut masked), Some(1));
        }
    }

    #[test]
    fn once_is_once_even_if_armed_again() {
        let once = InjectError {
            once: Some(true),
            ..fault("pwritev", 28)
        };
        let mut rules = rules(&[once, fault("pwritev", 5)], &[]);
        assert_eq!(write(&mut rules), None);
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), Some(28));
        assert_eq!(write(&mut rules), Some(5));
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), Some(5));
    }

    #[test]
    fn faults_of_an_event_take_the_place_of_those_before() {
        let mut rules = rules(&[fault("none", 28), fault("pwritev", 5)], &[]);
        assert_eq!(write(&mut rules), Some(28));
        // An event without faults of its own arms and disarms nothing.
        rules.hear(DebugEvent::PwritevDone);
        assert_eq!(write(&mut rules), Some(28));
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), Some(5));
        assert_eq!(write(&mut rules), Some(5));
    }

    #[test]
    fn faults_see_the_state_before_their_event_changes_it() {
        let in_state = |state, errno| InjectError {
            state: Some(state),
            ..fault("pwritev", errno)
        };
        let changes = [
            change("pwritev", 1, 2),
            change("pwritev", 1, 9),
            change("pwritev_zero", 0, 3),
        ];
        let mut rules = rules(&[in_state(2, 28), in_state(3, 5)], &changes);
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), None, "armed in state 1");
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), Some(28), "the first change counts");
        rules.hear(DebugEvent::PwritevZero);
        assert_eq!(write(&mut rules), Some(28), "still armed");
        rules.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut rules), Some(5), "from any state");
    }

    #[test]
    fn opening_is_an_event() {
        let in_two = InjectError {
            state: Some(2),
            ..fault("none", 5)
        };
        let mut never = rules(&[in_two], &[change("none", 0, 2)]);
        assert_eq!(write(&mut never), None);
        let later = InjectError {
            state: Some(2),
            ..fault("pwritev", 5)
        };
        let mut opened = rules(&[later], &[change("none", 1, 2)]);
        opened.hear(DebugEvent::Pwritev);
        assert_eq!(write(&mut opened), Some(5));
    }

    #[test]
    fn defaults_and_numbers_that_are_no_errors() {
        let plain = InjectError {
            event: "none".to_owned(),
            immediately: Some(true),
            ..InjectError::default()
        };
        let expected = Fault {
            errno: 5,
            immediately: true,
        };
        let all = Some(ByteRange::new(0, 1));
        let mut rules = rules(&[plain], &[]);
        assert_eq!(rules.check(BlkdebugIo::Read, all), Some(expected));
        for errno in [-1, 4096, i64::MIN, i64::MAX] {
            let refused = FaultRules::new(&[fault("none", errno)], Vec::new());
            assert_eq!(refused.err(), Some(("errno", errno)));
        }
    }

    #[test]
    fn every_event_has_a_name_that_rules_may_use() {
        use DebugEvent as E;
        for event in [
            E::None,
            E::ReadAio,
            E::WriteAio,
            E::ReadBackingAio,
            E::ReadCompressed,
            E::WriteCompressed,
            E::CowRead,
            E::CowWrite,
            E::Pwritev,
            E::PwritevZero,
            E::PwritevDone,
            E::PwritevRmwHead,
            E::PwritevRmwAfterHead,
            E::PwritevRmwTail,
            E::PwritevRmwAfterTail,
            E::FlushToOs,
            E::FlushToDisk,
        ] {
            assert!(crate::request::BLKDEBUG_EVENTS.contains(&event.name()));
        }
    }
}
