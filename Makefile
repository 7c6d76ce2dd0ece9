# make demo   train a small RAE on handwritten digits, about 3 minutes on 2 CPU cores
# make demo-dit   train a diffusion transformer on its latents, about 5 minutes on 2 CPU cores
# make test   all tests
# Both make .venv and install requirements.txt into it first.

PYTHON ?= python3
BIN := .venv/bin

help:
	@echo "make setup      create .venv and install requirements.txt"
	@echo "make demo       train on handwritten digits (about 3 minutes on 2 CPU cores)"
	@echo "make demo-dit   train a diffusion transformer on the demo's latents, draw 200 digits, judge them (5 minutes)"
	@echo "make test       run all tests (about 8 minutes on 2 cores)"
	@echo "make docs-check  run the commands of README.md and docs/ on tiny data (15 minutes)"
	@echo "make lint       ruff check and format check"
	@echo "make faults     damaged files, full disks, lost data; kills at 50 random moments and named places (20 minutes)"
	@echo "make cross-version  model folders between the oldest and newest transformers and diffusers (6 minutes)"
	@echo "make data-pipeline  images per second of decoding, resize and crop, next to torchvision's (1 minute)"
	@echo "make start-up   launch to first step with 1.3 million image files (1 minute)"
	@echo "make soak       a tiny run of 30 minutes whose memory, open files and disk must stay flat (docs/reliability.md)"
	@echo "make train-step a step of dinov2_b_vitb beside the published loop's, part by part and lever by lever (10 minutes)"
	@echo "make sampling   sampling beside the published sampler, for each kind of guidance (6 minutes)"
	@echo "make memory     peak memory of a step of every preset, calculated, and the largest batch for four cards"
	@echo "make stored-latents  images per second of latents read from shards, from files, encoded on line (5 minutes)"
	@echo "make real-size  two steps of the full-size dinov2_b preset (10 GB memory, 20 GB disk, 4 minutes on a CPU)"
	@echo "make real-size-dit  two steps of a full-size DiT-DH-S on DINOv2-B's latents (6 GB memory, 10 GB disk)"
	@echo "make dit-step   a step of stage 2 beside the published one's, lever by lever (7 GB memory)"
	@echo "make scaling    collectives of a training step, counted, and a model of 1 to 64 GPUs (2 minutes)"
	@echo "make streaming  memory while a million images are streamed (1.2 GB disk, 15 minutes)"

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/digits: | setup
	$(BIN)/python scripts/prepare_data.py digits --output data/digits

demo: setup data/digits
	$(BIN)/accelerate launch --num_processes 1 train_rae.py --config configs/digits_tiny.yaml

demo-dit: setup data/digits
	test -d runs/digits_tiny/final || $(MAKE) demo
	$(BIN)/accelerate launch --num_processes 1 train_dit.py --config configs/ditdh_digits.yaml
	rm -rf samples/ditdh_digits
	$(BIN)/python sample_dit.py --model runs/ditdh_digits/final --num_samples 200 --guidance_scale 1.5 \
		--num_inference_steps 25 --output_dir samples/ditdh_digits
	$(BIN)/python scripts/judge_digits.py --samples samples/ditdh_digits --at_least 0.95

test: setup
	$(BIN)/python -m pytest

docs-check: setup
	$(BIN)/python tests/docs_check.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: setup
	$(BIN)/python tests/faults/soak.py --plot docs/soak.png

real-size: setup
	$(BIN)/python benchmarks/real_size.py

real-size-dit: setup
	$(BIN)/python benchmarks/real_size_dit.py

dit-step: setup
	$(BIN)/python benchmarks/dit_step.py --levers

train-step: setup
	$(BIN)/python benchmarks/train_step.py --baseline --levers

sampling: setup
	$(BIN)/python benchmarks/sampling.py

stored-latents: setup
	$(BIN)/python benchmarks/stored_latents.py

memory: setup
	$(BIN)/python benchmarks/memory.py

faults: setup
	$(BIN)/python -m pytest tests/test_faults.py
	$(BIN)/python tests/faults/kill.py

data-pipeline: setup
	$(BIN)/python benchmarks/data_pipeline.py

start-up: setup
	$(BIN)/python benchmarks/start_up.py

scaling: setup
	$(BIN)/python benchmarks/scaling.py

streaming: setup
	$(BIN)/python benchmarks/streaming.py

# the oldest transformers and diffusers of requirements.txt, on the other packages of .venv
.venv-oldest/installed: .venv/installed
	$(BIN)/python -m venv --without-pip .venv-oldest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.0.0 diffusers==0.37.0
	touch $@

cross-version: setup .venv-oldest/installed
	$(BIN)/python tests/cross_version.py .venv-oldest/bin/python

.PHONY: help setup demo demo-dit test docs-check lint faults train-step dit-step real-size-dit sampling stored-latents memory data-pipeline start-up soak real-size scaling streaming cross-version
