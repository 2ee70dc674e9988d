//! The engine: one thread owns the model and the batch; requests come to it as sequences and hear of them in events.

mod queue;
mod work;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bitnet_model::{
    batch::{Limits, Sequence, Update, Usage},
    model::Model,
};
use tokio::sync::{mpsc as events, watch};

use self::work::Work;

/// Handed to requests; clones speak to the same thread, which ends with the last of them.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

/// What the thread and the handles share.
struct Shared {
    /// Sequences that run or wait, and how many there may be.
    in_flight: AtomicUsize,
    most: usize,
    drains: AtomicBool,
    /// As it was after the last step.
    state: watch::Sender<State>,
}

/// What the engine does.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// Of its batch.
    pub usage: Usage,
    /// Sequences that wait.
    pub queued: usize,
}

/// Sees what happens as it happens, for statistics; called on the engine's thread.
pub trait Observer: Send + 'static {
    /// A sequence's first token came so long after it was submitted.
    fn first_token(&self, after: Duration);
    /// A further token came so long after the one before.
    fn next_token(&self, after: Duration);
    /// A step ran so many sequences.
    fn step(&self, sequences: usize);
    /// Tokens of a prompt, some of which had been run for an earlier sequence.
    fn joined(&self, prompt_tokens: usize, reused: usize);
}

struct Command {
    client: String,
    jobs: Vec<Job>,
}

/// A sequence on its way.
struct Job {
    sequence: Sequence,
    choice: usize,
    submitted: Instant,
    deadline: Instant,
    events: events::UnboundedSender<(usize, Event)>,
    cancelled: Arc<[AtomicBool]>,
    /// Counts it as long as it is there.
    _place: Place,
}

/// One of the sequences that there may be.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What becomes of a sequence.
#[derive(Debug)]
pub enum Event {
    /// It runs; so many tokens of its prompt need not be.
    Joined(usize),
    /// Of its batch.
    Update(Update),
    /// It can never run.
    Refused(String),
    /// Its time is up.
    Expired,
    /// The engine failed.
    Broken(String),
}

/// Why sequences are not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There are enough already.
    Busy,
    /// More than there can ever be at once.
    TooMany(usize),
    /// The server ends.
    Draining,
}

/// Hears of sequences that were submitted together. Dropping it cancels them.
pub struct Ticket {
    events: events::UnboundedReceiver<(usize, Event)>,
    cancelled: Arc<[AtomicBool]>,
}

impl Engine {
    /// Starts the thread. At most `queue` sequences wait beside those that the limits let run.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(
        model: Arc<Model>,
        limits: Limits,
        queue: usize,
        observer: impl Observer,
    ) -> std::io::Result<Self> {
        let (commands, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            in_flight: AtomicUsize::new(0),
            most: limits.sequences.saturating_add(queue),
            drains: AtomicBool::new(false),
            state: watch::Sender::new(State::default()),
        });
        let work = Work::new(model, limits, shared.clone(), observer);
        thread::Builder::new().name("engine".into()).spawn(move || work.run(&receiver))?;
        Ok(Self { commands, shared })
    }

    /// Takes sequences of a client, all or none. They end at `deadline` at the latest.
    pub fn submit(
        &self,
        sequences: Vec<Sequence>,
        client: &str,
        deadline: Instant,
    ) -> Result<Ticket, Refused> {
        let (count, most) = (sequences.len(), self.shared.most);
        if self.shared.drains.load(Ordering::Acquire) {
            return Err(Refused::Draining);
        }
        if count > most {
            return Err(Refused::TooMany(most));
        }
        let in_flight = &self.shared.in_flight;
        let fits = |taken: usize| taken.checked_add(count).filter(|all| *all <= most);
        in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, fits)
            .map_err(|_| Refused::Busy)?;
        let (sender, events) = events::unbounded_channel();
        let cancelled: Arc<[AtomicBool]> =
            sequences.iter().map(|_| AtomicBool::new(false)).collect();
        let submitted = Instant::now();
        let jobs = sequences.into_iter().enumerate().map(|(choice, sequence)| Job {
            sequence,
            choice,
            submitted,
            deadline,
            events: sender.clone(),
            cancelled: cancelled.clone(),
            _place: Place(self.shared.clone()),
        });
        let command = Command { client: client.to_owned(), jobs: jobs.collect() };
        // The thread lives as long as a handle does.
        self.commands.send(command).map_err(|_| Refused::Draining)?;
        Ok(Ticket { events, cancelled })
    }

    /// Takes no more sequences.
    pub fn drain(&self) {
        self.shared.drains.store(true, Ordering::Release);
    }

    /// Sequences that run or wait.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Acquire)
    }

    /// What it did after its last step.
    pub fn state(&self) -> State {
        *self.shared.state.borrow()
    }
}

impl Ticket {
    /// What becomes of one of the sequences next, and of which; `None` after the last word on all.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        self.events.recv().await
    }

    /// Ends one of the sequences; it may still be heard of.
    pub fn cancel(&self, choice: usize) {
        if let Some(cancelled) = self.cancelled.get(choice) {
            cancelled.store(true, Ordering::Release);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        (0..self.cancelled.len()).for_each(|choice| self.cancel(choice));
    }
}

impl Job {
    /// Tells the request. One that is gone has cancelled its sequences.
    fn tell(&self, event: Event) {
        let _ = self.events.send((self.choice, event));
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled[self.choice].load(Ordering::Acquire)
    }
}
