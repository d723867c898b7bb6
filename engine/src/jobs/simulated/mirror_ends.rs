//! What has to hold of a mirror beside writers at its end, and what was recorded of it.

use super::super::integrity::{manifest, manifest_of, manifest_onto, recorder};
use super::*;

impl Stage {
    /// What was recorded is what the target holds.
    pub(super) async fn assert_recorded(&self, target: &[u8]) {
        if let Some(recorder) = &self.recorder {
            let recorded = match &self.earlier {
                Some(earlier) => manifest_onto(recorder, earlier).await,
                None => manifest(recorder).await,
            };
            assert!(recorded == manifest_of(target), "{:?}", self.setup);
        }
    }

    /// After the end: where the writers are then, all that they know is there.
    pub(super) fn assert_end(&self, ended: &Result<(), Stop>, step: impl Fn() -> bool) {
        match ended {
            Ok(()) => assert_ne!(self.setup.end, End::Cancel),
            Err(Stop::Cancelled) => assert!(
                self.setup.end == End::Cancel || self.errors.get() >= ERRORS_MAX,
                "{:?}",
                self.setup
            ),
            Err(Stop::Failed(_)) => assert!(self.errors.get() > 0),
        }
        let at = match ended {
            Ok(()) if self.setup.end == End::Complete => &self.target,
            _ => &self.source,
        };
        let bytes = run(self.contents(at), step).expect("read");
        self.assert_known(0, &bytes, "in the end");
    }
}

#[test]
fn a_mirror_beside_writers_is_verified_and_its_manifest_tells_of_its_end() {
    let counted = Cell::new(0);
    each_seed("blockyard-engine", "a_mirror_is_verified", 600, |seed| {
        let mut disks = Disks::random(seed);
        disks.granularity_bytes = 65536;
        let mut stage = disks.stage(Setup::random(seed));
        stage.recorder = Some(recorder(disks.bytes.len() as u64));
        let (ended, _) = disks.run(&stage, SyncMode::Full);
        let ended = ended.expect("it ends");
        assert_eq!(ended.is_ok(), stage.setup.end != End::Cancel, "{ended:?}");
        counted.set(counted.get() + usize::from(ended.is_ok()));
        stage.assert_end(&ended, || disks.world.step());
    });
    assert!(counted.get() > 300, "{}", counted.get());
}
