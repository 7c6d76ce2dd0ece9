"""linear_probe.py: the command line on one and two processes, the feature cache, the heads, and what it refuses.

Commands that need no process of their own are run by calling main().
"""

import importlib.util
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, flags, run_command
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import linear_probe
from linear_probe import check_classes
from modeling_rae import RAEConfig, RAEModel
from rae_suite import features, linear_heads
from rae_suite.features import Features, FeatureWriter, image_features
from rae_suite.launch import run_main
from rae_suite.linear_heads import (
    HeadTrainingConfig,
    LinearHead,
    batches,
    choose,
    compare_heads,
    evaluate_head,
    fit,
    hold_out,
    train_heads,
    training_set,
    widened,
    wilson_interval,
)
from rae_suite.loaders import eval_loader
from rae_suite.model_loading import load_autoencoder
from rae_suite.probe_figures import draw_confusion, most_confused
from rae_suite.splits import scan_folder

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------------------------
# A model, images, and the command
# --------------------------------------------------------------------------------------------------------------------


def build_rae(seed=0, width=64, **settings):
    torch.manual_seed(seed)
    encoder = dict(
        model_type="dinov2_with_registers", hidden_size=width, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
        patch_size=4, image_size=32, num_register_tokens=4,
    )  # fmt: skip
    decoder = dict(
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, decoder_patch_size=4,
    )  # fmt: skip
    return RAEModel(RAEConfig(encoder_config=encoder, encoder_input_size=32, **decoder, **settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An RAE with an untrained encoder, as that of digits_tiny."""
    folder = tmp_path_factory.mktemp("model") / "final"
    build_rae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = ROOT / "scripts" / "prepare_data.py"
    specification = importlib.util.spec_from_file_location("prepare_data", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("data") / "digits"
    module.main(["digits", "--output", str(folder)])
    return folder


def write_images(folder, counts, classes=("ant", "bee", "cat", "dog"), seed=0):
    """Noisy images of 36 x 32 px, a colour for each class: `counts` images of each class, by split."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (36, 32, 3))
                pixels[..., number % 3] += 60 + 30 * (number // 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def small(tmp_path):
    return write_images(tmp_path / "images", {"train": 6, "validation": 3})


@pytest.fixture
def probe(model, small, tmp_path, monkeypatch, capsys):
    """Runs the command in this process with a short training; returns (results, what it printed)."""
    defaults = {
        "model": model, "data.path": small, "data.num_workers": 0, "features.cache_dir": tmp_path / "cache",
        "features.batch_size": 8, "output_dir": tmp_path / "out", "train.lrs": "[0.1,1]", "train.min_steps": 20,
        "train.cpu_threads": 1, "train.selection_fraction": 0.25,
    }  # fmt: skip

    def call(*extra, **settings):
        settings = {**defaults, **{key.replace("__", "."): value for key, value in settings.items()}}
        AcceleratorState._reset_state(True)  # another precision than the last time
        capsys.readouterr()
        linear_probe.main([*flags({k: v for k, v in settings.items() if v is not None}), *extra])
        printed = capsys.readouterr().out
        return json.loads((settings["output_dir"] / "results.json").read_text()), printed

    return call


@pytest.fixture
def refused(probe, capsys, monkeypatch):
    """Runs the command on what it must refuse before it extracts features; returns its one line on stderr."""

    def no_features(*args):
        raise AssertionError("features were extracted")

    def call(*extra, **settings):
        monkeypatch.setattr(features, "extract", no_features)
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: probe(*extra, **settings))
        message = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message.count("\n") == 1 and message.startswith("error: "), message
        return message

    return call


def cached(folder):
    """The feature sets in a cache folder, by their number of images."""
    sets = [Features(path) for path in folder.glob("*/features")]
    return {len(features): features for features in sets}


def split_labels(folder, features):
    names = sorted(path.name for path in folder.iterdir())
    source = scan_folder(str(folder), names)
    return torch.tensor([source.label(int(i)) for i in features.index])


# --------------------------------------------------------------------------------------------------------------------
# The command on the digits, on one and two processes
# --------------------------------------------------------------------------------------------------------------------


DIGITS = {"data.eval_split": "test", "data.num_workers": 1, "train.lrs": "[0.3,1]", "train.min_steps": 1000,
          "train.cpu_threads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def digits_run(model, digits, tmp_path_factory):
    """Folder of a run on one process, with the whole default protocol but for the length of training."""
    folder = tmp_path_factory.mktemp("one")
    settings = {**DIGITS, "model": model, "data.path": digits, "output_dir": folder / "out"}
    done = run_command("linear_probe.py", *flags({**settings, "features.cache_dir": folder / "cache"}))
    (folder / "stdout").write_text(done.stdout)
    assert "it/s" not in done.stderr  # no progress bar where there is no terminal
    return folder


def test_digits(digits_run, digits):
    results = json.loads((digits_run / "out" / "results.json").read_text())
    assert results["top1"] >= 0.85
    assert results["top1"] < results["top5"] <= 1 and results["num_samples"] == 180
    low, high = results["top1_interval"]
    assert low < results["top1"] < high and [low, high] == wilson_interval(round(results["top1"] * 180), 180)
    assert [line["num_samples"] for line in results["per_class"]] == [
        len(list((digits / "test" / str(digit)).iterdir())) for digit in range(10)
    ]
    right = sum(line["top1"] * line["num_samples"] for line in results["per_class"])
    assert right == pytest.approx(results["top1"] * 180)
    sweep = results["sweep"]  # four as asked for, and one more rate, because the best one was at their edge
    assert len(sweep) == 6 and [line["lr"] for line in sweep[:4]] == [0.3, 0.3, 1.0, 1.0]
    assert results["chosen"] == choose(sweep, 143)  # a tenth of 1,437
    assert results["lr"] == results["sweep"][results["chosen"]]["lr"]
    assert results["num_train_samples"] == 1437 and results["precision"] == "no" and results["features"] == "mean"
    assert results["config"]["train"]["seed"] == 0 and results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "_timestamp" in results  # evaluate.save's
    printed = (digits_run / "stdout").read_text()
    assert f"top-1   {100 * results['top1']:.2f} % of 180 images, 95% interval" in printed
    assert Image.open(digits_run / "out" / "confusion.png").size[0] > 400


def test_two_processes_give_the_same(digits_run, model, digits, tmp_path):
    settings = {**DIGITS, "model": model, "data.path": digits, "output_dir": tmp_path / "out"}
    settings |= {"features.cache_dir": tmp_path / "cache", "features.batch_size": 100}
    run_command("linear_probe.py", *flags(settings), processes=2)
    one, two = cached(digits_run / "cache"), cached(tmp_path / "cache")
    assert one.keys() == two.keys() == {1437, 180}
    for count in one:
        rows = torch.arange(count)
        assert torch.equal(two[count].index, rows) and torch.equal(one[count].index, rows)
        torch.testing.assert_close(one[count].rows(rows), two[count].rows(rows), atol=2e-3, rtol=2e-3)
    results = [json.loads((folder / "out" / "results.json").read_text()) for folder in (digits_run, tmp_path)]
    for name in ("top1", "top5", "per_class", "lr", "weight_decay", "num_samples", "num_train_samples"):
        assert results[0][name] == results[1][name], name


def test_agrees_with_scikit_learn(digits_run, digits):
    """The same convex problem on the same features: to within one point, for the head of the command and for one that
    is trained with another weight decay."""
    sets = cached(digits_run / "cache")
    train, test = sets[1437], sets[180]
    data = training_set(train, split_labels(digits / "train", train), 10, CPU)
    test_labels = split_labels(digits / "test", test)
    x = data.inputs(torch.arange(1437))[:, :-1].numpy()
    x_test = ((test.rows(torch.arange(180)).float() - data.mean) / data.std).numpy()

    def scikit_learn(weight_decay):
        problem = LogisticRegression(C=1 / (weight_decay * 1437), solver="newton-cg", max_iter=500)
        return problem.fit(x, data.labels.numpy())

    results = json.loads((digits_run / "out" / "results.json").read_text())
    score = scikit_learn(results["weight_decay"]).score(x_test, test_labels.numpy())
    assert abs(results["top1"] - score) < 0.01

    theirs = scikit_learn(1e-3)
    ours = train_heads(data, torch.arange(1437), [(1.0, 1e-3)], HeadTrainingConfig(min_steps=1000), "head")[:, 0]

    def objective(weight, bias):
        loss = F.cross_entropy(torch.from_numpy(x) @ weight + bias, data.labels)
        return (loss + 1e-3 / 2 * weight.square().sum()).item()

    best = objective(torch.tensor(theirs.coef_.T, dtype=torch.float32), torch.tensor(theirs.intercept_).float())
    assert objective(ours[:-1], ours[-1]) == pytest.approx(best, rel=2e-3)
    predicted = (torch.from_numpy(x_test) @ ours[:-1] + ours[-1]).argmax(1).numpy()
    assert (predicted == theirs.predict(x_test)).mean() > 0.98


def test_eval_only_repeats_the_figures(digits_run, model, digits, probe, tmp_path):
    """Without the training images, with the head's model and features, on features that are extracted again."""
    images = tmp_path / "digits"
    shutil.copytree(digits / "test", images / "test")
    results, printed = probe(
        "--eval_only", "--head", str(digits_run / "out" / "head"), model=None, data__path=images,
        data__eval_split="test", output_dir=tmp_path / "again",
    )  # fmt: skip
    before = json.loads((digits_run / "out" / "results.json").read_text())
    for name in ("top1", "top1_interval", "top5", "per_class", "lr", "num_train_samples", "most_confused"):
        assert results[name] == before[name], name
    assert results["sweep"] is None and not (tmp_path / "again" / "head").exists()
    assert "note" not in printed


def test_a_head_names_its_model_from_anywhere(tmp_path, monkeypatch):
    """A folder as it was given is somewhere else for a command that is started in another one."""
    (tmp_path / "rae").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, recorded in (("rae", str(tmp_path / "rae")), ("user/rae", "user/rae")):
        model, accelerator = (
            SimpleNamespace(name=given, loaded=given, kind="rae"),
            SimpleNamespace(mixed_precision="no"),
        )
        extractor = SimpleNamespace(
            model=model, weights="", kind="mean", width=1, image_size=8, accelerator=accelerator
        )
        assert linear_probe.provenance(extractor)["model"] == recorded


# --------------------------------------------------------------------------------------------------------------------
# Features and their cache
# --------------------------------------------------------------------------------------------------------------------


def test_kinds_of_features(tmp_path):
    torch.manual_seed(0)
    rae = build_rae(use_latent_stats=True)
    rae.set_latent_stats(torch.randn(64, 8, 8), torch.rand(64, 8, 8) + 0.5)
    rae.save_pretrained(tmp_path / "rae")
    model = load_autoencoder(str(tmp_path / "rae"))
    pixels = torch.rand(2, 3, 32, 32)
    latent = rae.eval().encode(pixels).latent
    features = {kind: image_features(model, pixels, kind) for kind in ("mean", "mean_max", "flat", "tokens")}
    assert torch.equal(features["mean"], latent.mean((2, 3)))
    assert torch.equal(features["mean_max"], torch.cat([latent.mean((2, 3)), latent.amax((2, 3))], 1))
    assert torch.equal(features["flat"], latent.reshape(2, -1))
    assert torch.equal(features["tokens"], rae.encode(pixels, normalize=False).latent.mean((2, 3)))
    assert not torch.allclose(features["tokens"], features["mean"], atol=0.1)


@pytest.mark.parametrize("kind,width", [("mean_max", 128), ("flat", 4096), ("tokens", 64)])
def test_kind_is_a_setting_and_goes_with_the_head(probe, tmp_path, kind, width):
    results, _ = probe(features__kind=kind)
    assert (results["features"], results["feature_width"]) == (kind, width)
    again, _ = probe("--eval_only", "--head", str(tmp_path / "out" / "head"), output_dir=tmp_path / "again")
    assert (again["features"], again["top1"]) == (kind, results["top1"])


def test_features_are_those_of_the_centre_crops(probe, model, small, tmp_path):
    probe()
    source = scan_folder(str(small / "train"), sorted(os.listdir(small / "train")))
    [batch] = eval_loader(source, 32, 100)
    expected = image_features(load_autoencoder(str(model)), batch["pixels"].float() / 255, "mean")
    features = cached(tmp_path / "cache")[24]
    torch.testing.assert_close(features.rows(features.index).float(), expected, atol=2e-3, rtol=2e-3)


def count_calls(monkeypatch):
    """How often features are extracted from here on: a list that grows."""
    calls, extract = [], features.extract

    def counted(*args):
        calls.append(args[-1])
        extract(*args)

    monkeypatch.setattr(features, "extract", counted)
    return calls


def test_cache_is_used_again(probe, monkeypatch, tmp_path):
    calls = count_calls(monkeypatch)
    first, printed = probe()
    assert calls == ["training features", "evaluation features"] and "extracted to" in printed
    second, printed = probe(features__batch_size=5)  # which decides nothing
    assert len(calls) == 2 and "extracted to" not in printed and "found in" in printed
    assert second["top1"] == first["top1"] and second["sweep"] == first["sweep"]
    probe(data__eval_split="train")  # evaluated on the training images: those features are there
    assert len(calls) == 2


def test_cache_follows_all_that_decides_features(probe, model, small, monkeypatch, tmp_path):
    calls = count_calls(monkeypatch)
    probe()
    del calls[:]

    build_rae(seed=1).save_pretrained(tmp_path / "other")
    probe(model=tmp_path / "other")
    assert len(calls) == 2  # other weights

    rae = RAEModel.from_pretrained(model)
    with torch.no_grad():
        rae.decoder.decoder_pred.bias += 1
    rae.save_pretrained(tmp_path / "decoder")
    probe(model=tmp_path / "decoder")
    assert len(calls) == 2  # only the decoder is another one

    probe(features__kind="tokens")
    assert len(calls) == 4
    results, _ = probe(features__mixed_precision="bf16")
    assert len(calls) == 6 and results["precision"] == "bf16"

    os.utime(small / "train" / "ant" / "0.png", (1, 1))
    probe()
    assert calls[6:] == ["training features"]  # an image was replaced
    (small / "validation" / "bee" / "1.png").unlink()
    probe()
    assert calls[7:] == ["evaluation features"]


def test_unfinished_cache_is_not_taken_for_whole(probe, monkeypatch, tmp_path):
    """What a killed run leaves: everything but the last step."""
    monkeypatch.setattr(features, "SHARD_BYTES", 2 * 64 * 10)  # ten rows in a file

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "close", killed)
        patch.setattr("rae_suite.files.shutil.rmtree", lambda *args, **options: None)  # nothing is cleaned up either
        with pytest.raises(KeyboardInterrupt):
            probe()
    [left] = (tmp_path / "cache").glob("*/.features.partial")
    assert len(list(left.glob("*.safetensors"))) == 2
    calls = count_calls(monkeypatch)
    probe()
    assert len(calls) == 2 and not left.exists()
    assert len(list((tmp_path / "cache").glob("*/features/*.safetensors"))) == 3 + 2


@pytest.mark.parametrize("damage", ["cut", "missing", "record"])
def test_damaged_cache_is_extracted_again(probe, monkeypatch, tmp_path, damage):
    first, _ = probe()
    [folder] = [f.folder for n, f in cached(tmp_path / "cache").items() if n == 24]
    shard = folder / "features-00000.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    else:
        (folder / "features.json").write_text("{")
    calls = count_calls(monkeypatch)
    second, printed = probe()
    assert calls == ["training features"] and "is damaged, its features are extracted again" in printed
    assert second["sweep"] == first["sweep"]


def test_two_runs_do_not_write_the_same_features(probe, tmp_path, refused):
    probe()
    [folder] = [f.folder.parent for n, f in cached(tmp_path / "cache").items() if n == 24]
    shutil.rmtree(folder / "features")
    lock = features.lock_cache(folder, 0)
    assert f"another run is extracting these features to {folder}" in refused()
    lock.close()


def test_rows_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 2 * 3 * 7)  # seven rows of three features
    values = torch.randn(30, 3).half()
    writer = FeatureWriter(tmp_path / "features", 3)
    for start, end in ((0, 2), (2, 17), (17, 18), (18, 30)):
        writer.add(values[start:end], torch.arange(100 + start, 100 + end))
    writer.close(["a: b"], {})
    cached = Features(tmp_path / "features")
    assert [len(shard) for shard in cached.shards] == [7, 7, 7, 7, 2] and len(cached) == 30
    assert torch.equal(cached.index, torch.arange(100, 130)) and cached.unreadable == ["a: b"]
    rows = torch.tensor([29, 0, 6, 7, 13, 14, 6])
    assert torch.equal(cached.rows(rows), values[rows])
    monkeypatch.setattr(features, "BLOCK_ELEMENTS", 12)
    assert [len(block) for block in cached.blocks(torch.arange(30), 0)] == [4] * 7 + [2]


def test_unreadable_images_are_skipped_and_bounded(probe, small, capsys):
    (small / "train" / "bee" / "2.png").write_bytes(b"no image")
    (small / "validation" / "ant" / "0.png").write_bytes(b"no image")
    results, printed = probe(data__max_unreadable=1)
    assert results["num_train_samples"] == 23 and results["num_samples"] == 11 and results["num_unreadable"] == 1
    assert results["per_class"][0]["num_samples"] == 2
    assert "cannot be read, not counted: 1" in printed
    for cache in ("the same", "a new one"):
        settings = {} if cache == "the same" else {"features__kind": "flat"}
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda settings=settings: probe(data__max_unreadable=0, **settings))
        assert stopped.value.code == 2
        assert "error: data.max_unreadable: 1 images c" in capsys.readouterr().err


