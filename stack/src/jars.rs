//! The SHA-256 of each jar. Maven's own checksums come from the jars' source; these are ours, in the tree.
//!
//! `make jars` lists them anew when a version in a pom was changed.

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

/// The jars that may be used, in the format of `sha256sum`.
#[derive(Debug, Clone, Copy)]
pub struct JarList {
    /// The list's path in the tree.
    pub path: &'static str,
    /// The text of the list.
    pub text: &'static str,
}

impl JarList {
    /// Verifies that each of the files is listed, and has the listed digest.
    pub fn verify(&self, files: &[PathBuf]) -> Result<()> {
        let listed: HashMap<&str, &str> = self.entries().map(|(digest, name)| (name, digest)).collect();
        for file in files {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let found = sha256_of(file).map_err(Error::io(format!("read the jar {}", file.display())))?;
            let refuse = |why, cure| Err(Error::Jar { jar: file.display().to_string(), why, cure });
            match listed.get(name.as_ref()) {
                Some(expected) if *expected == found => {}
                Some(expected) => {
                    let why = format!("its SHA-256 is {found}, and {} lists {expected}", self.path);
                    let remove = file.parent().unwrap_or(file).display();
                    let cure = format!(
                        "Remove it (rm -r {remove}): Maven fetches it again. If it comes back the same, do not use it."
                    );
                    return refuse(why, cure);
                }
                None => {
                    let why = format!("{} does not list it (its SHA-256 is {found})", self.path);
                    return refuse(why, "After a change of a version: `make jars` lists the jars anew.".into());
                }
            }
        }
        Ok(())
    }

    /// The digests and the names of the listed jars.
    fn entries(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.text.lines().filter_map(|line| line.split_once("  "))
    }

    /// Whether a jar of this name is listed.
    pub fn has(&self, jar: &str) -> bool {
        self.entries().any(|(_, name)| name == jar)
    }
}

fn sha256_of(file: &Path) -> io::Result<String> {
    let mut digest = Writer(Sha256::new());
    io::copy(&mut BufReader::with_capacity(1 << 16, File::open(file)?), &mut digest)?;
    Ok(digest.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A digest that is written to.
struct Writer(Sha256);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The list holds the digest of `abc`, from FIPS 180-2.
    const LIST: JarList = JarList {
        path: "the/list",
        text: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a-1.jar\n",
    };

    fn jar(name: &str, text: &str) -> (tempfile::TempDir, Vec<PathBuf>) {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join(name);
        fs::write(&file, text).unwrap();
        (place, vec![file])
    }

    #[test]
    fn a_jar_as_listed_is_used_and_one_with_a_changed_byte_is_not() {
        let (_place, files) = jar("a-1.jar", "abc");
        LIST.verify(&files).unwrap();
        fs::write(&files[0], "abd").unwrap();
        let said = LIST.verify(&files).unwrap_err().to_string();
        assert!(said.starts_with(&format!("{} is not used: its SHA-256 is a52d", files[0].display())), "{said}");
        assert!(said.contains("the/list lists ba78") && said.contains("rm -r "), "{said}");
    }

    #[test]
    fn a_jar_that_is_not_listed_is_not_used() {
        let (_place, files) = jar("b-1.jar", "abc");
        let said = LIST.verify(&files).unwrap_err().to_string();
        assert!(
            said.contains("the/list does not list it (its SHA-256 is ba78") && said.contains("make jars"),
            "{said}"
        );
    }
}
