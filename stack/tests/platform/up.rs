//! `stack up` until Ctrl-C, `stack down` or its own death, and what `stack logs` shows of it.

use super::{nothing_runs, place, said, shop::Shop, stack, wait_until};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::Value;
use stack::service::Service;
use std::{
    fs::{self, File},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command},
};

/// Starts `stack up` as a terminal does: in a process group of its own, which gets the signals of the keys.
fn going_up(place: &Path) -> Child {
    let log = File::create(place.join("up.log")).unwrap();
    let mut command = stack(place, &["up"]);
    command.stdout(log.try_clone().unwrap()).stderr(log).process_group(0).spawn().unwrap()
}

fn words_of_up(place: &Path) -> String {
    fs::read_to_string(place.join("up.log")).unwrap()
}

fn up(place: &Path) -> Child {
    let mut child = going_up(place);
    wait_until("it is up", || {
        assert!(child.try_wait().unwrap().is_none(), "`stack up` ended: {}", words_of_up(place));
        said(place, &["status"]).0
    });
    child
}

fn pid(of: &Child) -> Pid {
    Pid::from_raw(of.id().cast_signed())
}

/// The lines of a log, by the name of the process: `stack logs` shows `==> .../order-svc.log <==` above them, each time
/// it changes.
fn lines_by_process(shown: &str) -> Vec<(&str, &str)> {
    let mut process = "";
    let mut lines = Vec::new();
    for line in shown.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("==> ").and_then(|line| line.strip_suffix(".log <==")) {
            Some(path) => process = path.rsplit('/').next().unwrap(),
            None => lines.push((process, line)),
        }
    }
    lines
}

fn lines_of_every_process_are_in(shown: &str) {
    let lines = lines_by_process(shown);
    for service in Service::ALL {
        let its_own = format!("\"service\":\"{service}\"");
        assert!(lines.iter().any(|(process, line)| *process == service.name() && line.contains(&its_own)), "{shown}");
    }
    assert!(lines.iter().any(|(process, line)| *process == "postgres" && line.contains("LOG:")), "{shown}");
    assert!(lines.iter().any(|(process, _)| *process == "kafka"), "{shown}");
}

