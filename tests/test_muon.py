"""Muon for matrices with AdamW for all else: the update, steps that are left out, runs and their continuation."""

import pytest
import torch
from conftest import ROOT, checkpoint_state, error_line, flags, read_metrics, run_command, run_ranks, same, tiny_dit
from test_train_dit import PLAIN, rae, train  # noqa: F401

from rae_suite.checkpoints import checkpoints
from rae_suite.errors import ConfigError
from rae_suite.optimizers import MuonWithAdamW, build_optimizer, check_optimizer, optimizer_lines
from rae_suite.settings_dit import DiTOptimizerConfig
from rae_suite.updates import set_learning_rate

MUON = {"optimizer.type": "muon", "optimizer.lr": 2e-3}
SETTINGS = DiTOptimizerConfig(lr=1e-2, weight_decay=0.1, type="muon", momentum=0.8)


def parameters() -> tuple:
    """Two matrices, a bias and a kernel."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (3, 8), (5,), (4, 2, 1, 1))
    tensors = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return tensors[:2], tensors[2:]


def set_gradients(tensors: list, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator)


def take(optimizer: MuonWithAdamW, step: int, found_inf=None) -> None:
    """A step with the gradients of `step`; nan ones where `found_inf` is 1."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    set_learning_rate(optimizer, 1e-2 / (1 + step))
    set_gradients(tensors, step)
    if found_inf:
        for p in tensors:
            p.grad.fill_(float("nan"))
    optimizer.found_inf = None if found_inf is None else torch.tensor(float(found_inf))
    optimizer.step()
    optimizer.found_inf = None
    optimizer.zero_grad()


