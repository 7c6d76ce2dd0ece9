"""What the processes of a training step exchange, counted in a real step, and images per second from 1 to 64 GPUs.

    python benchmarks/scaling.py        (2 GB, 2 minutes on 2 CPU cores, nothing is downloaded)

1. Two processes on CPUs take steps of a small run with every loss on, with DDP and FSDP2, and each collective of one
   step is recorded: what asked for it, its bytes, and how far the backward pass had come when it began. The command
   ends with an error when gradients are reduced more or less often than once for each update of their network.
2. How much longer the decoder's backward pass takes with the reduction than without, beside what the model of part 3
   says for the speed at which these two processes reduce a tensor. They have the cores that compute to reduce with: on
   CPUs little can hide.
3. A model of images per second on 1 to 64 GPUs, from the step's FLOPs, the bytes, and the constants below. Nothing of
   it is measured.

`--json FILE` writes all numbers.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed, nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from train_step import ROOT, benchmark_config, count_flops

sys.path.insert(0, str(ROOT))

import train_rae  # noqa: E402
from modeling_rae import RAEModel  # noqa: E402
from rae_suite import launch, rae_networks, settings_rae, updates  # noqa: E402
from rae_suite.launch import run_main  # noqa: E402

# assumptions of the model
MATRIX_RATE = 768e12  # FLOP/s of a large bf16 matrix product on an H200, measured; the data sheet's peak is 989e12
GPUS_PER_MACHINE = 8
NVLINK = 450e9  # bytes/s of a GPU in one direction: data sheets of H100 and H200, 900 GB/s in both together
NETWORK = 25e9  # bytes/s of a machine in one direction: one link of 200 Gb/s
LINK_EFFICIENCY = 0.8  # what of a link collectives reach
BUCKET = 25 * 2**20  # bytes that DDP reduces together, its default
MICRO_BATCH = 64  # images that a GPU takes at a time
GPUS = (1, 2, 4, 8, 16, 32, 64)
PRESETS = ("dinov2_b", "dinov2_b_vitb")

PROCESSES = 2
# name, FSDP2, settings: each a step of 8 images in all
CASES = [
    ("DDP", False, {}),
    ("DDP, bf16", False, {"train.mixed_precision": "bf16"}),
    ("DDP, 4 micro-batches", False, {"train.gradient_accumulation_steps": 4}),
    ("DDP, 2 discriminator updates", False, {"gan.updates_per_step": 2}),
    ("FSDP2", True, {}),
    ("FSDP2, 4 micro-batches", True, {"train.gradient_accumulation_steps": 4}),
]
# digits_tiny with a decoder of 14.3M parameters: several of DDP's buckets
DECODER = {
    "model.decoder_hidden_size": 384,
    "model.decoder_intermediate_size": 1536,
    "model.decoder_num_hidden_layers": 8,
}


# --------------------------------------------------------------------------------------------------------------------
# The collectives of a step
# --------------------------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Records the collectives that this process starts within it, in their order, as dicts:

    collective: torch's name of it.
    asked_by: the functions of train_rae.py and updates.py, below train_step, that were at work.
    bytes: of the whole tensor; one that is gathered or scattered has that many on all processes together.
    backward: None outside a backward pass; in one, the share of its FLOPs that were done before.
    """

    def __init__(self):
        super().__init__()
        self._calls = []
        self._flops = Counter()  # of each backward pass

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what the DTensor does with its local tensors comes here again
        backward = torch._C._current_graph_task_id()  # -1 outside
        name = func.__name__.split(".")[0].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            size = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self._calls.append((name, self._asked_by(), size, backward, self._flops[backward]))
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self._flops[backward] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _asked_by(self) -> list:
        names, frame = [], sys._getframe()
        while frame is not None and frame.f_code is not train_rae.train_step.__code__:
            code = frame.f_code
            if code.co_filename in (train_rae.__file__, updates.__file__) and not code.co_name.startswith("<"):
                names.insert(0, code.co_name)
            frame = frame.f_back
        return names

    def records(self) -> list:
        return [
            {
                "collective": name,
                "asked_by": asked_by,
                "bytes": size,
                "backward": None if backward == -1 else before / self._flops[backward],
            }
            for name, asked_by, size, backward, before in self._calls
        ]


def trained(network: nn.Module) -> list:
    return [p for p in network.parameters() if p.requires_grad]


