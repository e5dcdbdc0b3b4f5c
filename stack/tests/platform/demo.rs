//! `stack demo`: its report of seven orders is what happened to them, and it adds up.

use super::{nothing_runs, place, stack, text};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use stack::service::Service;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Stdio,
};
use uuid::Uuid;

/// A line of a timeline: the step, what happened to it, the message.
type Happened = [&'static str; 3];

const STARTED: Happened = ["", "started", ""];
const OPENED: Happened = ["open-order", "done here", ""];
const AUTHORIZE: Happened = ["authorize-payment", "sent", "payments.authorize.v1"];
const AUTHORIZED: Happened = ["authorize-payment", "succeeded", "payments.authorize.v1"];
const RESERVE: Happened = ["reserve-stock", "sent", "inventory.reserve.v1"];
const VOID: Happened = ["authorize-payment", "undo sent", "payments.void.v1"];
const VOIDED: Happened = ["authorize-payment", "undo succeeded", "payments.void.v1"];
const CLOSED: Happened = ["open-order", "undo done here", ""];
const COMPENSATED: Happened = ["", "compensated", ""];

const CONFIRMED: &[Happened] = &[
    STARTED,
    OPENED,
    AUTHORIZE,
    AUTHORIZED,
    RESERVE,
    ["reserve-stock", "succeeded", "inventory.reserve.v1"],
    ["capture-payment", "sent", "payments.capture.v1"],
    ["capture-payment", "succeeded", "payments.capture.v1"],
    ["confirm-order", "done here", ""],
    ["commit-stock", "sent", "inventory.commit.v1"],
    ["commit-stock", "succeeded", "inventory.commit.v1"],
    ["", "completed", ""],
];
const DECLINED: &[Happened] = &[
    STARTED,
    OPENED,
    AUTHORIZE,
    ["authorize-payment", "rejected", "payments.authorize.v1"],
    ["", "compensating: rejected", ""],
    CLOSED,
    COMPENSATED,
];
const OUT_OF_STOCK: &[Happened] = &[
    STARTED,
    OPENED,
    AUTHORIZE,
    AUTHORIZED,
    RESERVE,
    ["reserve-stock", "rejected", "inventory.reserve.v1"],
    ["", "compensating: rejected", ""],
    VOID,
    VOIDED,
    CLOSED,
    COMPENSATED,
];
const CANCELLED: &[Happened] = &[
    STARTED,
    OPENED,
    AUTHORIZE,
    ["", "cancel: cancelled_by_customer", ""],
    ["", "compensating: cancelled", ""],
    VOID,
    VOIDED,
    CLOSED,
    COMPENSATED,
];

/// Each order: how it ends, and what its timeline holds, in this order. On a slow machine more may be in between:
/// commands that are sent again, replies that come too late.
const SCENES: [(&str, &str, &[Happened]); 7] = [
    ("An order is confirmed", "confirmed", CONFIRMED),
    ("The payment is declined", "cancelled (payment_declined)", DECLINED),
    ("Out of stock, so the payment is voided", "cancelled (out_of_stock)", OUT_OF_STOCK),
    ("Several items, all or nothing", "confirmed", CONFIRMED),
    ("The customer cancels while it runs", "cancelled (cancelled_by_customer)", CANCELLED),
    ("payment-svc is killed (SIGKILL) in the middle and comes back", "confirmed", CONFIRMED),
    ("The provider's answer is lost and asked for again", "confirmed", CONFIRMED),
];

#[test]
fn the_demo_shows_every_outcome_balances_the_books_and_leaves_nothing() {
    let place = place();
    let output = stack(place.path(), &["demo"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8(output.stdout).unwrap();

    let orders: Vec<Shown> =
        SCENES.iter().map(|(title, ended, timeline)| order(&said, title, ended, timeline)).collect();
    let killed = part(&said, "payment-svc is killed");
    assert!(killed.contains("payment-svc was killed after") && killed.contains("was back at"), "{killed}");
    let lost = part(&said, "The provider's answer is lost");
    assert!(lost.contains(" times to authorize under one key, and did it once"), "{lost}");
    assert!(orders.windows(2).all(|pair| pair[0].id < pair[1].id), "seven orders, one after the other:\n{said}");

    topics_hold_at_least_what_the_timelines_show(&said, &orders);
    stock_is_where_it_was_or_sold(&said);
    money_is_where_it_was_or_earned(&said, orders.iter().map(|order| order.earned).sum());
    let add_up = said.find("\nThey add up").unwrap_or_else(|| panic!("{said}"));
    everything_has_its_place(&said[add_up..]);
    let took = said.lines().find(|line| line.starts_with("All of it in ")).unwrap_or_else(|| panic!("{said}"));
    for phase in [" s to start everything", " s for the stock and the orders", " s to stop everything"] {
        assert!(took.contains(phase), "{took}");
    }

    nothing_runs(place.path());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "the data is gone");
}

/// The demo's report of one order.
struct Shown {
    id: Uuid,
    /// The order's total in cents, when it was confirmed.
    earned: i64,
    /// The number of first attempts, by the commands' topics, and of all replies.
    messages: BTreeMap<&'static str, i64>,
}

/// The part of the output that begins with a line like this, up to the next empty line.
fn part<'a>(said: &'a str, title: &str) -> &'a str {
    let begin = said.find(&format!("\n\n{title}")).unwrap_or_else(|| panic!("'{title}' is missing:\n{said}")) + 2;
    let end = said[begin..].find("\n\n").map_or(said.len(), |length| begin + length);
    &said[begin..end]
}

