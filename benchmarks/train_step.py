"""One optimisation step of the GAN phase: the time of its parts, images per second, FLOPs, memory, and the same step
done as the published loop does it.

    python benchmarks/train_step.py --preset dinov2_b_vitb --batch_size 2 --baseline       (2 CPU cores, float32)
    python benchmarks/train_step.py --preset dinov2_b --batch_size 64 --mixed_precision bf16 --baseline --levers \
        --train.compile true                                                               (one GPU)

The networks have the preset's sizes and random weights, the images are noise: nothing is downloaded and no data is
read. All steps take turns in one process, on the same networks, and must give the same losses before anything is timed.
FLOPs, 2 for a multiplication and addition, are counted from the architecture and must agree with torch's
FlopCounterMode; what is recomputed does not count. MFU is their share of what a large matrix product reaches here in
the same precision. `--json FILE` writes all numbers. Further flags are settings of train_rae.py.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rae_suite.launch import build_accelerator, run_main  # noqa: E402
from rae_suite.losses import (  # noqa: E402
    DISCRIMINATOR_LOSSES,
    adaptive_weight,
    generator_gradient,
    generator_loss,
    to_discriminator_range,
)
from rae_suite.rae_networks import build_rae_config  # noqa: E402
from rae_suite.settings_rae import Config, parse_config  # noqa: E402
from train_rae import Run, build_run, learning_rate, pixel_losses, set_learning_rate, step_generator, train_step  # noqa: E402

# sizes of the presets' encoders, which are built with random weights
DINOV2 = {"model_type": "dinov2_with_registers", "patch_size": 14, "image_size": 518}
DINOV3 = {"model_type": "dinov3_vit", "patch_size": 16, "image_size": 224, "num_register_tokens": 4}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
ENCODERS = {
    "facebook/dinov2-with-registers-small": {**DINOV2, **SMALL},
    "facebook/dinov2-with-registers-base": {**DINOV2, **BASE},
    "facebook/dinov2-with-registers-large": {**DINOV2, **LARGE},
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {**DINOV3, **LARGE, "intermediate_size": 4096},
    "facebook/vit-mae-base": {"model_type": "vit_mae", **BASE, "patch_size": 16, "image_size": 224},
    "google/siglip2-base-patch16-256": {
        "model_type": "siglip_vision_model", **BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 256,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", **SO400M, "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip
DINO_S8 = {**SMALL, "intermediate_size": 1536, "patch_size": 8, "image_size": 224}
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels, by resolution

# what is done better than in the published loop, and can be switched on in the published step one by one
LEVERS = {
    "latents": "clean latents are computed once for both passes",
    "one_pass": "one backward pass of LPIPS and discriminator for the adaptive weight, none into the heads",
    "sdpa": "fused attention in decoder and discriminator",
    "together": "real and fake images through the backbone together",
    "channels_last": "LPIPS's VGG16 on channels-last tensors",
    "adamw": "fused AdamW",
    "ema": "moving average of the decoder alone, all parameters in one call",
}
LOSSES = ("recon", "lpips", "gan", "adaptive_weight", "disc_loss")


def benchmark_config(preset: str, batch_size: int, mixed_precision: str, settings: Optional[list] = None) -> Config:
    """The preset's config with random weights of the real sizes and every loss on from step 0.

    Args:
        preset: name of a file in configs/.
        batch_size: images of one step.
        mixed_precision: "no" or "bf16".
        settings: further flags of train_rae.py, which win.
    """
    file = ["--config", str(ROOT / "configs" / f"{preset}.yaml")]
    encoder = parse_config(file).model.encoder
    flags = {
        "gan.update_start_step": 0,
        "gan.start_step": 0,
        "lr_schedule.warmup_steps": 10,
        "gan.lr_schedule.warmup_steps": 10,
        "perceptual.start_step": 0,
        "train.global_batch_size": batch_size,
        "train.gradient_accumulation_steps": 1,
        "train.mixed_precision": mixed_precision,
        "logging.report_to": "[]",
    }
    if encoder in ENCODERS:  # others, as digits_tiny's, are random already
        sizes = dict(ENCODERS[encoder])
        flags |= {
            "model.encoder": sizes.pop("model_type"),
            "model.encoder_weights": "random",
            "model.encoder_config": json.dumps(sizes),
            "gan.weights": "random",
            "gan.backbone_config": json.dumps(DINO_S8),
            "perceptual.weights": "random",
        }
    flags = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    return parse_config([*file, *flags, *(settings or [])])


# --------------------------------------------------------------------------------------------------------------------
# FLOPs from the architecture
# --------------------------------------------------------------------------------------------------------------------


def transformer_flops(tokens: int, width: int, mlp: int, blocks: int) -> tuple:
    """Forward FLOPs of transformer blocks for one image: (linear layers, attention's two matrix products)."""
    return 4 * blocks * tokens * width * (2 * width + mlp), 4 * blocks * tokens**2 * width


def vgg16_flops(size: int) -> tuple:
    """Forward FLOPs of VGG16's convolutions for one image, and of LPIPS's heads."""
    convolutions, heads, before = 0, 0, 3
    for widths in VGG16:
        for width in widths:
            convolutions += 2 * 9 * before * width * size**2
            before = width
        heads += 2 * before * size**2
        size //= 2
    return convolutions, heads


def count_flops(run: Run) -> dict:
    """FLOPs of each part of a step for one image, by name. A backward pass through frozen layers costs what the forward
    pass costs, through trained ones twice that; through attention's products, which have two factors, twice."""
    model, discriminator = run.model, run.accelerator.unwrap_model(run.discriminator)
    config, encoder = model.config, model.config.encoder_config

    grid = config.latent_size**2
    prefix = config.encoder_family().prefix_tokens(encoder)
    mlp = getattr(encoder, "intermediate_size", None) or round(encoder.mlp_ratio * encoder.hidden_size)
    blocks = encoder.num_hidden_layers if config.encoder_layers is None else config.encoder_layers[-1] + 1
    linear, attention = transformer_flops(prefix + grid, encoder.hidden_size, mlp, blocks)
    encoding = 2 * grid * 3 * config.encoder_patch_size**2 * encoder.hidden_size + linear + attention

    tokens, width, values = 1 + grid, config.decoder_hidden_size, 3 * config.decoder_patch_size**2
    embedding, last = 2 * grid * config.latent_channels * width, 2 * tokens * width * values
    decoding = embedding + last
    decoding += sum(
        transformer_flops(tokens, width, config.decoder_intermediate_size, config.decoder_num_hidden_layers)
    )

    convolutions, lpips_heads = vgg16_flops(config.image_size)

    vit = discriminator.backbone.vit.config
    seen = (vit.image_size // vit.patch_size) ** 2
    linear, attention = transformer_flops(1 + seen, vit.hidden_size, vit.intermediate_size, vit.num_hidden_layers)
    linear += 2 * seen * 3 * vit.patch_size**2 * vit.hidden_size
    first = 2 * seen * vit.hidden_size**2 * len(discriminator.heads)  # the heads' first convolutions
    heads = first * (1 + run.config.gan.kernel_size) + 2 * seen * vit.hidden_size * len(discriminator.heads)
    return {
        "encoder": encoding,
        # no gradient of latents; two gradients of the last layer's weight for the adaptive weight
        "decoder, forward and backward": 3 * decoding - embedding + 2 * last,
        "LPIPS, forward and backward": 3 * convolutions + 2 * lpips_heads,
        "discriminator for the decoder": 2 * (linear + heads) + 3 * attention,
        "decoder on clean latents": decoding if run.config.gan.disc_input == "fresh" else 0,
        "discriminator's own pass": 2 * (linear + attention + 3 * heads - first),
    }


def counted_flops(run: Run, pixels: torch.Tensor) -> int:
    """FLOPs of one step as torch counts them, with attention as plain products: fused kernels recompute some, and the
    one for CPUs is not counted at all."""
    use_attention(run, "eager", "eager")
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        train_step(run, [pixels], 0)
    use_attention(run, run.config.model.attn_implementation)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(partial(torch.matmul, a, b), device)[1] for _ in range(10))


# --------------------------------------------------------------------------------------------------------------------
# What is timed
# --------------------------------------------------------------------------------------------------------------------


def step_parts(run: Run, pixels: torch.Tensor) -> dict:
    """A function for each part of a step, in its order, by name: every part alone, on inputs of the real shapes."""
    accelerator, model = run.accelerator, run.model
    discriminator = accelerator.unwrap_model(run.discriminator)
    model.train()
    with torch.no_grad(), accelerator.autocast():
        latent = model.encode(pixels, add_noise=False).latent
        fake = model.decode(latent).sample.float()

    def encoder() -> None:
        with torch.no_grad(), accelerator.autocast():
            model.encode(pixels, add_noise=False)

    def decoder() -> None:
        out = run.rae(latent=latent, return_last_layer=True)
        gradient = torch.ones_like(out.patches) / out.patches.numel()
        h = out.last_hidden_state.detach().flatten(0, 1).float()
        with torch.autocast(h.device.type, enabled=False):
            for _ in range(2):  # the adaptive weight's norms
                (gradient.flatten(0, 1).float().t() @ h).norm()
        out.patches.backward(gradient)

    def lpips() -> None:
        x = fake.clone().requires_grad_()
        with accelerator.autocast():
            torch.autograd.grad(run.perceptual(2 * pixels - 1, 2 * x - 1).mean(), x)

    def discriminator_for_decoder() -> None:
        discriminator.eval()
        x = fake.clone().requires_grad_()
        with accelerator.autocast():
            torch.autograd.grad(generator_loss(discriminator(run.augment(2 * x - 1))), x)

    def decoder_on_clean_latents() -> None:
        with torch.no_grad(), accelerator.autocast():
            model.decode(latent)

    def own_pass() -> None:
        discriminator.train()
        fakes, reals = run.augment(to_discriminator_range(fake)), run.augment(2 * pixels - 1)
        fake_logits, real_logits = run.discriminator(fakes, reals)
        accelerator.backward(DISCRIMINATOR_LOSSES[run.config.gan.loss](real_logits.float(), fake_logits.float()))

    def optimizers() -> None:
        run.optimizer.step()
        run.disc_optimizer.step()

    return {
        "encoder": encoder,
        "decoder, forward and backward": decoder,
        "LPIPS, forward and backward": lpips,
        "discriminator for the decoder": discriminator_for_decoder,
        "decoder on clean latents": decoder_on_clean_latents,
        "discriminator's own pass": own_pass,
        "optimizers": optimizers,
        "moving average": run.ema.update,
    }


def use_attention(run: Run, name: str, encoder: Optional[str] = None) -> None:
    """Attention of decoder and discriminator. The encoder's is fused in the published code too: it is the setting's."""
    encoder = encoder or run.config.model.attn_implementation
    run.model.config._attn_implementation = {"": name, "encoder_config": encoder}
    run.accelerator.unwrap_model(run.discriminator).backbone.vit.set_attn_implementation(name)


class PublishedStep:
    """One step as the published loop takes it, in plain torch on the networks of `run`, in one process. The encoder
    runs twice, the adaptive weight takes backward passes of its own, gradients reach the discriminator's heads in the
    decoder's step, attention is a matrix, real and fake images go through the backbone one after the other, and the
    moving average goes through the whole model parameter by parameter."""

    def __init__(self, run: Run):
        self.run = run
        discriminator = run.accelerator.unwrap_model(run.discriminator)
        networks = ((run.model.decoder, run.config.optimizer), (discriminator.heads, run.config.gan.optimizer))
        self.optimizers = tuple(
            torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], **asdict(settings))
            for network, settings in networks
        )
        self.average = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def __call__(self, pixels: torch.Tensor, step: int, levers: tuple = ()) -> dict:
        """Take the step on (B, 3, S, S) in [0, 1], with some of LEVERS. Returns LOSSES as floats."""
        run, config, accelerator, model = self.run, self.run.config, self.run.accelerator, self.run.model
        discriminator = accelerator.unwrap_model(run.discriminator)
        perceptual_weight, gan_weight = config.perceptual.weight, config.gan.weight
        optimizer, disc_optimizer = (run.optimizer, run.disc_optimizer) if "adamw" in levers else self.optimizers
        set_learning_rate(optimizer, learning_rate(step, config.optimizer.lr, config.lr_schedule, 1))
        set_learning_rate(disc_optimizer, learning_rate(step, config.gan.optimizer.lr, config.gan.lr_schedule, 1))
        generator = step_generator(accelerator, config.train, False, step, 0)
        model.train()
        discriminator.eval()

        with accelerator.autocast():
            with torch.no_grad():
                latent = model.encode(pixels, add_noise=False).latent
            out = model.decode(model.add_noise(latent, generator), return_last_layer=True)
            if "one_pass" in levers:
                gradient, terms = generator_gradient(
                    out.patches, out.last_hidden_state, model.patches_to_pixels, pixels, pixel_losses(run, step),
                    lambda images: discriminator(run.augment(images, generator)), gan_weight,
                    config.gan.max_adaptive_weight,
                )  # fmt: skip
                recon, lpips, gan, weight = (terms[name] for name in ("recon", "lpips", "gan", "adaptive_weight"))
            else:
                sample = out.sample.float()
                recon = (sample - pixels).abs().mean()
                lpips = run.perceptual(2 * pixels - 1, 2 * sample - 1).mean()
                gan = generator_loss(discriminator(run.augment(2 * sample - 1, generator)))
                base, last = recon + perceptual_weight * lpips, model.decoder.decoder_pred.weight
                norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (base, gan)]
                weight = adaptive_weight(*norms, config.gan.max_adaptive_weight).detach()
                total = base + gan_weight * weight * gan
        if "one_pass" in levers:
            out.patches.backward(gradient)
        else:
            total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if "ema" in levers:
            run.ema.update()
        else:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    self.average[name].mul_(config.ema.decay).add_(p, alpha=1 - config.ema.decay)

        discriminator.train()
        disc_optimizer.zero_grad()
        with accelerator.autocast():
            with torch.no_grad():
                if "latents" not in levers:
                    latent = model.encode(pixels, add_noise=False).latent
                fake = run.augment(to_discriminator_range(model.decode(latent).sample.float()), generator)
                real = run.augment(2 * pixels - 1, generator)
            if "together" in levers:
                fake_logits, real_logits = discriminator(fake, real)
            else:
                fake_logits, real_logits = discriminator(fake), discriminator(real)
        disc_loss = DISCRIMINATOR_LOSSES[config.gan.loss](real_logits.float(), fake_logits.float())
        disc_loss.backward()
        disc_optimizer.step()
        disc_optimizer.zero_grad()
        values = torch.stack([v.detach().float() for v in (recon, lpips, gan, weight, disc_loss)])
        return dict(zip(LOSSES, values.tolist(), strict=True))


