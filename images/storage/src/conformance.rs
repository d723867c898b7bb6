//! The suite that every implementation of `Storage` must pass: what the trait promises, checked one promise a function.
//!
//! The caller brings a way to make an empty storage and a way to run a future to its end.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use crate::aligned::Aligned;
use crate::buffer::Buffer;
use crate::error::EINVAL;
use crate::facts::{Preallocation, ZeroMode};
use crate::range::ByteRange;
use crate::storage::{LocalFuture, Storage};

/// Runs a future to its end on the implementation's own loop.
pub type BlockOn<'a> = &'a dyn Fn(LocalFuture<'_, ()>);

/// Runs every check. `make` gives an empty, growing storage of its own each time.
///
/// # Panics
/// When a promise is broken.
pub fn run(make: &dyn Fn() -> Rc<dyn Storage>, block_on: BlockOn<'_>) {
    block_on(Box::pin(async {
        whole_transfers(make()).await;
        reads_behind_the_end(make()).await;
        zeroes(make()).await;
        discards(make()).await;
        lengths(make()).await;
        allocation(make()).await;
        preallocation(make()).await;
        many_at_once(make()).await;
        abandoned_futures(make()).await;
        misaligned_requests(make()).await;
        any_alignment(Aligned::over(make())).await;
    }));
}

/// Bytes that tell where they belong.
fn pattern(offset: u64, length: usize, seed: u8) -> Buffer {
    let mut buffer = Buffer::zeroed(length);
    for (index, byte) in buffer.as_mut_slice().iter_mut().enumerate() {
        let at = offset + index as u64;
        *byte = (at.wrapping_mul(31) ^ (at >> 9)) as u8 ^ seed | 1;
    }
    buffer
}

async fn write(storage: &dyn Storage, offset: u64, from: Buffer) {
    let transfer = storage.write(offset, from).await;
    transfer.outcome.expect("written");
}

async fn read(storage: &dyn Storage, offset: u64, length: usize) -> Vec<u8> {
    let mut into = Buffer::zeroed(length);
    into.as_mut_slice().fill(0xee);
    let transfer = storage.read(offset, into).await;
    transfer.outcome.expect("read");
    transfer.buffer.as_slice().to_vec()
}

async fn whole_transfers(storage: Rc<dyn Storage>) {
    for (offset, length) in [(0, 4096), (8192, 1 << 20), (3 << 20, 2 << 20)] {
        write(&*storage, offset, pattern(offset, length, 0)).await;
        let bytes = read(&*storage, offset, length).await;
        assert!(
            bytes == pattern(offset, length, 0).as_slice(),
            "{length} bytes at {offset}"
        );
    }
    assert_eq!(
        storage.facts().length_bytes,
        5 << 20,
        "a write behind the end grows the file"
    );
    assert!(
        read(&*storage, 4096, 4096)
            .await
            .iter()
            .all(|byte| *byte == 0)
    );
    storage.sync().await.expect("flushed");
}

async fn reads_behind_the_end(storage: Rc<dyn Storage>) {
    write(&*storage, 0, pattern(0, 4096, 1)).await;
    let bytes = read(&*storage, 0, 12_288).await;
    assert!(bytes[..4096] == *pattern(0, 4096, 1).as_slice());
    assert!(
        bytes[4096..].iter().all(|byte| *byte == 0),
        "behind the end is zeroes"
    );
    assert!(
        read(&*storage, 1 << 30, 4096)
            .await
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(storage.facts().length_bytes, 4096, "reading grows nothing");
}

async fn zeroes(storage: Rc<dyn Storage>) {
    for may_unmap in [false, true] {
        write(&*storage, 0, pattern(0, 1 << 20, 2)).await;
        let mode = ZeroMode {
            may_unmap,
            no_fallback: false,
        };
        storage
            .zero(ByteRange::new(65536, 131_072), mode)
            .await
            .expect("zeroed");
        let bytes = read(&*storage, 0, 1 << 20).await;
        let expected = pattern(0, 1 << 20, 2);
        assert!(bytes[..65536] == expected.as_slice()[..65536]);
        assert!(bytes[65536..196_608].iter().all(|byte| *byte == 0));
        assert!(bytes[196_608..] == expected.as_slice()[196_608..]);
        let end = (2 << 20) + if may_unmap { 8192 } else { 4096 };
        storage
            .zero(ByteRange::between(2 << 20, end), mode)
            .await
            .expect("zeroed");
        assert_eq!(
            storage.facts().length_bytes,
            end,
            "zeroes behind the end grow the file"
        );
    }
}

async fn discards(storage: Rc<dyn Storage>) {
    write(&*storage, 0, pattern(0, 1 << 20, 3)).await;
    storage
        .discard(ByteRange::new(65536, 65536))
        .await
        .expect("discarded");
    let bytes = read(&*storage, 0, 1 << 20).await;
    let expected = pattern(0, 1 << 20, 3);
    let inside = &bytes[65536..131_072];
    assert!(
        inside.iter().all(|byte| *byte == 0) || *inside == expected.as_slice()[65536..131_072],
        "zeroes or unchanged, nothing else"
    );
    assert!(bytes[..65536] == expected.as_slice()[..65536]);
    assert!(bytes[131_072..] == expected.as_slice()[131_072..]);
    storage
        .discard(ByteRange::new(0, u64::MAX))
        .await
        .expect("cut at the end");
    assert_eq!(storage.facts().length_bytes, 1 << 20);
}

async fn lengths(storage: Rc<dyn Storage>) {
    storage.resize(1 << 20).await.expect("grown");
    write(&*storage, 0, pattern(0, 1 << 20, 4)).await;
    storage.resize(65536).await.expect("shrunk");
    assert_eq!(storage.facts().length_bytes, 65536);
    storage.resize(1 << 20).await.expect("grown again");
    let bytes = read(&*storage, 0, 1 << 20).await;
    assert!(bytes[..65536] == *pattern(0, 65536, 4).as_slice());
    assert!(
        bytes[65536..].iter().all(|byte| *byte == 0),
        "what was cut off is gone"
    );
}

async fn allocation(storage: Rc<dyn Storage>) {
    storage.resize(8 << 20).await.expect("grown");
    write(&*storage, 2 << 20, pattern(2 << 20, 1 << 20, 5)).await;
    let all = ByteRange::new(0, 16 << 20);
    let extents = storage.allocation(all, 100).await.expect("mapped");
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.range.offset(), at, "no gap: {extents:?}");
        at = extent.range.end();
    }
    assert_eq!(at, all.end());
    assert!(
        extents.windows(2).all(|pair| pair[0].data != pair[1].data),
        "{extents:?}"
    );
    let written = ByteRange::new(2 << 20, 1 << 20);
    for extent in extents.iter().filter(|extent| !extent.data) {
        assert!(
            !extent.range.overlaps(&written),
            "data called a hole: {extents:?}"
        );
    }
    assert_eq!(storage.allocation(all, 1).await.expect("mapped").len(), 1);
}

