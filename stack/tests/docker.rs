//! `docker/` against the programs themselves, so that it cannot rot where no container engine is at hand. Each process
//! is started here as the container would start it, with the variables that compose.yaml gives it.

use serde_norway::Value;
use stack::{
    service::{Service, binary},
    up::SERVER_PORTS,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn compose() -> Value {
    let mut value: Value = serde_norway::from_str(&text("docker/compose.yaml")).unwrap();
    value.apply_merge().unwrap();
    value
}

fn words(value: &Value) -> Vec<&str> {
    value.as_sequence().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

/// A process of the platform as compose.yaml describes it.
fn process(service: Service) -> Value {
    compose()["services"][service.name()].clone()
}

/// The secret that stands in compose.yaml, from the environment or docker/.env.
fn secret(name: &str) -> String {
    format!("{}-0123456789abcdef", name.to_lowercase().replace('_', "-"))
}

/// The variables that a value of compose.yaml names, and the value with their secrets put in.
fn put_in(value: &str) -> (Vec<String>, String) {
    let mut parts = value.split("${");
    let (mut names, mut text) = (Vec::new(), parts.next().unwrap().to_owned());
    for part in parts {
        let (variable, rest) = part.split_once('}').unwrap();
        let name = variable.split_once(":?").map_or(variable, |(name, _)| name);
        text.push_str(&secret(name));
        text.push_str(rest);
        names.push(name.to_owned());
    }
    (names, text)
}

/// The process's variables, with the secrets put in.
fn variables(service: Service) -> BTreeMap<String, String> {
    let process = process(service);
    let variables = process["environment"].as_mapping().unwrap().iter().map(|(name, value)| {
        let (_, value) = put_in(value.as_str().unwrap());
        assert!(!value.contains('$'), "{value}");
        (name.as_str().unwrap().to_owned(), value)
    });
    variables.collect()
}

/// The output of the process when it is started like this, with nothing else in its environment.
fn say(service: Service, arguments: &[&str], variables: &BTreeMap<String, String>) -> (Option<i32>, String) {
    let process = process(service);
    let command = words(&process["command"]);
    let (program, subcommand) = service.program();
    assert_eq!(command, [program, subcommand]);
    let mut started = Command::new(binary(program).unwrap());
    let output = started.arg(subcommand).args(arguments).env_clear().envs(variables).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn each_process_knows_each_variable_that_it_is_given() {
    for service in Service::ALL {
        let (code, help) = say(service, &["--help"], &BTreeMap::new());
        assert_eq!(code, Some(0), "{help}");
        // The help is wrapped to the width of a terminal.
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for name in variables(service).keys() {
            assert!(help.contains(&format!("[env: {name}")), "{service} does not know {name}:\n{help}");
        }
    }
}

#[test]
fn each_process_accepts_its_configuration() {
    for service in Service::ALL {
        let mut given = variables(service);
        // The one mistake that makes the process stop; a second one would be reported beside it.
        given.insert("ADMIN_TOKEN".into(), String::new());
        let (code, said) = say(service, &[], &given);
        assert_eq!(code, Some(2), "{service}: {said}");
        assert!(said.starts_with("1 mistake in the configuration:\n  ADMIN_TOKEN "), "{service}: {said}");
    }
}

#[test]
fn each_process_has_a_role_and_a_token_that_no_other_has() {
    let mut tokens = BTreeSet::new();
    for service in Service::ALL {
        let given = variables(service);
        let token = format!("ADMIN_TOKEN_{}", service.name().to_uppercase().replace('-', "_"));
        assert_eq!(given["ADMIN_TOKEN"], secret(&token), "{service}");
        assert!(tokens.insert(given["ADMIN_TOKEN"].clone()), "{service}");
        let roles: Vec<_> = given.values().filter(|value| value.contains("postgres://")).collect();
        assert!(roles.iter().all(|url| !url.contains("postgres://postgres:")), "{service}: {roles:?}");
        if let Some(database) = service.database() {
            let password = secret(&format!("{}_DB_PASSWORD", database.to_uppercase()));
            assert_eq!(given["DATABASE_URL"], format!("postgres://{database}:{password}@postgres:5432/{database}"));
        }
    }
    assert_eq!(variables(Service::Relay)["OUTBOXES"].matches("postgres://relay:").count(), 3);
    let shown = variables(Service::Payments)["GATEWAY_TOKEN"].clone();
    assert_eq!(variables(Service::Gateway)["GATEWAY_TOKEN"], shown);
    assert!(!tokens.contains(&shown));
}

#[test]
fn each_secret_of_compose_is_named_in_the_example_and_none_enters_the_image() {
    let (named, _) = put_in(&text("docker/compose.yaml"));
    let named: BTreeSet<_> = named.into_iter().collect();
    let example = text("docker/.env.example");
    let listed = example.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    let listed: BTreeSet<_> = listed
        .inspect(|(name, value)| assert!(value.is_empty(), "{name} has a value"))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(named, listed);
    let ignored = text(".dockerignore");
    for pattern in [".env", "**/.env", "**/.env.*"] {
        assert!(ignored.lines().any(|line| line == pattern), "{pattern} is not kept out of the build's context");
    }
}

#[test]
fn ports_are_the_processes_own_and_published_on_loopback_only() {
    let dockerfile = text("docker/Dockerfile");
    let exposed: Vec<&str> = dockerfile.lines().find_map(|l| l.strip_prefix("EXPOSE ")).unwrap().split(' ').collect();
    for service in Service::ALL {
        let (http, admin) = service.default_ports();
        let given = variables(service);
        let expected = |port: u16| format!("0.0.0.0:{port}");
        assert_eq!(given.get("HTTP_ADDR").cloned(), http.map(expected), "{service}");
        assert_eq!(given["ADMIN_ADDR"], expected(admin), "{service}");
        let published: Vec<String> =
            http.into_iter().chain([admin]).map(|port| format!("127.0.0.1:{port}:{port}")).collect();
        assert_eq!(words(&process(service)["ports"]), published, "{service}");
        assert!(http.into_iter().chain([admin]).all(|port| exposed.contains(&port.to_string().as_str())));
    }
}

#[test]
fn the_documents_list_every_listener_and_no_other() {
    let operations = text("docs/operations.md");
    let table =
        operations.split("## What listens\n").nth(1).expect("a table of listeners").split("\n## ").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1).map(|line| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        (cells.next().unwrap().to_owned(), cells.next().unwrap().parse::<u16>().unwrap())
    });
    let listed: BTreeSet<_> = rows.collect();
    let ours = Service::ALL.into_iter().flat_map(|service| {
        let (http, admin) = service.default_ports();
        http.into_iter().chain([admin]).map(move |port| (service.name().to_owned(), port))
    });
    let (postgres, kafka) = SERVER_PORTS;
    let others = [("PostgreSQL", postgres), ("Kafka", kafka), ("Prometheus", 9090)];
    let expected: BTreeSet<_> = ours.chain(others.map(|(name, port)| (name.to_owned(), port))).collect();
    assert_eq!(listed, expected);
    assert_eq!(words(&compose()["services"]["prometheus"]["ports"]), ["127.0.0.1:9090:9090"]);
    for server in ["postgres", "kafka"] {
        assert!(
            compose()["services"][server].get("ports").is_none(),
            "{server} is published, and docs/operations.md says that it is not"
        );
    }
}

#[test]
fn what_a_process_waits_for_exists_and_has_a_health_check() {
    let compose = compose();
    let services = compose["services"].as_mapping().unwrap();
    let ours: Vec<&str> = Service::ALL.iter().map(|service| service.name()).collect();
    for (name, service) in services {
        for (needed, how) in service["depends_on"].as_mapping().into_iter().flatten() {
            let needed = needed.as_str().unwrap();
            assert_eq!(how["condition"].as_str(), Some("service_healthy"), "{name:?} needs {needed}");
            let has_check = ours.contains(&needed) || services[needed].get("healthcheck").is_some();
            assert!(has_check, "{needed} has no health check to wait for");
        }
    }
    assert!(text("docker/Dockerfile").contains("HEALTHCHECK "), "ours have theirs from the image");
}

/// Every Rust source of the programs.
fn sources(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            sources(&entry, into);
        } else if entry.extension().is_some_and(|kind| kind == "rs") {
            into.push_str(&fs::read_to_string(entry).unwrap());
        }
    }
}