def test_features_out_of_range_stop(probe, monkeypatch, capsys):
    monkeypatch.setattr(
        features, "image_features", lambda model, pixels, kind: torch.full((len(pixels), 3), 1e6 * pixels.max())
    )
    with pytest.raises(SystemExit) as stopped:
        run_main(probe)
    assert stopped.value.code == 1 and "training features: not finite in float16" in capsys.readouterr().err


def test_kl_autoencoder_of_any_size(probe, refused, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "kl")
    settings = {"model": tmp_path / "kl", "features__image_size": 24}
    results, _ = probe(**settings, features__kind="flat")
    assert (results["feature_width"], results["image_size"]) == (4 * 12 * 12, 24)
    head = ("--eval_only", "--head", str(tmp_path / "out" / "head"))
    again, _ = probe(*head, model=None, output_dir=tmp_path / "again")
    assert again["image_size"] == 24 and again["top1"] == results["top1"]
    assert "features.kind: tokens is not to be had" in refused(**settings, features__kind="tokens")
    settings |= {"features__image_size": 32, "output_dir": tmp_path / "again"}
    message = refused(*head, **settings)
    assert "takes 576 features" in message and "are 1024" in message


# --------------------------------------------------------------------------------------------------------------------
# Images and classes
# --------------------------------------------------------------------------------------------------------------------


