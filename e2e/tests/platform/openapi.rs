//! Every OpenAPI document is valid, lists the answers of each operation, and is true. schemathesis sends each operation
//! the requests that the document allows, and those that it forbids. It compares the answers.
//!
//! The first is always tested. The second needs Python, which `stack/tools.sh` looks for, and once the network. Where
//! schemathesis cannot be had, the test fails, unless `WITHOUT_SCHEMATHESIS=1` allows that.

use e2e::platform::{Platform, beside_others, unaudited};
use serde_json::Value;
use stack::service::Service;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The pinned packages, because another version may judge differently; with hashes, because what is fetched runs here.
const SCHEMATHESIS: &str = include_str!("../../schemathesis.txt");
/// The variable that, set to 1, lets the test pass where schemathesis cannot be had.
const WITHOUT_SCHEMATHESIS: &str = "WITHOUT_SCHEMATHESIS";
/// The number of requests that each operation gets, of each kind.
const EXAMPLES: usize = 25;

/// Every listener with a document, and its title.
fn documents(platform: &Platform) -> Vec<(&'static str, String)> {
    let api = |service| platform.stack.url(service);
    vec![
        ("Orders", api(Service::Orders)),
        ("Payments", api(Service::Payments)),
        ("Inventory", api(Service::Inventory)),
        ("Payment gateway simulator", api(Service::Gateway)),
        ("Sagas", platform.stack.admin_url(Service::Orders)),
        ("outbox-relay", platform.stack.admin_url(Service::Relay)),
    ]
}

async fn document(platform: &Platform, url: &str) -> Value {
    let answer = platform.http.get(format!("{url}/openapi.json")).send().await.expect("the listener answers");
    answer.json().await.expect("the document is JSON")
}

/// Every `$ref` in `value`.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get("$ref").and_then(Value::as_str));
            fields.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// The flaws of a document that the document itself shows.
fn flaws(title: &str, document: &Value) -> Vec<String> {
    let mut flaws = Vec::new();
    let info = &document["info"];
    if info["title"] != title || !info["version"].is_string() {
        flaws.push(format!("it is called {info}, not {title:?}"));
    }
    if info.to_string().contains("Kukkonen") {
        flaws.push("it names the library's author as its contact".into());
    }
    let mut found = BTreeSet::new();
    references(document, &mut found);
    for reference in found {
        if reference.strip_prefix('#').is_none_or(|pointer| document.pointer(pointer).is_none()) {
            flaws.push(format!("there is no {reference}"));
        }
    }
    let mut ids = BTreeSet::new();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten().filter(|(_, item)| item.is_object()) {
            let name = format!("{} {path}", method.to_uppercase());
            let operation_flaws = operation_flaws(path, operation, &mut ids);
            flaws.extend(operation_flaws.into_iter().map(|flaw| format!("{name}: {flaw}")));
        }
    }
    flaws
}

fn operation_flaws<'a>(path: &str, operation: &'a Value, ids: &mut BTreeSet<&'a str>) -> Vec<String> {
    let mut flaws = Vec::new();
    if !operation["operationId"].as_str().is_some_and(|id| ids.insert(id)) {
        flaws.push(format!("its id {} is another's, too", operation["operationId"]));
    }
    let parameters = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
    for name in path.split(['{', '}']).skip(1).step_by(2) {
        if !parameters.iter().any(|parameter| parameter["in"] == "path" && parameter["name"] == name) {
            flaws.push(format!("its parameter {name} is not declared"));
        }
    }
    let responses = operation["responses"].as_object().cloned().unwrap_or_default();
    let declares = |status: u16| {
        responses.contains_key(&status.to_string()) || responses.contains_key(&format!("{}XX", status / 100))
    };
    let body = operation.get("requestBody").is_some();
    let wanted = [(true, 200..=299), (true, 500..=500), (true, 503..=503)].into_iter();
    let wanted = wanted.chain([(true, 400..=400), (true, 421..=421), (body, 415..=415), (body, 422..=422)]);
    for (_, statuses) in wanted.filter(|(wanted, _)| *wanted) {
        if !statuses.clone().any(declares) {
            flaws.push(format!("it declares none of {statuses:?}"));
        }
    }
    for (status, response) in responses.iter().filter(|(status, _)| status.starts_with(['4', '5'])) {
        if response["content"].as_object().is_some_and(|content| !content.contains_key("application/problem+json")) {
            flaws.push(format!("its {status} is no problem"));
        }
    }
    flaws
}

