"""The method, number for number: every case under PARITY_DIR, through the functions that train_rae.py calls.

    PARITY_DIR=/some/cases pytest tests/test_parity.py -s

prints the margins: the largest deviation of each kind as a share of its tolerance.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from rae_suite.discriminator import DinoDiscriminator, diff_augment, load_backbone
from rae_suite.images import center_crop
from rae_suite.losses import DISCRIMINATOR_LOSSES
from rae_suite.rae_networks import build_rae_config
from rae_suite.settings import DataConfig, EMAConfig, LoggingConfig, LRScheduleConfig, OptimizerConfig, TrainConfig
from rae_suite.settings_rae import Config, EvalConfig, GANConfig, ModelConfig, PerceptualConfig
from train_rae import build_run, train_step

OWN_CASES = Path(__file__).resolve().parent / "parity"
PARITY_DIR = Path(os.environ.get("PARITY_DIR", OWN_CASES))
CASES = sorted(path.parent.name for path in PARITY_DIR.glob("cases/*/trace.json"))
UNITS = sorted(path.stem for path in PARITY_DIR.glob("discriminator_unit*.json"))

# relative tolerances of parity/README.md
STEP_TOLERANCES = {
    "recon": 1e-4,
    "lpips": 1e-4,
    "gan": 1e-3,
    "total": 1e-3,
    "adaptive_weight": 5e-3,
    "grad_norm": 5e-3,
}
DISC_TOLERANCES = {"disc_loss": 1e-3, "logits_real": 1e-3, "logits_fake": 1e-3}
ACCURACY_TOLERANCE = 5e-3  # absolute
NORM_TOLERANCE = 3e-3
NOISE = 1e-7  # gradients under it are rounding: biases whose effect the normalisation after them cancels


class Margins:
    """Collects deviations as shares of their tolerances; `check` fails when one is over 1."""

    def __init__(self):
        self.worst = {}

    def add(self, kind, deviation, tolerance, where=""):
        share = float(deviation) / tolerance
        if not share <= self.worst.get(kind, (-1.0, ""))[0]:  # nan counts as worse
            self.worst[kind] = (share, where)

    def number(self, kind, value, expected, tolerance, where=""):
        self.add(kind, abs(value - expected) / max(abs(expected), 1e-12), tolerance, where)

    def tensor(self, kind, value, expected, tolerance, where=""):
        assert value.shape == expected.shape, f"{kind} {where}: {tuple(value.shape)} and {tuple(expected.shape)}"
        value, norm = value.detach(), expected.norm()
        if norm < NOISE:  # rounding of a gradient that is zero: ours must be no more than that
            self.add(kind, 0 if value.norm() < NOISE else float("inf"), tolerance, where)
        else:
            self.add(kind, (value - expected).norm() / norm, tolerance, where)

    def check(self, title):
        print(f"\n{title}: " + ", ".join(f"{kind} {share:.2g}" for kind, (share, _) in self.worst.items()))
        assert self.worst, "nothing was compared"
        bad = {kind: worst for kind, worst in self.worst.items() if not worst[0] <= 1}
        assert not bad, f"{title}: deviation / tolerance over 1: {bad}"


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads meet the recorded numbers to the last bit: the order of sums in a convolution depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def case_config(case: dict, folder: Path, tmp_path: Path) -> Config:
    """A parity case's settings as a config of train_rae.py."""
    decoder, disc, schedule = case["decoder"], case["discriminator"], case["lr_schedule"]
    assert decoder["hidden_act"] == "gelu" and decoder["layer_norm_eps"] == 1e-12  # the decoder knows no others
    stats = None
    if case["latent_stats"]:
        expected = load_file(folder / "expected.safetensors")
        stats = str(tmp_path / "stats.safetensors")
        save_file({"mean": expected["latent_mean"], "var": expected["latent_var"]}, stats)
    optimizer = OptimizerConfig(
        lr=schedule["base_lr"],
        betas=tuple(case["optimizer"]["betas"]),
        eps=case["optimizer"]["eps"],
        weight_decay=case["optimizer"]["weight_decay"],
    )
    lr_schedule = LRScheduleConfig(
        type=schedule["type"],
        warmup_steps=schedule["warmup_steps"],
        warmup_from_zero=schedule["warmup_from_zero"],
        decay_end_step=schedule["decay_end_steps"],
        final_lr=schedule["final_lr"],
    )
    return Config(
        model=ModelConfig(
            encoder=str(PARITY_DIR / "encoders" / case["encoder"]),
            encoder_input_size=case["encoder_input_size"],
            image_size=case["image_size"],
            decoder_hidden_size=decoder["hidden_size"],
            decoder_num_hidden_layers=decoder["num_hidden_layers"],
            decoder_num_attention_heads=decoder["num_attention_heads"],
            decoder_intermediate_size=decoder["intermediate_size"],
            decoder_patch_size=decoder["patch_size"],
            noise_tau=case["noise_tau"],
            latent_stats=stats,
            train_position_embedding=case["train_position_embedding"],
        ),
        data=DataConfig(),
        train=TrainConfig(global_batch_size=case["batch_size"], clip_grad_norm=case["clip_grad_norm"] or None),
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        perceptual=PerceptualConfig(
            weight=case["perceptual_weight"], start_step=case["perceptual_start_step"], weights="random"
        ),
        gan=GANConfig(
            weight=disc["weight"],
            start_step=disc["start_step"],
            update_start_step=disc["update_start_step"],
            updates_per_step=disc["updates_per_step"],
            loss=disc["loss"],
            max_adaptive_weight=disc["max_adaptive_weight"],
            backbone=str(PARITY_DIR / "discriminator" / "hf_vit"),
            key_depths=tuple(disc["key_depths"]),
            kernel_size=disc["kernel_size"],
            norm=disc["norm"],
            norm_eps=disc["norm_eps"],
            spectral_norm=disc["spectral_norm"],
            augment_prob=disc["augment_prob"],
            optimizer=optimizer,
            lr_schedule=lr_schedule,
        ),
        ema=EMAConfig(decay=case["ema_decay"]),
        eval=EvalConfig(),
        logging=LoggingConfig(report_to=()),
    )


