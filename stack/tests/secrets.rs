//! The output of the programs. With a secret in every variable, no `--help` and no configuration error shows one. A
//! connection without encryption is reported at the start.

use stack::service::{Service, binary};
use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

/// The secret in every value that a variable gets here.
const SECRET: &str = "hunter2";

/// Values with the secret wherever one may stand. Most are right for no variable, some for one or another.
const VALUES: [&str; 9] = [
    "hunter2",
    "hunter2-hunter2-hunter2",
    "https://hunter2:hunter2@gateway.example/?password=hunter2",
    "http://gateway.example/?token=hunter2",
    "postgres://me:hunter2@db:5432/d?password=hunter2",
    "postgres://me:hunter2@db:hunter2/d",
    "postgres://me:hunter2@db/d?sslmode=hunter2",
    "orders=postgres://me:hunter2@db/d,payments=mysql://me:hunter2@db/p,https://hunter2@db",
    "broker:9092,hunter2 hunter2",
];

fn programs() -> BTreeSet<&'static str> {
    Service::ALL.into_iter().map(|service| service.program().0).collect()
}

/// The exit code and all output, with nothing else in the environment.
fn said(program: &str, arguments: &[String], variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(binary(program).unwrap());
    let output = command.args(arguments).env_clear().envs(variables.iter().copied()).output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

fn with(arguments: &[String], last: &str) -> Vec<String> {
    arguments.iter().cloned().chain([last.to_owned()]).collect()
}

/// A program's subcommands, each with those that it has itself, and the program without one.
fn subcommands(program: &str, of: Vec<String>) -> Vec<Vec<String>> {
    let (_, help) = said(program, &with(&of, "-h"), &[]);
    let listed =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.trim().is_empty());
    let names = listed.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()));
    let own: Vec<_> = names.filter(|name| *name != "help").map(|name| with(&of, name)).collect();
    [of].into_iter().chain(own.into_iter().flat_map(|one| subcommands(program, one))).collect()
}

/// The variables that a subcommand reads.
fn variables(program: &str, subcommand: &[String]) -> BTreeSet<String> {
    let (_, help) = said(program, &with(subcommand, "--help"), &[]);
    let names = help.split("[env:").skip(1).filter_map(|rest| rest.trim_start().split(['=', ']']).next());
    names.map(|name| name.trim().to_owned()).collect()
}

#[test]
fn help_shows_no_value_of_the_environment() {
    for program in programs() {
        let all = subcommands(program, Vec::new());
        assert!(all.len() > 2, "{program}: {all:?}");
        for subcommand in all {
            let names = variables(program, &subcommand);
            assert!(names.contains("LOG_FORMAT"), "{program} {subcommand:?}: {names:?}");
            for value in VALUES {
                let set: Vec<_> = names.iter().map(|name| (name.as_str(), value)).collect();
                for form in ["-h", "--help"] {
                    let (code, help) = said(program, &with(&subcommand, form), &set);
                    assert_eq!(code, Some(0), "{program} {subcommand:?} {form}: {help}");
                    assert!(!help.contains(SECRET), "{program} {subcommand:?} {form}: {help}");
                }
            }
        }
    }
}

#[test]
fn no_configuration_error_repeats_what_it_was_given() {
    for program in programs() {
        for subcommand in subcommands(program, Vec::new()) {
            let names = variables(program, &subcommand);
            // One of the subcommand's own arguments is missing, or takes nothing of this kind.
            let mut arguments = subcommand.clone();
            match subcommand.last().map(String::as_str) {
                Some("reanchor") => arguments.extend(["orders", "--accept"].map(String::from)),
                Some("rename") => arguments.extend(["orders", "payments"].map(String::from)),
                _ => {}
            }
            let all = VALUES.map(|value| names.iter().map(|name| (name.as_str(), value)).collect::<Vec<_>>());
            // With one variable alone, a required one is missing: the program never gets as far as connecting.
            let each = names.iter().flat_map(|name| VALUES.map(|value| vec![(name.as_str(), value)]));
            let each = each.filter(|set| !["DATABASE_URL", "OUTBOXES"].contains(&set[0].0));
            // With a format that does not exist, it does not connect either.
            let urls = ["DATABASE_URL", "OUTBOXES", "GATEWAY_URL"].into_iter().filter(|name| names.contains(*name));
            let urls = urls.flat_map(|name| VALUES.map(|value| vec![(name, value), ("LOG_FORMAT", "xml")]));
            for set in all.into_iter().chain(each).chain(urls) {
                let (code, words) = said(program, &arguments, &set);
                assert_eq!(code, Some(2), "{program} {arguments:?} {set:?}: {words}");
                assert!(!words.contains(SECRET), "{program} {arguments:?} {set:?}: {words}");
            }
        }
    }
}

#[test]
fn no_usage_error_repeats_a_url() {
    for program in programs() {
        for subcommand in subcommands(program, Vec::new()) {
            for value in VALUES.into_iter().filter(|value| value.contains("://")) {
                // No subcommand takes so many arguments.
                let arguments = [subcommand.clone(), vec![value.to_owned(); 3]].concat();
                let (code, words) = said(program, &arguments, &[]);
                assert_eq!(code, Some(2), "{program} {arguments:?}: {words}");
                assert!(words.contains("a URL") && !words.contains(SECRET), "{program} {arguments:?}: {words}");
            }
        }
    }
}

/// The first warning of a process that is started like this.
fn warning(program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(binary(program).unwrap());
    command.args(arguments).env_clear().envs(variables.iter().copied()).stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let found = lines.map_while(Result::ok).find(|line| line.contains("\"WARN\""));
    process.kill().unwrap();
    process.wait().unwrap();
    found.unwrap_or_default()
}

#[test]
fn a_process_says_at_its_start_what_others_on_the_way_can_read() {
    // The address is of no network.
    const DATABASE: &str = "postgres://me:hunter2@192.0.2.1:5432/d";
    let admin = ("ADMIN_ADDR", "127.0.0.1:0");
    for (program, arguments) in [
        ("order-svc", ["serve"]),
        ("order-svc", ["migrate"]),
        ("inventory-svc", ["serve"]),
        ("payment-svc", ["gateway-sim"]),
    ] {
        let set = [("DATABASE_URL", DATABASE), ("KAFKA_BROKERS", "127.0.0.1:1"), admin];
        let said = warning(program, &arguments, &set);
        assert!(said.contains("may be in clear") && said.contains("sslmode=verify-full"), "{program}: {said}");
        assert!(!said.contains(SECRET), "{program}: {said}");
    }
    let outboxes = format!("orders={DATABASE}");
    let said = warning("outbox-relay", &[], &[("OUTBOXES", &outboxes), ("KAFKA_BROKERS", "127.0.0.1:1"), admin]);
    assert!(said.contains("may be in clear") && !said.contains(SECRET), "{said}");
    let gateway = ("GATEWAY_URL", "http://gateway.example");
    let said =
        warning("payment-svc", &[], &[("DATABASE_URL", DATABASE), ("KAFKA_BROKERS", "127.0.0.1:1"), gateway, admin]);
    assert!(said.contains("GATEWAY_URL is an http:// URL") && said.contains("https://"), "{said}");
    let collector = [
        ("DATABASE_URL", DATABASE),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.1:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter2"),
    ];
    let said = warning("inventory-svc", &["migrate"], &collector);
    assert!(said.contains("OTEL_EXPORTER_OTLP_ENDPOINT is an http:// URL") && !said.contains(SECRET), "{said}");
}
