"""FSDP2 on CPU processes beside DDP: the same numbers from half the memory, the same checkpoints and models."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import PLAIN, ROOT, TINY, checkpoint_state, flags, read_metrics, run_command, same
from test_encoders import FAMILIES, from_architecture
from test_modeling import images as pixels
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import FSDPModule

import train_rae
from modeling_rae import RAEModel
from rae_suite.launch import FSDP_SETTINGS, check_launch, check_processes
from rae_suite.sharding import shard

CONFIG = ROOT / "accelerate_configs" / "fsdp2_8gpu.yaml"
EVERYTHING = {**TINY, "train.gradient_accumulation_steps": "2", "train.max_steps": "4", "eval.every_steps": "4"}
COMPILED = {
    **PLAIN,
    "train.compile": "true",
    "train.gradient_accumulation_steps": "2",
    "train.max_steps": "3",
    "gan.start_step": "1",
}
PLAIN_STEPS = {**COMPILED, "train.compile": "false"}
# what else changes how a network is computed
OTHER = {
    **PLAIN,
    "train.mixed_precision": "bf16",
    "train.max_steps": "4",
    "model.gradient_checkpointing": "true",
    "model.encoder_layers": "[0, 1]",
    "model.train_position_embedding": "true",
    "eval.every_steps": "4",
}
# 3 images for 2 processes, one at a time: the second process has an empty batch; then a single image
THREE = {
    **PLAIN,
    "gan.weight": "0",
    "train.clip_grad_norm": "0.01",
    "train.max_steps": "2",
    "eval.batch_size": "1",
    "eval.num_samples": "3",
    "eval.metrics": "[psnr, rfdd]",
    "eval.raw": "true",
}
SKIPPED = {**PLAIN, "train.max_steps": "4", "eval.every_steps": "4", "train.max_nonfinite_steps": "1"}
ONE = {**THREE, "train.max_steps": "1", "eval.num_samples": "1", "eval.metrics": "[psnr]"}


def run_of(settings: dict) -> list:
    return ["train_rae.py", *flags(settings)]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """(folder of the runs' folders, for each process what distributed_runs.py says of each run)."""
    root = tmp_path_factory.mktemp("fsdp")
    plan = [
        ("all_ddp", False, EVERYTHING),
        ("all_fsdp", True, EVERYTHING),
        ("plain_ddp", False, PLAIN_STEPS),
        ("compiled_ddp", False, COMPILED),
        ("compiled_fsdp", True, COMPILED),
        ("other_ddp", False, OTHER),
        ("other_fsdp", True, OTHER),
        ("changing", True, {**OTHER, "train.max_steps": "1"}),
        ("changing", True, {**OTHER, "train.max_steps": "2"}),
        ("changing", False, {**OTHER, "train.max_steps": "3"}),
        ("changing", True, OTHER),
        ("three_ddp", False, THREE),
        ("three_fsdp", True, THREE),
        ("one", True, ONE),
        ("skipped_ddp", False, SKIPPED),
        ("skipped_fsdp", True, SKIPPED),
    ]
    file = root / "runs.json"
    file.write_text(
        json.dumps(
            [
                {
                    "fsdp": fsdp,
                    "argv": [
                        "train_rae.py",
                        *flags({**settings, "data.path": images, "train.output_dir": root / name}),
                    ],
                    "nan_steps": [0, 2] if settings is SKIPPED else [],
                }
                for name, fsdp, settings in plan
            ]
        )
    )
    launch = ("--config_file", CONFIG, "--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0)
    done = run_command("tests/distributed_runs.py", file, launch=tuple(map(str, launch)), HF_HOME=str(root / "cache"))
    assert done.stdout.count("RAE sharded (FSDP2)") == sum(fsdp for _, fsdp, _ in plan)
    held = [json.loads(file.with_suffix(f".rank{rank}.json").read_text()) for rank in (0, 1)]
    return root, [{name: rank[i] for i, (name, *_) in enumerate(plan)} for rank in held]


@pytest.mark.parametrize("settings", ["all", "compiled", "other", "three", "skipped"])
def test_numbers_are_those_of_ddp(runs, settings):
    """Every loss of every step and every evaluation: with LPIPS, GAN and accumulation; compiled; in bf16 with
    activations computed again; with clipping, and a process without an image."""
    root, _ = runs
    expected, found = (read_metrics(root / f"{settings}_{how}") for how in ("ddp", "fsdp"))
    assert len(expected) == len(found) > 2
    for a, b in zip(expected, found, strict=True):
        assert b == {key: pytest.approx(value, rel=1e-5) if type(value) is float else value for key, value in a.items()}
    if settings == "all":
        last = found[-2]
        assert last["kind"] == "train" and last["gan"] != 0 and last["lpips"] > 0 and last["disc_loss"] > 0
    if settings == "three":
        assert [line["num_samples"] for line in found if line["kind"] == "eval"] == [3, 3, 3, 3]


def test_compiled_numbers(runs):
    """train.compile in two processes, with accumulation: the losses of a run without. The graphs are those of one
    process (test_speed.py): torch would cut the heads' at DDP's buckets, and inductor's code of the parts fails."""
    root, held = runs
    assert [rank[f"compiled_{how}"]["graphs"] for rank in held for how in ("ddp", "fsdp")] == [7] * 4  # without LPIPS
    assert {rank["plain_ddp"]["graphs"] for rank in held} == {0}
    for a, b in zip(*(read_metrics(root / f"{name}_ddp") for name in ("plain", "compiled")), strict=True):
        numbers = {key: value for key, value in a.items() if type(value) is float}
        # rounding of gradients near zero becomes Adam's sign
        tolerance = 1e-4 if a["step"] < 2 else 2e-2
        assert {key: b[key] for key in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance)


def test_a_single_evaluation_image(runs):
    evals = [line for line in read_metrics(runs[0] / "one") if line["kind"] == "eval"]
    assert [line["num_samples"] for line in evals] == [1, 1, 1, 1] and all(line["psnr"] > 5 for line in evals)


@pytest.mark.parametrize("name, expected", [("all_fsdp", "all_ddp"), ("other_fsdp", "other_ddp"),
                                            ("changing", "other_ddp"), ("skipped_fsdp", "skipped_ddp")])  # fmt: skip
def test_checkpoints_are_those_of_ddp(runs, name, expected):
    """Networks, moving average and both optimizers to the last bit; also of a run that was continued three times, from
    FSDP with FSDP, then with DDP, then with FSDP again."""
    root, _ = runs
    assert same(checkpoint_state(root / name), checkpoint_state(root / expected))


def test_skipped_steps_of_a_sharded_model(runs):
    """Two steps in which one process has a nan, the first one included: they are skipped on both."""
    root, _ = runs
    state = checkpoint_state(root / "skipped_fsdp")
    assert state["state"]["skipped_steps"] == 2
    assert {entries["step"].item() for entries in state["optimizer"]["state"].values()} == {2}
    for part in ("decoder", "ema"):
        assert all(tensor.isfinite().all() for tensor in state[part].values())


def test_final_model_loads_without_fsdp(runs):
    root, _ = runs
    expected, found = (RAEModel.from_pretrained(root / name / "final") for name in ("all_ddp", "all_fsdp"))
    assert type(found) is RAEModel and same(found.state_dict(), expected.state_dict())
    assert same({name: p.detach() for name, p in found.decoder.named_parameters()},
                checkpoint_state(root / "all_fsdp")["ema"])  # fmt: skip
    for file in (root / "all_ddp" / "final").iterdir():
        assert file.read_bytes() == (root / "all_fsdp" / "final" / file.name).read_bytes(), file.name


def test_one_process_continues(runs, images, new_accelerator, monkeypatch, capsys):
    """A sharded run's checkpoint goes on in a single process."""
    root, _ = runs
    settings = {**OTHER, "data.path": images, "train.output_dir": root / "changing", "train.max_steps": "5"}
    monkeypatch.setattr("sys.argv", ["train_rae.py", *flags(settings)])
    train_rae.main()
    assert f"continuing from {root / 'changing' / 'checkpoints' / 'step-00000004'}" in capsys.readouterr().out
    assert read_metrics(root / "changing")[-1]["step"] == 5


def test_each_process_holds_its_share(runs):
    """About half of the weights, the encoder's included, of the moving average and of the optimizer's state: what is
    one row, such as the position table, is on the first process."""
    _, held = runs
    for name, whole in held[0]["all_ddp"]["bytes"].items():
        shares = [rank["all_fsdp"]["bytes"][name] for rank in held]
        assert sum(shares) == whole and max(shares) < 0.56 * whole, name


def test_heads_are_the_same_on_all_processes(runs):
    """The discriminator is not sharded: every process has its heads whole, and after training those of DDP."""
    _, held = runs
    for name in ("all", "other", "skipped"):
        assert len({rank[f"{name}_{how}"]["heads"] for rank in held for how in ("ddp", "fsdp")}) == 1
    assert held[0]["all_fsdp"]["heads"] != held[0]["other_fsdp"]["heads"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_of_every_family_are_units(model_type, new_accelerator):
    """What a sharded model computes, with latents from several blocks; and all its blocks are units."""
    model = from_architecture(model_type, encoder_layers=[0, 2, 3])
    with torch.no_grad():
        latent = model.encode(pixels()).latent
        sample = model.decode(latent).sample
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = shard(model, Accelerator(cpu=True), ("encode",))
        with torch.no_grad():
            assert torch.equal(sharded.encode(pixels()).latent, latent)
        for _ in range(2):
            out = sharded(latent=latent)
            torch.testing.assert_close(out.sample, sample, rtol=1e-6, atol=1e-6)
            out.sample.square().mean().backward()
        assert all(p.grad is not None for p in sharded.decoder.parameters() if p.requires_grad)
        units = [type(m).__name__ for part in (sharded.encoder, sharded.decoder) for m in part.modules()
                 if isinstance(m, FSDPModule)]  # fmt: skip
        assert units.count("FSDPRAEDecoderLayer") == len(sharded.decoder.decoder_layers)
        blocks = [name for name in units if name.endswith("Layer") and name != "FSDPRAEDecoderLayer"]
        assert len(blocks) == 4, units
    finally:
        destroy_process_group()


# ---------------------------------------------------------------------------------------------- what can be asked for


def test_accelerate_configs_are_accelerates():
    """Accelerate reads every file (it refuses unknown keys), and hands on what sharding.py accepts."""
    for file in sorted(CONFIG.parent.glob("*.yaml")):
        config = load_config_from_file(str(file))
        assert config.num_processes >= 1, file
        assert (config.distributed_type == DistributedType.FSDP) == (file == CONFIG)
    settings = load_config_from_file(str(CONFIG)).fsdp_config
    assert settings.keys() <= FSDP_SETTINGS.keys()
    for name, value in settings.items():
        assert str(value).lower() == FSDP_SETTINGS[name][1].lower()


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version 2, got 1"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward true, got false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params false, got true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend no, got INDUCTOR; train.compile"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config is not supported"),
    ],
)
def test_other_ways_are_refused(environment, words, monkeypatch):
    """One line that names the setting, what it is and what is expected; DDP's settings are not looked at."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if words.startswith("fsdp_"):
        check_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate launch: ") as caught:
        check_launch()
    assert words in str(caught.value)


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    """accelerate launch starts several processes for GPUs, and there is none: each would train alone."""
    check_processes(Accelerator(cpu=True))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="it started 2 processes, .* set ACCELERATE_USE_CPU=true"):
        check_processes(Accelerator(cpu=True))
