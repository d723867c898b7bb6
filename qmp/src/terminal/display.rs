//! [`Display`]: progress and results for people or programs, whoever delivers the figures.
//!
//! On a terminal a bar for each job, elsewhere a line now and then, both on standard error; with `--json` one object a
//! line on standard output instead. Results go to standard output, errors to standard error.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::size;
use crate::terminal::exit::Exit;
use crate::terminal::rate::Rate;

/// Least time between two lines about one job.
const LINE_SPACING: Duration = Duration::from_secs(1);
/// Longest time without a line about a job that goes on.
const LINE_SILENCE: Duration = Duration::from_secs(5);
/// Progress that is worth a line.
const LINE_PERCENT: u64 = 10;
/// Least time between two JSON lines about one job.
const JSON_SPACING: Duration = Duration::from_millis(500);

/// How progress and results are shown.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct DisplayArguments {
    /// Print progress and result as JSON, one object a line, to standard output
    #[arg(long)]
    pub json: bool,
    /// Print errors only; a result that was asked for (--json, bench) still comes
    #[arg(long, short)]
    pub quiet: bool,
}

/// Where a job is.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// Name of the job, unique among those shown at a time.
    pub id: &'a str,
    /// Its status, as QMP spells it.
    pub status: &'a str,
    /// Bytes done.
    pub current_bytes: u64,
    /// Bytes expected in all.
    pub total_bytes: u64,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Completed,
    /// Not well.
    Failed {
        /// Why.
        error: String,
        /// On which node and bytes, if known.
        failed_at: Option<String>,
    },
    /// Somebody ended it early.
    Cancelled,
}

impl Outcome {
    /// A failure that has no place.
    pub fn failed(error: impl Into<String>) -> Self {
        Outcome::Failed {
            error: error.into(),
            failed_at: None,
        }
    }

    /// The exit code for it.
    pub const fn exit(&self) -> Exit {
        match self {
            Outcome::Completed => Exit::Success,
            Outcome::Failed { .. } => Exit::Failed,
            Outcome::Cancelled => Exit::Cancelled,
        }
    }
}

/// One more thing to tell of a job that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    /// Key in JSON.
    pub key: &'static str,
    /// Value in JSON.
    pub value: Value,
    /// The same for people; empty: not for them.
    pub text: String,
}

/// A job that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended<'a> {
    /// Its name.
    pub id: &'a str,
    /// How.
    pub outcome: Outcome,
    /// Bytes done.
    pub bytes: u64,
    /// How long it took; `None` if nobody saw it begin.
    pub took: Option<Duration>,
    /// What else there is to tell.
    pub facts: Vec<Fact>,
}

/// What is known of one job on display.
struct Shown {
    rate: Rate,
    bar: Option<ProgressBar>,
    said: Option<(Instant, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Bars,
    Lines,
    Json,
    /// Results only: JSON or text.
    Quiet {
        json: bool,
    },
}

/// Shows any number of jobs at once.
pub struct Display {
    style: Style,
    bars: MultiProgress,
    jobs: HashMap<String, Shown>,
}

impl Display {
    /// A display as the arguments and the surroundings ask for: bars only on a terminal that can move its cursor.
    pub fn new(arguments: DisplayArguments) -> Self {
        let moves = std::env::var_os("TERM").is_some_and(|name| name != "dumb" && !name.is_empty());
        let style = match arguments {
            DisplayArguments { quiet: true, json } => Style::Quiet { json },
            DisplayArguments { json: true, .. } => Style::Json,
            _ if std::io::stderr().is_terminal() && moves => Style::Bars,
            _ => Style::Lines,
        };
        Self {
            style,
            bars: MultiProgress::new(),
            jobs: HashMap::new(),
        }
    }

    /// Whether results are for programs.
    pub fn is_json(&self) -> bool {
        matches!(self.style, Style::Json | Style::Quiet { json: true })
    }