def save_dataset(folder, classes, splits):
    """A `datasets` folder of images, a colour for each class; `splits` maps a split to its labels, text or numbers."""
    datasets = pytest.importorskip("datasets")
    label_type = datasets.Value("string" if isinstance(classes[0], str) else "int64")
    columns = datasets.Features(image=datasets.Image(), label=label_type)
    rows = {}
    for split, labels in splits.items():
        pictures = [Image.new("RGB", (32, 32), (40 * classes.index(y) + i, 9 * i, 99)) for i, y in enumerate(labels)]
        rows[split] = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=columns)
    datasets.DatasetDict(rows).save_to_disk(folder)
    return folder


def test_text_labels_are_numbered_by_name(probe, tmp_path, capsys):
    """Sources number the texts of each split from zero: an evaluation split without the first class is shifted."""
    names = ["a", "b", "c"]
    folder = save_dataset(tmp_path / "hf", names, {"train": names * 4, "validation": ["b", "c"] * 3})
    with pytest.raises(SystemExit):
        run_main(lambda: probe(data__path=folder))
    message = capsys.readouterr().err
    assert "data.eval_split: it lacks 1 class ('a') of the 3 of the training split" in message
    results, printed = probe("--allow_absent_classes", data__path=folder, train__min_steps=200)
    assert results["absent_classes"] == ["a"] and "classes without evaluation images: a" in printed
    assert [line["num_samples"] for line in results["per_class"]] == [0, 3, 3]
    assert results["per_class"][0]["top1"] is None and results["top1"] == 1.0
    assert "top5" not in results and "left out: 3 classes are fewer than 5" in printed


