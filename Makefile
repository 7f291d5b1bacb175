# Building, trying and testing the plugin. `make help` lists what there is.

PLUGINS := target/plugins
PYTHON  := target/venv/bin/python
CORE    := loading transfer self same_host notify release memory hostile options peers rails threads metrics staging
E2E     := $(PYTHON) -m pytest -p no:cacheprovider
NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
# Options for the end-to-end tests, such as ARGS="--plugin stock -k notify".
ARGS    ?=
# What runs on EFA devices, and what of it `make test` leaves to `make e2e-efa-all`: what takes long.
EFA_TESTS := $(patsubst %,plugin-tests/e2e/test_%.py,efa transfer notify release self threads peers memory options staging)
EFA_LONG  := seventy or in_each_phase or failed_operation or test_sizes or both_directions or small_descriptors \
             or (progress-off and (unequal_hosts or random_lists or repost or in_flight or first_operation))

.PHONY: help setup plugin softefa install-plugins wheel test-wheel demo test check unit e2e e2e-core e2e-versions e2e-efa e2e-efa-all soak test-vllm vllm-gpu-bundle bench bench-first bench-same-host bench-slow cost docs test-arm64 test-docs

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: ## what tests, demo and benches need: Debian packages (as root or by sudo), the rest under target/
	@sh plugin-tests/setup/system.sh
	@python3 plugin-tests/setup/install.py

plugin: ## build the plugin into target/plugins, under both of its names
	cargo build --release
	@mkdir -p $(PLUGINS)
	@for name in LIBFABRIC Libfabric; do \
	    cp target/release/libnixl_libfabric.so $(PLUGINS)/.new && mv $(PLUGINS)/.new $(PLUGINS)/libplugin_$$name.so; done
	@echo "plugin: export NIXL_PLUGIN_DIR=$(CURDIR)/$(PLUGINS)"

install-plugins: plugin ## NIXL=<site-packages> [DEST=<folder>]: ours beside the other plugins of that NIXL
	@sh plugin-tests/setup/install_plugins.sh "$(NIXL)" "$(DEST)"

wheel: ## target/wheel/dist: the Python package with plugin and program, for glibc 2.28 and newer; 400 MB of tools in target/wheel
	@python3 python/build.py

test-wheel: setup wheel ## the wheel beside NIXL's in environments as users have them; two minutes after the build
	$(E2E) -q python/tests $(ARGS)

demo: setup plugin ## two NIXL agents move bytes through the plugin, every byte checked
	@$(PYTHON) plugin-tests/demo.py

test: check test-docs unit e2e-core e2e-versions e2e-efa ## what CI runs: needs no GPU and no NIC

check: ## formatting, lints, dependencies; whether the simulator's mutants still apply
	cargo fmt --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	@python3 plugin-tests/sim/mutants/run.py --check
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "check: no cargo-deny here, licences not checked"; fi

test-docs: setup plugin ## links, commands and names in the Markdown files; their blocks are run
	$(E2E) -q plugin-tests/docs

unit: setup ## the Rust tests
	NIXL_WHEEL_DIR=$(CURDIR)/target/nixl $(if $(NEXTEST),cargo nextest run --workspace,cargo test --workspace)

e2e: setup plugin softefa ## real NIXL agents on this machine: ARGS="--plugin <ours, stock or ucx> --libfabric 2.5.1,system -k ..."
	$(E2E) plugin-tests/e2e $(ARGS)

e2e-core: setup plugin ## the end-to-end tests without the long ones: fleets of mixed kinds, software EFA devices
	$(E2E) -q $(addprefix plugin-tests/e2e/test_,$(addsuffix .py,$(CORE)))

e2e-versions: setup plugin ## the heart of them again on Debian's libfabric, and between agents that reach each other without a network
	$(E2E) --libfabric=system -q plugin-tests/e2e/test_transfer.py plugin-tests/e2e/test_peers.py
	$(E2E) --same-host -q -k "random_lists or release_in_flight or turns_notified or four_threads" $(patsubst %,plugin-tests/e2e/test_%.py,transfer release threads)

