//! Servers whose data is kept: rows and records are there after an orderly end, after SIGKILL, and on other ports.

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
};
use sqlx::{Connection, PgConnection};
use stack::{
    durability::Durability,
    postgres::Postgres,
    progress::Progress,
    servers::{Keep, Servers, ServersConfig},
};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

fn config(dir: &Path) -> ServersConfig {
    ServersConfig {
        keep: Keep::In(dir.to_owned()),
        logs: Some(dir.join("logs")),
        durability: Durability::On,
        database_url: None,
        kafka_brokers: None,
        preferred_ports: None,
    }
}

async fn databases(servers: &Servers) -> Vec<String> {
    let mut connection = PgConnection::connect(&servers.database_url).await.unwrap();
    sqlx::query_scalar("select datname::text from pg_database").fetch_all(&mut connection).await.unwrap()
}

fn topics(servers: &Servers) -> Vec<String> {
    let mut config = ClientConfig::new();
    let consumer: BaseConsumer = config.set("bootstrap.servers", &servers.kafka_brokers).create().unwrap();
    let metadata = consumer.fetch_metadata(None, Duration::from_secs(20)).unwrap();
    metadata.topics().iter().map(|topic| topic.name().to_owned()).collect()
}

async fn write_something(servers: &Servers) {
    let mut connection = PgConnection::connect(&servers.database_url).await.unwrap();
    sqlx::query("create database kept").execute(&mut connection).await.unwrap();
    let mut config = ClientConfig::new();
    let admin: AdminClient<DefaultClientContext> =
        config.set("bootstrap.servers", &servers.kafka_brokers).create().unwrap();
    let topic = NewTopic::new("kept", 1, TopicReplication::Fixed(1));
    let made = admin.create_topics([&topic], &AdminOptions::new().operation_timeout(Some(Duration::from_secs(20))));
    made.await.unwrap().into_iter().for_each(|topic| drop(topic.unwrap()));
}

async fn holds_what_was_written(servers: &Servers) {
    assert!(databases(servers).await.contains(&"kept".to_owned()));
    assert!(topics(servers).contains(&"kept".to_owned()));
}

#[tokio::test]
async fn kept_data_survives_an_orderly_end_a_kill_and_other_ports() {
    // The directory is below /tmp, so that PostgreSQL's user gets there when this runs as root.
    let place = tempfile::Builder::new().prefix("stack-kept-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();

    let servers = Servers::start(config(place.path()), &Progress::Silent).await.unwrap();
    write_something(&servers).await;
    let first = servers.database_url.clone();
    servers.stop().await;

    let servers = Servers::start(config(place.path()), &Progress::Silent).await.unwrap();
    assert_ne!(servers.database_url, first, "any free port is meant to be another one");
    holds_what_was_written(&servers).await;

    let (postgres, kafka) = (servers.postgres.as_ref().unwrap(), servers.kafka.as_ref().unwrap());
    postgres.process.kill();
    kafka.process.kill();
    assert!(!postgres.process.is_running() && !kafka.process.is_running());
    postgres.restart().await.unwrap();
    kafka.restart().await.unwrap();
    holds_what_was_written(&servers).await;
    servers.stop().await;
}

#[tokio::test]
async fn data_goes_elsewhere_when_the_servers_user_cannot_get_to_the_directory() {
    let place = tempfile::Builder::new().prefix("stack-closed-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let inside = place.path().join("checkout");
    let directory = stack::state::StateDirectory::at(inside.clone());
    let config = ServersConfig { kafka_brokers: Some("unused:1".into()), ..config(&inside) };
    let servers = Servers::start(config, &Progress::Silent).await.unwrap();
    assert!(databases(&servers).await.contains(&"postgres".to_owned()));
    let servers_password = servers.postgres.as_ref().map(Postgres::password_file);
    servers.stop().await;
    let data = inside.join("postgres");
    assert_eq!(data.is_symlink(), nix::unistd::Uid::effective().is_root(), "only root's server is another user's");
    let elsewhere = fs::canonicalize(&data).unwrap();
    assert!(elsewhere.join("PG_VERSION").exists());
    let password = servers_password.expect("we started it");
    assert!(password.exists() && password.parent() == elsewhere.parent());
    directory.reset().await.unwrap();
    assert!(!elsewhere.exists() && !password.exists() && !inside.exists());
}
