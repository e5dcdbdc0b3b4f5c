//! Processes that die at a named edge of a transaction.
//!
//! The names are saga-core's (`testkit::failpoints` lists them); a process arms them from its environment.

use crate::platform::Platform;
use saga_core::testkit::eventually;
use stack::service::Service;
use std::time::Duration;

/// How long a process may take to come to the edge.
const REACHED: Duration = Duration::from_secs(30);

/// An edge at which a process is to die.
#[derive(Debug, Clone, Copy)]
pub struct Edge {
    /// Which process.
    pub service: Service,
    /// The fail point with its scope, as in `consumer.after-commit@payment-svc`.
    pub name: &'static str,
    /// How often it is passed before.
    pub skip: usize,
}

impl Platform {
    /// Restarts a process so that it dies at the edge, does `work`, waits for its death, and starts it as it was.
    ///
    /// # Panics
    /// When it does not die: then the edge was not reached, or the binaries were built without fail points.
    pub async fn dies_at<T>(&self, edge: Edge, work: impl Future<Output = T>) -> T {
        let Edge { service, name, skip } = edge;
        let running = self.stack.service(service);
        running.process.stop().await;
        let armed =
            if skip == 0 { format!("{name}=1*return(kill)") } else { format!("{name}={skip}*off->1*return(kill)") };
        running.process.start_again_with(&[("FAILPOINTS", &armed)]).expect("the program is there");
        running.ready().await.unwrap_or_else(|error| panic!("{service} with {armed}: {error}"));
        let result = work.await;
        let died = tokio::time::timeout(REACHED, running.process.wait()).await;
        assert!(died.is_ok(), "{service} did not die at {armed}; were the binaries built with --workspace?");
        self.fault_fired(name);
        running.start_again().await.unwrap_or_else(|error| panic!("{service} does not come back: {error}"));
        result
    }

    /// Waits until the platform's processes all say that they are ready.
    pub async fn all_ready(&self) {
        for service in Service::ALL {
            let url = self.admin(service, "/readyz");
            eventually(REACHED, || async { stack::platform::asked(&self.http, &url).await.ok() }).await;
        }
    }
}
