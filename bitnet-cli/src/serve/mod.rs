//! `bitnet serve`: HTTP in, the engine behind.
//!
//! A request passes [`guard`], is read to the end, understood by [`crate::openai`], handed to the [`engine`] and answered from
//! its events.

pub mod adapters;
mod answering;
pub mod app;
pub mod audit;
mod body;
pub mod cache;
mod embeddings;
pub mod engine;
mod error;
pub mod filter;
mod generate;
mod guard;
pub mod keys;
pub mod listen;
mod models;
pub mod rates;
mod received;
mod responses;
pub mod routes;
pub mod sanitize;
pub mod stats_file;
mod status;
mod tokenize;
pub mod watch;

use std::{sync::Arc, time::Duration};

use bitnet_model::pages;

use self::{app::App, stats_file::StatsFile};

/// How often is looked whether something is beyond its threshold.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often clients are forgotten who have their full rate again, and freed memory is given back if nothing runs.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Looks after the server for as long as it runs.
pub async fn look_after(app: Arc<App>, file: Option<StatsFile>) {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    let mut forgets = tokio::time::interval(FORGET_EVERY);
    let every = file.as_ref().map_or(FORGET_EVERY, |file| file.every);
    let mut writes = tokio::time::interval(every);
    let mut works = true;
    loop {
        tokio::select! {
            _ = looks.tick() => app.watch.look(app.engine_state()),
            _ = forgets.tick() => {
                app.rates.forget();
                // One long body would else be paid for with much memory until the end.
                if app.loaded.get().is_some_and(|loaded| loaded.engine.in_flight() == 0) {
                    pages::release_freed_memory();
                }
            }
            _ = writes.tick() => {
                let Some(file) = &file else { continue };
                let written = file.write(&app);
                if let (Err(error), true) = (&written, works) {
                    tracing::error!("{}: {error}; the statistics are old", file.path.display());
                }
                works = written.is_ok();
            }
        }
    }
}
