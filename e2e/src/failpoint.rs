//! Processes in which something goes wrong at a named edge of a transaction.
//!
//! The names are saga-core's (`testkit::failpoints` lists them); a process arms them from its environment.

use crate::platform::Platform;
use saga_core::testkit::eventually;
use stack::{platform::Running, service::Service};
use std::time::Duration;

/// How long a process may take to come to the edge.
const REACHED: Duration = Duration::from_secs(30);

/// What goes wrong at an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The process dies there, once.
    Kill,
    /// An error that counts as the message's own fault, so often.
    Error(usize),
    /// An error as of a lost connection, so often.
    Outage(usize),
}

/// An edge of a transaction in one of the processes.
#[derive(Debug, Clone, Copy)]
pub struct Edge {
    /// Which process.
    pub service: Service,
    /// The fail point with its scope, as in `consumer.after-commit@payment-svc`.
    pub name: &'static str,
    /// How often it is passed before.
    pub skip: usize,
    /// What happens there.
    pub wrong: Wrong,
}

impl Edge {
    fn armed(self) -> String {
        let skipped = if self.skip == 0 { String::new() } else { format!("{}*off->", self.skip) };
        let action = match self.wrong {
            Wrong::Kill => "1*return(kill)->off".to_owned(),
            Wrong::Error(times) => format!("{times}*return(error)->off"),
            Wrong::Outage(times) => format!("{times}*return(outage)->off"),
        };
        format!("{}={skipped}{action}", self.name)
    }
}

impl Platform {
    /// Restarts a process so that something goes wrong at the edge while `work` is done, then starts it as it was.
    ///
    /// # Panics
    /// When a process that is to die does not: then the edge was not reached, or the binaries were built without fail
    /// points.
    pub async fn goes_wrong_at<T>(&self, edge: Edge, work: impl Future<Output = T>) -> T {
        let running = self.stack.service(edge.service);
        let armed = edge.armed();
        running.process.stop().await;
        running.process.start_again_with(&[("FAILPOINTS", &armed)]).expect("the program is there");
        // It may die before it is ready: what is wrong with that is said below.
        let _ = running.ready().await;
        let meanwhile = async {
            if edge.wrong == Wrong::Kill {
                self.dies(running, &armed).await;
            }
        };
        let (result, ()) = tokio::join!(work, meanwhile);
        if edge.wrong != Wrong::Kill {
            running.restart().await.unwrap_or_else(|error| panic!("{}: {error}", edge.service));
        }
        self.fault_fired(edge.name);
        result
    }

    async fn dies(&self, running: &Running, armed: &str) {
        let died = tokio::time::timeout(REACHED, running.process.wait()).await;
        let service = running.service;
        assert!(died.is_ok(), "{service} did not die at {armed}; were the binaries built with --workspace?");
        running.start_again().await.unwrap_or_else(|error| panic!("{service} does not come back: {error}"));
    }

    /// Waits until the platform's processes all say that they are ready.
    pub async fn all_ready(&self) {
        for service in Service::ALL {
            let url = self.admin(service, "/readyz");
            eventually(REACHED * 2, || async { stack::platform::asked(&self.http, &url).await.ok() }).await;
        }
    }
}
