# `make help` lists the targets: their names and what stands after ## beside them.
# The first one that needs it makes .venv and installs requirements.txt into it.

PYTHON ?= python3
BIN := .venv/bin

help: ## this list
	@awk -F '"' '/^version = / { print "RAE suite " $$2 }' pyproject.toml
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## create .venv and install requirements.txt

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/digits: | setup
	$(BIN)/python scripts/prepare_data.py digits --output data/digits

demo: setup data/digits ## train on handwritten digits (about 3 minutes on 2 CPU cores)
	$(BIN)/python train_rae.py --config configs/digits_tiny.yaml

demo-dit: setup data/digits ## train a diffusion transformer on the demo's latents, draw 200 digits, judge them (5 minutes)
	test -d runs/digits_tiny/final || $(MAKE) demo
	$(BIN)/python train_dit.py --config configs/ditdh_digits.yaml
	@test -d runs/ditdh_digits/final || { echo "the training was stopped: make demo-dit continues it"; exit 1; }
	rm -rf samples/ditdh_digits
	$(BIN)/python sample_dit.py --model runs/ditdh_digits/final --num_samples 200 --guidance_scale 1.5 \
		--num_inference_steps 25 --output_dir samples/ditdh_digits
	$(BIN)/python scripts/judge_digits.py --samples samples/ditdh_digits --at_least 0.95

test: setup ## run all tests (about 12 minutes on 2 cores)
	$(BIN)/python -m pytest

docs-check: setup ## run the commands of README.md and docs/ on tiny data (10 minutes)
	$(BIN)/python tests/docs_check.py

lint: setup ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: setup ## a tiny run of 30 minutes whose memory, open files and disk must stay flat (docs/reliability.md)
	$(BIN)/python tests/faults/soak.py --plot docs/soak.png

real-size: setup ## two steps of the full-size dinov2_b preset (10 GB memory, 20 GB disk, 4 minutes on a CPU)
	$(BIN)/python benchmarks/real_size.py

real-size-dit: setup ## two steps of the full-size DiT-DH-XL on DINOv2-B's latents, random weights (20 GB memory, 1 minute on a CPU)
	$(BIN)/python benchmarks/real_size_dit.py

dit-step: setup ## a step of stage 2 beside the published one's, lever by lever (7 GB memory)
	$(BIN)/python benchmarks/dit_step.py --levers

train-step: setup ## a step of dinov2_b_vitb beside the published loop's, part by part and lever by lever (10 minutes)
	$(BIN)/python benchmarks/train_step.py --baseline --levers

sampling: setup ## sampling beside the published sampler, for each kind of guidance (6 minutes)
	$(BIN)/python benchmarks/sampling.py

stored-latents: setup ## images per second of latents read from shards, from files, encoded on line (5 minutes)
	$(BIN)/python benchmarks/stored_latents.py

memory: setup ## peak memory of a step of every preset, calculated, and the largest batch for four cards
	$(BIN)/python benchmarks/memory.py

faults: setup ## damaged files, full disks, lost data; kills at 50 random moments and named places (20 minutes)
	$(BIN)/python -m pytest tests/test_faults.py
	$(BIN)/python tests/faults/kill.py

data-pipeline: setup ## images per second of decoding, resize and crop, next to torchvision's (1 minute)
	$(BIN)/python benchmarks/data_pipeline.py

start-up: setup ## launch to first step with 1.3 million image files (1 minute)
	$(BIN)/python benchmarks/start_up.py

scaling: setup ## collectives of a training step, counted, and a model of 1 to 64 GPUs (2 minutes)
	$(BIN)/python benchmarks/scaling.py

streaming: setup ## memory while a million images are streamed (1.2 GB disk, 15 minutes)
	$(BIN)/python benchmarks/streaming.py

# the oldest transformers and diffusers of requirements.txt, on the other packages of .venv
.venv-oldest/installed: .venv/installed
	$(BIN)/python -m venv --without-pip .venv-oldest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.0.0 diffusers==0.37.0
	touch $@

cross-version: setup .venv-oldest/installed ## model folders between the oldest and newest transformers and diffusers (6 minutes)
	$(BIN)/python tests/cross_version.py .venv-oldest/bin/python

.PHONY: $(shell awk -F: '/^[a-z][a-z-]*:.*\#\# / { print $$1 }' Makefile)