#[test]
fn alerts_are_about_metrics_that_there_are_and_every_admin_listener_is_scraped() {
    let mut code = String::new();
    for program in ["saga-core", "outbox-relay", "payment-svc", "order-svc", "inventory-svc"] {
        sources(&root().join(program).join("src"), &mut code);
    }
    let alerts: Value = serde_norway::from_str(&text("docker/alerts.yaml")).unwrap();
    let rules = alerts["groups"][0]["rules"].as_sequence().unwrap();
    assert!(rules.iter().any(|rule| rule["alert"].as_str() == Some("WorkStalled")));
    for rule in rules {
        let (alert, expr) = (rule["alert"].as_str().unwrap(), rule["expr"].as_str().unwrap());
        assert!(rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(), "{alert}");
        // In PromQL a word is a metric if it is neither a function, nor a label, nor a word of the language.
        let outside = expr.split('"').step_by(2).collect::<String>();
        let words = outside.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let metrics: Vec<&str> = words.filter(|word| word.contains('_') || *word == "ready").collect();
        for metric in metrics.iter().filter(|metric| !metric.is_empty()) {
            assert!(code.contains(&format!("\"{metric}\"")), "{alert}: no metric is called {metric}");
        }
    }
    let scraped = text("docker/prometheus.yaml");
    for service in Service::ALL {
        let (_, admin) = service.default_ports();
        assert!(scraped.contains(&format!("\"{service}:{admin}\"")), "{service}");
    }
}

