"""Stage 2, number for number: every case under PARITY2_DIR. Only the SDE sampler's runs are left out.

    PARITY2_DIR=/some/cases pytest tests/test_parity2.py -s

prints the margins: the largest deviation of each kind as a share of its tolerance.
"""

import json
import math
import os
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train_dit
from modeling_dit import RAEDiTModel, config_from_published, config_to_published
from rae_suite import rae_networks
from rae_suite.dit_networks import compile_networks
from rae_suite.ema import EMA
from rae_suite.flow import (
    Draws,
    autoguidance_velocity,
    cfg_velocity,
    drop_labels,
    predict_velocity,
    sample_ode,
    sampling_times,
    shift_factor,
    training_times,
)
from rae_suite.labels import Classes
from rae_suite.optimizers import build_optimizer
from rae_suite.settings_dit import parse_config

OWN_CASES = Path(__file__).resolve().parent / "parity2"
PARITY2_DIR = Path(os.environ.get("PARITY2_DIR", OWN_CASES))

# tolerances of parity2/README.md, relative where not said otherwise; Frobenius norm for tensors
TENSOR = GRADIENT = LOSS = 1e-5
SCALAR = 1e-4
LEARNING_RATE = 1e-12
FINAL_NORM, CHANGE_NORM = 1e-5, 1e-2
TABLE, TIME = 1e-6, 1e-5  # absolute
INIT_BUILDS = 200  # as many as were recorded


def names(folder: str) -> list:
    return sorted(path.stem for path in PARITY2_DIR.glob(f"{folder}/*.safetensors"))


def read(name: str) -> tuple:
    """A case's JSON and its tensors; 16-bit ones hold float32 values that are exact in 16 bits."""
    tensors = load_file(PARITY2_DIR / f"{name}.safetensors")
    tensors = {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}
    return json.loads((PARITY2_DIR / f"{name}.json").read_text()), tensors


def published_config(name: str) -> dict:
    return json.loads((PARITY2_DIR / "models" / name / "config.json").read_text())


def load_model(name: str, **config) -> RAEDiTModel:
    model = RAEDiTModel(**config_from_published(published_config(name)), **config)
    model.load_state_dict(load_file(PARITY2_DIR / "models" / name / "state.safetensors"))
    return model.eval()


class Margins:
    """Collects deviations as shares of their tolerances; `check` fails when one is over 1."""

    def __init__(self):
        self.worst = {}

    def add(self, kind, deviation, tolerance, where=""):
        share = float(deviation) / tolerance
        if not share <= self.worst.get(kind, (-1.0, ""))[0]:  # nan counts as worse
            self.worst[kind] = (share, where)

    def number(self, kind, value, expected, tolerance, where=""):
        self.add(kind, abs(float(value) - expected) / max(abs(expected), 1e-12), tolerance, where)

    def tensor(self, kind, value, expected, tolerance, where="", absolute=False):
        assert value.shape == expected.shape, f"{kind} {where}: {tuple(value.shape)} and {tuple(expected.shape)}"
        difference = value.detach() - expected
        deviation = difference.abs().max() if absolute else difference.norm() / expected.norm()
        self.add(kind, deviation, tolerance, where)

    def check(self, title):
        print(f"\n{title}: " + ", ".join(f"{kind} {share:.2g}" for kind, (share, _) in self.worst.items()))
        assert self.worst, "nothing was compared"
        bad = {kind: worst for kind, worst in self.worst.items() if not worst[0] <= 1}
        assert not bad, f"{title}: deviation / tolerance over 1: {bad}"


def test_cases_are_there():
    """An empty folder would pass the rest of this file."""
    assert list(PARITY2_DIR.glob("*/*.json"))
    for folder in ("models/*", "model_unit", "train_trace", "sampling", "time_shift"):
        assert list(OWN_CASES.glob(f"{folder}/*.safetensors")), folder


# Model ----------------------------------------------------------------------------------------------------------------


def record_middle(model: RAEDiTModel) -> dict:
    """Outputs of both embeddings and of every block, by the case's names, filled by the next forward pass."""
    modules = {"t_embedding": model.t_embedder, "y_embedding": model.y_embedder}
    modules.update({f"block_{i}": block for i, block in enumerate(model.blocks)})
    recorded = {}

    def keep(name, module, inputs, output):
        recorded[f"middle.{name}"] = output

    for name, module in modules.items():
        module.register_forward_hook(partial(keep, name))
    return recorded


