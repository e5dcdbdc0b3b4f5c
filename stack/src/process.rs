//! One server process: started in a process group of its own with its output in a log file, and ended for certain.
//!
//! Nothing here waits on a runtime's signal handling, because tests share a stack between runtimes: ends are polled.
//! When *this process* dies, [`crate::guard`] ends the server process.

use crate::{Error, Result, guard};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::{Pid, User},
};
use std::{
    ffi::OsString,
    fmt,
    fs::{File, OpenOptions},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The pause between two checks whether a process has ended.
pub const POLL_EVERY: Duration = Duration::from_millis(10);
/// How long a process has between its stop signal and SIGKILL: Kafka and PostgreSQL write their state out meanwhile.
pub const STOP_BOUND: Duration = Duration::from_secs(20);

/// The variables of our environment that another user's process gets.
const PASSED_ON: [&str; 3] = ["PATH", "LANG", "TZ"];

/// A program to start. Secrets go into its variables, which others on the machine cannot read; every user sees its
/// arguments.
#[derive(Clone)]
pub struct Spec {
    /// The process's name, for people.
    pub name: String,
    /// The path of the program, or its name on `PATH`.
    pub program: PathBuf,
    /// The arguments, without the program's name.
    pub args: Vec<OsString>,
    /// Variables in addition to ours; another user's process gets few of ours.
    pub env: Vec<(String, String)>,
    /// The text on its standard input; a little, at once.
    pub input: String,
    /// The log that its output is appended to.
    pub log: PathBuf,
    /// The user that the program runs as; `None`: our own.
    pub user: Option<User>,
    /// The signal that asks the process to stop.
    pub stop: Signal,
    /// The signal that it gets when this process dies: a gentle one where data is kept, a fast one where it is thrown
    /// away.
    pub orphan: Signal,
}

impl fmt::Debug for Spec {
    /// Shows the spec without variables and input, where secrets are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, program, args, log, .. } = self;
        let mut spec = f.debug_struct("Spec");
        spec.field("name", name).field("program", program).field("args", args).field("log", log).finish_non_exhaustive()
    }
}

impl Spec {
    /// A program that stops at SIGTERM, under our own user.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            input: String::new(),
            log: log.into(),
            user: None,
            stop: Signal::SIGTERM,
            orphan: Signal::SIGTERM,
        }
    }

    /// Adds arguments behind those that it has.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    fn command(&self) -> Result<Command> {
        let log = |file: std::io::Result<File>| file.map_err(Error::io(format!("open the log {}", self.log.display())));
        let out = log(OpenOptions::new().create(true).append(true).open(&self.log))?;
        let err = log(out.try_clone())?;
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        if self.user.is_some() {
            // Another user can read the variables of its processes: they get only what any program needs, and nothing
            // of ours.
            command.env_clear().envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        }
        command.envs(self.env.iter().map(|(n, v)| (n, v)));
        let input = if self.input.is_empty() { Stdio::null() } else { Stdio::piped() };
        command.stdin(input).stdout(out).stderr(err).process_group(0);
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).env("HOME", "/").current_dir("/");
        }
        Ok(command)
    }

    fn spawn_error(&self) -> impl FnOnce(std::io::Error) -> Error {
        Error::io(format!("start {} ({})", self.name, self.program.display()))
    }

    /// Runs the program to its end (`initdb`, Maven). An exit code other than zero is an error with the end of its
    /// output.
    pub async fn run(&self) -> Result<()> {
        let process = Process::start(self.clone())?;
        let status = process.wait().await;
        if status.is_some_and(|s| s.success()) {
            return Ok(());
        }
        Err(Error::Failed { name: self.name.clone(), status: text(status), log: self.log.clone() })
    }
}

/// The way in which a process ended, for people.
fn text(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "it was ended".to_owned(), |s| s.to_string())
}

