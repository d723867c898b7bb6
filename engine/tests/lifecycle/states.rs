//! One job: its states, the order of its events, every verb in every status it can be found in.

use blockyard_engine::error::ErrorKind;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::{Verb, VerbCall, accepts};
use blockyard_engine::reply::IoStatus;
use blockyard_engine::request::{CopyMode, Request, VerbFamily};

use crate::yard::*;

#[tokio::test]
async fn a_backup_runs_through_its_states() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 0), true)
        .await
        .expect("started");
    yard.expect(&[
        "j created",
        "j running",
        "j waiting",
        "j pending",
        "j COMPLETED 8388608/8388608",
        "j concluded",
        "j null",
    ]);
    assert_eq!(yard.jobs().await, []);
}

#[tokio::test]
async fn a_client_that_wants_to_finalizes_and_dismisses_itself() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 0), false)
        .await
        .expect("started");
    yard.until("j PENDING");
    assert_eq!(yard.block_job("j").await.status, Status::Pending);
    yard.verb("j", VerbCall::Finalize).await.expect("finalized");
    yard.expect(&["j COMPLETED 8388608/8388608", "j concluded"]);
    yard.verb("j", VerbCall::Dismiss).await.expect("dismissed");
    yard.expect(&["j null"]);
    let gone = yard.verb("j", VerbCall::Dismiss).await.expect_err("gone");
    assert_eq!(gone.text, "Job not found");
    let request = Request::JobVerb {
        family: VerbFamily::BlockJob,
        id: "j".to_owned(),
        verb: VerbCall::Dismiss,
    };
    let gone = yard.call(request).await.expect_err("gone");
    assert_eq!(
        (gone.kind, gone.text.as_str()),
        (ErrorKind::DeviceNotActive, "Block job 'j' not found")
    );
}

#[tokio::test]
async fn a_throttled_job_pauses_resumes_and_is_cancelled_while_paused() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 65536), false)
        .await
        .expect("started");
    yard.expect(&["j created", "j running"]);
    let early = yard
        .verb("j", VerbCall::Resume)
        .await
        .expect_err("not paused");
    assert_eq!(early.text, "Can't resume a job that was not paused");
    yard.verb("j", VerbCall::Pause).await.expect("paused");
    yard.until("j paused");
    let twice = yard
        .verb("j", VerbCall::Pause)
        .await
        .expect_err("paused already");
    assert_eq!(twice.text, "Job is already paused");
    let soft = Request::JobVerb {
        family: VerbFamily::BlockJob,
        id: "j".to_owned(),
        verb: VerbCall::Cancel { force: false },
    };
    let refused = yard.call(soft).await.expect_err("paused");
    assert_eq!(
        refused.text,
        "The block job for device 'j' is currently paused"
    );
    yard.verb("j", VerbCall::Resume).await.expect("resumed");
    yard.expect(&["j running"]);
    yard.verb("j", VerbCall::Pause).await.expect("paused");
    yard.expect(&["j paused"]);
    yard.verb("j", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&["j running", "j aborting", "j CANCELLED", "j concluded"]);
    assert_eq!(
        yard.jobs().await[0].error.as_deref(),
        Some("Operation canceled")
    );
}

#[tokio::test]
async fn a_mirror_converges_and_completes_or_is_let_go() {
    let yard = yard_with_nodes().await;
    for ending in [VerbCall::Complete, VerbCall::Cancel { force: false }] {
        yard.start("m", mirror("s", "t", 0), true)
            .await
            .expect("started");
        yard.expect(&[
            "m created",
            "m running",
            "m ready",
            "m READY 8388608/8388608",
        ]);
        let request = Request::JobVerb {
            family: VerbFamily::BlockJob,
            id: "m".to_owned(),
            verb: ending,
        };
        yard.call(request).await.expect("accepted");
        yard.expect(&[
            "m waiting",
            "m pending",
            "m COMPLETED 8388608/8388608",
            "m concluded",
            "m null",
        ]);
    }
    yard.start("m", mirror("s", "t", 0), true)
        .await
        .expect("started");
    yard.until("m READY 8388608/8388608");
    yard.verb("m", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&["m aborting", "m CANCELLED", "m concluded", "m null"]);
}

#[tokio::test]
async fn a_standby_mirror_completes_after_resume() {
    let yard = yard_with_nodes().await;
    yard.start("m", mirror("s", "t", 0), true)
        .await
        .expect("started");
    yard.until("m READY 8388608/8388608");
    yard.verb("m", VerbCall::Pause).await.expect("paused");
    yard.expect(&["m standby"]);
    yard.verb("m", VerbCall::Complete).await.expect("accepted");
    assert_eq!(yard.block_job("m").await.status, Status::Standby);
    yard.verb("m", VerbCall::Resume).await.expect("resumed");
    yard.expect(&["m ready", "m waiting", "m pending"]);
}

