"""One training step of stage 2: images/s, FLOPs, MFU and memory, beside a step that does what the published one does.

    python benchmarks/dit_step.py --levers                          (2 CPU cores: DiT-DH-S, float32, batch 2)
    python benchmarks/dit_step.py --size XL --batch_size 128 --mixed_precision bf16 --levers --compile      (one GPU)

A DiT-DH of the published size on latents 768 x 16 x 16 and a DINOv2-B encoder, with random weights; the images are
noise. Both steps encode, take the same draws, and must give the same losses before anything is timed. The published
step encodes in float32, writes RMS norms out, leaves tokens in the transposed memory of the convolution, averages
weights one after the other and reads its loss back. `--levers` adds to it, one by one, what is done better here, and
predicts the gain from the times of the parts. "from latents" is this repository's step on latents that are there.

All take turns in one process; each time is the median of --repeats. FLOPs, 2 for a multiplication and addition, are
counted from the architecture and must agree with torch's FlopCounterMode. MFU is their share of what a large matrix
product reaches here in the same precision. `--json FILE` writes the numbers.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_step import BASE, DINOV2, ROOT, matrix_rate, peak_memory, timed, transformer_flops

sys.path.insert(0, str(ROOT))

import train_dit  # noqa: E402
from modeling_dit import PUBLISHED_HEAD, SIZES, PatchEmbed, RMSNorm  # noqa: E402
from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite.flow import drop_labels, interpolate, training_times, velocity_loss, velocity_target  # noqa: E402
from rae_suite.labels import Classes  # noqa: E402
from rae_suite.launch import build_accelerator, run_main  # noqa: E402
from rae_suite.settings_dit import Config, parse_config  # noqa: E402

CLASSES = 1000
LEVERS = {
    "norm": "fused RMS norms",
    "contiguous": "tokens in memory of their own order",
    "ema": "moving average in one call",
    "encoder": "encoder in bf16",  # another computation: not part of this repository's defaults
    "latents": "latents are there already",
}


# --------------------------------------------------------------------------------------------------------------------
# FLOPs from the architecture
# --------------------------------------------------------------------------------------------------------------------


def block_macs(width: int, tokens: int, mlp_ratio: float, adaptive_tokens: int) -> int:
    """Multiplications of one block's forward pass for one image. `adaptive_tokens`: rows of its modulation, one an
    image in the backbone, one a token in the head, none in RAEv2's backbone."""
    hidden = int(2 / 3 * int(width * mlp_ratio))
    linear = tokens * width * (4 * width + 3 * hidden)
    return linear + 2 * tokens**2 * width + adaptive_tokens * 6 * width**2


def forward_macs(config: dict) -> dict:
    """Multiplications of a model's forward pass for one image, by part: `embedding`, whose backward pass has no
    gradient of its input, `backbone`, `head`, `final`. `config`: an RAEDiTModel's, with SwiGLU and patches of 1."""
    width, head, channels = config["hidden_size"], config["head_hidden_size"], config["in_channels"]
    tokens, ratio, conditions = config["sample_size"] ** 2, config["mlp_ratio"], config.get("num_time_tokens")
    last, sequence = head or width, tokens + (conditions + config["num_class_tokens"] if conditions else 0)
    parts = {"embedding": tokens * channels * width + 512 * width, "head": 0}
    blocks = config["num_layers"] * block_macs(width, sequence, ratio, 0 if conditions else 1)
    parts["backbone"] = blocks + width**2
    if head:
        parts["embedding"] += tokens * channels * head
        parts["head"] = config["head_num_layers"] * block_macs(head, tokens, ratio, tokens)
        parts["head"] += tokens * width * head if width != head else 0
    parts["final"] = tokens * last * channels + (tokens if head else 1) * 2 * last**2
    if config.get("base_num_layers"):
        parts["final"] += tokens * (width * channels + 2 * width**2)
    return parts


def training_flops(config: dict) -> int:
    """FLOPs of a training step of the model for one image: a backward pass costs twice the forward pass, but that of
    the embeddings once."""
    parts = forward_macs(config)
    return 2 * (3 * sum(parts.values()) - parts["embedding"])


