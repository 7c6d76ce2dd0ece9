"""Every case of bad_inputs.py through what reads it: the documented outcome, in one line, and no code that runs.

Whole folders of images go through the real command lines, single cases through the functions that those call.
"""

import csv
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import bad_inputs
import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PLAIN, flags, read_metrics, run_command

import eval_rfid
import linear_probe
import train_rae
from modeling_rae import RAEConfig, RAEModel
from rae_suite import errors, loaders, run_folder, sources, splits
from rae_suite.cli import config_dict, flat
from rae_suite.discriminator import load_backbone
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.frechet import FrechetMetric, read_references
from rae_suite.generation_metrics import FeatureSpace
from rae_suite.generation_reference import open_reference, read_reference
from rae_suite.inception import load_inception
from rae_suite.launch import quiet_transformers, run_main
from rae_suite.lpips_vgg16 import build_lpips
from rae_suite.model_loading import load_autoencoder
from rae_suite.rae_networks import read_latent_stats
from rae_suite.run_folder import MetricsFile
from rae_suite.settings import check_same_config
from rae_suite.settings_rae import parse_config
from rae_suite.start_weights import read_decoder_start
from scripts import compute_latent_stats, convert_checkpoint, prepare_data, push_to_hub, reconstruct

pytestmark = pytest.mark.usefixtures("nothing_runs")


@pytest.fixture(scope="module")
def corpus() -> dict:
    """{folder: its cases}."""
    quiet_transformers()
    cases = {}
    for case in bad_inputs.corpus():
        cases.setdefault(case.file.split("/")[0], []).append(case)
    return cases


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """The corpus as files."""
    folder = tmp_path_factory.mktemp("corpus")
    bad_inputs.write([case for cases in corpus.values() for case in cases], folder)
    return folder


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """Code in a file would make a folder SPRUNG in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "SPRUNG").exists()


def outcome_of(read, *arguments) -> str:
    """The line of the ConfigError that `read` ends in, or "read"."""
    try:
        read(*arguments)
    except ConfigError as error:
        return " ".join(str(error).split())  # as errors.fail writes it
    return "read"


def check(case, line: str) -> None:
    """Whether what became of a case is what its table says."""
    assert (line == "read") == (case.outcome == "read"), f"{case.file}: {line}"
    for word in case.words if case.outcome == "error" else ():
        assert str(word) in line, f"{case.file}: {line}"
    assert len(line) < 1000, f"{case.file}: {line}"


def refused(capsys, monkeypatch, main, *argv) -> str:
    """Run a command line in this process; the one line with which it ends, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


# The corpus -----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_the_same_each_time(corpus):
    cases = [case for part in corpus.values() for case in part]
    assert len(cases) >= 200 and len({case.file for case in cases}) == len(cases)
    assert Counter(case.outcome for case in cases).keys() == {"read", "skipped", "ignored", "error"}
    assert all(len(part) >= 9 for part in corpus.values())
    contents = {case.file: case.content for case in cases}
    repeated = bad_inputs.image_cases() + bad_inputs.file_cases() + bad_inputs.reference_cases()
    assert not [case.file for case in repeated if case.content != contents[case.file]]


def test_traps_work(tmp_path):
    """What must never be unpickled or imported does leave its trace where it is."""
    traps = bad_inputs.trap_files()
    for name in ("trap_torch", "trap_old_torch", "trap_zip"):
        (tmp_path / name).write_bytes(traps[name])
        torch.load(tmp_path / name, weights_only=False)
        (tmp_path / "SPRUNG").rmdir()
    exec(bad_inputs.HOSTILE_CODE)
    (tmp_path / "SPRUNG").rmdir()


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_of_a_folder(corpus, folder):
    """Good ones give the right pixels, bad ones are named; no other file is an image."""
    source = splits.scan_folder(str(folder / "images"))
    places = {source.name(i): i for i in range(len(source))}
    for case in corpus["images"]:
        name = str(folder / case.file)
        assert (name not in places) == (case.outcome == "ignored"), name
        if case.outcome == "read":
            found = np.asarray(source.load(places[name])).astype(int)
            assert found.shape == case.pixels.shape, f"{name}: {found.shape}"
            assert np.abs(found - case.pixels).mean() <= case.tolerance, f"{name}: {case.what}"
        elif case.outcome == "skipped":
            with pytest.raises(errors.UnreadableImage, match=Path(name).name):
                source.load(places[name])


