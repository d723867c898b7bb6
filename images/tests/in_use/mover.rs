//! [`Mover`]: what a node does with an image: moves the guest's bytes as it maps them and fills edges from what is below.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::compressed::ClusterCodec;
use blockyard_images::qcow2::fill::Filling;
use blockyard_images::qcow2::units::{Geometry, GuestCluster};
use blockyard_images::qcow2::{Qcow2, Source, WritePlan, ZeroRequest, Zeroing};
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, Operation, StorageError};

/// An image and what is below it.
#[derive(Clone)]
pub(crate) struct Mover {
    pub(crate) image: Rc<Qcow2>,
    /// The bytes of the backing file, zeroes behind them; `None`: there is none.
    pub(crate) below: Option<Rc<Vec<u8>>>,
    /// Leaves zeroes out where nothing but zeroes is known to be.
    pub(crate) skips_zeroes: bool,
    codec: Rc<RefCell<ClusterCodec>>,
}

impl Mover {
    pub(crate) fn new(image: Rc<Qcow2>, below: Option<Rc<Vec<u8>>>, skips_zeroes: bool) -> Self {
        Self {
            image,
            below,
            skips_zeroes,
            codec: Rc::default(),
        }
    }

    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn below_at(&self, range: ByteRange) -> Vec<u8> {
        let mut bytes = vec![0; range.length() as usize];
        if let Some(below) = &self.below {
            let visible = range.clamp_end(below.len() as u64);
            let from = visible.offset() as usize..visible.end() as usize;
            bytes[..from.len()].copy_from_slice(&below[from]);
        }
        bytes
    }

