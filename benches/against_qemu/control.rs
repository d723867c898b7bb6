//! The QMP scenarios: how long answers take under load, and how fast input is taken.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Failure;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::hostile;
use crate::load::{Load, Pace, Sequence, ask_in_turn, running_jobs, start_jobs};
use crate::options::{Options, Scenario, Side};
use crate::place::Place;
use crate::report::{ControlResult, percentile};

const CLIENTS: usize = 50;
const JOBS: usize = 16;
const CONNECTIONS: usize = 1000;
const LOAD_CLIENTS: usize = 4;
/// Fresh daemons of which the median is taken.
const INPUT_ROUNDS: usize = 5;
/// Pause of a client between an answer and its next question.
const THINKING: Duration = Duration::from_millis(10);

/// Runs one scenario on one side.
///
/// # Errors
/// The daemon fails, or answers what it must not.
pub(crate) fn run(
    options: &Options,
    scenario: Scenario,
    side: Side,
) -> Result<ControlResult, Failure> {
    let (figures, note) = match scenario {
        Scenario::Clients => clients(options, side, Pace::Limited)?,
        Scenario::ClientsFlatOut => clients(options, side, Pace::FlatOut)?,
        Scenario::Malformed => malformed(options, side)?,
        Scenario::Connections => connections(options, side)?,
        Scenario::Storm => storm(options, side)?,
        Scenario::Hostile => hostile::measure(options, side)?,
        _ => input(options, side)?,
    };
    Ok(ControlResult {
        scenario,
        side,
        figures,
        note,
    })
}

/// Figures with what they are and their units, and a note.
pub(crate) type Figures = (Vec<(&'static str, f64, &'static str)>, String);

/// qemu-storage-daemon serves one client per socket, so it gets a socket for each.
pub(crate) fn sockets_for(side: Side, clients: usize) -> usize {
    if side == Side::Qemu { clients } else { 1 }
}

fn milliseconds(seconds: f64) -> f64 {
    seconds * 1e3
}

fn measuring(options: &Options) -> Duration {
    Duration::from_secs(options.seconds)
}

/// A place with an 8 GiB sparse file in memory that all paced jobs read.
fn job_source(pace: Pace) -> Result<(Option<Place>, PathBuf), Failure> {
    if pace == Pace::FlatOut {
        return Ok((None, PathBuf::new()));
    }
    let place = Place::tmpfs(10 << 30)?;
    let path = place.path("source.img");
    crate::data::make_sparse(&path, 8 << 30)?;
    crate::data::fill_with_noise(&path, 1 << 30, 3)?;
    Ok((Some(place), path))
}

fn clients(options: &Options, side: Side, pace: Pace) -> Result<Figures, Failure> {
    let (_place, file) = job_source(pace)?;
    let daemon = Daemon::start(options, side, sockets_for(side, CLIENTS + 1))?;
    let mut control = Client::connect(daemon.socket_for(CLIENTS))?;
    start_jobs(&mut control, JOBS, pace, &file)?;
    let mut load = Load::new();
    for index in 0..CLIENTS {
        let client = Client::connect(daemon.socket_for(index))?;
        let commands = ["query-jobs", "query-version", "query-block-jobs"];
        load.add(move |stop| ask_in_turn(stop, client, &commands, THINKING));
    }
    let cpu = daemon.cpu_seconds()?;
    let began = Instant::now();
    std::thread::sleep(measuring(options));
    let cpu = (daemon.cpu_seconds()? - cpu) / began.elapsed().as_secs_f64();
    let mut delays: Vec<f64> = load.stop()?.concat();
    let running = running_jobs(&mut control)?;
    if running < JOBS {
        return Err(Failure::new(format!(
            "only {running} of {JOBS} jobs were still running at the end"
        )));
    }
    let rate = delays.len() as f64 / began.elapsed().as_secs_f64();
    Ok((
        vec![
            ("replies per second", rate, "1/s"),
            (
                "reply, median",
                milliseconds(percentile(&mut delays, 0.5)),
                "ms",
            ),
            (
                "reply, 99th percentile",
                milliseconds(percentile(&mut delays, 0.99)),
                "ms",
            ),
            (
                "reply, worst",
                milliseconds(percentile(&mut delays, 1.0)),
                "ms",
            ),
            ("daemon's CPU use", cpu, "cores"),
        ],
        format!(
            "{CLIENTS} clients, 10 ms pause after each reply, {JOBS} backups; clients run on the same machine"
        ),
    ))
}

