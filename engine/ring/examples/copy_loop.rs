//! The limit a copy job is held against: a plain io_uring copy of one file onto another and nothing else.
//!
//! One thread, one ring, registered files and buffers, a fixed number of chunks in flight, `fdatasync` at the end.
//! No job, no node, no progress, no holes. Prints one line of JSON. `copy_loop SRC DST [--direct] [--chunk-kib N]
//! [--depth N]`; the target must exist and be as long as the source, as in the measured jobs.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::time::Instant;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// Alignment of the buffers in bytes: enough for direct I/O on every block size in use.
const ALIGNMENT_BYTES: usize = 4096;
/// Mark of the final `fdatasync` among the completions.
const SYNC: u64 = u64::MAX;

/// What to copy and how.
struct Options {
    source: String,
    target: String,
    direct: bool,
    chunk_bytes: usize,
    depth: usize,
}

/// What one buffer is doing.
#[derive(Clone, Copy)]
enum Slot {
    Idle,
    Reading {
        offset: u64,
        length: usize,
    },
    Writing {
        offset: u64,
        length: usize,
        done: usize,
    },
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("copy_loop: {error}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("copy_loop: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let (mut names, mut direct, mut chunk_kib, mut depth) = (Vec::new(), false, 1024usize, 16usize);
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut number = |name: &str, max: usize| -> Result<usize, String> {
            let text = arguments.next().ok_or(format!("{name} needs a number"))?;
            let value = text
                .parse()
                .map_err(|_| format!("{name}: '{text}' is not a number"))?;
            match value {
                1.. if value <= max => Ok(value),
                _ => Err(format!("{name} must be between 1 and {max}")),
            }
        };
        match argument.as_str() {
            "--direct" => direct = true,
            "--chunk-kib" => chunk_kib = number("--chunk-kib", 65536)?,
            "--depth" => depth = number("--depth", 256)?,
            _ => names.push(argument),
        }
    }
    let [source, target] =
        <[String; 2]>::try_from(names).map_err(|_| "give a source and a target")?;
    Ok(Options {
        source,
        target,
        direct,
        chunk_bytes: chunk_kib << 10,
        depth,
    })
}

/// Opens, copies, syncs; returns the line of JSON with the figures of the copy alone (opening and set-up excluded).
fn run(options: &Options) -> io::Result<String> {
    let flags = if options.direct { libc::O_DIRECT } else { 0 };
    let source = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&options.source)?;
    let target = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(&options.target)?;
    let length_bytes = source.metadata()?.len();
    let mut buffers = Buffers::new(options.depth, options.chunk_bytes);
    let mut ring = open_ring(options.depth)?;
    // SAFETY: the buffers live until the end of this function, the ring is dropped before them and the copy below
    // returns only when no operation is in flight.
    unsafe { ring.submitter().register_buffers(&buffers.iovecs())? };
    ring.submitter()
        .register_files(&[source.as_raw_fd(), target.as_raw_fd()])?;

    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    let outcome = copy(&mut ring, &mut buffers, length_bytes, options.chunk_bytes);
    let (wall, cpu) = (began.elapsed(), cpu_seconds()? - cpu);
    drop(ring);
    outcome?;
    Ok(format!(
        "{{\"bytes\":{length_bytes},\"wall_seconds\":{:.6},\"cpu_seconds\":{cpu:.6},\"peak_kib\":{}}}",
        wall.as_secs_f64(),
        peak_kib()?
    ))
}

fn open_ring(depth: usize) -> io::Result<IoUring> {
    let entries = u32::try_from(depth.next_power_of_two()).map_err(io::Error::other)?;
    IoUring::<squeue::Entry, cqueue::Entry>::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries)
        .or_else(|_| IoUring::new(entries))
}

