//! Mistakes in a saga's definition do not compile, and the compiler's message helps.
//!
//! Each case in `compile_fail/` begins with the compiler's expected words (`//~`); `good.rs` has to compile. The test
//! asks the compiler directly, with the libraries that it was built from. trybuild would build every dependency a
//! second time, Kafka's C library included, which takes minutes where this takes seconds.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::SystemTime,
};

struct Compiler {
    libraries: PathBuf,
    saga_core: PathBuf,
    serde: PathBuf,
}

impl Compiler {
    /// There may be several builds of a library side by side (other features). The right pair is one with which
    /// `good.rs` compiles.
    fn find() -> Self {
        let exe = std::env::current_exe().unwrap();
        let libraries = exe.parent().unwrap().to_owned();
        let built = |name: &str| {
            let of = |file: &Path| file.file_name().and_then(OsStr::to_str).is_some_and(|file| file.starts_with(name));
            let files = fs::read_dir(&libraries).unwrap().map(|file| file.unwrap().path());
            let mut found: Vec<(SystemTime, PathBuf)> = files
                .filter(|file| of(file) && file.extension() == Some(OsStr::new("rlib")))
                .map(|file| (fs::metadata(&file).unwrap().modified().unwrap(), file))
                .collect();
            found.sort_by(|a, b| b.cmp(a));
            found.into_iter().map(|(_, file)| file).collect::<Vec<_>>()
        };
        let mut why = String::from("no library is there");
        for saga_core in built("libsaga_core-") {
            for serde in built("libserde-") {
                let compiler = Self { libraries: libraries.clone(), saga_core: saga_core.clone(), serde };
                let good = compiler.compile("good");
                if good.status.success() {
                    return compiler;
                }
                why = String::from_utf8_lossy(&good.stderr).into_owned();
            }
        }
        panic!("good.rs has to compile: {why}");
    }

    fn compile(&self, case: &str) -> Output {
        let library = |name: &str, file: &Path| format!("{name}={}", file.display());
        Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .current_dir(folder())
            .args(["--edition=2024", "--crate-type=bin", "--emit=obj", "-Adead_code", "-o"])
            .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("compile_fail_{case}.o")))
            .args(["--extern", &library("saga_core", &self.saga_core), "--extern", &library("serde", &self.serde)])
            .args(["-L", &format!("dependency={}", self.libraries.display())])
            .arg(format!("{case}.rs"))
            .output()
            .unwrap()
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile_fail")
}

#[test]
fn what_must_not_be_said_does_not_compile_and_the_message_says_why() {
    let compiler = Compiler::find();
    let mut cases = 0;
    for file in fs::read_dir(folder()).unwrap().map(|file| file.unwrap().path()) {
        let text = fs::read_to_string(&file).unwrap();
        let expected: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("//~ ")).collect();
        if expected.is_empty() {
            continue;
        }
        cases += 1;
        let case = file.file_stem().and_then(OsStr::to_str).unwrap().to_owned();
        let output = compiler.compile(&case);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{case} compiles");
        for words in expected {
            assert!(said.contains(words), "{case}: the compiler does not say {words:?} but\n{said}");
        }
        let errors = said.lines().filter(|line| line.starts_with("error[") || line.starts_with("error:")).count();
        assert!(errors <= 2, "{case}: one error and the compiler's goodbye, not {errors}:\n{said}");
    }
    assert_eq!(cases, 9);
}
