"""RAEv2's stage-2 model: conditions as tokens, a base head for internal guidance, prediction of the data; in
modeling_dit.py, in training, in sampling and in the pipeline."""

import math

import pytest
import torch
import yaml
from conftest import ROOT, checkpoint_state, error_line, flags, read_metrics, run_command, same, tiny_dit, tiny_rae
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_train_dit import PLAIN, TINY, rae, train  # noqa: F401

from modeling_dit import (
    RAEV2,
    RAEDiTModel,
    RAEDiTPipeline,
    guide,
    internal_velocity,
    predict_velocity,
    sample_ode,
    sampling_times,
)
from rae_suite.cli import read_yaml
from rae_suite.dit_folders import load_pipeline_parts, model_from_state, save_pipeline
from rae_suite.errors import ConfigError
from rae_suite.flow import interpolate, prediction_loss, velocity_target
from rae_suite.generation import count_passes, draw_latents
from rae_suite.published_dit import PublishedDiTOptions, config_of_tensors
from rae_suite.settings_dit import SamplingConfig, parse_config

TOKENS = dict(
    num_time_tokens=4, num_class_tokens=8, base_num_layers=2, prediction="data", use_qk_norm=True, use_pos_embed=False
)
CONFIG = dict(
    sample_size=4, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_classes=10,
    head_hidden_size=64, head_num_layers=1, head_num_attention_heads=4, **TOKENS,
)  # fmt: skip
FLOAT32 = ("t_embedder.W", "learnable_tokens", "freqs_cos", "freqs_sin")
# of train_dit.py
MODEL = {f"model.{name}": str(value).lower() if isinstance(value, bool) else value for name, value in TOKENS.items()}
MODEL |= {"model.num_time_tokens": 2, "model.num_class_tokens": 3, "model.base_num_layers": 1}
GUIDED = {"sampling.guidance_scale": 1.78, "sampling.guidance_interval": "[0.1,1.0]", "sampling.end": "zero"}


@torch.no_grad()
def fill(model: RAEDiTModel) -> RAEDiTModel:
    """The weights of the check numbers: sines whose phase is the tensor's place in the sorted state dict."""
    state = model.state_dict()
    for j, name in enumerate(sorted(state)):
        if "rope" in name:
            continue
        values = 0.1 * torch.sin(0.37 * torch.arange(state[name].numel(), dtype=torch.float64) + j)
        values = 10 * values if name == "t_embedder.W" else values + 1 if "norm" in name else values
        state[name].copy_(values.view(state[name].shape))
    return model.eval()


def build(**changes) -> RAEDiTModel:
    return fill(RAEDiTModel(**{**CONFIG, **changes}))


def inputs() -> tuple:
    x = torch.sin(0.11 * torch.arange(128)).view(2, 4, 4, 4)
    return x, torch.tensor([0.25, 0.8]), torch.tensor([3, 10])


def close(value, expected, atol=1e-5):
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=0, atol=atol)


# The model ------------------------------------------------------------------------------------------------------------


def to_data(velocity: torch.Tensor) -> torch.Tensor:
    """The network's own prediction, of which the velocity was made."""
    x, t, _ = inputs()
    return x - velocity * t.clamp_min(0.05).view(-1, 1, 1, 1)


def test_check_numbers():
    """Of the published code in float32 on a CPU: the head's prediction and the base head's."""
    model = build()
    assert len(model.state_dict()) == 102
    with torch.no_grad():
        out = model(*inputs())
    full, base = to_data(out.sample), to_data(out.base_sample)
    close(full[0, 0, 0], [1.612952, 1.608352, 1.606234, 1.605162])
    close(full[1, 3, 3], [-1.521370, -1.541113, -1.568739, -1.602557])
    close(torch.stack([full.mean(), full.abs().mean()]), [-0.048127, 1.421772])
    close(base[0, 0, 0], [-0.297541, -0.307698, -0.283600, -0.248957])
    close(base[1, 3, 3], [0.951166, 0.937422, 0.915408, 0.902930])
    close(torch.stack([base.mean(), base.abs().mean()]), [0.481187, 0.649187])