softefa: ## build the software EFA device, see plugin-tests/softefa/README.md
	cargo build --release -p softefa

# With libfabric's own shared memory left on, as it is where nobody turned it off; `make e2e-efa-all` runs without.
e2e-efa: setup plugin softefa ## the heart of the end-to-end tests on software EFA devices, both fabrics of the provider
	$(E2E) -q --network=efa --shm -k "not ($(EFA_LONG))" plugin-tests/e2e/test_efa.py plugin-tests/e2e/test_transfer.py
	$(E2E) -q --network=efa -k "both_ways or killed_peer and -met-READ" plugin-tests/e2e/test_staging.py
	$(E2E) -q plugin-tests/e2e/test_doctor.py
	$(E2E) -q --network=efa-direct -k "(done_means or silent or random_lists) and progress-on" plugin-tests/e2e/test_efa.py plugin-tests/e2e/test_transfer.py
	$(E2E) -q --network=efa --topology=p4d.24xlarge -k "become or (done_means or memory_is_only or device_that) and progress-on" plugin-tests/e2e/test_efa.py

e2e-efa-all: setup plugin softefa ## all of them: 4 and 32 devices, both fabrics, two libfabrics; about an hour
	$(E2E) -q --network=efa --libfabric=2.5.1,2.4.0 $(EFA_TESTS) $(ARGS)
	$(E2E) -q --network=efa --devices=32 $(EFA_TESTS) $(ARGS)
	$(E2E) -q --network=efa-direct $(EFA_TESTS) $(ARGS)
	$(E2E) -q --network=efa --topology=p4d.24xlarge plugin-tests/e2e/test_efa.py $(ARGS)
	$(E2E) -q --network=efa -k "does_not_look or devices_write" plugin-tests/e2e/test_interop.py $(ARGS)

test-arm64: setup ## build for arm64, and run it in an emulator with NIXL's arm64 wheels
	@sh plugin-tests/setup/system.sh debian-arm64
	$(PYTHON) plugin-tests/arm64/run.py $(ARGS)

soak: setup plugin softefa ## random work on software EFA devices until it is stopped: ARGS="--seed 7 --rounds 1 --minutes 60"
	$(PYTHON) plugin-tests/soak.py $(ARGS)

test-vllm: setup plugin softefa ## vLLM on CPUs, prefill and decode in two engines: 7 GB outside the build tree; ARGS="pull kill unit"
	python3 plugin-tests/vllm/setup.py
	$(PYTHON) plugin-tests/vllm/run.py $(ARGS)

vllm-gpu-bundle: setup plugin ## vLLM, NIXL and ours for a machine with a GPU: MACHINE=<output of gpu/probe.py> DEST=<folder>
	$(PYTHON) plugin-tests/vllm/gpu/pack.py "$(MACHINE)" "$(DEST)" $(ARGS)

bench: setup plugin softefa ## ours beside the stock plugin and UCX: ARGS="--network efa:4"; Markdown, JSON and SVG in target/bench
	$(PYTHON) benches/compare.py $(ARGS)

bench-first: setup plugin softefa ## the first transfer to a peer with 32 software EFA devices, ours and stock: ARGS="--rounds 3"
	$(PYTHON) benches/first.py $(ARGS)

bench-slow: setup plugin softefa ## one slow device among four software EFA devices, ours and stock: ARGS="--rounds 1"
	$(PYTHON) benches/slow.py $(ARGS)

bench-same-host: setup plugin ## host memory of two processes of one host, beside a bare copy, tcp, stock and UCX: ARGS="--rounds 3"
	$(PYTHON) benches/same_host.py $(ARGS)

cost: setup plugin softefa ## instructions per descriptor by callgrind, ours and stock: ARGS="--networks tcp:1 --descriptors 4096"
	$(PYTHON) benches/cost.py $(ARGS)

docs: ## the API's documentation, with warnings as errors
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
