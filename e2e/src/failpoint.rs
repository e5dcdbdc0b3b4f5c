//! Processes in which something goes wrong at a named edge of a transaction.
//!
//! The names are saga-core's (`testkit::failpoints` lists them). A process arms them from its environment, and its log
//! holds which fired. Only that counts: a process may end, and work may be done, without it.

use crate::platform::{Platform, SETTLED_WITHIN};
use saga_core::testkit::{eventually, failpoints::FIRES};
use serde_json::Value;
use stack::{platform::Running, service::Service};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
    time::Duration,
};

/// How long a process may take to come to the edge, as often as it is to go wrong there.
const REACHED_WITHIN: Duration = SETTLED_WITHIN;

/// The faults that an edge can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The process dies there, once.
    Kill,
    /// The edge returns an error that counts as the message's own fault, so often.
    Error(usize),
    /// The edge returns an error as of a lost connection, so often.
    Outage(usize),
}

/// An edge of a transaction in one of the processes.
#[derive(Debug, Clone)]
pub struct Edge {
    /// The process that has the edge.
    pub service: Service,
    /// The fail point with its scope, as in `consumer.after-commit@payment-svc`, and perhaps a step, as in
    /// `consumer.after-commit@payment-svc/undo authorize-payment`.
    pub name: String,
    /// How often the edge is passed before the fault.
    pub skip: usize,
    /// The fault at the edge.
    pub wrong: Wrong,
}

impl Edge {
    /// An edge at which the process dies the first time.
    pub fn kill(service: Service, name: impl Into<String>) -> Self {
        Self { service, name: name.into(), skip: 0, wrong: Wrong::Kill }
    }

    fn armed(&self) -> String {
        let skipped = if self.skip == 0 { String::new() } else { format!("{}*off->", self.skip) };
        let action = match self.wrong {
            Wrong::Kill => "1*return(kill)->off".to_owned(),
            Wrong::Error(times) => format!("{times}*return(error)->off"),
            Wrong::Outage(times) => format!("{times}*return(outage)->off"),
        };
        format!("{}={skipped}{action}", self.name)
    }

    /// How often the edge is to go wrong.
    fn times(&self) -> usize {
        match self.wrong {
            Wrong::Kill => 1,
            Wrong::Error(times) | Wrong::Outage(times) => times,
        }
    }

    /// How often the edge went wrong since the process's log had `since` bytes.
    fn fired(&self, log: &Path, since: u64) -> io::Result<usize> {
        let (mut file, mut lines) = (File::open(log)?, Vec::new());
        file.seek(SeekFrom::Start(since))?;
        file.read_to_end(&mut lines)?;
        let lines = lines.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        Ok(lines.filter(|line| line["message"] == FIRES && line["fail_point"] == self.name).count())
    }
}

impl Platform {
    /// Restarts a process so that something goes wrong at the edge while `work` is done. Then starts it as it was.
    ///
    /// # Panics
    /// When the edge does not go wrong as often as it is to. Then `work` does not come to the edge, or the binaries
    /// were built without fail points, or `RUST_LOG` leaves warnings out.
    pub async fn goes_wrong_at<T>(&self, edge: &Edge, work: impl Future<Output = T>) -> T {
        let running = self.stack.service(edge.service);
        let armed = edge.armed();
        running.process.stop().await;
        // The log so far is about other edges, or about an earlier passage of this one.
        let since = running.process.log().metadata().expect("it has written a log").len();
        running.process.start_again_with(&[("FAILPOINTS", &armed)]).expect("the program is there");
        // The process may die before it is ready: what is wrong with that is reported below.
        let _ = running.ready().await;
        let meanwhile = async {
            if edge.wrong == Wrong::Kill {
                self.dies(running, &armed).await;
            }
            self.fires(running, edge, since).await;
        };
        let (result, ()) = tokio::join!(work, meanwhile);
        if edge.wrong != Wrong::Kill {
            running.restart().await.unwrap_or_else(|error| panic!("{}: {error}", edge.service));
        }
        result
    }

    async fn dies(&self, running: &Running, armed: &str) {
        let died = tokio::time::timeout(REACHED_WITHIN, running.process.wait()).await;
        let service = running.service;
        assert!(died.is_ok(), "{service} did not die at {armed}; were the binaries built with --workspace?");
        running.start_again().await.unwrap_or_else(|error| panic!("{service} does not come back: {error}"));
    }

    /// Waits until the edge went wrong as often as it is to.
    async fn fires(&self, running: &Running, edge: &Edge, since: u64) {
        let fired = || edge.fired(running.process.log(), since).expect("the log can be read");
        let all = eventually(REACHED_WITHIN * 2, || async { (fired() >= edge.times()).then_some(()) });
        // The wait has a bound of its own, because its error can name the edge.
        let reached = tokio::time::timeout(REACHED_WITHIN, all).await;
        let (service, armed, times) = (edge.service, edge.armed(), fired());
        assert!(reached.is_ok(), "{service}: {armed} fired {times} times; were the binaries built with --workspace?");
        (0..times).for_each(|_| self.fault_fired(&edge.name));
    }

    /// Waits until `/health` of each of the platform's processes reports that its work moves.
    pub async fn all_ready(&self) {
        for service in Service::ALL {
            let url = self.admin(service, "/health");
            eventually(REACHED_WITHIN * 2, || async { stack::platform::asked(&self.http, &url).await.ok() }).await;
        }
    }
}