def test_numbers_without_names(probe, tmp_path):
    labels = [3, 1000000007, 5]
    folder = save_dataset(tmp_path / "hf", labels, {"train": labels * 4, "validation": labels[::-1] * 2})
    results, _ = probe(data__path=folder, train__min_steps=200)
    assert [line["class"] for line in results["per_class"]] == ["3", "5", "1000000007"] and results["top1"] == 1.0


def test_held_out_images_and_the_head_that_has_not_seen_them(probe, refused, small, tmp_path):
    images = {"data__path": small / "train", "data__holdout_fraction": 0.34, "train__seed": 3}
    images |= {"allow_absent_classes": "true"}
    results, _ = probe(**images)
    assert (results["num_train_samples"], results["num_samples"]) == (16, 8)
    head = ("--eval_only", "--head", str(tmp_path / "out" / "head"))
    again, _ = probe(*head, **images, output_dir=tmp_path / "again")
    assert again["top1"] == results["top1"] and again["num_samples"] == 8
    assert again["split"] == results["split"] == "34% held out of train, seed 3"
    whole, printed = probe(*head, data__path=small / "train", output_dir=tmp_path / "whole")
    assert whole["num_samples"] == 24 and whole["split"] == "all 24 images (no splits)" and whole["split"] in printed
    message = refused(*head, data__path=small / "train", data__eval_split="val", output_dir=tmp_path / "whole")
    assert "data.eval_split: there is no split 'val'" in message
    message = refused(*head, **images | {"train__seed": 4}, output_dir=tmp_path / "again")
    assert "train.seed: expected 3" in message and "got 4" in message