def encoder_flops(rae: RAEModel) -> int:
    """FLOPs of encoding one image."""
    encoder, grid = rae.config.encoder_config, rae.config.latent_size**2
    prefix = rae.config.encoder_family().prefix_tokens(encoder)
    width = encoder.hidden_size
    linear, attention = transformer_flops(
        prefix + grid, width, round(encoder.mlp_ratio * width), encoder.num_hidden_layers
    )
    return 2 * grid * 3 * rae.config.encoder_patch_size**2 * width + linear + attention


# --------------------------------------------------------------------------------------------------------------------
# What is timed
# --------------------------------------------------------------------------------------------------------------------


def benchmark_config(size: str, batch_size: int, mixed_precision: str, compile: bool, settings: list) -> Config:
    """Settings of train_dit.py: its defaults, which are DiT-DH's published ones, with the backbone `size`."""
    flags = {f"model.{name}": value for name, value in {**SIZES[size], **PUBLISHED_HEAD}.items()}
    flags |= {
        "model.rae": "random weights",
        "train.global_batch_size": batch_size,
        "train.mixed_precision": mixed_precision,
        "train.compile": str(compile).lower(),
        "logging.report_to": "[]",
    }
    return parse_config([*(str(part) for key, value in flags.items() for part in (f"--{key}", value)), *settings])


def build_rae() -> RAEModel:
    """DINOv2-B with random weights, and a decoder of one block, which is not used."""
    config = RAEConfig(
        encoder_config={**DINOV2, **BASE},
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=1,
        decoder_intermediate_size=64,
    )
    return RAEModel(config).requires_grad_(False)


