"""Settings through the command line: presets, precedence, error messages, and no dead settings. Seconds on a CPU."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from rae_suite import settings, settings_rae
from rae_suite.cli import config_dict, config_yaml, join_lists
from rae_suite.errors import ConfigError
from rae_suite.run_folder import resolve_config
from rae_suite.settings import check_same_config
from rae_suite.settings_rae import Config, parse_config

DIGITS = str(ROOT / "configs" / "digits_tiny.yaml")
# presets of train_rae.py: the header's launch command says whose it is
PRESETS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "train_rae.py" in path.read_text()]


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
            elif value is None and "[str]" in str(field.type) and field.name not in ("vgg_path", "inception_path"):
                setattr(settings, field.name, "no: # a")

    change(changed)
    changed.data.path, changed.model.encoder_config = "no", {"a": [1, {"b": None}], "c": 1e-6, "d": "gelu"}
    changed.gan.key_depths, changed.logging.report_to = (), ()
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
        (("--data.mixture", "a"), "data.mixture: expected a mapping, got a"),
        (("--gan.loss", "x"), "gan.loss: expected one of 'hinge', 'vanilla', got x"),
        (("--optimizer.betas", "3"), "optimizer.betas: expected a tuple with 2 elements, got [3]"),
        (
            ("--data", "data/none"),
            "data: expected a YAML file of these settings, got data/none; a single one is given as --data.NAME",
        ),
    ],
)
def test_bad_values_are_said_in_plain_words(error, arguments, line):
    assert error(*arguments).strip().removeprefix("error: ") == line


def test_bad_flags_are_one_line_that_names_the_key(tmp_path, error):
    """The same for flags, and for a file that does not exist."""
    wrong = (["--gan.wieght", 1], ["--gan.wieght=1"], ["--gan.optimizer.lrr", 1], ["--seed", 1])
    abbreviated = (["--train.max_step", 8], ["--conf", PRESETS[0]])
    for arguments in (*wrong, *abbreviated):
        assert arguments[0].split("=")[0] in error(*arguments)
    for key, value in (("gan.weight", "x"), ("train.max_steps", 1.5), ("gan.loss", "x"), ("eval.metrics", "[fid]")):
        assert key in error(f"--{key}", value) and str(value).strip("[]") in error(f"--{key}", value)
    assert "nowhere.yaml" in error("--config", tmp_path / "nowhere.yaml")
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
        "train.gradient_accumulation_steps", "train.timeout_minutes",
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
    """Several words, one with `=`, text that looks like something else; a list given twice is a mistake."""
    assert parse_config(["--eval.metrics", "psnr", "ssim"]).eval.metrics == ("psnr", "ssim")
    assert parse_config(["--eval.metrics=psnr"]).eval.metrics == ("psnr",)
    assert parse_config(["--eval.metrics=[psnr,lpips]"]).eval.metrics == ("psnr", "lpips")
    argv = ["--logging.report_to", "[1].png", "3", "--gan.weight", "0.5"]
    assert join_lists(Config, argv) == ["--logging.report_to", '["[1].png","3"]', "--gan.weight", "0.5"]
    with pytest.raises(ConfigError, match="--eval.metrics: expected it once"):
        join_lists(Config, ["--eval.metrics", "psnr", "--eval.metrics", "ssim"])


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