/// Runs load beside one client that only asks query-version without pauses; returns the seconds its answers took.
fn beside_load(
    options: &Options,
    mut load: Load<Vec<f64>>,
    probe: Client,
) -> Result<Vec<f64>, Failure> {
    let (sender, receiver) = std::sync::mpsc::channel();
    load.add(move |stop| {
        let delays = ask_in_turn(stop, probe, &["query-version"], Duration::from_millis(1))?;
        let _ = sender.send(delays);
        Ok(Vec::new())
    });
    std::thread::sleep(measuring(options));
    load.stop()?;
    receiver
        .recv()
        .map_err(|_| Failure::new("the asking client ended without a result"))
}

/// What the seconds that answers took come to.
pub(crate) fn probe_figures(mut delays: Vec<f64>) -> Vec<(&'static str, f64, &'static str)> {
    vec![
        ("query-version answers", delays.len() as f64, ""),
        (
            "query-version, median",
            milliseconds(percentile(&mut delays, 0.5)),
            "ms",
        ),
        (
            "query-version, 99th percentile",
            milliseconds(percentile(&mut delays, 0.99)),
            "ms",
        ),
        (
            "query-version, worst",
            milliseconds(percentile(&mut delays, 1.0)),
            "ms",
        ),
    ]
}

/// Input that no daemon may accept and none may stumble over.
fn garbage() -> Vec<Vec<u8>> {
    vec![
        b"{ 'execute': }\n".to_vec(),
        b"}}}}]]]]\n".to_vec(),
        b"{\"execute\": \"query-version\" \"x\"}\n".to_vec(),
        b"{\"execute\": 1}\n".to_vec(),
        b"[1, 2, {\"a\": [null, tru]}]\n".to_vec(),
        b"\"unterminated\n".to_vec(),
        b"\xff\xfe\x00\x01\n".to_vec(),
        b"{\"execute\": \"no-such-command\", \"arguments\": {\"a\": [1, 2.5e3, \"\\ud800\"]}}\n"
            .to_vec(),
        [vec![b'['; 900], b"\n".to_vec()].concat(),
        [b"{\"a\":".repeat(900), b"\n".to_vec()].concat(),
        [
            b"{\"execute\": \"query-version\", \"arguments\": {\"a\": \"".to_vec(),
            vec![b'x'; 60_000],
            b"\"}}\n".to_vec(),
        ]
        .concat(),
    ]
}

/// Sends garbage and drops the answers, connecting anew whenever the daemon hangs up.
fn send_garbage(stop: &AtomicBool, socket: &PathBuf, seed: u64) -> Result<Vec<f64>, Failure> {
    let (pieces, mut order) = (garbage(), Sequence::new(seed));
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = UnixStream::connect(socket) else {
            return Err(Failure::new("the daemon is gone"));
        };
        stream
            .set_write_timeout(Some(Duration::from_millis(100)))
            .map_err(|error| Failure::new(error.to_string()))?;
        let mut answers = stream
            .try_clone()
            .map_err(|error| Failure::new(error.to_string()))?;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut sink = vec![0; 65536];
                while answers.read(&mut sink).is_ok_and(|length| length > 0) {}
            });
            for _ in 0..200 {
                let piece = &pieces[order.below(pieces.len())];
                if stop.load(Ordering::Relaxed) || stream.write_all(piece).is_err() {
                    break;
                }
            }
            let _ = stream.shutdown(Shutdown::Both);
        });
    }
    Ok(Vec::new())
}

