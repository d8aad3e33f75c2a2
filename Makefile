# Two commands from nothing: `make demo` and `make test`. They need Python 3.11 with venv and pip, and make.
PY         ?= $(shell command -v python3.11 || command -v python3)
VENV       ?= .venv
BIN        := $(VENV)/bin
UV_VERSION := 0.13.9
EXTRAS     := train,live,serve

# What the tests need from the system: real VMs, the guest image's compiler, a real browser, receivers of alarms.
SYSTEM := qemu-system-x86 qemu-system-arm qemu-utils busybox-static cpio e2fsprogs gcc libc6-dev \
          gcc-aarch64-linux-gnu libc6-dev-arm64-cross chromium zstd curl openssl strace iproute2 \
          debootstrap rsyslog prometheus-alertmanager \
          libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients python3-libvirt

# uv reads neither pip.conf nor PIP_FIND_LINKS: a wheel folder that pip knows is passed on. Where it holds torch, that
# CPU wheel is taken; elsewhere PyTorch's own CPU index, because the default build drags in gigabytes of CUDA.
LINKS      := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PY) -m pip config get global.find-links 2>/dev/null))
HAVE_TORCH := $(firstword $(foreach d,$(LINKS),$(wildcard $(d)/torch-2.13.0*)))
TORCH_FROM := $(if $(HAVE_TORCH),$(addprefix --find-links ,$(LINKS)),--torch-backend cpu)
UV         := $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt $(TORCH_FROM)

# Measured: without it idle OpenMP threads spin and a busy machine trains three times slower.
export OMP_WAIT_POLICY = PASSIVE

.DELETE_ON_ERROR:
.PHONY: bench-features site demo test soak lint setup system picture headline results results-v2 real-ransomware bench docs datasheet recordings edge footprint lock clean

demo: $(VENV)/.run
	@$(BIN)/phasewatch demo

# Stolen, not dealt: a file's tests stay on one worker, and what they share is made once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not vm and not soak"
	$(BIN)/python -m pytest -m "vm and not soak"

# The large counts, run by hand; their rows take the place of the last ones in docs/soak.md.
soak: setup
	$(BIN)/python -m pytest -m soak --soak-rows soak-rows.jsonl
	$(BIN)/python -m tools.soak soak-rows.jsonl
	$(BIN)/python bench/run.py --render
	@rm soak-rows.jsonl

lint: setup
	$(BIN)/ruff check src tests tools bench
	$(BIN)/ruff format --check src tests tools bench
	$(BIN)/mypy

setup: $(VENV)/.dev system

$(BIN)/uv:
	@echo "setting up $(VENV): about 400 MB of packages the first time, two to five minutes; then nothing of it again" >&2
	@$(PY) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "installing phasewatch and what it needs to train, watch and serve" >&2
	@$(UV) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(UV) --compile-bytecode -e '.[$(EXTRAS)]' --group dev
	@touch $@

# Installed only where that is possible (root, apt); otherwise the tests that need them are skipped and say so.
system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  if ! dpkg -s $(SYSTEM) >/dev/null 2>&1 || ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM) >/dev/null; \
	  fi; \
	else \
	  dpkg -s $(SYSTEM) >/dev/null 2>&1 || echo "some tests will be skipped; as root: apt-get install $(SYSTEM)" >&2; \
	fi

lock: | $(BIN)/uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate $(addprefix --find-links ,$(LINKS)) \
	  --extra train --extra live --extra serve --extra ray --extra libvirt --group dev pyproject.toml \
	  | sed -E '/^torch==/d;/^(nvidia-|cuda-|triton)/d' > constraints.tmp
	echo 'torch==2.13.0' >> constraints.tmp && LC_ALL=C sort constraints.tmp > constraints.txt && rm constraints.tmp

clean:
	rm -rf $(VENV) runs

# Peers side by side with ours, in an environment of their own; writes docs/performance.md and its pictures, in a quarter
# of an hour on a quiet machine. `make bench BUNDLES=1000,10000,76660` measures the whole corpus too, `PARTS=whole` only that;
# STORES=folder keeps what is simulated for it (14 GB), and takes it up again.
BUNDLES ?= 1000,10000
PARTS   ?=
STORES  ?=

bench: demo bench/.venv/.done
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=src bench/.venv/bin/python bench/run.py --run runs/demo --bundles $(BUNDLES) --only "$(PARTS)" $(if $(STORES),--stores $(STORES))