/// A process that was started here, and can be started again. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    /// The program: the spec's at first, another build's while a test upgrades it.
    program: Mutex<PathBuf>,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Starts the process, without a check of its health.
    pub fn start(spec: Spec) -> Result<Self> {
        let process = Self { program: Mutex::new(spec.program.clone()), spec, child: Mutex::new(None) };
        process.start_again()?;
        Ok(process)
    }

    /// Starts the process again after it ended; does nothing while it runs.
    pub fn start_again(&self) -> Result<()> {
        self.start_again_with(&[])
    }

    /// Makes it another program from the next start on: another build of the same.
    pub fn replace_program(&self, program: PathBuf) {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = program;
    }

    /// Starts the process again with these variables in addition, for this one life: an armed fail point, for example.
    pub fn start_again_with(&self, env: &[(&str, &str)]) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut command = Spec { program, ..self.spec.clone() }.command()?;
        let mut child = command.envs(env.iter().copied()).spawn().map_err(self.spec.spawn_error())?;
        guard::watch(child.id(), self.spec.orphan.as_str().trim_start_matches("SIG"));
        if let Some(mut input) = child.stdin.take() {
            // A program that ended without reading has the reason in its log.
            let _ = input.write_all(self.spec.input.as_bytes());
        }
        *self.child() = Some(child);
        Ok(())
    }

    /// The process's name, for people.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The process id, which is its process group's too; `None` after it ended.
    pub fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    /// The log that its output goes to.
    pub fn log(&self) -> &Path {
        &self.spec.log
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the process runs (or is paused).
    pub fn is_running(&self) -> bool {
        self.try_wait().is_none()
    }

    /// `None` while the process runs; then its exit status, or `Some(None)` when an earlier call took that.
    fn try_wait(&self) -> Option<Option<ExitStatus>> {
        let mut child = self.child();
        let Some(running) = child.as_mut() else { return Some(None) };
        let status = running.try_wait().ok().flatten()?;
        guard::forget(running.id());
        *child = None;
        Some(Some(status))
    }

    /// Waits until the process has ended.
    pub async fn wait(&self) -> Option<ExitStatus> {
        loop {
            match self.try_wait() {
                Some(status) => return status,
                None => tokio::time::sleep(POLL_EVERY).await,
            }
        }
    }

    /// Sends a signal to its process group; does nothing when it has ended.
    pub fn signal(&self, signal: Signal) {
        // The signal is sent under the lock and only while the process was not reaped: the number cannot be another's.
        if let Some(running) = self.child().as_ref() {
            let group = i32::try_from(running.id()).expect("the kernel's process ids fit in an i32");
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Sends SIGKILL, and waits until the process is gone.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
        let mut child = self.child();
        if let Some(mut running) = child.take() {
            let _ = running.wait();
            guard::forget(running.id());
        }
    }

    /// Sends SIGSTOP: the process keeps its connections and does nothing.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT: the process goes on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Asks the process to stop, and waits until it has. `true` when it did so by itself.
    pub async fn stop(&self) -> bool {
        self.ask_to_stop();
        self.stopped().await
    }

    /// Asks the process to stop. To be asked twice means "at once" to many programs.
    pub fn ask_to_stop(&self) {
        self.signal(self.spec.stop);
        self.resume();
    }

    /// Waits, within [`STOP_BOUND`], until the process stopped after it was asked to; then kills it.
    pub async fn stopped(&self) -> bool {
        let gentle = tokio::time::timeout(STOP_BOUND, self.wait()).await.is_ok();
        if !gentle {
            self.kill();
        }
        gentle
    }

    /// Waits until `probe` succeeds; an error when the process ends before, or the bound is over.
    pub async fn healthy<F>(&self, bound: Duration, mut probe: impl FnMut() -> F) -> Result<()>
    where
        F: Future<Output = Result<(), String>>,
    {
        let start = Instant::now();
        loop {
            if let Some(status) = self.try_wait() {
                let (name, log) = (self.spec.name.clone(), self.spec.log.clone());
                return Err(Error::Exited { name, status: text(status), log });
            }
            let Err(last) = probe().await else { return Ok(()) };
            if start.elapsed() > bound {
                let (name, log) = (self.spec.name.clone(), self.spec.log.clone());
                return Err(Error::Unhealthy { name, seconds: bound.as_secs(), last, log });
            }
            tokio::time::sleep(POLL_EVERY * 3).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.spec.orphan == Signal::SIGQUIT {
            // For PostgreSQL, an immediate shutdown frees its shared memory, which SIGKILL would leave behind.
            self.signal(Signal::SIGQUIT);
            self.resume();
            let start = Instant::now();
            while self.is_running() && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(POLL_EVERY);
            }
        }
        self.kill();
    }
}
