//! `blockyard daemon`: qemu-storage-daemon's command line and life.

pub mod background;
pub mod chardev;
pub mod monitors;
pub mod options;
pub mod pidfile;
pub mod sockets;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::image_policy::ImagePolicy;
use blockyard_engine::request::{ExportRequest, Request};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::commands::{
    Asker, export_spec, nbd_server_spec, node_options_in_image, node_spec, object_spec,
};
use crate::daemon::chardev::Backend;
use crate::daemon::options::{Asked, HELP, Options, Step, StepKind};
use crate::daemon::pidfile::Pidfile;
use crate::error::reason;
use crate::keyval;
use crate::schema::exports::{EXPORT_OPTIONS, NBD_SERVER_OPTIONS};
use crate::schema::nodes::OPTIONS;
use crate::schema::objects::OBJECT;
use crate::schema::{Object, Type, Words, optional, required};
use crate::server::clients::Clients;
use crate::server::connection::Service;
use crate::signals::Signals;
use crate::terminal::VERSION;

/// Threads that read commands and write replies. More than one, so that a client whose message takes long to read holds
/// nobody up.
const CONTROL_THREADS: usize = 2;
/// How long clients have at the end to take what is on its way to them.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs the daemon until it is told to end.
///
/// `program` stands before messages; `leading` are the arguments before the daemon's own, needed to start it again.
pub fn run(program: &str, leading: &[OsString], arguments: Vec<OsString>) -> ExitCode {
    let options = match options::parse(arguments.iter().cloned()) {
        Ok(Asked::Start(options)) => *options,
        Ok(Asked::Help) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Version) => {
            println!("blockyard {VERSION}");
            return ExitCode::SUCCESS;
        }
        Err(text) => return refuse(program, &text),
    };
    if options.daemonize && !background::is_background() {
        let all: Vec<OsString> = leading.iter().cloned().chain(arguments).collect();
        return match background::start(&all) {
            Ok(code) => code,
            Err(error) => refuse(program, &format!("cannot go to the background: {error}")),
        };
    }
    let ended = start(options);
    let texts = match ended {
        Ok(lost) if lost.is_empty() => return ExitCode::SUCCESS,
        Ok(lost) => lost,
        Err(text) => vec![text],
    };
    for text in texts {
        refuse(program, &text);
    }
    ExitCode::FAILURE
}

fn refuse(program: &str, text: &str) -> ExitCode {
    eprintln!("{program}: {text}");
    ExitCode::FAILURE
}

/// The daemon from its start to its end. What was lost at its end, in words.
///
/// # Errors
/// Why it could not be started.
fn start(options: Options) -> Result<Vec<String>, String> {
    if options.daemonize {
        background::leave_terminal().map_err(|error| error.to_string())?;
    }
    if options.end_with_parent {
        // On this thread, which is there to the end.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .map_err(|error| format!("--end-with-parent: {error}"))?;
    }
    if let Err(error) = monitors::raise_descriptor_limit() {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    let config = EngineConfig {
        images: images(&options.engine.images)?,
        ..options.engine.clone()
    };
    let engine = Engine::start(config).map_err(|error| error.text)?;
    let outcome = runtime.block_on(live(&options, engine.handle()));
    // A blocked read of standard input must not hold up the end.
    runtime.shutdown_background();
    let lost = engine.join();
    outcome.map(|()| lost)
}

/// How far names in images are trusted, with the folders as they are named without symbolic links.
fn images(policy: &ImagePolicy) -> Result<ImagePolicy, String> {
    let real = |root: &PathBuf| {
        let real = std::fs::canonicalize(root).and_then(|real| match real.is_dir() {
            true => Ok(real),
            false => Err(std::io::ErrorKind::NotADirectory.into()),
        });
        real.map_err(|error| format!("--image-root {}: {}", root.display(), reason(&error)))
    };
    let roots: Result<Vec<PathBuf>, String> = policy.roots.iter().map(real).collect();
    Ok(ImagePolicy {
        roots: roots?,
        read_options: Some(node_options_in_image),
        ..policy.clone()
    })
}

/// The daemon's life: set-up, service, farewell.
async fn live(options: &Options, engine: EngineHandle) -> Result<(), String> {
    let mut signals = Signals::new().map_err(|error| error.to_string())?;
    let service = Service {
        engine: engine.clone(),
        clients: Arc::new(Clients::default()),
        ended: Arc::new(watch::Sender::new(false)),
    };
    let clients = service.clients.clone();
    engine.subscribe(Box::new(move |event| clients.tell(event)));
    let mut setup = Setup {
        engine: &engine,
        daemonize: options.daemonize,
        chardevs: Vec::new(),
        monitors: Vec::new(),
    };
    let ready = tokio::select! {
        ready = setup.carry_out(&options.steps) => ready.map(|()| true),
        () = signals.next() => Ok(false),
    };
    let mut outcome = Ok(());
    match ready {
        Ok(true) => {
            let monitors = std::mem::take(&mut setup.monitors);
            outcome = serve(options, monitors, &service, &mut signals).await;
        }
        Ok(false) => {}
        Err(text) => outcome = Err(text),
    }
    if !*service.ended.borrow() {
        quit(&engine).await;
        service.ended.send_replace(true);
    }
    outcome
}

async fn serve(
    options: &Options,
    monitors: Vec<(monitors::Open, bool)>,
    service: &Service,
    signals: &mut Signals,
) -> Result<(), String> {
    // It stays until the last reply has been written.
    let _pidfile = options
        .pidfile
        .as_deref()
        .map(Pidfile::create)
        .transpose()?;
    let mut running = JoinSet::new();
    for (open, pretty) in monitors {
        running.spawn(monitors::run(open, pretty, service.clone()));
    }
    if options.daemonize {
        background::tell_ready()
            .map_err(|error| format!("cannot go to the background: {error}"))?;
    }
    tracing::info!("ready");
    tokio::select! {
        () = service.until_ended() => {}
        () = signals.next() => {
            quit(&service.engine).await;
            service.ended.send_replace(true);
        }
    }
    let farewell = async {
        service.clients.close_all();
        while running.join_next().await.is_some() {}
    };
    if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
        tracing::debug!("a client did not take its last messages");
    }
    Ok(())
}