    /// Shows where a job is at `now`. May be called as often as there is news; shown is only so much of it.
    pub fn progress(&mut self, figures: &Figures<'_>, now: Instant) {
        let (style, bars) = (self.style, &self.bars);
        let shown = self
            .jobs
            .entry(figures.id.to_owned())
            .or_insert_with(|| Shown {
                rate: Rate::default(),
                bar: (style == Style::Bars).then(|| bars.add(new_bar(figures.id))),
                said: None,
            });
        shown.rate.observe(now, figures.current_bytes);
        match style {
            Style::Bars => shown.draw(figures),
            Style::Lines => {
                if let Some(line) = shown.line(figures, now) {
                    write_line(std::io::stderr(), &line);
                }
            }
            Style::Json => {
                if let Some(line) = shown.json(figures, now) {
                    write_line(std::io::stdout(), &line);
                }
            }
            Style::Quiet { .. } => {}
        }
    }

    /// Shows where work that is no job is now.
    pub fn phase(&mut self, id: &str, current_bytes: u64, total_bytes: u64) {
        let figures = Figures {
            id,
            status: "running",
            current_bytes,
            total_bytes,
        };
        self.progress(&figures, Instant::now());
    }

    /// Takes a job off the display without a word.
    pub fn forget(&mut self, id: &str) {
        if let Some(Shown { bar: Some(bar), .. }) = self.jobs.remove(id) {
            bar.finish_and_clear();
            self.bars.remove(&bar);
        }
    }

    /// Takes a job off the display and tells how it ended.
    pub fn ended(&mut self, ended: &Ended<'_>) {
        self.forget(ended.id);
        if self.is_json() {
            write_line(std::io::stdout(), &ended.json().to_string());
            return;
        }
        match ended.outcome {
            Outcome::Completed if matches!(self.style, Style::Quiet { .. }) => {}
            Outcome::Completed => self.result(&ended.text()),
            Outcome::Failed { .. } | Outcome::Cancelled => self.error(&ended.text()),
        }
    }

    /// A line of a result, to standard output.
    pub fn result(&self, text: &str) {
        self.bars.suspend(|| write_line(std::io::stdout(), text));
    }

    /// A line that a user should know of, to standard error; silent when only errors are wanted.
    pub fn note(&self, text: &str) {
        if !matches!(self.style, Style::Quiet { .. }) {
            self.error(text);
        }
    }

    /// A line as it is, to standard error.
    pub fn line(&self, text: &str) {
        self.bars.suspend(|| write_line(std::io::stderr(), text));
    }

    /// A line about an error, to standard error.
    pub fn error(&self, text: &str) {
        let line = format!("blockyard: {text}");
        self.bars.suspend(|| write_line(std::io::stderr(), &line));
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // Nothing unfinished stays on the terminal.
        for id in self.jobs.keys().cloned().collect::<Vec<_>>() {
            self.forget(&id);
        }
    }
}

impl Shown {
    fn draw(&self, figures: &Figures<'_>) {
        if let Some(bar) = &self.bar {
            bar.set_length(figures.total_bytes.max(1));
            bar.set_position(figures.current_bytes);
            bar.set_message(self.words(figures));
        }
    }

    /// A line for a log, if one is due.
    fn line(&mut self, figures: &Figures<'_>, now: Instant) -> Option<String> {
        let percent = percent(figures);
        // What is over within a second needs no line but its result.
        let (when, before) = *self.said.get_or_insert((now, percent));
        let silence = now.duration_since(when);
        let due = silence >= LINE_SILENCE
            || (silence >= LINE_SPACING && percent.abs_diff(before) >= LINE_PERCENT);
        due.then(|| {
            self.said = Some((now, percent));
            format!("{}: {percent} %, {}", figures.id, self.words(figures))
        })
    }

    /// A JSON line, if one is due.
    fn json(&mut self, figures: &Figures<'_>, now: Instant) -> Option<String> {
        let spaced = |(when, _): (Instant, u64)| now.duration_since(when) >= JSON_SPACING;
        self.said.is_none_or(spaced).then(|| {
            self.said = Some((now, 0));
            let mut line = json!({
                "event": "progress",
                "id": figures.id,
                "status": figures.status,
                "current-bytes": figures.current_bytes,
                "total-bytes": figures.total_bytes,
            });
            if let Some(rate) = self.rate.bytes_per_second() {
                line["bytes-per-second"] = json!(rate.round() as u64);
            }
            if let Some(left) = self.time_left(figures) {
                line["seconds-left"] = json!(left.as_secs());
            }
            line.to_string()
        })
    }

    fn time_left(&self, figures: &Figures<'_>) -> Option<Duration> {
        let remaining = figures.total_bytes.saturating_sub(figures.current_bytes);
        self.rate.time_for(remaining)
    }

