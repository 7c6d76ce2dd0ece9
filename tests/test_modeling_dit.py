"""modeling_dit.py with tiny networks: check numbers, switches, precision, files, compiling and sharding. Seconds on a
CPU."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

import modeling_dit
from modeling_dit import (
    PUBLISHED_HEAD,
    SIZES,
    RAEDiTModel,
    cfg_velocity,
    config_from_published,
    config_to_published,
    position_table,
    predict_velocity,
    rotary_table,
    sample_ode,
    sampling_times,
)

BASE = dict(sample_size=4, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=10)
DH = {**BASE, "head_hidden_size": 64, "head_num_layers": 1, "head_num_attention_heads": 4}
CONSTANTS = ("pos_embed", "t_embedder.W", "freqs_cos", "freqs_sin")
PUBLISHED = dict(
    kind="DiTwDDTHead",
    input_size=4,
    in_channels=4,
    patch_size=1,
    hidden_size=[32, 64],
    depth=[2, 1],
    num_heads=[2, 4],
    mlp_ratio=4.0,
    num_classes=10,
    class_dropout_prob=0.1,
    use_qknorm=False,
    use_swiglu=True,
    use_rmsnorm=True,
    use_rope=True,
    use_pos_embed=True,
    wo_shift=False,
)


@torch.no_grad()
def fill(model: RAEDiTModel) -> RAEDiTModel:
    """The weights of the check numbers: sines whose phase is the tensor's place in the sorted state dict."""
    state = model.state_dict()
    for j, name in enumerate(sorted(state)):
        tensor = state[name]
        if name == "pos_embed" or "feat_rope" in name:
            continue
        values = 0.1 * torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + j)
        values = 10 * values if name == "t_embedder.W" else values + 1 if "norm" in name else values
        tensor.copy_(values.view(tensor.shape))
    return model


def build(config: dict = DH, **changes) -> RAEDiTModel:
    return fill(RAEDiTModel(**{**config, **changes})).eval()


def inputs(model: RAEDiTModel) -> tuple:
    c, s = model.config.in_channels, model.config.sample_size
    x = torch.sin(0.11 * torch.arange(2 * c * s * s)).view(2, c, s, s)
    return x, torch.tensor([0.25, 0.8]), torch.tensor([3, 10])


def close(value, expected, atol=1e-5):
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=0, atol=atol)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, tensors, parameters, first, last, mean, mean_abs",
    [
        (
            DH, 58, 142_572,
            [2.381883, 2.373406, 2.367257, 2.348340], [-3.655703, -3.653957, -3.627138, -3.577642],
            -0.052224, 2.683492,
        ),
        (
            {**DH, "use_qk_norm": True}, 64, 142_668,
            [2.603671, 2.560790, 2.526189, 2.498631], [-3.311833, -3.307796, -3.287255, -3.230518],
            -0.061382, 2.625157,
        ),
        (
            {**DH, "hidden_size": 64}, 56, None,
            [-2.922743, -2.734579, -2.613115, -2.582819], [-0.793526, -0.740335, -0.707884, -0.690538],
            0.165988, 1.916094,
        ),
        (
            BASE, 40, None,
            [1.070425, 0.899389, 0.722866, 0.654407], [-0.546222, -0.293218, -0.051675, 0.016241],
            0.361713, 0.562250,
        ),
    ],
    ids=["DiT-DH", "with qk norm", "of one width", "DiT"],
)  # fmt: skip
def test_check_numbers(config, tensors, parameters, first, last, mean, mean_abs):
    """Of the published code in float32 on a CPU."""
    model = build(config)
    assert len(model.state_dict()) == tensors
    assert parameters in (None, sum(parameter.numel() for parameter in model.parameters()))
    with torch.no_grad():
        out = model(*inputs(model)).sample
    close(out[0, 0, 0], first)
    close(out[1, 3, 3], last)
    close(out.mean(), mean)
    close(out.abs().mean(), mean_abs)


def test_check_numbers_of_guidance():
    """Both halves of the doubled batch are image 0."""
    model = build()
    x, t, y = (tensor[:1] for tensor in inputs(model))
    with torch.no_grad():
        out = cfg_velocity(model, x, t[0], y, model.null_label, 1.5)
    close(out[0, 0, 0], [2.382232, 2.373625, 2.367364, 2.348389])