@dataclass
class Variant:
    """A way to take the step `take`, a function of its number, and what it needs."""

    take: Callable
    attention: str
    disc_input: str = "fresh"
    channels_last: bool = False
    compiled: bool = True  # where train.compile is set
    optimizers: tuple = ()  # other than the run's

    def __call__(self, run: Run, step: int) -> tuple:
        """As `timed`."""
        use_attention(run, self.attention)
        run.config.gan.disc_input = self.disc_input
        run.perceptual.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        with torch.compiler.set_stance("default" if self.compiled else "force_eager"):
            return timed(partial(self.take, step), run.accelerator.device)


def step_variants(run: Run, pixels: torch.Tensor, baseline: bool, levers: bool) -> dict:
    """Variants by name, this repository's step first."""

    def own(step: int) -> dict:
        return train_step(run, [pixels], step).read()

    attention = run.config.model.attn_implementation
    as_it_is = Variant(own, attention, run.config.gan.disc_input, channels_last=pixels.is_cuda)
    variants = {"this repository": as_it_is}
    if run.config.train.compile:
        variants["this repository without torch.compile"] = replace(as_it_is, compiled=False)
    if levers and as_it_is.disc_input == "fresh":
        variants["this repository with gan.disc_input reuse"] = replace(as_it_is, disc_input="reuse")
    if baseline:
        published = PublishedStep(run)
        for some in ((), *(((lever,) for lever in LEVERS) if levers else ())):
            variants[" with ".join(("published loop", *some))] = Variant(
                partial(published, pixels, levers=some),
                attention=attention if "sdpa" in some else "eager",
                channels_last="channels_last" in some,
                compiled=False,
                optimizers=published.optimizers,
            )
    return variants