#[test]
fn versions_and_databases_are_the_same_everywhere() {
    let compose = compose();
    let kafka = compose["services"]["kafka"]["image"].as_str().unwrap().replace("apache/kafka:", "");
    assert!(text("stack/kafka/pom.xml").contains(&format!("<kafka.version>{kafka}</kafka.version>")));
    let postgres = compose["services"]["postgres"]["image"].as_str().unwrap().replace("postgres:", "");
    assert!(text("stack/postgres/pom.xml").contains(&format!("<version>{postgres}.0</version>")));
    let toolchain = text("rust-toolchain.toml");
    let rust = toolchain.split('"').nth(1).unwrap();
    assert!(text("docker/Dockerfile").contains(&format!("FROM rust:{rust}-")), "rust-toolchain.toml says {rust}");
    let databases = text("docker/databases.sql");
    for database in Service::ALL.into_iter().filter_map(Service::database) {
        assert!(databases.contains(&format!("create database {database} owner {database};")), "{database}");
    }
}

#[test]
fn the_image_has_every_program_and_runs_as_nobody_in_particular() {
    let dockerfile = text("docker/Dockerfile");
    for service in Service::ALL {
        let (program, _) = service.program();
        assert!(dockerfile.contains(&format!("-p {program}")), "{program} is not built");
        let copied = dockerfile.lines().find(|line| line.contains("for program in")).unwrap();
        assert!(copied.contains(program), "{program} is not copied");
    }
    assert!(dockerfile.contains("\nUSER nonroot\n"));
}

#[test]
fn the_health_check_of_the_image_believes_a_200_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("healthcheck");
    let compiled = Command::new(option_env!("RUSTC").unwrap_or("rustc"))
        .args(["--edition", "2024", "-o"])
        .arg(&program)
        .arg(root().join("docker/healthcheck.rs"))
        .status();
    assert!(compiled.unwrap().success());
    for (answer, healthy) in [("HTTP/1.1 200 OK\r\n\r\n", true), ("HTTP/1.1 503 Service Unavailable\r\n\r\n", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = connection.read(&mut request).unwrap();
            connection.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let status = Command::new(&program).env("ADMIN_ADDR", format!("0.0.0.0:{port}")).status().unwrap();
        assert_eq!(status.success(), healthy, "{answer}");
        assert!(server.join().unwrap().starts_with("GET /readyz "));
    }
}