def test_check_numbers_of_tables():
    """Token 6 of a 4 x 4 grid: row 1, column 2."""
    table = position_table(8, 4)
    assert table.shape == (1, 16, 8) and table.dtype == torch.float32
    close(table[0, 6], [0.909297, 0.019999, -0.416147, 0.999800, 0.841471, 0.010000, 0.540302, 0.999950])
    cos, sin = rotary_table(8, 4)
    close(cos[6], [0.540302, 0.540302, 0.999950, 0.999950, -0.416147, -0.416147, 0.999800, 0.999800])
    close(cos**2 + sin**2, torch.ones(16, 8))


@pytest.mark.parametrize(
    "name, plain, with_head",
    [
        ("S", 33.65, 196.46),
        ("B", 131.88, 294.30),
        ("L", 459.92, 621.74),
        ("XL", 677.25, 838.68),
        ("XXL", 953.6, 1114.6),
        ("H", 1372.0, 1531.9),
        ("G", None, None),
        ("T", None, None),
    ],
)
def test_sizes(name, plain, with_head):
    """Millions of parameters of every named size, for latents 768 x 16 x 16; all of them can be built."""
    with torch.device("meta"):
        for config, expected in ((SIZES[name], plain), ({**SIZES[name], **PUBLISHED_HEAD}, with_head)):
            parameters = sum(parameter.numel() for parameter in RAEDiTModel(**config).parameters())
            assert expected is None or round(parameters / 1e6, len(f"{expected}".partition(".")[2])) == expected


@pytest.mark.parametrize("config", [DH, BASE])
def test_new_model_predicts_zero(config):
    """So the first loss is 1 + mean(data^2)."""
    torch.manual_seed(0)
    model = RAEDiTModel(**config)
    assert not model(*inputs(model)).sample.any()


# Switches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DH, BASE])
@pytest.mark.parametrize(
    "changes, present, absent",
    [
        ({"use_rope": False}, "pos_embed", "feat_rope"),
        ({"use_pos_embed": False}, "feat_rope", "pos_embed"),
        ({"use_swiglu": False}, "mlp.fc2.bias", "mlp.w12"),
        ({"use_rms_norm": False}, "mlp.w12", "norm"),
        ({"use_rms_norm": False, "use_qk_norm": True}, "attn.q_norm.bias", "norm1"),
        ({"use_qk_norm": True}, "attn.k_norm.weight", "k_norm.bias"),
        ({"mlp_ratio": 2.5}, "mlp.w3", "mlp.fc1"),
    ],
)
def test_switches(config, changes, present, absent):
    """Each changes the output and the names in files; every trained parameter gets a gradient."""
    model = build(config, **changes)
    names = "\n".join(model.state_dict())
    assert present in names and absent not in names
    out = model(*inputs(model)).sample
    assert out.shape == (2, 4, 4, 4) and not torch.allclose(out, build(config)(*inputs(model)).sample)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        constant = name in ("pos_embed", "t_embedder.W")
        assert (parameter.grad is None) == constant == (not parameter.requires_grad), name
        assert constant or parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("config", [DH, BASE])
def test_constants_can_be_trained(config):
    """The position table and the Fourier frequencies; their gradients are right along a random direction."""
    model = build(config, train_constants=True)
    model(*inputs(model)).sample.sum().backward()
    for parameter in (model.pos_embed, model.t_embedder.W):
        direction = 1e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        outputs = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * direction
                outputs.append(model(*inputs(model)).sample.double().sum())
                parameter -= sign * direction
        torch.testing.assert_close(
            (outputs[0] - outputs[1]) / 2, (parameter.grad * direction).sum().double(), rtol=2e-2, atol=1e-4
        )


def test_patches_of_a_plain_dit():
    """Token (i, j) sees and predicts the patch at (i p, j p); its values are ordered row, column, channel."""
    model = build(BASE, sample_size=6, patch_size=2)
    x, t, y = inputs(model)
    assert model.pos_embed.shape == (1, 9, 32) and model(x, t, y).sample.shape == (2, 4, 6, 6)
    with torch.no_grad():
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(torch.arange(16.0))
        out = model(x, t, y).sample
    expected = torch.arange(16.0).view(2, 2, 4).permute(2, 0, 1).repeat(1, 3, 3)  # (C, p, p) -> (C, h, w)
    assert torch.equal(out, expected.expand(2, -1, -1, -1))
    tokens = model.x_embedder(x)
    other = x.clone()
    other[:, :, 2:4, 4:6] += 1
    changed = (model.x_embedder(other) != tokens).any(dim=2).any(dim=0)
    assert changed.tolist() == [i == 5 for i in range(9)]  # row 1, column 2