def test_images_in_a_column(corpus):
    """The same from the bytes of a `datasets` column. An image that cannot be read counts once, however often it is
    met."""
    cases = [case for case in corpus["images"] if case.content is not None and case.outcome != "ignored"]
    rows = datasets.Dataset.from_dict({"image": [case.content for case in cases]})
    source = sources.ColumnSource(rows, "train", "image")
    log = loaders.UnreadableLog(sum(case.outcome == "skipped" for case in cases))
    for number, case in enumerate(cases):
        for _ in range(2):
            item = loaders.EvalImages(source, 8)[number]
            assert (item["pixels"] is None) == (case.outcome == "skipped"), case.file
            log.add(item["unreadable"])
    assert len(log.names) == log.max_unreadable


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for it, whatever the file is called."""
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nmkdir {tmp_path}/SPRUNG\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    (tmp_path / "image.png").write_bytes(bad_inputs.postscript())
    with pytest.raises(errors.UnreadableImage, match="PostScript"):
        splits.scan_folder(str(tmp_path)).load(0)


@pytest.fixture(scope="module")
def numbers(corpus) -> Counter:
    return Counter(case.outcome for case in corpus["images"])


def test_training_on_the_folder(folder, numbers, tmp_path):
    """An epoch over all of them, with every kind of damage among them, and an evaluation of all that can be read."""
    settings = {
        **PLAIN, "data.path": folder / "images", "data.eval_split": "train", "train.output_dir": tmp_path / "run",
        "data.max_unreadable": numbers["skipped"], "train.max_steps": (numbers["read"] + numbers["skipped"]) // 8,
        "eval.every_steps": 1000, "logging.every_steps": 1000, "gan.weight": 0, "data.num_workers": 1,
    }  # fmt: skip
    done = run_command("train_rae.py", *flags(settings))
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert [line["num_samples"] for line in lines] == [numbers["read"]] * 2
    assert f"unreadable image {numbers['skipped']} (at most {numbers['skipped']})" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_of_the_folder(folder, numbers, tmp_path, capsys, monkeypatch):
    """Every image counts once, or is counted as unreadable; one more than allowed ends it."""
    settings = {
        "model": folder / "models/hostile_code", "data.path": folder / "images", "metrics": "[psnr]",
        "output_dir": tmp_path / "out", "data.max_unreadable": numbers["skipped"], "data.num_workers": 0,
    }  # fmt: skip
    run_command("eval_rfid.py", *flags(settings))
    assert json.loads((tmp_path / "out/results.json").read_text())["num_samples"] == numbers["read"]
    settings["data.max_unreadable"] = numbers["skipped"] - 1
    line = refused(capsys, monkeypatch, eval_rfid.main, *flags(settings))
    assert f"data.max_unreadable: {numbers['skipped']} images cannot be read" in line


def test_reconstructions_of_the_folder(folder, numbers, corpus, tmp_path, capsys, monkeypatch):
    """A row for every image that can be read and for no other."""
    settings = {
        "model": folder / "models/bin_beside", "input": folder / "images", "output": tmp_path / "out",
        "data.max_unreadable": numbers["skipped"], "data.num_workers": 0,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *flags(settings)])
    run_main(reconstruct.main)
    with (tmp_path / "out/images.csv").open() as file:
        found = {row["input"] for row in csv.DictReader(file)}
    assert found == {str(folder / case.file) for case in corpus["images"] if case.outcome == "read"}
    assert f"{numbers['skipped']} unreadable skipped" in capsys.readouterr().out


# Configs --------------------------------------------------------------------------------------------------------------


def test_configs(corpus, folder, capsys):
    """Every setting of every wrong type, every group with an unknown key, and YAML that is none."""
    for case in corpus["configs"]:
        try:
            config = parse_config(["--config", str(folder / case.file)])
        except SystemExit as stopped:
            assert stopped.code == 2, case.file
            (line,) = capsys.readouterr().err.splitlines()
            check(case, line)
        else:
            check(case, "read")
            settings = flat(config_dict(config))
            assert {key: settings[key] for key in case.settings} == case.settings, case.file


def test_config_on_the_command_line(folder, tmp_path):
    """As a user sees it: one line, exit code 2, no run folder."""
    arguments = ("--config", folder / "configs/run_code.yaml", "--train.output_dir", tmp_path / "run")
    done = run_command("train_rae.py", *arguments, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_numbers_in_flags(capsys):
    """As in files: what is too large for a float or for any run, also written as `--key=value`."""
    flag = f"--optimizer.lr={'9' * 400}"
    for argv, word in (
        ([flag], "optimizer.lr"),
        (flag.split("="), "optimizer.lr"),
        (["--train.seed", "9" * 400], "train.seed"),
        (["--optimizer.betas", "0.9", "9" * 400], "optimizer.betas"),
        (["--optimizer.betas", "0.9", "1e308"], "optimizer.betas"),
        (["--train.epochs=-1e308"], "train.epochs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_config(argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith(f"error: {word}: expected a number of at most 1e+12"), line


@pytest.mark.parametrize(
    "main, settings, key",
    [
        (eval_rfid.main, {"model": "x", "data.path": "x", "data.num_workers": 3000}, "data.num_workers"),
        (eval_rfid.main, {"model": "x", "data.path": "x", "latent_noise": "[1e308]"}, "latent_noise"),
        (linear_probe.main, {"model": "x", "train.epochs": 1e308}, "train.epochs"),
        (linear_probe.main, {"model": "x", "train.cpu_threads": 20_000}, "train.cpu_threads"),
        (linear_probe.main, {"model": "x", "output_dir": "a\0b"}, "output_dir"),
        (compute_latent_stats.main, {"model": "x", "data.num_workers": 3000}, "data.num_workers"),
        (reconstruct.main, {"model": "x", "input": "x", "output": "y", "data.num_workers": 3000}, "data.num_workers"),
        (push_to_hub.main, {"model": "x", "repo_id": "a/b", "retries": 10**400}, "retries"),
    ],
)
def test_numbers_of_other_commands(main, settings, key, capsys, monkeypatch):
    """The same rules hold in every command."""
    assert refused(capsys, monkeypatch, main, *flags(settings)).startswith(f"error: {key}: expected ")


def test_numbers_of_prepare_data(tmp_path, capsys):
    """Its command line is argparse's."""
    for command, key, value in (
        ("dummy", "num_images", 10**400), ("dummy", "num_classes", 10**30), ("digits", "size", 10**30),
        ("convert", "num_workers", 3000),
    ):  # fmt: skip
        argv = [command, "--output", str(tmp_path / "out"), f"--{key}", str(value)]
        with pytest.raises(SystemExit) as stopped:
            prepare_data.main([*argv, *(["--input", str(tmp_path)] if command == "convert" else [])])
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith(f"error: --{key}: found "), line
    assert not (tmp_path / "out").exists()