def load_heads(discriminator: DinoDiscriminator, heads: dict) -> None:
    result = discriminator.load_state_dict(heads, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("backbone.") for name in result.missing_keys)


def build_case(name, tmp_path, compiled=False, attention="eager"):
    """A parity case's run with its initial weights, its trace.json, images and expected tensors.

    Plain attention in the decoder has the published order of operations: its first reconstructions are then equal to
    the last bit, and no pixel falls on the other side of the rounding to 8 bit or of the L1 loss's kink."""
    folder = PARITY_DIR / "cases" / name
    trace = json.loads((folder / "trace.json").read_text())
    images, expected = load_file(folder / "images.safetensors"), load_file(folder / "expected.safetensors")
    config = case_config(trace["case"], folder, tmp_path)
    config.train.compile = compiled
    # steps_per_epoch is not used: the case gives all its times in steps
    run = build_run(config, Accelerator(cpu=True), build_rae_config(config.model), steps_per_epoch=1)
    run.model.config._attn_implementation = {"": attention, "encoder_config": "sdpa"}
    run.model.decoder.load_state_dict(load_file(folder / "decoder_init.safetensors"))
    run.ema.load_state_dict({n: p.detach().clone() for n, p in run.model.decoder.named_parameters()})
    load_heads(run.discriminator, load_file(folder / "discriminator_heads_init.safetensors"))
    return run, trace, images, expected


def outputs(run, images):
    """What the networks compute of images (B, 3, S, S) in [0, 1], in eval mode; names of expected.safetensors."""
    model = run.model.eval()
    with torch.no_grad():
        latent = model.encode(images, add_noise=False).latent
        sample = model.decode(latent).sample
        return {
            "latents": latent,
            "reconstruction": sample,
            "discriminator_logits": run.discriminator.eval()(2 * images - 1),
            "lpips": run.perceptual(2 * images - 1, 2 * sample - 1).flatten(),
        }


def test_cases_are_there():
    """A PARITY_DIR without cases must not pass as one whose cases agree."""
    assert CASES and UNITS, f"no cases under {PARITY_DIR}"


@pytest.fixture
def graphs_of(request):
    """How compiled graphs run here, without inductor's code, which takes minutes: as they were captured, or with its
    decompositions too. Forgets them afterwards."""
    with torch.compiler.set_stance(force_backend=request.param):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("graphs_of", ["eager"], indirect=True)
