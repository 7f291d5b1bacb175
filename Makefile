# Building, trying and testing the plugin. `make help` lists what there is.

PLUGINS := target/plugins
PYTHON  := target/venv/bin/python
CORE    := loading transfer self notify release memory hostile options peers rails threads
E2E     := $(PYTHON) -m pytest -p no:cacheprovider
NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
# Options for the end-to-end tests, such as ARGS="--plugin stock -k notify".
ARGS    ?=

.PHONY: help setup plugin install-plugins demo test check unit e2e e2e-core e2e-versions bench docs

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

demo: setup plugin ## two NIXL agents move bytes through the plugin, every byte checked
	@$(PYTHON) plugin-tests/demo.py

test: check unit e2e-core e2e-versions ## what CI runs: needs no GPU and no NIC

check: ## formatting, lints, dependencies
	cargo fmt --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "check: no cargo-deny here, licences not checked"; fi

unit: setup ## the Rust tests
	$(if $(NEXTEST),cargo nextest run --workspace,cargo test --workspace)

e2e: setup plugin ## real NIXL agents on this machine: ARGS="--plugin <ours, stock or ucx> --libfabric 2.5.1,system -k ..."
	$(E2E) plugin-tests/e2e $(ARGS)

e2e-core: setup plugin ## the end-to-end tests without the long ones: fleets of mixed kinds, software EFA devices
	$(E2E) -q $(addprefix plugin-tests/e2e/test_,$(addsuffix .py,$(CORE)))

e2e-versions: setup plugin ## the heart of them again on Debian's libfabric
	$(E2E) --libfabric system -q plugin-tests/e2e/test_transfer.py plugin-tests/e2e/test_peers.py

bench: setup plugin ## ours beside the stock plugin and UCX: Markdown and JSON under target/bench
	$(PYTHON) benches/compare.py $(ARGS)

docs: ## the API's documentation, with warnings as errors
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