def test_config_of_a_run(corpus, folder):
    """A damaged config.yaml in a run folder is named, whatever the damage."""
    config = parse_config([])
    for case in corpus["configs"]:
        if case.outcome == "error":
            assert f"{folder / case.file} is " in outcome_of(check_same_config, config, folder / case.file), case.file


def test_metrics_of_a_run(corpus, folder, tmp_path, capsys, monkeypatch):
    """A damaged metrics.jsonl is named with its line; a last line that a crash cut off is left out."""
    for case in corpus["metrics"]:
        check(case, outcome_of(MetricsFile(folder / case.file, enabled=False).read))
    assert [line["step"] for line in MetricsFile(folder / "metrics/cut_end.jsonl", False).read()] == [1]
    run_dir = tmp_path / "run"
    settings = {**PLAIN, "data.path": folder / "images", "train.output_dir": run_dir, "train.mixed_precision": "no"}
    run_dir.mkdir()
    shutil.copy(folder / "metrics/zeros.jsonl", run_dir / "metrics.jsonl")
    monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags(settings)])
    run_folder.take_run_folder(parse_config(), run_dir).close()  # writes config.yaml
    line = refused(capsys, monkeypatch, train_rae.main, *flags(settings))
    assert f"{run_dir / 'metrics.jsonl'} is damaged: line 2" in line


# Weights --------------------------------------------------------------------------------------------------------------


