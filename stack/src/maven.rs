//! Resolves a pom to the files it names; finds Java and Maven, or reports what to install.
//!
//! Maven resolves each pom once. The answer is kept in the cache under the pom's digest, and Maven is asked again only
//! when one of the files is gone. The files have to be as listed (see [`crate::jars`]). They are verified when they
//! were fetched, and Kafka's once more before a process first uses them, which takes 0.1 s. (PostgreSQL's programs are
//! unpacked, and kept, once.)

use crate::{Error, Result, cache::Cache, jars::JarList, process::Spec, progress::Progress};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// The oldest Java that Kafka 4's server runs on.
const JAVA_AT_LEAST: u32 = 17;
/// The plugin's goal, pinned: Maven otherwise takes the version that its own version prefers.
const GOAL: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath";

/// The entries whose files were verified by this process.
static VERIFIED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The command that installs Java and Maven on this system.
fn install_hint() -> String {
    if cfg!(target_os = "macos") {
        "brew install openjdk maven".into()
    } else if Path::new("/etc/debian_version").exists() {
        "apt-get update && apt-get install -y default-jre-headless maven".into()
    } else if Path::new("/etc/fedora-release").exists() {
        "dnf install -y java-21-openjdk-headless maven".into()
    } else {
        format!("a JVM, version {JAVA_AT_LEAST} or later, and Maven, with your system's packages")
    }
}

/// The Java to run servers with: `$JAVA_HOME`'s, else the one on the path. It is checked to be recent enough.
pub fn java() -> Result<PathBuf> {
    let home = std::env::var_os("JAVA_HOME").filter(|home| !home.is_empty());
    let java = home.map_or_else(|| PathBuf::from("java"), |home| PathBuf::from(home).join("bin/java"));
    let missing = |what: String| Error::Missing { what, install: install_hint() };
    let output = Command::new(&java)
        .arg("-version")
        .output()
        .map_err(|e| missing(format!("Apache Kafka needs a JVM, and '{}' cannot be run ({e})", java.display())))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match major_version(&said) {
        Some(version) if version >= JAVA_AT_LEAST => Ok(java),
        Some(version) => Err(missing(format!("Apache Kafka needs Java {JAVA_AT_LEAST} or later, this is {version}"))),
        None => Err(missing(format!("'{} -version' does not tell its version: {}", java.display(), said.trim()))),
    }
}

/// The major version. Of `openjdk version "17.0.15" 2025-04-15`: 17. Of `"1.8.0"`: 1, which is old enough to be
/// refused.
fn major_version(said: &str) -> Option<u32> {
    let quoted = said.split('"').nth(1)?;
    quoted.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A pom, with the name of what it fetches.
#[derive(Debug, Clone)]
pub struct Pom {
    /// The name, for people, of what the pom fetches.
    pub name: &'static str,
    /// The text of the pom.
    pub text: &'static str,
    /// The jars that the pom may fetch.
    pub jars: JarList,
    /// The properties that Maven gets for the pom.
    pub properties: Vec<(&'static str, String)>,
}

impl Pom {
    /// The name of the pom's entry in the cache: other contents, other entry.
    pub fn entry(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(self.text);
        digest.update(self.jars.text);
        for (property, value) in &self.properties {
            digest.update(format!("{property}={value}\n"));
        }
        let digest: String = digest.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect();
        format!("{}-{digest}", self.name.to_lowercase())
    }

    /// Resolves the pom to its files, in class path order.
    pub async fn resolve(&self, cache: &Cache, progress: &Progress) -> Result<Vec<PathBuf>> {
        let entry = self.entry();
        let kept = || read(&cache.entry(&entry));
        if kept().is_none() {
            cache.discard(&entry);
            let make = |dir: PathBuf| async move { self.fetch(&dir, progress).await.map(drop) };
            cache.entry_or(&entry, progress, make).await?;
        }
        let files = kept().ok_or_else(|| {
            let at = cache.entry(&entry);
            Error::Other(format!("Maven named files that do not exist, see {}", at.display()))
        })?;
        self.verify_once(entry, &files).await?;
        Ok(files)
    }

    async fn verify_once(&self, entry: String, files: &[PathBuf]) -> Result<()> {
        let verified = || VERIFIED.lock().unwrap_or_else(PoisonError::into_inner);
        if verified().contains(&entry) {
            return Ok(());
        }
        self.verify(files).await?;
        verified().push(entry);
        Ok(())
    }

    async fn verify(&self, files: &[PathBuf]) -> Result<()> {
        let (jars, files) = (self.jars, files.to_vec());
        let verified = tokio::task::spawn_blocking(move || jars.verify(&files)).await;
        verified.map_err(|e| Error::Other(e.to_string()))?
    }

    /// Asks Maven, whatever the cache holds; the answer is written into `dir`.
    pub async fn fetch(&self, dir: &Path, progress: &Progress) -> Result<Vec<PathBuf>> {
        let name = self.name;
        progress.step(format!("fetching {name} from Maven Central (once)"));
        fs::write(dir.join("pom.xml"), self.text).map_err(Error::io(format!("write {}", dir.display())))?;
        // The log lies beside the directory, which is thrown away when this fails: the log has to outlive it.
        let log = dir.with_extension("log");
        let _ = fs::remove_file(&log);
        let mut spec =
            Spec::new(format!("Maven (for {name})"), "mvn", log).args(["--batch-mode", "--strict-checksums", "-f"]);
        spec = spec.args([dir.join("pom.xml")]).args([GOAL, "-DincludeScope=runtime"]);
        spec = spec.args([format!("-Dmdep.outputFile={}", dir.join("classpath").display())]);
        spec = spec.args(self.properties.iter().map(|(property, value)| format!("-D{property}={value}")));
        match spec.run().await {
            Ok(()) => {}
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let what = format!("Maven (mvn), which fetches {name}, is not installed");
                return Err(Error::Missing { what, install: install_hint() });
            }
            Err(other) => return Err(other),
        }
        let files = read(dir).ok_or_else(|| Error::Other(format!("Maven named no files for {name}")))?;
        self.verify(&files).await?;
        Ok(files)
    }
}

fn read(entry: &Path) -> Option<Vec<PathBuf>> {
    let text = fs::read_to_string(entry.join("classpath")).ok()?;
    let files: Vec<PathBuf> = std::env::split_paths(text.trim()).collect();
    (!files.is_empty() && files.iter().all(|f| f.is_file())).then_some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn java_tells_its_version_in_several_ways() {
        assert_eq!(major_version("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK ..."), Some(17));
        assert_eq!(major_version("openjdk version \"25\" 2025-09-16"), Some(25));
        assert_eq!(major_version("java version \"1.8.0_402\""), Some(1));
        assert_eq!(major_version("The program 'java' is not installed"), None);
    }
}
