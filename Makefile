# The few commands people type. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help book picture demo up down reset logs status test test-pg15 edges soak upgrade check bench tools-build tools-servers tools-servers-unless-named tools-python jars binaries fmt clippy doc arch deny

# Where cargo puts what it builds.
TARGET := $(or $(CARGO_TARGET_DIR),target)
STACK  := $(TARGET)/debug/stack

# Pinned: another version may judge differently.
DENY_VERSION := 0.20.2
MDBOOK_VERSION := 0.5.4
MDBOOK := $(TARGET)/tools/bin/mdbook

help: ## This list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | awk -F: '{ printf "  make %-10s%s\n", $$1, $$2 }'

demo: tools-servers binaries ## Starts everything, drives orders through every outcome, shows what happened, stops
	@$(STACK) demo

up: tools-servers-unless-named binaries ## Starts everything and leaves it running; Ctrl-C or `make down` ends it, data is kept
	@$(STACK) up

down: binaries ## Ends what `make up` started
	@$(STACK) down

reset: binaries ## Ends it and wipes its data
	@$(STACK) reset

logs: binaries ## Follows the logs
	@$(STACK) logs --follow

status: binaries ## What runs, and whether it is healthy
	@$(STACK) status

# The programs before the tests that start them as processes, and in one go with the tests: asked for alone, cargo would
# build them a second time, for other features. Cargo runs one test binary after another, which suits two cores: side by
# side they would make every deadline a guess. Inside each, tests run in parallel.
#
# What DATABASE_URL and KAFKA_BROKERS name is used, and not alone: tests that kill servers start their own.
test: tools-build tools-servers tools-python ## The whole suite against a PostgreSQL and a Kafka of its own (or DATABASE_URL, KAFKA_BROKERS)
	cargo build --workspace --bins --tests
	$(STACK) run -- sh stack/test.sh --workspace

# The code supports PostgreSQL 15 and later. Where the system has a 15, the suite runs on it too.
PG15 := /usr/lib/postgresql/15
test-pg15: tools-build tools-servers tools-python ## The whole suite on the system's own PostgreSQL 15, where there is one
	@test -x $(PG15)/bin/postgres || { echo "error: no PostgreSQL 15 in $(PG15) (PG15=... says where)" >&2; exit 1; }
	cargo build --workspace --bins --tests
	STACK_POSTGRES=$(PG15) $(STACK) run -- sh stack/test.sh --workspace

# The tests of e2e/edges.txt: what lies outside the model that the explorer walks (slow, half dead, another build, another
# clock, one bad item among many), with small sizes.
EDGES = $$(sed -n 's/^[0-9][0-9]* //p' e2e/edges.txt)
edges: tools-build tools-servers tools-python ## Only the tests of the edges: slow servers, partial rights, clocks, bad neighbours
	cargo build --workspace --bins --tests
	$(STACK) run -- sh stack/test.sh --workspace -- $(EDGES)

# One test at a time: some measure what one thing costs another. The largest needs 30 GB of disk.
soak: tools-build tools-servers tools-python ## The same with the sizes that faults were reported with, and the explorer's larger worlds; long
	cargo build --workspace --bins --tests
	SOAK=1 RUST_TEST_THREADS=1 $(STACK) run -- sh stack/test.sh --workspace -- $(EDGES)
	EXPLORE=full cargo test --release --workspace --test explorer

upgrade: tools-build tools-servers ## The last release's programs and today's together under load, upgraded and rolled back
	sh e2e/upgrade.sh

check: fmt clippy doc arch deny book ## fmt, clippy, rustdoc (warnings denied), the architecture test, cargo-deny, the book

book: tools-build ## The documents as a book, links checked: target/book/html/index.html
	@sh stack/tools.sh python3
	@$(MDBOOK) --version 2>/dev/null | grep -qx 'mdbook v$(MDBOOK_VERSION)' || \
	  cargo install mdbook --version $(MDBOOK_VERSION) --locked --no-default-features --features search --root $(TARGET)/tools
	MDBOOK=$(MDBOOK) sh docs/book.sh $(TARGET)/book
	python3 docs/links.py $(TARGET)/book/html

# `make bench ARGS='sagas --in-flight 256'`: one figure, with other settings; ARGS=--help tells which there are. Only this
# package: with the others beside it, their test features would be in what is measured. All processes, the servers and the
# yardsticks too, are scheduled in batches where that can be asked for (Linux): who wakes up does not interrupt who works,
# which on processors that everything shares is a seventh of a saga's cost. BATCH= runs them as usual.
BATCH := $(shell command -v chrt >/dev/null 2>&1 && echo chrt --batch 0)
# The relay's yardstick is a tool of Kafka's, so only the other figure can do without a JVM, on servers that are named.
bench: tools-servers$(if $(filter sagas,$(ARGS)),-unless-named) ## The figures, each beside its yardstick of the same run
	cargo build --release -p bench
	$(BATCH) $(TARGET)/release/bench $(ARGS)

binaries: tools-build
	@cargo build --workspace --bins

tools-build:
	@sh stack/tools.sh build

# For what starts servers of its own, whatever is named.
tools-servers:
	@sh stack/tools.sh servers

tools-servers-unless-named:
	@sh stack/tools.sh servers-unless-named

# After a version in a pom of `stack` was changed.
jars: tools-servers
	sh stack/jars.sh

# For schemathesis, which a test fetches into a place of its own.
tools-python:
	@sh stack/tools.sh python

fmt: tools-build
	cargo fmt --all --check

clippy: tools-build
	cargo clippy --workspace --all-targets -- -D warnings

doc: tools-build
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

arch: tools-build
	cargo test --workspace --test architecture

picture: tools-build ## Draws the modules of each crate again: docs/modules/*.svg
	DRAW=1 cargo test --workspace --test architecture pictures

# Licences, bans and sources need nothing but the lock file. Advisories need their database, which is a repository on
# the net: where it cannot be reached, that is said, and the rest still counts.
deny: tools-build
	@cargo deny --version 2>/dev/null | grep -qx 'cargo-deny $(DENY_VERSION)' || \
	  cargo install cargo-deny --version $(DENY_VERSION) --locked
	cargo deny check bans licenses sources
	@if cargo deny fetch db >/dev/null 2>&1; then \
	  echo "cargo deny check advisories"; cargo deny check advisories; \
	else \
	  echo "cargo deny: NOT checked for advisories: their database cannot be reached from here"; \
	fi