    /// `running` goes without saying.
    fn words(&self, figures: &Figures<'_>) -> String {
        let mut words = format!(
            "{} of {}",
            size::shown(figures.current_bytes),
            size::shown(figures.total_bytes)
        );
        if figures.status != "running" {
            words += &format!(", {}", figures.status);
            return words;
        }
        if let Some(rate) = self.rate.bytes_per_second() {
            words += &format!(", {}/s", size::shown(rate as u64));
        }
        if let Some(left) = self.time_left(figures) {
            // Nobody can know it better than to the second.
            let left = Duration::from_secs(left.as_secs_f64().ceil() as u64);
            words += &format!(", {} left", duration_shown(left));
        }
        words
    }
}

impl Ended<'_> {
    fn bytes_per_second(&self) -> Option<u64> {
        let seconds = self.took?.as_secs_f64();
        (seconds > 0.0).then(|| (self.bytes as f64 / seconds).round() as u64)
    }

    fn json(&self) -> Value {
        let mut line = Map::new();
        let event = match &self.outcome {
            Outcome::Completed => "completed",
            Outcome::Failed { .. } => "failed",
            Outcome::Cancelled => "cancelled",
        };
        line.insert("event".to_owned(), json!(event));
        line.insert("id".to_owned(), json!(self.id));
        line.insert("bytes".to_owned(), json!(self.bytes));
        line.insert(
            "seconds".to_owned(),
            json!(self.took.map(|took| took.as_secs_f64())),
        );
        line.insert(
            "bytes-per-second".to_owned(),
            json!(self.bytes_per_second()),
        );
        if let Outcome::Failed { error, failed_at } = &self.outcome {
            line.insert("error".to_owned(), json!(error));
            line.insert("failed-at".to_owned(), json!(failed_at));
        }
        for fact in &self.facts {
            line.insert(fact.key.to_owned(), fact.value.clone());
        }
        Value::Object(line)
    }

    fn text(&self) -> String {
        let mut text = match &self.outcome {
            Outcome::Completed => {
                let mut text = format!("{}: {}", self.id, size::shown(self.bytes));
                if let Some(took) = self.took {
                    text += &format!(" in {}", duration_shown(took));
                }
                if let Some(rate) = self.bytes_per_second() {
                    text += &format!(", {}/s", size::shown(rate));
                }
                text
            }
            Outcome::Failed { error, failed_at } => {
                let place = failed_at.as_deref().map(|place| format!(" ({place})"));
                format!("{} failed: {error}{}", self.id, place.unwrap_or_default())
            }
            Outcome::Cancelled => format!("{} cancelled", self.id),
        };
        for fact in self.facts.iter().filter(|fact| !fact.text.is_empty()) {
            text += ", ";
            text += &fact.text;
        }
        text
    }
}