def test_null_label():
    """A row of its own in the label table, unless labels are never dropped."""
    model = build()
    assert model.null_label == 10 and model.y_embedder.embedding_table.num_embeddings == 11
    without = build(class_dropout_prob=0.0)
    assert without.y_embedder.embedding_table.num_embeddings == 10
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        without.null_label  # noqa: B018
    x, t, _ = inputs(model)
    with torch.no_grad():
        null, label = (model(x, t, torch.full((2,), y)).sample for y in (model.null_label, 3))
    assert not torch.allclose(null, label)


def test_results_are_an_object_or_a_tuple():
    model = build()
    out = model(*inputs(model))
    assert torch.equal(model(*inputs(model), return_dict=False)[0], out.sample) and torch.equal(out[0], out.sample)


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_num_layers": None}, "all or none.*head_num_layers.*None"),
        ({"head_hidden_size": None}, "all or none.*head_num_layers.*1"),
        ({"hidden_size": 30}, "hidden_size.*30.*4"),
        ({"hidden_size": 36, "num_attention_heads": 5}, r"hidden_size \(36\).*num_attention_heads \(5\)"),
        ({"hidden_size": 36}, "18.*multiple of 4"),
        ({"head_num_attention_heads": 3}, r"head_hidden_size \(64\).*head_num_attention_heads \(3\)"),
        ({"head_hidden_size": 40}, "10.*multiple of 4"),
        ({"patch_size": 2}, "patch_size: expected 1.*got 2"),
        ({"patch_size": 3}, r"sample_size \(4\).*patch_size \(3\)"),
        ({"num_layers": 0}, "num_layers.*at least 1, got 0"),
        ({"in_channels": 4.0}, "in_channels.*whole number.*got 4.0"),
        ({"head_num_layers": -1}, "head_num_layers.*at least 1, got -1"),
        ({"mlp_ratio": 0}, "mlp_ratio.*got 0"),
        ({"mlp_ratio": "4"}, "mlp_ratio.*got '4'"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob.*0 to 1, got 1.5"),
        ({"use_rope": "yes"}, "use_rope.*true or false.*'yes'"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    """With the field's name and both numbers, before anything is built."""
    with pytest.raises(ValueError, match=message):
        RAEDiTModel(**{**DH, **changes})


def test_published_configs():
    """There and back, for both classes; `use_pos_embed` may be left out of DiT-DH's."""
    config = config_from_published(PUBLISHED)
    model = RAEDiTModel(**config)
    assert {key: model.config[key] for key in DH} == DH and config_to_published(model.config) == PUBLISHED
    assert config_from_published({k: v for k, v in PUBLISHED.items() if k != "use_pos_embed"}) == config
    plain = {k: v for k, v in PUBLISHED.items() if k != "use_pos_embed"}
    plain.update(kind="LightningDiT", hidden_size=32, depth=2, num_heads=2, patch_size=2, use_qknorm=True)
    model = RAEDiTModel(**config_from_published({**plain, "learn_sigma": False}))
    assert not model.has_head and model.config.use_qk_norm and config_to_published(model.config) == plain


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "DiT"}, "DiTwDDTHead or LightningDiT.*'DiT'"),
        ({"wo_shift": True}, "wo_shift: expected false"),
        ({"learn_sigma": True}, "learn_sigma: expected false"),
        ({"depths": 3}, r"unknown keys \['depths'\]"),
        ({"hidden_size": 32}, "hidden_size: expected two numbers.*got 32"),
        ({"kind": "LightningDiT"}, r"unknown keys \['use_pos_embed'\]"),
    ],
)
def test_wrong_published_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_published({**PUBLISHED, **changes})