# Validation, features and tensors alone, the whole corpus of 76,660 bundles too if asked for by BUNDLES.
bench-features:
	$(MAKE) bench PARTS=passes,features,tensors,whole

# confidenceinterval asks for a setuptools that torch refuses, and needs neither.
bench/.venv/.done: bench/requirements.txt | $(BIN)/uv
	$(PY) -m venv bench/.venv
	$(BIN)/uv pip install -q --python bench/.venv/bin/python $(TORCH_FROM) -r bench/requirements.txt
	$(BIN)/uv pip install -q --python bench/.venv/bin/python --no-deps confidenceinterval==1.0.5
	@touch $@

# What the bundled corpus says: every recipe and model, audited; its table and its report without pictures.
results: $(VENV)/.run
	$(BIN)/phasewatch run corpus/lab-v1 --out runs/lab-v1 --grid full
	$(BIN)/phasewatch audit runs/lab-v1
	$(BIN)/phasewatch report runs/lab-v1
	$(BIN)/phasewatch report runs/lab-v1 --format md --out docs/results/lab-v1-report.md
	$(BIN)/python -m tools.results runs/lab-v1 --out docs/results/lab-v1.md --command "make results"

# What lab-v2 says: the detector on every recipe, channel set and input; each new sensor taken away; the other laboratory;
# twins; learning curves. A finished experiment is kept, so an interrupted call goes on where it was. For 350 episodes on 16
# hosts with 32 hours of soak: about 560 fits, an estimated three to six hours on two cores, most of it the soak's windows
# of every second.
LAB2   := runs/lab-v2
SETS2  := extended,libvirt,device,portable
WITHOUT2 := extended-flows,extended-dns,extended-blocks,extended-dirty
MODELS2 := gbt,elapsed_time,load_only,majority
FOLDS2 ?= 8

results-v2: $(VENV)/.run
	$(BIN)/phasewatch run corpus/lab-v2 --out $(LAB2) --models $(MODELS2)
	$(BIN)/phasewatch train $(LAB2) --grid full --models gbt --recipes held_out_time,held_out_profile
	$(BIN)/python -m tools.train_context $(LAB2) held_out_host held_out_both
	$(BIN)/phasewatch train $(LAB2) --models gbt --channels $(SETS2) --recipes held_out_host,held_out_sample,held_out_both,deploy
	$(BIN)/phasewatch train $(LAB2) --models gbt --channels $(WITHOUT2) --recipes held_out_host
	$(BIN)/phasewatch evaluate $(LAB2)
	-$(BIN)/phasewatch audit $(LAB2)
	$(BIN)/phasewatch report $(LAB2)
	for set in realistic portable; do \
	  $(BIN)/phasewatch predict corpus/lab-v2 --model corpus/lab-v1.edge.zip --channels $$set \
	    --out $(LAB2)/v1-v2-$$set.parquet --metrics $(LAB2)/v1-v2-$$set.json && \
	  $(BIN)/phasewatch predict corpus/lab-v1 --model $(LAB2) --channels $$set \
	    --out $(LAB2)/v2-v1-$$set.parquet --metrics $(LAB2)/v2-v1-$$set.json || exit 1; \
	done
	$(BIN)/python -m tools.learning_curve $(LAB2) --folds $(FOLDS2) --out $(LAB2)/curves.json
	$(BIN)/python -m tools.results_v2 $(LAB2) --store corpus/lab-v2 --out docs/results/lab-v2.md --command "make results-v2" \
	  --other "lab-v1 → lab-v2=$(LAB2)/v1-v2-realistic.json" --other "lab-v1 → lab-v2=$(LAB2)/v1-v2-portable.json" \
	  --other "lab-v2 → lab-v1=$(LAB2)/v2-v1-realistic.json" --other "lab-v2 → lab-v1=$(LAB2)/v2-v1-portable.json" \
	  --curves $(LAB2)/curves.json

# What models of both laboratories say of real ransomware that others recorded: REAL=folder of unpacked RanSAP recordings.
# lab-v1 did not count clusters, so both are also compared on bytes alone (`disk-blocks`).
EXTERNAL := runs/real-ransomware

