"""benchmarks/ of stage 2: FLOPs from the architecture beside torch's count and the published sizes, memory from shapes,
and the benchmark of a step on tiny networks."""

import sys

import pytest
import torch
from conftest import ROOT, tiny_dit, tiny_rae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))

import dit_step  # noqa: E402
import memory  # noqa: E402

from modeling_dit import PUBLISHED_HEAD, RAEV2, SIZES, RAEDiTModel  # noqa: E402
from rae_suite.flow import prediction_loss  # noqa: E402

TOKENS = dict(num_time_tokens=2, num_class_tokens=3, base_num_layers=1, use_qk_norm=True, use_pos_embed=False)
SIZE = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
HEAD = {"head_hidden_size": 24, "head_num_layers": 1, "head_num_attention_heads": 2}


@pytest.mark.parametrize("size, plain, with_head", [("S", 6.2, 48.5), ("B", 23.3, 65.7), ("L", 81.1, 123.6),
                                                    ("XL", 119.1, 161.6)])  # fmt: skip
def test_published_sizes(size, plain, with_head):
    """Billions of multiplications for one image of the published networks."""
    for head, expected in (({}, plain), (PUBLISHED_HEAD, with_head)):
        with torch.device("meta"):
            config = RAEDiTModel(**SIZES[size], **head).config
        assert sum(dit_step.forward_macs(config).values()) / 1e9 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("config", [{}, {name: None for name in HEAD}, {"head_hidden_size": 32}, TOKENS, RAEV2],
                         ids=["DiT-DH", "DiT", "of one width", "tokens", "RAEv2"])  # fmt: skip
def test_flops_are_those_that_torch_counts(config):
    """Of a forward and a backward pass, with attention as plain products. Exactly, but for the table of Fourier
    features and the sums of outer products that torch does not call products."""
    if config is not RAEV2:
        model = tiny_dit(**config).to("meta")
    with torch.device("meta"):
        model = RAEDiTModel(**RAEV2) if config is RAEV2 else model
        c, s = model.config.in_channels, model.config.sample_size
        x, t, y = torch.empty(1, c, s, s), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            prediction_loss(model(x, t, y), x).mean().backward()
    assert counter.get_total_flops() == pytest.approx(dit_step.training_flops(model.config), rel=1e-3)


@pytest.fixture
def tiny_benchmark(monkeypatch, new_accelerator):
    """Networks of the benchmarks, tiny; Accelerate's state is new."""
    monkeypatch.setattr(dit_step, "SIZES", {"S": SIZE})
    monkeypatch.setattr(dit_step, "PUBLISHED_HEAD", HEAD)
    monkeypatch.setattr(dit_step, "build_rae", lambda: tiny_rae().requires_grad_(False))
    monkeypatch.setattr(dit_step, "encoder_flops", lambda rae: 0)
    monkeypatch.setattr(dit_step, "counted_flops", lambda run, batch: 2 * dit_step.training_flops(dict(run.dit.config)))


def test_steps_are_the_same(tiny_benchmark):
    """The published step, with each lever and without, and this repository's have one loss and one gradient norm."""
    config = dit_step.benchmark_config("S", 2, "no", False, [])
    result = dit_step.measure(config, 1, levers=True)
    names = ["published", *(f"published with {lever}" for lever in dit_step.LEVERS), "this repository", "from latents"]
    assert list(result["steps"]) == names
    for name, row in result["steps"].items():
        assert row["difference"] <= (5e-2 if name.endswith("encoder") else 1e-4), name
    shown = dit_step.table(result)
    assert "from latents" in shown and "matrix rate" in shown and set(result["predicted"]) < set(dit_step.LEVERS)


def test_another_step_is_noticed(tiny_benchmark, monkeypatch):
    """A benchmark that compares different work ends in an error."""
    monkeypatch.setattr(dit_step, "norm_written_out", lambda norm, x: x * norm.weight)
    with pytest.raises(SystemExit, match="error: published with norm: loss and gradient norm"):
        dit_step.measure(dit_step.benchmark_config("S", 2, "no", False, []), 1, levers=True)


def test_memory(monkeypatch, new_accelerator):
    """What stays between steps is what can be counted by hand; activations come on top, fewer with checkpointing."""
    monkeypatch.setitem(memory.STAGE_2, "tiny", ({**SIZE, **HEAD, "in_channels": 16}, 4))
    monkeypatch.setattr(memory, "build_rae", lambda name, grid: tiny_rae())
    calculation = memory.Stage2Calculation("tiny", "no", [])
    calculated, between = calculation.peak(4)
    run = calculation.run
    weights = sum(p.numel() * 4 for p in (*run.dit.parameters(), *run.rae.parameters(), *run.rae.buffers()))
    trained = sum(p.numel() * 4 for p in run.dit.parameters() if p.requires_grad)
    average = sum(p.numel() * 4 for p in run.dit.parameters())
    tables = sum(b.numel() * 4 for b in run.dit.buffers())
    images = 4 * 3 * 32**2 * 4
    assert between == pytest.approx(weights + average + tables + 2 * trained + images, rel=1e-3)  # two moments of Adam
    assert calculated > between + trained  # gradients, and activations
    twice, _ = calculation.peak(8)
    less, _ = calculation.peak(8, checkpointing=True)
    assert calculated < twice and less < twice