def test_what_published_classes_cannot_express():
    with pytest.raises(ValueError, match=r"missing keys \['depth'\]"):
        config_from_published({k: v for k, v in PUBLISHED.items() if k != "depth"})
    with pytest.raises(ValueError, match="use_pos_embed"):
        config_to_published(build(BASE, use_pos_embed=False).config)
    with pytest.raises(ValueError, match="prediction: expected velocity, as of DiTwDDTHead and LightningDiT, got data"):
        config_to_published(build(BASE, prediction="data").config)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.zeros(2, 5, 4, 4), r"hidden_states.*\(B, 4, 4, 4\).*\(2, 5, 4, 4\)"),
        (0, torch.zeros(2, 4, 8, 8), r"\(B, 4, 4, 4\).*\(2, 4, 8, 8\)"),
        (0, torch.zeros(4, 4, 4), r"\(B, 4, 4, 4\).*\(4, 4, 4\)"),
        (1, torch.tensor(0.5), r"timestep.*\(2,\).*\(\)"),
        (1, torch.zeros(3), r"timestep.*\(2,\).*\(3,\)"),
        (1, torch.tensor([1, 2]), "timestep.*floats.*int64"),
        (2, torch.tensor([1]), r"class_labels.*\(2,\).*\(1,\)"),
        (2, torch.zeros(2), "class_labels.*integers.*float32"),
    ],
)
def test_wrong_inputs_are_refused(place, value, message):
    model = build()
    arguments = list(inputs(model))
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        model(*arguments)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DH, BASE])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, "auto"])
@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(config, device_map, argument, dtype, tmp_path):
    """Bit for bit, and once more from what was loaded; random numbers stay where they were."""
    model = build(config, train_constants=True)
    model.save_pretrained(tmp_path / "a")
    state = torch.get_rng_state()
    loaded = RAEDiTModel.from_pretrained(tmp_path / "a", device_map=device_map, **{argument: dtype})
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.dtype == dtype and not loaded.training and loaded.pos_embed.requires_grad
    assert loaded.config.head_hidden_size == model.config.head_hidden_size
    for name, tensor in loaded.state_dict().items():
        kept = dtype == torch.float32 or name.endswith(CONSTANTS)
        assert tensor.dtype == (torch.float32 if kept else dtype), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    loaded.save_pretrained(tmp_path / "b")
    again = RAEDiTModel.from_pretrained(tmp_path / "b", torch_dtype=dtype)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(*inputs(again)).sample, loaded(*inputs(loaded)).sample)


def test_frozen_constants_stay_frozen(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = RAEDiTModel.from_pretrained(tmp_path)
    assert not loaded.pos_embed.requires_grad and not loaded.t_embedder.W.requires_grad
    assert loaded.blocks[0].attn.qkv.weight.requires_grad


def test_sharded_files_and_offloading(tmp_path):
    """Several files, with blocks that are read from disk when their turn comes."""
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    device_map = {name: "cpu" for name in ("pos_embed", *(name for name, _ in model.named_children()))}
    del device_map["blocks"]
    device_map.update({"blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"})
    loaded = RAEDiTModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    with torch.no_grad():
        assert torch.equal(loaded(*inputs(model)).sample, model(*inputs(model)).sample)


def test_loading_is_strict(tmp_path):
    """Missing, unexpected and misshapen weights are errors; diffusers itself leaves missing ones empty."""
    model = build()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    assert state.keys() == model.state_dict().keys()
    for changed, message in (
        ({k: v for k, v in state.items() if k != "s_projector.bias"}, "1 missing keys.*s_projector.bias"),
        ({**state, "blocks.3.norm1.weight": torch.ones(2)}, "1 unexpected keys.*blocks.3.norm1.weight"),
        ({**state, "s_projector.bias": torch.ones(2)}, "s_projector.bias"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            RAEDiTModel.from_pretrained(tmp_path)
    save_file(state, file)
    loaded, info = RAEDiTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(loaded, RAEDiTModel)


def test_config_file_is_checked(tmp_path):
    """A damaged one is an error with the field's name."""
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(ValueError, match=r"hidden_size \(32\).*num_attention_heads \(3\)"):
        RAEDiTModel.from_pretrained(tmp_path)


def test_file_is_self_contained():
    """It travels to the Hub: no imports but torch, diffusers and the standard library."""
    roots = set()
    for node in ast.walk(ast.parse(Path(modeling_dit.__file__).read_text())):
        if isinstance(node, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.partition(".")[0])
    assert {"torch", "diffusers"} <= roots and roots - {"torch", "diffusers"} <= set(sys.stdlib_module_names)


# Precision ------------------------------------------------------------------------------------------------------------


def outputs_of(model: RAEDiTModel, *names: str) -> dict:
    """Outputs of submodules, filled by the next forward pass."""
    found = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: found.update({name: output}))
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [DH, BASE])
def test_16_bit_models_round_what_the_published_code_rounds(config, autocast, tmp_path):
    """The Fourier features are those of float32; the backbone's residual stream is float32 and the head's 16 bits; time
    embedding and output are 16 bits. With bfloat16 weights and under autocast alike."""
    model = build(config)
    expected = model(*inputs(model)).sample.detach()
    features, references = [], []
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda m, arguments: references.append(arguments[0]))
    model(*inputs(model))
    model.save_pretrained(tmp_path)
    low = RAEDiTModel.from_pretrained(tmp_path, torch_dtype=torch.float32 if autocast else torch.bfloat16)
    low.t_embedder.mlp[0].register_forward_pre_hook(lambda m, arguments: features.append(arguments[0]))
    seen = outputs_of(low, "t_embedder", "blocks.1", *(["blocks.2", "s_projector"] if low.has_head else []))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = low(*inputs(low)).sample
    assert torch.equal(features[0], references[0])
    assert seen["t_embedder"].dtype == out.dtype == torch.bfloat16 and seen["blocks.1"].dtype == torch.float32
    if low.has_head:
        assert seen["s_projector"].dtype == seen["blocks.2"].dtype == torch.bfloat16
    assert (out - expected).norm() < 2e-2 * expected.norm()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [DH, BASE])
