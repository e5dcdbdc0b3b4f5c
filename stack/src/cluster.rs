//! PostgreSQL's data directory: checked, made, and closed to clients without its password.
//!
//! Builds before this one let in every client that reached the port. A data directory of theirs has no password beside
//! it. PostgreSQL's single-user mode, which listens nowhere, then sets one, and `pg_hba.conf` is written anew.

use crate::{
    Error, Result, directory,
    durability::{Durability, settings},
    password::Password,
    process::Spec,
};
use nix::unistd::User;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{OpenOptionsExt, fchown},
    path::Path,
};

/// The rules of `pg_hba.conf`: no client without a password, over the loopback interface and the socket. `initdb`
/// writes the same.
const HBA: &str = "\
# type  database     user  address        method
local   all          all                  scram-sha-256
host    all          all   127.0.0.1/32   scram-sha-256
host    all          all   ::1/128        scram-sha-256
local   replication  all                  scram-sha-256
host    replication  all   127.0.0.1/32   scram-sha-256
host    replication  all   ::1/128        scram-sha-256
";

/// The place of PostgreSQL's programs, and the user that they run as.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Programs<'a> {
    pub(crate) home: &'a Path,
    pub(crate) user: Option<&'a User>,
    pub(crate) log: &'a Path,
}

impl Programs<'_> {
    fn spec(&self, program: &str) -> Spec {
        let mut spec = Spec::new(program, self.home.join("bin").join(program), self.log);
        spec.user = self.user.cloned();
        spec
    }
}

/// Makes the data directory when it is not there yet, and returns its password.
pub(crate) async fn prepare(programs: Programs<'_>, data: &Path, durability: Durability) -> Result<Password> {
    if let Some(parent) = data.parent() {
        directory::make(parent)?;
    }
    if fs::symlink_metadata(data).is_ok() {
        directory::check(data, programs.user)?;
    }
    let there = data.join("PG_VERSION").exists();
    if there && let Some(kept) = Password::read(data)? {
        return Ok(kept);
    }
    let password = Password::random();
    let verifier = password.verifier(durability);
    if there {
        close(programs, data, &verifier, durability).await?;
    } else {
        initdb(programs, data, &verifier).await?;
    }
    password.keep(data)?;
    Ok(password)
}

async fn initdb(programs: Programs<'_>, data: &Path, verifier: &str) -> Result<()> {
    let doing = || format!("prepare the data directory {}", data.display());
    Password::forget(data);
    // An initdb that was interrupted leaves a directory that the next one would refuse.
    let _ = fs::remove_dir_all(data);
    directory::make_closed(data, programs.user)?;
    // The file lies beside the data, because `initdb` wants the directory empty. It is gone when this function ends.
    let place = data.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(place).map_err(Error::io(doing()))?;
    writeln!(file, "{verifier}").map_err(Error::io(doing()))?;
    give(file.as_file(), programs.user).map_err(Error::io(doing()))?;
    let mut pwfile = std::ffi::OsString::from("--pwfile=");
    pwfile.push(file.path());
    let options =
        ["-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"];
    let spec = programs.spec("initdb").args(["-D".as_ref(), data.as_os_str()]).args(options).args([pwfile]);
    spec.run().await
}

/// Closes a data directory that let in every client, or whose password was lost.
async fn close(programs: Programs<'_>, data: &Path, verifier: &str, durability: Durability) -> Result<()> {
    write_hba(data, programs.user).map_err(Error::io(format!("close the data directory {}", data.display())))?;
    let settings = settings(durability).into_iter().chain(["exit_on_error=on"]);
    let mut spec = programs.spec("postgres").args(["--single".as_ref(), "-D".as_ref(), data.as_os_str()]);
    spec = spec.args(settings.flat_map(|setting| ["-c".to_owned(), setting.to_owned()])).args(["postgres"]);
    spec.name = "PostgreSQL (which sets its password)".into();
    spec.input = format!("alter role postgres password '{verifier}'\n");
    spec.run().await
}

/// Writes the file aside, and renames it: the directory is the server's user's, which might have put a link there.
fn write_hba(data: &Path, user: Option<&User>) -> std::io::Result<()> {
    let aside = data.join("pg_hba.conf.part");
    let _ = fs::remove_file(&aside);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&aside)?;
    file.write_all(HBA.as_bytes())?;
    give(&file, user)?;
    file.sync_all()?;
    fs::rename(&aside, data.join("pg_hba.conf"))
}

fn give(file: &File, user: Option<&User>) -> std::io::Result<()> {
    let Some(user) = user else { return Ok(()) };
    fchown(file, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
}
