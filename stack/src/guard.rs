//! Ends the processes that this process started when it dies, however it dies: panic, Ctrl-C, SIGKILL, a test binary
//! that exits with a stack in a static.
//!
//! ```text
//!   us ──pipe──> guard (a shell, in a process group of its own)
//!                  "+ PID SIGNAL"  watch this process group
//!                  "- PID"         it is gone
//!                  "d PATH"        remove this directory at the end
//! ```
//!
//! The pipe ends when this process ends: the kernel closes it. The guard then signals what is left, waits within a
//! bound, kills, and removes the temporary directories. A shell does it because it needs no binary of ours to be found,
//! and works on every Unix. `PR_SET_PDEATHSIG` would not do: it fires when the *thread* that started a process ends,
//! not the process. When the guard dies first, nothing is lost as long as this process ends in an orderly way itself.

use std::{
    fs::File,
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
};

/// The guard's program. It ignores the signals of a terminal: it has to outlive this process.
const SCRIPT: &str = r#"
trap '' INT TERM HUP QUIT
procs=
dirs=
while read -r op arg rest; do
  case $op in
    +) procs="$procs $arg:$rest" ;;
    -) kept=
       for p in $procs; do [ "${p%%:*}" = "$arg" ] || kept="$kept $p"; done
       procs=$kept ;;
    d) dirs="$dirs$arg
" ;;
  esac
done
for p in $procs; do
  kill -s "${p##*:}" -- "-${p%%:*}"
  kill -s CONT -- "-${p%%:*}"
done
for p in $procs; do
  n=0
  while kill -s 0 -- "-${p%%:*}" && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
  kill -s KILL -- "-${p%%:*}"
done
printf %s "$dirs" | while read -r d; do rm -rf -- "$d"; done
"#;

static GUARD: OnceLock<Mutex<Option<ChildStdin>>> = OnceLock::new();

/// Lets the guard hold a lock as long as it has work to do. The next holder of the lock knows that nothing of ours runs
/// any more, even if this process was killed. The call has an effect only before the first process is watched.
pub fn hold(lock: File) {
    GUARD.get_or_init(|| Mutex::new(start(lock.into())));
}

/// Watches the process group `pid`, which gets `signal` (a name such as `TERM`) when this process is gone.
pub fn watch(pid: u32, signal: &str) {
    tell(&format!("+ {pid} {signal}\n"));
}

/// Stops watching a process group that has ended: its number may soon be another's.
pub fn forget(pid: u32) {
    tell(&format!("- {pid}\n"));
}

/// Removes the directory when this process is gone.
pub fn remove_at_end(directory: &Path) {
    let path = directory.to_string_lossy();
    // The guard reads words and lines. Temporary directories have no white space in their names unless TMPDIR has.
    if !path.contains(char::is_whitespace) {
        tell(&format!("d {path}\n"));
    }
}

fn tell(line: &str) {
    let guard = GUARD.get_or_init(|| Mutex::new(start(Stdio::null())));
    if let Some(pipe) = guard.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        // A guard that is gone reads nothing; the orderly ways of ending do not need it.
        let _ = pipe.write_all(line.as_bytes());
    }
}

/// Starts the guard. The lock is its standard output, to which it never writes: a file handle that needs no unsafe code
/// to hand over.
fn start(held: Stdio) -> Option<ChildStdin> {
    Command::new("/bin/sh")
        .args(["-c", SCRIPT, "stack-guard"])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(held)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .ok()?
        .stdin
}
