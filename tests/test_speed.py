"""Compiled training, and the benchmarks of a training step through the functions that they run, tiny. On a CPU."""

import importlib
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, checkpoint_state, flags, read_metrics, run_command
from forked import forks
from torch.nn import functional as F

import train_rae
from modeling_rae import RAEModel
from rae_suite import launch, rae_networks

sys.path.insert(0, str(ROOT / "benchmarks"))
memory, scaling, train_step = (importlib.import_module(name) for name in ("memory", "scaling", "train_step"))

SMALL = {key: TINY[key] for key in TINY if key.startswith("model.")} | {"train.cpu_threads": "1"}
# another family: several blocks averaged, the last block not built, no CLS token, grids of other sizes
SIGLIP = {
    "model.encoder": "siglip_vision_model",
    "model.encoder_config": json.dumps(
        {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40, "patch_size": 8,
         "image_size": 32}
    ),
    "model.encoder_layers": "[0, 2]",
    "model.decoder_patch_size": "8",
    "gan.kernel_size": "3",
    "gan.disc_input": "reuse",
}  # fmt: skip


def tiny_config(batch_size=2, **settings):
    AcceleratorState._reset_state()
    return train_step.benchmark_config("digits_tiny", batch_size, "no", flags({**SMALL, **settings}))


# ---------------------------------------------------------------------------------------------------- the step's time


def test_published_step_is_the_same_step(tmp_path, monkeypatch, capsys):
    """Every variant gives this repository's losses, with each improvement alone too; FLOPs are those that torch counts;
    the table shows what was measured. The command itself ends with an error where losses or FLOPs differ."""
    AcceleratorState._reset_state()
    arguments = [
        "--preset",
        "digits_tiny",
        "--repeats",
        "1",
        "--baseline",
        "--levers",
        "--json",
        tmp_path / "step.json",
    ]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, arguments), *flags(SMALL)])
    train_step.main()
    result = json.loads((tmp_path / "step.json").read_text())
    published = ["published loop", *(f"published loop with {lever}" for lever in train_step.LEVERS)]
    assert list(result["steps"]) == [
        "this repository", "this repository with gan.disc_input reuse", *published
    ]  # fmt: skip
    assert result["differences"].keys() == {"this repository", *published}
    assert max(result["differences"].values()) < 1e-4
    assert sum(result["flops_per_image"].values()) == pytest.approx(result["flops_counted_by_torch"], rel=1e-3)
    assert result["parts"].keys() >= result["flops_per_image"].keys()
    own, theirs = (result["steps"][name][0] for name in ("this repository", "published loop"))
    assert result["times_published"] == theirs / own and result["images_per_second"]["this repository"] == 2 / own
    assert result["mfu"] == pytest.approx(result["flops_counted_by_torch"] * 2 / own / result["matrix_rate"], rel=1e-3)
    assert result["mfu_in_a_row"] == pytest.approx(result["mfu"] * own / result["seconds_in_a_row"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*result["parts"], *result["steps"], "steps in a row"))


OTHER = {
    "gan.augment_prob": "0.5",
    "gan.augment_cutout": "0.2",
    "gan.updates_per_step": "2",
    "train.clip_grad_norm": "1",
}


@pytest.mark.parametrize("settings", [{}, SIGLIP, OTHER])
def test_no_value_is_read_in_a_step(settings, monkeypatch):
    """With every loss on, nothing goes back to the host. What does is seen."""
    accelerator = launch.build_accelerator((config := tiny_config(**settings)).train, ())
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), 1)
    pixels = torch.rand(2, 3, 32, 32)
    record = train_rae.train_step(run, [pixels], 0).read()
    assert record["nonfinite"] is None and 0 not in (record["lpips"], record["gan"], record["disc_loss"])
    assert train_step.host_reads(run, pixels) == 0
    update = run.ema.update
    monkeypatch.setattr(run.ema, "update", lambda step, unless: None if unless else update(step, unless))
    assert train_step.host_reads(run, pixels) == 1


