//! The scenarios that drive one node, without a job and without an export: `qemu-img bench` on one side, the engine's node
//! (`engine/examples/node_io.rs`) on the other, with the same requests in the same order.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::Failure;
use crate::case::EXT4;
use crate::data;
use crate::example;
use crate::image::{Format, Image, runs_in_mixed_order};
use crate::node_report::{Access, DEPTH, NodeResult, NodeRun, REQUEST_BYTES};
use crate::options::{Contestant, Options, Scenario, Side};
use crate::place::Place;
use crate::process::run as run_program;

/// What each written byte is.
const PATTERN: u8 = 165;

/// Largest step that qemu-img takes.
const STEP_BYTES_MAX: u64 = i32::MAX as u64;

/// What a scenario stands on.
struct Bench {
    scenario: Scenario,
    place: Place,
    source: Image,
    size_bytes: u64,
    /// The program that drives a node of ours; needed only where that takes part.
    node_io: Option<PathBuf>,
}

/// Runs one scenario with every access.
///
/// # Errors
/// The place cannot be made, a program fails, or the sides have not written the same.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<NodeResult>, Failure> {
    let bench = prepare(options, scenario)?;
    let accesses = match scenario {
        Scenario::RawNode => &[Access::Read, Access::Write][..],
        _ => &[Access::Read, Access::Write, Access::WriteNew],
    };
    accesses
        .iter()
        .map(|&access| bench.measure(options, access))
        .collect()
}

fn prepare(options: &Options, scenario: Scenario) -> Result<Bench, Failure> {
    let node_io = match options.sides.contains(&Side::Blockyard) {
        true => Some(example::built("blockyard-engine", "node_io")?),
        false => None,
    };
    let size_bytes = options.size_mib << 20;
    // The source, the image written to, and what the first run has made of it.
    let place = Place::loop_over_tmpfs(&EXT4, 3 * size_bytes + (512 << 20))?;
    let raw = Image {
        path: place.path("source.img"),
        format: Format::Raw,
    };
    data::fill_with_noise(&raw.path, size_bytes, 1)?;
    let source = match scenario {
        Scenario::RawNode => raw,
        _ => {
            let source = Image {
                path: place.path("source.qcow2"),
                format: Format::Qcow2,
            };
            source.create_in_order(size_bytes, &raw, &runs_in_mixed_order(size_bytes))?;
            fs::remove_file(&raw.path).map_err(|error| Failure::at(&raw.path, &error))?;
            source
        }
    };
    Ok(Bench {
        scenario,
        place,
        source,
        size_bytes,
        node_io,
    })
}

impl Bench {
    fn measure(&self, options: &Options, access: Access) -> Result<NodeResult, Failure> {
        let blocks = self.size_bytes / REQUEST_BYTES;
        let step_bytes = step_bytes(blocks);
        let requests = match access {
            // An empty image is empty once only.
            Access::WriteNew => u64::from(options.requests).min(blocks),
            _ => u64::from(options.requests),
        };
        let mut result = NodeResult {
            scenario: self.scenario,
            access,
            place: self.place.description().to_owned(),
            requests,
            step_bytes,
            runs: options
                .contestants()
                .into_iter()
                .filter(|contestant| contestant.side != Side::Limit)
                .map(|contestant| (contestant, Vec::new()))
                .collect(),
        };
        let reference = self.image("reference");
        let mut is_first = true;
        for _ in 0..options.rounds {
            for (contestant, runs) in &mut result.runs {
                let name = format!("{} {}", contestant.name(), access.name());
                let image = self.image_for(access)?;
                let run = self.drive(contestant, &image, access, requests, step_bytes);
                let run = run.map_err(|error| error.about(&name))?;
                eprintln!(
                    "  {} {name}: {:.3} s, {:.2} CPU s",
                    self.scenario.name(),
                    run.wall_seconds,
                    run.cpu_seconds
                );
                runs.push(run);
                if access == Access::Read {
                    continue;
                }
                image.require_sound().map_err(|error| error.about(&name))?;
                if std::mem::take(&mut is_first) {
                    fs::rename(&image.path, &reference.path)
                        .map_err(|error| Failure::at(&reference.path, &error))?;
                } else {
                    image
                        .require_equal(&reference)
                        .map_err(|error| error.about(&name))?;
                }
            }
        }
        Ok(result)
    }

    fn drive(
        &self,
        contestant: &Contestant,
        image: &Image,
        access: Access,
        requests: u64,
        step_bytes: u64,
    ) -> Result<NodeRun, Failure> {
        let mut command = match (contestant.side, &self.node_io) {
            (Side::Blockyard, Some(program)) => Command::new(program),
            _ => qemu_img_bench(contestant),
        };
        // Both spell these the same.
        command.args(["-f", image.format.name(), "-c", &requests.to_string()]);
        command.args(["-d", &DEPTH.to_string(), "-s", &REQUEST_BYTES.to_string()]);
        command.args(["-S", &step_bytes.to_string()]);
        if access != Access::Read {
            command.args(["-w", &format!("--pattern={PATTERN}")]);
        }
        let ended = run_program(command.arg(&image.path))?;
        let wall_seconds = match contestant.side {
            Side::Qemu => seconds_of_qemu(&ended.output),
            _ => seconds_of_blockyard(&ended.output),
        };
        Ok(NodeRun {
            wall_seconds: wall_seconds?,
            cpu_seconds: ended.cpu_seconds,
        })
    }

    fn image(&self, name: &str) -> Image {
        Image {
            path: self.place.path(name),
            format: self.source.format,
        }
    }

    /// The image that a run goes to, in the same state each time.
    fn image_for(&self, access: Access) -> Result<Image, Failure> {
        let image = match access {
            Access::Read => self.source.clone(),
            _ => self.image("written"),
        };
        match access {
            Access::Read => {}
            Access::Write => {
                fs::copy(&self.source.path, &image.path)
                    .map_err(|error| Failure::at(&image.path, &error))?;
            }
            Access::WriteNew => image.create(self.size_bytes, &[])?,
        }
        self.source.leave_page_cache()?;
        image.leave_page_cache()?;
        Ok(image)
    }
}

/// From one request to the next: past all others before any comes again, each far from the one before.
fn step_bytes(blocks: u64) -> u64 {
    let golden = (blocks as f64 * 0.618_034) as u64;
    let mut step = golden.clamp(1, STEP_BYTES_MAX / REQUEST_BYTES / 2);
    while divisor(step, blocks) != 1 {
        step += 1;
    }
    step * REQUEST_BYTES
}

/// The greatest common one.
fn divisor(one: u64, other: u64) -> u64 {
    if other == 0 {
        one
    } else {
        divisor(other, one % other)
    }
}

fn qemu_img_bench(contestant: &Contestant) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-t", "none"]);
    if let Some(aio) = &contestant.aio {
        command.args(["-i", aio]);
    }
    command
}

/// "Run completed in 1.726 seconds."
fn seconds_of_qemu(output: &str) -> Result<f64, Failure> {
    output
        .lines()
        .find_map(|line| line.strip_prefix("Run completed in "))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| Failure::new(format!("qemu-img bench said no time: {output}")))
}

fn seconds_of_blockyard(output: &str) -> Result<f64, Failure> {
    let figures: Value = serde_json::from_str(output)
        .map_err(|error| Failure::new(format!("node_io: {error}: {output}")))?;
    figures["wall_seconds"]
        .as_f64()
        .ok_or_else(|| Failure::new(format!("node_io said no time: {output}")))
}