real-ransomware: $(VENV)/.run
	@test -n "$(REAL)" || { echo "name the folder of unpacked RanSAP recordings: make real-ransomware REAL=folder" >&2; exit 2; }
	rm -rf $(EXTERNAL) && mkdir -p $(EXTERNAL)
	$(BIN)/phasewatch import table $(REAL) --map ransap --labels told --out $(EXTERNAL)/imported
	for store in corpus/lab-v1 corpus/lab-v2 $(EXTERNAL)/imported; do \
	  run=$(EXTERNAL)/$$(basename $$store)-run; \
	  $(BIN)/phasewatch validate $$store --out $$run >/dev/null; $(BIN)/phasewatch features $$run || exit 1; \
	done
	for lab in lab-v1 lab-v2; do $(BIN)/phasewatch split $(EXTERNAL)/$$lab-run || exit 1; done
	$(BIN)/phasewatch train $(EXTERNAL)/lab-v1-run --models gbt --recipes deploy --channels disk-blocks
	$(BIN)/phasewatch train $(EXTERNAL)/lab-v2-run --models gbt --recipes deploy --channels disk-blocks,disk
	for which in lab-v1:disk-blocks lab-v2:disk-blocks lab-v2:disk; do \
	  $(BIN)/phasewatch predict $(EXTERNAL)/imported --model $(EXTERNAL)/$${which%:*}-run --channels $${which#*:} \
	    --out $(EXTERNAL)/$${which%:*}-$${which#*:}.parquet || exit 1; \
	done
	$(BIN)/python -m tools.external_validity --own $(EXTERNAL)/imported-run --out docs/results/real-ransomware.md \
	  "lab-v1, bytes read and written=$(EXTERNAL)/lab-v1-disk-blocks.parquet" \
	  "lab-v2, bytes read and written=$(EXTERNAL)/lab-v2-disk-blocks.parquet" \
	  "lab-v2, with clusters and rewritten share=$(EXTERNAL)/lab-v2-disk.parquet"

# The small edge bundle beside the bundled corpus: one model for every machine that a watcher may meet; and its card.
EDGE_MODEL ?= gbt
EDGE_MASKS := realistic,portable,libvirt+netflow,proc+netflow,libvirt,libvirt-user,proc+tap,proc

edge: $(VENV)/.run
	$(BIN)/phasewatch run corpus/lab-v1 --out runs/edge --models $(EDGE_MODEL),elapsed_time,majority
	$(BIN)/phasewatch train runs/edge --models $(EDGE_MODEL) --recipes deploy,held_out_host --channels $(EDGE_MASKS)
	$(BIN)/phasewatch evaluate runs/edge
	$(BIN)/phasewatch export runs/edge --model $(EDGE_MODEL) --channels $(EDGE_MASKS) --out corpus/lab-v1.edge.zip
	$(BIN)/python -m tools.model_card runs/edge

# docs/reference, from the tables and the command line.
docs: setup
	$(BIN)/python -m tools.generate

# The documentation as a site in site/, by mkdocs.yml; open site/index.html.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site
	@echo site/index.html

# The generated half of the bundled corpus's datasheet; what its agent costs is measured on real VMs, eight minutes.
datasheet: setup
	$(BIN)/python -m tools.datasheet

# What the recordings of lab-v2 say; REAL=folder sets unpacked RanSAP recordings beside their disk volumes.
REAL ?=

recordings: setup
	$(BIN)/python -m tools.recompress corpus/lab-v2
	$(BIN)/python -m tools.datasheet corpus/lab-v2
	$(BIN)/python -m tools.recordings corpus/lab-v2 --out docs/results/lab-v2-pilot.md --title "lab-v2, the pilot so far" $(if $(REAL),--real $(REAL))

footprint: setup
	$(BIN)/python -m tools.footprint

# The README's table, from the demo's run of the whole bundled corpus, audited.
headline: demo
	$(BIN)/phasewatch audit runs/demo
	$(BIN)/python -m tools.headline runs/demo

# The pictures that the README shows, from the bundled corpus; audited, or the report says that it was not.
picture: setup demo
	$(BIN)/phasewatch audit runs/demo
	$(BIN)/phasewatch report runs/demo
	$(BIN)/python -m tools.picture runs/demo docs/dashboard.png
	chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
	  --disable-component-update --disable-sync --user-data-dir=$$(mktemp -d) --hide-scrollbars --window-size=1000,1100 \
	  --virtual-time-budget=5000 --screenshot=docs/report.png file://$(CURDIR)/runs/demo/report.html