def test_cast_models_keep_their_constants(config, tmp_path, caplog):
    """`.to(torch.bfloat16)`, `.bfloat16()` and loading in bfloat16 are the same model, constants in float32; casting
    back and to float64 work; nothing warns."""
    model = build(config)
    model.save_pretrained(tmp_path)
    loaded = RAEDiTModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        expected = loaded(*inputs(loaded)).sample
    constants = [name for name in model.state_dict() if name.endswith(CONSTANTS)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    for low in (build(config).to(torch.bfloat16), build(config).bfloat16(), build(config).to("cpu", torch.bfloat16)):
        state = low.state_dict()
        assert all(torch.equal(state[name], model.state_dict()[name]) for name in constants)
        assert all(state[name].dtype == torch.bfloat16 for name in state if name not in constants)
        assert low.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(low(*inputs(low)).sample, expected)
        assert {tensor.dtype for tensor in low.float().state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in low.double().state_dict().values()} == {torch.float64}
    logging.disable_propagation()
    logging.set_verbosity(verbosity)
    assert caplog.text == ""


def test_16_bit_sampling_keeps_its_state_in_float32(tmp_path):
    """A run with a bfloat16 model stays close to the float32 run."""
    model = build()
    model.save_pretrained(tmp_path)
    low = RAEDiTModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    noise, labels = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 5])
    finals = [
        sample_ode(lambda x, t, m=m: predict_velocity(m, x, t, labels), noise, sampling_times(10, 2.0))
        for m in (model, low)
    ]
    assert finals[1].dtype == torch.float32 and (finals[1] - finals[0]).norm() < 2e-2 * finals[0].norm()


def test_layerwise_casting():
    """Blocks stored in 8 bits compute in bfloat16; embeddings and norms keep their precision."""
    model = build()
    expected = model(*inputs(model)).sample.detach()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert model.t_embedder.mlp[0].weight.dtype == model.blocks[0].norm1.weight.dtype == torch.float32
    with torch.no_grad():
        out = model(*inputs(model)).sample
    assert (out - expected).norm() < 0.2 * expected.norm()


# Training and compiling -----------------------------------------------------------------------------------------------


def gradients(model: RAEDiTModel, network=None) -> dict:
    model.zero_grad()
    network = model if network is None else network
    network(*inputs(model)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("config", [DH, BASE])
def test_gradient_checkpointing(config):
    """The same gradients, from blocks that run twice."""
    model = build(config)
    expected = gradients(model)
    calls = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, arguments, i=i: calls.append(i))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(calls) == 2 * len(model.blocks)
    calls.clear()
    with torch.no_grad():
        model(*inputs(model))
    assert len(calls) == len(model.blocks)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("config", [DH, BASE])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_to_one_graph(config, checkpointing):
    """Without graph breaks, with the same gradients."""
    model = build(config)
    expected = gradients(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def test_blocks_compile_by_themselves():
    model = build()
    expected = model(*inputs(model)).sample
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    close(model(*inputs(model)).sample, expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shards_by_blocks(one_process):
    """FSDP2 with the blocks as units, where frozen and trained parameters share the root: the same gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    expected = gradients(model)
    mesh = init_device_mesh("cpu", (1,))
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(units) == 3
    for module in [*units, model]:
        fully_shard(module, mesh=mesh)
    found = gradients(model)
    assert all(torch.equal(found[name].full_tensor(), expected[name]) for name in expected)
