//! The job machine as data: the statuses, the steps between them, and nothing else. Pure.
//!
//! The table is that of QEMU 10.0, plus the name of each step. Only the manager steps a job.

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not created yet; never visible.
    Undefined,
    /// Exists, not started.
    Created,
    /// Working.
    Running,
    /// Was running, now quiet.
    Paused,
    /// Converged, may be completed.
    Ready,
    /// Was ready, now quiet.
    Standby,
    /// Work done, waits for the rest of its transaction.
    Waiting,
    /// Whole transaction done, waits to be finalized.
    Pending,
    /// Failing or cancelled, cleaning up.
    Aborting,
    /// Over, waits to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

impl Status {
    /// Every status, in order of life.
    pub const ALL: [Status; 11] = [
        Status::Undefined,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ready,
        Status::Standby,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    /// The status as clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Status::Undefined => "undefined",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }
}

/// Why a status changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The job comes into being.
    Create,
    /// The work begins.
    Start,
    /// The work has become quiet.
    Park,
    /// The work goes on.
    Unpark,
    /// Source and target agree.
    Converge,
    /// The work ended well.
    Finish,
    /// Everybody in the transaction ended well.
    Gather,
    /// The result is final.
    Finalize,
    /// The work failed or was cancelled.
    Fail,
    /// Cleaning up is over.
    Clean,
    /// Nobody needs the result any more.
    Dismiss,
}

impl Step {
    /// Every step.
    pub const ALL: [Step; 11] = [
        Step::Create,
        Step::Start,
        Step::Park,
        Step::Unpark,
        Step::Converge,
        Step::Finish,
        Step::Gather,
        Step::Finalize,
        Step::Fail,
        Step::Clean,
        Step::Dismiss,
    ];
}

/// Every allowed step: from, why, to.
pub const STEPS: &[(Status, Step, Status)] = &[
    (Status::Undefined, Step::Create, Status::Created),
    (Status::Created, Step::Start, Status::Running),
    (Status::Created, Step::Fail, Status::Aborting),
    (Status::Created, Step::Dismiss, Status::Null),
    (Status::Running, Step::Park, Status::Paused),
    (Status::Running, Step::Converge, Status::Ready),
    (Status::Running, Step::Finish, Status::Waiting),
    (Status::Running, Step::Fail, Status::Aborting),
    (Status::Paused, Step::Unpark, Status::Running),
    (Status::Ready, Step::Park, Status::Standby),
    (Status::Ready, Step::Finish, Status::Waiting),
    (Status::Ready, Step::Fail, Status::Aborting),
    (Status::Standby, Step::Unpark, Status::Ready),
    (Status::Waiting, Step::Gather, Status::Pending),
    (Status::Waiting, Step::Fail, Status::Aborting),
    (Status::Pending, Step::Finalize, Status::Concluded),
    (Status::Pending, Step::Fail, Status::Aborting),
    (Status::Aborting, Step::Fail, Status::Aborting),
    (Status::Aborting, Step::Clean, Status::Concluded),
    (Status::Concluded, Step::Dismiss, Status::Null),
];

/// The status after `step`, or `None` if the step is not allowed there.
pub fn next(status: Status, step: Step) -> Option<Status> {
    STEPS
        .iter()
        .find(|(from, why, _)| *from == status && *why == step)
        .map(|(_, _, to)| *to)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_step_from_a_status_is_named_once() {
        let pairs: HashSet<_> = STEPS.iter().map(|(from, step, _)| (from, step)).collect();
        assert_eq!(pairs.len(), STEPS.len());
    }

    /// The matrix of QEMU 10.0, status by status.
    #[test]
    fn edges_are_those_of_the_reference() {
        use Status::*;
        let reference: &[(Status, &[Status])] = &[
            (Undefined, &[Created]),
            (Created, &[Running, Aborting, Null]),
            (Running, &[Paused, Ready, Waiting, Aborting]),
            (Paused, &[Running]),
            (Ready, &[Standby, Waiting, Aborting]),
            (Standby, &[Ready]),
            (Waiting, &[Pending, Aborting]),
            (Pending, &[Aborting, Concluded]),
            (Aborting, &[Aborting, Concluded]),
            (Concluded, &[Null]),
            (Null, &[]),
        ];
        for (from, allowed) in reference {
            for to in Status::ALL {
                let here = Step::ALL.iter().any(|step| next(*from, *step) == Some(to));
                assert_eq!(here, allowed.contains(&to), "{from:?} -> {to:?}");
            }
        }
    }
}
