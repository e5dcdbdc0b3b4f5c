//! `stack up` and the commands around it: a platform that stays up until Ctrl-C or `stack down`, its data kept.

use crate::{
    Error, Result,
    durability::Durability,
    guard,
    platform::{Stack, StackConfig, asked, issues},
    postgres::{Postgres, without_password},
    progress::Progress,
    run,
    servers::{Keep, ServersConfig},
    service::Service,
    state::{State, StateDirectory},
};
use comfy_table::{Table, presets};
use std::{
    collections::BTreeMap,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// The ports of PostgreSQL and Kafka, where these are free.
pub const SERVER_PORTS: (u16, u16) = (5432, 9092);
/// How often the supervisor looks for processes that ended.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The longest pause before a process that ended soon after its start is started again; the pause doubles up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A process that ran for so long ended for another reason than before.
const STEADY_AFTER: Duration = Duration::from_secs(60);

/// Starts the platform, prints its addresses, and stays until a signal comes.
pub async fn up(directory: &StateDirectory) -> Result<()> {
    let Some(lock) = directory.lock().await? else {
        return Err(Error::Other("it is running already; `make status` tells where, `make down` ends it".into()));
    };
    guard::hold(lock.try_clone().map_err(Error::io("share the lock"))?);
    directory.clear();
    let progress = Progress::for_people();
    let interrupted = run::interrupted()?;
    tokio::pin!(interrupted);
    let started = tokio::select! {
        started = Stack::start(config(directory), &progress) => started,
        _ = &mut interrupted => {
            progress.finish();
            eprintln!("interrupted while starting; what was started is being ended");
            return Ok(());
        }
    };
    progress.finish();
    let stack = started?;
    directory.write(&stack)?;
    print_places(&stack);
    print_password_file(stack.servers().postgres.as_ref().map(Postgres::password_file).as_deref());
    print_ports_taken(&stack);
    println!("\nCtrl-C or `make down` ends it; its data is kept. `make reset` wipes it.");
    tokio::select! {
        _ = interrupted => {}
        () = supervise(&stack) => {}
    }
    progress.step("stopping");
    stack.stop().await;
    directory.clear();
    println!("Everything is stopped; its data is in {}.", directory.path().display());
    Ok(())
}

/// Starts again each process that ends by itself (kill one and watch), the servers too; never returns. A process that
/// ends again and again is started again after longer and longer pauses. A PostgreSQL that was killed refuses to start
/// while a backend of it is left.
async fn supervise(stack: &Stack) {
    let mut lives = BTreeMap::<&str, Life>::new();
    loop {
        for process in stack.processes() {
            let life = lives.entry(process.name()).or_insert_with(Life::new);
            // The question also takes note of the process's end: until then the operating system keeps its number, and
            // its locks look held.
            let Some(pause) = life.is_over(process.is_running(), Instant::now()) else { continue };
            let (name, log) = (process.name(), process.log().display());
            match process.start_again() {
                Ok(()) => eprintln!(
                    "{name} ended by itself and was started again; its log: {log}; the next time after {} s",
                    pause.as_secs()
                ),
                Err(error) => eprintln!("{name} ended and cannot be started again: {error}"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// When a process was started last, and how long it rests before the next start.
struct Life {
    began: Instant,
    /// When the process was first seen not to run; `None` while it runs.
    ended: Option<Instant>,
    /// The pause before the next start.
    pause: Duration,
}

impl Life {
    fn new() -> Self {
        Self { began: Instant::now(), ended: None, pause: Duration::ZERO }
    }

    /// Whether the process is to be started now; then the pause that follows if it ends soon.
    fn is_over(&mut self, runs: bool, now: Instant) -> Option<Duration> {
        if runs {
            self.ended = None;
            return None;
        }
        let ended = *self.ended.get_or_insert(now);
        // The time that a process rests is not time that it ran.
        if ended.saturating_duration_since(self.began) >= STEADY_AFTER {
            self.pause = Duration::ZERO;
        }
        if now.saturating_duration_since(ended) < self.pause {
            return None;
        }
        (self.began, self.ended) = (now, None);
        self.pause = (self.pause * 2).clamp(LOOK_EVERY, LONGEST_PAUSE);
        Some(self.pause)
    }
}

fn config(directory: &StateDirectory) -> StackConfig {
    StackConfig {
        servers: ServersConfig {
            keep: Keep::In(directory.path().to_owned()),
            logs: Some(directory.path().join("logs")),
            durability: Durability::On,
            preferred_ports: Some(SERVER_PORTS),
            ..ServersConfig::for_tests()
        },
        preferred_ports: true,
        // The programs run with their own defaults: that is what people want to see.
        env: BTreeMap::new(),
        ..StackConfig::for_tests()
    }
}

/// Prints the addresses of everything, for a person to click on.
pub fn print_places(stack: &Stack) {
    let servers = stack.servers();
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["", "at", "health, metrics, inspection"]);
    table.add_row(["PostgreSQL", &without_password(&servers.database_url), ""]);
    table.add_row(["Kafka", &servers.kafka_brokers, ""]);
    for service in Service::ALL {
        let running = stack.service(service);
        let api = running.address.http.map_or_else(String::new, |_| format!("{}/docs", running.address.url()));
        let admin = running.address.admin_url();
        // A process whose API is for operators has it there, and its description beside it.
        let admin = if api.is_empty() { format!("{admin}/docs") } else { admin };
        table.add_row([service.name(), &api, &admin]);
    }
    println!("\n{table}\n\nlogs: {}", stack.logs().display());
}

/// Prints the place of the password, not the password: the output may be copied anywhere.
fn print_password_file(file: Option<&Path>) {
    if let Some(file) = file {
        println!("PostgreSQL's password: {}", file.display());
    }
}

fn print_ports_taken(stack: &Stack) {
    for service in Service::ALL {
        let (preferred, taken) = (service.default_ports(), &stack.service(service).address);
        if (taken.http, taken.admin) != preferred {
            println!("{service}: its own ports are in use, it took others.");
        }
    }
}

/// Prints what runs and whether it is healthy; `true` when everything is.
pub async fn status(directory: &StateDirectory) -> Result<bool> {
    let Some(state) = directory.running()? else {
        println!("Nothing runs. `make up` starts it.");
        return Ok(false);
    };
    let client = reqwest::Client::new();
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["", "at", "admin", "health"]);
    let kafka = crate::kafka::answers(state.kafka_brokers.clone()).await;
    let own_url = state.socket_url.as_ref().unwrap_or(&state.database_url);
    // The file lies beside the data directory, and bears its name.
    let data = state.password_file.as_ref().filter(|_| state.socket_url.is_none()).map(|file| file.with_extension(""));
    let postgres = match data {
        Some(data) if !crate::postgres::runs(&data) => Err("PostgreSQL does not run".to_owned()),
        _ => crate::postgres::answers(own_url).await,
    };
    table.add_row(["PostgreSQL", &without_password(&state.database_url), "", &health(&postgres)]);
    table.add_row(["Kafka", &state.kafka_brokers, "", &health(&kafka)]);
    let mut healthy = kafka.is_ok() && postgres.is_ok();
    let mut stalled = Vec::new();
    for (service, address) in &state.services {
        let admin = address.admin_url();
        let ready = asked(&client, &format!("{admin}/readyz")).await;
        let standing = match (&ready, issues(&client, &admin).await) {
            (Err(_), _) | (Ok(()), Err(_)) => health(&ready),
            (Ok(()), Ok(issues)) if issues.is_empty() => health(&ready),
            (Ok(()), Ok(issues)) => {
                stalled.extend(issues.into_iter().map(|issue| format!("{service}: {issue}")));
                "ready, but WORK DOES NOT MOVE".into()
            }
        };
        healthy &= standing == READY;
        table.add_row([service.name(), &address.url(), &admin, &standing]);
    }
    println!("{table}");
    print_password_file(state.password_file.as_deref());
    stalled.iter().for_each(|issue| println!("{issue}"));
    Ok(healthy)
}

const READY: &str = "ready";

fn health(answer: &Result<(), String>) -> String {
    answer.as_ref().map_or_else(|why| format!("NOT READY: {why}"), |()| READY.into())
}

/// Shows the end of every log, and with `follow` the lines to come. Without a platform that runs, shows the logs that
/// the last one left.
pub fn logs(directory: &StateDirectory, follow: Follow) -> Result<()> {
    let files = match directory.running()? {
        Some(State { logs, .. }) => logs,
        None => {
            let left = logs_left(directory);
            // `tail` without files would read its standard input.
            if left.is_empty() {
                return Err(Error::Other("there are no logs yet; `make up` makes some".into()));
            }
            let next = if follow == Follow::Yes { ", and what `make up` adds to them" } else { "" };
            eprintln!("Nothing runs. These are the logs of the last time{next}.");
            left
        }
    };
    let mut tail = Command::new("tail");
    tail.args(["-n", "30"]);
    if follow == Follow::Yes {
        tail.arg("-f");
    }
    // The process becomes `tail`, which does this better than its own code would, and handles Ctrl-C.
    Err(Error::io("run tail")(tail.args(files).exec()))
}

fn logs_left(directory: &StateDirectory) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory.path().join("logs")).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Whether to go on with the lines to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// Go on until Ctrl-C.
    Yes,
    /// Show only the lines that are there.
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ends_again_and_again_rests_longer_and_one_that_ran_starts_at_once() {
        let mut life = Life::new();
        let mut now = life.began;
        let mut pauses = Vec::new();
        for _ in 0..10 {
            let rested = now;
            while life.is_over(false, now).is_none() {
                now += LOOK_EVERY;
            }
            pauses.push(now.duration_since(rested).as_secs());
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(life.is_over(true, now + STEADY_AFTER), None);
        assert!(life.is_over(false, now + STEADY_AFTER + LOOK_EVERY).is_some(), "it ran for a while");
        assert!(
            life.is_over(false, now + STEADY_AFTER + LOOK_EVERY * 2).is_none(),
            "it ended soon, which is just seen"
        );
        assert!(life.is_over(false, now + STEADY_AFTER + LOOK_EVERY * 3).is_some());
    }
}