def readers_of_tensors() -> dict:
    """{setting: function of a path}: every setting that takes a file of tensors."""
    rae_config = RAEConfig.from_dict(json.loads(bad_inputs.model_files()["config.json"]))
    encoder = ["--encoder", "nowhere", "--output", "new", "--to", "rae"]

    def statistics(file: Path) -> None:
        with error_names_setting("model.latent_stats"):
            read_latent_stats(file, rae_config, "model.latent_stats")

    def vgg(file: Path) -> None:
        with error_names_setting("perceptual.vgg_path"):
            build_lpips("pretrained", str(file))

    def backbone(file: Path) -> None:
        with error_names_setting("gan.backbone", str(file)):
            load_backbone(str(file))

    def convert(file: Path) -> None:
        convert_checkpoint.main(["--from", "published", "--input", str(file), *encoder])

    return {
        "model.latent_stats": statistics,
        "perceptual.vgg_path": vgg,
        "gan.backbone": backbone,
        "eval.inception_path": lambda file: load_inception(str(file), "eval.inception_path", torch.device("cpu")),
        "--input": convert,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: sparse tensors are in beta
def test_files_of_tensors(corpus, folder):
    """Truncated, damaged, other things, and code: refused with the setting's and the file's name. Good statistics are
    statistics, and nothing else."""
    for setting, read in readers_of_tensors().items():
        for case in corpus["files"]:
            line = outcome_of(read, folder / case.file)
            if setting == "model.latent_stats":
                check(case, line)
            assert line == "read" or line.startswith(f"{setting}: ") and Path(case.file).name in line, line
            assert line != "read" or setting == "model.latent_stats", (setting, case.file)


def test_folders_of_models(corpus, folder):
    """What every command loads --model with: the folder is refused, or computes what the undamaged one does."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    good = bad_inputs.Case("models/good", "", "read", bad_inputs.model_files())
    bad_inputs.write([good], folder.parent / "undamaged")
    with torch.no_grad():
        expected = RAEModel.from_pretrained(folder.parent / "undamaged/models/good")(pixels).sample
        for case in corpus["models"]:
            check(case, outcome_of(load_autoencoder, str(folder / case.file)))
            if case.outcome == "read":
                model = load_autoencoder(str(folder / case.file))
                torch.testing.assert_close(model.decode(model.encode(pixels)), expected, rtol=1e-3, atol=1e-3)


def test_absurd_numbers_in_diffusers_folders(tmp_path):
    """Of its two autoencoders, wherever they are read."""
    for kind in ("AutoencoderRAE", "AutoencoderKL"):
        for name, value, words in (
            ("encoder_hidden_size", 10**9, "is 1000000000, expected at most 1000000"),
            ("block_out_channels", [32, 10**9], "is 1000000000, expected at most 1000000"),
            ("scaling_factor", float("inf"), "is inf, expected a finite number"),
        ):
            (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, name: value}))
            line = outcome_of(load_autoencoder, str(tmp_path))
            assert line == f"model: {tmp_path}/config.json: {name} {words}"
            if kind == "AutoencoderRAE":
                argv = ["--from", "diffusers", "--to", "rae", "--input", str(tmp_path), "--output", f"{tmp_path}/out"]
                assert outcome_of(convert_checkpoint.main, argv) == f"--input: {tmp_path}/config.json: {name} {words}"


def test_models_to_start_from(corpus, folder):
    """model.init_from: the folder is refused, or its decoder is what the undamaged one has."""
    expected = RAEConfig.from_dict(json.loads(bad_inputs.model_files()["config.json"]))

    def start(source: str) -> None:
        read_decoder_start(source, expected)

    for case in corpus["models"]:
        line = outcome_of(start, str(folder / case.file))
        not_used = "encoder_prefix_tokens_is_99" in case.file  # only the decoder is taken over
        assert (line == "read") == (case.outcome == "read" or not_used), f"{case.file}: {line}"
        assert line == "read" or line.startswith("model.init_from: "), line


def test_models_to_publish(corpus, folder, capsys, monkeypatch):
    """push_to_hub.py reads config.json and the weights' names: a folder that it takes is one that transformers reads as
    a config. Nothing of a hostile folder runs."""
    for case in corpus["models"]:
        line = outcome_of(push_to_hub.read_model_folder, folder / case.file)
        assert line == "read" or line.startswith("model: "), line
        assert line == "read" or case.outcome == "error", case.file
        if line == "read":
            RAEConfig.from_pretrained(folder / case.file)
    monkeypatch.setattr(
        sys, "argv", ["push", "--model", f"{folder}/models/hostile_code", "--repo_id", "a/b", "--dry_run"]
    )
    run_main(push_to_hub.main)
    assert "not uploaded" in capsys.readouterr().out


def test_models_that_are_no_folder(folder, capsys, monkeypatch, tmp_path):
    """A file, nothing, and paths that no system takes."""
    for source in (
        folder / "models/bin_trap/pytorch_model.bin",
        tmp_path / "none",
        "x" * 5000,
        f"a/{'x' * 300}",
        "a\0b",
    ):
        for read in (load_autoencoder, lambda s: read_decoder_start(s, RAEConfig())):
            assert outcome_of(read, str(source)) != "read"


def test_encoders(corpus, folder, monkeypatch):
    """model.encoder and gan.backbone: neither code nor pickles in their folders run, and nobody is asked whether they
    may; numbers and attention that no network has are named."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")

    def encoder(source: str) -> None:
        with error_names_setting("model.encoder", source):
            decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
            RAEModel.from_encoder(source, encoder_input_size=32, decoder_patch_size=8, **decoder)

    def backbone(source: str) -> None:
        with error_names_setting("gan.backbone", source):
            load_backbone(source)

    for case in corpus["encoders"]:
        check(case, outcome_of(encoder, str(folder / case.file)))
        if case.file != "encoders/std":  # no network has the processor's numbers
            check(case, outcome_of(backbone, str(folder / case.file)))


