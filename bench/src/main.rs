//! `bench`: the figures, each beside its yardstick of the same run.

use bench::{
    cli::{Cli, Verb},
    contract::Layout,
    drain,
    machine::Machine,
    report::Report,
    role, sagas,
};
use clap::Parser;
use stack::{progress::Progress, run};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    match obey(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn obey(cli: Cli) -> anyhow::Result<ExitCode> {
    if let Some(Verb::Role(role)) = &cli.verb {
        return role::play(role).await.map(|()| ExitCode::SUCCESS);
    }
    let progress = Progress::for_people();
    let interrupted = run::interrupted()?;
    tokio::select! {
        measured = measure(&cli, &progress) => {
            progress.finish();
            let report = measured?.judged();
            println!("{report}");
            report.write(&cli.json)?;
            println!("as JSON: {}", cli.json.display());
            let missed = report.missed();
            Ok(if cli.enforce && missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        }
        signal = interrupted => anyhow::bail!("interrupted ({signal:?})"),
    }
}

async fn measure(cli: &Cli, progress: &Progress) -> anyhow::Result<Report> {
    let machine = Machine::start(&cli.servers, progress).await?;
    let mut report = Report::new(machine.describe().await?);
    let verb = cli.verb.as_ref();
    if matches!(verb, None | Some(Verb::Relay)) {
        report.relay = Some(drain::run(&machine, &cli.relay, progress).await?);
    }
    if matches!(verb, None | Some(Verb::Sagas)) {
        for layout in cli.sagas.layout.map_or(vec![Layout::ThreeServices, Layout::OneService], |layout| vec![layout]) {
            report.sagas.push(sagas::run(&machine, layout, &cli.sagas, progress).await?);
        }
    }
    machine.stop().await;
    Ok(report)
}
