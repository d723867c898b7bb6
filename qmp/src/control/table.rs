//! A list of jobs for people, in columns, and for programs, one JSON object each.

use serde_json::{Value, json};

use crate::client::jobs::Job;
use crate::size;

const HEADINGS: [&str; 7] = ["ID", "TYPE", "STATUS", "DONE", "BYTES", "LIMIT", "ERROR"];

/// Jobs in columns, with headings.
pub fn text(jobs: &[Job]) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(jobs.iter().map(cells));
    columns(&rows)
}

/// Rows with each column as wide as its widest cell; two spaces between, none at the end of a line.
pub fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        line.trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// A job for programs.
pub fn value(job: &Job) -> Value {
    let mut value = json!({
        "id": job.id,
        "type": job.job_type,
        "status": job.status,
        "current-bytes": job.current,
        "total-bytes": job.total,
    });
    if let Some(speed) = job.speed {
        value["speed"] = json!(speed);
    }
    if let Some(error) = &job.error {
        value["error"] = json!(error);
    }
    value
}

/// A limit for people.
pub fn limit(speed: u64) -> String {
    match speed {
        0 => "none".to_owned(),
        speed => format!("{}/s", size::shown(speed)),
    }
}

fn cells(job: &Job) -> [String; 7] {
    let done = match job.total {
        0 => "-".to_owned(),
        total => format!("{} %", u128::from(job.current) * 100 / u128::from(total)),
    };
    [
        job.id.clone(),
        job.job_type.clone(),
        job.status.clone(),
        done,
        format!("{} of {}", size::shown(job.current), size::shown(job.total)),
        job.speed.map_or("-".to_owned(), limit),
        job.error.clone().unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let job = |id: &str, error: Option<&str>| {
            let mut job = Job::default();
            job.id = id.to_owned();
            job.job_type = "backup".to_owned();
            job.status = "running".to_owned();
            (job.current, job.total) = (1 << 20, 4 << 20);
            job.speed = error.is_none().then_some(16 << 20);
            job.error = error.map(str::to_owned);
            job
        };
        assert_eq!(
            text(&[job("a", None), job("longer", Some("no space"))]),
            "ID      TYPE    STATUS   DONE  BYTES               LIMIT       ERROR\n\
             a       backup  running  25 %  1.0 MiB of 4.0 MiB  16.0 MiB/s\n\
             longer  backup  running  25 %  1.0 MiB of 4.0 MiB  -           no space"
        );
    }
}