def test_code_of_an_encoder_in_a_model_folder(tmp_path, monkeypatch):
    """Of a type that AutoModel does not build: refused, without a question, in every command that takes a model."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    settings = json.loads(bad_inputs.model_files()["config.json"])
    encoder = {"model_type": "blip_vision_model", "hidden_size": 16, "patch_size": 8, "image_size": 32}
    encoder |= {"auto_map": {"AutoModel": f"{tmp_path}/code--hostile.Model"}, "num_hidden_layers": 1}
    settings |= {"encoder_config": encoder, "encoder_prefix_tokens": 1, "encoder_final_norm": "post_layernorm"}
    files = bad_inputs.model_files() | {"config.json": json.dumps(settings).encode()}
    code = {"hostile.py": bad_inputs.HOSTILE_CODE, "config.json": json.dumps(encoder).encode()}
    bad_inputs.write(
        [bad_inputs.Case(name, "", "", held) for name, held in (("model", files), ("code", code))], tmp_path
    )
    for read in (load_autoencoder, RAEModel.from_pretrained):
        with (
            error_names_setting("model", "x"),
            pytest.raises(ValueError, match="trust_remote_code|none that transformers"),
        ):
            read(str(tmp_path / "model"))


def test_references(corpus, folder):
    """--reference of eval_rfid.py and of eval_fid.py."""

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))[:, [0, 1, 2, 0]]

    def generation_reference(file: str, space: FeatureSpace) -> None:
        place = open_reference(file, "reference")
        assert place.lacks("fid") is None
        read_reference(place, ["fid"], [space], Accelerator(), 2)

    for case in corpus["references"]:
        metric = FrechetMetric("rfid", pixels, 4, "pixels")
        check(case, outcome_of(read_references, str(folder / case.file), [metric], Accelerator(), 2, "reference"))
        metric = FrechetMetric("fid", None, 4, "pixels")
        space = FeatureSpace("inception", {"fid": metric}, lambda images: {"fid": pixels(images)}, "pixels")
        check(case, outcome_of(generation_reference, str(folder / case.file), space))


def test_heads(tmp_path):
    """--head of linear_probe.py: a pickle, and a config.json that nests without end."""
    traps = bad_inputs.trap_files()
    weights = bad_inputs.model_files()["model.safetensors"]
    for head, config in ((traps["trap_pickle"], b"{}"), (traps["trap_torch"], b"{}"), (weights, b"[" * 100_000)):
        (tmp_path / "head.safetensors").write_bytes(head)
        (tmp_path / "config.json").write_bytes(config)
        assert outcome_of(linear_probe.LinearHead.load, str(tmp_path)).startswith("head: ")