def test_a_different_step_is_noticed():
    """Other losses than this repository's end the benchmark."""
    accelerator = launch.build_accelerator((config := tiny_config()).train, ())
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), 1)
    pixels = torch.rand(2, 3, 32, 32)
    variants = train_step.step_variants(run, pixels, baseline=True, levers=False)
    assert train_step.check_equal(run, variants, (1e-4, 1e-2)).keys() == variants.keys()
    variants["published loop"].take.args[0].add_(0.01)  # its images
    variants["this repository"].take = lambda step, other=pixels - 0.01: train_rae.train_step(run, [other], step).read()
    with pytest.raises(SystemExit, match="losses differ"):
        train_step.check_equal(run, variants, (1e-4, 1e-2))


def test_flops_of_another_architecture():
    accelerator = launch.build_accelerator((config := tiny_config(**SIGLIP)).train, ())
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), 1)
    counted = train_step.counted_flops(run, torch.rand(2, 3, 32, 32)) / 2
    assert sum(train_step.count_flops(run).values()) == pytest.approx(counted, rel=1e-3)


def test_published_flops():
    """The MACs that the RAE paper gives for its decoders are those of the linear layers: 22.2 and 106.7 G."""
    for sizes, macs in (((768, 3072, 12), 22.2e9), ((1152, 4096, 28), 106.7e9)):
        linear, _ = train_step.transformer_flops(257, *sizes)
        ends = 256 * 768 * sizes[0] + 257 * sizes[0] * 768  # the first and the last Linear
        assert linear / 2 + ends == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize("preset", memory.PRESETS)
def test_every_preset_has_its_sizes(preset):
    """The benchmarks know every preset's encoder: it is random, and its grid is the preset's."""
    config = train_step.benchmark_config(preset, 2, "no")
    assert config.model.encoder_weights == config.gan.weights == config.perceptual.weights == "random"
    assert rae_networks.build_rae_config(config.model).image_size == config.model.image_size


# ------------------------------------------------------------------------------------------------------------- memory


def test_calculated_memory_is_that_of_a_real_step():
    """Tensors without values take the same memory as real ones, to the byte; weights and states by hand."""
    calculation = memory.Calculation(config := tiny_config(8))
    peak, between = calculation.peak(8)
    checkpointed, _ = calculation.peak(8, checkpointing=True)
    assert between < checkpointed < peak

    accelerator = launch.build_accelerator(config.train, config.logging.report_to)
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), 1)
    real = memory.LiveMemory()
    with real:
        tensors = [t for n in (run.model, run.discriminator, run.perceptual) for t in (*n.parameters(), *n.buffers())]
        for tensor in (*tensors, *run.ema.shadow.values()):
            real.add(tensor)
        pixels = torch.rand(8, 3, 32, 32)
        for step in range(2):
            real.peak, held = real.live, real.live
            train_rae.train_step(run, [pixels], step)
    assert peak == pytest.approx(real.peak, rel=1e-3)
    assert between == pytest.approx(held, rel=1e-3)
    weights = sum(t.nbytes for t in tensors)
    trained = [p for p in (*run.model.decoder.parameters(), *run.discriminator.parameters()) if p.requires_grad]
    states = 2 * sum(p.nbytes for p in trained) + sum(t.nbytes for t in run.ema.shadow.values())
    assert between == pytest.approx(weights + states + pixels.nbytes, rel=1e-2)


def test_autocast_of_gpus():
    """The types that LPIPS's distance and a LayerNorm have under autocast on a GPU, in what is calculated for one. More
    micro-batches of the same size hold the decoder's gradients and the images besides."""
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x**2).dtype == torch.bfloat16
        with memory.AutocastOfGPUs():
            assert (x**2).dtype == x.sum().dtype == F.layer_norm(x, (8,)).dtype == torch.float32
            assert F.linear(x, torch.randn(3, 8)).dtype == F.gelu(x).dtype == torch.bfloat16
    calculation = memory.Calculation(config := tiny_config(8))
    one, between = calculation.peak(8)
    two, _ = calculation.peak(8, micro_batches=2)
    images = 8 * 3 * config.model.image_size**2 * 4
    assert images < two - one < images + between


def test_memory_command(tmp_path):
    done = run_command(
        "benchmarks/memory.py", "--presets", "digits_tiny", "--mixed_precision", "no", "--batch_sizes", 4, 8, 16,
        "--json", tmp_path / "memory.json", *flags(SMALL),
    )  # fmt: skip
    off, on = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert done.stdout.count("digits_tiny") == 2 and not off["gradient_checkpointing"] and on["gradient_checkpointing"]
    low, middle, high = off["peak_gib"].values()
    assert high - middle == pytest.approx(2 * (middle - low), rel=0.02)
    usable = (memory.CARDS["24 GB"] - 1) * 0.95
    assert low + (off["largest_batch"]["24 GB"] - 4) * off["gib_per_image"] == pytest.approx(usable, rel=0.01)