def timed(function: Callable, device: torch.device) -> tuple:
    """(what `function` returns, seconds, seconds of all of this process's threads on CPUs: on a machine that is shared
    these say more)"""

    def clock() -> tuple:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    start = clock()
    result = function()
    return result, *(end - begin for begin, end in zip(start, clock(), strict=True))


def seconds_in_a_row(run: Run, pixels: torch.Tensor, count: int) -> float:
    """Seconds of a step when `count` follow each other as they do in training on a GPU, which computes one while the
    host launches the next and reads the numbers of the last."""

    def steps() -> None:
        for step in range(count):
            train_step(run, [pixels], step)

    return timed(steps, run.accelerator.device)[1] / count


def check_equal(run: Run, variants: dict, tolerances: tuple) -> dict:
    """Two steps of every variant from the same weights, with new optimizer states. Returns the largest deviation from
    the first variant's losses in the first step, by name, as a share of them or, where they are small, of 0.1. The
    variant that trains the discriminator on other images is left out.

    Args:
        tolerances: of the first step, and of the second: Adam's update turns rounding of a gradient near zero into
            its sign. Exits when one is exceeded.
    """
    networks = [run.model.decoder, run.accelerator.unwrap_model(run.discriminator).heads]
    start = [{name: t.detach().cpu().clone() for name, t in network.state_dict().items()} for network in networks]
    differences, expected, bad = {}, None, {}
    for name, variant in variants.items():
        if variant.disc_input != next(iter(variants.values())).disc_input:
            continue
        for network, state in zip(networks, start, strict=True):
            network.load_state_dict(state)
        for optimizer in (run.optimizer, run.disc_optimizer, *variant.optimizers):
            optimizer.state.clear()
        records = [variant(run, step)[0] for step in range(2)]
        values = torch.tensor([[record[loss] for loss in LOSSES] for record in records])  # (2, losses)
        expected = values if expected is None else expected
        deviation = ((values - expected).abs() / expected.abs().clamp_min(0.1)).amax(dim=1).tolist()
        differences[name] = deviation[0]
        if not all(d <= t for d, t in zip(deviation, tolerances, strict=True)):
            bad[name] = dict(zip(("first step", "second step"), deviation, strict=True))
    if bad:
        sys.exit(f"error: losses differ from this repository's by more than {tolerances}: {bad}")
    return differences


