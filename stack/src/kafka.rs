//! Apache Kafka: one KRaft node, broker and controller in one process.

use crate::{
    Error, Result,
    cache::Cache,
    directory,
    durability::Durability,
    jars::JarList,
    maven::{self, Pom},
    process::{Process, Spec},
    progress::Progress,
};
use nix::sys::signal::Signal;
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The pom that names Kafka's jars; Kafka's version is there.
const POM: &str = include_str!("../kafka/pom.xml");
/// The listed jars of Kafka.
const JARS: JarList = JarList { path: "stack/kafka/jars.sha256", text: include_str!("../kafka/jars.sha256") };
/// The logging configuration, without which Kafka logs nothing.
const LOG4J: &str = include_str!("../kafka/log4j2.properties");
/// How long a start may take: the broker answers after 2.4 s on two idle cores, and a busy machine takes several times
/// that.
const START_BOUND: Duration = Duration::from_secs(90);

/// A broker that was started here.
#[derive(Debug)]
pub struct Kafka {
    /// The broker's process, a JVM.
    pub process: Process,
    /// The port that clients connect to, on the loopback interface.
    pub port: u16,
}

impl Kafka {
    /// Starts a broker on `data` (formatted when it is not yet) and waits until it answers.
    pub async fn start(
        cache: &Cache,
        data: &Path,
        log: &Path,
        ports: [u16; 2],
        durability: Durability,
        progress: &Progress,
    ) -> Result<Self> {
        let java = Java::find(cache, durability, progress).await?;
        directory::make(data)?;
        let config = data.join("server.properties");
        fs::write(&config, properties(data, ports)).map_err(Error::io(format!("write {}", config.display())))?;
        fs::write(data.join("log4j2.properties"), LOG4J).map_err(Error::io("write Kafka's logging configuration"))?;
        if !data.join("log/meta.properties").exists() {
            let id = uuid::Uuid::new_v4().simple().to_string();
            let format = ["format", "--standalone", "-t", &id[..22], "-c"].map(OsString::from);
            let args = format.into_iter().chain([config.clone().into_os_string()]);
            java.spec("Kafka's storage tool", log, data, "kafka.tools.StorageTool").args(args).run().await?;
        }
        let mut spec = java.spec("Kafka", log, data, "kafka.Kafka").args([config]);
        spec.orphan = if durability == Durability::Off { Signal::SIGKILL } else { Signal::SIGTERM };
        let process = Process::start(spec)?;
        let brokers = format!("127.0.0.1:{}", ports[0]);
        process.healthy(START_BOUND, || answers(brokers.clone())).await?;
        Ok(Self { process, port: ports[0] })
    }

    /// Starts the broker again on its data and port after it was killed, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        self.process.start_again()?;
        self.process.healthy(START_BOUND, || answers(self.brokers())).await
    }

    /// The broker's address, as in `KAFKA_BROKERS`.
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// A JVM with Kafka's classes.
#[derive(Debug)]
pub struct Java {
    program: PathBuf,
    class_path: OsString,
    options: &'static [&'static str],
}

impl Java {
    /// Finds Java and Kafka's jars, fetched on the first run. Benchmarks run Kafka's own tools with them, too.
    pub async fn find(cache: &Cache, durability: Durability, progress: &Progress) -> Result<Self> {
        let program = maven::java()?;
        let jars = pom().resolve(cache, progress).await?;
        let class_path = std::env::join_paths(jars).map_err(|e| Error::Other(e.to_string()))?;
        let options: &[&str] = match durability {
            // These options start faster and stay small; they are slower at full speed.
            Durability::Off => &["-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"],
            Durability::On => &["-Xmx1g", "-XX:+UseSerialGC"],
        };
        Ok(Self { program, class_path, options })
    }

    /// One of Kafka's programs. `dir` holds the logging configuration, and the library that Kafka unpacks for lz4. A
    /// JVM that is killed would leave that library in the common temporary directory.
    pub fn spec(&self, name: &str, log: &Path, dir: &Path, class: &str) -> Spec {
        let logging = dir.join("log4j2.properties");
        Spec::new(name, &self.program, log)
            .args(self.options.iter().copied())
            .args([format!("-Dlog4j2.configurationFile={}", logging.display())])
            // The directory is a broker's: there is none where running brokers were named.
            .args(dir.is_dir().then(|| format!("-Djava.io.tmpdir={}", dir.display())))
            .args(["-cp".into(), self.class_path.clone(), class.into()])
    }
}

/// The pom of Kafka, with its list of jars.
pub fn pom() -> Pom {
    Pom { name: "Kafka", text: POM, jars: JARS, properties: vec![] }
}

fn properties(data: &Path, [port, controller]: [u16; 2]) -> String {
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}/log
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=2
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=2
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
num.network.threads=1
num.io.threads=2
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=1000
log.cleaner.dedupe.buffer.size=16777216
auto.create.topics.enable=false
",
        data = data.display()
    )
}

/// Whether the broker returns its metadata; librdkafka's call blocks.
pub async fn answers(brokers: String) -> Result<(), String> {
    let asked = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("log_level", "0")
            .create()
            .map_err(|e| e.to_string())?;
        let metadata = consumer.fetch_metadata(None, Duration::from_secs(2)).map_err(|e| e.to_string())?;
        if metadata.brokers().is_empty() { Err("no broker is registered yet".to_owned()) } else { Ok(()) }
    });
    asked.await.map_err(|e| e.to_string())?
}