def gradient_bytes(parameters: list, sharded: bool) -> int:
    """Bytes of all their gradients; sharded ones are padded to a multiple of the processes in their first dimension."""
    return sum(
        p.nbytes // p.shape[0] * math.ceil(p.shape[0] / PROCESSES) * PROCESSES if sharded else p.nbytes
        for p in parameters
    )


def start_run(settings: dict, sharded: bool = False) -> tuple:
    """A run in this process, and random micro-batches for a step of it."""
    AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    config = benchmark_config("digits_tiny", 8, "no", flags)
    accelerator = launch.build_accelerator(config.train, config.logging.report_to)
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), steps_per_epoch=1)
    shape = launch.micro_batch_size(config.train, PROCESSES), 3, config.model.image_size, config.model.image_size
    return run, [torch.rand(shape) for _ in range(config.train.gradient_accumulation_steps)]


def count_step(settings: dict, sharded: bool) -> dict:
    """The collectives of one step, and the bytes of both networks."""
    run, batches = start_run(settings, sharded)
    for step in range(2):
        train_rae.train_step(run, batches, step)  # DDP arranges its buckets anew after a network's first reduction
    with Collectives() as collectives:
        train_rae.train_step(run, batches, 2)
    heads = run.accelerator.unwrap_model(run.discriminator).heads
    return {
        "collectives": collectives.records(),
        "parameters": {
            "encoder": sum(p.nbytes for p in run.model.encoder.parameters()),
            "decoder": sum(p.nbytes for p in run.model.decoder.parameters()),
        },
        "gradients": {  # that a step has to reduce
            "decoder_step": gradient_bytes(trained(run.model.decoder), sharded),
            "discriminator_step": gradient_bytes(trained(heads), False) * run.config.gan.updates_per_step,
        },
    }