async fn quit(engine: &EngineHandle) {
    if let Err(error) = engine.call(Request::Quit).await {
        tracing::debug!(%error, "the engine has ended before");
    }
}

/// What the options have set up so far.
struct Setup<'a> {
    engine: &'a EngineHandle,
    daemonize: bool,
    /// Opened, and whether a monitor uses it.
    chardevs: Vec<(String, Option<monitors::Open>)>,
    monitors: Vec<(monitors::Open, bool)>,
}

static MONITOR_MODE: Words = Words::of(&["control", "readline"]);
static MONITOR: Object = Object::of(&[
    optional("id", Type::Text),
    optional("mode", Type::Word(&MONITOR_MODE)),
    optional("pretty", Type::Bool),
    required("chardev", Type::Text),
]);

impl Setup<'_> {
    async fn carry_out(&mut self, steps: &[Step]) -> Result<(), String> {
        for step in steps {
            let done = self.step(step).await;
            done.map_err(|text| format!("{}: {text}", step.shown()))?;
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Result<(), String> {
        let argument = step.argument.as_str();
        match step.kind {
            StepKind::Blockdev => self.blockdev(argument).await,
            StepKind::Object => self.object(argument).await,
            StepKind::Chardev => self.chardev(argument).await,
            StepKind::Monitor => self.monitor(argument),
            StepKind::Export => self.export(argument).await,
            StepKind::NbdServer => self.nbd_server(argument).await,
        }
    }

    async fn blockdev(&self, argument: &str) -> Result<(), String> {
        no_help(argument)?;
        let fields =
            keyval::read(argument, Some("driver"), &OPTIONS).map_err(|error| error.text)?;
        let spec = node_spec(fields).map_err(|error| error.text)?;
        self.call(Request::BlockdevAdd(spec)).await
    }

    async fn object(&self, argument: &str) -> Result<(), String> {
        no_help(argument)?;
        let fields =
            keyval::read(argument, Some("qom-type"), &OBJECT).map_err(|error| error.text)?;
        let spec = object_spec(fields).map_err(|error| error.text)?;
        self.call(Request::ObjectAdd(spec)).await
    }

    async fn export(&self, argument: &str) -> Result<(), String> {
        no_help(argument)?;
        let fields =
            keyval::read(argument, Some("type"), &EXPORT_OPTIONS).map_err(|error| error.text)?;
        self.call(Request::Export(ExportRequest::Add(export_spec(fields))))
            .await
    }

    async fn nbd_server(&self, argument: &str) -> Result<(), String> {
        no_help(argument)?;
        let fields =
            keyval::read(argument, None, &NBD_SERVER_OPTIONS).map_err(|error| error.text)?;
        let spec = nbd_server_spec(fields, Asker::CommandLine).map_err(|error| error.text)?;
        self.call(Request::Export(ExportRequest::ServerStart(spec)))
            .await
    }

    async fn call(&self, request: Request) -> Result<(), String> {
        self.engine
            .call(request)
            .await
            .map(|_| ())
            .map_err(|error| error.text)
    }

    async fn chardev(&mut self, argument: &str) -> Result<(), String> {
        let chardev = chardev::parse(argument).map_err(|error| error.text)?;
        if self.chardevs.iter().any(|(id, _)| *id == chardev.id) {
            let id = chardev.id;
            return Err(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            ));
        }
        if chardev.backend == Backend::Stdio {
            if self.daemonize {
                return Err("cannot use stdio with -daemonize".to_owned());
            }
            if self.uses_stdio() {
                return Err("cannot use stdio by multiple character devices".to_owned());
            }
        }
        let id = chardev.id.clone();
        let open = monitors::open(chardev).await?;
        self.chardevs.push((id, Some(open)));
        Ok(())
    }

    fn uses_stdio(&self) -> bool {
        let waiting = self.chardevs.iter().filter_map(|(_, open)| open.as_ref());
        let used = self.monitors.iter().map(|(open, _)| open);
        waiting.chain(used).any(monitors::Open::is_stdio)
    }

    fn monitor(&mut self, argument: &str) -> Result<(), String> {
        no_help(argument)?;
        let mut fields =
            keyval::read(argument, Some("chardev"), &MONITOR).map_err(|error| error.text)?;
        let id = fields.required_text("chardev");
        let Some((_, open)) = self.chardevs.iter_mut().find(|(known, _)| *known == id) else {
            return Err(format!("chardev \"{id}\" not found"));
        };
        if fields.text("mode").as_deref() == Some("readline") {
            return Err("Only QMP is supported".to_owned());
        }
        let Some(open) = open.take() else {
            return Err(format!("chardev '{id}' is already in use"));
        };
        self.monitors
            .push((open, fields.flag("pretty").unwrap_or(false)));
        Ok(())
    }
}

fn no_help(argument: &str) -> Result<(), String> {
    if argument == "help" || argument.ends_with(",help") {
        return Err("Help is not available for this option".to_owned());
    }
    Ok(())
}
