"""eval_rfid.py, the metrics and the Frechet distances under it, with a small stand-in for the Inception network."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from cleanfid.fid import compare_folders, frechet_distance
from cleanfid.inception_torchscript import InceptionV3W
from conftest import TINY, flags, read_metrics, run_command, tiny_rae
from PIL import Image
from torch import nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

import eval_rfid
from modeling_rae import RAEModel
from rae_suite.digests import latents_digest
from rae_suite.frechet import FrechetMetric, frechet_distance_of_few, inception_metrics, read_references
from rae_suite.inception import load_inception
from rae_suite.launch import measuring_accelerator, run_main
from rae_suite.metric_names import PSNR_CAP, too_small_for
from rae_suite.metrics import Evaluator, image_metrics, to_8bit
from rae_suite.moments import Moments
from rae_suite.settings import ImagesConfig
from rae_suite.settings_rae import parse_config
from rae_suite.splits import load_eval_images

SIZE = 32  # pixels


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An RAE whose decoder is untrained: its reconstructions are far from the images."""
    rae = tiny_rae()
    rae.decoder.decoder_pred.weight.data *= 30  # contrast
    folder = tmp_path_factory.mktemp("model") / "run" / "final"
    rae.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(images, model, inception, tmp_path, monkeypatch):
    """Run main() in this process on the 24 training images; gives results.json."""

    def run(settings=(), output="out", models=None) -> dict:
        output_dir = tmp_path / output
        arguments = {
            "data.path": images,
            "data.eval_split": "train",
            "data.train_split": "none",
            "data.num_workers": 0,
            "inception_path": inception,
            "metrics": "[rfid]",
            "output_dir": output_dir,
            "reference_cache": tmp_path / "cache",
        }
        arguments.update(settings)
        unused = {"inception_path"} if arguments["inception_path"] is None else set()
        if "reference" in arguments:
            unused.add("reference_cache")
        arguments = {key: value for key, value in arguments.items() if key not in unused}
        command_line = ["eval_rfid.py", "--model", *map(str, models or [model]), *flags(arguments)]
        monkeypatch.setattr("sys.argv", command_line)
        run_main(eval_rfid.main)
        return json.loads((output_dir / "results.json").read_text())

    return run


