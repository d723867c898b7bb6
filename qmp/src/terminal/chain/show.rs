//! `blockyard chain`: the layers of an image as their headers name them, and what moving data between them would come to.

use std::collections::HashSet;
use std::path::PathBuf;

use blockyard_engine::images::ImageFormat;
use blockyard_engine::limits::CHAIN_LAYERS_MAX;
use blockyard_engine::reply::PlanView;
use blockyard_engine::request::{CommitSpec, NamedBy, PlannedJob, StreamSpec};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::replies;
use crate::size;
use crate::terminal::chain::told;
use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::check::report::indented;
use crate::terminal::command;
use crate::terminal::copy::ends::{Source, shown};
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend};
use crate::terminal::exit::Exit;
use crate::terminal::images::info::{Described, describe_named, describe_one, identity};
use crate::terminal::images::{Disk, sharing};

const NODE: &str = "image";

/// Arguments of `chain`.
#[derive(Args, Debug)]
pub struct ChainArguments {
    /// Image at the top of the chain
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Format of IMAGE; it is never guessed
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    format: Format,
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Show the layers only, not what a commit or a stream would move, which takes a look at all of their tables
    #[arg(long)]
    no_plans: bool,
    /// Look at the images although somebody may be writing to them. What is shown may not be so any more
    #[arg(long, short = 'U')]
    force_share: bool,
}

/// A chain as far as it goes.
struct Chain {
    layers: Vec<Described>,
    /// Why it does not go on, where it should.
    problem: Option<String>,
    /// What a commit of each layer into the one below would move.
    commits: Vec<PlanView>,
    /// What a stream of everything into the top would move.
    stream: Option<PlanView>,
}

/// Runs `chain`.
pub(crate) fn run(arguments: &ChainArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: true,
    });
    // A few small reads.
    let looked = command::run(IoBackend::Threads, display, async |embedded| {
        look(embedded, arguments).await
    });
    let (chain, display) = match looked {
        Ok(looked) => looked,
        Err(exit) => return exit,
    };
    for layer in &chain.layers {
        for finding in &layer.view.findings {
            display.error(&format!("warning: {}: {finding}", shown(&layer.path)));
        }
    }
    let is_json = arguments.json || arguments.output == Output::Json;
    display.result(&match is_json {
        true => indented(&chain.json()),
        false => chain.human(),
    });
    match &chain.problem {
        None => Exit::Success,
        Some(text) => {
            display.error(text);
            Exit::Failed
        }
    }
}

async fn look(embedded: &mut Embedded, arguments: &ChainArguments) -> Result<Chain, String> {
    let mut chain = walk(embedded, arguments).await?;
    if chain.problem.is_none() && chain.layers.len() > 1 && !arguments.no_plans {
        add_plans(embedded, arguments, &mut chain).await?;
    }
    Ok(chain)
}

/// Follows the headers. What is missing or goes round in circles is the end, and a problem.
async fn walk(embedded: &mut Embedded, arguments: &ChainArguments) -> Result<Chain, String> {
    let top = &arguments.image;
    let format = match Source::open(top)?.looks_like()? {
        Some("qcow2") => arguments.format.into(),
        // A raw image names nothing.
        _ => ImageFormat::Raw,
    };
    let share = arguments.force_share;
    let first = describe_one(embedded, top, Some(format), share, NamedBy::Client).await?;
    let mut seen = HashSet::from([identity(top)?]);
    let mut chain = Chain {
        layers: vec![first],
        problem: None,
        commits: Vec::new(),
        stream: None,
    };
    while let Some(last) = chain.layers.last() {
        let path = last.path.clone();
        let below = match last.below() {
            Ok(None) => break,
            Ok(Some(below)) => below,
            Err(error) => {
                chain.problem = Some(format!("{}: {error}", shown(&path)));
                break;
            }
        };
        let problem = if chain.layers.len() > CHAIN_LAYERS_MAX {
            Some(format!("more than {CHAIN_LAYERS_MAX} images are below it"))
        } else {
            match identity(&below.path) {
                Ok(file) if !seen.insert(file) => {
                    let name = shown(&below.path);
                    Some(format!("{name}, which is below it, is above it as well"))
                }
                Ok(_) => match describe_named(embedded, below, share).await {
                    Ok(next) => {
                        chain.layers.push(next);
                        continue;
                    }
                    Err(text) => Some(text),
                },
                Err(text) => Some(text),
            }
        };
        chain.problem = problem.map(|text| format!("the chain ends at {}: {text}", shown(&path)));
        break;
    }
    Ok(chain)
}