fn new_bar(id: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {percent:>3} % [{wide_bar}] {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::no_length()
        .with_style(style.progress_chars("=> "))
        .with_prefix(id.to_owned())
}

fn percent(figures: &Figures<'_>) -> u64 {
    match figures.total_bytes {
        0 => 0,
        total => {
            let share = u128::from(figures.current_bytes) * 100 / u128::from(total);
            u64::try_from(share).unwrap_or(100).min(100)
        }
    }
}

/// `0.25 s`, `8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration_shown(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 if duration.subsec_nanos() > 0 => format!("{:.2} s", duration.as_secs_f64()),
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Nobody may be reading any more, which is no reason to stop the work.
fn write_line(mut stream: impl Write, text: &str) {
    let _ = writeln!(stream, "{text}").and_then(|()| stream.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(current_mib: u64, status: &'static str) -> Figures<'static> {
        Figures {
            id: "backup",
            status,
            current_bytes: current_mib << 20,
            total_bytes: 1000 << 20,
        }
    }

    fn shown() -> Shown {
        Shown {
            rate: Rate::default(),
            bar: None,
            said: None,
        }
    }

    fn feed<'a>(
        shown: &mut Shown,
        say: impl Fn(&mut Shown, &Figures<'_>, Instant) -> Option<String>,
        news: impl Iterator<Item = (u64, Figures<'a>)>,
    ) -> Vec<String> {
        let start = Instant::now();
        news.filter_map(|(millis, figures)| {
            let now = start + Duration::from_millis(millis);
            shown.rate.observe(now, figures.current_bytes);
            say(shown, &figures, now)
        })
        .collect()
    }

    #[test]
    fn lines_come_each_ten_percent_or_five_seconds() {
        // 2 MiB/s: 1 % in 5 s.
        let slow = (0..200).map(|tenth| (tenth * 100, figures(tenth / 5, "running")));
        let lines = feed(&mut shown(), Shown::line, slow);
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[1],
            "backup: 2 %, 20.0 MiB of 1000.0 MiB, 2.0 MiB/s, 8 min 10 s left"
        );
        // Everything in two seconds is no more than a line a second.
        let fast = (0..=20).map(|tenth| (tenth * 100, figures(tenth * 50, "running")));
        let lines = feed(&mut shown(), Shown::line, fast);
        assert_eq!(
            lines,
            [
                "backup: 50 %, 500.0 MiB of 1000.0 MiB, 500.0 MiB/s, 1 s left",
                "backup: 100 %, 1000.0 MiB of 1000.0 MiB, 500.0 MiB/s, 0 s left"
            ]
        );
        let paused = feed(
            &mut shown(),
            Shown::line,
            [(0, figures(10, "paused")), (5000, figures(10, "paused"))].into_iter(),
        );
        assert_eq!(paused, ["backup: 1 %, 10.0 MiB of 1000.0 MiB, paused"]);
    }

    #[test]
    fn json_lines_parse_and_are_few() {
        let news = (0..=100).map(|tenth| (tenth * 100, figures(tenth, "running")));
        let lines = feed(&mut shown(), Shown::json, news);
        assert_eq!(lines.len(), 21);
        let last: Value = serde_json::from_str(&lines[20]).expect("JSON");
        assert_eq!(
            last,
            json!({
                "event": "progress", "id": "backup", "status": "running", "current-bytes": 100 << 20,
                "total-bytes": 1000 << 20, "bytes-per-second": 10 << 20, "seconds-left": 90,
            })
        );
    }

    #[test]
    fn ends_say_what_happened() {
        let mut ended = Ended {
            id: "mirror",
            outcome: Outcome::Completed,
            bytes: 3 << 30,
            took: Some(Duration::from_millis(1500)),
            facts: vec![Fact {
                key: "allocated-bytes",
                value: json!(1 << 30),
                text: "1.0 GiB on disk".to_owned(),
            }],
        };
        assert_eq!(
            ended.text(),
            "mirror: 3.0 GiB in 1.50 s, 2.0 GiB/s, 1.0 GiB on disk"
        );
        assert_eq!(
            ended.json(),
            json!({
                "event": "completed", "id": "mirror", "bytes": 3_u64 << 30, "seconds": 1.5,
                "bytes-per-second": 2_u64 << 30, "allocated-bytes": 1 << 30,
            })
        );
        ended.facts.clear();
        ended.outcome = Outcome::Failed {
            error: "Input/output error".to_owned(),
            failed_at: Some("node 'target', bytes 0 to 511".to_owned()),
        };
        assert_eq!(
            ended.text(),
            "mirror failed: Input/output error (node 'target', bytes 0 to 511)"
        );
        assert_eq!(ended.json()["failed-at"], "node 'target', bytes 0 to 511");
        ended.took = Some(Duration::ZERO);
        assert_eq!(ended.json()["bytes-per-second"], Value::Null);
        ended.outcome = Outcome::Cancelled;
        assert_eq!(ended.text(), "mirror cancelled");
    }

    #[test]
    fn shares_and_durations_at_the_edges() {
        let figures = |current_bytes, total_bytes| Figures {
            current_bytes,
            total_bytes,
            ..figures(0, "running")
        };
        assert_eq!(percent(&figures(0, 0)), 0);
        assert_eq!(percent(&figures(u64::MAX, u64::MAX)), 100);
        assert_eq!(percent(&figures(5, 3)), 100);
        for (seconds, expected) in [
            (0.25, "0.25 s"),
            (12.9, "12 s"),
            (200.0, "3 min 20 s"),
            (7500.0, "2 h 5 min"),
        ] {
            assert_eq!(duration_shown(Duration::from_secs_f64(seconds)), expected);
        }
    }
}
