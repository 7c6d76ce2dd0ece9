"""Peak memory of a training step, calculated: the real step on tensors that have shapes but no values.

    python benchmarks/memory.py                               (all presets, bf16, about 15 minutes on a CPU, 8 GB)
    python benchmarks/memory.py --presets dinov2_b_vitb --mixed_precision no --batch_sizes 1 2
    python benchmarks/memory.py --presets ditdh_s ditdh_xl raev2                           (stage 2: no memory, minutes)

Every tensor that the second step (in stage 1: of the GAN phase) holds at a time is counted: weights, gradients,
optimizer states, the moving average, activations, and what is in between, with the types that autocast gives them on a
GPU. A GPU also holds the CUDA context, its libraries' workspaces and gaps between blocks: the largest batches leave
1 GiB and 5% of the card for them. Memory grows linearly with the batch; batches that were not calculated are read off
the line through the last two. `--micro_batches N` takes N of them in a step. `--json FILE` writes the numbers for
machines.
"""

import argparse
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import BASE, DINOV2, DINOV3, LARGE, ROOT, benchmark_config

sys.path.insert(0, str(ROOT))

import train_dit  # noqa: E402
import train_rae  # noqa: E402
from modeling_dit import PUBLISHED_HEAD, RAEV2, SIZES, RAEDiTModel  # noqa: E402
from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite import launch, rae_networks, settings_rae  # noqa: E402
from rae_suite.ema import EMA  # noqa: E402
from rae_suite.flow import Draws  # noqa: E402
from rae_suite.labels import Classes  # noqa: E402
from rae_suite.launch import run_main  # noqa: E402
from rae_suite.optimizers import build_optimizer  # noqa: E402
from rae_suite.settings_dit import parse_config  # noqa: E402

CARDS = {"24 GB": 23.5, "48 GB": 47.4, "80 GB": 79.2, "141 GB": 139.8}  # GiB that the driver shows
ASIDE_GIB, ASIDE_SHARE = 1.0, 0.05
PRESETS = ("dinov2_b_vitb", "dinov2_s", "dinov2_b", "dinov2_l", "mae_b", "siglip2_b", "dinov3_l_k7", "dinov3_l_k23",
           "siglip_so400m_378", "dinov2_b_512")  # fmt: skip
# of stage 2: the transformer, and the side of its latents. All learn DINOv2-B's latents, raev2 those of DINOv3-L
STAGE_2 = {f"ditdh_{size.lower()}": ({**SIZES[size], **PUBLISHED_HEAD}, 16) for size in ("S", "B", "L", "XL")}
STAGE_2 |= {
    "dit_xl": (SIZES["XL"], 16),
    "ditdh_xl_512": ({**SIZES["XL"], **PUBLISHED_HEAD}, 32),
    "raev2": (RAEV2, 16),
}

# what autocast computes in float32 on a GPU ("CUDA Ops that can autocast to float32" in torch's documentation)
FLOAT32_ON_GPUS = set("""
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cdist
    cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss
    layer_norm log log10 log_softmax log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss
    nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss
    softmax softmin softplus sum renorm tan triplet_margin_loss
""".split())  # fmt: skip


