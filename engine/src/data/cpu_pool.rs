//! [`CpuPool`]: a few threads for work that keeps a core busy (compression), shared by all data threads, so that one job
//! can use every core and none holds up the requests of others.
//!
//! Promises: a bounded number of pieces of work wait, first come first served, also among those that wait for a place; a
//! panic in one is the failure of that one only; whoever drops the future of a piece that has not begun takes it back.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockyard_images::qcow2::compressed::ClusterCodec;

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(5);

/// Pieces of work that may wait for each thread.
const QUEUED_PER_THREAD: usize = 4;

type Piece = Box<dyn FnOnce(&mut ClusterCodec) + Send>;

/// Threads for CPU-heavy work; started when needed, ended when idle. Every clone is the same pool.
#[derive(Clone)]
pub struct CpuPool {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// 0: no threads, work is done where it is waited for.
    threads_max: usize,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Piece>,
    threads: usize,
    idle: usize,
    next_ticket: u64,
    /// Who waits for a place in the queue.
    waiters: VecDeque<(u64, Waker)>,
}

impl CpuPool {
    /// As many threads as there are cores, none of them yet.
    pub fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_threads(cores)
    }

    /// A pool without threads: work is done at once by whoever waits for it. For tests that own the order of things.
    pub fn on_the_spot() -> Self {
        Self::with_threads(0)
    }

    fn with_threads(threads_max: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            threads_max,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Does `work` on a thread of the pool, which lends its codec. `None` if the work panicked.
    ///
    /// # Cancel safety
    /// Work that has not begun does not happen; else only its answer is lost.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut ClusterCodec) -> T + Send + 'static,
    ) -> Running<T> {
        let cell = Arc::new(Mutex::new(Cell::default()));
        let guard = EndGuard(cell.clone());
        let piece: Piece = Box::new(move |codec| {
            if lock(&guard.0).abandoned {
                return;
            }
            let value = work(codec);
            lock(&guard.0).value = Some(value);
        });
        Running {
            pool: self.clone(),
            piece: Some(piece),
            ticket: None,
            cell,
        }
    }
}

impl Default for CpuPool {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    fn queued_max(&self) -> usize {
        self.threads_max * QUEUED_PER_THREAD
    }

    /// Puts a piece into the queue, where there is room. Comes back with it if nobody would ever do it.
    fn push(self: &Arc<Self>, mut state: MutexGuard<'_, State>, piece: Piece) -> Option<Piece> {
        state.queue.push_back(piece);
        if state.idle > 0 {
            self.work.notify_one();
        }
        if state.idle >= state.queue.len() || state.threads >= self.threads_max {
            return None;
        }
        state.threads += 1;
        let shared = self.clone();
        let started = std::thread::Builder::new()
            .name("cpu-worker".to_owned())
            .spawn(move || shared.serve());
        if started.is_err() {
            state.threads -= 1;
            if state.threads == 0 {
                return state.queue.pop_back();
            }
        }
        None
    }