def norm_written_out(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def transposed_tokens(embed: PatchEmbed, x: torch.Tensor) -> torch.Tensor:
    return embed.proj(x.to(embed.proj.weight.dtype)).flatten(2).transpose(1, 2)


@contextmanager
def as_published(levers: tuple) -> Iterator[None]:
    """Within this context the model computes norms and embeddings as the published code does, but for `levers`."""
    changes = {("norm", RMSNorm): norm_written_out, ("contiguous", PatchEmbed): transposed_tokens}
    before = {kind: kind.forward for _, kind in changes}
    for (lever, kind), forward in changes.items():
        if lever not in levers:
            kind.forward = forward
    try:
        yield
    finally:
        for kind, forward in before.items():
            kind.forward = forward


class PublishedStep:
    """One step as the published loop takes it, in plain torch on the networks of `run`, in one process."""

    def __init__(self, run: train_dit.Run):
        self.run = run
        self.average = {name: p.detach().clone() for name, p in run.dit.named_parameters()}

    def __call__(self, batch: tuple, latents: torch.Tensor, step: int, levers: tuple = ()) -> dict:
        """Take the step on (pixels, labels), with some of LEVERS; `latents` for the lever of that name."""
        run, config = self.run, self.run.config
        if "latents" not in levers:
            run.config.latents.encoder_precision = "bf16" if "encoder" in levers else "float32"
            latents = train_dit.encode(run, batch[0])
            run.config.latents.encoder_precision = "float32"
        draws, labels = train_dit.draw_by_place(latents, 0, config.train.seed, step), batch[1]
        labels = drop_labels(labels, draws.u_drop, config.model.class_dropout_prob, run.dit.null_label)
        t = training_times(draws.u_time, config.flow.time_distribution, run.shift).to(latents.device)
        run.dit.train()
        with as_published(levers), run.accelerator.autocast():
            predicted = run.dit(interpolate(latents, draws.noise, t), t, labels).sample
            loss = velocity_loss(predicted, velocity_target(latents, draws.noise)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in run.dit.parameters() if p.requires_grad], 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if "ema" in levers:
            run.ema.update(step)
        else:
            with torch.no_grad():
                for name, p in run.dit.named_parameters():
                    self.average[name].mul_(config.ema.decay).add_(p, alpha=1 - config.ema.decay)
        return {"loss": loss.item(), "grad_norm": norm.item()}


def own_step(run: train_dit.Run, batch: tuple, latents: Optional[torch.Tensor], step: int) -> dict:
    """This repository's step on (pixels, labels), or on latents (B, C, h, w) that are there."""
    if latents is None:
        batches = train_dit.prepare(run, [batch], step)
    else:
        batches = [(latents, batch[1], train_dit.draw_by_place(latents, 0, run.config.train.seed, step))]
    return train_dit.train_step(run, batches, step).read()


def variants_of(run: train_dit.Run, batch: tuple, latents: torch.Tensor, levers: bool) -> dict:
    """Functions that take the step of a number, by name, the published one first."""
    published = PublishedStep(run)
    own = {
        "this repository": partial(own_step, run, batch, None),
        "from latents": partial(own_step, run, batch, latents),
    }
    some = {f"published with {name}": (name,) for name in LEVERS} if levers else {}
    steps = {name: partial(published, batch, latents, levers=chosen) for name, chosen in some.items()}
    return {"published": partial(published, batch, latents), **steps, **own}


def check_equal(run: train_dit.Run, variants: dict, tolerance: float) -> dict:
    """The first step of every variant from the same weights. Returns how far its loss and gradient norm are from the
    published one's, as a share, by name; exits where that is above `tolerance`, or above 5e-2 with the encoder in
    bf16."""
    start = {name: p.detach().clone() for name, p in run.dit.named_parameters()}
    differences, expected = {}, None
    for name, take in variants.items():
        with torch.no_grad():
            for key, p in run.dit.named_parameters():
                p.copy_(start[key])
        run.optimizer.state.clear()
        found = take(0)
        values = torch.tensor([found["loss"], found["grad_norm"]])
        expected = values if expected is None else expected
        differences[name] = ((values - expected).abs() / expected).max().item()
        if not differences[name] <= (5e-2 if "encoder" in name else tolerance):
            sys.exit(
                f"error: {name}: loss and gradient norm {values.tolist()}, of the published step {expected.tolist()}"
            )
    return differences


def parts_of(run: train_dit.Run, batch: tuple, latents: torch.Tensor) -> dict:
    """Parts of a step of which levers save something, and how it is predicted from their times."""
    published = PublishedStep(run)
    tokens = 16 * 16
    c = run.config.model
    norms = [(c.hidden_size, 2 * c.num_layers), (c.head_hidden_size, 2 * c.head_num_layers + 1)]
    inputs = [
        (torch.randn(len(latents), tokens, w, device=latents.device), RMSNorm(w).to(latents.device), n)
        for w, n in norms
    ]

    def all_norms(forward: Callable) -> None:
        for x, norm, count in inputs:
            x.requires_grad_()
            for _ in range(count):
                forward(norm, x).sum().backward()

    def average() -> None:
        with torch.no_grad():
            for name, p in run.dit.named_parameters():
                published.average[name].mul_(0.9995).add_(p, alpha=0.0005)

    def encoder(precision: str) -> None:
        run.config.latents.encoder_precision = precision
        train_dit.encode(run, batch[0])
        run.config.latents.encoder_precision = "float32"

    return {
        "encoder": partial(encoder, "float32"),
        "encoder in bf16": partial(encoder, "bf16"),
        "norms, written out": partial(all_norms, norm_written_out),
        "norms, fused": partial(all_norms, RMSNorm.forward),
        "average, one by one": average,
        "average, one call": lambda: run.ema.update(0),
    }


def predicted_gains(parts: dict, published: float) -> dict:
    """Times the published step's speed that each lever should give, by the parts' seconds."""
    saved = {
        "norm": parts["norms, written out"] - parts["norms, fused"],
        "ema": parts["average, one by one"] - parts["average, one call"],
        "encoder": parts["encoder"] - parts["encoder in bf16"],
        "latents": parts["encoder"],
    }
    return {lever: published / (published - seconds) for lever, seconds in saved.items()}


# --------------------------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------------------------


def counted_flops(run: train_dit.Run, batch: tuple) -> int:
    """FLOPs of one step as torch counts them, with attention as plain products: torch does not count the fused one of
    CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.compiler.set_stance("force_eager"):
            own_step(run, batch, None, 0)
    return counter.get_total_flops()


def measure(config: Config, repeats: int, levers: bool) -> dict:
    """All numbers of the table."""
    accelerator = build_accelerator(config.train, config.logging.report_to)
    device, size = accelerator.device, config.train.global_batch_size
    torch.manual_seed(0)
    run = train_dit.build_run(config, accelerator, build_rae(), Classes(CLASSES, None), 1, {}, None)
    for part in (run.dit.final_layer.linear, *(block.adaLN_modulation[1] for block in run.dit.blocks)):
        nn.init.normal_(part.weight, std=0.02)  # or most gradients would be 0
    generator = torch.Generator().manual_seed(0)
    image = run.rae.config.image_size
    batch = (torch.rand(size, 3, image, image, generator=generator).to(device), torch.arange(size, device=device))
    latents = train_dit.encode(run, batch[0])
    of_model, of_encoder = training_flops(dict(run.dit.config)), encoder_flops(run.rae)
    counted = counted_flops(run, batch) / size
    if abs((of_model + of_encoder) / counted - 1) > 1e-3:
        sys.exit(f"error: {of_model + of_encoder:.4e} FLOPs an image by the architecture, {counted:.4e} by torch")
    variants = variants_of(run, batch, latents, levers)
    half = config.train.mixed_precision == "bf16"
    differences = check_equal(run, variants, 5e-2 if half else 1e-3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    variants["this repository"](1)
    memory = peak_memory(device)
    rate = matrix_rate(device, torch.bfloat16 if half else torch.float32)
    times = {name: [] for name in variants}
    for step in range(2, 2 + repeats):
        for name, take in variants.items():
            times[name].append(timed(partial(take, step), device)[1:])
    parts = {}
    for name, part in parts_of(run, batch, latents).items():
        part()
        parts[name] = statistics.median(timed(part, device)[1] for _ in range(repeats))
    rows = {}
    for name, pairs in times.items():
        seconds, cpu = map(statistics.median, zip(*pairs, strict=True))
        flops = of_model + (0 if "latents" in name else of_encoder)
        rows[name] = {"seconds": seconds, "cpu_seconds": cpu, "images_per_second": size / seconds,
                      "mfu": flops * size / seconds / rate, "difference": differences[name]}  # fmt: skip
    whole = rows["published"]
    for row in rows.values():
        row["times"], row["times_cpu"] = whole["seconds"] / row["seconds"], whole["cpu_seconds"] / row["cpu_seconds"]
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "steps": rows,
        "parts": parts,
        "predicted": predicted_gains(parts, whole["seconds"]),
        "flops_of_model": of_model,
        "flops_of_encoder": of_encoder,
        "flops_counted_by_torch": counted,
        "matrix_rate": rate,
        "peak_memory_gib": memory,
    }


def table(result: dict) -> str:
    """The numbers of `measure` for readers."""
    lines = [
        f"{'':<28}{'ms':>10}{'images/s':>10}{'times':>8}{'CPU time':>10}{'predicted':>11}{'MFU':>8}{'differs by':>12}"
    ]
    for name, row in result["steps"].items():
        predicted = result["predicted"].get(name.rpartition(" ")[2]) if name.startswith("published with") else None
        shown = "" if predicted is None else f"{predicted:.2f}"
        line = f"{name:<28}{1e3 * row['seconds']:>10.1f}{row['images_per_second']:>10.2f}{row['times']:>8.2f}"
        lines.append(f"{line}{row['times_cpu']:>10.2f}{shown:>11}{row['mfu']:>8.1%}{row['difference']:>12.1e}")
    lines += [""] + [f"{name:<28}{1e3 * seconds:>10.1f} ms" for name, seconds in result["parts"].items()]
    lines += [
        f"\nGFLOP an image: model {result['flops_of_model'] / 1e9:.1f}, encoder "
        f"{result['flops_of_encoder'] / 1e9:.1f}, together {result['flops_counted_by_torch'] / 1e9:.1f} by torch",
        f"matrix rate {result['matrix_rate'] / 1e12:.3f} TFLOP/s; peak memory {result['peak_memory_gib']:.2f} GiB",
        f"{result['device']}, torch {result['torch']}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="S", choices=SIZES, help="the DiT-DH's backbone")
    parser.add_argument("--batch_size", type=int, default=2, help="images of one step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument(
        "--levers", action="store_true", help="also each improvement alone, added to the published step"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args, settings = parser.parse_known_args()
    config = benchmark_config(args.size, args.batch_size, args.mixed_precision, args.compile, settings)
    result = measure(config, args.repeats, args.levers)
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "settings": settings, **result}, indent=1))


if __name__ == "__main__":
    run_main(main)