def test_updates_are_those_of_both():
    """Of torch's Muon, whose step has AdamW's size, and torch's AdamW, one beside the other."""
    matrices, others = parameters()
    optimizer = MuonWithAdamW(matrices, others, SETTINGS)
    copies, other_copies = parameters()
    muon = torch.optim.Muon(copies, 1e-2, 0.1, momentum=0.8, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(other_copies, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    for step in range(4):
        take(optimizer, step)
        set_gradients([*copies, *other_copies], step)
        for part in (muon, adamw):
            set_learning_rate(part, 1e-2 / (1 + step))
            part.step()
    for found, expected in zip([*matrices, *others], [*copies, *other_copies], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_update_of_a_matrix_is_about_orthogonal():
    """Singular values of the first update lie about 0.2 lr sqrt(longer side)."""
    matrices, others = parameters()
    before = matrices[0].detach().clone()
    take(MuonWithAdamW(matrices, others, DiTOptimizerConfig(lr=1e-2, type="muon")), 0)
    values = torch.linalg.svdvals(before - matrices[0].detach()) / (0.2 * 1e-2 * 6**0.5)
    assert (0.6 < values).all() and (values < 1.3).all(), values


def test_steps_that_are_left_out_change_nothing():
    """Not even the momentum: what follows has the bits of a run without them, and found_inf 0 those of no guard."""
    (matrices, others), (copies, other_copies) = parameters(), parameters()
    guarded, plain = MuonWithAdamW(matrices, others, SETTINGS), MuonWithAdamW(copies, other_copies, SETTINGS)
    take(guarded, 9, found_inf=1)  # before there is a momentum
    for step in range(3):
        take(plain, step)
        take(guarded, step, found_inf=0)
        before = [p.detach().clone() for p in (*matrices, *others)]
        take(guarded, 9, found_inf=1)
        assert same(before, [p.detach() for p in (*matrices, *others)])
    assert same([*matrices, *others], [*copies, *other_copies])
    assert same(guarded.state_dict()["state"], plain.state_dict()["state"])


def test_guarded_steps_make_momenta_once(monkeypatch):
    """A tensor of zeros for each matrix in every step would cost a pass through memory."""
    optimizer, made, zeros_like = MuonWithAdamW(*parameters(), SETTINGS), [], torch.zeros_like
    take(optimizer, 0, found_inf=0)
    monkeypatch.setattr(torch, "zeros_like", lambda p, **options: made.append(p.shape) or zeros_like(p, **options))
    take(optimizer, 1, found_inf=0)
    assert made == []


def test_what_goes_where():
    """Two dimensions are a matrix, the label table too; frozen parameters are nobody's."""
    model = tiny_dit()
    optimizer = build_optimizer(model, SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"blocks.0.attn.qkv.weight", "y_embedder.embedding_table.weight", "s_projector.weight"} <= matrices
    assert {"x_embedder.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= others
    assert not {"pos_embed", "t_embedder.W"} & (matrices | others) and len(matrices | others) == len(names) - 2
    lines = optimizer_lines(model, SETTINGS)
    assert lines[0].startswith(f"Muon: {len(matrices)} tensors, 0.") and "blocks.*.mlp.w12.weight" in lines[0]
    assert lines[1].startswith(f"AdamW: {len(others)} tensors, 0.0") and lines[1].count("biases") == 1
    assert "norms" in lines[1] and "s_embedder.proj.weight" in lines[1]
    assert optimizer_lines(model, DiTOptimizerConfig()) == []
    assert type(build_optimizer(model, DiTOptimizerConfig())) is torch.optim.AdamW


def test_a_run_and_its_continuation(rae, images, tmp_path):  # noqa: F811
    """4 steps and 2 + 2 steps end in the same bits, the optimizer's state included; AdamW ends elsewhere; a checkpoint
    of the other optimizer is refused."""
    done = train(rae, images, tmp_path / "whole", PLAIN, **MUON)
    assert "\nMuon: " in done.stdout and "\nAdamW: " in done.stdout and "blocks.*.attn.qkv.weight" in done.stdout
    train(rae, images, tmp_path / "parts", PLAIN, **MUON, **{"train.max_steps": 2})
    assert "continuing from" in train(rae, images, tmp_path / "parts", PLAIN, **MUON).stdout
    states = [checkpoint_state(tmp_path / name) for name in ("whole", "parts")]
    assert same(*states) and "momentum_buffer" in states[0]["optimizer"]["state"][0]
    plain = train(rae, images, tmp_path / "adamw", PLAIN, **{"optimizer.lr": 2e-3})
    assert "Muon" not in plain.stdout
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in
              ("whole", "adamw")]  # fmt: skip
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:] and losses[0][-1] < losses[0][0]
    fork = {"train.fork_from": checkpoints(tmp_path / "adamw")[-1], "train.max_steps": 6}
    done = train(rae, images, tmp_path / "fork", PLAIN, check=False, **MUON, **fork)
    assert done.returncode == 2 and "train.fork_from: " in (line := error_line(done.stderr)) and "optimizer" in line


def test_processes(rae, images, tmp_path):  # noqa: F811
    """The losses of two processes are those of one. (Weights are not compared: in directions that have no gradient,
    Muon makes a step of rounding.)"""
    settings = {**PLAIN, **MUON, "optimizer.eps": 1e-4}
    train(rae, images, tmp_path / "one", settings)
    argv = {**settings, "model.rae": rae, "data.path": images, "train.output_dir": tmp_path / "two"}
    (found,) = run_ranks({"folder": tmp_path / "ranks", "processes": 2, "argv": ["train_dit.py", argv]})
    assert [end["code"] for end in found["ends"]] == [0, 0], found
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in
              ("one", "two")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_it_is_refused_where_it_does_not_work(rae, images, tmp_path, capfd):  # noqa: F811
    check_optimizer(SETTINGS, sharded=False)
    check_optimizer(DiTOptimizerConfig(), sharded=True)
    with pytest.raises(ConfigError, match="^optimizer.type: muon does not work with FSDP2, expected adamw"):
        check_optimizer(SETTINGS, sharded=True)
    settings = {**PLAIN, **MUON, "model.rae": rae, "data.path": images, "train.output_dir": tmp_path / "run"}
    config = ROOT / "accelerate_configs" / "fsdp2_8gpu.yaml"
    launch = ("--config_file", config, "--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0)
    done = run_command("train_dit.py", *flags(settings), launch=tuple(map(str, launch)), check=False)
    assert done.returncode != 0 and "error: optimizer.type: muon does not work with FSDP2" in done.stderr
    assert not (tmp_path / "run").exists()
    done = train(rae, images, tmp_path / "run", PLAIN, check=False, **{"optimizer.momentum": 0.9})
    assert "optimizer.momentum: expected nothing unless optimizer.type is muon, got 0.9" in error_line(done.stderr)
