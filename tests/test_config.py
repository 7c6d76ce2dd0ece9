"""Settings through the command line: presets, precedence, error messages, and no dead settings. Seconds on a CPU."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, run_command

from eval_rfid import EvalRFIDConfig
from linear_probe import LinearProbeConfig
from rae_suite import settings, settings_rae
from rae_suite.cli import all_settings, config_dict, config_yaml, parse
from rae_suite.errors import ConfigError
from rae_suite.metric_names import METRICS
from rae_suite.run_folder import resolve_config
from rae_suite.settings import check_same_config
from rae_suite.settings_rae import Config, parse_config
from scripts.compute_latent_stats import LatentStatsConfig
from scripts.push_to_hub import PushConfig
from scripts.reconstruct import ReconstructConfig

NAMES_OF_METRICS = ", ".join(map(repr, METRICS))
DIGITS = str(ROOT / "configs" / "digits_tiny.yaml")
# presets of train_rae.py: the header's launch command says whose it is
PRESETS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "train_rae.py" in path.read_text()]
DIT_PRESETS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if "train_dit.py" in path.read_text() and path.stem != "ditdh_digits"
]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture
def error(capsys):
    """Parses arguments that must fail and returns the one line on stderr."""

    def parse(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            parse_config([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert stopped.value.code == 2 and captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return parse


# Files and flags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_parse_and_resolve_to_themselves(preset, tmp_path):
    """Every preset parses; what is resolved from it is a valid --config of the same meaning and types; its header says
    how to launch it."""
    config = parse_config(["--config", str(preset)])
    resolved = write(tmp_path / "config.yaml", config_yaml(config))
    again = parse_config(["--config", resolved])
    assert again == config and config_yaml(again) == Path(resolved).read_text()
    assert isinstance(again.gan.key_depths, tuple) and isinstance(again.optimizer.betas, tuple)
    assert f"--config configs/{preset.name}" in preset.read_text()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_name_the_sources_of_their_figures(preset):
    """A header says whose the settings are, what was never trained, and where each figure comes from: the RAE paper has
    none of PSNR. The preset that claims to be as published trains the position table, as the published loop does."""
    text = preset.read_text()
    header = " ".join(line.lstrip("# ") for line in text.split("\nmodel:")[0].splitlines())
    if preset == settings_rae.DEFAULT_CONFIG:
        return
    as_published = "Settings: as published" in header
    assert as_published == (preset.stem == "dinov2_b") and as_published != ("Settings: ours." in header)
    assert "never trained to its end with this code" in header
    for figure in re.findall(r"(?:rFID|PSNR)[^.]*? \d+\.\d+[^.]*\.[^.]*", header):
        assert re.search(r"arXiv|README|issue", figure), figure
    assert "PSNR" not in header or re.search(r"2605\.18324|2608\.08676|issue 13", header)
    config = parse_config(["--config", str(preset)])
    assert config.model.train_position_embedding == as_published
    assert not as_published or config.model.noise_tau == 0.8


@pytest.mark.parametrize("preset", DIT_PRESETS, ids=lambda path: path.stem)
def test_presets_of_stage_2_name_the_sources_of_their_figures(preset):
    """A header says that the preset was never trained to its end, and where each figure comes from."""
    header = " ".join(line.lstrip("# ") for line in preset.read_text().split("\nmodel:")[0].splitlines())
    assert "never trained to its end with this code" in header
    aim = header.split("Aim: ")[1].split("This preset")[0]
    assert re.search(r"FID \d|FID of \d", aim) and re.search(r"paper|README|thread|ditdh_xl_512\.yaml", aim)


def test_there_is_a_preset_to_test():
    """The default is one of the presets."""
    assert settings_rae.DEFAULT_CONFIG in PRESETS


def test_every_setting_survives_the_run_folder(tmp_path):
    """A config with no field at its default comes back equal from its own YAML."""
    changed = parse_config(["--config", DIGITS])

    def change(settings):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if dataclasses.is_dataclass(value):
                change(value)
            elif isinstance(value, bool):
                setattr(settings, field.name, not value)
            elif isinstance(value, float):
                setattr(settings, field.name, value / 3 + 1e-7)
            elif isinstance(value, int):
                setattr(settings, field.name, value + 1)
            elif value is None and "tuple" in str(field.type):
                setattr(settings, field.name, (1, 3, 5))
            elif value is None and "int" in str(field.type):
                setattr(settings, field.name, 7)
            elif value is None and "float" in str(field.type):
                setattr(settings, field.name, 1e-5)
            elif value is None and field.name in ("label_column", "repo_id", "init_from", "eval_path"):
                setattr(settings, field.name, {"label_column": "null", "repo_id": "~"}.get(field.name, "no: # a"))

    change(changed)
    changed.data.path, changed.model.encoder_config = "no", {"a": [1, {"b": None}], "c": 1e-6, "d": "gelu"}
    changed.gan.key_depths, changed.logging.report_to, changed.gan.kernel_size = (), (), 11
    resolved = write(tmp_path / "config.yaml", config_yaml(changed))
    again = parse_config(["--config", resolved])
    assert again == changed and again.model.init_from == "no: # a" and again.train.max_steps == 7


@pytest.mark.parametrize("text", ["1e3", "12e4567", "0123", "1_000", "true", "on", "2024-01-01", "{x"])
def test_text_that_looks_like_something_else_stays_text(tmp_path, text):
    """A commit such as 12e4567, as a flag and back from the run folder."""
    config = parse_config(["--model.encoder_revision", text, "--train.output_dir", text])
    assert config.train.output_dir == text
    config.model.encoder_revision = text
    assert parse_config(["--config", write(tmp_path / "config.yaml", config_yaml(config))]) == config


def test_later_files_win_and_flags_over_files(tmp_path):
    """--config is repeatable; a file changes what it names and nothing else; flags win, wherever they stand."""
    first = write(tmp_path / "1.yaml", "gan: {weight: 0.1, start_epoch: 3}\ntrain: {seed: 5}\noptimizer: {lr: 1e-3}\n")
    second = write(tmp_path / "2.yaml", "gan: {weight: 0.2, optimizer: {lr: 0.5}}\n")
    config = parse_config(["--config", first, "--config", second])
    assert (config.gan.weight, config.gan.start_epoch, config.train.seed) == (0.2, 3, 5)
    assert (config.optimizer.lr, config.gan.optimizer.lr, config.gan.optimizer.betas) == (1e-3, 0.5, (0.9, 0.95))
    assert parse_config(["--config", second, f"--config={first}"]).gan.weight == 0.1
    assert config.model == Config().model  # without digits_tiny, the dataclasses' defaults
    flags = ["--gan.weight", "0.3", "--gan.key_depths", "[1,2]", "--train.max_steps=9"]
    config = parse_config(["--config", first, *flags, "--data.path", "x"])
    assert (config.gan.weight, config.gan.key_depths, config.train.max_steps) == (0.3, (1, 2), 9)
    assert (config.gan.start_epoch, config.data.path) == (3, "x")


def test_flags_before_files_win_too(tmp_path):
    """The order of flags and files on the command line does not matter."""
    file = write(tmp_path / "1.yaml", "gan: {weight: 0.1}\n")
    assert parse_config(["--gan.weight", "0.3", "--config", file]).gan.weight == 0.3


def test_without_a_file_the_default_preset_is_used(monkeypatch, tmp_path, capsys):
    """No --config means configs/digits_tiny.yaml, which is said, from any folder, and flags change it."""
    monkeypatch.chdir(tmp_path)
    assert parse_config([]) == parse_config(["--config", DIGITS])
    assert capsys.readouterr().out.count("no --config: the settings are those of the demo, configs/digits_tiny") == 1
    config = parse_config(["--train.max_steps", "3"])
    assert config.train.max_steps == 3 and config.model.encoder_weights == "random"
    monkeypatch.setattr("sys.argv", ["train_rae.py", "--train.seed", "4"])
    assert parse_config() == parse_config(["--train.seed", "4"])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, named",
    [
        ("gan: {wieght: 1}", "wieght"),
        ("gan: {optimizer: {lrr: 1}}", "optimizer.lrr"),
        ("adversary: {weight: 1}", "adversary"),
        ("seed: 1", "seed"),
        ("gan: {weight: heavy}", "gan.weight"),
        ("train: {max_steps: 1.5}", "train.max_steps"),
        ("train: {gradient_accumulation_steps: true}", "train.gradient_accumulation_steps"),
        ("gan: {loss: wgan}", "gan.loss"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas"),
        ("gan: {key_depths: [one]}", "gan.key_depths"),
        ("gan: {weight: .nan}", "gan.weight"),
        ("train: {epochs: .inf}", "train.epochs"),
        ("gan: [", "bad.yaml"),
        ("just words", "bad.yaml"),
        ("", "bad.yaml"),
        ("gan: words", "gan"),
    ],
)
def test_bad_files_are_one_line_that_names_the_key(tmp_path, error, text, named):
    """Unknown keys, wrong types and broken YAML in a file end with exit code 2 and one line on stderr."""
    assert named in error("--config", write(tmp_path / "bad.yaml", text))


@pytest.mark.parametrize("text", ["gan: 3", "gan: null", "gan: [1]", "train: {}\ngan:\n  optimizer: 3"])
def test_a_group_that_is_no_mapping_is_an_error(tmp_path, error, text):
    """A group set to a number, a list or nothing is not taken for its defaults."""
    assert "gan" in error("--config", write(tmp_path / "bad.yaml", text))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("--train.max_steps", "six"), "train.max_steps: expected an integer or nothing, got six"),
        (
            ("--train.mixed_precision", "b"),
            "train.mixed_precision: expected one of 'no', 'fp16', 'bf16' or nothing, got b",
        ),
        (("--gan.weight", "x"), "gan.weight: expected a number, got x"),
        (("--train.compile", "maybe"), "train.compile: expected true or false, got maybe"),
        (("--data.mixture", "a"), "data.mixture: expected a mapping to numbers, got a"),
        (("--data.mixture", "{a: b}"), "data.mixture: expected a mapping to numbers, got {a: b}"),
        (("--gan.loss", "x"), "gan.loss: expected one of 'hinge', 'vanilla', got x"),
        (("--optimizer.betas", "3"), "optimizer.betas: expected 2 numbers, got 3"),
        (
            ("--optimizer.betas", "0.9", "0.95", "0.99"),
            "optimizer.betas: expected 2 numbers, got [0.9, 0.95, 0.99]",
        ),
        (("--gan.key_depths", "one"), "gan.key_depths: expected a list of integers, got one"),
        (("--eval.metrics", "psnr", "fid"), f"eval.metrics: expected values among {NAMES_OF_METRICS}, got [psnr, fid]"),
        (("--eval.metrics", "psnr,fid"), f"eval.metrics: expected values among {NAMES_OF_METRICS}, got psnr,fid"),
        (("--eval.metrics",), f"--eval.metrics: expected values among {NAMES_OF_METRICS}, got nothing"),
        (("--gan.weight", "1", "2"), "--gan.weight: expected a number, got several words: 1 2"),
        (("--data.path", "null"), "data.path: expected a path, got nothing"),
        (("--data", "data/none"), "--data: expected one of its settings, as --data.NAME VALUE"),
        (("--config", "a", "b"), "--config: expected one YAML file, got a b; it may be repeated"),
        (("x",), "x: expected settings as --NAME VALUE; --help lists them"),
        (("--train.max_step", "3"), "--train.max_step: there is no such setting; did you mean train.max_steps?"),
        (("--seed", "3"), "--seed: there is no such setting; did you mean train.seed?"),
        (("--lr", "3"), "--lr: there is no such setting; did you mean optimizer.lr or gan.optimizer.lr?"),
        (("--conf", "x"), "--conf: there is no such setting; did you mean config?"),
        (("--qqq", "x"), "--qqq: there is no such setting; --help lists all"),
    ],
)
def test_bad_values_are_said_in_plain_words(error, arguments, line):
    assert error(*arguments).strip().removeprefix("error: ") == line


@pytest.mark.parametrize(
    "text, line",
    [
        ("train: {max_steps: six}", "train.max_steps: expected an integer or nothing, got six (in {file})"),
        ("gan: {kernel_size: 8}", "gan.kernel_size: expected an odd number, got 8 (in {file})"),
        ("optimizer: {lr: 0}", "optimizer.lr: expected a positive number, got 0.0 (in {file})"),
        ("gan: {weights: pretrained}", "gan.backbone_config: expected nothing unless gan.weights is random, got"),
        ("eval: {best_metric: rfid}", "eval.best_metric: expected one of eval.metrics ['psnr'"),
        ("gan: {wieght: 1}", "gan.wieght: there is no such setting (in {file}); did you mean gan.weight?"),
        ("train: {lr: 1}", "train.lr: there is no such setting (in {file}); did you mean optimizer.lr or"),
        ("gan: [1]", "gan: expected a mapping of settings, got [1] (in {file})"),
        ("gan: {weight: 1}\ngan.weight: 2", "gan.weight: given twice (in {file})"),
        ("gan: {weight: 1, weight: 2}", "{file}: expected settings in YAML, key 'weight' given twice in line 1"),
        ("data:\n  path: 'https://u:PW@h/a?b", "{file}: expected settings in YAML, while scanning a quoted scalar, "),
    ],
)
def test_bad_values_of_a_file_are_said_with_its_name(tmp_path, error, text, line):
    """Also where another setting contradicts it; the file itself, which may hold a password, is not shown."""
    file = write(tmp_path / "bad.yaml", text)
    message = error("--config", DIGITS, "--config", file).strip().removeprefix("error: ")
    assert message.startswith(line.format(file=file)) and "PW" not in message
    assert file in message or text == "gan: {weights: pretrained}"  # what is wrong there is digits_tiny's


def test_bad_flags_are_one_line_that_names_the_key(tmp_path, error):
    """The same for flags, and for a file that does not exist."""
    wrong = (["--gan.wieght", 1], ["--gan.wieght=1"], ["--gan.optimizer.lrr", 1], ["--seed", 1])
    abbreviated = (["--train.max_step", 8], ["--conf", PRESETS[0]])
    for arguments in (*wrong, *abbreviated):
        assert arguments[0].split("=")[0] in error(*arguments)
    for key, value in (("gan.weight", "x"), ("train.max_steps", 1.5), ("gan.loss", "x"), ("eval.metrics", "[fid]")):
        assert key in error(f"--{key}", value) and str(value).strip("[]") in error(f"--{key}", value)
    assert "nowhere.yaml does not exist, expected settings in YAML" in error("--config", tmp_path / "nowhere.yaml")
    assert str(tmp_path) in error("--config", tmp_path)
    assert "--gan.weight" in error("--gan.weight")
    assert "surplus" in error("surplus")


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.lr", 0),
        ("optimizer.betas", "[0.9,1.0]"),
        ("optimizer.betas", "[-0.1,0.9]"),
        ("optimizer.weight_decay", -0.1),
        ("lr_schedule.final_lr", -1),
        ("gan.optimizer.lr", -1),
        ("gan.optimizer.betas", "[1.0,0.9]"),
        ("gan.optimizer.weight_decay", -1),
        ("gan.lr_schedule.final_lr", -1),
        ("model.noise_tau", -0.1),
        ("data.holdout_fraction", 1.0),
        ("data.holdout_fraction", -0.1),
        ("data.num_workers", -1),
        ("train.cpu_threads", 0),
        ("train.global_batch_size", 0),
        ("train.gradient_accumulation_steps", 0),
        ("train.max_steps", 0),
        ("train.epochs", 0),
        ("train.keep_last", 0),
        ("train.save_every_steps", 0),
        ("train.save_every_epochs", 0),
        ("train.clip_grad_norm", 0),
        ("ema.decay", 1.0),
        ("ema.decay", -0.1),
        ("perceptual.weight", -1),
        ("gan.weight", -0.5),
        ("gan.updates_per_step", 0),
        ("gan.augment_prob", 1.1),
        ("gan.augment_cutout", 1.0),
        ("eval.every_steps", 0),
        ("eval.every_epochs", 0),
        ("eval.batch_size", 0),
        ("logging.every_steps", 0),
        ("logging.num_samples", 0),
        ("train.seed", -1),
        ("train.seed", 2**32),
        ("train.max_nonfinite_steps", -1),
        ("data.max_unreadable", -1),
        ("data.resize_size", 0),
        ("gan.start_step", -1),
        ("gan.max_adaptive_weight", -1.0),
        ("lr_schedule.warmup_steps", -1),
        ("eval.num_samples", 0),
        ("logging.samples_every_steps", 0),
        ("perceptual.vgg_path", "vgg.pth"),  # digits_tiny's VGG16 is random
    ],
)
def test_values_that_no_run_can_use(error, key, value):
    """Each is refused with its key and its value."""
    message = error(f"--{key}", value)
    assert f"error: {key}: expected" in message
    got = message.rsplit("got ", 1)[1].strip().strip("'")
    assert yaml.safe_load(got.replace("(", "[").replace(")", "]")) == yaml.safe_load(str(value))


def test_values_that_contradict_each_other(error):
    """The best metric must be measured; architecture settings belong to random weights only."""
    assert "eval.best_metric" in error("--eval.metrics", "[ssim]")
    assert "eval.best_metric" in error("--eval.metrics", "[]")
    assert parse_config(["--eval.metrics", "[ssim]", "--eval.best_metric", "ssim"]).eval.metrics == ("ssim",)
    assert "model.encoder_config" in error("--model.encoder_weights", "pretrained")
    assert "gan.backbone_config" in error("--gan.weights", "pretrained")


def test_other_processes_do_not_repeat_the_message(monkeypatch, capsys):
    """Under a launcher only the first process of a machine prints; all exit with 2."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--gan.weight", "x"])
    assert stopped.value.code == 2 and capsys.readouterr().err == ""