#[test]
fn every_openapi_document_is_valid_and_declares_every_answer() {
    beside_others(async |platform| {
        let mut all = Vec::new();
        for (title, url) in documents(platform) {
            let document = document(platform, &url).await;
            all.extend(flaws(title, &document).into_iter().map(|flaw| format!("{title}: {flaw}")));
        }
        assert!(all.is_empty(), "{all:#?}");
    });
}

#[test]
fn a_document_with_flaws_is_found_out() {
    let document = serde_json::json!({
        "info": { "title": "utoipa-axum", "contact": { "name": "Juha Kukkonen" } },
        "paths": { "/v1/x/{id}": { "post": {
            "operationId": "x",
            "requestBody": { "content": {} },
            "responses": { "404": { "content": { "application/json": { "schema": { "$ref": "#/components/schemas/No" } } } } }
        } } }
    });
    let flaws = flaws("X", &document);
    for flaw in ["it is called", "author", "there is no #", "parameter id", "500", "400", "415", "422", "its 404"] {
        assert!(flaws.iter().any(|found| found.contains(flaw)), "{flaw}: {flaws:#?}");
    }
}

/// The program of schemathesis, in a virtual environment of the project's own; `Err` holds why it cannot be had.
fn schemathesis() -> Result<PathBuf, String> {
    let target = std::env::current_exe().map_err(|e| e.to_string())?;
    // The test binary is target/debug/deps/openapi-…
    let target = target.ancestors().nth(3).ok_or("the test runs outside a target directory")?;
    let (place, run) = (target.join("schemathesis"), |program: &Path, arguments: &[&str]| -> Result<Output, String> {
        let ran = Command::new(program).args(arguments).output();
        let ran = ran.map_err(|error| format!("{}: {error}", program.display()))?;
        match ran.status.success() {
            true => Ok(ran),
            false => Err(format!("{} {arguments:?}: {}", program.display(), String::from_utf8_lossy(&ran.stderr))),
        }
    });
    let (program, pip) = (place.join("bin/st"), place.join("bin/pip"));
    // The list is written last: after an installation that was interrupted, or of another list, everything is made
    // anew.
    let installed = place.join("installed.txt");
    let is_there = fs::read_to_string(&installed).is_ok_and(|list| list == SCHEMATHESIS);
    if is_there && run(&program, &["--version"]).is_ok() {
        return Ok(program);
    }
    run(Path::new("python3"), &["-m", "venv", "--clear", &place.to_string_lossy()])?;
    let list = concat!(env!("CARGO_MANIFEST_DIR"), "/schemathesis.txt");
    let checked = ["--require-hashes", "--only-binary", ":all:", "--requirement", list];
    run(&pip, &[&["install", "--quiet", "--disable-pip-version-check"][..], &checked].concat())?;
    fs::write(&installed, SCHEMATHESIS).map_err(|error| format!("{}: {error}", installed.display()))?;
    Ok(program)
}

#[test]
fn schemathesis_finds_nothing_in_any_document() {
    let program = match schemathesis() {
        Ok(program) => program,
        Err(why) => {
            // A machine without a way to PyPI says so: a test that passes untried would say nothing.
            let allowed = std::env::var_os(WITHOUT_SCHEMATHESIS).is_some_and(|value| value == "1");
            assert!(allowed, "schemathesis cannot be had; {WITHOUT_SCHEMATHESIS}=1 does without it: {why}");
            eprintln!("NOT TESTED with schemathesis, which cannot be had here: {why}");
            return;
        }
    };
    // The requests may pause outboxes and move money.
    unaudited(async |platform| {
        let mut found = Vec::new();
        for (title, url) in documents(platform) {
            let examples = EXAMPLES.to_string();
            let document = format!("{url}/openapi.json");
            let settings = concat!(env!("CARGO_MANIFEST_DIR"), "/schemathesis.toml");
            let arguments = [
                "--config-file",
                settings,
                "run",
                &document,
                "--checks",
                "all",
                "--max-examples",
                &examples,
                "--seed",
                "1",
                "--no-color",
                // Each operation is tested alone: sequences of operations are the other tests' concern.
                "--phases",
                "examples,coverage,fuzzing",
                "--generation-database",
                "none",
                // A request that the document allows may still not fit the state that things are in (docs/api.md).
                "--exclude-checks",
                "positive_data_acceptance",
            ];
            let (program, arguments) = (program.clone(), arguments.map(str::to_owned));
            let ran = tokio::task::spawn_blocking(move || {
                Command::new(program).args(arguments).current_dir(std::env::temp_dir()).output()
            });
            let ran = ran.await.expect("it does not panic").expect("it starts");
            if !ran.status.success() {
                found.push(format!("{title}:\n{}", String::from_utf8_lossy(&ran.stdout)));
            }
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    });
}
