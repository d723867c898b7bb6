//! Jobs that end together or not at all.

use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::request::{
    BlkdebugIo, BlkdebugSpec, CommonOptions, DriverSpec, InjectError, JobSpec, NodeRef, NodeSpec,
    Request, WorkSpec,
};

use crate::yard::*;

fn job(id: &str, work: WorkSpec, auto_finalize: bool) -> JobSpec {
    JobSpec {
        id: Some(id.to_owned()),
        auto_finalize,
        auto_dismiss: true,
        work,
    }
}

/// Four nodes, and a group of two backups: A is done at once, B is held by its rate limit.
async fn group(auto_finalize: bool) -> Yard {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    let jobs = vec![
        job("A", backup("s", "t", 0), auto_finalize),
        job("B", backup("u", "v", 65536), true),
    ];
    yard.call(Request::Transaction {
        actions: jobs.into_iter().map(Into::into).collect(),
        grouped: true,
    })
    .await
    .expect("started");
    yard.expect(&[
        "A created",
        "B created",
        "B running",
        "A running",
        "A waiting",
    ]);
    yard
}

#[tokio::test]
async fn a_group_waits_for_its_last_member_and_is_finalized_through_any() {
    let yard = group(false).await;
    for verb in [VerbCall::Finalize, VerbCall::Pause] {
        let error = yard.verb("A", verb.clone()).await.expect_err("waiting");
        let name = verb.verb().name();
        assert_eq!(
            error.text,
            format!("Job 'A' in state 'waiting' cannot accept command verb '{name}'")
        );
    }
    yard.verb("B", VerbCall::SetSpeed { speed: 0 })
        .await
        .expect("speed set");
    yard.expect(&["B waiting", "B pending", "A pending", "A PENDING"]);
    yard.verb("B", VerbCall::Finalize).await.expect("finalized");
    yard.expect(&[
        "B COMPLETED 8388608/8388608",
        "B concluded",
        "B null",
        "A COMPLETED 8388608/8388608",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn cancelling_a_waiting_member_ends_its_group() {
    let yard = group(true).await;
    yard.verb("A", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&[
        "B aborting",
        "B CANCELLED",
        "B concluded",
        "B null",
        "A aborting",
        "A CANCELLED",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn a_member_that_fails_ends_its_group() {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    let fault = InjectError {
        event: "none".to_owned(),
        iotype: Some(BlkdebugIo::Read),
        sector: Some(8192),
        ..InjectError::default()
    };
    let faulty = BlkdebugSpec {
        inject_error: vec![fault],
        ..BlkdebugSpec::over(NodeRef::Name("s".to_owned()))
    };
    let spec = NodeSpec {
        node_name: Some("faulty".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Blkdebug(faulty),
    };
    let added = yard.call(Request::BlockdevAdd(spec)).await;
    added.expect("node added");
    let jobs = vec![
        job("A", backup("faulty", "t", 0), true),
        job("B", backup("u", "v", 65536), true),
    ];
    let grouped = true;
    let started = yard
        .call(Request::Transaction {
            actions: jobs.into_iter().map(Into::into).collect(),
            grouped,
        })
        .await;
    started.expect("started");
    yard.expect(&["A created", "B created", "B running", "A running"]);
    yard.expect(&[
        "A ERROR Source Report",
        "A aborting",
        "B aborting",
        "B CANCELLED",
        "B concluded",
        "B null",
        "A COMPLETED Input/output error",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn a_group_that_cannot_start_as_a_whole_comes_to_nothing() {
    let yard = yard_with_nodes().await;
    let jobs = vec![
        job("A", backup("s", "t", 0), true),
        job("B", backup("s", "zz", 0), true),
    ];
    let error = yard
        .call(Request::Transaction {
            actions: jobs.into_iter().map(Into::into).collect(),
            grouped: true,
        })
        .await
        .expect_err("no zz");
    assert_eq!(error.text, "Cannot find device='zz' nor node-name='zz'");
    yard.expect(&["A created", "A aborting", "A concluded", "A null"]);
    assert_eq!(yard.jobs().await, []);
}
