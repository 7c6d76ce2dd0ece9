"""Seconds of sampling beside a sampler that does what the published one does, in one run.

    python benchmarks/sampling.py                           (CPU: DiT-DH-S, 2 images, 6 points, 6 minutes)
    python benchmarks/sampling.py --size XL --batch_size 64 --points 50 --mixed_precision bf16   (one GPU)

Networks of the published sizes with random weights: a DiT-DH on latents 768 x 16 x 16, a plain DiT-S as its guide, and
a ViT-B decoder. The published sampler doubles the batch whatever the guidance is, with the null label in the second
half: without guidance that half is integrated and thrown away, with autoguidance both models compute it, and an
interval of guidance saves nothing. Here each step has the passes that it needs. Both draw the same images, which is
checked before they are timed alternately; each time is the median of --repeats. `--json FILE` writes the numbers.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling_dit import PUBLISHED_HEAD, SIZES, RAEDiTModel  # noqa: E402
from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite.flow import guidance_is_on, guidance_kind, sampling_times  # noqa: E402
from rae_suite.generation import count_passes, draw_images, image_noise  # noqa: E402
from rae_suite.launch import share_cores  # noqa: E402
from rae_suite.metrics import to_8bit  # noqa: E402
from rae_suite.settings_dit import SamplingConfig  # noqa: E402

SHIFT = 48**0.5
KINDS = {  # scale, interval, whether there is a guide
    "unguided": (1.0, (0.0, 1.0), False),
    "classifier-free": (1.5, (0.0, 1.0), False),
    "classifier-free, times 0 to 0.5": (1.5, (0.0, 0.5), False),
    "autoguidance": (1.42, (0.0, 1.0), True),
}


def build(size: str, head: bool) -> RAEDiTModel:
    """A model whose output is not 0."""
    model = RAEDiTModel(**SIZES[size], **(PUBLISHED_HEAD if head else {})).eval().requires_grad_(False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


def build_rae(encoder_blocks: int, decoder_width: int, decoder_blocks: int, decoder_heads: int) -> RAEModel:
    """An RAE of DINOv2-B's latents, random, with so many blocks of its encoder and a decoder of that size."""
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": encoder_blocks}
    config = RAEConfig(
        encoder_config={**encoder, "num_attention_heads": 12, "image_size": 518, "patch_size": 14},
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=decoder_blocks,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
    )
    return RAEModel(config).eval().requires_grad_(False)


@torch.no_grad()
def published_images(
    model: RAEDiTModel,
    rae: RAEModel,
    labels: torch.Tensor,
    noise: torch.Tensor,
    sampling: SamplingConfig,
    guide: Optional[RAEDiTModel],
    autocast: Callable,
) -> torch.Tensor:
    """The same images as draw_images, with the published sampler's work."""
    scale, count = sampling.guidance_scale, len(labels)
    times = sampling_times(sampling.num_inference_steps, SHIFT)
    y = torch.cat([labels, torch.full_like(labels, model.null_label)])
    x = torch.cat([noise, noise])
    with autocast():
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            t_batch = torch.full((2 * count,), float(t), device=x.device)
            v = model(x, t_batch, y).sample.float()
            if guide is not None:
                weak = guide(x, t_batch, y).sample.float()
                v = weak + scale * (v - weak) if guidance_is_on(t, scale, sampling.guidance_interval) else v
            elif scale != 1:
                conditional, unconditional = v.chunk(2)
                if guidance_is_on(t, scale, sampling.guidance_interval):
                    conditional = unconditional + scale * (conditional - unconditional)
                v = torch.cat([conditional, conditional])
            x = x + (t_next - t) * v
        return to_8bit(rae.decode(x[:count]).sample.float(), "truncate")


def seconds_of(function: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    model: RAEDiTModel, guide: RAEDiTModel, rae: RAEModel, args: argparse.Namespace, accelerator: Accelerator
) -> dict:
    """For each kind of guidance: seconds of both samplers, their ratio, passes for each image, images/s."""
    config, device, rows = model.config, accelerator.device, {}
    labels = torch.arange(args.batch_size, device=device) % config.num_classes
    noise = image_noise(range(args.batch_size), (config.in_channels, config.sample_size, config.sample_size), 0)
    noise = noise.to(device)
    for kind, (scale, interval, has_guide) in KINDS.items():
        sampling = SamplingConfig(args.points, guidance_scale=scale, guidance_interval=interval)
        weak = guide if has_guide else None

        def own(sampling=sampling, weak=weak) -> torch.Tensor:
            indices = range(args.batch_size)
            options = {"guide": weak, "autocast": accelerator.autocast}
            return draw_images(model, rae, labels, indices, 0, sampling, SHIFT, **options)

        def published(sampling=sampling, weak=weak) -> torch.Tensor:
            return published_images(model, rae, labels, noise, sampling, weak, accelerator.autocast)

        difference = (own().int() - published().int()).abs().float().mean().item()  # and both are warm now
        if difference > args.tolerance:
            raise SystemExit(f"{kind}: the two samplers' images differ by {difference:.3f} levels of 255 on average")
        times = [(seconds_of(own, device), seconds_of(published, device)) for _ in range(args.repeats)]
        seconds = [statistics.median(column) for column in zip(*times, strict=True)]
        rows[kind] = {
            "seconds": seconds[0],
            "seconds_published": seconds[1],
            "times_published": seconds[1] / seconds[0],
            "images_per_second": args.batch_size / seconds[0],
            "passes": count_passes(sampling, SHIFT, guidance_kind(model.has_base_head, has_guide)),
            "difference": difference,
        }
        passes, speed = rows[kind]["passes"], rows[kind]["images_per_second"]
        line = f"{kind:<34}{seconds[0]:>9.2f} s{seconds[1]:>9.2f} s{seconds[1] / seconds[0]:>8.2f}{speed:>12.3f}"
        print(f"{line}{passes['model']:>8}{passes['guide']:>7}", flush=True)
    return rows


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--size", default="S", choices=SIZES, help="the DiT-DH's backbone")
    parser.add_argument("--batch_size", type=int, default=2, help="images")
    parser.add_argument("--points", type=int, default=6, help="points in time; published: 50")
    parser.add_argument("--repeats", type=int, default=3, help="times that each sampler is timed")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--tolerance", type=float, default=0.5, help="largest mean difference of the images, of 255")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


def main(argv: Optional[list] = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    share_cores(accelerator)
    torch.manual_seed(0)
    networks = [
        network.to(accelerator.device)
        for network in (build(args.size, True), build("S", False), build_rae(1, 768, 12, 12))
    ]
    print(f"DiT-DH-{args.size}, {args.batch_size} images, {args.points} points, {args.mixed_precision}")
    print(f"{'guidance':<34}{'here':>11}{'published':>11}{'times':>8}{'images/s':>12}{'passes':>8}{'guide':>7}")
    rows = measure(*networks, args, accelerator)
    if args.json:
        facts = {"size": args.size, "batch_size": args.batch_size, "points": args.points, "torch": torch.__version__}
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
