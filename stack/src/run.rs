//! `stack run`: a command with servers, its exit code, and signals passed on.

use crate::{
    Error, Result, guard,
    process::{POLL_EVERY, STOP_BOUND},
    servers::Servers,
};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use std::{
    ffi::OsString,
    io::IsTerminal,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitCode, ExitStatus},
};
use tokio::signal::unix::{SignalKind, signal};

/// Resolves when a signal asks this process to end.
pub fn interrupted() -> Result<impl Future<Output = Signal>> {
    let listen = |kind| signal(kind).map_err(Error::io("listen for signals"));
    let (mut int, mut term) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let mut hup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => Signal::SIGINT,
            _ = term.recv() => Signal::SIGTERM,
            _ = hup.recv() => Signal::SIGHUP,
        }
    })
}

/// Runs the command to its end. A signal for this process goes to the command and everything it started.
pub async fn command(command: &[OsString], servers: &Servers) -> Result<ExitCode> {
    let [program, args @ ..] = command else { return Err(Error::Other("no command".into())) };
    let mut prepared = Command::new(program);
    prepared.args(args).env("DATABASE_URL", &servers.database_url).env("KAFKA_BROKERS", &servers.kafka_brokers);
    // On a terminal the command stays in our process group: it may read from there, and Ctrl-C reaches both.
    let own_group = !std::io::stdin().is_terminal();
    if own_group {
        prepared.process_group(0);
    }
    let mut interrupted = Box::pin(interrupted()?);
    let mut child = prepared.spawn().map_err(Error::io(format!("start {}", program.display())))?;
    let pid = child.id();
    if own_group {
        guard::watch(pid, "TERM");
    }
    let status = tokio::select! {
        status = ended(&mut child) => status,
        asked = &mut interrupted => {
            let _ = signal_to(pid, own_group, asked);
            let status = tokio::time::timeout(STOP_BOUND, ended(&mut child)).await;
            let _ = signal_to(pid, own_group, Signal::SIGKILL);
            status.unwrap_or_else(|_| child.wait())
        }
    };
    if own_group {
        guard::forget(pid);
    }
    let status = status.map_err(Error::io("wait for the command"))?;
    // A shell's code for a death by signal.
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn signal_to(pid: u32, group: bool, signal: Signal) -> nix::Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid).expect("the kernel's process ids fit in an i32"));
    if group { killpg(pid, signal) } else { kill(pid, signal) }
}

async fn ended(child: &mut Child) -> std::io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}