def host_reads(run: Run, pixels: torch.Tensor) -> int:
    """How often one step waits for the GPU; on a CPU, how often it reads a value that on a GPU it would wait for. The
    fused AdamW for CPUs, which reads its step counts, has another kernel there and is left out."""

    def inside_adamw(event) -> bool:
        return event is not None and (event.name == "aten::_fused_adamw_" or inside_adamw(event.cpu_parent))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pixels.is_cuda else [])]
    with profile(activities=activities) as profiler:
        train_step(run, [pixels], 1)
    # the profiler itself ends with cudaDeviceSynchronize
    gpu = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    waits = gpu if pixels.is_cuda else ("aten::_local_scalar_dense",)
    return sum(event.name in waits and not inside_adamw(event) for event in profiler.events())


def peak_memory(device: torch.device) -> float:
    """GiB: on a GPU what tensors held at most, on a CPU all that the process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def measure(config: Config, repeats: int, baseline: bool = False, levers: bool = False) -> dict:
    """All numbers of the table. Times are medians over `repeats` rounds in which all variants take turns."""
    accelerator = build_accelerator(config.train, config.logging.report_to)
    device, batch = accelerator.device, config.train.global_batch_size
    on_gpu = device.type == "cuda"
    run = build_run(config, accelerator, build_rae_config(config.model), steps_per_epoch=1)
    size = config.model.image_size
    pixels = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(2):
        train_step(run, [pixels], step)
    memory = peak_memory(device)

    flops = count_flops(run)
    total = sum(flops.values())
    counted = None if config.model.gradient_checkpointing else counted_flops(run, pixels) / batch
    if counted is not None and abs(total / counted - 1) > 1e-3:
        sys.exit(f"error: {total:.4e} FLOPs an image by the architecture, {counted:.4e} counted by torch")
    variants = step_variants(run, pixels, baseline, levers)
    half = config.train.mixed_precision == "bf16"
    differences = check_equal(run, variants, (5e-2, 2e-1) if half else (5e-4 if config.train.compile else 1e-4, 1e-2))
    variants["this repository"](run, 2)  # with its attention and memory format, also for the reads
    reads = host_reads(run, pixels)
    rate = matrix_rate(device, torch.bfloat16 if half else torch.float32)
    times = {name: [] for name in variants}
    for step in range(2, 2 + repeats):
        for name, variant in variants.items():
            times[name].append(variant(run, step)[1:])
    variants["this repository"](run, step)  # with its attention and memory format
    in_a_row = seconds_in_a_row(run, pixels, 2 * repeats)
    parts = {}
    for name, part in step_parts(run, pixels).items():
        if flops.get(name) != 0:
            parts[name] = statistics.median(timed(part, device)[1] for _ in range(repeats))
    steps = {name: list(map(statistics.median, zip(*rows, strict=True))) for name, rows in times.items()}
    whole = steps["this repository"][0]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch_size": batch,
        "mixed_precision": config.train.mixed_precision,
        "steps": steps,
        "images_per_second": {name: batch / seconds for name, (seconds, _) in steps.items()},
        "times_published": steps["published loop"][0] / whole if baseline else None,
        "mfu": total * batch / whole / rate,
        "seconds_in_a_row": in_a_row,
        "mfu_in_a_row": total * batch / in_a_row / rate,
        "all_times": times,
        "differences": differences,
        "parts": parts,
        "flops_per_image": flops,
        "flops_counted_by_torch": counted,
        "matrix_rate": rate,
        "host_reads": reads,
        "peak_memory_gib": memory,
    }  # fmt: skip


def table(result: dict) -> str:
    """The numbers of `measure` for readers."""
    batch, rate, flops = result["batch_size"], result["matrix_rate"], result["flops_per_image"]
    whole = result["steps"]["this repository"][0]

    def row(name: str, seconds: float, count: float) -> str:
        share = f"{count / 1e9:>15.1f}{count * batch / seconds / rate:>8.1%}" if count else ""
        return f"{name:<42}{1e3 * seconds:>11.1f}{seconds / whole:>8.1%}{share}"

    lines = [f"{'':<42}{'ms':>11}{'share':>8}{'GFLOP an image':>15}{'MFU':>8}"]
    lines += [row(name, seconds, flops.get(name)) for name, seconds in result["parts"].items()]
    lines.append(row("sum of the parts", sum(result["parts"].values()), sum(flops.values())))
    published = result["steps"].get("published loop")
    heads = ("ms", "images/s", "speed", "CPU ms", "speed", "difference")
    lines.append(f"\n{'':<42}" + "".join(f"{head:>11}" for head in heads))
    for name, (seconds, cpu_seconds) in result["steps"].items():
        speeds = ("", "")  # times the published loop's
        if published is not None:
            speeds = (f"{published[0] / seconds:.2f}", f"{published[1] / cpu_seconds:.2f}")
        difference = result["differences"].get(name)
        cells = (f"{1e3 * seconds:.1f}", f"{result['images_per_second'][name]:.2f}", speeds[0],
                 f"{1e3 * cpu_seconds:.1f}", speeds[1], "" if difference is None else f"{difference:.1e}")  # fmt: skip
        lines.append(f"{name:<42}" + "".join(f"{cell:>11}" for cell in cells))
    total, counted = sum(flops.values()), result["flops_counted_by_torch"]
    by_torch = "not counted" if counted is None else f"{counted / 1e12:.4f} counted by torch"
    lines += [
        f"\n{total / 1e12:.4f} TFLOP an image by the architecture, {by_torch}",
        f"matrix rate {rate / 1e12:.3f} TFLOP/s, MFU of the whole step {result['mfu']:.1%}",
        f"steps in a row, none waited for: {1e3 * result['seconds_in_a_row']:.1f} ms, "
        f"{batch / result['seconds_in_a_row']:.2f} images/s, MFU {result['mfu_in_a_row']:.1%}",
        f"values that a step reads back to the host: {result['host_reads']}",
        f"peak memory of this repository's step {result['peak_memory_gib']:.2f} GiB",
        f"{result['device']}, batch {batch}, precision {result['mixed_precision']}, torch {result['torch']}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="dinov2_b_vitb", help="a file in configs/, without .yaml")
    parser.add_argument("--batch_size", type=int, default=2, help="images of one step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--baseline", action="store_true", help="also the published loop's step")
    parser.add_argument(
        "--levers", action="store_true", help="also each improvement alone, added to the published step"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args, settings = parser.parse_known_args()
    if args.levers and not args.baseline:
        parser.error("--levers: measured from the published step, so it needs --baseline")
    config = benchmark_config(args.preset, args.batch_size, args.mixed_precision, settings)
    result = measure(config, args.repeats, args.baseline, args.levers)
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "settings": settings, **result}, indent=1))


if __name__ == "__main__":
    run_main(main)