def read_pngs(folder: Path) -> torch.Tensor:
    """All PNG of a folder as uint8 (N, 3, H, W)."""
    pictures = [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------ moments


def test_moments_do_not_depend_on_batches_or_order():
    values = 1e4 + torch.randn(101, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for batch_size, order in ((1, range(101)), (7, range(100, -1, -1)), (101, range(101))):
        full, elementwise = Moments((6,), covariance=True), Moments((6,))
        for batch in values[list(order)].split(batch_size):
            full.update(batch)
            elementwise.update(batch)
            elementwise.update(batch[:0])
        assert full.count == elementwise.count == 101
        torch.testing.assert_close(full.mean, values.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(full.variance(correction=1), values.T.cov(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(elementwise.variance(), values.var(0, correction=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("few", [8, 40])
def test_distance_of_few_images_is_clean_fids(few):
    """Below and above as many samples as features; clean-fid's matrix root is good to about 1e-6 of the trace."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((few, 24)) * np.linspace(0.1, 2, 24)
    second = first + 0.3 * rng.standard_normal((few, 24)) + 0.1
    sides = [(x.mean(0), np.cov(x, rowvar=False)) for x in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = frechet_distance(*sides[0], *sides[1])
    assert frechet_distance_of_few(*sides[0], *sides[1]) == pytest.approx(expected, abs=1e-5 if few == 8 else 1e-9)
    assert abs(frechet_distance_of_few(*sides[0], *sides[0])) < 1e-10


# ------------------------------------------------------------------------------------------------------------ numbers


def test_rfid_is_clean_fids_of_the_saved_images(evaluate, inception, tmp_path, caplog, monkeypatch):
    """Both modes, on the PNG that the command writes; PSNR and SSIM are torchmetrics' on the same files. On a part of
    the features, because clean-fid takes a minute for the root of a singular 2048 x 2048 matrix."""
    width, forward = 200, InceptionV3W.forward
    monkeypatch.setattr(InceptionV3W, "forward", lambda self, x: forward(self, x)[:, :width])
    monkeypatch.setattr("rae_suite.frechet.INCEPTION_WIDTH", width)
    settings = {"metrics": "[rfid,psnr,ssim,lpips]", "fid_mode": "[legacy_tensorflow,clean]", "save_images": 24}
    results = evaluate({**settings, "vgg_weights": "random", "data.num_workers": 1, "batch_size": 9})
    assert results["num_samples"] == 24 and results["fid_mode"] == {"rfid": "legacy_tensorflow", "rfid_clean": "clean"}
    assert results["quantize"] == "round" and results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "rfid: 24 images are too few for the covariance of 200 features" in caplog.text
    folder = tmp_path / "out" / "run-final"
    network = inception_network(inception)
    for name, mode in results["fid_mode"].items():
        network.resize_inside = mode == "legacy_tensorflow"
        sides = (str(folder / "images"), str(folder / "reconstructions"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the singular root
            expected = compare_folders(*sides, network, mode, batch_size=8, device=torch.device("cpu"), verbose=False)
        assert results[name] == pytest.approx(expected, rel=1e-3)
    assert results["rfid"] != pytest.approx(results["rfid_clean"], rel=1e-3)  # not to be mixed
    real, fake = (read_pngs(folder / name).float() / 255 for name in ("images", "reconstructions"))
    psnr, ssim = (
        PeakSignalNoiseRatio(1.0, reduction="none", dim=(1, 2, 3)),
        StructuralSimilarityIndexMeasure(data_range=1.0),
    )
    assert results["psnr"] == pytest.approx(psnr(fake, real).mean().item(), rel=1e-5)
    assert results["ssim"] == pytest.approx(ssim(fake, real).item(), rel=1e-5)
    worst = results["rows"][0]["worst"]
    assert len(worst) == 10 and Path(worst[0]["name"]).is_file()
    assert worst[0]["psnr"] == pytest.approx(psnr(fake, real).min().item(), rel=1e-5)
    with Image.open(results["rows"][0]["comparison"]) as picture:
        assert picture.size == (12 * (96 + 4) + 4, 3 * (96 + 4) + 4 + 16)


def inception_network(path: Path) -> InceptionV3W:
    """clean-fid's wrapper, which knows one file name."""
    folder = path.parent / "cleanfid"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "inception-2015-12-05.pt")
    return InceptionV3W(str(folder), download=False)


def test_the_real_inception_network(images, tmp_path):
    """Where its file is present: features as clean-fid computes them from PNG files, in both modes."""
    from cleanfid.fid import get_folder_features
    from torch.hub import get_dir

    file = Path(get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    folder = tmp_path / "png"
    shutil.copytree(images / "validation", folder)
    accelerator = Accelerator()
    for metric in inception_metrics(["rfid", "rfid_clean"], None, "inception_path", accelerator):
        network = inception_network(file)
        network.resize_inside = metric.name == "rfid"
        mode = "legacy_tensorflow" if metric.name == "rfid" else "clean"
        expected = get_folder_features(str(folder), network, device=torch.device("cpu"), mode=mode, verbose=False)
        files = sorted(folder.rglob("*.png"))
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files])
        found = metric.features(pixels.permute(0, 3, 1, 2))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_batches_and_processes_change_nothing(evaluate, model, images, inception, tmp_path):
    """1, 2 and 3 processes and batches of 1, 7 and 64: every image counts once, pairs stay aligned."""
    noisy = {"latent_noise": "[0,0.5]", "features": "[inception,encoder]"}
    rows = {f"batch {size}": evaluate({**noisy, "batch_size": size}, f"{size}")["rows"] for size in (1, 7)}
    for processes, size in ((2, 7), (3, 64)):
        output = tmp_path / f"processes-{processes}"
        settings = {"data.path": images, "data.eval_split": "train", "data.train_split": "none", "data.num_workers": 0}
        settings.update({**noisy, "metrics": "[rfid]", "batch_size": size, "inception_path": inception})
        settings.update({"model": model, "output_dir": output, "reference_cache": output / "cache"})
        done = run_command("eval_rfid.py", *flags(settings), "--save_npz", "true", processes=processes)
        assert done.stdout.count("rfdd: Frechet distance") == 1  # one report
        rows[f"{processes} processes"] = json.loads((output / "results.json").read_text())["rows"]
        with np.load(output / "run-final" / "reconstructions.npz") as arrays:
            assert arrays["arr_0"].shape == (24, SIZE, SIZE, 3) and arrays["arr_0"].std((1, 2, 3)).min() > 0
    first, *others = rows.values()
    assert first[1]["psnr"] != first[0]["psnr"] and first[1]["rfid"] != first[0]["rfid"]  # the noise is there
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert theirs["num_samples"] == 24
            assert [case["name"] for case in theirs["worst"]] == [case["name"] for case in ours["worst"]]
            for name in ("rfid", "rfdd"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
            assert theirs["psnr"] == pytest.approx(ours["psnr"], rel=1e-6)


def test_identical_images(inception, images):
    """An exact reconstruction: rFID 0, a finite PSNR; the regular distance, of more images than features, too."""
    accelerator = Accelerator()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"pixels": torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator), "unreadable": []}
        for _ in range(2)
    ]
    for i, batch in enumerate(batches):
        batch["index"] = torch.arange(6) + 6 * i
    distances = inception_metrics(["rfid", "rfid_clean"], str(inception), "inception_path", accelerator)
    small = eval_rfid.encoder_metric(lambda pixels: pixels, tiny_rae(), 3, accelerator)  # mean colours
    evaluator = Evaluator(batches, accelerator, ["psnr", "ssim"], distances=[*distances, small])
    evaluation = evaluator(lambda pixels, index: pixels)
    summary = evaluation.summary()
    assert summary["psnr"] == PSNR_CAP and summary["ssim"] == pytest.approx(1, abs=1e-6)
    for name in ("rfid", "rfid_clean", "rfdd"):
        assert abs(summary[name]) < 1e-3
    darker = Evaluator(batches, accelerator, [], distances=[small])(lambda pixels, index: pixels / 2)
    colours = torch.cat([batch["pixels"] for batch in batches]).double().div(255).mean((2, 3)).numpy()
    halves = np.stack([to_8bit(torch.from_numpy(b["pixels"].numpy() / 255 / 2)).numpy() for b in batches])
    halves = (halves.reshape(12, 3, -1) / 255).mean(2)
    expected = frechet_distance(halves.mean(0), np.cov(halves.T), colours.mean(0), np.cov(colours.T))
    assert darker.distances["rfdd"] == pytest.approx(expected, rel=1e-4)


def test_ms_ssim_and_its_smallest_images(evaluate, capsys):
    """As torchmetrics has it, of each image; images that are too small are refused before a network is built."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 176, 176, generator=generator)
    y = (x + 0.2 * torch.rand(x.shape, generator=generator)).clamp(0, 1)
    values = image_metrics(x, y, ["ms_ssim"], None)["ms_ssim"]
    for i in range(2):
        expected = multiscale_structural_similarity_index_measure(y[i : i + 1], x[i : i + 1], data_range=1.0)
        torch.testing.assert_close(values[i], expected)
    assert too_small_for(("psnr", "ms_ssim"), 175) == ["ms_ssim"] and too_small_for(("ms_ssim",), 176) == []
    with pytest.raises(ValueError, match="larger than 160"):
        image_metrics(x[..., :175, :175], y[..., :175, :175], ["ms_ssim"], None)
    with pytest.raises(SystemExit):
        evaluate({"metrics": "[ms_ssim,lpips]", "vgg_path": "nowhere", "inception_path": None})
    assert f"error: metrics: expected metrics for images of {SIZE} pixels, got ['ms_ssim']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(["--eval.metrics", "ms_ssim", "--eval.best_metric", "ms_ssim"])
    assert "eval.metrics: expected metrics for images of 32 pixels, got ['ms_ssim']" in capsys.readouterr().err


def test_rounding_is_what_it_says(evaluate, tmp_path):
    assert to_8bit(torch.tensor([-1.0, 0.4999 / 255, 0.7 / 255, 254.9 / 255, 2.0])).tolist() == [0, 0, 1, 255, 255]
    truncated = to_8bit(torch.tensor([-1.0, 0.4999 / 255, 0.7 / 255, 254.9 / 255, 2.0]), "truncate")
    assert truncated.tolist() == [0, 0, 0, 254, 255]
    sides = {}
    for quantize in ("round", "truncate"):
        results = evaluate(
            {"metrics": "[psnr]", "quantize": quantize, "save_npz": "true", "inception_path": None}, quantize
        )
        assert results["quantize"] == quantize and "rfid" not in results
        with np.load(tmp_path / quantize / "run-final" / "reconstructions.npz") as arrays:
            sides[quantize] = arrays["arr_0"].astype(int)
    difference = sides["round"] - sides["truncate"]
    assert set(np.unique(difference)) == {0, 1}


def test_a_download_that_was_cut(tmp_path, monkeypatch):
    """torch.hub does not notice that the server closed too early, and finds the file there the next time."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PK" * 1000)
    with pytest.raises(ValueError, match=f"^inception_path: {file} cannot be used.* delete the file to have it downl"):
        load_inception(None, "inception_path", torch.device("cpu"))


def test_measuring_is_without_tf32(new_accelerator):
    """LPIPS and encoder would have it in their convolutions: other numbers than in training."""
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        measuring_accelerator()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_which_images_were_measured(evaluate, images, model, tmp_path, capsys):
    """Of class folders all, which is said, or those held out; a split that is not there is refused, as in training."""
    plain = {"data.path": images / "train", "data.train_split": "train", "metrics": "[psnr]", "inception_path": None}
    results = evaluate({**plain, "data.eval_split": "validation"})
    assert results["num_samples"] == 24 and results["split"] == "all 24 images (no splits)"
    assert f"images    {images}/train, split: all 24 images (no splits)" in capsys.readouterr().out
    results = evaluate({**plain, "data.eval_split": "validation", "data.holdout_fraction": 0.25, "seed": 3})
    assert results["num_samples"] == 6 and results["split"] == "25% held out of train, seed 3"
    assert evaluate({"metrics": "[psnr]", "inception_path": None})["split"] == "train"
    run_dir = tmp_path / "run"
    shutil.copytree(model, run_dir / "final")
    settings = {"data": {"path": str(images / "train"), "holdout_fraction": 0.25}, "train": {"seed": 3}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "note:" not in capsys.readouterr().out
    evaluate({**plain, "data.eval_split": "validation"}, "own", models=[run_dir / "final"])
    words = "was trained on 75% of these images; --data.holdout_fraction 0.25 --seed 3 measures the others"
    assert f"note: {run_dir / 'final'} {words}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        evaluate({**plain, "data.eval_split": "val"}, "refused")
    assert exit_info.value.code == 2
    assert "data.eval_split: there is no split 'val': " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ references and cache


def test_references(evaluate, images, tmp_path):
    """The cache is used and notices a changed file; its file, and an .npz of the images, are references too."""
    base = evaluate()["rfid"]
    (cached,) = (tmp_path / "cache").glob("rfid-*.npz")
    assert evaluate({"reference": cached}, "statistics")["rfid"] == pytest.approx(base, rel=1e-9)
    metric = FrechetMetric("rfid", None, 2048, "")
    assert read_references(str(cached), [metric], None, 1, "reference").known["rfid"].count == 24

    source = load_eval_images(ImagesConfig(path=str(images), eval_split="train"), 0)
    pixels = np.stack([np.array(eval_rfid.EvalImages(source, SIZE)[i]["pixels"]) for i in range(24)])
    np.savez_compressed(tmp_path / "images.npz", arr_0=pixels.transpose(0, 2, 3, 1))
    both = {"reference": tmp_path / "images.npz", "fid_mode": "[legacy_tensorflow,clean]", "batch_size": 5}
    results = evaluate(both, "arrays")
    assert results["rfid"] == pytest.approx(base, rel=1e-4) and results["reference"] == str(tmp_path / "images.npz")

    with np.load(cached) as arrays:
        content = dict(arrays)
    np.savez(cached, **{**content, "mu": content["mu"] + 1})
    assert evaluate()["rfid"] > base + 1000  # 2048 features, each 1 off: it was read
    copy = shutil.copytree(images, tmp_path / "copy")  # the same images elsewhere
    assert evaluate({"data.path": copy})["rfid"] > base + 1000
    file = next((copy / "train").rglob("*.png"))
    Image.fromarray(255 - np.array(Image.open(file))).save(file)
    assert abs(evaluate({"data.path": copy})["rfid"] - base) < 100  # computed anew
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_unreadable_images_are_left_out_of_both_sides(evaluate, images, tmp_path, caplog):
    data = shutil.copytree(images, tmp_path / "data")
    broken = sorted((data / "train").rglob("*.png"))[4]
    broken.write_bytes(broken.read_bytes()[:50])
    results = evaluate({"data.path": data, "save_npz": "true"})
    assert results["num_samples"] == 23 and str(broken) in caplog.text
    assert not list((tmp_path / "cache").iterdir())  # a reference of some of the images is not kept
    with np.load(tmp_path / "out" / "run-final" / "reconstructions.npz") as arrays:
        assert len(arrays["arr_0"]) == 23 and arrays["arr_0"].std((1, 2, 3)).min() > 0


# ------------------------------------------------------------------------------------------------ other autoencoders


def test_diffusers_models_in_the_same_run(evaluate, model, images, tmp_path):
    from diffusers import AutoencoderKL, AutoencoderRAE

    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIZE,
                       down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                       shift_factor=0.1)  # fmt: skip
    kl.save_pretrained(tmp_path / "kl")
    rae = AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=8, encoder_num_hidden_layers=1,
        encoder_input_size=SIZE, patch_size=8, image_size=SIZE, num_channels=3, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip
    rae.save_pretrained(tmp_path / "rae")
    models = [model, tmp_path / "kl", tmp_path / "rae"]
    results = evaluate({"features": "[inception,encoder]", "save_npz": "true"}, models=models)
    assert [row["kind"] for row in results["rows"]] == ["RAEModel", "AutoencoderKL", "AutoencoderRAE"]
    source = load_eval_images(ImagesConfig(path=str(images), eval_split="train"), 0)
    pixels = eval_rfid.EvalImages(source, SIZE)[0]["pixels"][None].float() / 255
    with torch.no_grad():
        latent = kl.eval().encode(2 * pixels - 1).latent_dist.mode()
        expected = {"kl": (kl.decode(latent).sample + 1) / 2, "rae": rae.eval()(pixels).sample}
    for name, sample in expected.items():
        (file,) = (tmp_path / "out").glob(f"*-{name}/reconstructions.npz")
        with np.load(file) as arrays:
            found = torch.from_numpy(arrays["arr_0"][:1].copy()).permute(0, 3, 1, 2)
        assert (found.int() - to_8bit(sample).int()).abs().max() <= 1
    with pytest.raises(SystemExit):
        evaluate({"image_size": 35}, models=[tmp_path / "kl"])
    for row in results["rows"]:
        assert np.isfinite([row["rfid"], row["rfdd"], row["psnr"]]).all()


def test_what_is_written_replaces_nothing_else(evaluate, model, tmp_path):
    """A row's folder may be that of something else: here the model's own."""
    copy = shutil.copytree(model, tmp_path / "out" / "out-final")
    (tmp_path / "out" / "out" / "final").parent.mkdir()
    shutil.copytree(model, tmp_path / "out" / "out" / "final")
    settings = {"metrics": "[psnr]", "save_images": 2, "inception_path": None}
    evaluate(settings, models=[tmp_path / "out" / "out" / "final"])
    assert (copy / "model.safetensors").exists() and len(list((copy / "images").iterdir())) == 2


def test_reconstructions_that_are_not_finite(evaluate, model, tmp_path, capsys):
    """They are no black images: no number comes out."""
    rae = RAEModel.from_pretrained(model)
    rae.decoder.decoder_pred.bias.data[0] = torch.nan
    rae.save_pretrained(tmp_path / "broken" / "final")
    with pytest.raises(SystemExit) as exit_info:
        evaluate(models=[tmp_path / "broken" / "final"])
    assert exit_info.value.code == 1 and "24 reconstructions are not finite, the first is" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_damaged_cache_is_computed_again(evaluate, tmp_path, caplog):
    base = evaluate()["rfid"]
    (cached,) = (tmp_path / "cache").glob("rfid-*.npz")
    cached.write_bytes(cached.read_bytes()[:1000])
    assert evaluate()["rfid"] == pytest.approx(base, rel=1e-9) and "is damaged" in caplog.text


def test_latents_that_differ_have_other_references():
    """Same weights, other blocks or precision of the pixels' statistics."""
    settings = ({}, {"encoder_add_spatial_mean": True}, {"image_mean": (0.5, 0.5, 0.5)}, {"encoder_layers": (0,)})
    digests = {latents_digest(tiny_rae(**changes)) for changes in settings}
    assert len(digests) == 4
    assert latents_digest(tiny_rae(noise_tau=0.1, encoder_id="x")) in digests  # which change no clean latent


# ------------------------------------------------------------------------------------------------------------ training


def test_rfid_while_training(evaluate, images, inception, tmp_path):
    """The numbers of training are those of eval_rfid.py on the exported model; they change nothing in the weights."""
    data = {"data.path": images, "train.max_steps": "4", "eval.every_steps": "2", "perceptual.weight": "0"}
    plain = {**TINY, **data, "eval.metrics": "[psnr]", "train.output_dir": tmp_path / "plain"}
    measured = {**TINY, **data, "train.output_dir": tmp_path / "measured", "eval.metrics": "[psnr,rfid,rfdd]"}
    measured.update({"eval.inception_path": inception, "eval.save_pairs": "3", "eval.best_metric": "rfid"})
    run_command("train_rae.py", *flags(measured))
    run_command("train_rae.py", *flags(plain))
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("plain", "measured")]
    assert weights[0] == weights[1]
    lines = [line for line in read_metrics(tmp_path / "measured") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 2, 4] and all(line["rfid"] > 0 for line in lines)
    settings = {"data.eval_split": "validation", "features": "[inception,encoder]"}
    results = evaluate(settings, models=[tmp_path / "measured" / "final"])
    for name in ("rfid", "rfdd", "psnr"):
        assert results[name] == pytest.approx(lines[-1][name], rel=1e-4)
    best = min(lines, key=lambda line: line["rfid"])["step"]
    assert ((tmp_path / "measured" / "best" / "model.safetensors").read_bytes() == weights[1]) == (best == 4)
    for side in ("images", "reconstructions"):
        names = [file.name for file in sorted((tmp_path / "measured/pairs/step-00000004-ema" / side).iterdir())]
        assert names == ["00000000.png", "00000002.png", "00000005.png"]
    for picture in ("curves.png", "progress.png"):
        assert (tmp_path / "measured" / picture).stat().st_size > 5000


def test_pictures_cost_no_more_than_they_show(evaluate, monkeypatch):
    """The twelve images are reconstructed once for a single row, and once more for each row after the first."""
    calls, both_sides = [], eval_rfid.both_sides
    monkeypatch.setattr(eval_rfid, "both_sides", lambda *given: calls.append(1) or both_sides(*given))
    settings = {"metrics": "[psnr]", "inception_path": None}
    evaluate(settings, "one")
    assert len(calls) == 1
    evaluate({**settings, "latent_noise": "[0,0.5]"}, "two")
    assert len(calls) == 1 + 3


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data.eval_split": "tset"}, ["data.eval_split", "tset", "train, validation"]),
        ({"model": "FOLDER"}, ["model", "no config.json"]),
        ({"model": "no/such"}, ["model", "'no/such' is no local folder"]),
        ({"model": "WITHOUT_WEIGHTS"}, ["model", "no file named model.safetensors"]),
        ({"model": "CUT"}, ["model", "model.safetensors is damaged or incomplete"]),
        ({"inception_path": "FOLDER/none.pt"}, ["inception_path", "none.pt does not exist", "inception-2015-12-05.pt"]),
        ({"inception_path": "TEXT"}, ["inception_path", "cannot be used"]),
        ({"inception_path": "OTHER_NETWORK"}, ["inception_path", "expected the TorchScript network"]),
        ({"model": "runs/no/final"}, ["model: runs/no/final does not exist"]),
        ({"reference": "FOLDER/none.npz"}, ["reference", "none.npz"]),
        ({"reference": "TEXT"}, ["reference", "cannot be read as .npz"]),
        ({"reference": "NARROW"}, ["reference", "shape (3,)", "(2048,)"]),
        ({"fid_mode": "[legacy_tensorflow,clean]", "reference": "NARROW"}, ["reference", "each of 2 distances"]),
        ({"reference": "GRAY"}, ["reference", "expected uint8 (N, H, W, 3)"]),
        ({"reference": "EMPTY"}, ["reference", "holds other"]),
        ({"metrics": "[fid]"}, ["metrics", "fid"]),
        ({"latent_noise": "[-1]"}, ["latent_noise", "at least 0"]),
        ({"batch_size": 0}, ["batch_size", "positive"]),
        ({"vgg_path": "TEXT"}, ["vgg_path", "nothing unless"]),
        ({"num_samples": 1}, ["num_samples", "at least 2"]),
        ({"reference": "SINGLE"}, ["reference", "holds 1 images"]),
        ({"reference": "NAN"}, ["reference", "not finite"]),
        ({"reference": "SAVED_ARRAY"}, ["reference", "cannot be read as .npz"]),
        ({"data.path": ""}, ["data.path", "expected an image folder"]),
        ({"output_dir": "TEXT"}, ["output_dir", "text"]),
        ({"reference_cache": "TEXT"}, ["reference_cache", "text"]),
        ({"metrics": "[psnr]", "inception_path": "TEXT"}, ["inception_path", "nothing unless"]),
        ({"image_size": 64}, ["64 px (image_size)", "32 px"]),
        (
            {"metrics": "[psnr]", "inception_path": None, "features": "[encoder]"},
            ["features: expected ['inception'] un"],
        ),
        ({"metrics": "[psnr]", "inception_path": None, "fid_mode": "[clean]"}, ["fid_mode", "unless metrics has rfid"]),
        ({"features": "[encoder]", "inception_path": None, "fid_mode": "[clean]"}, ["fid_mode", "features inception"]),
    ],
)
def test_bad_input_is_one_line(evaluate, model, tmp_path, capsys, settings, words):
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    cut = shutil.copytree(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "other.pt"))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.savez(tmp_path / "gray.npz", arr_0=np.zeros((4, 8, 8), np.uint8))
    np.savez(tmp_path / "empty.npz", other=np.zeros(1))
    places = {"FOLDER": "empty", "TEXT": "text", "WITHOUT_WEIGHTS": "bare", "CUT": "cut", "OTHER_NETWORK": "other.pt"}
    np.savez(tmp_path / "single.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.zeros((2048, 2048)))
    np.save(tmp_path / "array.npy", np.zeros(2))
    places.update({"SINGLE": "single.npz", "NAN": "nan.npz", "SAVED_ARRAY": "array.npy"})
    places.update({"NARROW": "narrow.npz", "GRAY": "gray.npz", "EMPTY": "empty.npz"})
    for key, value in settings.items():
        for word, name in places.items():
            value = str(value).replace(word, str(tmp_path / name)) if str(value).startswith(word) else value
        settings = {**settings, key: value}
    models = [settings.pop("model", model)]
    with pytest.raises(SystemExit) as exit_info:
        evaluate(settings, models=models)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_info.value.code == 2
    for word in words:
        assert word in line, line
    assert not (tmp_path / "out" / "results.json").exists()
