# Everything happens in .venv; uv is bootstrapped into it by pip where it is absent.
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.PHONY: setup demo test test-slow prove-image check bench format timm-names lock clean distclean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.lock
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

# A process a core, at most four: the tests run with one torch thread each. Files stay whole, for their fixtures, and
# in their order: by number of tests the longest would come last, and alone.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Both halves, and a failure of either is one of the whole.
test-slow: setup
	failed=0; for mark in slow gpu; do $(BIN)/python -m pytest -m $$mark --timeout 3000 || failed=1; done; exit $$failed

# Ratios measured in one run; without --quick each script takes some minutes.
bench: setup
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script" --quick || exit 1; done

# As root on Debian with buildah, crun, debootstrap and curl: build the image without Docker, and run it.
prove-image: setup
	$(BIN)/python docker/prove.py serve $(BUNDLE) $(PNG)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After a new timm: the list of names that typos are held against.
timm-names: setup
	$(BIN)/python -m jepakit._timm_names

# Versions and hashes of everything, for every platform; no index is named.
lock:
	$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf demo-out

distclean: clean
	rm -rf $(VENV)