async fn preallocation(storage: Rc<dyn Storage>) {
    for (how, start) in [
        (Preallocation::Off, 0),
        (Preallocation::Falloc, 1 << 20),
        (Preallocation::Full, 2 << 20),
    ] {
        let range = ByteRange::new(start, 1 << 20);
        match storage.preallocate(range, how).await {
            Ok(()) => assert_eq!(storage.facts().length_bytes, range.end()),
            Err(error) => assert!(
                error.is_unsupported() && how == Preallocation::Falloc,
                "{error}"
            ),
        }
        assert!(
            read(&*storage, start, 1 << 20)
                .await
                .iter()
                .all(|byte| *byte == 0)
        );
    }
    write(&*storage, 0, pattern(0, 4096, 6)).await;
    if storage
        .preallocate(ByteRange::new(0, 8192), Preallocation::Falloc)
        .await
        .is_ok()
    {
        assert!(
            read(&*storage, 0, 4096).await == pattern(0, 4096, 6).as_slice(),
            "data stays"
        );
    }
}

async fn many_at_once(storage: Rc<dyn Storage>) {
    const COUNT: u64 = 64;
    const PIECE: usize = 128 << 10;
    let writes = (0..COUNT).map(|index| {
        let offset = index * PIECE as u64;
        storage.write(offset, pattern(offset, PIECE, index as u8))
    });
    for transfer in all(writes.collect()).await {
        transfer.outcome.expect("written");
    }
    let reads = (0..COUNT).map(|index| storage.read(index * PIECE as u64, Buffer::zeroed(PIECE)));
    for (index, transfer) in all(reads.collect()).await.into_iter().enumerate() {
        transfer.outcome.expect("read");
        let expected = pattern((index * PIECE) as u64, PIECE, index as u8);
        assert!(
            transfer.buffer.as_slice() == expected.as_slice(),
            "piece {index}"
        );
    }
}

