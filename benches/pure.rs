//! `cargo bench --bench pure`: the parts without I/O that lie on a hot path, each on its own.

use std::hint::black_box;
use std::time::Duration;

use blockyard_engine::bitmap::{Bitmap, NodeBitmaps};
use blockyard_engine::clock::Moment;
use blockyard_engine::job::speed::RateLimit;
use blockyard_engine::node::zeroes::is_zero;
use blockyard_qmp::commands;
use blockyard_qmp::wire::document::{Document, Json};
use blockyard_qmp::wire::output::render;
use blockyard_qmp::wire::reader::Reader;
use blockyard_storage::ByteRange;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;

const MIB: usize = 1 << 20;

criterion_group!(
    benches,
    qmp_input,
    qmp_output,
    qmp_commands,
    copying,
    marking
);
criterion_main!(benches);

fn qmp_input(criterion: &mut Criterion) {
    let element = r#"{"driver": "raw", "size": 1048576, "on": true, "name": "disk-1"}"#;
    let inputs = [
        (
            "one long string",
            format!("\"{}\"", "abcdefghijklmnop".repeat(MIB / 16)),
        ),
        (
            "small objects",
            format!("[{}]", vec![element; MIB / element.len()].join(", ")),
        ),
        (
            "stream of commands",
            "{\"execute\": \"query-version\"}\n".repeat(MIB / 29),
        ),
        ("escapes", format!("\"{}\"", r"\u00e4\n".repeat(MIB / 8))),
        ("junk", "\u{1}{]}[".repeat(MIB / 5)),
    ];
    let mut group = criterion.benchmark_group("qmp input");
    for (name, text) in &inputs {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                let mut reader = Reader::default();
                for piece in text.as_bytes().chunks(64 << 10) {
                    let mut piece = piece;
                    while let Some(value) = reader.next(&mut piece) {
                        let _ = black_box(value);
                    }
                }
            });
        });
    }
    group.finish();
}

fn qmp_output(criterion: &mut Criterion) {
    let job = json!({"id": "copy", "type": "backup", "status": "running",
        "current-progress": 1_073_741_824, "total-progress": 8_589_934_592_u64});
    let reply = json!({"return": vec![job; 100], "id": "a \"quoted\" id"});
    let mut group = criterion.benchmark_group("qmp output");
    group.throughput(Throughput::Bytes(render(&reply, false).len() as u64));
    group.bench_function("query-jobs of 100", |bencher| {
        bencher.iter(|| render(black_box(&reply), false));
    });
    group.finish();
}

fn qmp_commands(criterion: &mut Criterion) {
    let arguments = json!({"node-name": "disk", "driver": "raw", "file": {"driver": "file",
        "filename": "disk.img", "cache": {"direct": true}, "aio": "io_uring"}});
    let document = Document::from(&arguments);
    let Json::Object(arguments) = document.root() else {
        unreachable!("it is an object")
    };
    let mut group = criterion.benchmark_group("qmp commands");
    group.bench_function("blockdev-add to a request", |bencher| {
        bencher.iter(|| commands::read("blockdev-add", black_box(arguments)));
    });
    group.finish();
}

fn copying(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("copying");
    let zeroes = vec![0; MIB];
    group.throughput(Throughput::Bytes(MIB as u64));
    group.bench_function("zero detection in 1 MiB of zeroes", |bencher| {
        bencher.iter(|| is_zero(black_box(&zeroes)));
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("rate limit, one request", |bencher| {
        let mut limit = RateLimit::new(1 << 40);
        let mut now = Moment::default();
        bencher.iter(|| {
            now = now.after(Duration::from_micros(1));
            if limit.wait_until(now).is_none() {
                limit.charge(black_box(1 << 20));
            }
        });
    });
    group.finish();
}

/// What a write of 4 KiB has to do with the bitmaps of its disk, here of 512 MiB: as in the scenario `marking` of the other bench.
fn marking(criterion: &mut Criterion) {
    const DISK_BYTES: u64 = 512 << 20;
    const WRITE_BYTES: u64 = 4 << 10;
    /// Odd and in no relation to the disk: each block comes once before any comes again.
    const STRIDE_BLOCKS: u64 = 81_001;
    let mut group = criterion.benchmark_group("marking");
    group.throughput(Throughput::Elements(1));
    for (name, granularity_bytes) in [
        ("no bitmap", None),
        ("granules of 64 KiB", Some(64 << 10)),
        ("granules of 4 KiB", Some(4 << 10)),
    ] {
        let bitmaps = NodeBitmaps::default();
        if let Some(granularity_bytes) = granularity_bytes {
            let bitmap = Bitmap::new("changes".to_owned(), DISK_BYTES, granularity_bytes);
            bitmaps.add(bitmap).expect("the first one of its name");
        }
        let mut block = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                block = (block + STRIDE_BLOCKS) % (DISK_BYTES / WRITE_BYTES);
                let range = ByteRange::new(black_box(block) * WRITE_BYTES, WRITE_BYTES);
                if black_box(&bitmaps).record() {
                    bitmaps.mark(range, DISK_BYTES);
                }
            });
        });
    }
    group.finish();
}
