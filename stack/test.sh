#!/bin/sh
# `cargo test` with these arguments, and under its many results one line with the sum of all: cargo itself ends with the
# last crate's alone. Exit code: cargo's.
set -u
code=$(mktemp)
trap 'rm -f "$code"' EXIT
{
  cargo test --no-fail-fast "$@"
  echo $? > "$code"
} | awk '
  { print; fflush() }
  /^test result:/ { passed += $4; failed += $6; ignored += $8 }
  END { printf "\n%d passed, %d failed, %d skipped\n", passed, failed, ignored }
'
exit "$(cat "$code")"