    fn serve(&self) {
        let mut codec = ClusterCodec::new();
        let mut state = lock(&self.state);
        loop {
            if let Some(piece) = state.queue.pop_front() {
                let next = state.waiters.front().map(|(_, waker)| waker.clone());
                drop(state);
                if let Some(waker) = next {
                    waker.wake();
                }
                carry_out(piece, &mut codec);
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let (guard, waited) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// Does one piece; its end guard answers even when it panics.
fn carry_out(piece: Piece, codec: &mut ClusterCodec) {
    if catch_unwind(AssertUnwindSafe(|| piece(codec))).is_err() {
        // Nobody knows in which state it was left.
        *codec = ClusterCodec::new();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Cell<T> {
    value: Option<T>,
    ended: bool,
    abandoned: bool,
    waker: Option<Waker>,
}

impl<T> Default for Cell<T> {
    fn default() -> Self {
        Self {
            value: None,
            ended: false,
            abandoned: false,
            waker: None,
        }
    }
}

/// Wakes whoever waits when the work is over, however it ended.
struct EndGuard<T>(Arc<Mutex<Cell<T>>>);

impl<T> Drop for EndGuard<T> {
    fn drop(&mut self) {
        let mut cell = lock(&self.0);
        cell.ended = true;
        let waker = cell.waker.take();
        drop(cell);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Waits for a place in the queue, then for the end of the work.
#[must_use = "work begins when it is polled"]
pub struct Running<T> {
    pool: CpuPool,
    /// Until it is in the queue.
    piece: Option<Piece>,
    ticket: Option<u64>,
    cell: Arc<Mutex<Cell<T>>>,
}

impl<T> Running<T> {
    /// Puts the work into the queue when it is its turn; `false`: it is not yet.
    fn enter(&mut self, cx: &mut Context<'_>) -> bool {
        let shared = self.pool.shared.clone();
        if shared.threads_max == 0 {
            if let Some(piece) = self.piece.take() {
                carry_out(piece, &mut ClusterCodec::new());
            }
            return true;
        }
        let mut state = lock(&shared.state);
        let first = match (self.ticket, state.waiters.front()) {
            (_, None) => true,
            (Some(ticket), Some((first, _))) => ticket == *first,
            (None, Some(_)) => false,
        };
        if !first || state.queue.len() >= shared.queued_max() {
            let place = self
                .ticket
                .and_then(|ticket| state.waiters.iter().position(|(other, _)| *other == ticket));
            let waker = cx.waker().clone();
            match place.and_then(|place| state.waiters.get_mut(place)) {
                Some(waiter) => waiter.1 = waker,
                None => {
                    let ticket = state.next_ticket;
                    state.next_ticket += 1;
                    state.waiters.push_back((ticket, waker));
                    self.ticket = Some(ticket);
                }
            }
            return false;
        }
        if self.ticket.take().is_some() {
            state.waiters.pop_front();
        }
        let Some(piece) = self.piece.take() else {
            return true;
        };
        // The next in line may have room too.
        let next = state.waiters.front().map(|(_, waker)| waker.clone());
        let left_over = shared.push(state, piece);
        if let Some(waker) = next {
            waker.wake();
        }
        if let Some(piece) = left_over {
            // No thread can be had: better slow than stuck.
            carry_out(piece, &mut ClusterCodec::new());
        }
        true
    }
}

impl<T> Future for Running<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        if self.piece.is_some() && !self.enter(cx) {
            return Poll::Pending;
        }
        let mut cell = lock(&self.cell);
        if cell.ended {
            return Poll::Ready(cell.value.take());
        }
        cell.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        {
            let mut cell = lock(&self.cell);
            cell.abandoned = true;
            cell.waker = None;
        }
        let Some(ticket) = self.ticket else {
            return;
        };
        let mut state = lock(&self.pool.shared.state);
        state.waiters.retain(|(other, _)| *other != ticket);
        let first = state.waiters.front().map(|(_, waker)| waker.clone());
        drop(state);
        if let Some(waker) = first {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use futures_util::future::join_all;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(future)
    }

    fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn far_more_work_than_fits_the_queue_is_all_done() {
        for pool in [
            CpuPool::with_threads(1),
            CpuPool::new(),
            CpuPool::on_the_spot(),
        ] {
            let answers = block_on(join_all(
                (0..500).map(|number| pool.run(move |_| number * 2)),
            ));
            let expected: Vec<_> = (0..500).map(|number| Some(number * 2)).collect();
            assert_eq!(answers, expected);
            assert!(lock(&pool.shared.state).waiters.is_empty());
        }
    }

    #[test]
    fn a_panic_fails_its_own_work_only() {
        for pool in [CpuPool::with_threads(1), CpuPool::on_the_spot()] {
            let panicking = pool.run(|_| -> u32 { panic!("as the test wants it") });
            assert_eq!(block_on(panicking), None);
            assert_eq!(block_on(pool.run(|_| 7)), Some(7));
        }
    }

    #[test]
    fn the_queue_is_bounded_and_what_is_dropped_does_not_happen() {
        let pool = CpuPool::with_threads(1);
        let done = Arc::new(AtomicUsize::new(0));
        let (release, released) = channel::<()>();
        let (begun, has_begun) = channel();
        let mut stuck = Box::pin(pool.run(move |_| {
            let _ = begun.send(());
            // A test that forgets to release it fails instead of hanging.
            let _ = released.recv_timeout(Duration::from_secs(60));
        }));
        assert!(poll_once(stuck.as_mut()).is_pending());
        assert_eq!(has_begun.recv(), Ok(()));
        let mut waiting: Vec<_> = (0..20)
            .map(|_| {
                let done = done.clone();
                Box::pin(pool.run(move |_| done.fetch_add(1, Ordering::SeqCst)))
            })
            .collect();
        for future in &mut waiting {
            assert!(poll_once(future.as_mut()).is_pending());
        }
        assert_eq!(lock(&pool.shared.state).queue.len(), QUEUED_PER_THREAD);
        assert_eq!(
            lock(&pool.shared.state).waiters.len(),
            20 - QUEUED_PER_THREAD
        );
        // One that is in the queue and one that waits for a place.
        drop(waiting.remove(10));
        drop(waiting.remove(0));
        assert_eq!(release.send(()), Ok(()));
        assert_eq!(block_on(stuck), Some(()));
        block_on(join_all(waiting));
        assert_eq!(done.load(Ordering::SeqCst), 18);
    }

    #[test]
    fn who_comes_first_is_served_first() {
        let pool = CpuPool::with_threads(1);
        let order = Arc::new(Mutex::new(Vec::new()));
        let work = (0..100).map(|number| {
            let order = order.clone();
            pool.run(move |_| lock(&order).push(number))
        });
        block_on(join_all(work));
        assert_eq!(*lock(&order), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_done_before_somebody_waits() {
        let pool = CpuPool::on_the_spot();
        let done = Arc::new(AtomicUsize::new(0));
        let counted = done.clone();
        let mut work = pin!(pool.run(move |_| counted.fetch_add(1, Ordering::SeqCst)));
        assert_eq!(done.load(Ordering::SeqCst), 0);
        assert_eq!(poll_once(work.as_mut()), Poll::Ready(Some(0)));
    }
}
