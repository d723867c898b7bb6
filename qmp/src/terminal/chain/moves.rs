//! `blockyard commit` and `blockyard stream`: what layers of a chain hold is moved into one of them.
//!
//! ```text
//!   chain opened and locked -> plan -> room compared -> job -> headers
//! ```
//! What OVERLAY shows is the same at every moment. Nothing is emptied or removed: what is not needed any more is told.

use std::path::Path;
use std::time::Instant;

use blockyard_engine::error::EngineError;
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::reply::{JobView, LayerView, PlanView};
use blockyard_engine::request::{CommitSpec, NamedBy, PlannedJob, StreamSpec, WorkSpec};
use serde_json::{Value, json};

use crate::replies;
use crate::terminal::chain::arguments::{CommitArguments, MoveArguments, StreamArguments};
use crate::terminal::chain::{check_marks, layer_at, told};
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, Ended, Fact, Outcome};
use crate::terminal::embedded::{CameTo, Embedded, Sharing, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::{Disk, could_not_open};
use crate::terminal::room;

const NODE: &str = "overlay";

/// The error of a job that was cancelled.
const CANCELED: &str = "Operation canceled";

/// What is to be moved.
struct Move {
    id: &'static str,
    work: WorkSpec,
    planned: PlannedJob,
    /// What is true afterwards, for people.
    leaves: String,
    /// What a user has to know before.
    warning: Option<String>,
    /// The images that nothing needs any more.
    unneeded: Vec<String>,
}

/// What it came to.
struct Moved {
    outcome: Outcome,
    bytes: u64,
    facts: Vec<Fact>,
}

impl CameTo for Moved {
    fn is_success(&self) -> bool {
        self.outcome == Outcome::Completed
    }
}

impl Moved {
    fn refused(text: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::failed(text),
            bytes: 0,
            facts: Vec::new(),
        }
    }

    fn tell(&mut self, key: &'static str, value: impl Into<Value>, text: String) {
        let value = value.into();
        self.facts.push(Fact { key, value, text });
    }
}

/// Runs `commit`.
pub(crate) fn commit(arguments: &CommitArguments) -> Exit {
    let (overlay, shared) = (&arguments.overlay, &arguments.shared);
    run("commit", overlay, shared, |layers| {
        commit_of(layers, arguments)
    })
}

/// Runs `stream`.
pub(crate) fn stream(arguments: &StreamArguments) -> Exit {
    let (overlay, shared) = (&arguments.overlay, &arguments.shared);
    run("stream", overlay, shared, |layers| {
        stream_of(layers, arguments)
    })
}

fn run(
    id: &'static str,
    overlay: &Path,
    shared: &MoveArguments,
    choose: impl Fn(&[LayerView]) -> Result<Move, String>,
) -> Exit {
    let display = Display::new(shared.display);
    let started = Instant::now();
    let moved = with_engine(shared.engine, display, async |mut embedded| {
        let moved = open_and_move(&mut embedded, overlay, shared, &choose).await;
        (moved, embedded.display)
    });
    let (mut moved, mut display) = match moved {
        Ok(ended) => ended,
        Err((text, display)) => (Moved::refused(text), display),
    };
    let exit = moved.outcome.exit();
    if shared.dry_run && exit == Exit::Success && !display.is_json() {
        let texts = moved.facts.iter().map(|fact| fact.text.as_str());
        display.result(&format!("{id}: {}", texts.collect::<String>()));
        return exit;
    }
    moved.tell("image", overlay.to_string_lossy(), String::new());
    display.ended(&Ended {
        id,
        outcome: moved.outcome,
        bytes: moved.bytes,
        took: Some(started.elapsed()),
        facts: moved.facts,
    });
    exit
}

async fn open_and_move(
    embedded: &mut Embedded,
    overlay: &Path,
    shared: &MoveArguments,
    choose: &impl Fn(&[LayerView]) -> Result<Move, String>,
) -> Moved {
    let disk = Disk {
        node: NODE,
        path: overlay,
        format: Some(shared.format),
        option: "-f",
        // A plan changes nothing.
        read_only: shared.dry_run,
        sharing: Sharing::Readers,
        named_by: NamedBy::Client,
    };
    let cannot = |error: EngineError| format!("{}: {error}", shown(overlay));
    let chosen = async {
        disk.open(embedded).await?;
        if shared.dry_run {
            let marks = check_marks(embedded, NODE).await;
            marks.map_err(|error| could_not_open(overlay, error))?;
        }
        let layers = embedded.chain(NODE).await.map_err(cannot)?;
        choose(&layers)
    };
    let chosen = match chosen.await {
        Ok(chosen) => chosen,
        Err(text) => return Moved::refused(text),
    };
    let plan = match embedded.plan("plan", chosen.planned.clone()).await {
        Ok(plan) => plan,
        Err(error) if embedded.interrupt.is_asked() => {
            return Moved {
                outcome: Outcome::Cancelled,
                ..Moved::refused(error.text)
            };
        }
        Err(error) => return Moved::refused(cannot(error)),
    };
    if shared.dry_run {
        return match check_marks(embedded, &plan.target.node_name).await {
            Ok(()) => planned(&chosen, &plan),
            Err(error) => Moved::refused(cannot(error)),
        };
    }
    if plan.room.fits == Some(false) && !shared.force {
        let target = plan.target.file();
        let mut moved = Moved::refused(room::too_little(Path::new(&*target), &plan.room));
        moved.tell("plan", replies::plan(&plan), String::new());
        return moved;
    }
    if let Some(warning) = &chosen.warning {
        embedded.display.note(warning);
    }
    let job = embedded.run_job(chosen.id, chosen.work.clone(), true).await;
    let mut moved = match job {
        Ok(job) => ended(embedded, &chosen, &job),
        Err(error) => Moved::refused(cannot(error)),
    };
    moved.tell("plan", replies::plan(&plan), String::new());
    moved
}