@pytest.mark.parametrize("compiled", [False, *([True] if PARITY_DIR.resolve() == OWN_CASES else [])])
@pytest.mark.parametrize("name", CASES)
def test_case(name, compiled, graphs_of, tmp_path):
    """A whole training run: losses of each step, the final weights, and what the networks compute before and after.
    Compiled, it is in the order of operations of the captured graphs, which is another only in the discriminator's
    heads: the numbers are chaotic (benchmarks/README.md), and other folders' cases may not bear even that. What
    inductor's decompositions change is looked at in float64, below."""
    run, trace, images, expected = build_case(name, tmp_path, compiled)
    margins = Margins()

    def compare_networks(prefix, names):
        found = outputs(run, images["eval"])
        for key in names:
            tolerance = 1e-3 if key == "reconstruction" else 1e-4
            margins.tensor(prefix + key, found[key], expected[prefix + key], tolerance)

    compare_networks("initial_", ("reconstruction", "discriminator_logits", "lpips"))
    for step in trace["steps"]:
        where = f"step {step['step']}"
        record = train_step(run, [images[f"step_{step['step']:02d}"]], step["step"]).read()
        record["total"] = record["loss"]
        assert record["nonfinite"] is None
        assert record["lr"] == step["lr"], f"{where}: lr {record['lr']!r} and {step['lr']!r}"
        for key, tolerance in STEP_TOLERANCES.items():
            margins.number(key, record[key], step[key], tolerance, where)
        assert (record["disc_loss"] is not None) == ("disc" in step), f"{where}: discriminator update"
        if "disc" in step:
            for key, tolerance in DISC_TOLERANCES.items():
                margins.number(key, record[key], step["disc"][-1][key], tolerance, where)
            accuracy = step["disc"][-1]["accuracy"]
            margins.add("accuracy", abs(record["accuracy"] - accuracy), ACCURACY_TOLERANCE, where)

    norms = {f"decoder.{n}": p for n, p in run.model.decoder.named_parameters()}
    norms |= {f"ema.{n}": p for n, p in run.ema.shadow.items()}
    norms |= {f"heads.{n}": t for n, t in run.discriminator.state_dict().items() if n.startswith("heads.")}
    assert norms.keys() == trace["final_norms"].keys()
    for key, norm in trace["final_norms"].items():
        if not key.endswith("attention.key.bias"):  # has no gradient but noise
            margins.number("final_norms", norms[key].detach().norm().item(), norm, NORM_TOLERANCE, key)
    compare_networks("", ("latents", "reconstruction", "discriminator_logits", "lpips"))
    with run.ema.applied():
        margins.tensor("ema_reconstruction", outputs(run, images["eval"])["reconstruction"],
                       expected["ema_reconstruction"], 1e-3)  # fmt: skip
    margins.check(f"{name}, compiled" if compiled else name)


@pytest.mark.parametrize("graphs_of", ["aot_eager_decomp_partition"], indirect=True)
@pytest.mark.parametrize("name", CASES[:1])
def test_optimisations_only_round(name, graphs_of, tmp_path):
    """Compiled with inductor's decompositions, with VGG16 on channels-last tensors as on GPUs, two steps in float64 are
    the steps without: what they change in float32 is rounding."""
    torch.set_num_threads(1)  # the order of sums does not matter here
    results = []
    for optimised in (False, True):
        run, trace, images, _ = build_case(name, tmp_path, optimised, "sdpa")
        layout = torch.channels_last if optimised else torch.contiguous_format
        for network in (run.model, run.discriminator, run.perceptual.to(memory_format=layout)):
            network.double()
        images = {key: image.double() for key, image in images.items()}
        steps = ([step for step in trace["steps"] if step["gan"] != 0] or trace["steps"])[:2]  # with every loss
        records = [train_step(run, [images[f"step_{s['step']:02d}"]], s["step"]).read() for s in steps]
        results.append((records, outputs(run, images["eval"])))
    (records, tensors), (optimised_records, optimised_tensors) = results
    assert all((records[-1][loss] != 0) == (steps[-1][loss] != 0) for loss in ("recon", "lpips", "gan"))
    for record, other in zip(records, optimised_records, strict=True):
        numbers = {key: value for key, value in record.items() if isinstance(value, float)}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)  # they are float32
    for key, tensor in tensors.items():
        torch.testing.assert_close(optimised_tensors[key], tensor, rtol=0, atol=1e-12 * tensor.norm().item())