#[test]
fn up_restarts_what_dies_and_shows_its_logs_and_ends_with_down_and_reset_wipes() {
    let place = place();
    let (done, words) = said(place.path(), &["logs"]);
    assert!(!done && words.contains("there are no logs yet; `make up` makes some"), "{words}");

    let mut up = up(place.path());
    let (done, words) = said(place.path(), &["up"]);
    assert!(!done && words.contains("running already"), "{words}");

    the_password_is_told_by_its_file_only(place.path());

    let pid_of = |name: &str| {
        let found = Command::new("pgrep").args(["-P", &up.id().to_string(), "-f", name]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().trim().parse::<i32>().ok()
    };
    let kafka = Pid::from_raw(pid_of("kafka.Kafka").expect("it runs"));
    kill(kafka, Signal::SIGSTOP).unwrap();
    wait_until("status says whose work stands still, and why", || {
        let (done, words) = said(place.path(), &["status"]);
        !done && words.contains("WORK DOES NOT MOVE") && words.contains("order-svc: kafka kafka_away since ")
    });
    kill(kafka, Signal::SIGCONT).unwrap();

    for name in ["inventory-svc", "bin/postgres", "kafka.Kafka"] {
        let running = || pid_of(name);
        let killed = running().expect("it runs");
        kill(Pid::from_raw(killed), Signal::SIGKILL).unwrap();
        wait_until(&format!("{name} is started again"), || running().is_some_and(|now| now != killed));
        wait_until(&format!("all is in order again after {name}"), || said(place.path(), &["status"]).0);
    }

    let (done, words) = said(place.path(), &["logs"]);
    assert!(done && !words.contains("Nothing runs"), "{words}");
    lines_of_every_process_are_in(&words);

    assert_eq!(said(place.path(), &["down"]), (true, "Everything is stopped.\n".into()));
    assert!(up.wait().unwrap().success());
    nothing_runs(place.path());
    assert!(!said(place.path(), &["status"]).0);

    let (done, words) = said(place.path(), &["logs"]);
    assert!(done && words.contains("Nothing runs"), "{words}");
    lines_of_every_process_are_in(&words);

    assert!(said(place.path(), &["reset"]).0);
    assert!(!place.path().join("state").exists());
}

fn the_password_is_told_by_its_file_only(place: &Path) {
    let state = place.join("state");
    let file = state.join("postgres.password");
    let password = fs::read_to_string(&file).unwrap();
    let (_, status) = said(place, &["status"]);
    let (_, logs) = said(place, &["logs"]);
    for words in [&words_of_up(place), &status] {
        assert!(words.contains(&format!("PostgreSQL's password: {}\n", file.display())), "{words}");
        assert!(words.contains("postgres://postgres@127.0.0.1:"), "{words}");
    }
    assert!(![words_of_up(place), status, logs].iter().any(|words| words.contains(password.trim())));
    for processes in super::processes_of(place) {
        assert!(!processes.contains(password.trim()), "{processes}");
    }
    // The state file holds every process's URL.
    assert_eq!(fs::metadata(state.join("state.json")).unwrap().permissions().mode() & 0o7777, 0o600);
}

#[test]
fn ctrl_c_ends_up_and_keeps_the_data_and_a_killed_up_leaves_nothing_running() {
    let place = place();
    let state = place.path().join("state");
    let mut first = up(place.path());
    let shop = Shop::of(&state);
    shop.add_item("TEAPOT");
    let order = a_line_that_is_written_later_is_followed(place.path(), || shop.order("TEAPOT", "first"));

    killpg(pid(&first), Signal::SIGINT).unwrap();
    let status = first.wait().unwrap();
    let words = words_of_up(place.path());
    assert!(status.success(), "Ctrl-C is the way to end it ({status}): {words}");
    let last = format!("Everything is stopped; its data is in {}.", state.display());
    assert_eq!(words.lines().last(), Some(last.as_str()), "{words}");
    nothing_runs(place.path());

    let mut second = up(place.path());
    let shop = Shop::of(&state);
    assert_eq!(shop.find(&order), order);
    assert_eq!(shop.order("TEAPOT", "first"), order, "the same request, by its key");
    assert_ne!(shop.order("TEAPOT", "second")["id"], order["id"]);
    second.kill().unwrap();
    second.wait().unwrap();
    nothing_runs(place.path());

    assert!(said(place.path(), &["reset"]).0);
    assert!(!state.exists());
}

/// Follows the logs while an order is placed, up to the line with the order. Ctrl-C ends it.
fn a_line_that_is_written_later_is_followed(place: &Path, order: impl FnOnce() -> Value) -> Value {
    let file = place.join("followed");
    let mut command = stack(place, &["logs", "--follow"]);
    let mut follow = command.stdout(File::create(&file).unwrap()).process_group(0).spawn().unwrap();
    let shown = || fs::read_to_string(&file).unwrap();
    wait_until("the ends of all logs are shown", || shown().contains("/outbox-relay.log <=="));
    let order = order();
    let id = order["id"].as_str().unwrap();
    wait_until("the line about the order is shown as order-svc's", || {
        let shown = shown();
        let lines = lines_by_process(&shown);
        lines
            .iter()
            .any(|(process, line)| *process == "order-svc" && line.contains("order placed") && line.contains(id))
    });
    killpg(pid(&follow), Signal::SIGINT).unwrap();
    assert_eq!(follow.wait().unwrap().signal(), Some(Signal::SIGINT as i32));
    order
}

#[test]
fn ctrl_c_while_it_starts_ends_what_was_started() {
    let place = place();
    let mut up = going_up(place.path());
    let data = place.path().join("state/kafka");
    wait_until("Kafka is being started", || data.exists());
    killpg(pid(&up), Signal::SIGINT).unwrap();
    assert!(up.wait().unwrap().success());
    let words = words_of_up(place.path());
    assert!(words.contains("interrupted while starting"), "{words}");
    nothing_runs(place.path());
    assert!(said(place.path(), &["logs"]).1.contains("Nothing runs"));
}
