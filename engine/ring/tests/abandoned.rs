//! Requests that nobody waits for any more: what they may touch, and what they must not.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::task::{Context, Waker};

use blockyard_ring::{BackendChoice, HostFile, OpenMode, Reactor, ReactorConfig};
use blockyard_storage::Buffer;
use blockyard_storage::buffer::BufferPool;

mod support;
use support::block_on;

fn open(path: &Path) -> HostFile {
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    HostFile::open(path, mode).expect("opened")
}

/// The entry of an abandoned write names a place in the ring's table of files; another file that is opened before the
/// kernel has seen the entry must not be found there.
#[test]
fn an_abandoned_write_never_reaches_another_file() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        std::fs::write(&old, [1; 4096]).expect("written");
        std::fs::write(&new, [2; 4096]).expect("written");
        let config = ReactorConfig {
            backend,
            ..ReactorConfig::new(BufferPool::new(1 << 20))
        };
        let reactor = Reactor::open(config).expect("a reactor");
        let storage = reactor.file(open(&old), false);
        let mut write = storage.write(0, Buffer::copy_of(&[9; 4096]));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(write.as_mut().poll(&mut cx).is_pending());
        drop(write);
        drop(storage);
        let storage = reactor.file(open(&new), false);
        block_on(&reactor, async {
            let read = storage.read(0, Buffer::zeroed(4096)).await;
            assert_eq!(read.outcome, Ok(()));
            storage.sync().await.expect("synced");
        });
        drop((storage, reactor));
        let mut bytes = [0; 4096];
        let file = std::fs::File::open(&new).expect("opened");
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(bytes, [2; 4096], "{backend:?}");
    }
}
