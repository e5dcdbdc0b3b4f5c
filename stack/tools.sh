#!/bin/sh
# Are the programs here that building and running need? On Debian as root, installs what is missing; elsewhere says
# what to install. `sh stack/tools.sh build` looks for what compiles, `... servers` for what fetches and runs PostgreSQL
# and Kafka, `... servers-unless-named` for the same where DATABASE_URL and KAFKA_BROKERS do not name both, `... python3` for
# scripts, `... python` for what fetches and runs schemathesis.
set -eu

debian() { [ -e /etc/debian_version ] && command -v apt-get >/dev/null 2>&1; }
missing=
packages=
note=
need() { # what, its Debian package
  missing="$missing $1"
  packages="$packages $2"
}

# The first number of `openjdk version "17.0.15"`; nothing when there is no java.
java_version() {
  "${JAVA_HOME:+$JAVA_HOME/bin/}java" -version 2>&1 | sed -n 's/[^"]*"\([0-9][0-9]*\).*/\1/p' | head -n 1
}

named() { [ -n "${DATABASE_URL:-}" ] && [ -n "${KAFKA_BROKERS:-}" ]; }

servers() {
  version=$(java_version || true)
  [ "${version:-0}" -ge 17 ] || need "java (17 or later)" default-jre-headless
  command -v mvn >/dev/null 2>&1 || need mvn maven
}

for kind in "$@"; do
  case $kind in
    build)
      command -v cc >/dev/null 2>&1 || need cc build-essential
      command -v make >/dev/null 2>&1 || need make build-essential
      if ! command -v cargo >/dev/null 2>&1; then
        echo "error: cargo is not installed. Install Rust: https://rustup.rs (rust-toolchain.toml pins the version)" >&2
        exit 1
      fi ;;
    servers)
      servers
      if named; then
        note="DATABASE_URL and KAFKA_BROKERS are set, but this starts servers of its own all the same"
      fi ;;
    servers-unless-named)
      named || servers ;;
    python3)
      command -v python3 >/dev/null 2>&1 || need python3 python3 ;;
    python)
      # Debian has Python's own venv in a package apart.
      python3 -c 'import ensurepip, venv' 2>/dev/null || need "python3 (with venv)" python3-venv ;;
    *) echo "usage: $0 build|servers|servers-unless-named|python3|python ..." >&2; exit 2 ;;
  esac
done

[ -n "$missing" ] || exit 0
missing=$missing${note:+" ($note)"}
if debian && [ "$(id -u)" = 0 ]; then
  echo "Not installed:$missing. Installing:$packages" >&2
  # shellcheck disable=SC2086 # a list of words
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q $packages; } >&2
  exit 0
fi
echo "error: not installed:$missing" >&2
if debian; then
  echo "  Install: sudo apt-get update && sudo apt-get install -y$packages" >&2
elif [ "$(uname)" = Darwin ]; then
  echo "  Install: brew install openjdk maven python; xcode-select --install" >&2
else
  echo "  Install with your system's packages: a C compiler, make, a JVM (17 or later), Maven, Python 3 with venv" >&2
fi
exit 1