/// The rows of the table in a part, its heading first.
fn rows(part: &str) -> Vec<Vec<&str>> {
    let inside = part.lines().filter_map(|line| line.strip_prefix('│')?.strip_suffix('│'));
    inside.map(|row| row.split('┆').map(str::trim).collect()).collect()
}

/// Reads `413.60` or `413.60 EUR` as cents.
fn cents(text: &str) -> i64 {
    let (euros, cents) = text.trim_end_matches(" EUR").split_once('.').unwrap_or_else(|| panic!("no amount: {text}"));
    euros.parse::<i64>().unwrap() * 100 + cents.parse::<i64>().unwrap()
}

/// `succeeded (attempt 2)` is `succeeded`: a slow machine sends again what would have been answered.
fn first_attempt(what: &str) -> &str {
    what.split(" (attempt").next().unwrap_or(what)
}

fn order(said: &str, title: &str, ended: &str, happened: &[Happened]) -> Shown {
    let part = part(said, &format!("{title}\n"));
    let line =
        part.lines().find_map(|line| line.strip_prefix("  order ")).unwrap_or_else(|| panic!("no order: {part}"));
    let (id, end) = line.split_once(": ").unwrap();
    let [status, total, took] = end.split(", ").collect::<Vec<_>>()[..] else { panic!("{line}") };
    assert_eq!(status, ended, "{part}");
    took.strip_prefix("in ").and_then(|took| took.strip_suffix(" ms")?.parse::<u64>().ok()).expect(took);

    let mut rows = rows(part).into_iter();
    assert_eq!(rows.next().unwrap(), ["ms", "step", "", "message"]);
    let rows: Vec<_> = rows.map(|row| (row[0].parse::<u64>().unwrap(), [row[1], row[2], row[3]])).collect();
    assert!(rows[0].0 == 0 && rows.is_sorted_by_key(|(at, _)| at), "times count from the start:\n{part}");
    let mut lines = rows.iter().map(|(_, [step, what, message])| [*step, first_attempt(what), *message]);
    for expected in happened {
        assert!(lines.any(|line| line == *expected), "{expected:?} is missing, or not in its place:\n{part}");
    }

    let mut messages = BTreeMap::new();
    for (_, [_, what, message]) in rows.iter().filter(|(_, [_, _, message])| !message.is_empty()) {
        let topic = match *what {
            "sent" | "undo sent" if message.starts_with("payments.") => "payments.commands",
            "sent" | "undo sent" => "inventory.commands",
            // A command that is sent again may be unpublished when the reply to the first comes.
            again if again.contains("sent (attempt") => continue,
            _ => "orders.replies",
        };
        *messages.entry(topic).or_default() += 1;
    }
    let earned = if status == "confirmed" { cents(total) } else { 0 };
    Shown { id: id.parse().unwrap(), earned, messages }
}

fn topics_hold_at_least_what_the_timelines_show(said: &str, orders: &[Shown]) {
    let part = part(said, "Topics (");
    assert!(part.contains("for dead letters, all empty"), "{part}");
    let rows = rows(part);
    assert_eq!(rows[0], ["topic", "records"]);
    let records: BTreeMap<&str, i64> = rows[1..].iter().map(|row| (row[0], row[1].parse().unwrap())).collect();
    // Kafka may have some of them more than once, and none of them less often.
    let mut least = BTreeMap::from([("orders.events", 7), ("inventory.items", 3)]);
    for (topic, messages) in orders.iter().flat_map(|order| &order.messages) {
        *least.entry(topic).or_default() += messages;
    }
    assert!(records.keys().eq(least.keys()), "the topics are {:?}:\n{part}", least.keys());
    for (topic, least) in least {
        assert!(records[topic] >= least, "{topic} has less than the {least} that the timelines show:\n{said}");
    }
}

