#!/bin/sh
# Builds the last release's programs beside today's and runs both together: `make upgrade`.
# UPGRADE_FROM names another commit; UPGRADE_FROM_BIN programs that are built already.
set -eu
from=${UPGRADE_FROM:-f3dd775adf72e2f32b387658f5c2c8b05720facd}
target=${CARGO_TARGET_DIR:-target}
if [ -z "${UPGRADE_FROM_BIN:-}" ]; then
  git rev-parse --verify --quiet "$from^{commit}" >/dev/null || {
    echo "error: commit $from is not in this clone; fetch it (a shallow clone lacks it): git fetch --unshallow" >&2
    exit 1
  }
  rm -rf "$target/upgrade/source"
  mkdir -p "$target/upgrade/source"
  git archive "$from" | tar -x -C "$target/upgrade/source"
  echo "building the programs of $from ..."
  cargo build --workspace --bins --manifest-path "$target/upgrade/source/Cargo.toml" --target-dir "$target/upgrade/target"
  UPGRADE_FROM_BIN=$(cd "$target/upgrade/target/debug" && pwd)
  export UPGRADE_FROM_BIN
fi
cargo build --workspace --bins --tests
cargo test --workspace --test upgrade -- --ignored --nocapture
