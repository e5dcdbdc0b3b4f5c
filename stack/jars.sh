#!/bin/sh
# Lists the SHA-256 of every jar anew, after a version in a pom was changed: `make jars`. Read the difference before you commit it.
# Maven fetches all of them again, into a place of their own, with its own checksums strict.
set -eu
cd "$(dirname "$0")"

# What `postgres.rs` names: each has a PostgreSQL of this version on Maven Central.
platforms="darwin-amd64 darwin-arm64v8 linux-amd64 linux-amd64-alpine linux-arm64v8"

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

if command -v sha256sum >/dev/null 2>&1; then digest=sha256sum; else digest="shasum -a 256"; fi

fetch() { # pom, more of Maven's arguments
  pom=$1
  shift
  echo "fetching what $pom names ($*)" >&2
  mvn --batch-mode --quiet --strict-checksums "-Dmaven.repo.local=$place/jars" -f "$pom" "$@" \
    org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath -DincludeScope=runtime \
    "-Dmdep.outputFile=$place/classpath" >&2
  tr ':' '\n' < "$place/classpath" >> "$place/files"
  echo >> "$place/files"
}

list() { # where to
  sed '/^$/d' "$place/files" | while read -r jar; do
    (cd "$(dirname "$jar")" && $digest "$(basename "$jar")")
  done | LC_ALL=C sort -k 2 | uniq > "$place/list"
  mv "$place/list" "$1"
  rm "$place/files"
}

fetch kafka/pom.xml
list kafka/jars.sha256
for platform in $platforms; do
  fetch postgres/pom.xml "-Dpostgres.platform=$platform"
done
list postgres/jars.sha256
