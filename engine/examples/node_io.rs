//! What one node can do: small requests at a fixed depth, without a job, an export or the wire.
//!
//! Opens an image as `blockdev-add` does, past the page cache, on one data thread, and keeps a number of requests in flight
//! on its node until all are answered. Spells its options, and places its requests, as `qemu-img bench` does: each begins a
//! step after the one before, round the end of the image. Prints one line of JSON; the time leaves opening, closing and the
//! last flush out.
//!
//! `node_io [-f FORMAT] [-c COUNT] [-d DEPTH] [-s BYTES] [-S STEP] [-w] [--pattern=BYTE] IMAGE`

use std::cell::Cell;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blockyard_engine::data::{DataContext, ThreadSet};
use blockyard_engine::engine::{BackendChoice, share_one_heap};
use blockyard_engine::graph::Graph;
use blockyard_engine::image_policy::ImagePolicy;
use blockyard_engine::limits::BUFFER_BUDGET_BYTES;
use blockyard_engine::node::Node;
use blockyard_engine::node::news::News;
use blockyard_engine::request::{
    CommonOptions, DriverSpec, FileSpec, NodeRef, NodeSpec, Qcow2Spec,
};
use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, BufferPool};
use futures_util::stream::{FuturesUnordered, StreamExt};

/// Name of the node.
const NODE: &str = "node";

/// What to ask of which image.
#[derive(Clone, Debug)]
struct Options {
    image: String,
    format: String,
    requests: u64,
    depth: u64,
    request_bytes: usize,
    step_bytes: u64,
    write: bool,
    pattern: u8,
}

/// Where the next request goes.
struct Course {
    left: Cell<u64>,
    offset: Cell<u64>,
    step_bytes: u64,
    length_bytes: u64,
}

fn main() -> ExitCode {
    share_one_heap();
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("node_io: {error}");
            return ExitCode::from(2);
        }
    };
    match run(options) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("node_io: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        image: String::new(),
        format: "raw".to_owned(),
        requests: 75_000,
        depth: 64,
        request_bytes: 4096,
        step_bytes: 0,
        write: false,
        pattern: 0,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        let number = |text: String, most: u64| match text.parse() {
            Ok(number) if number <= most => Ok(number),
            _ => Err(format!("'{text}' is not a number from 0 to {most}")),
        };
        let bytes_max = BUFFER_SLOT_BYTES as u64;
        match argument.as_str() {
            "-f" => options.format = value()?,
            "-c" => options.requests = number(value()?, u64::MAX)?,
            "-d" => options.depth = number(value()?, 1024)?.max(1),
            "-s" => {
                options.request_bytes = usize::try_from(number(value()?, bytes_max)?.max(512))
                    .map_err(|error| error.to_string())?;
            }
            "-S" => options.step_bytes = number(value()?, 1 << 62)?,
            "-w" => options.write = true,
            other => match other.strip_prefix("--pattern=") {
                Some(text) => {
                    options.pattern = u8::try_from(number(text.to_owned(), 255)?)
                        .map_err(|error| error.to_string())?;
                }
                None => options.image = argument,
            },
        }
    }
    match (options.image.as_str(), options.step_bytes) {
        ("", _) => Err("give an image".to_owned()),
        (_, 0) => {
            options.step_bytes = options.request_bytes as u64;
            Ok(options)
        }
        _ => Ok(options),
    }
}

/// Opens, asks, closes; returns the line of JSON.
fn run(options: Options) -> Result<String, String> {
    let pool = BufferPool::new(BUFFER_BUDGET_BYTES);
    let (news, _unread) = News::channel();
    let threads =
        ThreadSet::start(1, BackendChoice::Auto, pool, news).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|error| error.to_string())?;
    let requests = options.requests;
    let took = tokio::task::LocalSet::new().block_on(&runtime, measure(&threads, options))?;
    threads.end();
    Ok(format!(
        "{{\"requests\":{requests},\"wall_seconds\":{:.6}}}",
        took.as_secs_f64()
    ))
}

async fn measure(threads: &ThreadSet, options: Options) -> Result<Duration, String> {
    let graph = Graph::new(threads.clone(), ImagePolicy::default(), None);
    let text = |error: blockyard_engine::error::EngineError| error.to_string();
    graph.add(spec(&options)?).await.map_err(text)?;
    let id = graph.find(NODE).ok_or("the node is not there")?;
    let asked = threads.run(threads.choose(), move |context| {
        Box::pin(async move {
            let node = context.node(id).ok_or("the node is on another thread")?;
            ask_all(&context, node, &options).await
        })
    });
    let outcome = asked.await.map_err(text)?;
    let _ = graph.close_all(std::time::Duration::from_secs(30)).await;
    outcome
}

/// The image as `blockdev-add` would be asked to open it.
fn spec(options: &Options) -> Result<NodeSpec, String> {
    let common = CommonOptions {
        cache_direct: Some(true),
        read_only: Some(!options.write),
        ..CommonOptions::default()
    };
    let file = NodeRef::Inline(Box::new(NodeSpec {
        node_name: None,
        common,
        driver: DriverSpec::File(FileSpec {
            filename: options.image.clone().into(),
            ..FileSpec::default()
        }),
    }));
    let driver = match options.format.as_str() {
        "raw" => DriverSpec::Raw {
            file,
            offset: None,
            size: None,
        },
        "qcow2" => DriverSpec::Qcow2(Box::new(Qcow2Spec::over(file))),
        other => return Err(format!("no node for format '{other}'")),
    };
    Ok(NodeSpec {
        node_name: Some(NODE.to_owned()),
        common,
        driver,
    })
}

async fn ask_all(
    context: &Rc<DataContext>,
    node: Rc<dyn Node>,
    options: &Options,
) -> Result<Duration, String> {
    let length_bytes = node.facts().length_bytes;
    if length_bytes < options.request_bytes as u64 {
        return Err("the image is shorter than a request".to_owned());
    }
    let course = Rc::new(Course {
        left: Cell::new(options.requests),
        offset: Cell::new(0),
        step_bytes: options.step_bytes,
        length_bytes,
    });
    let lanes = FuturesUnordered::new();
    for _ in 0..options.depth {
        let mut buffer = context.pool().take(options.request_bytes).await;
        buffer.as_mut_slice().fill(options.pattern);
        let (node, course, write) = (node.clone(), course.clone(), options.write);
        lanes.push(async move {
            while let Some(offset) = course.next() {
                let transfer = match write {
                    true => node.write(offset, buffer).await,
                    false => node.read(offset, buffer).await,
                };
                transfer.outcome.map_err(|error| error.to_string())?;
                buffer = transfer.buffer;
            }
            Ok(())
        });
    }
    let began = Instant::now();
    let ended: Vec<Result<(), String>> = lanes.collect().await;
    let took = began.elapsed();
    ended.into_iter().collect::<Result<(), String>>()?;
    Ok(took)
}

impl Course {
    /// The offset of one more request.
    fn next(&self) -> Option<u64> {
        let left = self.left.get().checked_sub(1)?;
        self.left.set(left);
        let offset = self.offset.get();
        self.offset
            .set((offset + self.step_bytes) % self.length_bytes);
        Some(offset)
    }
}