fn malformed(options: &Options, side: Side) -> Result<Figures, Failure> {
    let daemon = Daemon::start(options, side, sockets_for(side, LOAD_CLIENTS + 1))?;
    let probe = Client::connect(daemon.socket_for(LOAD_CLIENTS))?;
    let mut load = Load::new();
    for index in 0..LOAD_CLIENTS {
        let socket = daemon.socket_for(index).to_owned();
        load.add(move |stop| send_garbage(stop, &socket, index as u64 + 1));
    }
    let mut figures = probe_figures(beside_load(options, load, probe)?);
    figures.push((
        "memory afterwards",
        daemon.resident_bytes()? as f64 / 1_048_576.0,
        "MiB",
    ));
    Ok((
        figures,
        format!("{LOAD_CLIENTS} clients send malformed input without pause"),
    ))
}

fn connections(options: &Options, side: Side) -> Result<Figures, Failure> {
    let daemon = Daemon::start(options, side, sockets_for(side, 1))?;
    if side == Side::Qemu {
        return Ok((
            Vec::new(),
            "serves one client per socket: cannot be measured".to_owned(),
        ));
    }
    let probe = daemon.client()?;
    let socket = daemon.socket().to_owned();
    let began = Instant::now();
    let mut load = Load::new();
    let (sender, receiver) = std::sync::mpsc::channel();
    load.add(move |stop| {
        let mut clients = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            clients.push(Client::connect(&socket)?);
        }
        let _ = sender.send(began.elapsed().as_secs_f64());
        while !stop.load(Ordering::Relaxed) {
            for client in &mut clients {
                client.call("query-version", json!({}))?;
            }
        }
        Ok(Vec::new())
    });
    let mut figures = probe_figures(beside_load(options, load, probe)?);
    let all = receiver
        .recv()
        .map_err(|_| Failure::new("not all connections came about in time"))?;
    figures.push(("until all have negotiated", all, "s"));
    figures.push((
        "memory afterwards",
        daemon.resident_bytes()? as f64 / 1_048_576.0,
        "MiB",
    ));
    Ok((
        figures,
        format!(
            "{CONNECTIONS} further connections on the same socket, each asking query-version in turn"
        ),
    ))
}

fn send_verbs(stop: &AtomicBool, mut client: Client, seed: u64) -> Result<Vec<f64>, Failure> {
    const VERBS: [&str; 12] = [
        "job-pause",
        "job-resume",
        "job-cancel",
        "job-complete",
        "job-finalize",
        "job-dismiss",
        "block-job-pause",
        "block-job-resume",
        "block-job-cancel",
        "block-job-complete",
        "block-job-set-speed",
        "blockdev-backup",
    ];
    let mut order = Sequence::new(seed);
    while !stop.load(Ordering::Relaxed) {
        let (verb, number) = (VERBS[order.below(VERBS.len())], order.below(JOBS));
        let id = format!("job{number}");
        let arguments = match verb {
            "blockdev-backup" => {
                json!({"job-id": id, "device": format!("s{number}"), "target": format!("t{number}"),
                "sync": "full", "auto-dismiss": order.below(2) == 0, "auto-finalize": order.below(2) == 0})
            }
            "block-job-set-speed" => json!({"device": id, "speed": order.below(3) << 28}),
            _ if verb.starts_with("block-job") => json!({"device": id}),
            _ => json!({"id": id}),
        };
        client.ask(verb, &arguments)?;
    }
    Ok(Vec::new())
}

