//! A jar that is not as listed is not used, whether Maven has just fetched it or long ago. Also how the list is made.

use stack::{cache::Cache, kafka::pom, progress::Progress};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// The SHA-256 of a file whose content is `jar`.
const DIGEST_OF_IT: &str = "0163f1eea7894350060624d315234d40c508ab251ba121714e234503045faadd";

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A stand-in for Maven, which names the files that these commands write.
fn maven(place: &Path, names: &str) {
    let script = format!(
        "#!/bin/sh\nfor a in \"$@\"; do case $a in\n  -Dmdep.outputFile=*) out=${{a#*=}} ;;\n  \
         -Dpostgres.platform=*) platform=${{a#*=}} ;;\nesac; done\necho \"$*\" >> {0}/asked\n{names}\n",
        place.display()
    );
    fs::create_dir(place.join("bin")).unwrap();
    fs::write(place.join("bin/mvn"), script).unwrap();
    fs::set_permissions(place.join("bin/mvn"), fs::Permissions::from_mode(0o755)).unwrap();
}

fn path(place: &Path) -> String {
    format!("{}:{}", place.join("bin").display(), std::env::var("PATH").unwrap())
}

/// Whether `stack run` runs its command with this cache, and its output.
fn run(place: &Path, cache: &Path) -> (bool, String) {
    let mut stack = Command::new(env!("CARGO_BIN_EXE_stack"));
    stack.args(["run", "--", "true"]).env("PATH", path(place)).env("STACK_CACHE", cache).env("TMPDIR", place);
    stack.env("DATABASE_URL", "postgres://there").env_remove("KAFKA_BROKERS");
    let output = stack.output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// The first jar of Kafka's list, its digest and its name.
fn listed() -> (String, String) {
    let list = fs::read_to_string(folder().join("kafka/jars.sha256")).unwrap();
    let (digest, name) = list.lines().next().unwrap().split_once("  ").unwrap();
    (digest.to_owned(), name.to_owned())
}

fn place() -> TempDir {
    tempfile::Builder::new().prefix("stack-jars-").tempdir_in("/tmp").unwrap()
}

#[test]
fn what_maven_fetches_is_refused_unless_it_is_as_listed() {
    let (digest, name) = listed();
    for (jar, why) in [
        (name.as_str(), format!("stack/kafka/jars.sha256 lists {digest}")),
        ("other-1.jar", "stack/kafka/jars.sha256 does not list it".to_owned()),
    ] {
        let place = place();
        maven(place.path(), &format!("printf jar > {0}/{jar}; printf %s {0}/{jar} > \"$out\"", place.path().display()));
        let cache = place.path().join("cache");
        let (ran, said) = run(place.path(), &cache);
        assert!(!ran && said.contains(&format!("{jar} is not used")) && said.contains(&why), "{said}");
        assert!(said.contains(DIGEST_OF_IT), "{said}");
        assert!(fs::read_to_string(place.path().join("asked")).unwrap().contains("--strict-checksums"));
        // The file is not kept for the next time either.
        assert!(!run(place.path(), &cache).0);
        assert_eq!(fs::read_to_string(place.path().join("asked")).unwrap().lines().count(), 2);
    }
}

/// The name of Kafka's entry in the cache, and its class path, fetched if need be.
fn kept() -> (String, Vec<PathBuf>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cache, pom) = (Cache::open().unwrap(), pom());
    let jars = runtime.block_on(pom.resolve(&cache, &Progress::Silent)).unwrap();
    (pom.entry(), jars)
}

#[test]
fn a_kept_jar_of_which_a_byte_changed_is_refused_before_it_runs() {
    let (entry, mut jars) = kept();
    let place = place();
    maven(place.path(), "exit 1");
    let cache = place.path().join("cache");
    fs::create_dir_all(cache.join(&entry)).unwrap();
    let keep = |jars: &[PathBuf]| {
        let class_path = std::env::join_paths(jars).unwrap();
        fs::write(cache.join(&entry).join("classpath"), class_path.to_str().unwrap()).unwrap();
    };
    keep(&jars);
    let (ran, said) = run(place.path(), &cache);
    assert!(ran, "as it is, it is used: {said}");

    let mut bytes = fs::read(&jars[7]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let changed = place.path().join(jars[7].file_name().unwrap());
    fs::write(&changed, bytes).unwrap();
    jars[7] = changed.clone();
    keep(&jars);
    let (ran, said) = run(place.path(), &cache);
    assert!(!ran && said.contains(&format!("{} is not used: its SHA-256 is", changed.display())), "{said}");
}

#[test]
fn the_lists_are_made_anew_from_what_maven_fetches() {
    let place = place();
    for file in ["jars.sh", "kafka/pom.xml", "postgres/pom.xml"] {
        let to = place.path().join("stack").join(file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        symlink(folder().join(file), to).unwrap();
    }
    let at = place.path().display();
    maven(
        place.path(),
        &format!(
            "name=${{platform:-b}}\nprintf abc > {at}/$name.jar; printf abc > {at}/a.jar\n\
             printf %s:%s {at}/$name.jar {at}/a.jar > \"$out\""
        ),
    );
    let mut script = Command::new("sh");
    let output = script.arg(place.path().join("stack/jars.sh")).env("PATH", path(place.path())).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let list = |file: &str| fs::read_to_string(place.path().join("stack").join(file)).unwrap();
    assert_eq!(list("kafka/jars.sha256"), format!("{abc}  a.jar\n{abc}  b.jar\n"));
    let real = fs::read_to_string(folder().join("postgres/jars.sha256")).unwrap();
    for platform in ["linux-amd64", "darwin-arm64v8"] {
        assert!(list("postgres/jars.sha256").contains(&format!("{abc}  {platform}.jar\n")), "{platform}");
        assert!(real.contains(&format!("binaries-{platform}-")), "{platform}");
    }
}