def test_single_setting_needs_no_selection(probe):
    results, printed = probe(train__lrs="0.5", train__weight_decays="0")
    assert results["sweep"] == [{"lr": 0.5, "weight_decay": 0.0, "top1": None, "loss": None}]
    assert "heads of the sweep" not in printed


def test_head_that_was_trained_on_other_weights(probe, tmp_path):
    probe()
    build_rae(seed=1).save_pretrained(tmp_path / "other")
    head = ("--eval_only", "--head", str(tmp_path / "out" / "head"))
    _, printed = probe(*head, model=tmp_path / "other", output_dir=tmp_path / "again")
    assert "note: the head was trained on other weights" in printed


def test_bad_input(probe, refused, model, small, tmp_path):
    for settings, expected in (
        ({"model": None}, "model: expected the folder or Hub id of an autoencoder, got None"),
        ({"model": tmp_path}, "has no config.json"),
        ({"data__eval_split": "nowhere"}, "data.eval_split: there is no split 'nowhere'"),
        ({"data__train_split": "nowhere"}, "data.train_split: there is no split 'nowhere'"),
        ({"features__kind": "median"}, "features.kind"),
        ({"features__image_size": 64}, "features.image_size: expected images of 32 px"),
        ({"train__lrs": "[]"}, "train.lrs: expected one or more, distinct, got []"),
        ({"train__lrs": "[0.1,0]"}, "train.lrs: expected positive numbers"),
        ({"train__weight_decays": "[0,0]"}, "train.weight_decays: expected one or more, distinct"),
        ({"train__selection_fraction": "1"}, "train.selection_fraction: expected a number in (0, 1)"),
        ({"train__selection_fraction": "0.01"}, "0.01 of 24 training images leaves 0 to choose on"),
        ({"head": tmp_path}, "head: expected nothing unless eval_only is given"),
        ({"eval_only": "true"}, "head: expected the folder of a head"),
        ({"output_dir": small / "train" / "ant" / "0.png"}, "output_dir: "),
        ({"features__cache_dir": small / "train" / "ant" / "0.png"}, "features.cache_dir: "),
    ):
        assert expected in refused(**settings), settings

    shutil.copytree(model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert "error: model: " in refused(model=tmp_path / "empty")
    shutil.copytree(small / "train" / "ant", tmp_path / "plain")
    assert "data.eval_split: there is no split 'validation'" in refused(data__path=tmp_path / "plain")
    message = refused(data__path=tmp_path / "plain", data__holdout_fraction=0.3)
    assert "data.train_split: 4 of 4 images have no label; expected class folders" in message
    write_images(tmp_path / "one", {"train": 3, "validation": 2}, classes=("only",))
    assert "data.train_split: expected images of at least 2 classes, got ['only']" in refused(
        data__path=tmp_path / "one"
    )
    shutil.copytree(small / "validation" / "ant", small / "validation" / "wasp")
    assert "it has 1 class ('wasp') that the training split lacks" in refused()


def test_bad_heads(probe, refused, tmp_path):
    probe()
    head = tmp_path / "out" / "head"
    evaluate = {"eval_only": "true", "head": head, "output_dir": tmp_path / "again"}
    assert "output_dir: expected another folder" in refused(**evaluate | {"output_dir": tmp_path / "out"})
    assert "has no config.json" in refused(**evaluate | {"head": tmp_path})
    assert "features.kind: expected mean, which" in refused(**evaluate, features__kind="flat")
    build_rae(width=32).save_pretrained(tmp_path / "narrow")
    assert "takes 64 features, the mean features of" in refused(**evaluate, model=tmp_path / "narrow")
    other = write_images(tmp_path / "other", {"validation": 2}, classes=("ant", "bee", "cow", "dog"))
    assert f"1 class ('cow') that the head {head} lacks" in refused(**evaluate, data__path=other)
    (head / "config.json").write_text(json.dumps({"classes": ["a"]}))
    assert "config.json lacks features" in refused(**evaluate)
    (head / "head.safetensors").write_bytes(b"nothing")
    assert "is no head of linear_probe.py" in refused(**evaluate)
    (head / "head.safetensors").unlink()
    assert "has no head.safetensors" in refused(**evaluate)


def test_classes_that_do_not_match():
    assert check_classes(["b", "a"], ["a", "b"], "the head", False) == []
    assert check_classes(["b"], ["a", "b"], "the head", True) == ["a"]
    with pytest.raises(ValueError, match=r"lacks 4 classes \('a', 'b', 'c', ...\) of the 5 of the head"):
        check_classes(["e"], list("abcde"), "the head", False)


def test_disk_space(tmp_path):
    with pytest.raises(ValueError, match=r"features.cache_dir: expected a folder with 1000000000.00 GB left"):
        features.lock_cache(tmp_path / "cache" / "key", 10**18)


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------


def synthetic(folder, num_rows=300, width=12, classes=5, seed=0):
    """Features around a centre for each class, badly scaled, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num_rows,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    values = centres[labels] + torch.randn(num_rows, width, generator=generator)
    values = values * torch.logspace(-1, 1, width) + 5
    writer = FeatureWriter(folder, width)
    writer.add(values.half(), torch.arange(num_rows))
    writer.close([], {})
    return training_set(Features(folder), labels, classes, CPU)


def test_heads_of_a_sweep_are_those_trained_alone(tmp_path):
    data = synthetic(tmp_path / "features")
    settings = [(0.01, 0.0), (0.3, 1e-3), (2.0, 0.1), (1e30, 1.0)]  # the last one diverges
    config = HeadTrainingConfig(min_steps=50, batch_size=64)
    rows = torch.arange(10, 300)
    together = train_heads(data, rows, settings, config, "all")
    for h, setting in enumerate(settings[:3]):
        alone = train_heads(data, rows, [setting], config, "one")
        torch.testing.assert_close(together[:, h], alone[:, 0], atol=1e-5, rtol=1e-4)
    sweep = compare_heads(data, torch.arange(10), together, settings)
    assert sweep[3] == {"lr": 1e30, "weight_decay": 1.0, "top1": None, "loss": None}
    logits = data.inputs(torch.arange(10)) @ together[:, 1]
    assert sweep[1]["top1"] == pytest.approx((logits.argmax(1) == data.labels[:10]).float().mean().item())
    assert sweep[1]["loss"] == pytest.approx(F.cross_entropy(logits, data.labels[:10]).item(), rel=1e-5)


def test_training_is_sgd_on_the_regularised_loss(tmp_path):
    """Against torch's own optimizer and gradients."""
    data = synthetic(tmp_path / "features")
    config = HeadTrainingConfig(min_steps=30, batch_size=50, epochs=1, seed=5)
    rows = torch.arange(300)
    ours = train_heads(data, rows, [(0.2, 0.01)], config, "head")[:, 0]
    linear = torch.nn.Linear(12, 5)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(
        [{"params": linear.weight, "weight_decay": 0.01}, {"params": linear.bias}], lr=0.2, momentum=0.9, nesterov=True
    )
    for step, batch in enumerate(batches(rows, 50, 30, 5)):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * 0.5 * (1 + math.cos(math.pi * step / 30))
        optimizer.zero_grad()
        F.cross_entropy(linear(data.inputs(batch)[:, :-1]), data.labels[batch]).backward()
        optimizer.step()
    torch.testing.assert_close(ours, torch.cat([linear.weight.T, linear.bias[None]]), atol=1e-5, rtol=1e-4)


def test_training_repeats_itself_and_follows_the_seed(tmp_path):
    data = synthetic(tmp_path / "features")
    config = HeadTrainingConfig(min_steps=20, batch_size=32, epochs=1)
    first, second = (fit(data, config) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]
    assert not torch.equal(first[0], fit(data, HeadTrainingConfig(min_steps=20, batch_size=32, epochs=1, seed=1))[0])


def test_length_of_training(tmp_path, capsys):
    data = synthetic(tmp_path / "features", num_rows=100)
    for settings, expected in (
        (dict(epochs=2.5, min_steps=1, batch_size=20), "13 steps of 20"),
        (dict(epochs=2, min_steps=7, batch_size=1000), "7 steps of 100"),
    ):
        train_heads(data, torch.arange(100), [(0.1, 0.0)], HeadTrainingConfig(**settings), "head")
        assert f"head: 1 of 5 classes, 100 images, {expected}" in capsys.readouterr().out


def test_standardisation(tmp_path):
    data = synthetic(tmp_path / "features")
    inputs = data.inputs(torch.arange(300))
    assert inputs.shape == (300, 13) and (inputs[:, -1] == 1).all()
    torch.testing.assert_close(inputs[:, :-1].mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs[:, :-1].std(0, unbiased=False), torch.ones(12), atol=1e-4, rtol=0)
    writer = FeatureWriter(tmp_path / "constant", 2)
    writer.add(torch.tensor([[0.1, 1.0], [0.1, 3.0]]).half(), torch.arange(2))
    writer.close([], {})
    constant = training_set(Features(tmp_path / "constant"), torch.tensor([0, 1]), 2, CPU)
    assert constant.inputs(torch.arange(2)).tolist() == [[0, -1, 1], [0, 1, 1]]


def test_batches_draw_every_row_equally_often():
    rows = torch.arange(5, 15)
    drawn = list(batches(rows, 4, 8, seed=0))
    assert all(len(batch) == 4 for batch in drawn)
    counts = torch.cat(drawn).bincount(minlength=15)[5:]
    assert counts.min() == 3 and counts.max() == 4 and counts.sum() == 32
    assert torch.cat(drawn[:5])[:10].unique().tolist() == rows.tolist()
    assert not torch.equal(torch.cat(drawn), torch.cat(list(batches(rows, 4, 8, seed=1))))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_selection_part_has_its_share_of_every_class(fraction):
    labels = torch.tensor([0] * 40 + [1] * 100 + [2] * 7 + [3])[torch.randperm(148)]
    rows, held_out = hold_out(labels, fraction, seed=0)
    assert torch.cat([rows, held_out]).sort().values.tolist() == list(range(148))
    assert len(held_out) == math.floor(148 * fraction)
    for label, count in enumerate(labels.bincount().tolist()):
        assert abs((labels[held_out] == label).sum().item() - count * fraction) < 1
    assert torch.equal(held_out, hold_out(labels, fraction, seed=0)[1])
    assert not torch.equal(held_out, hold_out(labels, fraction, seed=1)[1])


def test_nothing_to_select_on():
    with pytest.raises(ValueError, match="train.selection_fraction: 0.1 of 9 training images leaves 0 to choose on"):
        hold_out(torch.arange(9), 0.1, seed=0)


def test_all_heads_diverge(tmp_path):
    data = synthetic(tmp_path / "features")
    for lrs in ((1e30,), (1e30, 1e31)):
        with pytest.raises(RuntimeError, match="train.lrs: .* diverged"):
            fit(data, HeadTrainingConfig(lrs=lrs, weight_decays=(1.0,), min_steps=5))


def test_the_choice_is_no_accident_of_few_images():
    """Of lines that differ by less than a standard error, the one with the lowest loss."""
    lines = [(0.70, 69.0), (0.68, 0.9), (0.66, 0.8), (0.30, 0.1), (None, None), (0.70, math.nan)]
    sweep = [{"top1": top1, "loss": loss} for top1, loss in lines]
    assert choose(sweep, 32) == 2  # a standard error is 8%
    assert choose(sweep, 100_000) == 0
    assert choose(sweep[4:], 32) is None


def test_a_sweep_goes_on_beyond_its_edges():
    grid = [0.01, 0.03, 0.1], [1e-5, 1e-4]
    for lr, decay, expected in (
        (0.03, 1e-5, grid),
        (0.01, 1e-5, ([0.003333, *grid[0]], grid[1])),
        (0.1, 1e-5, ([*grid[0], 0.3333], grid[1])),
        (0.03, 1e-4, (grid[0], [*grid[1], 0.001])),
    ):
        assert widened(*grid, {"lr": lr, "weight_decay": decay}) == expected
    assert widened(*grid, None) == ([0.003333, *grid[0]], grid[1])
    assert widened([0.1], [1e-5], {"lr": 0.1, "weight_decay": 1e-5}) == ([0.1], [1e-5])


def test_wide_features_of_few_images(tmp_path):
    """Within a point of the best of scikit-learn's C, from a grid that is far off."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (600,), generator=generator)
    centres = torch.randn(4, 300, generator=generator)
    values = 0.35 * centres[labels] + torch.randn(600, 300, generator=generator)
    writer = FeatureWriter(tmp_path / "wide", 300)
    writer.add(values[:80].half(), torch.arange(80))
    writer.close([], {})
    data = training_set(Features(tmp_path / "wide"), labels[:80], 4, CPU)
    weights, sweep, best = fit(data, HeadTrainingConfig(lrs=(10.0, 30.0, 100.0), min_steps=60, epochs=1))
    scaled = F.pad((values - data.mean) / data.std, (0, 1), value=1.0)

    def accuracy(predicted):
        return (torch.as_tensor(predicted)[80:] == labels[80:]).float().mean().item()

    theirs = max(
        accuracy(LogisticRegression(C=c, max_iter=200).fit(scaled[:80, :-1], labels[:80]).predict(scaled[:, :-1]))
        for c in (1e-4, 1e-3, 1e-2, 1e-1)
    )
    assert accuracy((scaled @ weights).argmax(1)) > theirs - 0.01 and theirs > 0.5
    assert len(sweep) > 6 and sweep[best]["lr"] < 30


def test_head_loads_without_anything_else(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, bias, mean, std = (torch.rand(*shape, generator=generator) + 0.5 for shape in ((3, 4), (3,), (4,), (4,)))
    config = {name: 0 for name in linear_heads.HEAD_KEYS} | {"classes": ["a", "b", "c"]}
    LinearHead(weight, bias, mean, std, config).save(tmp_path / "head")
    head = LinearHead.load(str(tmp_path / "head"))
    x = torch.randn(2, 4)
    torch.testing.assert_close(head(x), ((x - mean) / std) @ weight.T + bias)
    assert head.config == config and sorted(os.listdir(tmp_path / "head")) == ["config.json", "head.safetensors"]


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct,total,expected",
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (42250, 50000, (0.8418, 0.8481))],
)
def test_wilson_interval(correct, total, expected):
    """Values of the closed form worked out elsewhere (Newcombe 1998 has the first kind)."""
    assert wilson_interval(correct, total) == pytest.approx(expected, abs=1e-4)


def test_figures_of_a_head(tmp_path):
    """A head that copies the features: logits are known."""
    logits = torch.tensor([[9, 8, 7, 6, 5, 0], [9, 8, 7, 6, 5, 0], [0, 5, 6, 7, 8, 9], [0, 1, 9, 3, 4, 5.0]])
    labels = torch.tensor([0, 5, 4, 2])
    writer = FeatureWriter(tmp_path / "features", 6)
    writer.add(logits.half(), torch.arange(4))
    writer.close([], {})
    classes = list("abcdef")
    head = LinearHead(torch.eye(6), torch.zeros(6), torch.zeros(6), torch.ones(6), {"classes": classes})
    figures, confusion = evaluate_head(Features(tmp_path / "features"), labels, head)
    assert (figures["top1"], figures["top5"], figures["num_samples"]) == (0.5, 0.75, 4)
    assert figures["top5_interval"] == wilson_interval(3, 4)
    assert [line["top1"] for line in figures["per_class"]] == [1.0, None, 1.0, None, 0.0, 0.0]
    assert {tuple(place): confusion[tuple(place)].item() for place in confusion.nonzero().tolist()} == {
        (0, 0): 1, (5, 0): 1, (4, 5): 1, (2, 2): 1,
    }  # fmt: skip
    assert {tuple(pair.values()) for pair in most_confused(confusion, classes)} == {("f", "a", 1), ("e", "f", 1)}


@pytest.mark.parametrize("number", [2, 10, 400])
def test_confusion_picture(tmp_path, number):
    confusion = torch.eye(number, dtype=torch.int64) * 9
    confusion[1, 0] = 3
    draw_confusion(confusion, [f"class number {i}" for i in range(number)], "title", tmp_path / "confusion.png")
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()  # cells of the diagonal, and of the bars
    assert min(pixels.shape[:2]) > 300 and 0.001 < blue < 0.6


def test_results_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    linear_probe.save_results(tmp_path / "results.json", {"top1": 0.5})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["top1"] == 0.5 and results["git_revision"] is None