fn storm(options: &Options, side: Side) -> Result<Figures, Failure> {
    let daemon = Daemon::start(options, side, sockets_for(side, LOAD_CLIENTS + 1))?;
    let mut probe = Client::connect(daemon.socket_for(LOAD_CLIENTS))?;
    start_jobs(&mut probe, JOBS, Pace::FlatOut, &PathBuf::new())?;
    let mut load = Load::new();
    for index in 0..LOAD_CLIENTS {
        let client = Client::connect(daemon.socket_for(index))?;
        load.add(move |stop| send_verbs(stop, client, index as u64 + 1));
    }
    let mut figures = probe_figures(beside_load(options, load, probe)?);
    figures.push((
        "memory afterwards",
        daemon.resident_bytes()? as f64 / 1_048_576.0,
        "MiB",
    ));
    Ok((
        figures,
        format!("{LOAD_CLIENTS} clients send random verbs on {JOBS} jobs without pause"),
    ))
}

/// How fast input is taken, each time by a fresh daemon: one big command whose argument is refused, and many small ones.
fn input(options: &Options, side: Side) -> Result<Figures, Failure> {
    // QEMU takes 0.2 MiB/s, so it gets less of it.
    let size_bytes: usize = if side == Side::Qemu {
        1 << 20
    } else {
        16 << 20
    };
    let string = format!("\"{}\"", "abcdefghijklmnop".repeat(size_bytes / 16));
    let element = r#"{"driver": "raw", "size": 1048576, "on": true, "name": "disk-1"}"#;
    let mixed = format!(
        "[{}]",
        vec![element; size_bytes / 16 / element.len()].join(", ")
    );
    let rate = |measure: &dyn Fn(Client) -> Result<f64, Failure>| -> Result<f64, Failure> {
        let mut rates = Vec::new();
        for _ in 0..INPUT_ROUNDS {
            let daemon = Daemon::start(options, side, 1)?;
            rates.push(measure(daemon.client()?)?);
        }
        Ok(crate::report::median(rates).unwrap_or_default())
    };
    let figures = vec![
        (
            "one long string",
            rate(&|client| argument_rate(client, &string))?,
            "MiB/s",
        ),
        (
            "small objects",
            rate(&|client| argument_rate(client, &mixed))?,
            "MiB/s",
        ),
        (
            "stream of query-version",
            rate(&|client| commands_rate(client, size_bytes / 16))?,
            "MiB/s",
        ),
    ];
    let note = format!(
        "input in MiB per second until the last answer is there, medians of {INPUT_ROUNDS} fresh daemons"
    );
    Ok((figures, note))
}

/// Sends one command with this argument and waits until it is refused.
fn argument_rate(mut client: Client, argument: &str) -> Result<f64, Failure> {
    let command =
        format!("{{\"execute\": \"query-version\", \"arguments\": {{\"x\": {argument}}}}}\n");
    let began = Instant::now();
    client.send(command.as_bytes())?;
    let reply = client.reply()?;
    let seconds = began.elapsed().as_secs_f64();
    match reply.get("error") {
        Some(_) => Ok(command.len() as f64 / 1_048_576.0 / seconds),
        None => Err(Failure::new(format!(
            "accepted what it does not know: {reply}"
        ))),
    }
}

/// Sends many small commands at once and takes the answers while they are sent.
fn commands_rate(mut client: Client, size_bytes: usize) -> Result<f64, Failure> {
    let command = b"{\"execute\": \"query-version\"}\n";
    client.send(command)?;
    let answer = client.line()?;
    let count = size_bytes / command.len();
    let bytes = command.repeat(count);
    let mut sender = client.sender()?;
    let began = Instant::now();
    let writing = std::thread::spawn(move || sender.write_all(&bytes));
    client.take_again(&answer, count)?;
    let seconds = began.elapsed().as_secs_f64();
    writing
        .join()
        .map_err(|_| Failure::new("the writing thread panicked"))?
        .map_err(|error| Failure::new(format!("cannot send: {error}")))?;
    Ok((count * command.len()) as f64 / 1_048_576.0 / seconds)
}