# ------------------------------------------------------------------------------------------------ several processes


def test_gradients_are_reduced_once():
    """Two processes, every loss but LPIPS: a step reduces the decoder's gradients once, the heads' once an update,
    within backward passes, whatever the number of micro-batches; beside that one small collective for each record."""
    forks()  # its processes have the libraries
    several = {"train.gradient_accumulation_steps": 4, "gan.updates_per_step": 2}
    cases = [("one", False, {}), ("several", False, several), ("sharded", True, several)]
    settings = {**SMALL, "perceptual.weight": 0, "eval.metrics": "[psnr]"}
    first, second = (rank["cases"] for rank in scaling.run_processes(cases, settings, start_method="forkserver"))
    assert first == second
    for name, updates in (("one", 1), ("several", 2), ("sharded", 2)):
        case, calls, sizes = first[name], first[name]["collectives"], first[name]["parameters"]
        scaling.check_reductions(name, case)
        decoder, heads = (scaling.reduced(case, step) for step in ("decoder_step", "discriminator_step"))
        assert len(heads) == updates
        # its fixed position embedding has no gradient; a sharded CLS token of one row is padded to two
        reduced = sum(call["bytes"] for call in decoder)
        assert reduced == sizes["decoder"] + 4 * 32 * ((name == "sharded") - (8 * 8 + 1)), name
        gathered = [call for call in calls if "gather" in call["collective"]]
        if name == "sharded":  # for each micro-batch the decoder in three passes, the encoder in one
            total, expected = sum(call["bytes"] for call in gathered), 4 * (3 * sizes["decoder"] + sizes["encoder"])
            assert expected <= total < 2 * expected, (total, expected)
        records = [call for call in calls if call not in (*decoder, *heads, *gathered)]
        records = [call for call in records if call["asked_by"][-1] != "gradient_norm"]
        assert [call["asked_by"][0] for call in records] == ["decoder_step"] + updates * ["discriminator_step"]
        assert all(call["backward"] is None and call["bytes"] <= 64 for call in records)

    case["collectives"] += heads
    with pytest.raises(SystemExit, match="discriminator_step reduces .* bytes of gradients, expected"):
        scaling.check_reductions(name, case)


def test_scaling_model():
    """Overlap is that of a pipeline of two stages, piece by piece; one GPU exchanges nothing; more GPUs are never
    faster than as many alone."""
    for first, second, pieces in ((3.0, 9.0, 6), (9.0, 3.0, 6), (2.0, 2.0, 1), (0.0, 5.0, 4)):
        end_of_first = end = 0.0
        for _ in range(pieces):
            end_of_first += first / pieces
            end = max(end, end_of_first) + second / pieces
        assert scaling.exposed(first, second, pieces) == pytest.approx(end - second)
    nvlink, network = (rate * scaling.LINK_EFFICIENCY for rate in (scaling.NVLINK, scaling.NETWORK))
    assert scaling.transfer_seconds(1e9, 8) == pytest.approx(1e9 * 7 / 8 / nvlink)
    assert scaling.transfer_seconds(1e9, 16) == pytest.approx(1e9 * 7 / 8 / nvlink + 1e9 / 2 / network)
    work = scaling.workload("dinov2_b")
    assert work["decoder_bytes"] == pytest.approx(4 * 415.4e6, rel=1e-3)  # benchmarks/README.md
    rows = scaling.scaling_rows(work, mfu=0.5)
    for kind in rows.values():
        assert kind[0]["DDP_share"] == kind[0]["FSDP2_share"] == 1
        for how in ("DDP", "FSDP2"):
            shares = [row[f"{how}_share"] for row in kind]
            assert shares == sorted(shares, reverse=True) and shares[-1] < 0.8
    alone = work["global_batch_size"] * sum(work["flops_per_image"].values()) / (0.5 * scaling.MATRIX_RATE)
    assert [kind[0]["seconds"]["DDP"] for kind in rows.values()] == pytest.approx([alone / 8, alone])
    text = scaling.model_table("dinov2_b", work, rows)
    assert all(f"{row['DDP_images_per_s']:.0f}" in text for kind in rows.values() for row in kind)