@pytest.mark.parametrize("name", names("model_unit"))
def test_model(name):
    """Output, tensors in between, and the gradients of input and every parameter."""
    case, tensors = read(f"model_unit/{name}")
    model = load_model(name, train_constants=True)
    assert config_to_published(model.config) == published_config(name)
    middle = record_middle(model)
    x = tensors["x"].requires_grad_()
    output = model(x, tensors["t"], tensors["y"]).sample
    scalar = (output * tensors["output_weights"]).sum()
    scalar.backward()
    margins = Margins()
    margins.tensor("output", output, tensors["output"], TENSOR)
    margins.tensor("x_grad", x.grad, tensors["x_grad"], TENSOR)
    margins.number("scalar", scalar.detach(), case["scalar"], SCALAR)
    for key in tensors:
        if key.startswith("middle."):
            margins.tensor("middle", middle[key], tensors[key], TENSOR, key)
    compare_gradients(margins, model, case["gradients"])
    margins.check(name)


def compare_gradients(margins: Margins, model: RAEDiTModel, expected: dict) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        if not model.config.use_rope and key.endswith("k_norm.bias"):
            continue  # it adds the same to all of a query's products, which the softmax takes out: only rounding
        margins.number("gradient norm", parameter.grad.norm(), expected[key]["norm"], GRADIENT, key)
        margins.number("weight norm", parameter.detach().norm(), expected[key]["weight_norm"], GRADIENT, key)
        dot = (parameter.grad.double() * parameter.detach().double()).sum()
        scale = expected[key]["norm"] * expected[key]["weight_norm"]
        margins.add("dot_weight", abs(dot - expected[key]["dot_weight"]) / scale, GRADIENT, key)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PARITY2_DIR.glob("models/*/config.json")))
def test_tables(name):
    """Position and rotary tables of a new model are those of the published one."""
    state = load_file(PARITY2_DIR / "models" / name / "state.safetensors")
    model = RAEDiTModel(**config_from_published(published_config(name)))
    own = model.state_dict()
    assert {key: tensor.shape for key, tensor in own.items()} == {key: t.shape for key, t in state.items()}
    for key in state:
        if key == "pos_embed" or "feat_rope" in key:
            torch.testing.assert_close(own[key], state[key], rtol=0, atol=TABLE)


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in PARITY2_DIR.glob("init/*.json") if p.stem != "published_shapes")
)
def test_initialisation(name):
    """Mean, root mean square and range of each new tensor follow its rule, over many seeds."""
    case = json.loads((PARITY2_DIR / "init" / f"{name}.json").read_text())
    config, margins = config_from_published(case["config"]), Margins()
    states = []
    for seed in range(INIT_BUILDS):
        torch.manual_seed(seed)
        states.append(RAEDiTModel(**config).state_dict())
    assert states[0].keys() == case["parameters"].keys()
    for key, expected in case["parameters"].items():
        values = torch.stack([state[key] for state in states]).double()
        assert list(values.shape[1:]) == expected["shape"], key
        compare_initial_values(margins, key, values, expected)
    margins.check(name)


def compare_initial_values(margins: Margins, key: str, values: torch.Tensor, expected: dict) -> None:
    """`values`: (builds, ...) of one tensor."""
    rule, size = expected["rule"], expected["size"]
    if rule in ("zeros", "ones"):
        assert (values == (rule == "ones")).all(), key
    elif rule == "fixed":
        assert (values == values[0]).all(), key
        for kind, value in (("mean", values.mean()), ("rms", values.square().mean().sqrt())):
            margins.add(f"fixed {kind}", abs(float(value) - expected[kind]), 2 * TABLE, key)  # recorded in six digits
    else:
        assert not torch.equal(values[0], values[1]), key
        rms = size if rule == "normal" else size / math.sqrt(3)
        tolerance = 5 / math.sqrt(values.numel())
        margins.add(f"{rule} mean", abs(values.mean()) / rms, tolerance, key)
        margins.number(f"{rule} rms", values.square().mean().sqrt(), rms, tolerance, key)
        if rule == "uniform":
            assert values.abs().max() <= size * (1 + 1e-5), key


def published_shapes() -> dict:
    file = PARITY2_DIR / "init" / "published_shapes.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize("name", published_shapes())
def test_published_networks(name):
    """Parameters, tensors and shapes of the networks in full size."""
    case = published_shapes()[name]
    with torch.device("meta"):
        model = RAEDiTModel(**config_from_published(case["config"]))
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameters"]
    assert len(state) == case["tensors"]
    assert {key: list(state[key].shape) for key in case["shapes"]} == case["shapes"]