def measure_exposed(settings: dict, rounds: int = 9) -> dict:
    """Medians in seconds of the decoder's backward pass without and with the reduction of its gradients, in turns, and
    of the reduction of one bucket alone."""
    run, [pixels] = start_run(settings)
    times = {"without": [], "with": [], "bucket": []}
    with torch.no_grad():
        latent = run.model.encode(pixels, add_noise=False).latent
    bucket = torch.ones(BUCKET // 4)

    def backward() -> None:
        out.backward(torch.ones_like(out))

    def reduce() -> None:
        distributed.all_reduce(bucket)

    for i in range(2 * rounds):
        name = ("without", "with")[i % 2]
        with updates.no_sync_except_last(run, run.rae, i % 2, 2):
            out = run.rae(latent=latent, return_last_layer=True).patches
            for kind, function in ((name, backward), ("bucket", reduce)):
                distributed.barrier()
                start = time.perf_counter()
                function()
                times[kind].append(time.perf_counter() - start)
    seconds = {kind: statistics.median(values[2:]) for kind, values in times.items()}  # DDP is ready from then on
    size = gradient_bytes(trained(run.model.decoder), False)
    reduction = size / BUCKET * seconds["bucket"]
    return {
        "gradient_bytes": size,
        "seconds": seconds,
        "exposed": seconds["with"] - seconds["without"],
        "predicted_exposed": exposed(reduction, seconds["without"], math.ceil(size / BUCKET)),
        "not_hidden_at_all": reduction,
    }


def run_rank(rank: int, port: int, cases: list, settings: dict, measured: bool, folder: Path) -> None:
    """One process: count a step of every case and write RANK.json."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")  # fmt: skip
    settings = {**settings, "train.cpu_threads": 1}
    counted = {name: count_step({**settings, **changes}, sharded) for name, sharded, changes in cases}
    timed = measure_exposed(settings) if measured else None
    distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps({"cases": counted, "exposed": timed}))


def run_processes(cases: list, settings: dict, measured: bool = False, start_method: str = "fork") -> list:
    """What each process found: a step of every case, given as CASES, with `settings`, and if `measured` the exposed
    time."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (get_free_port(), cases, settings, measured, Path(folder))
        start_processes(run_rank, arguments, PROCESSES, start_method=start_method)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def reduced(case: dict, step: str) -> list:
    """The collectives that sum up gradients in decoder_step or discriminator_step."""
    return [
        call
        for call in case["collectives"]
        if call["backward"] is not None and call["asked_by"][:1] == [step] and "gather" not in call["collective"]
    ]


def check_reductions(name: str, case: dict) -> None:
    """End with an error unless gradients are reduced once for each update of their network."""
    for step, expected in case["gradients"].items():
        found = sum(call["bytes"] for call in reduced(case, step))
        if found != expected:
            sys.exit(f"error: {name}: {step} reduces {found} bytes of gradients, expected {expected}")


def collectives_table(cases: dict) -> str:
    lines = [
        f"{'':<12}{'collective':<22}{'asked by':<40}{'calls':>6}{'bytes':>14}  after that share of a backward pass"
    ]
    for name, case in cases.items():
        parameters, gradients = (
            ", ".join(f"{part} {size:,}" for part, size in case[what].items()) for what in ("parameters", "gradients")
        )
        lines.append(f"{name}; bytes of parameters: {parameters}; of gradients to reduce: {gradients}")

        def kind(call: dict) -> tuple:
            return call["asked_by"], call["backward"] is not None, call["collective"]

        for (asked_by, _, collective), calls in groupby(sorted(case["collectives"], key=kind), kind):
            calls = list(calls)
            shares = dict.fromkeys(f"{call['backward']:.0%}" for call in calls if call["backward"] is not None)
            size = sum(call["bytes"] for call in calls)
            place = " > ".join(asked_by) or "train_step"
            lines.append(
                f"{'':<12}{collective:<22}{place:<40}{len(calls):>6}{size:>14,}  {' '.join(shares) or 'outside'}"
            )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


def exposed(first: float, second: float, pieces: int) -> float:
    """Seconds that the first of two stages adds to the second's, when both go through equal pieces at the same time,
    one piece apart: the slower stage takes all its time, the faster one that of a piece. In either order: a bucket
    is reduced after its part of the backward pass, a block's weights are gathered before its part of a forward pass."""
    return max(first, second) + min(first, second) / pieces - second


def transfer_seconds(size: float, gpus: int) -> float:
    """Seconds of gathering or scattering a tensor of `size` bytes in a ring, within machines and then between them.
    Each GPU passes on all parts but one over NVLink; a machine's GPUs share its link to the others. A reduction for
    all (all_reduce) is a scattering and a gathering."""
    local, machines = min(gpus, GPUS_PER_MACHINE), math.ceil(gpus / GPUS_PER_MACHINE)
    seconds = size * (local - 1) / local / NVLINK + size * (machines - 1) / machines / NETWORK
    return seconds / LINK_EFFICIENCY


def workload(preset: str) -> dict:
    """FLOPs of a preset's step and bytes of its networks, from networks without values."""
    config = benchmark_config(preset, MICRO_BATCH, "bf16")
    published = settings_rae.parse_config(["--config", str(ROOT / "configs" / f"{preset}.yaml")])
    with torch.device("meta"):
        model = RAEModel(rae_networks.build_rae_config(config.model))
        discriminator = rae_networks.build_discriminator(
            config.gan, config.model.attn_implementation, config.train.seed
        )
    unprepared = SimpleNamespace(unwrap_model=lambda network: network)
    run = SimpleNamespace(model=model, discriminator=discriminator, config=config, accelerator=unprepared)
    return {
        "flops_per_image": count_flops(run),
        "encoder_bytes": sum(p.nbytes for p in model.encoder.parameters()),
        "decoder_bytes": sum(p.nbytes for p in model.decoder.parameters()),
        "heads_bytes": sum(p.nbytes for p in trained(discriminator)),
        "blocks": config.model.decoder_num_hidden_layers,
        "global_batch_size": published.train.global_batch_size,
    }


def step_seconds(work: dict, images: int, gpus: int, mfu: float) -> dict:
    """Seconds of a step with `images` on each GPU, at most MICRO_BATCH at a time: computing, the reduction of DDP's
    gradients if nothing else happened, what is left of it beside the backward pass of the last micro-batch, and the
    steps with DDP and FSDP2.

    The time of computing is its FLOPs through `mfu`, whatever the batch. A backward pass is two thirds of a pass both
    ways. The gradients of the discriminator's heads, which are few, hide behind nothing. FSDP2 gathers for every
    micro-batch the encoder once and the decoder three times: forward, backward, and on clean latents.
    """
    count = math.ceil(images / MICRO_BATCH)  # micro-batches
    flops = work["flops_per_image"]

    def compute(name: str) -> float:
        """Of one micro-batch."""
        return flops[name] * images / count / (mfu * MATRIX_RATE)

    whole = count * sum(map(compute, flops))
    both = compute("decoder, forward and backward")
    decoder = transfer_seconds(work["decoder_bytes"], gpus)
    encoder = transfer_seconds(work["encoder_bytes"], gpus)
    heads = 2 * transfer_seconds(work["heads_bytes"], gpus)
    ddp = heads + exposed(2 * decoder, 2 / 3 * both, math.ceil(work["decoder_bytes"] / BUCKET))
    blocks = work["blocks"]
    every = [
        exposed(encoder, compute("encoder"), blocks),
        exposed(decoder, both / 3, blocks),
        exposed(decoder, compute("decoder on clean latents"), blocks),
    ]
    backward = [exposed(decoder, 2 / 3 * both, blocks)] * (count - 1) + [exposed(2 * decoder, 2 / 3 * both, blocks)]
    return {
        "compute": whole,
        "reduction": 2 * decoder + heads,
        "exposed": ddp,
        "DDP": whole + ddp,
        "FSDP2": whole + heads + count * sum(every) + sum(backward),
    }


def scaling_rows(work: dict, mfu: float) -> dict:
    """For both kinds of scaling and each number of GPUs: seconds, images per second, and their share of what as many
    GPUs would do without talking to each other."""
    kinds = {
        f"{MICRO_BATCH} images on each GPU": lambda gpus: MICRO_BATCH,
        f"{work['global_batch_size']} images in all, as published": lambda gpus: work["global_batch_size"] // gpus,
    }
    rows = {}
    for kind, images_on in kinds.items():
        rows[kind] = []
        for gpus in GPUS:
            images = images_on(gpus)
            seconds = step_seconds(work, images, gpus, mfu)
            rates = {f"{how}_images_per_s": gpus * images / seconds[how] for how in ("DDP", "FSDP2")}
            share = {f"{how}_share": seconds["compute"] / seconds[how] for how in ("DDP", "FSDP2")}
            rows[kind].append({"gpus": gpus, "images_per_gpu": images, "seconds": seconds, **rates, **share})
    return rows


def model_table(preset: str, work: dict, rows: dict) -> str:
    heads = ("GPUs", "images each", "compute ms", "reduction ms", "exposed ms", "DDP images/s", "share",
             "FSDP2 images/s", "share")  # fmt: skip
    lines = [
        f"{preset}: {sum(work['flops_per_image'].values()) / 1e12:.3f} TFLOP an image, weights of the decoder "
        f"{work['decoder_bytes'] / 1e6:.0f} MB, of the discriminator's heads {work['heads_bytes'] / 1e6:.0f} MB"
    ]
    for kind, table in rows.items():
        lines += [kind, "".join(f"{head:>15}" for head in heads)]
        for row in table:
            ms = (f"{1e3 * row['seconds'][name]:.0f}" for name in ("compute", "reduction", "exposed"))
            rates = (
                part
                for how in ("DDP", "FSDP2")
                for part in (f"{row[f'{how}_images_per_s']:.0f}", f"{row[f'{how}_share']:.0%}")
            )
            lines.append("".join(f"{cell:>15}" for cell in (row["gpus"], row["images_per_gpu"], *ms, *rates)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mfu", type=float, default=0.43, help="share of the matrix rate that a GPU reaches by itself")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    first, *others = run_processes(CASES, DECODER, measured=True)
    if any(other["cases"] != first["cases"] for other in others):
        sys.exit("error: the processes started different collectives")
    for name, case in first["cases"].items():
        check_reductions(name, case)
    print(f"one step on {PROCESSES} CPU processes, counted\n{collectives_table(first['cases'])}\n")
    result = first["exposed"]
    milliseconds = {
        "without a reduction": result["seconds"]["without"],
        "with it": result["seconds"]["with"],
        "exposed": result["exposed"],
        "exposed by the model": result["predicted_exposed"],
        "if nothing hid": result["not_hidden_at_all"],
    }
    print("the decoder's backward pass on these processes, ms: "
          + ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in milliseconds.items()), end="\n\n")  # fmt: skip

    model = {}
    print(f"a model, not a measurement: {args.mfu * MATRIX_RATE / 1e12:.0f} TFLOP/s a GPU, {GPUS_PER_MACHINE} GPUs a "
          f"machine, NVLink {NVLINK / 1e9:.0f} GB/s, network {NETWORK / 1e9:.0f} GB/s a machine, "
          f"{LINK_EFFICIENCY:.0%} of both")  # fmt: skip
    for preset in PRESETS:
        work = workload(preset)
        model[preset] = {**work, "rows": scaling_rows(work, args.mfu)}
        print(model_table(preset, work, model[preset]["rows"]))
    if args.json:
        numbers = {"torch": torch.__version__, **vars(args), "counted": first["cases"], "exposed": result}
        Path(args.json).write_text(json.dumps({**numbers, "model": model}, indent=1))


if __name__ == "__main__":
    run_main(main)