async fn add_plans(
    embedded: &mut Embedded,
    arguments: &ChainArguments,
    chain: &mut Chain,
) -> Result<(), String> {
    let disk = Disk {
        node: NODE,
        path: &arguments.image,
        format: Some(arguments.format),
        option: "-f",
        read_only: true,
        sharing: sharing(arguments.force_share),
        named_by: NamedBy::Client,
    };
    disk.open(embedded).await?;
    let cannot =
        |error: blockyard_engine::error::EngineError| format!("{}: {error}", shown(disk.path));
    let layers = embedded.chain(NODE).await.map_err(cannot)?;
    for pair in layers.windows(2) {
        let [top, base] = pair else { continue };
        let job = PlannedJob::Commit(CommitSpec {
            device: NODE.to_owned(),
            top_node: Some(top.node_name.clone()),
            base_node: Some(base.node_name.clone()),
            ..CommitSpec::default()
        });
        let plan = embedded.plan("plan", job).await.map_err(cannot)?;
        chain.commits.push(plan);
    }
    let job = PlannedJob::Stream(StreamSpec {
        device: NODE.to_owned(),
        ..StreamSpec::default()
    });
    chain.stream = Some(embedded.plan("plan", job).await.map_err(cannot)?);
    Ok(())
}

const fn format_name(layer: &Described) -> &'static str {
    match layer.view.qcow2 {
        Some(_) => "qcow2",
        None => "raw",
    }
}

impl Chain {
    fn human(&self) -> String {
        let mut lines = Vec::new();
        for (depth, layer) in self.layers.iter().enumerate() {
            let mut line = format!(
                "{depth}: {}  {}, {}",
                layer.path.display(),
                format_name(layer),
                size::shown(layer.view.virtual_size_bytes)
            );
            if let Some(bytes) = layer.file.actual_size_bytes {
                line += &format!(", {} on disk", size::shown(bytes));
            }
            let info = layer.view.qcow2.as_ref();
            if let Some(name) = info.and_then(|info| info.backing_file.as_ref()) {
                let format = info.and_then(|info| info.backing_format.as_deref());
                line += &format!(", on '{name}' ({})", format.unwrap_or("format not stated"));
            }
            lines.push(line);
            if let Some(plan) = self.commits.get(depth) {
                lines.push(format!("   commit into {}: {}", depth + 1, told(plan)));
            }
        }
        if let Some(plan) = &self.stream {
            lines.push(format!("stream of all into 0: {}", told(plan)));
        }
        lines.join("\n")
    }

    fn json(&self) -> Value {
        let layers = self.layers.iter().enumerate();
        let layers = layers.map(|(depth, layer)| layer_json(layer, self.commits.get(depth)));
        let mut members = Map::new();
        members.insert("layers".to_owned(), layers.collect());
        if let Some(plan) = &self.stream {
            members.insert("stream".to_owned(), replies::plan(plan));
        }
        if let Some(text) = &self.problem {
            members.insert("problem".to_owned(), json!(text));
        }
        members.into()
    }
}

fn layer_json(layer: &Described, commit: Option<&PlanView>) -> Value {
    let mut value = json!({
        "filename": layer.path.to_string_lossy(),
        "format": format_name(layer),
        "virtual-size": layer.view.virtual_size_bytes,
    });
    if let Some(bytes) = layer.file.actual_size_bytes {
        value["actual-size"] = json!(bytes);
    }
    if let Some(info) = &layer.view.qcow2 {
        if let Some(name) = &info.backing_file {
            value["backing-filename"] = json!(name);
        }
        if let Some(format) = &info.backing_format {
            value["backing-filename-format"] = json!(format);
        }
    }
    if let Some(plan) = commit {
        value["commit"] = replies::plan(plan);
    }
    value
}
