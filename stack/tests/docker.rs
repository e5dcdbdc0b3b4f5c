//! `docker/` against the programs themselves, so that it cannot rot where no container engine is at hand: each process
//! is started here as the container would start it, with the variables that compose.yaml gives it.

use serde_norway::Value;
use stack::service::{Service, binary};
use std::{
    collections::BTreeMap,
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

/// A process of ours as compose.yaml describes it.
fn process(service: Service) -> Value {
    compose()["services"][service.name()].clone()
}

/// Its variables, with the secrets put in.
fn variables(service: Service) -> BTreeMap<String, String> {
    let process = process(service);
    let variables = process["environment"].as_mapping().unwrap().iter().map(|(name, value)| {
        let value = value.as_str().unwrap().replace("${POSTGRES_PASSWORD}", "secret");
        let value = if value.starts_with("${ADMIN_TOKEN:?") { "0123456789abcdef".to_owned() } else { value };
        assert!(!value.contains('$'), "{value}");
        (name.as_str().unwrap().to_owned(), value)
    });
    variables.collect()
}

/// What the process prints when it is started like this, with nothing else in its environment.
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
        // It is wrapped to the width of a terminal.
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
        // The one mistake that makes it stop; a second one would be told beside it.
        given.insert("ADMIN_TOKEN".into(), String::new());
        let (code, said) = say(service, &[], &given);
        assert_eq!(code, Some(2), "{service}: {said}");
        assert!(said.starts_with("1 mistake in the configuration:\n  ADMIN_TOKEN "), "{service}: {said}");
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
        // In PromQL a metric is what is neither a function, nor a label, nor a word of the language.
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
        assert!(databases.contains(&format!("create database {database};")), "{database}");
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
