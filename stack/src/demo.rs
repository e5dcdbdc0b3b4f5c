//! `stack demo`: real orders through every outcome, and then the books.
//!
//! Each scene drives the platform from outside, over HTTP, as a customer would. The demo reads a database only to find
//! the moment for a SIGKILL. Any surprise is an error that names the log to read; the stack ends either way.

mod books;
mod client;
mod pace;
mod report;
mod scenes;
mod totals;

use anyhow::Context;
use client::Client;
use pace::Pace;
use stack::{
    platform::{Stack, StackConfig},
    progress::Progress,
    run,
    service::Service,
    up,
};
use std::process::ExitCode;

/// How long the simulated provider takes over a `tok_slow`: long enough to cancel an order or kill a service meanwhile,
/// by a reader's own eyes.
const SLOW_MS: &str = "800";

/// Runs the demo, start to end.
pub(crate) async fn demo() -> anyhow::Result<ExitCode> {
    let progress = Progress::for_people();
    let interrupted = run::interrupted()?;
    let done = tokio::select! {
        done = everything(&progress) => done,
        signal = interrupted => Err(anyhow::anyhow!("interrupted ({signal})")),
    };
    progress.finish();
    println!("\n{}\nNothing is left running.", done?.said());
    println!("To look around yourself: `make up`, then the URLs that it prints.");
    Ok(ExitCode::SUCCESS)
}

async fn everything(progress: &Progress) -> anyhow::Result<Pace> {
    let mut pace = Pace::begin();
    // The platform takes the ports of `make up`, so that the printed addresses are good later, too.
    let mut config = StackConfig::for_tests().env(Service::Gateway, "GATEWAY_SIM_SLOW_MS", SLOW_MS);
    config.preferred_ports = true;
    config.servers.preferred_ports = Some(up::SERVER_PORTS);
    let stack = Stack::start(config, progress).await?;
    pace.phase("to start everything");
    let played = play(&stack, progress).await.with_context(|| what_to_do(&stack));
    pace.phase("for the stock and the orders");
    // The stop comes after a failure, too: an orderly end writes the last lines of the logs that the reader is about to
    // see.
    progress.step("stopping everything");
    stack.stop().await;
    pace.phase("to stop everything");
    played.map(|()| pace)
}

fn what_to_do(stack: &Stack) -> String {
    let logs = stack.logs().display();
    let errors = format!("grep -hE '\"level\":\"(ERROR|WARN)\"' {logs}/*.log | tail");
    format!("the demo did not go as it must. The logs are in {logs}\n  Begin with: {errors}")
}

async fn play(stack: &Stack, progress: &Progress) -> anyhow::Result<()> {
    let client = Client::new(stack);
    progress.step("seeding stock");
    scenes::seed(&client).await?;
    let before = books::Books::read(&client).await?;
    let mut played = Vec::new();
    for scene in scenes::ALL {
        progress.step(scene.title);
        let done = scenes::play(scene, &client, stack).await.with_context(|| format!("in '{}'", scene.title))?;
        progress.done(format!("{}: {} after {} ms", scene.title, done.status(), done.took.as_millis()));
        played.push(done);
    }
    progress.step("waiting until nothing is under way any more");
    let orders: Vec<_> = played.iter().map(|played| played.order).collect();
    client.all_sagas_ended(&orders).await?;
    let after = books::Books::read(&client).await?;
    let topics = report::topics(&stack.servers().kafka_brokers).await?;
    progress.finish();
    println!("\nWhat happened, one saga after the other");
    for played in &played {
        report::scene(played, &client.saga(played.order).await?);
    }
    report::print_topics(&topics);
    let balanced = books::print_and_check(&before, &after, &played);
    up::print_places(stack);
    balanced
}