async fn abandoned_futures(storage: Rc<dyn Storage>) {
    write(&*storage, 0, pattern(0, 1 << 20, 7)).await;
    for _ in 0..32 {
        let mut abandoned = storage.read(0, Buffer::zeroed(1 << 20));
        poll_once(&mut abandoned).await;
        drop(abandoned);
    }
    assert!(read(&*storage, 0, 1 << 20).await == pattern(0, 1 << 20, 7).as_slice());
    storage.sync().await.expect("flushed");
}

async fn misaligned_requests(storage: Rc<dyn Storage>) {
    let alignment = u64::from(storage.facts().request_alignment);
    if alignment == 1 {
        return;
    }
    let transfer = storage.write(1, pattern(1, 512, 8)).await;
    assert_eq!(transfer.outcome.expect_err("misaligned").errno, EINVAL);
    let transfer = storage.read(0, Buffer::zeroed(511)).await;
    assert_eq!(transfer.outcome.expect_err("misaligned").errno, EINVAL);
}

async fn any_alignment(storage: Rc<dyn Storage>) {
    let mut model = vec![0_u8; 64 << 10];
    storage.resize(model.len() as u64).await.expect("grown");
    let mut seed = 12_345_u64;
    let mut next = |limit: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % limit
    };
    for round in 0..200 {
        let offset = next(model.len());
        let length = 1 + next((model.len() - offset).min(9000));
        let here = offset..offset + length;
        match next(4) {
            0 => {
                let range = ByteRange::new(offset as u64, length as u64);
                storage
                    .zero(range, ZeroMode::default())
                    .await
                    .expect("zeroed");
                model[here].fill(0);
            }
            1 => {
                let bytes = read(&*storage, offset as u64, length).await;
                assert!(bytes == model[here], "round {round}");
            }
            _ => {
                let bytes = pattern(offset as u64, length, round as u8);
                model[here].copy_from_slice(bytes.as_slice());
                write(&*storage, offset as u64, bytes).await;
            }
        }
    }
    // Neighbours in one block, written at once, must not undo each other.
    let writes = (0..32_usize).map(|index| {
        let bytes = pattern(index as u64 * 100, 100, index as u8);
        model[index * 100..index * 100 + 100].copy_from_slice(bytes.as_slice());
        storage.write(index as u64 * 100, bytes)
    });
    for transfer in all(writes.collect()).await {
        transfer.outcome.expect("written");
    }
    assert!(read(&*storage, 0, model.len()).await == model);
}

/// Ends with all results, in order, after polling all futures side by side.
async fn all<T>(mut futures: Vec<LocalFuture<'_, T>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let std::task::Poll::Ready(value) = Pin::new(future).poll(cx)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

async fn poll_once<T>(future: &mut LocalFuture<'_, T>) {
    std::future::poll_fn(|cx| {
        let _ = future.as_mut().poll(cx);
        std::task::Poll::Ready(())
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::memory::MemoryStorage;

    fn block_on(mut future: LocalFuture<'_, ()>) {
        let mut cx = Context::from_waker(Waker::noop());
        while future.as_mut().poll(&mut cx) == Poll::Pending {}
    }

    #[test]
    fn memory() {
        run(&|| Rc::new(MemoryStorage::new(0)), &block_on);
    }

    #[test]
    fn memory_that_takes_whole_blocks_only() {
        for alignment in [512, 4096] {
            run(
                &|| Rc::new(MemoryStorage::new(0).with_alignment(alignment)),
                &block_on,
            );
        }
    }
}