# Training -------------------------------------------------------------------------------------------------------------


def settings_of(case: dict, model: RAEDiTModel) -> list:
    """A trace's settings as flags of train_dit.py."""
    schedule = case["scheduler"]
    values = {
        "model.rae": "none",
        "model.class_dropout_prob": model.config.class_dropout_prob,
        "model.train_constants": case["train_constants"],
        "flow.time_distribution": case["time_dist_type"],
        "train.clip_grad_norm": case["clip_grad"],
        "optimizer.lr": schedule["base_lr"],
        "optimizer.betas": case["betas"],
        "optimizer.weight_decay": case["weight_decay"],
        "lr_schedule.type": schedule["type"],
        "lr_schedule.warmup_steps": schedule["warmup_steps"],
        "lr_schedule.warmup_from_zero": schedule["warmup_from_zero"],
        "lr_schedule.decay_end_step": schedule["decay_end_steps"],
        "lr_schedule.final_lr": schedule["final_lr"],
        "ema.decay": case["ema_decay"],
    }
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value).strip('"'))]


def build_run(case: dict, model: RAEDiTModel) -> train_dit.Run:
    """The run of train_dit.py around a recorded model; there are no images, so there is no autoencoder."""
    config, accelerator = parse_config(settings_of(case, model)), Accelerator(cpu=True)
    return train_dit.Run(
        config=config,
        accelerator=accelerator,
        model=accelerator.prepare(model),
        rae=None,
        optimizer=accelerator.prepare(build_optimizer(model, config.optimizer)),
        ema=EMA(model, config.ema.decay),
        classes=Classes(model.config.num_classes, None),
        shift=shift_factor(case["time_dist_shift_dim"], case["time_dist_shift_base"]),
        guide=None,
        steps_per_epoch=1,
        frozen={},
    )


@pytest.mark.parametrize(
    "name, compiled",
    [(name, False) for name in names("train_trace")] + [(name, True) for name in names("train_trace")[:1]],
)
def test_training(name, compiled, monkeypatch):
    """Eight steps of the published loop, step by step, by train_dit.py's own step; the first trace also compiled, by
    the backend that has the same graphs as inductor but needs no C++ compiler."""
    record, tensors = read(f"train_trace/{name}")
    case, margins = record["case"], Margins()
    model = load_model(case["model"], train_constants=case["train_constants"])
    initial = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    compare_evaluation(margins, model, tensors, "initial")
    run = build_run(case, model)
    if compiled:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        monkeypatch.setattr(rae_networks, "COMPILE_OPTIONS", None)
        compile_networks(model, torch.nn.Module())
    for expected in record["steps"]:
        i = expected["step"]
        recorded = {key: t[i] for key, t in tensors.items() if not key.startswith("eval.")}
        compare_step(margins, run, expected, recorded)
    compare_final_norms(margins, model, run.ema, initial, record["final_norms"])
    model.eval()
    compare_evaluation(margins, model, tensors, "model")
    with run.ema.applied():
        compare_evaluation(margins, model, tensors, "ema")
    margins.check(f"{name}, compiled" if compiled else name)


def compare_step(margins: Margins, run: train_dit.Run, expected: dict, tensors: dict) -> None:
    """Take a step with the recorded draws; compare what follows from them."""
    where, config = f"step {expected['step']}", run.config
    draws = Draws(tensors["noise"], tensors["u_time"], tensors["u_drop"])
    t = training_times(draws.u_time, config.flow.time_distribution, run.shift)
    margins.tensor("t", t, tensors["t"], TIME, where, absolute=True)
    labels, dropout = tensors["labels"], config.model.class_dropout_prob
    dropped = drop_labels(labels, draws.u_drop, dropout, run.dit.null_label) if dropout > 0 else labels
    assert torch.equal(dropped, tensors["labels_after_dropout"]), where
    assert torch.equal(dropped != labels, tensors["drop"]), where
    run.model.train()
    with torch.no_grad():
        losses = train_dit.flow_loss(run, tensors["latents"], labels, draws)
    for value, number in zip(losses, expected["loss_per_sample"], strict=True):
        margins.number("loss_per_sample", value, number, LOSS, where)
    found = train_dit.train_step(run, [(tensors["latents"], labels, draws)], expected["step"]).read()
    assert found["nonfinite"] is None
    for key, tolerance in (("loss", LOSS), ("grad_norm", LOSS), ("lr", LEARNING_RATE)):
        margins.number(key, found[key], expected[key], tolerance, where)


