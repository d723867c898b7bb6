//! Images that were used here, read by a reader that shares no code with this one and none with QEMU: the `imago` crate.

use std::cell::Cell;
use std::path::Path;

use blockyard_images::qcow2::units::Compression;
use blockyard_simulator::each_seed;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

use crate::sequences::{Run, random_run};

/// What the other reader sees of the image in a folder, its backing and data file included.
fn read(folder: &Path, length: usize) -> std::io::Result<Vec<u8>> {
    let image = Qcow2::<File>::builder_path(folder.join("image"));
    let image = FormatAccess::new(image.open(PermissiveImplicitOpenGate::default())?);
    assert_eq!(image.size(), length as u64);
    let mut bytes = vec![0xa5; length];
    image.read(&mut bytes, 0)?;
    Ok(bytes)
}

/// It knows neither subclusters nor zstd.
fn is_known(run: &Run) -> bool {
    let create = &run.setup.create;
    !create.extended_l2 && create.compression == Compression::Zlib
}

#[test]
fn another_reader_sees_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let (compared, refused) = (Cell::new(0), Cell::new(0));
    each_seed(
        "blockyard-images",
        "another_reader_sees_the_same",
        300,
        |number| {
            let run = random_run(7_000_000 + number);
            run.write_to(folder.path());
            match (read(folder.path(), run.model.disk.len()), is_known(&run)) {
                (Ok(bytes), true) => {
                    assert!(bytes == run.model.disk, "it reads other bytes");
                    compared.set(compared.get() + 1);
                }
                (Err(_), false) => refused.set(refused.get() + 1),
                (outcome, known) => panic!("{known}: {:?}: {:?}", outcome.err(), run.setup),
            }
        },
    );
    let tried = compared.get() + refused.get();
    assert!(
        tried < 10 || compared.get() * 2 > tried,
        "{} of {tried} images were read",
        compared.get()
    );
}
