//! What a job does when a read or write fails: report, ignore, stop, or stop when the disk is full. Pure.

/// The policy a client chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Fail the job.
    #[default]
    Report,
    /// Go on and try again later.
    Ignore,
    /// Stop when room is missing, else report.
    Enospc,
    /// Pause until the client resumes.
    Stop,
    /// The engine's choice: the same as `Enospc`.
    Auto,
}

/// What is done about one error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The range is tried again later.
    Ignore,
    /// The job pauses as if the user had paused it, and tries again when resumed.
    Stop,
}

/// On which side of a copy the error was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Reading (the source).
    Source,
    /// Writing (the target).
    Target,
}

/// The action for an error under a policy.
pub const fn decide(policy: OnError, no_space: bool) -> ErrorAction {
    match policy {
        OnError::Report => ErrorAction::Report,
        OnError::Ignore => ErrorAction::Ignore,
        OnError::Stop => ErrorAction::Stop,
        OnError::Enospc | OnError::Auto => {
            if no_space {
                ErrorAction::Stop
            } else {
                ErrorAction::Report
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_matrix() {
        use ErrorAction as A;
        use OnError as P;
        let rows = [
            (P::Report, A::Report, A::Report),
            (P::Ignore, A::Ignore, A::Ignore),
            (P::Enospc, A::Stop, A::Report),
            (P::Stop, A::Stop, A::Stop),
            (P::Auto, A::Stop, A::Report),
        ];
        for (policy, on_no_space, otherwise) in rows {
            assert_eq!(decide(policy, true), on_no_space, "{policy:?}");
            assert_eq!(decide(policy, false), otherwise, "{policy:?}");
        }
    }
}