# -------------------------------------------------------------------------------------------------------- compilation


def test_compiled_run(images, tmp_path, monkeypatch):
    """train.compile: no graph break (it would be an error), no new graph after the first step, evaluations in between;
    losses, checkpoints and exported weights are those of a run without."""
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
           "patch_size": 4, "image_size": 32}  # fmt: skip
    settings = {**TINY, "data.path": images, "train.max_steps": 4, "eval.every_steps": 2, "perceptual.start_step": 0,
                "gan.start_step": 0, "gan.update_start_step": 0, "model.encoder": "vit",  # as the backbone is
                "model.encoder_config": json.dumps(vit)}  # fmt: skip
    graphs = []
    take = train_rae.train_step

    def counting(*args):
        record = take(*args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return record

    monkeypatch.setattr(train_rae, "train_step", counting)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in ("false", "true"):
        AcceleratorState._reset_state()
        run = {**settings, "train.compile": compiled, "train.output_dir": tmp_path / compiled}
        monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags(run)])
        # inductor's partition of the graphs without its code, which takes minutes
        with torch.compiler.set_stance(force_backend="aot_eager_decomp_partition"):
            train_rae.main()
    # decoder's blocks with and without gradient, the backbone's likewise, the encoder's, LPIPS, and the heads for the
    # decoder and for their own pass
    assert graphs == [0, 0, 0, 0, 8, 8, 8, 8]
    assert not torch._dynamo.utils.counters["graph_break"]
    plain, compiled = (read_metrics(tmp_path / name) for name in ("false", "true"))
    assert [line["kind"] for line in plain] == [line["kind"] for line in compiled]
    for a, b in zip(plain, compiled, strict=True):
        tolerance = 1e-4 if a["step"] < 2 else 2e-2  # rounding of gradients near zero becomes Adam's sign
        numbers = {name: value for name, value in a.items() if isinstance(value, float)}
        assert numbers and {name: b[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance)
    parts = [checkpoint_state(tmp_path / name) for name in ("false", "true")]
    for part in ("decoder", "ema", "discriminator"):
        assert parts[0][part].keys() == parts[1][part].keys()
        for name, tensor in parts[0][part].items():
            other = parts[1][part][name]
            if part != "discriminator":
                torch.testing.assert_close(other, tensor, rtol=1e-2, atol=1e-3, msg=f"{part} {name}")
            elif not name.endswith(".0.bias"):  # the norm after it cancels it: its gradient is rounding
                assert (other - tensor).norm() < 5e-2 * tensor.norm(), f"{part} {name}"
    exported = RAEModel.from_pretrained(tmp_path / "true" / "final")
    assert all(torch.equal(p, parts[1]["ema"][name]) for name, p in exported.decoder.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"gan.weight": 0, "model.gradient_checkpointing": "true"},
        {"gan.start_step": 0, "gan.update_start_step": 0, "gan.norm": "group", "gan.disc_input": "reuse",
         "gan.updates_per_step": 2, "train.mixed_precision": "bf16"},
    ],
)  # fmt: skip
def test_compiled_run_continues_without(settings, images, new_accelerator, tmp_path, monkeypatch):
    """A compiled run goes on uncompiled from its checkpoint, and gives the losses of one that never was compiled: with
    activations computed again; in bf16, with what else the discriminator may do."""
    settings = {**TINY, "data.path": images, "perceptual.weight": 0, "eval.metrics": "[psnr]", **settings}
    plan = (("compiled", 2, "true"), ("compiled", 3, "false"), ("plain", 3, "false"))
    torch._dynamo.reset()
    for name, steps, compiled in plan:
        AcceleratorState._reset_state()
        change = {"train.output_dir": tmp_path / name, "train.max_steps": steps, "train.compile": compiled}
        monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags({**settings, **change})])
        with torch.compiler.set_stance(force_backend="aot_eager_decomp_partition"):
            train_rae.main()
    compiled, plain = (
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"}
        for name in ("compiled", "plain")
    )
    assert list(plain) == [1, 2, 3] and compiled == pytest.approx(plain, rel=2e-2)