fn stock_is_where_it_was_or_sold(said: &str) {
    let rows = rows(part(said, "Stock\n"));
    assert_eq!(rows[0], ["item", "before", "sold", "on hand", "reserved", ""]);
    let items: Vec<&str> = rows[1..].iter().map(|row| row[0]).collect();
    assert_eq!(items, ["CUP", "SAMOVAR", "TEAPOT"]);
    for row in &rows[1..] {
        let [before, sold, on_hand, reserved] = [1, 2, 3, 4].map(|column| row[column].parse::<i64>().unwrap());
        assert!(sold > 0 && before == sold + on_hand && reserved == 0 && row[5] == "adds up", "{row:?}");
    }
}

fn money_is_where_it_was_or_earned(said: &str, earned: i64) {
    let rows = rows(part(said, "Money\n"));
    assert_eq!(rows[0][1..7], ["authorized", "captured", "voided", "refunded", "still held", "orders confirmed"]);
    let ledgers: Vec<&str> = rows[1..].iter().map(|row| row[0]).collect();
    assert_eq!(ledgers, ["payment-svc's ledger", "the provider's ledger"]);
    for row in &rows[1..] {
        let [authorized, captured, voided, refunded, held, confirmed] =
            [1, 2, 3, 4, 5, 6].map(|column| cents(row[column]));
        assert_eq!(confirmed, earned, "the orders above are worth another sum: {row:?}");
        assert!(captured - refunded == earned && authorized == captured + voided && held == 0, "{row:?}");
        assert!(voided > 0 && row[7] == "adds up", "{row:?}");
    }
}

/// Checks that the output names every place: every server, every process with its API and its admin listener, and the
/// logs.
fn everything_has_its_place(said: &str) {
    let line = |name: &str| {
        let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("nowhere is said where {name} is:\n{said}"))
    };
    assert!(line("PostgreSQL").contains("postgres://postgres@127.0.0.1:"), "and no password: {said}");
    assert!(line("Kafka").contains("127.0.0.1:"));
    for service in Service::ALL {
        let listeners = if service.default_ports().0.is_some() { 2 } else { 1 };
        let line = line(service.name());
        assert_eq!(line.matches("http://127.0.0.1:").count(), listeners, "{line}");
        assert_eq!(line.matches("/docs").count(), 1, "{line}");
    }
    assert!(said.contains("\nlogs: /"), "{said}");
}

#[test]
fn a_demo_that_cannot_start_says_what_to_do() {
    let place = place();
    let output = stack(place.path(), &["demo"]).env("STACK_BIN_DIR", place.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("cargo build --workspace --bins"), "{}", text(&output));
    nothing_runs(place.path());
}

#[test]
fn a_demo_of_which_a_process_does_not_start_shows_the_end_of_its_log_and_where_the_rest_is() {
    let (place, programs) = (place(), place());
    let real = Path::new(env!("CARGO_BIN_EXE_stack")).parent().unwrap();
    for program in ["outbox-relay", "order-svc", "inventory-svc"] {
        symlink(real.join(program), programs.path().join(program)).unwrap();
    }
    let broken = programs.path().join("payment-svc");
    fs::write(&broken, "#!/bin/sh\necho 'the till is locked' >&2\nexit 3\n").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let output = stack(place.path(), &["demo"]).env("STACK_BIN_DIR", programs.path()).output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("ended while it was starting") && said.contains("| the till is locked"), "{said}");
    let log = said.lines().find_map(|line| line.trim().strip_prefix("The log: ")).expect("it says where the log is");
    assert!(fs::read_to_string(log).is_ok_and(|log| log.contains("the till is locked")), "{log} is gone");
    nothing_runs(place.path());
}

#[test]
fn a_demo_that_is_interrupted_ends_and_leaves_nothing_running() {
    let place = place();
    let mut demo = stack(place.path(), &["demo"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut progress = BufReader::new(demo.stderr.take().unwrap()).lines().map(Result::unwrap);
    for step in ["starting PostgreSQL and Kafka", "waiting for payment-svc", "seeding stock", "The payment is declined"]
    {
        assert!(progress.any(|line| line.contains(step)), "it does not say: {step}");
    }
    kill(Pid::from_raw(i32::try_from(demo.id()).unwrap()), Signal::SIGINT).unwrap();
    progress.for_each(drop);
    assert!(!demo.wait().unwrap().success());
    nothing_runs(place.path());
}
