"""A small data set, and the real command lines on it."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# before torch is imported: two tests run at a time, and more threads would only wait for each other. Where a test wants
# two, they sleep while they wait, in place of taking the other test's core.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from forked import forks, rank_environments, run_script

# before huggingface_hub and accelerate are imported, here and in every command that a test starts
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rae-tests-")  # what tests cache is not the user's
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from accelerate.state import AcceleratorState  # noqa: E402
from inception_standin import save_standin  # noqa: E402

from modeling_dit import RAEDiTModel  # noqa: E402
from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite.checkpoints import checkpoints, read_checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# digits_tiny made tiny again: every loss is on within three steps
TINY = {
    "data.num_workers": "0",
    "train.max_steps": "6",
    "train.global_batch_size": "8",
    "train.cpu_threads": "1",
    "model.decoder_hidden_size": "32",
    "model.decoder_num_hidden_layers": "2",
    "model.decoder_intermediate_size": "64",
    "lr_schedule.warmup_steps": "2",
    "lr_schedule.decay_end_step": "5",
    "perceptual.start_step": "1",
    "gan.update_start_step": "1",
    "gan.start_step": "2",
    "eval.every_steps": "3",
    "logging.samples_every_steps": "100",  # at the start and the end
    "logging.every_steps": "1",
    "logging.report_to": "[]",
    "logging.progress_bar": "false",
}
# the same without LPIPS, whose VGG16 is the slowest part
PLAIN = {**TINY, "perceptual.weight": "0", "eval.metrics": "[psnr]"}


def flags(settings: dict) -> list:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def command(*args, launch: tuple = ()) -> list:
    """A command line of this repository in the tests' Python; `launch` are arguments of accelerate launch."""
    start = [sys.executable, "-m", "accelerate.commands.launch", *launch] if launch else [sys.executable]
    return [*start, *map(str, args)]


def imported_environment() -> dict:
    """The environment variables that libraries look at when they are imported."""
    return {name: value for name, value in os.environ.items() if name.startswith(("HF_", "PATH", "TORCH_"))}


ENVIRONMENT = imported_environment()


def run_command(
    *args, launch: tuple = (), processes: int = 1, check: bool = True, surroundings: tuple = (), **variables
) -> subprocess.CompletedProcess:
    """A command of this repository, run to its end, in at most 300 seconds. A script by itself starts in processes that
    have the libraries already, told what a launcher tells them where there are several; under accelerate launch, or
    with environment variables of its own, it imports them. `surroundings`: see forked.run_script."""
    line = command(*args, launch=launch)
    if launch or variables or imported_environment() != ENVIRONMENT:
        assert processes == 1, "several processes without a launcher need the tests' own environment"
        variables = {**os.environ, **variables}
        done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = run_forked(line, Path(folder), processes, surroundings=surroundings)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_forked(
    line: list, folder: Path, processes: int, seconds: int = 300, surroundings: tuple = ()
) -> subprocess.CompletedProcess:
    own = [{**os.environ, **variables} for variables in rank_environments(processes)]
    ranks = [forks().Process(target=run_script, args=(line[1:], folder, variables, surroundings)) for variables in own]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank in ranks if rank.exitcode is None]
    for rank in hanging:
        rank.kill()
    texts = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("out", "err"))
    done = subprocess.CompletedProcess(line, next((r.exitcode for r in ranks if r.exitcode), 0), *texts)
    assert not hanging, f"{len(hanging)} of {processes} processes hang: {done}"
    return done


def processes_on_cpu(count: int) -> tuple:
    """Arguments of accelerate launch. Its `--cpu` starts several processes through MPI only, so this is its launcher
    for GPUs, told by ACCELERATE_USE_CPU (above) to compute on the CPU."""
    distributed = ("--multi_gpu",) if count > 1 else ("--cpu",)
    return (*distributed, "--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip


def run_ranks(*scenarios: dict) -> list:
    """Run scenarios of tests/ranks.py, which says what they are. Gives {"ends", "left_behind", "out", "err"} of each,
    the last two a text for each process. In argv, a dict stands for its settings as flags."""
    for scenario in scenarios:
        program, *rest = scenario["argv"]
        scenario["argv"] = [program, *(str(f) for a in rest for f in (flags(a) if isinstance(a, dict) else [a]))]
        scenario["folder"] = str(scenario["folder"])
        scenario.setdefault("faults", [])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scenarios.json"
        file.write_text(json.dumps(scenarios))
        done = run_forked(command("tests/ranks.py", file), Path(folder), 1, seconds=1800)
        assert done.returncode == 0, done
    results = []
    for scenario in scenarios:
        folder = Path(scenario["folder"])
        texts = {
            name: [(folder / f"{rank}.{name}").read_text() for rank in range(scenario["processes"])]
            for name in ("out", "err")
        }
        results.append({**json.loads((folder / "result.json").read_text()), **texts})
    return results


def error_line(stderr: str) -> str:
    """The one line that says what was wrong."""
    assert "Traceback" not in stderr, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def read_metrics(run_dir: Path) -> list:
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]


def make_images(folder: Path) -> Path:
    """24 training and 8 validation images of 40 px in 4 classes."""
    run_command(
        "scripts/prepare_data.py", "dummy", "--output", folder, "--num_images", 32, "--num_classes", 4,
        "--size", 40, "--splits", "train:0.75,validation:0.25",
    )  # fmt: skip
    return folder


@pytest.fixture
def new_accelerator():
    """Accelerate keeps the first Accelerator's precision for all later ones of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "dummy")


def tiny_rae(**settings) -> RAEModel:
    """A seeded RAE of 32 px with an untrained encoder: latents (16, 4, 4), patches of 8 px."""
    torch.manual_seed(0)
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 16, "num_hidden_layers": 1}
    encoder.update(num_attention_heads=2, patch_size=8, image_size=32, num_register_tokens=1)
    config = RAEConfig(
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        decoder_patch_size=8,
        **{"encoder_config": encoder, "encoder_input_size": 32, "noise_tau": 0.5, **settings},
    )
    return RAEModel(config)


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> Path:
    """File of a network with the parts of the real Inception's."""
    path = tmp_path_factory.mktemp("inception") / "standin.pt"
    save_standin(path)
    return path


def tiny_dit(seed: int = 0, **settings) -> RAEDiTModel:
    """A seeded DiT-DH for the latents of tiny_rae and 10 classes, in eval mode, whose output is not 0."""
    torch.manual_seed(seed)
    config = dict(sample_size=4, in_channels=16, hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=10,
                  head_hidden_size=48, head_num_layers=1, head_num_attention_heads=4)  # fmt: skip
    model = RAEDiTModel(**{**config, **settings})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def checkpoint_state(run_dir) -> dict:
    """Every value of the newest checkpoint, by part: both networks, both optimizers, moving average, counters."""
    return read_checkpoint(checkpoints(run_dir)[-1])


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