#[tokio::test]
async fn a_ready_mirror_is_not_busy_with_what_it_is_told() {
    let yard = yard_with_nodes().await;
    yard.start("m", mirror("s", "t", 0), true)
        .await
        .expect("started");
    yard.until("m READY 8388608/8388608");
    for speed in 1..500 {
        yard.verb("m", VerbCall::SetSpeed { speed })
            .await
            .expect("accepted");
        assert!(!yard.block_job("m").await.busy, "{speed} B/s");
        yard.verb("m", VerbCall::Pause).await.expect("paused");
        yard.until("m standby");
        yard.verb("m", VerbCall::Resume).await.expect("resumed");
        yard.until("m ready");
        assert!(!yard.block_job("m").await.busy, "resumed, {speed}");
    }
}

/// Brings a job into `status` and keeps it there.
async fn job_in(yard: &Yard, status: Status) -> &'static str {
    match status {
        Status::Running | Status::Paused => {
            yard.start("j", backup("s", "t", 65536), false)
                .await
                .expect("started");
            yard.until("j running");
            if status == Status::Paused {
                yard.verb("j", VerbCall::Pause).await.expect("paused");
                yard.until("j paused");
            }
        }
        Status::Ready | Status::Standby => {
            yard.start("j", mirror("s", "t", 0), false)
                .await
                .expect("started");
            yard.until("j READY 8388608/8388608");
            if status == Status::Standby {
                yard.verb("j", VerbCall::Pause).await.expect("paused");
                yard.until("j standby");
            }
        }
        Status::Pending | Status::Concluded => {
            yard.start("j", backup("s", "t", 0), false)
                .await
                .expect("started");
            yard.until("j PENDING");
            if status == Status::Concluded {
                yard.verb("j", VerbCall::Finalize).await.expect("finalized");
                yard.until("j concluded");
            }
        }
        other => panic!("no way to keep a job in {other:?}"),
    }
    "j"
}

fn call_of(verb: Verb) -> VerbCall {
    match verb {
        Verb::Cancel => VerbCall::Cancel { force: true },
        Verb::Pause => VerbCall::Pause,
        Verb::Resume => VerbCall::Resume,
        Verb::SetSpeed => VerbCall::SetSpeed { speed: 1 },
        Verb::Complete => VerbCall::Complete,
        Verb::Finalize => VerbCall::Finalize,
        Verb::Dismiss => VerbCall::Dismiss,
        Verb::Change => VerbCall::Change {
            copy_mode: Some(CopyMode::WriteBlocking),
        },
    }
}

#[tokio::test]
async fn every_verb_in_every_status_that_lasts() {
    use Status::*;
    for status in [Running, Paused, Ready, Standby, Pending, Concluded] {
        for verb in Verb::ALL {
            let yard = yard_with_nodes().await;
            let id = job_in(&yard, status).await;
            let outcome = yard.verb(id, call_of(verb)).await;
            let is_mirror = matches!(status, Ready | Standby);
            let is_paused = matches!(status, Paused | Standby);
            let expected = match verb {
                Verb::Resume if !is_paused => {
                    Some("Can't resume a job that was not paused".to_owned())
                }
                _ if !accepts(status, verb) => Some(format!(
                    "Job 'j' in state '{}' cannot accept command verb '{}'",
                    status.name(),
                    verb.name()
                )),
                Verb::Pause if is_paused => Some("Job is already paused".to_owned()),
                Verb::Change if !is_mirror => Some("Job type does not support change".to_owned()),
                _ => None,
            };
            assert_eq!(
                outcome.err().map(|error| error.text),
                expected,
                "{verb:?} in {status:?}"
            );
        }
    }
}

#[tokio::test]
async fn jobs_that_never_start_come_and_go() {
    let yard = yard_with_nodes().await;
    let error = yard
        .start("j", backup("s", "t", -1), true)
        .await
        .expect_err("negative");
    assert_eq!(error.text, "Parameter 'speed' expects a non-negative value");
    yard.expect(&["j created", "j null"]);
    for (id, text) in [("1x", "Invalid job ID '1x'"), ("", "Invalid job ID ''")] {
        let error = yard
            .start(id, mirror("s", "t", 0), true)
            .await
            .expect_err("bad id");
        assert_eq!(error.text, text);
    }
    yard.start("j", backup("s", "t", 65536), true)
        .await
        .expect("started");
    yard.node("u", 8 * MIB).await;
    let error = yard
        .start("j", mirror("u", "u", 0), true)
        .await
        .expect_err("itself");
    assert_eq!(error.text, "Can't mirror node into itself");
    yard.node("v", 8 * MIB).await;
    let error = yard
        .start("j", mirror("u", "v", 0), true)
        .await
        .expect_err("taken");
    assert_eq!(error.text, "Job ID 'j' already in use");
}

#[tokio::test]
async fn sizes_that_differ_fail_inside_a_mirror_and_before_a_backup() {
    let yard = yard_with_nodes().await;
    yard.node("u", MIB).await;
    yard.start("m", mirror("s", "u", 0), false)
        .await
        .expect("started");
    yard.expect(&[
        "m created",
        "m running",
        "m aborting",
        "m COMPLETED Source and target image have different sizes",
        "m concluded",
    ]);
    let view = yard.block_job("m").await;
    assert_eq!((view.total_bytes, view.io_status), (0, IoStatus::Ok));
    yard.verb("m", VerbCall::Dismiss).await.expect("dismissed");
    let error = yard
        .start("b", backup("s", "u", 0), true)
        .await
        .expect_err("different sizes");
    assert_eq!(error.text, "Source and target image have different sizes");
}