# The schema -----------------------------------------------------------------------------------------------------------


def schema():
    """(class name, field name, docstring) of every setting of every group."""
    for module in (settings, settings_rae):
        yield from schema_of(module)


def schema_of(module):
    tree = ast.parse(Path(module.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and dataclasses.is_dataclass(getattr(module, node.name)):
            yield node.name, None, ast.get_docstring(node)
            for i, statement in enumerate(node.body):
                if isinstance(statement, ast.AnnAssign):
                    after = node.body[i + 1] if i + 1 < len(node.body) else None
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    yield node.name, statement.target.id, after.value.value if is_text else None


def test_every_setting_is_documented(capsys):
    """Each class and each field has a docstring, and --help shows the fields'."""
    groups = {field.name for field in dataclasses.fields(Config)}
    for class_name, field, text in schema():
        if (class_name, field in groups) != ("Config", True):  # a group's documentation is its class's
            assert text and text.strip(), f"{class_name}.{field} has no docstring"
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in ("--gan.weight", "--gan.optimizer.lr", "--eval.best_metric", "--config"):
        assert flag in shown
    assert "Strength of the latent noise in training" in " ".join(shown.split())


def test_every_setting_is_read():
    """Each field is read as an attribute in a script or in rae_suite/; an optimizer's become AdamW's arguments through
    asdict."""
    read, text = set(), ""
    for path in [*ROOT.glob("*.py"), *(ROOT / "rae_suite").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text += path.read_text()
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    assert "asdict(settings)" in text  # how OptimizerConfig is consumed
    dead = [f"{c}.{f}" for c, f, _ in schema() if f is not None and c != "OptimizerConfig" and f not in read]
    assert not dead, f"settings that nothing reads: {dead}"
    optimizer = {field.name for field in dataclasses.fields(settings.OptimizerConfig)}
    assert optimizer == {"lr", "betas", "eps", "weight_decay"}  # all of them arguments of torch.optim.AdamW


# Continuing a run -----------------------------------------------------------------------------------------------------


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith("_config"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def other(value):
    """A value that differs from this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {**value, "x": 1} if isinstance(value, dict) else "other"


def test_a_run_folder_is_continued_with_its_own_settings_only(tmp_path):
    """The same config passes, and so does one that differs in a resumable key; any other key is an error that names
    the key, both values and the folder's file."""
    resumable = {
        "data.num_workers", "data.max_unreadable", "data.max_unreadable_shards", "data.shard_retries",
        "model.gradient_checkpointing", "train.compile", "train.cpu_threads", "train.deterministic", "train.epochs",
        "train.gradient_accumulation_steps", "train.timeout_minutes", "lr_schedule.stretch", "gan.lr_schedule.stretch",
        "train.keep_last", "train.max_nonfinite_steps", "train.max_steps", "train.output_dir",
        "train.save_every_steps", "train.save_every_epochs",
    }  # fmt: skip
    config = parse_config([])
    saved = tmp_path / "config.yaml"
    saved.write_text(config_yaml(config))
    check_same_config(config, saved)
    keys = dict(leaves(config_dict(config)))
    assert resumable <= keys.keys()
    allowed = set()
    for key, value in keys.items():
        tree = config_dict(config)
        *groups, name = key.split(".")
        group = tree
        for part in groups:
            group = group[part]
        group[name] = other(value)
        saved.write_text(yaml.safe_dump(tree, sort_keys=False))
        try:
            check_same_config(config, saved)
            allowed.add(key)
        except ConfigError as error:
            message = str(error)
            assert f"{key} is {other(value)!r} there and {value!r} now" in message and str(saved) in message
    # where data and networks lie: what they hold is compared when they are read
    resumable |= {"data.path", "data.eval_path", "gan.backbone", "model.encoder_revision", "model.latent_stats"}
    resumable.add("perceptual.vgg_path")
    assert allowed == resumable | {key for key in keys if key.startswith(("eval.", "hub.", "logging."))}


def test_the_lanes_of_a_continued_run(tmp_path):
    """Left open, their number becomes that of the run folder; another one is an error."""
    saved = tmp_path / "config.yaml"
    run = ["--data.streaming", "--train.output_dir", str(tmp_path), "--train.mixed_precision", "no"]
    config = parse_config([*run, "--data.stream_lanes", "4"])
    left_open = parse_config(run)
    accelerator = SimpleNamespace(num_processes=3, mixed_precision="no")
    assert resolve_config(left_open, accelerator).data.stream_lanes == 3  # of a new run: 3 processes, 1 worker
    saved.write_text(config_yaml(config))
    (tmp_path / "metrics.jsonl").touch()  # a start alone leaves none
    check_same_config(config, saved)
    assert resolve_config(left_open, accelerator) == config
    assert left_open.data.stream_lanes is None
    with pytest.raises(ConfigError, match="data.stream_lanes is 4 there and 8 now"):
        check_same_config(parse_config([*run, "--data.stream_lanes", "8"]), saved)


def test_a_run_folder_of_another_version(tmp_path, monkeypatch):
    """A setting that the saved config lacks has its default there; one that no longer exists is ignored at the value
    at which it did nothing. All differences are named at once."""
    config, saved = parse_config([]), tmp_path / "config.yaml"
    tree = config_dict(config)
    lost = tree["gan"].pop("norm")
    saved.write_text(yaml.safe_dump(tree))
    check_same_config(config, saved)
    tree["gan"].update(surplus=1)
    saved.write_text(yaml.safe_dump(tree))
    other = parse_config(["--gan.norm", "group", "--train.seed", "5"])
    with pytest.raises(ConfigError) as stopped:
        check_same_config(other, saved)
    for words in (f"gan.norm is {lost!r} there and 'group' now", "gan.surplus is 1 there and no setting any more",
                  "train.seed is 0 there and 5 now"):  # fmt: skip
        assert words in str(stopped.value)
    monkeypatch.setitem(settings.REMOVED_KEYS, "gan.surplus", 1)
    check_same_config(config, saved)
    monkeypatch.setitem(settings.REMOVED_KEYS, "gan.surplus", 2)
    with pytest.raises(ConfigError, match="gan.surplus is 1 there and no setting any more"):
        check_same_config(config, saved)


def test_lists_on_the_command_line():
    """Several words, one with `=`, commas, text that looks like something else; a list given twice is a mistake."""
    assert parse_config(["--eval.metrics", "psnr", "ssim"]).eval.metrics == ("psnr", "ssim")
    assert parse_config(["--eval.metrics=psnr"]).eval.metrics == ("psnr",)
    assert parse_config(["--eval.metrics=psnr,ssim", "--optimizer.betas", "0.5,0.6"]).optimizer.betas == (0.5, 0.6)
    assert parse_config(["--eval.metrics=[psnr,lpips]"]).eval.metrics == ("psnr", "lpips")
    config = parse_config(["--logging.report_to", "[1].png", "3", "--gan.weight", "0.5"])
    assert config.logging.report_to == ("[1].png", "3") and config.gan.weight == 0.5
    assert parse_config(["--logging.report_to", "[]"]).logging.report_to == ()


def test_a_list_given_twice_is_an_error(error):
    message = error("--eval.metrics", "psnr", "--eval.metrics", "ssim")
    assert "--eval.metrics: expected it once, with all its values, got 'it 2 times'" in message


def test_values_are_taken_where_the_meaning_is_plain(tmp_path):
    """The words for yes and no, one word for a list, numbers for text, exponents with and without a point, nothing."""
    text = """
train: {mixed_precision: no, output_dir: 2024, compile: yes, max_steps: 1e3, cpu_threads: none}
logging: {report_to: wandb, project: 0123, progress_bar: off}
data: {train_split: on, eval_split: 1_000, config_name: null, label_column: 2024-01-01}
model: {encoder_final_norm: none, encoder_config: {layer_norm_eps: 1e-4, x: 1.0e-4, y: [1, no, "2"]}, init_from: None}
eval: {metrics: "psnr"}
optimizer: {lr: 1e-4, eps: 1.0e-4}
gan.key_depths: 1,3
"""
    config = parse_config(["--config", DIGITS, "--config", write(tmp_path / "plain.yaml", text)])
    train, data, model = config.train, config.data, config.model
    assert (train.mixed_precision, train.output_dir, train.compile) == ("no", "2024", True)
    assert (train.max_steps, train.cpu_threads) == (1000, None) and isinstance(train.max_steps, int)
    assert (config.logging.report_to, config.logging.project) == (("wandb",), "0123")
    assert config.logging.progress_bar is False
    assert (data.train_split, data.eval_split) == ("on", "1_000")
    assert (data.config_name, data.label_column) == (None, "2024-01-01")
    assert (model.encoder_final_norm, model.init_from) == ("none", None)
    assert model.encoder_config == {"layer_norm_eps": 1e-4, "x": 1e-4, "y": [1, False, "2"]}
    assert config.eval.metrics == ("psnr",) and config.gan.key_depths == (1, 3)
    assert config.optimizer.lr == config.optimizer.eps == 1e-4
    again = ["--config", write(tmp_path / "config.yaml", config_yaml(config))]
    assert parse_config(again) == config
    flag = parse_config(["--train.compile", "--optimizer.lr", "1e-4", "--train.max_steps", "none", "--data.path", "3"])
    assert (flag.train.compile, flag.optimizer.lr, flag.train.max_steps, flag.data.path) == (True, 1e-4, None, "3")


# Code -----------------------------------------------------------------------------------------------------------------

PLACES = {
    "gan.backbone_config": "gan: {{weights: random, backbone_config: {}}}",
    "model.encoder_config": "model: {{encoder_weights: random, encoder_config: {}}}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["file", "flag", "train_config"])
def test_no_value_is_code(tmp_path, monkeypatch, images, place, how):
    """What asks a parser for an object of a class stays data; nothing of it is imported or run, in a file, in a flag,
    and in another command's --train_config."""
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    owned = tmp_path / "owned"
    shell = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {owned}", "shell": True}}
    value = {"hidden_size": 64, "x": shell, "y": {"class_path": "hostile.Thing"}, "z": [shell]}
    text = PLACES[place].format(json.dumps(value))
    group, name = place.split(".")
    file = write(tmp_path / "run.yaml", text)
    argv = [f"--{place}", json.dumps(value)] if how == "flag" else ["--config", DIGITS, "--config", file]
    assert getattr(getattr(parse_config(argv), group), name) == value
    small = ["--train.global_batch_size", "8"]
    done = run_command(
        *(("scripts/compute_latent_stats.py", "--train_config", DIGITS, file, "--stats_file", tmp_path / "s.pt")
          if how == "train_config" else ("train_rae.py", *argv, "--train.output_dir", tmp_path / "run", *small)),
        "--data.path", images, check=False,
    )  # fmt: skip
    if how != "train_config" or group == "model":  # statistics need no discriminator
        assert done.returncode == 2 and f"error: {place}: " in done.stderr and "no setting 'x'" in done.stderr
    assert "Traceback" not in done.stderr and not owned.exists() and "hostile" not in sys.modules


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [SPRUNG]", "!!python/name:os.mkdir", "!seed 1"])
def test_tags_of_programs_are_refused_in_flags(tmp_path, monkeypatch, error, tag):
    monkeypatch.chdir(tmp_path)
    assert "is not for settings" in error("--model.encoder_config", f"{{a: {tag} }}")
    assert not (tmp_path / "SPRUNG").exists()


# Paths ----------------------------------------------------------------------------------------------------------------


def test_the_home_folder_is_expanded_wherever_a_path_is_taken(tmp_path, monkeypatch):
    """Every setting that holds a path, in a file and as a flag; in lists and as keys of the mixture; and --config."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {"path", "eval_path", "output_dir", "encoder", "latent_stats", "init_from", "vgg_path", "inception_path",
             "backbone", "fork_from"}  # fmt: skip
    found = {key: item for key, item in all_settings(Config).items() if "PathText" in str(item.type)}
    assert {key.rpartition(".")[2] for key in found} == names | {"mixture", "sets"}
    plain = {key: f"~/a/{key}" for key in found if key not in ("data.mixture", "eval.sets")}
    tree = {}
    for key, value in plain.items():
        group, name = key.split(".")
        tree.setdefault(group, {})[name] = value
    tree["data"] |= {"streaming": True, "steps_per_epoch": 3, "mixture": {"~/x": 1, "~/y/{0..3}.tar": 2.0}}
    tree["perceptual"]["weights"], tree["eval"]["metrics"] = "pretrained", ["psnr", "rfid"]
    tree["eval"]["sets"] = {"faces": "~/faces"}
    write(tmp_path / "mine.yaml", yaml.safe_dump(tree))
    flags = [part for key, value in plain.items() for part in (f"--{key}", value)]
    other = ["--data.streaming", "--data.steps_per_epoch", "3", "--perceptual.weights", "pretrained", "--eval.metrics",
             "psnr", "rfid", "--data.mixture", "{~/x: 1, '~/y/{0..3}.tar': 2}",
             "--eval.sets", "{faces: ~/faces}"]  # fmt: skip
    for argv in (["--config", "~/mine.yaml"], [*flags, *other]):
        config = parse_config(argv)
        for key, value in plain.items():
            group, name = key.split(".")
            assert getattr(getattr(config, group), name) == value.replace("~", str(tmp_path)), key
        assert config.eval.sets == {"faces": f"{tmp_path}/faces"}
        assert config.data.mixture == {f"{tmp_path}/x": 1.0, f"{tmp_path}/y/{{0..3}}.tar": 2.0}


def test_a_run_folder_with_the_home_folder_in_a_path(tmp_path, monkeypatch):
    """As earlier versions wrote it down: the same run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(["--data.path", "~/data", "--model.init_from", "~/model"])
    text = config_yaml(config)
    assert f"path: {tmp_path}/data" in text
    saved = Path(write(tmp_path / "config.yaml", text.replace(str(tmp_path), "~")))
    check_same_config(config, saved)
    with pytest.raises(ConfigError, match="model.init_from is .*/model' there and '/model' now"):
        check_same_config(parse_config(["--data.path", "~/data", "--model.init_from", "/model"]), saved)


def test_paths_of_the_other_commands(tmp_path, monkeypatch):
    """No setting with the name of a path is a mere text. A path may have a comma."""
    monkeypatch.setenv("HOME", str(tmp_path))
    schemas = (EvalRFIDConfig, LinearProbeConfig, LatentStatsConfig, ReconstructConfig, PushConfig)
    for schema in (*schemas, Config):
        for key, item in all_settings(schema).items():
            if re.search(r"(path|dir|file|folder|cache|output|input|model|json|results|head|reference)$", key):
                assert str not in (item.type, *typing.get_args(item.type)), (schema.__name__, key)
    config = parse(EvalRFIDConfig, "eval_rfid.py", "", ["--model", "~/a", "user/b,c", "--data.path", "~/d"])
    assert config.model == (f"{tmp_path}/a", "user/b,c") and config.data.path == f"{tmp_path}/d"


def test_help_does_without_the_slow_imports():
    code = """
import runpy, sys
sys.argv = ["train_rae.py", "--help"]
try:
    runpy.run_path("train_rae.py", run_name="__main__")
except SystemExit as done:
    assert done.code in (0, None)
print("slow:", sorted({"torch", "transformers", "accelerate"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--gan.weight" in shown and shown.endswith("slow: []\n")
