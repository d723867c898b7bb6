//! A machine whose kernel does not let anybody have a ring.

/// From now on this thread, and those it starts, cannot set a ring up.
pub(crate) fn forbid_io_uring(errno: i32) {
    use seccompiler::{SeccompAction, SeccompFilter};
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let rules = [(libc::SYS_io_uring_setup, vec![])].into_iter().collect();
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).expect("a filter");
    let program: seccompiler::BpfProgram = filter.try_into().expect("compiles");
    seccompiler::apply_filter(&program).expect("installed");
}
