//! PostgreSQL's password: random, one for each data directory.
//!
//! ```text
//!   postgres/           the server's user's; 0700; holds the verifier
//!   postgres.password   ours; 0600
//! ```
//!
//! The server never gets the password itself, only its SCRAM verifier (RFC 5802, 5803): no statement, log or argument
//! can show it. The file is written last. Without it, whatever the reason, the next start sets another password, so a
//! start that dies half way costs nothing, and to remove the file is the cure for a password that is known.

use crate::{Error, Result, directory, durability::Durability};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use nix::{fcntl::OFlag, unistd::Uid};
use sha2::{Digest, Sha256};
use std::{
    fmt,
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A password that is not shown by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

impl Password {
    /// Makes a password: 122 random bits, as letters and digits that mean themselves in a URL.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// The password itself, for a URL.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The file that holds the password of a data directory.
    pub fn file_of(data: &Path) -> PathBuf {
        let mut name = data.file_name().unwrap_or_default().to_owned();
        name.push(".password");
        data.with_file_name(name)
    }

    /// Reads the password of a data directory; `None` when none is kept.
    pub fn read(data: &Path) -> Result<Option<Self>> {
        let path = Self::file_of(data);
        let doing = || format!("read the password of PostgreSQL ({})", path.display());
        let mut file = match File::options().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(doing())(e)),
        };
        let meta = file.metadata().map_err(Error::io(doing()))?;
        let ours = meta.uid() == Uid::effective().as_raw() || meta.uid() == 0;
        if !ours || meta.mode() & 0o077 != 0 {
            let (path, owner) = (path.display(), directory::name_of(meta.uid()));
            return Err(Error::Other(format!(
                "the password of PostgreSQL in {path} is not ours alone: the file belongs to {owner}, and its mode is {:04o}.\n  \
                 Remove it (rm {path}): the next start sets another password.",
                meta.mode() & 0o7777
            )));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(Error::io(doing()))?;
        Ok(Some(Self(text.trim().to_owned())).filter(|password| !password.0.is_empty()))
    }

    /// Writes the password's file, whole or not at all.
    pub fn keep(&self, data: &Path) -> Result<()> {
        let path = Self::file_of(data);
        let doing = || format!("keep the password of PostgreSQL ({})", path.display());
        let place = path.parent().unwrap_or(Path::new("."));
        // A temporary file's mode is 0600.
        let mut file = tempfile::NamedTempFile::new_in(place).map_err(Error::io(doing()))?;
        writeln!(file, "{}", self.0).and_then(|()| file.as_file().sync_all()).map_err(Error::io(doing()))?;
        file.persist(&path).map(drop).map_err(|e| Error::io(doing())(e.error))
    }

    /// Forgets the password of a data directory that is going to be made anew.
    pub fn forget(data: &Path) {
        let _ = fs::remove_file(Self::file_of(data));
    }

    /// The SCRAM verifier, which the server gets in the password's place.
    pub fn verifier(&self, durability: Durability) -> String {
        verifier(self.0.as_bytes(), uuid::Uuid::new_v4().as_bytes(), rounds(durability))
    }
}

/// How often the hash is taken, by every client that connects. Many rounds make the passwords that people choose harder
/// to guess; for a random one they only cost time. Servers that are kept have PostgreSQL's default, because some
/// clients refuse fewer.
fn rounds(durability: Durability) -> u32 {
    match durability {
        Durability::Off => 1,
        Durability::On => 4096,
    }
}

/// The verifier's text: `SCRAM-SHA-256$<rounds>:<salt>$<StoredKey>:<ServerKey>`.
fn verifier(password: &[u8], salt: &[u8], rounds: u32) -> String {
    let mut round = hmac(password, &[salt, &1_u32.to_be_bytes()].concat());
    let mut salted = round;
    for _ in 1..rounds {
        round = hmac(password, &round);
        salted.iter_mut().zip(round).for_each(|(sum, byte)| *sum ^= byte);
    }
    let stored_key: [u8; 32] = Sha256::digest(hmac(&salted, b"Client Key")).into();
    let server_key = hmac(&salted, b"Server Key");
    let [salt, stored_key, server_key] = [salt, &stored_key, &server_key].map(|bytes| BASE64_STANDARD.encode(bytes));
    format!("SCRAM-SHA-256${rounds}:{salt}${stored_key}:{server_key}")
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of every length");
    mac.update(text);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_password_is_kept_in_a_file_that_only_we_read() {
        let place = tempfile::tempdir().unwrap();
        let data = place.path().join("postgres");
        assert_eq!(Password::read(&data).unwrap(), None);
        let password = Password::random();
        password.keep(&data).unwrap();
        let file = place.path().join("postgres.password");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(Password::read(&data).unwrap(), Some(password));
        assert_ne!(Password::random(), Password::random());
    }

    #[test]
    fn a_password_that_others_may_read_is_not_used_and_not_shown() {
        let place = tempfile::tempdir().unwrap();
        let data = place.path().join("postgres");
        let password = Password::random();
        password.keep(&data).unwrap();
        fs::set_permissions(Password::file_of(&data), fs::Permissions::from_mode(0o640)).unwrap();
        let said = Password::read(&data).unwrap_err().to_string();
        assert!(said.contains("0640") && said.contains("rm ") && !said.contains(password.reveal()), "{said}");
        assert_eq!(format!("{password:?}"), "Password(…)");
    }

    #[test]
    fn the_verifier_is_the_one_of_rfc_7677() {
        // The RFC's example: the server's signature and the client's proof follow from these two keys.
        let salt = BASE64_STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let expected = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==\
                        $WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        assert_eq!(verifier(b"pencil", &salt, 4096), expected);
    }
}