def plain_model(state: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple:
    """The same model in other words: float64, rotations as complex numbers, attention as a matrix."""
    batch, count = len(x), 16

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(h):
        return h * torch.sigmoid(h)

    def norm(name, h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def embed(name):
        weight = state[f"{name}.proj.weight"][:, :, 0, 0]
        return x.flatten(2).transpose(1, 2) @ weight.T + state[f"{name}.proj.bias"]

    def turn(h):  # (B, heads, N, d); tokens after those of the image have no position
        places = torch.arange(h.shape[2])
        row, column = (torch.where(places < count, p, 0).double() for p in (places // 4, places % 4))
        frequency = 10000.0 ** (-torch.arange(h.shape[-1] // 4).double() * 4 / h.shape[-1])
        angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def attention(name, h, heads):
        q, k, v = (linear(f"{name}.{p}", h).view(batch, h.shape[1], heads, -1).transpose(1, 2) for p in "qkv")
        q, k = turn(norm(f"{name}.q_norm", q)), turn(norm(f"{name}.k_norm", k))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(name, h):
        return linear(f"{name}.w3", silu(linear(f"{name}.w1", h)) * linear(f"{name}.w2", h))

    def final(name, h, condition):
        shift, scale = linear(f"{name}.adaln_modulation.1", silu(condition)).chunk(2, -1)
        return linear(f"{name}.linear", norm(f"{name}.norm", h) * (1 + scale) + shift)

    angle = 2 * math.pi * t[:, None] * state["t_embedder.W"]
    time = torch.cat([angle.sin(), angle.cos()], 1)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))[:, None]
    label = state["ctx_embedder.embedding_table.weight"][y][:, None]
    conditions = [state["t_embedder.learnable_tokens"] + time, state["ctx_embedder.learnable_tokens"] + label]
    h = torch.cat([embed("s_embedder"), *conditions], 1)
    for i in range(3):
        h = h + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", h), 2)
        h = h + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", h))
        if i == 1:
            early = h[:, :count]
    s = linear("s_projector", silu(time + h[:, :count]))
    h = embed("x_embedder")
    parts = linear("blocks.3.adaln_modulation.1", silu(s)).chunk(6, -1)
    h = h + parts[2] * attention("blocks.3.attn", norm("blocks.3.norm1", h) * (1 + parts[1]) + parts[0], 4)
    h = h + parts[5] * mlp("blocks.3.mlp", norm("blocks.3.norm2", h) * (1 + parts[4]) + parts[3])
    early = silu(time + early)
    return final("final_layer", h, s), final("base_final_layer", early, early)


def test_outputs_and_gradients_of_another_implementation():
    """Gradients too, with a sample so small that a wrong epsilon of a norm shows."""
    model = build(prediction="velocity")
    x, t, y = inputs()
    x = x * torch.tensor([1.0, 1e-3]).view(2, 1, 1, 1)
    with torch.no_grad():
        for name in ("s_embedder", "x_embedder"):
            model.get_submodule(name).proj.bias.zero_()
        model.s_embedder.proj.weight.mul_(0.1)
        for embedder in (model.t_embedder, model.ctx_embedder):
            embedder.learnable_tokens.mul_(0.01)
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k):
                linear.bias.mul_(1e-3)
                linear.weight.mul_(0.02)
    model.t_embedder.W.requires_grad_()
    state = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    weights = torch.cos(0.7 * torch.arange(256)).view(2, 16, 8)  # (B, N, full and base)
    out = model(x, t, y)
    found = torch.cat([out.sample.flatten(2).transpose(1, 2), out.base_sample.flatten(2).transpose(1, 2)], 2)
    expected = torch.cat(plain_model(state, x.double(), t.double(), y), 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad.double() - state[name].grad).norm()
        assert difference <= 1e-4 * state[name].grad.norm(), name


def test_the_published_size():
    """875.2 million parameters, 5.6 of them the base head's; names and shapes of its file."""
    with torch.device("meta"):
        model = RAEDiTModel(**RAEV2)
    state, count = model.state_dict(), {name: p.numel() for name, p in model.named_parameters()}
    assert round(sum(count.values()) / 1e6, 1) == 875.2
    assert round(sum(n for name, n in count.items() if name.startswith("base")) / 1e6, 1) == 5.6
    shapes = {
        "s_embedder.proj.weight": (1440, 1024, 1, 1), "x_embedder.proj.weight": (2048, 1024, 1, 1),
        "t_embedder.learnable_tokens": (4, 1440), "ctx_embedder.learnable_tokens": (8, 1440),
        "ctx_embedder.embedding_table.weight": (1001, 1440), "enc_rope.freqs_cos": (268, 72),
        "dec_rope.freqs_sin": (256, 128), "blocks.27.mlp.w2.weight": (3840, 1440), "blocks.27.attn.v.bias": (1440,),
        "blocks.28.adaln_modulation.1.weight": (12288, 2048), "blocks.29.attn.q_norm.weight": (128,),
        "final_layer.norm.weight": (2048,), "base_final_layer.linear.weight": (1024, 1440),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "blocks.27.adaln_modulation.1.weight" not in state and "pos_embed" not in state


def test_initialisation():
    """Predicted data are 0 at first, of both heads; learnt vectors have the standard deviation 1 / sqrt(width)."""
    torch.manual_seed(0)
    model = RAEDiTModel(**{**CONFIG, "hidden_size": 512, "num_attention_heads": 8})
    x, t, y = inputs()
    with torch.no_grad():
        out = model(x, t, y)
    expected = x / t.view(-1, 1, 1, 1)
    assert torch.equal(out.sample, expected) and torch.equal(out.base_sample, expected)
    for embedder in (model.t_embedder, model.ctx_embedder):
        assert embedder.learnable_tokens.detach().std() == pytest.approx(512**-0.5, rel=0.05)
    assert model.label_table.weight.detach().std() == pytest.approx(0.02, rel=0.05)


def test_small_times_are_divided_by_the_least_one():
    """The velocity is (x - data) / max(t, 0.05), and its target likewise."""
    x, _, y = inputs()
    t, model = torch.tensor([0.02, 0.4]), build()
    with torch.no_grad():
        data, velocity = build(prediction="velocity")(x, t, y).sample, model(x, t, y).sample
    close(velocity[0], (x - data)[0] / 0.05)
    close(velocity[1], (x - data)[1] / 0.4)
    noise, clean = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t = interpolate(clean, noise, t)
    expected = (x_t - clean) / t.clamp_min(0.05).view(-1, 1, 1, 1)
    close(velocity_target(clean, noise, t, "data"), expected)
    assert torch.equal(velocity_target(clean, noise, t, "velocity"), noise - clean)
    out = model(x_t, t, y)
    losses = [(part - expected).square().flatten(1).mean(1) for part in (out.sample, out.base_sample)]
    close(prediction_loss(out, velocity_target(clean, noise, t, "data")), (losses[0] + losses[1]).detach(), atol=1e-3)
    out.base_sample = None
    close(prediction_loss(out, velocity_target(clean, noise, t, "data")), losses[0].detach(), atol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_class_tokens": None}, r"both or none of num_time_tokens, num_class_tokens, got \(4, None\)"),
        ({"num_time_tokens": 0}, "num_time_tokens: expected a whole number of at least 1, got 0"),
        ({"base_num_layers": 4}, r"base_num_layers: .*at most num_layers \(3\) with them, got 4"),
        ({"num_time_tokens": None, "num_class_tokens": None}, "base_num_layers: expected nothing without num_time"),
        ({name: None for name in CONFIG if name.startswith("head")}, "num_time_tokens: expected none without a head"),
        ({"use_qk_norm": False}, "use_qk_norm: expected true with num_time_tokens, as in RAEv2, got False"),
        ({"use_pos_embed": True}, "use_pos_embed: expected false with num_time_tokens"),
        ({"use_swiglu": False}, "use_swiglu: expected true"),
        ({"prediction": "noise"}, "prediction: expected velocity or data, got 'noise'"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RAEDiTModel(**{**CONFIG, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(dtype, tmp_path):
    """Bit for bit; cast to 16 bits, learnt vectors and tables stay in float32, and the output stays close."""
    model = build()
    model.save_pretrained(tmp_path)
    loaded = RAEDiTModel.from_pretrained(tmp_path, torch_dtype=dtype)
    cast = build().to(dtype).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(FLOAT32) else dtype), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)) and torch.equal(tensor, cast[name]), name
    with torch.no_grad():
        found, expected = loaded(*inputs()), model(*inputs())
    for name in ("sample", "base_sample"):
        assert (found[name] - expected[name]).norm() <= (2e-2 if dtype == torch.bfloat16 else 0) * expected[name].norm()


def test_without_base_head():
    model = build(base_num_layers=None)
    assert not model.has_base_head and not any("base" in name for name in model.state_dict())
    out = model(*inputs())
    assert out.base_sample is None and len(model(*inputs(), return_dict=False)) == 1


def test_tables_are_computed_where_an_average_lacks_them():
    model = build()
    state = {name: p.detach() for name, p in model.named_parameters()}
    assert same(model_from_state(dict(model.config), state).state_dict(), dict(model.state_dict()))


def gradients(model: RAEDiTModel, network=None) -> dict:
    model.zero_grad()
    prediction_loss((model if network is None else network)(*inputs()), inputs()[0]).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_and_compilation():
    """The same gradients, from blocks that run twice and from one graph."""
    model = build()
    expected = gradients(model)
    compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(compiled[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: calls.append(1))
    model.enable_gradient_checkpointing()
    assert same(gradients(model), expected) and len(calls) == 2 * len(model.blocks)


# The published checkpoint ---------------------------------------------------------------------------------------------


def convert(target, path, output, *arguments, check=True):
    line = ("--to", target, "--input", path, "--output", output, *arguments)
    return run_command("scripts/convert_checkpoint.py", *line, check=check)


def test_the_published_checkpoint_draws_with_one_command(parts, tmp_path):
    """Its averaged weights and sizes from the tensors, as a pipeline that draws as the published sampling config does;
    and back, under the same names."""
    model, rae_folder = fill(tiny_dit(**{**TOKENS, "num_class_tokens": 3})), tmp_path / "rae"
    parts["rae"].save_pretrained(rae_folder)
    raw = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"step": 9, "epoch": 1, "model": raw, "ema": model.state_dict(), "optimizer": {}}, tmp_path / "c.pt")
    line = ("dit", tmp_path / "c.pt", tmp_path / "dit", "--rae", rae_folder, "--base_num_layers")
    done = convert(*line, 2)
    assert "averaged weights" in done.stdout and "after 2 blocks" in done.stdout
    found = load_pipeline_parts(str(tmp_path / "dit"), "--model")[0]
    names = (*CONFIG, *TOKENS)
    assert {name: found.config[name] for name in names} == {name: model.config[name] for name in names}
    assert same(dict(found.state_dict()), dict(model.state_dict()))
    preset = read_yaml(ROOT / "configs/raev2_dinov3_l_k7.yaml")["sampling"]
    index = read_yaml(tmp_path / "dit/model_index.json")
    assert preset.pop("guidance_interval") == [index["guidance_start"], index["guidance_end"]] == [0.1, 1.0]
    assert {name: index[name] for name in preset} == preset
    convert("published", tmp_path / "dit", tmp_path / "back")
    written = torch.load(tmp_path / "back/stage2_model.pt", weights_only=True)
    assert same(written, dict(model.state_dict()))
    params = yaml.safe_load((tmp_path / "back/stage2_params.yaml").read_text())
    assert params["class"] == "DiTwDDTHeadIG" and params["params"]["base_model_depth"] == 2
    assert params["params"]["cond_arch"] == {"num_t_tokens": 4, "num_c_tokens": 3}
    refused = convert("dit", tmp_path / "c.pt", tmp_path / "other", check=False)  # eight blocks, as published
    assert "base_num_layers: expected nothing without" in error_line(refused.stderr)


def test_the_published_sizes_follow_from_the_tensors():
    """Without a base head, and whatever the base head's place is asked to be, too."""
    with torch.device("meta"):
        states = {kind: RAEDiTModel(**{**RAEV2, **changes}).state_dict()
                  for kind, changes in {"whole": {}, "without": {"base_num_layers": None}}.items()}  # fmt: skip
    config, notes = config_of_tensors(states["whole"], "the file", PublishedDiTOptions(), "--input", "--")
    assert {name: config[name] for name in RAEV2} == RAEV2 and "1001 rows: 1000 classes" in notes[0]
    config, _ = config_of_tensors(states["without"], "the file", PublishedDiTOptions(), "--input", "--")
    assert "base_num_layers" not in config
    with pytest.raises(ConfigError, match="--base_num_layers: the file has no base head, got 3"):
        config_of_tensors(states["without"], "the file", PublishedDiTOptions(base_num_layers=3), "--input", "--")


# Sampling -------------------------------------------------------------------------------------------------------------


def test_internal_guidance():
    """base + scale (full - base) inside the interval, the full prediction outside, from one pass of the batch."""
    model, (x, _, y), seen = build(), inputs(), []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    with torch.no_grad():
        out = model(x, torch.full((2,), 0.5), y)
        found = internal_velocity(model, x, torch.tensor(0.5), y, 1.78, (0.1, 1.0))
        outside = internal_velocity(model, x, torch.tensor(0.5), y, 1.78, (0.6, 1.0))
        plain = predict_velocity(model, x, torch.tensor(0.5), y)
    assert torch.equal(found, out.base_sample + 1.78 * (out.sample - out.base_sample)) and seen == [2] * 4
    assert torch.equal(outside, out.sample) and torch.equal(plain, out.sample) and not torch.allclose(found, plain)


@pytest.fixture(scope="module")
def parts() -> dict:
    tokens = {**TOKENS, "num_time_tokens": 2, "num_class_tokens": 3, "base_num_layers": 1}
    return {"transformer": tiny_dit(**tokens), "rae": tiny_rae(use_latent_stats=True).eval(), "guide": tiny_dit(1)}


@pytest.mark.parametrize("kind", ["internal", "labels", "guide"])
def test_pipeline_and_scripts_draw_the_same(parts, kind):
    """With a base head the guidance is internal unless there is a guide, or it is switched off."""
    model, weak = parts["transformer"], parts["guide"] if kind == "guide" else None
    sampling = SamplingConfig(6, "zero", "euler", 1.78, (0.1, 0.9), "off" if kind == "labels" else None)
    noise, labels = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 7])
    times, passes = sampling_times(6, 2.5, "zero"), {"internal": (6, 0), "labels": (12, 0), "guide": (6, 6)}[kind]
    with torch.no_grad():
        found = draw_latents(model, labels, noise, sampling, 2.5, weak)

    @torch.no_grad()
    def velocity(x, t):
        batch = torch.full((2,), float(t))
        full = model(x, batch, labels)
        null = torch.full_like(labels, model.null_label)
        weaker = {"internal": lambda: full.base_sample, "labels": lambda: model(x, batch, null).sample,
                  "guide": lambda: weak(x, batch, labels).sample}[kind]()  # fmt: skip
        return guide(weaker, full.sample, 1.78) if 0.1 <= t <= 0.9 else full.sample

    torch.testing.assert_close(found, sample_ode(velocity, noise, times), rtol=1e-5, atol=1e-5)
    options = {"num_inference_steps": 6, "end": "zero", "guidance_scale": 1.78, "guidance_start": 0.1}
    options |= {"guidance_end": 0.9, "internal_guidance": kind != "labels"}
    pipe = RAEDiTPipeline(model, parts["rae"], FlowMatchEulerDiscreteScheduler(shift=2.5), weak, **options)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(labels, latents=noise, output_type="latent").images, found)
    if kind == "labels":
        other = pipe(labels, latents=noise, output_type="latent", internal_guidance=True).images
        assert not torch.allclose(other, found)
    always = SamplingConfig(6, "zero", guidance_scale=1.78)
    words = {"internal": "internal guidance", "labels": "classifier-free guidance", "guide": "autoguidance"}[kind]
    assert tuple(count_passes(always, 2.5, words).values()) == passes


def test_sampling_command(parts, tmp_path):
    """A saved pipeline keeps how it is guided; sample_dit.py says it; the two kinds are sets of their own."""
    folder = tmp_path / "model"
    settings = {"guidance_scale": 1.78, "guidance_interval": (0.1, 1.0), "end": "zero", "guide": "off"}
    save_pipeline(folder, parts["transformer"], parts["rae"], sampling={**settings, "num_inference_steps": 3})
    pipe = RAEDiTPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipe.config.internal_guidance is False and same(
        dict(pipe.transformer.state_dict()), dict(parts["transformer"].state_dict())
    )
    line = {"model": folder, "num_samples": 2, "num_inference_steps": 3, "guidance_scale": 1.78, "end": "zero"}
    done = run_command("sample_dit.py", *flags({**line, "output_dir": tmp_path / "a"}))
    assert "3 points in time, 3 euler steps, internal guidance 1.78 at times 0 to 1" in done.stdout
    assert read_yaml(tmp_path / "a/results.json")["passes_per_image"] == {"model": 3, "guide": 0}
    done = run_command("sample_dit.py", *flags({**line, "output_dir": tmp_path / "a", "guide": "off"}), check=False)
    assert done.returncode == 2 and "internal_guidance" in error_line(done.stderr)
    done = run_command("sample_dit.py", *flags({**line, "output_dir": tmp_path / "b", "guide": "off"}))
    assert "classifier-free guidance 1.78" in done.stdout
    assert read_yaml(tmp_path / "b/results.json")["passes_per_image"] == {"model": 6, "guide": 0}


# Training -------------------------------------------------------------------------------------------------------------


def test_a_run(rae, images, tmp_path):  # noqa: F811
    """train_dit.py trains it with both optimizers' share, evaluates and exports it; a run of 2 and 2 steps has the bits
    of one of 4; another starts from it."""
    settings = {**TINY, **MODEL, **GUIDED, "eval.metrics": "[loss]"}
    done = train(rae, images, tmp_path / "whole", settings)
    train(rae, images, tmp_path / "parts", settings, **{"train.max_steps": 2})
    assert "continuing from" in train(rae, images, tmp_path / "parts", settings).stdout
    assert "DiT-DH" in done.stdout and same(*(checkpoint_state(tmp_path / name) for name in ("whole", "parts")))
    lines = read_metrics(tmp_path / "whole")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    # a new model's data are 0: each head's first loss is the mean of ((data - 0) / t)^2, which is above the variance
    assert len(losses) == 4 and losses[0] > 2.0 and all(math.isfinite(loss) for loss in losses)
    model = load_pipeline_parts(str(tmp_path / "whole/final"), "model")[0]
    assert model.has_base_head and model.config.prediction == "data"
    index = read_yaml(tmp_path / "whole/final/model_index.json")
    assert index["guidance_scale"] == 1.78 and index["end"] == "zero"
    state = load_file(tmp_path / "whole/final/transformer/diffusion_pytorch_model.safetensors")
    ema = checkpoint_state(tmp_path / "whole")["ema"]
    assert all(torch.equal(state[name], ema[name]) for name in ema)
    assert ema["base_final_layer.linear.weight"].any()  # it has learnt
    raw, _, _ = load_pipeline_parts(str(tmp_path / "whole/checkpoints/step-00000004"), "model", "raw")
    assert same(dict(raw.named_parameters()), {n: checkpoint_state(tmp_path / "whole")["model"][n] for n in ema})
    start = {"model.init_from": tmp_path / "whole", "optimizer.lr": 1e-20, "train.max_steps": 1}
    train(
        rae,
        images,
        tmp_path / "next",
        {**PLAIN, **MODEL, **start},
        **{"model.class_names": "[class_0,class_1,class_2,class_3,new]"},
    )
    again = checkpoint_state(tmp_path / "next")["model"]
    assert len(again["ctx_embedder.embedding_table.weight"]) == 6
    torch.testing.assert_close(again["blocks.0.attn.q.weight"], ema["blocks.0.attn.q.weight"])
    done = train(rae, images, tmp_path / "adaptive", {**PLAIN, **start}, check=False)
    assert "is of another architecture" in error_line(done.stderr)


def test_preset():
    """The published values."""
    config = parse_config(["--config", "configs/raev2_dinov3_l_k7.yaml", "--model.rae", "x"])
    model = {name: getattr(config.model, name) for name in RAEV2 if name != "in_channels"}
    assert model == {name: value for name, value in RAEV2.items() if name != "in_channels"}
    assert config.sampling == SamplingConfig(100, "zero", "euler", 1.78, (0.1, 1.0))
    assert config.optimizer.type == "muon" and config.optimizer.momentum == 0.95 and config.ema.decay == 0.9995
    schedule = config.lr_schedule
    assert (schedule.warmup_epochs, schedule.decay_end_epoch, schedule.final_lr) == (25, 50, 2e-5)
    assert "--config configs/raev2_dinov3_l_k7.yaml" in open("configs/raev2_dinov3_l_k7.yaml").read()