class AutocastOfGPUs(TorchFunctionMode):
    """Within CPU autocast, functions compute in the type that they have under autocast on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.__name__ in FLOAT32_ON_GPUS and torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from then until they are freed."""

    def __init__(self):
        super().__init__()
        self.known = set()
        self.live = self.peak = 0  # bytes

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def drop_values(run: train_rae.Run, mode: FakeTensorMode) -> list:
    """Replace all tensors of a run by ones without values, and return them."""
    replaced = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in replaced:
            empty = mode.from_tensor(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return replaced[tensor]

    for network in (run.model, run.discriminator, run.perceptual):
        for module in network.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                setattr(module, name, fake(tensor))
    for optimizer in (run.optimizer, run.disc_optimizer):
        for group in optimizer.param_groups:
            group["params"] = [fake(p) for p in group["params"]]
    run.ema.shadow = {name: fake(tensor) for name, tensor in run.ema.shadow.items()}
    return list(replaced.values())


class Calculation:
    """Steps of a run without values. A step that read one back to the host would raise an error."""

    def __init__(self, config: settings_rae.Config):
        accelerator = launch.build_accelerator(config.train, config.logging.report_to)
        self.run = train_rae.build_run(
            config, accelerator, rae_networks.build_rae_config(config.model), steps_per_epoch=1
        )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tensors = drop_values(self.run, self.mode)

    def peak(self, batch_size: int, checkpointing: bool = False, micro_batches: int = 1) -> tuple:
        """Bytes that tensors hold (at the most, between steps) when a step takes `micro_batches` of `batch_size`."""
        model = self.run.model
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        memory, size = LiveMemory(), self.run.config.model.image_size
        for optimizer in (self.run.optimizer, self.run.disc_optimizer):
            optimizer.state.clear()
        with self.mode, memory, AutocastOfGPUs():
            for tensor in self.tensors:
                memory.add(tensor)
            batches = [torch.empty(batch_size, 3, size, size) for _ in range(micro_batches)]
            for step in range(2):  # optimizer states are there from the second on
                between, memory.peak = memory.live, memory.live
                train_rae.train_step(self.run, batches, step)
        return memory.peak, between


class Stage2Calculation:
    """Steps of a run of stage 2 that encodes its images, with its autoencoder's ViT-XL decoder on the device as in
    training. Everything is made without values, so it takes no memory."""

    def __init__(self, name: str, mixed_precision: str, settings: list):
        network, grid = STAGE_2[name]
        muon = ["--optimizer.type", "muon"] if name == "raev2" else []
        config = parse_config(["--model.rae", name, "--train.mixed_precision", mixed_precision, *muon, *settings])
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            rae, dit = build_rae(name, grid).requires_grad_(False), RAEDiTModel(**network, sample_size=grid)
        with self.mode:
            rae, dit = rae.to_empty(device="cpu"), dit.to_empty(device="cpu")
            self.run = train_dit.Run(
                config=config,
                accelerator=accelerator,
                model=dit,
                rae=rae,
                optimizer=accelerator.prepare(build_optimizer(dit, config.optimizer)),
                ema=EMA(dit, config.ema.decay),
                classes=Classes(1000, None),
                shift=6.9,
                guide=None,
                steps_per_epoch=1,
                frozen={},
            )
        held = [*dit.parameters(), *dit.buffers(), *rae.parameters(), *rae.buffers(), *self.run.ema.shadow.values()]
        self.tensors = [tensor.detach() for tensor in held]

    def peak(self, batch_size: int, checkpointing: bool = False, micro_batches: int = 1) -> tuple:
        """As of Calculation."""
        run, memory = self.run, LiveMemory()
        (run.dit.enable_gradient_checkpointing if checkpointing else run.dit.disable_gradient_checkpointing)()
        run.optimizer.state.clear()
        size, config = run.rae.config.image_size, run.dit.config
        with self.mode, memory, AutocastOfGPUs():
            for tensor in self.tensors:
                memory.add(tensor)
            images = [torch.empty(batch_size, 3, size, size) for _ in range(micro_batches)]
            for step in range(2):  # optimizer states are there from the second on
                between, memory.peak = memory.live, memory.live
                train_dit.train_step(run, [self.batch(pixels, config) for pixels in images], step)
        return memory.peak, between

    def batch(self, pixels: torch.Tensor, config: dict) -> tuple:
        """Latents, labels and draws of pixels (B, 3, S, S)."""
        latents, count = train_dit.encode(self.run, pixels), len(pixels)
        draws = Draws(torch.empty_like(latents), torch.empty(count), torch.empty(count))
        return latents, torch.zeros(count, dtype=torch.int64), draws


def build_rae(name: str, grid: int) -> RAEModel:
    """The autoencoder of a run of stage 2."""
    encoder = {**DINOV3, **LARGE, "intermediate_size": 4096} if name == "raev2" else {**DINOV2, **BASE}
    return RAEModel(
        RAEConfig(
            encoder_config=encoder,
            encoder_input_size=encoder["patch_size"] * grid,
            decoder_hidden_size=1152,
            decoder_num_hidden_layers=28,
            decoder_num_attention_heads=16,
            decoder_intermediate_size=4096,
            decoder_patch_size=16,
        )
    )


def preset_rows(preset: str, mixed_precision: str, batch_sizes: list, micro_batches: int, settings: list) -> list:
    """The preset without and with gradient checkpointing: peaks in GiB, and the largest batch for each of CARDS."""
    if preset in STAGE_2:
        calculation = Stage2Calculation(preset, mixed_precision, settings)
    else:
        accumulation = ["--train.gradient_accumulation_steps", str(micro_batches)]
        calculation = Calculation(benchmark_config(preset, micro_batches, mixed_precision, [*accumulation, *settings]))
    rows = []
    for checkpointing in (False, True):
        peaks = {}
        for batch_size in batch_sizes:
            peak, between = calculation.peak(batch_size, checkpointing, micro_batches)
            peaks[batch_size] = peak / 2**30
        (small, low), (big, high) = list(peaks.items())[-2:]
        slope = (high - low) / (big - small)  # GiB an image
        largest = {}
        for card, capacity in CARDS.items():
            usable = (capacity - ASIDE_GIB) * (1 - ASIDE_SHARE)
            largest[card] = max(0, int(small + (usable - low) / slope))
        rows.append({"preset": preset, "gradient_checkpointing": checkpointing, "between_steps_gib": between / 2**30,
                     "peak_gib": peaks, "gib_per_image": slope, "largest_batch": largest})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    presets = f"files in configs/, without .yaml, or of stage 2 {', '.join(STAGE_2)}"
    parser.add_argument("--presets", nargs="+", default=(*PRESETS, *STAGE_2), help=presets)
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="at least two, ascending")
    parser.add_argument("--micro_batches", type=int, default=1, help="of those, in a step")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args, settings = parser.parse_known_args()
    if len(args.batch_sizes) < 2 or args.batch_sizes != sorted(set(args.batch_sizes)):
        parser.error(f"--batch_sizes: expected at least two, ascending, got {args.batch_sizes}")
    if args.micro_batches < 1:
        parser.error(f"--micro_batches: expected at least 1, got {args.micro_batches}")
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the same figures on every machine
    heads = (*(f"batch {size}" for size in args.batch_sizes), "an image", *CARDS)
    print("GiB; largest batch for each card")
    print(f"{'preset':<20}{'checkpointing':>14}{'between':>9}" + "".join(f"{head:>10}" for head in heads))
    rows = []
    for preset in args.presets:
        for row in preset_rows(preset, args.mixed_precision, args.batch_sizes, args.micro_batches, settings):
            rows.append(row)
            numbers = (row["between_steps_gib"], *row["peak_gib"].values(), row["gib_per_image"])
            line = f"{row['preset']:<20}{'on' if row['gradient_checkpointing'] else 'off':>14}{numbers[0]:>9.2f}"
            line += "".join(f"{number:>10.2f}" for number in numbers[1:])
            print(line + "".join(f"{size:>10}" for size in row["largest_batch"].values()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    run_main(main)