    /// Reads any range, also behind the end of the disk.
    pub(crate) async fn read(&self, range: ByteRange) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let extent = match self.image.map_now(rest) {
                Some(extent) => extent?,
                None => self.image.map(rest).await?,
            };
            let length = extent.range.length() as usize;
            assert!(length > 0 && extent.range.offset() == rest.offset());
            assert!(extent.range.length() <= rest.length());
            match extent.source {
                Source::Data { at } => {
                    let storage = self.image.data_storage();
                    let read = storage.read(at.0, Buffer::zeroed(length)).await;
                    read.outcome?;
                    bytes.extend_from_slice(read.buffer.as_slice());
                }
                Source::Zero { .. } => bytes.resize(bytes.len() + length, 0),
                Source::Unallocated => bytes.extend(self.below_at(extent.range)),
                Source::Compressed(place) => {
                    let stream = Buffer::zeroed(place.length_bytes as usize);
                    let read = self.image.file().read(place.at.0, stream).await;
                    read.outcome?;
                    let cluster_bytes = self.geometry().cluster_bytes();
                    let mut cluster = vec![0; cluster_bytes as usize];
                    let compression = self.image.header().compression;
                    let mut codec = self.codec.borrow_mut();
                    let stream = read.buffer.as_slice();
                    if codec.decompress(compression, stream, &mut cluster).is_err() {
                        return Err(StorageError::new(Operation::Read, extent.range, EIO).into());
                    }
                    let skip = (extent.range.offset() % cluster_bytes) as usize;
                    bytes.extend_from_slice(&cluster[skip..skip + length]);
                }
            }
            rest = rest.split_at(extent.range.length()).1;
        }
        Ok(bytes)
    }

    pub(crate) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let mut rest = ByteRange::new(offset, bytes.len() as u64);
        let of = |range: ByteRange| {
            &bytes[(range.offset() - offset) as usize..(range.end() - offset) as usize]
        };
        while !rest.is_empty() {
            let now = self.image.prepare_write_now(rest);
            let plan = match now {
                Some(in_place) => WritePlan::InPlace(in_place),
                None => self.image.prepare_write(rest).await?,
            };
            let taken = match plan {
                WritePlan::InPlace(place) => {
                    let range = place.range();
                    let from = Buffer::copy_of(of(range));
                    let written = self.image.data_storage().write(place.at().0, from).await;
                    place.done();
                    written.outcome?;
                    range
                }
                WritePlan::Allocate(reservation) => {
                    let range = reservation.range();
                    let (before, after) = (reservation.fill_before(), reservation.fill_after());
                    let mut all = match self.read(before).await {
                        Ok(all) => all,
                        Err(error) => {
                            reservation.give_back();
                            return Err(error);
                        }
                    };
                    all.extend_from_slice(of(range));
                    match self.read(after).await {
                        Ok(after) => all.extend(after),
                        Err(error) => {
                            reservation.give_back();
                            return Err(error);
                        }
                    }
                    let mut at = reservation.at_of(before.offset()).0;
                    let mut all = &all[..];
                    if self.skips_zeroes && reservation.reads_zero() {
                        let skip = all.iter().take_while(|byte| **byte == 0).count();
                        let skip = skip.min(before.length() as usize);
                        all = &all[skip..];
                        at += skip as u64;
                    }
                    let storage = self.image.data_storage();
                    let written = storage.write(at, Buffer::copy_of(all)).await;
                    if let Err(error) = written.outcome {
                        reservation.give_back();
                        return Err(error.into());
                    }
                    self.image.publish(reservation).await?;
                    range
                }
            };
            assert!(!taken.is_empty() && taken.offset() == rest.offset());
            rest = rest.split_at(taken.length()).1;
        }
        Ok(())
    }

    /// Writes whole clusters compressed, those as they are that it does not make shorter. What lies behind the end of the disk
    /// is zeroes.
    pub(crate) async fn write_compressed(
        &self,
        first: GuestCluster,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let cluster_bytes = self.geometry().cluster_bytes() as usize;
        let compression = self.image.header().compression;
        let mut run: Vec<Vec<u8>> = Vec::new();
        let mut next = first;
        for cluster in bytes.chunks(cluster_bytes) {
            let mut whole = cluster.to_vec();
            whole.resize(cluster_bytes, 0);
            let mut stream = vec![0; cluster_bytes - 1];
            let length = self
                .codec
                .borrow_mut()
                .compress(compression, &whole, &mut stream);
            match length {
                Some(length) => {
                    stream.truncate(length);
                    run.push(stream);
                }
                None => {
                    self.write_streams(next, &run).await?;
                    run.clear();
                    let offset = self.geometry().guest_offset(next).0;
                    self.write(offset, cluster).await?;
                }
            }
            next = GuestCluster(next.0 + 1);
        }
        self.write_streams(next, &run).await
    }

    /// Writes compressed clusters, the last of which is before `end`.
    async fn write_streams(
        &self,
        end: GuestCluster,
        streams: &[Vec<u8>],
    ) -> Result<(), ImageError> {
        if streams.is_empty() {
            return Ok(());
        }
        let first = GuestCluster(end.0 - streams.len() as u64);
        let lengths: Vec<u64> = streams.iter().map(|stream| stream.len() as u64).collect();
        let reservation = self.image.prepare_compressed(first, &lengths).await?;
        for run in reservation.runs() {
            let bytes = streams[run.clusters].concat();
            assert_eq!(bytes.len() as u64, run.length_bytes);
            let from = Buffer::copy_of(&bytes);
            let written = self.image.file().write(run.at.0, from).await;
            if let Err(error) = written.outcome {
                reservation.give_back();
                return Err(error.into());
            }
        }
        self.image.publish_compressed(reservation).await
    }

    pub(crate) async fn zero(&self, range: ByteRange, may_unmap: bool) -> Result<(), ImageError> {
        let mut rest = range;
        while !rest.is_empty() {
            let touched = rest.align_outward(self.geometry().subcluster_bytes());
            let zero_below = self.below_at(touched).iter().all(|byte| *byte == 0);
            let request = ZeroRequest {
                range: rest,
                may_unmap,
                zero_below,
            };
            let done = match self.image.zero(request).await? {
                Zeroing::Done(done) => done,
                Zeroing::Write(piece) => {
                    self.write(piece.offset(), &vec![0; piece.length() as usize])
                        .await?;
                    piece
                }
            };
            assert!(!done.is_empty() && done.offset() == rest.offset());
            assert!(done.end() <= rest.end());
            rest = rest.split_at(done.length()).1;
        }
        Ok(())
    }

    /// Puts what is below into the image where that holds nothing; runs of zeroes without data, if `by_zeroes`.
    pub(crate) async fn fill(&self, range: ByteRange, by_zeroes: bool) -> Result<(), ImageError> {
        let unit = self.geometry().subcluster_bytes();
        let mut rest = range
            .align_outward(unit)
            .clamp_end(self.image.length_bytes());
        while !rest.is_empty() {
            let front = if by_zeroes {
                rest.split_at(unit).0
            } else {
                rest
            };
            if by_zeroes
                && self.below_at(front).iter().all(|byte| *byte == 0)
                && let Zeroing::Done(done) = self.image.fill_zeroes(front).await?
            {
                assert!(!done.is_empty() && done.offset() == rest.offset());
                rest = rest.split_at(done.length()).1;
                continue;
            }
            let filled = match self.image.prepare_fill(front).await? {
                Filling::Held(held) => held,
                Filling::Room(room) => {
                    // A cluster that others have too is left as a whole.
                    let (before, after) = (room.fill_before(), room.fill_after());
                    let whole = async {
                        let mut bytes = self.read(before).await?;
                        bytes.extend(self.below_at(room.range()));
                        bytes.extend(self.read(after).await?);
                        let at = room.at_of(before.offset()).0;
                        let storage = self.image.data_storage();
                        storage.write(at, Buffer::copy_of(&bytes)).await.outcome?;
                        Ok(())
                    };
                    if let Err(error) = whole.await {
                        room.give_back();
                        return Err(error);
                    }
                    let range = room.range();
                    self.image.publish(room).await?;
                    range
                }
            };
            assert!(!filled.is_empty() && filled.offset() == rest.offset());
            rest = rest.split_at(filled.length()).1;
        }
        Ok(())
    }

    /// Whether the image itself says what `range` reads as.
    pub(crate) async fn holds(&self, range: ByteRange) -> Result<bool, ImageError> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.image.map(rest).await?;
            if extent.source == Source::Unallocated {
                return Ok(false);
            }
            rest = rest.split_at(extent.range.length()).1;
        }
        Ok(true)
    }

    pub(crate) async fn discard(&self, range: ByteRange) -> Result<(), ImageError> {
        self.image.discard(range, self.below.is_some()).await
    }
}