@pytest.mark.parametrize("name", UNITS)
def test_discriminator_unit(name, tmp_path):
    """Features, logits, gradients and spectral-norm vectors of one discriminator with large weights."""
    settings = json.loads((PARITY_DIR / f"{name}.json").read_text())
    tensors = load_file(PARITY_DIR / f"{name}.safetensors")
    backbone = {k.removeprefix("backbone."): t for k, t in tensors.items() if k.startswith("backbone.")}
    save_file(backbone, tmp_path / "dino.safetensors")
    vit = load_backbone(str(tmp_path / "dino.safetensors"), num_attention_heads=settings["heads"])
    # plain attention has the published order of operations: with SDPA's, one activation of this case falls on the
    # other side of a LeakyReLU's kink
    vit.set_attn_implementation("eager")
    discriminator = DinoDiscriminator(
        vit,
        settings["key_depths"],
        settings["kernel_size"],
        settings["norm"],
        settings["norm_eps"],
        settings["spectral_norm"],
    )
    load_heads(discriminator, {k.removeprefix("initial."): t for k, t in tensors.items() if k.startswith("initial.")})
    margins = Margins()

    discriminator.eval()
    image = tensors["image"].clone().requires_grad_()
    for i, feature in enumerate(discriminator.backbone(image)):
        margins.tensor("features", feature, tensors[f"features.{i}"], 1e-4, str(i))
    logits = discriminator(image)
    margins.tensor("eval_logits", logits, tensors["eval_logits"], 1e-4)
    (logits * torch.linspace(-1, 1, logits.shape[1])).mean().backward()
    margins.tensor("eval_image_grad", image.grad, tensors["eval_image_grad"], 1e-4)
    vit.set_attn_implementation("sdpa")
    margins.tensor("eval_logits with SDPA", discriminator(image), tensors["eval_logits"], 1e-4)
    vit.set_attn_implementation("eager")

    discriminator.zero_grad()
    discriminator.train()
    first, second = discriminator(tensors["image"], tensors["other_image"])
    margins.tensor("train_logits", first, tensors["train_logits_first"], 1e-4, "first")
    margins.tensor("train_logits", second, tensors["train_logits_second"], 1e-4, "second")
    loss = DISCRIMINATOR_LOSSES[settings["loss"]](second, first)
    (recorded,) = (tensor for key, tensor in tensors.items() if key.endswith("_loss"))
    margins.number("loss", loss.item(), recorded.item(), 1e-4)
    loss.backward()
    for parameter_name, parameter in discriminator.heads.named_parameters():
        expected = tensors[f"grad.heads.{parameter_name}"]
        margins.tensor("head gradients", parameter.grad, expected, 1e-4, parameter_name)
    for buffer_name, buffer in discriminator.heads.named_buffers():
        expected = tensors[f"after_train.heads.{buffer_name}"]
        margins.tensor("spectral vectors", buffer, expected, 1e-4, buffer_name)
    margins.check(name)


def test_backbone_formats_agree():
    """The transformers folder and the file with timm's names are the same network."""
    folder = load_backbone(str(PARITY_DIR / "discriminator" / "hf_vit"))
    file = PARITY_DIR / "discriminator" / "dino_timm_names.safetensors"
    timm = load_backbone(str(file), num_attention_heads=folder.config.num_attention_heads)
    assert folder.config.to_diff_dict().keys() >= {"hidden_size"}
    assert folder.state_dict().keys() == timm.state_dict().keys()
    assert all(torch.equal(tensor, timm.state_dict()[name]) for name, tensor in folder.state_dict().items())


def test_diffaug():
    tensors = load_file(PARITY_DIR / "diffaug.safetensors")
    names = sorted(name.removesuffix(".input") for name in tensors if name.endswith(".input"))
    assert names
    for name in names:
        out = diff_augment(tensors[f"{name}.input"], tensors[f"{name}.uniforms"], cutout=float(name.split("_")[1]))
        torch.testing.assert_close(out, tensors[f"{name}.output"], rtol=1e-6, atol=1e-6)


def test_center_crop():
    image = Image.open(PARITY_DIR / "center_crop" / "input.png").convert("RGB")
    expected = sorted((PARITY_DIR / "center_crop").glob("expected_*.png"))
    assert expected
    for path in expected:
        size = int(path.stem.split("_")[1])
        assert np.array_equal(np.asarray(center_crop(image, size)), np.asarray(Image.open(path).convert("RGB"))), size
