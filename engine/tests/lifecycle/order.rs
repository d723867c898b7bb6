//! What holds between jobs, nodes and answers: the end of everything, users above a source, one order.

use std::sync::{Arc, Mutex};

use blockyard_engine::error::EngineError;
use blockyard_engine::event::EventKind;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{CommonOptions, DriverSpec, NodeRef, NodeSpec, Request, WorkSpec};

use crate::yard::*;

#[tokio::test]
async fn quitting_ends_every_job_whatever_its_state() {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    yard.start("k", backup("s", "t", 65536), false)
        .await
        .expect("started");
    yard.start("p", backup("u", "v", 0), false)
        .await
        .expect("started");
    yard.until("p PENDING");
    yard.call(Request::Quit).await.expect("quits");
    let mut heard = Vec::new();
    while let Ok(event) = yard.events.try_recv() {
        heard.push(short(&event.kind));
    }
    for job in ["k", "p"] {
        let of_job: Vec<_> = heard.iter().filter(|line| line.starts_with(job)).collect();
        let end = [format!("{job} aborting"), format!("{job} CANCELLED")];
        assert!(end.iter().all(|line| of_job.contains(&line)), "{heard:?}");
        assert_eq!(
            of_job.last().map(|line| line.as_str()),
            Some(format!("{job} null").as_str())
        );
    }
    let after = yard.call(Request::QueryJobs).await.expect_err("gone");
    assert_eq!(after.text, "The daemon is ending");
}

/// A node above the source does not lead past the job, whichever came first.
#[tokio::test]
async fn a_source_is_not_changed_through_a_node_above_it() {
    let yard = yard_with_nodes().await;
    yard.node("other", 8 * MIB).await;
    let spec = NodeSpec {
        node_name: Some("above".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Raw {
            file: NodeRef::Name("s".to_owned()),
            offset: None,
            size: None,
        },
    };
    let added = yard.call(Request::BlockdevAdd(spec)).await;
    added.expect("added");
    let text = "Node 's' is the source of a block job and cannot be changed meanwhile";
    for (first, second) in [
        (backup("s", "t", 1), backup("other", "above", 0)),
        (backup("other", "above", 1), backup("s", "t", 0)),
    ] {
        yard.start("first", first, true).await.expect("started");
        let refused = yard.start("second", second, true).await;
        let refused = refused.expect_err("leads past the job");
        assert!(refused.text.ends_with(text), "{}", refused.text);
        let force = true;
        let cancelled = yard.verb("first", VerbCall::Cancel { force }).await;
        cancelled.expect("accepted");
        yard.until("first null");
    }
}

#[tokio::test]
async fn nothing_is_opened_on_a_filter_that_goes_with_its_job() {
    let yard = yard_with_nodes().await;
    let mut work = backup("s", "t", 1);
    if let WorkSpec::Backup(spec) = &mut work {
        spec.filter_node_name = Some("filter".to_owned());
    }
    yard.start("job", work, true).await.expect("started");
    let spec = NodeSpec {
        node_name: Some("above".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Raw {
            file: NodeRef::Name("filter".to_owned()),
            offset: None,
            size: None,
        },
    };
    let refused = yard.call(Request::BlockdevAdd(spec)).await;
    let text = "Node 'filter' is the filter of a job and cannot have other users";
    assert_eq!(refused, Err(EngineError::generic(text)));
}

/// What a query says is never older than an event that was heard before it.
#[tokio::test]
async fn answers_and_events_have_one_order() {
    let yard = yard_with_nodes().await;
    let latest = Arc::new(Mutex::new(Status::Undefined));
    let heard = latest.clone();
    yard.engine.subscribe(Box::new(move |event| {
        if let EventKind::JobStatusChange { status, .. } = &event.kind {
            *heard.lock().expect("whole") = *status;
        }
    }));
    yard.start("j", backup("s", "t", 65536), false)
        .await
        .expect("started");
    let changing = async {
        for _ in 0..100 {
            yard.verb("j", VerbCall::Pause).await.expect("paused");
            yard.verb("j", VerbCall::Resume).await.expect("resumed");
        }
    };
    let asking = async {
        for _ in 0..1000 {
            let latest = latest.clone();
            let answered = yard.engine.call_then(Request::QueryJobs, move |outcome| {
                let Ok(Reply::Jobs(jobs)) = outcome else {
                    panic!("jobs are told")
                };
                Ok((jobs[0].status, *latest.lock().expect("whole")))
            });
            let (told, heard) = answered.await.expect("answered");
            assert_eq!(told, heard);
        }
    };
    tokio::join!(changing, asking);
}