def compare_final_norms(margins: Margins, model: RAEDiTModel, ema: EMA, initial: dict, expected: dict) -> None:
    assert initial.keys() == expected.keys()
    for key, parameter in model.named_parameters():
        for kind, weights in (("model", parameter.detach()), ("ema", ema.shadow[key])):
            margins.number("final norm", weights.norm(), expected[key][kind], FINAL_NORM, f"{key} {kind}")
            change = (weights - initial[key]).norm()
            if f"{kind}_change" in expected[key]:
                margins.number("change", change, expected[key][f"{kind}_change"], CHANGE_NORM, f"{key} {kind}")
            else:
                assert not parameter.requires_grad and change <= 1e-6 * initial[key].norm(), key


@torch.no_grad()
def compare_evaluation(margins: Margins, model: RAEDiTModel, tensors: dict, weights: str) -> None:
    output = model(tensors["eval.x"], tensors["eval.t"], tensors["eval.y"]).sample
    margins.tensor(f"output {weights}", output, tensors[f"eval.{weights}_output"], TENSOR)


# Sampling -------------------------------------------------------------------------------------------------------------


@cache
def sampling_case(name: str) -> tuple:
    return read(f"sampling/{name}")


RUNS = [(name, run["name"]) for name in names("sampling") for run in sampling_case(name)[0]["runs"]]


def run_velocity(case: dict, run: dict, labels: torch.Tensor, calls: list):
    """The run's velocity; appends the time of each call of the main model to `calls`."""
    model = load_model(case["model"])

    def network(x, t, y):
        calls.append(t[0].item())
        return model(x, t, y)

    if run["guidance"] is None:
        return lambda x, t: predict_velocity(network, x, t, labels)
    guidance = run["guidance"]
    settings = {"scale": guidance["scale"], "interval": (guidance["t_min"], guidance["t_max"])}
    if guidance["method"] == "cfg":
        return lambda x, t: cfg_velocity(network, x, t, labels, model.null_label, **settings)
    assert guidance["method"] == "autoguidance"
    weaker = load_model(case["guidance_model"])
    return lambda x, t: autoguidance_velocity(network, weaker, x, t, labels, **settings)


@pytest.mark.parametrize("name, run_name", RUNS)
def test_sampling(name, run_name):
    """Times, every recorded state, final latents and times of the calls of each run."""
    case, tensors = sampling_case(name)
    (run,) = [run for run in case["runs"] if run["name"] == run_name]
    if run["mode"] != "ODE":
        pytest.skip("no SDE sampler: no published config uses it, and the published one is broken")
    shift = shift_factor(run["time_dist_shift_dim"], run["time_dist_shift_base"])
    times, calls, states = sampling_times(run["num_steps"], shift), [], {0: tensors["noise"]}
    velocity = run_velocity(case, run, tensors["labels"], calls)
    final = sample_ode(
        velocity, tensors["noise"], times, run["sampling_method"], lambda i, t, x: states.update({i + 1: x})
    )
    margins = Margins()
    margins.tensor("times", times, tensors[f"{run_name}.times"], TABLE, absolute=True)
    margins.tensor("calls", torch.tensor(calls), torch.tensor(run["calls"]), TABLE, absolute=True)
    margins.tensor("final", final, tensors[f"{run_name}.final"], TENSOR)
    recorded = [key for key in tensors if key.startswith(f"{run_name}.state_")]
    assert recorded
    for key in recorded:
        margins.tensor("states", states[int(key.rpartition("_")[2])], tensors[key], TENSOR, key)
    margins.check(run_name)


@pytest.mark.parametrize("name", names("time_shift"))
def test_times(name):
    """Training times from uniform numbers, before and after the shift, and sampling grids."""
    cases, tensors = read(f"time_shift/{name}")
    margins = Margins()
    for case in cases:
        shift, prefix = shift_factor(case["dim"], case["base"]), f"{case['name']}."
        margins.number("shift", shift, case["shift"], TABLE)
        u = tensors[f"{prefix}u"]
        for key in (key.removeprefix(prefix) for key in tensors if key.startswith(prefix)):
            kind, _, rest = key.partition("_")
            if kind == "grid":
                margins.tensor("grid", sampling_times(int(rest), shift), tensors[prefix + key], TABLE, key, True)
            elif kind == "t":
                distribution = rest.removesuffix("_unshifted")
                t = training_times(u, distribution, 1.0 if rest.endswith("_unshifted") else shift)
                margins.tensor("t", t, tensors[prefix + key], TIME, prefix + key, True)
    margins.check(name)
