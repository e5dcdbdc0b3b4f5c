#!/bin/sh
# `cargo test` with these arguments, and under its many results what they come to: the sum of all (cargo itself ends
# with the last crate's alone), how long it took, and what took longest. Exit code: cargo's.
set -u

# What `make test` is meant to stay under, on 2 cores. Said, not enforced: how busy a machine is, is not the suite's doing.
# `make soak` promises nothing.
promised_minutes=20
[ -z "${SOAK:-}" ] || promised_minutes=1000000

# More tests at a time than a few cores: most of their time they wait, for servers, leases and sessions to run out.
if [ -z "${RUST_TEST_THREADS:-}" ] && [ "$(getconf _NPROCESSORS_ONLN)" -lt 4 ]; then
  export RUST_TEST_THREADS=6
fi

code=$(mktemp) said=$(mktemp)
trap 'rm -f "$code" "$said"' EXIT
began=$(date +%s)
# Both of cargo's streams in one pipe, which keeps their order: a binary's name is in the one, its result in the other. And
# read when all is said: some awks keep what they read from a pipe for a while, and progress is to be seen.
{
  cargo test --no-fail-fast "$@" 2>&1
  echo $? > "$code"
} | tee "$said"
awk -v began="$began" -v promised="$promised_minutes" '
  { gsub(/\033\[[0-9;]*m/, "") } # of CARGO_TERM_COLOR=always
  # `Running unittests src/lib.rs (target/debug/deps/saga_core-0123456789abcdef)`: each package begins with one of these,
  # and only there cargo tells the name of the package.
  /^ *Running unittests .*\)$/ { package = $NF; sub(/.*\//, "", package); sub(/-[0-9a-f]*\)$/, "", package) }
  /^ *Running .*\)$/ { binary = $(NF - 1); if (package != "") binary = package ": " binary }
  /^ *Doc-tests / { binary = $2 ": its documentation" }
  /^test result:/ {
    passed += $4; failed += $6; ignored += $8
    took = $NF; sub(/s$/, "", took)
    took_by[binary] += took
  }

  function duration(seconds) {
    return seconds < 60 ? seconds " s" : int(seconds / 60) " min " seconds % 60 " s"
  }
  END {
    "date +%s" | getline ended
    took = ended - began
    printf "\n%d passed, %d failed, %d skipped, in %s\n", passed, failed, ignored, duration(took)
    for (place = 1; place <= 5; place++) {
      longest = ""
      for (binary in took_by) if (longest == "" || took_by[binary] > took_by[longest]) longest = binary
      if (longest == "") break
      if (place == 1) print "What took longest:"
      printf "%8.1f s  %s\n", took_by[longest], longest
      delete took_by[longest]
    }
    over = took - promised * 60
    if (over > 0) printf "That is %s over the %d min that the suite is meant to take on 2 cores.\n", duration(over), promised
  }
' "$said"
exit "$(cat "$code")"
