//! [`RingFile`]: whole reads and writes of one file through a ring; short transfers go on where they stopped.

use std::rc::Rc;

use blockyard_storage::Buffer;
use blockyard_storage::error::{EAGAIN, EIO, ENOSPC};

use crate::entries::Direction;
use crate::file_calls::{Failed, length_of};
use crate::host_file::HostFile;
use crate::uring::{FileSlot, Uring};

/// `EINTR`: interrupted.
const EINTR: i32 = 4;

/// One file on one ring.
pub(crate) struct RingFile {
    uring: Rc<Uring>,
    file: HostFile,
    slot: FileSlot,
}

impl RingFile {
    /// Puts `file` on the ring.
    pub(crate) fn new(uring: Rc<Uring>, file: HostFile) -> Self {
        let slot = uring.register_file(file.descriptor());
        Self { uring, file, slot }
    }

    /// Fills `buffer` from `offset` and says how much of it was in the file; what lies behind the end is zeroes.
    pub(crate) async fn read_whole(
        &self,
        offset: u64,
        mut buffer: Buffer,
    ) -> (Buffer, Result<usize, Failed>) {
        let alignment = self.file.request_alignment() as usize;
        let mut done = 0;
        let mut stuck = false;
        while done < buffer.len() {
            let (back, result) = self
                .uring
                .transfer(
                    Direction::Read,
                    &self.file,
                    &self.slot,
                    offset,
                    buffer,
                    done,
                )
                .await;
            buffer = back.into_buffer();
            match result {
                0 => break,
                count if count > 0 => {
                    let before = done;
                    done += count.unsigned_abs() as usize;
                    if done < buffer.len() && !done.is_multiple_of(alignment) {
                        // Direct I/O stops between blocks only at the end of the file.
                        match length_of(self.file.descriptor()) {
                            Ok(length) if offset + done as u64 >= length => break,
                            Ok(_) => done -= done % alignment,
                            Err(errno) => return (buffer, Err(errno)),
                        }
                        if done == before && std::mem::replace(&mut stuck, true) {
                            return (buffer, Err(EIO));
                        }
                    }
                }
                error if is_passing(error) => {}
                error => return (buffer, Err(-error)),
            }
        }
        if done < buffer.len() {
            buffer.as_mut_slice()[done..].fill(0);
        }
        (buffer, Ok(done))
    }

    /// Writes all of `buffer` at `offset`.
    pub(crate) async fn write_whole(
        &self,
        offset: u64,
        mut buffer: Buffer,
    ) -> (Buffer, Result<(), Failed>) {
        let alignment = self.file.request_alignment() as usize;
        let mut done = 0;
        let mut stuck = false;
        while done < buffer.len() {
            let (back, result) = self
                .uring
                .transfer(
                    Direction::Write,
                    &self.file,
                    &self.slot,
                    offset,
                    buffer,
                    done,
                )
                .await;
            buffer = back.into_buffer();
            match result {
                0 => return (buffer, Err(ENOSPC)),
                count if count > 0 => {
                    let before = done;
                    done += count.unsigned_abs() as usize;
                    // Whole blocks only; the rest of a torn block is written again.
                    done -= if done < buffer.len() {
                        done % alignment
                    } else {
                        0
                    };
                    if done == before && std::mem::replace(&mut stuck, true) {
                        return (buffer, Err(EIO));
                    }
                }
                error if is_passing(error) => {}
                error => return (buffer, Err(-error)),
            }
        }
        (buffer, Ok(()))
    }
}

impl Drop for RingFile {
    fn drop(&mut self) {
        self.uring.release_file(&self.slot);
    }
}

fn is_passing(result: i32) -> bool {
    matches!(-result, EINTR | EAGAIN)
}