/// Keeps every buffer busy until the whole length is copied, then syncs the target. Errors end the copy after what is
/// in flight has come back.
fn copy(
    ring: &mut IoUring,
    buffers: &mut Buffers,
    length_bytes: u64,
    chunk_bytes: usize,
) -> io::Result<()> {
    let mut slots = vec![Slot::Idle; buffers.count];
    let (mut next_offset, mut in_flight, mut failure) = (0u64, 0usize, None);
    let mut free: Vec<usize> = (0..slots.len()).collect();
    loop {
        while failure.is_none() && next_offset < length_bytes {
            let Some(index) = free.pop() else { break };
            let left = usize::try_from(length_bytes - next_offset).unwrap_or(usize::MAX);
            let length = chunk_bytes.min(left);
            slots[index] = Slot::Reading {
                offset: next_offset,
                length,
            };
            push(ring, &read_entry(buffers, index, next_offset, chunk_bytes));
            next_offset += length as u64;
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        ring.submit_and_wait(1)?;
        let completions: Vec<(u64, i32)> = ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (index, result) in completions {
            let index = usize::try_from(index).map_err(io::Error::other)?;
            let step = advance(slots[index], result);
            match step {
                Ok(Slot::Idle) => {
                    free.push(index);
                    in_flight -= 1;
                }
                Ok(
                    next @ Slot::Writing {
                        offset,
                        length,
                        done,
                    },
                ) => {
                    slots[index] = next;
                    push(ring, &write_entry(buffers, index, offset, length, done));
                }
                Ok(Slot::Reading { .. }) => unreachable!("a completion never starts a read"),
                Err(error) => {
                    in_flight -= 1;
                    failure.get_or_insert(error);
                }
            }
        }
    }
    match failure {
        Some(error) => Err(error),
        None => sync(ring),
    }
}

/// What a buffer does after a completion: a read becomes a write, a short write goes on, a whole one is done.
fn advance(slot: Slot, result: i32) -> io::Result<Slot> {
    let moved = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
    match slot {
        Slot::Reading { offset, length } if moved == length => Ok(Slot::Writing {
            offset,
            length,
            done: 0,
        }),
        Slot::Reading { .. } => Err(io::Error::other("short read in the middle of the source")),
        Slot::Writing { .. } if moved == 0 => Err(io::ErrorKind::WriteZero.into()),
        Slot::Writing { length, done, .. } if done + moved >= length => Ok(Slot::Idle),
        Slot::Writing {
            offset,
            length,
            done,
        } => Ok(Slot::Writing {
            offset,
            length,
            done: done + moved,
        }),
        Slot::Idle => Err(io::Error::other("completion for an idle buffer")),
    }
}

fn sync(ring: &mut IoUring) -> io::Result<()> {
    let entry = opcode::Fsync::new(types::Fixed(1))
        .flags(types::FsyncFlags::DATASYNC)
        .build()
        .user_data(SYNC);
    push(ring, &entry);
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|entry| entry.result()) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("the ring lost the sync")),
    }
}

fn read_entry(buffers: &Buffers, index: usize, offset: u64, chunk_bytes: usize) -> squeue::Entry {
    let (start, slot) = buffers.slot(index);
    let length = u32::try_from(chunk_bytes).unwrap_or(u32::MAX);
    opcode::ReadFixed::new(types::Fixed(0), start, length, slot)
        .offset(offset)
        .build()
        .user_data(index as u64)
}

fn write_entry(
    buffers: &Buffers,
    index: usize,
    offset: u64,
    length: usize,
    done: usize,
) -> squeue::Entry {
    let (start, slot) = buffers.slot(index);
    let left = u32::try_from(length - done).unwrap_or(u32::MAX);
    opcode::WriteFixed::new(types::Fixed(1), start.wrapping_add(done), left, slot)
        .offset(offset + done as u64)
        .build()
        .user_data(index as u64)
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) {
    // SAFETY: every entry names a registered file and a registered buffer that outlives the ring; one entry per
    // buffer is in flight at a time.
    let pushed = unsafe { ring.submission().push(entry) };
    assert!(pushed.is_ok(), "the queue has an entry for each buffer");
}

/// The aligned memory of all chunks, freed when the ring is gone.
struct Buffers {
    start: *mut u8,
    layout: Layout,
    count: usize,
    chunk_bytes: usize,
}

impl Buffers {
    fn new(count: usize, chunk_bytes: usize) -> Buffers {
        let layout = Layout::from_size_align(count * chunk_bytes, ALIGNMENT_BYTES)
            .expect("bounded by the options");
        // SAFETY: the layout's size is at least one byte: depth and chunk are checked to be above zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Buffers {
            start,
            layout,
            count,
            chunk_bytes,
        }
    }

    fn slot(&self, index: usize) -> (*mut u8, u16) {
        assert!(index < self.count);
        (
            self.start.wrapping_add(index * self.chunk_bytes),
            u16::try_from(index).expect("at most 256 buffers"),
        )
    }

    fn iovecs(&self) -> Vec<libc::iovec> {
        (0..self.count)
            .map(|index| libc::iovec {
                iov_base: self.slot(index).0.cast(),
                iov_len: self.chunk_bytes,
            })
            .collect()
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

/// User and system time of this process so far, its io workers included.
fn cpu_seconds() -> io::Result<f64> {
    // SAFETY: all-zero is a value of this plain C struct.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a timespec of our own.
    match unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) } {
        0 => Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9),
        _ => Err(io::Error::last_os_error()),
    }
}

fn peak_kib() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmHWM:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .ok_or_else(|| io::Error::other("no VmHWM in /proc/self/status"))
}