/// A plan is all that was asked for.
fn planned(chosen: &Move, plan: &PlanView) -> Moved {
    let mut moved = Moved {
        outcome: Outcome::Completed,
        bytes: 0,
        facts: Vec::new(),
    };
    moved.tell("dry-run", true, told(plan));
    moved.tell("plan", replies::plan(plan), String::new());
    moved.tell("unneeded", chosen.unneeded.clone(), String::new());
    moved
}

fn ended(embedded: &Embedded, chosen: &Move, job: &JobView) -> Moved {
    let mut moved = Moved {
        outcome: Outcome::Completed,
        bytes: job.current_progress,
        facts: Vec::new(),
    };
    let Some(error) = job.error.clone() else {
        moved.tell("unneeded", chosen.unneeded.clone(), chosen.leaves.clone());
        if let Some(chain) = &job.chain {
            let files = chain.iter().map(|layer| json!(layer.file()));
            moved.tell("chain", files.collect::<Value>(), String::new());
        }
        return moved;
    };
    moved.outcome = match embedded.interrupt.is_asked() && error == CANCELED {
        true => Outcome::Cancelled,
        false => Outcome::Failed {
            error,
            failed_at: job.failed_at.clone(),
        },
    };
    let again = match chosen.work {
        // What the filled image holds is its own from then on.
        WorkSpec::Stream(_) => "the same command moves the rest",
        _ => "the same command moves all of it anew",
    };
    let text = format!(
        "the chain is what it was and its top shows the same; a part may have been moved already, and {again}"
    );
    moved.tell("chain-changed", false, text);
    moved
}

fn commit_of(layers: &[LayerView], arguments: &CommitArguments) -> Result<Move, String> {
    let overlay = &arguments.overlay;
    let (top_place, top) = match &arguments.top {
        Some(path) => layer_at(layers, path, overlay)?,
        None => (0, layers.first().ok_or("the chain is empty (bug)")?),
    };
    let (base_place, base) = match &arguments.base {
        Some(path) => layer_at(layers, path, overlay)?,
        None => match layers.get(top_place + 1) {
            Some(below) => (top_place + 1, below),
            None => {
                let name = shown(Path::new(&*top.file()));
                return Err(format!(
                    "{name} has no backing file that could take in what it holds"
                ));
            }
        },
    };
    if base_place <= top_place {
        return Err(format!(
            "{} is not below {}",
            shown(Path::new(&*base.file())),
            shown(Path::new(&*top.file()))
        ));
    }
    let spec = CommitSpec {
        device: NODE.to_owned(),
        top_node: Some(top.node_name.clone()),
        base_node: Some(base.node_name.clone()),
        speed: arguments.shared.pace.speed,
        on_error: OnError::Report,
        // Their image locks keep everybody off.
        top_is_quiet: true,
        ..CommitSpec::default()
    };
    let taken: Vec<String> = layers
        .get(top_place..base_place)
        .unwrap_or_default()
        .iter()
        .map(|layer| layer.file().into_owned())
        .collect();
    let base_name = shown(Path::new(&*base.file()));
    let leaves = match top_place.checked_sub(1).and_then(|above| layers.get(above)) {
        None => format!(
            "{base_name} shows what {} does, which stays as it is and is not needed any more{}",
            shown(Path::new(&*top.file())),
            match base_place - top_place {
                1 => "",
                _ => "; the images between them are not either, and show a mixture now",
            }
        ),
        Some(above) => format!(
            "{} is on {base_name} now and shows the same; what was between them is not needed any more",
            shown(Path::new(&*above.file()))
        ),
    };
    Ok(Move {
        id: "commit",
        work: WorkSpec::Commit(spec.clone()),
        planned: PlannedJob::Commit(spec),
        leaves,
        warning: Some(format!(
            "{base_name} changes: other images that are on it or on what is between, if there are any, show something else \
             from now on; they cannot be found from here"
        )),
        unneeded: taken,
    })
}

fn stream_of(layers: &[LayerView], arguments: &StreamArguments) -> Result<Move, String> {
    let overlay = &arguments.overlay;
    let name = shown(overlay);
    if layers.len() < 2 {
        return Err(format!(
            "{name} has no backing file that it could take anything from"
        ));
    }
    let base = match &arguments.base {
        Some(path) => Some(layer_at(layers, path, overlay)?),
        None => None,
    };
    if let Some((0, _)) = base {
        return Err(format!("{name} is not below itself"));
    }
    let spec = StreamSpec {
        device: NODE.to_owned(),
        base_node: base.map(|(_, base)| base.node_name.clone()),
        speed: arguments.shared.pace.speed,
        on_error: OnError::Report,
        ..StreamSpec::default()
    };
    let to = base.map_or(layers.len(), |(place, _)| place);
    let taken: Vec<String> = layers
        .get(1..to)
        .unwrap_or_default()
        .iter()
        .map(|layer| layer.file().into_owned())
        .collect();
    let leaves = match base {
        None => format!("{name} holds all that it shows; what was below it stays as it is"),
        Some((_, base)) => format!(
            "{name} is on {} now; what was between them stays as it is",
            shown(Path::new(&*base.file()))
        ),
    };
    Ok(Move {
        id: "stream",
        work: WorkSpec::Stream(spec.clone()),
        planned: PlannedJob::Stream(spec),
        leaves,
        warning: None,
        unneeded: taken,
    })
}
