//! [`ThreadSet`]: the data threads of the engine, its own and those that clients add as `iothread` objects.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use blockyard_ring::{BackendChoice, ReactorConfig};
use blockyard_storage::LocalFuture;
use blockyard_storage::buffer::BufferPool;
use tokio::sync::oneshot;

use crate::data::context::{DataContext, ThreadId};
use crate::data::cpu_pool::CpuPool;
use crate::data::thread::{DataThread, Mailbox};
use crate::error::EngineError;
use crate::node::news::News;

/// One thread and what is known of it.
struct Member {
    id: ThreadId,
    /// Id of the `iothread` object; `None`: the engine's own.
    name: Option<String>,
    load: i64,
    thread: DataThread,
}

struct Members {
    next_id: u64,
    list: Vec<Member>,
}

/// The data threads, on the manager's thread.
#[derive(Clone)]
pub struct ThreadSet {
    members: Rc<RefCell<Members>>,
    /// Of all clocks, so that what threads share can count time.
    clock_start: Instant,
    backend: BackendChoice,
    pool: BufferPool,
    cpu: CpuPool,
    news: News,
}

impl ThreadSet {
    /// Starts `count` threads (at least one) that share `pool` and tell what is new to `news`.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be had.
    pub fn start(
        count: usize,
        backend: BackendChoice,
        pool: BufferPool,
        news: News,
    ) -> Result<Self, EngineError> {
        let members = Rc::new(RefCell::new(Members {
            next_id: 0,
            list: Vec::new(),
        }));
        let threads = Self {
            members,
            clock_start: Instant::now(),
            backend,
            pool,
            cpu: CpuPool::new(),
            news,
        };
        for _ in 0..count.max(1) {
            threads.add(None)?;
        }
        Ok(threads)
    }

    fn add(&self, name: Option<String>) -> Result<ThreadId, EngineError> {
        let mut members = self.members.borrow_mut();
        let id = ThreadId(members.next_id);
        let config = ReactorConfig {
            backend: self.backend,
            ..ReactorConfig::new(self.pool.clone())
        };
        let thread = DataThread::start(
            &format!("data-{}", id.0),
            config,
            self.clock_start,
            self.pool.clone(),
            self.cpu.clone(),
            self.news.clone(),
        )?;
        members.next_id += 1;
        members.list.push(Member {
            id,
            name,
            load: 0,
            thread,
        });
        Ok(id)
    }

    /// The least loaded of the engine's own threads.
    pub fn choose(&self) -> ThreadId {
        let members = self.members.borrow();
        members
            .list
            .iter()
            .filter(|member| member.name.is_none())
            .min_by_key(|member| (member.load, member.id))
            .map_or(ThreadId(0), |member| member.id)
    }

    /// Counts users of a thread in (positive) or out (negative).
    pub fn load(&self, thread: ThreadId, delta: i64) {
        let mut members = self.members.borrow_mut();
        if let Some(member) = members.list.iter_mut().find(|member| member.id == thread) {
            member.load += delta;
        }
    }

    /// Users of a thread now.
    pub fn load_of(&self, thread: ThreadId) -> i64 {
        let members = self.members.borrow();
        members
            .list
            .iter()
            .find(|member| member.id == thread)
            .map_or(0, |member| member.load)
    }

    /// Starts a thread under the id of an `iothread` object.
    ///
    /// # Errors
    /// When the thread or its reactor cannot be had.
    pub fn add_named(&self, name: &str) -> Result<ThreadId, EngineError> {
        self.add(Some(name.to_owned()))
    }

    /// Ends the thread of an `iothread` object; nothing may live on it any more.
    pub fn remove_named(&self, name: &str) {
        let member = {
            let mut members = self.members.borrow_mut();
            let found = members
                .list
                .iter()
                .position(|member| member.name.as_deref() == Some(name));
            found.map(|index| members.list.remove(index))
        };
        drop(member);
    }

    /// The thread of an `iothread` object.
    pub fn named(&self, name: &str) -> Option<ThreadId> {
        let members = self.members.borrow();
        let found = members
            .list
            .iter()
            .find(|member| member.name.as_deref() == Some(name));
        found.map(|member| member.id)
    }

    /// Starts `work` on `thread` without waiting for its end; `false`: the thread is gone.
    pub fn spawn(
        &self,
        thread: ThreadId,
        work: impl FnOnce(Rc<DataContext>) -> LocalFuture<'static, ()> + Send + 'static,
    ) -> bool {
        let members = self.members.borrow();
        let found = members.list.iter().find(|member| member.id == thread);
        found.is_some_and(|member| member.thread.send(Box::new(work)))
    }

    /// A way to send tasks to `thread` from anywhere, if it is there.
    pub(crate) fn mailbox(&self, thread: ThreadId) -> Option<Mailbox> {
        let members = self.members.borrow();
        let found = members.list.iter().find(|member| member.id == thread);
        found.map(|member| member.thread.mailbox())
    }

    /// Runs `work` on `thread` and returns its result.
    ///
    /// # Errors
    /// When the daemon ends, or else when the thread is gone or the work panicked; the text says that this is a bug.
    pub async fn run<T: Send + 'static>(
        &self,
        thread: ThreadId,
        work: impl FnOnce(Rc<DataContext>) -> LocalFuture<'static, T> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (done, answer) = oneshot::channel();
        self.spawn(thread, move |context| {
            Box::pin(async move {
                let _ = done.send(work(context).await);
            })
        });
        answer.await.map_err(|_| {
            EngineError::generic(match self.has_ended() {
                true => "The data thread was given up, as the daemon ends",
                false => "Internal error: a data thread lost a request (this is a bug)",
            })
        })
    }

    /// Whether all threads have ended, and with them what they were asked for.
    pub fn has_ended(&self) -> bool {
        self.members.borrow().list.is_empty()
    }

    /// Ends all threads. What is in flight is abandoned; jobs and nodes must be gone.
    pub fn end(&self) {
        let members = std::mem::take(&mut self.members.borrow_mut().list);
        drop(members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::BUFFER_BUDGET_BYTES;

    #[test]
    fn a_request_that_is_given_up_at_the_end_is_no_bug() {
        let pool = BufferPool::new(BUFFER_BUDGET_BYTES);
        let news = News::channel().0;
        let threads = ThreadSet::start(1, BackendChoice::Auto, pool, news).expect("threads");
        let thread = threads.choose();
        let asked = threads.run(thread, |_| Box::pin(std::future::pending::<()>()));
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let answer = runtime.expect("a runtime").block_on(async {
            let mut asked = std::pin::pin!(asked);
            let begun = futures_util::future::select(&mut asked, std::future::ready(())).await;
            drop(begun);
            threads.end();
            asked.await
        });
        let told = answer.expect_err("it was given up").to_string();
        assert_eq!(told, "The data thread was given up, as the daemon ends");
    }
}
