//! [`Exit`]: what the exit codes of the commands mean. The daemon has its own, which are those of qemu-storage-daemon.

use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything asked for was done.
    Success,
    /// It was not, and a message says why.
    Failed,
    /// The command line is wrong; nothing was tried.
    Usage,
    /// A signal ended it early, and it has cleaned up.
    Cancelled,
}

impl Exit {
    /// Every exit, in order of its code.
    pub const ALL: [Exit; 4] = [Exit::Success, Exit::Failed, Exit::Usage, Exit::Cancelled];

    /// The number that the caller sees.
    pub const fn code(self) -> u8 {
        match self {
            Exit::Success => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            // What shells show for a process that Ctrl-C ended.
            Exit::Cancelled => 130,
        }
    }

    /// What the number means, for `--help`.
    pub const fn meaning(self) -> &'static str {
        match self {
            Exit::Success => "done",
            Exit::Failed => "failed or refused; a message says why",
            Exit::Usage => "wrong command line; nothing was tried",
            Exit::Cancelled => "cancelled by Ctrl-C, SIGTERM or SIGHUP, and cleaned up",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// The end of a command's `--help`: its examples, then the exit codes.
pub fn after_help(examples: &str) -> String {
    let codes = Exit::ALL.map(|exit| (exit.code(), exit.meaning()));
    after_help_with(examples, &codes)
}

/// The same for a command with exit codes of its own.
pub fn after_help_with(examples: &str, codes: &[(u8, &str)]) -> String {
    let mut text = format!("Examples:\n{}\n\nExit codes:", examples.trim_end());
    for (code, meaning) in codes {
        text += &format!("\n  {code:<4} {meaning}");
    }
    text
}
