//! What is recorded of persistent bitmaps beside writers becomes short again by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use blockyard_engine::engine::EngineConfig;
use blockyard_engine::request::{BitmapChange, BitmapName, Request};

use super::yard::*;

/// What counts as changed after a crash when it was touched.
const REGION: u64 = 16 << 20;
/// Where the bits begin in the file that has them.
const FIELD_OFFSET: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// Regions that are recorded as touched, where one field of bits is there.
fn touched(state: &Path) -> Option<u32> {
    let files = std::fs::read_dir(state.join("bitmaps")).expect("a folder");
    let paths = files.map(|file| file.expect("read").path());
    let mut fields = paths.filter(|path| path.to_string_lossy().ends_with("-touched"));
    // It may be gone by now.
    let (bytes, None) = (std::fs::read(fields.next()?).ok()?, fields.next()) else {
        return None;
    };
    let field = bytes.get(FIELD_OFFSET..)?;
    Some(field.iter().map(|byte| byte.count_ones()).sum())
}

#[test]
fn what_has_gone_cold_is_forgotten_beside_a_writer() {
    block_on(async {
        let yard = Yard::with(|folder| EngineConfig {
            state_dir: Some(folder.join("state")),
            state_look_pause: Duration::from_millis(20),
            ..EngineConfig::default()
        });
        let state = yard.path("state");
        yard.add_long_image("i", 200 * REGION).await;
        let add = BitmapChange::Add {
            bitmap: BitmapName {
                node: "i".to_owned(),
                name: "b".to_owned(),
            },
            granularity_bytes: None,
            persistent: true,
            disabled: false,
        };
        yard.call(Request::ChangeBitmap(add)).await.expect("added");
        assert_eq!(touched(&state), Some(0));
        let root = yard.engine.open_root("i", true).await.expect("opened");
        // Each second region, so that none is touched ahead.
        for region in (0..200).step_by(2) {
            let wrote = root.write(region * REGION, vec![7; 4096]).await;
            wrote.expect("written");
        }
        let started = Instant::now();
        while touched(&state).is_none_or(|count| count >= 64) {
            assert!(started.elapsed() < PATIENCE, "{:?}", touched(&state));
            root.write(0, vec![8; 512]).await.expect("written");
        }
        root.close().await.expect("closed");
        yard.remove("i").await.expect("nobody uses it");
        assert_eq!(touched(&state), None, "it is in the image");
    });
}
