"""compute_latent_stats.py: exact numbers, the model folder that they are written into, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate import Accelerator
from conftest import ROOT, flags, run_command
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from safetensors.torch import load_file

from modeling_rae import RAEModel
from rae_suite.cli import parse
from rae_suite.files import read_tensors
from rae_suite.images import center_crop
from rae_suite.latent_stats import LatentReader
from rae_suite.launch import INTERRUPTED, run_main
from rae_suite.rae_networks import build_rae, build_rae_config
from rae_suite.settings_rae import parse_config
from rae_suite.splits import load_splits
from scripts import compute_latent_stats
from scripts.compute_latent_stats import LatentStatsConfig, check, load_images

SIZE = 32  # pixels


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A folder as a published encoder's, whose tokens differ well between images."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=SIZE, num_register_tokens=1
    )
    network = transformers.Dinov2WithRegistersModel(config)
    network.embeddings.patch_embeddings.projection.weight.data *= 10
    network.save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    return folder


def small_rae(encoder: Path, **changes) -> RAEModel:
    torch.manual_seed(1)
    decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    sizes = dict(encoder_input_size=SIZE, decoder_intermediate_size=64, decoder_patch_size=8)
    return RAEModel.from_encoder(str(encoder), **decoder, **sizes, noise_tau=0.5, **changes).eval()


@pytest.fixture
def model(encoder, tmp_path) -> Path:
    folder = tmp_path / "run" / "final"
    small_rae(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixels(images) -> torch.Tensor:
    """The training images, centre-cropped, (24, 3, 32, 32) in [0, 1]."""
    files = sorted((images / "train").glob("*/*.png"))
    crops = [np.array(center_crop(Image.open(file).convert("RGB"), SIZE)) for file in files]
    assert len(crops) == 24
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def direct_stats(model: RAEModel, pixels: torch.Tensor, flip: bool = True) -> dict:
    """Mean and population variance of all latents at once, in float64."""
    views = torch.cat([pixels, pixels.flip(3)]) if flip else pixels
    latents = model.encode(views, normalize=False).latent.double()
    return {"mean": latents.mean(0), "var": latents.var(0, correction=0)}


def assert_same_stats(found: dict, expected: dict) -> None:
    assert expected["var"].min() > 1e-3  # a wrong image or a missing mirror image would show
    for name in ("mean", "var"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-6)


def model_stats(folder: Path) -> dict:
    tensors = load_file(folder / "model.safetensors")
    return {"mean": tensors["latent_mean"], "var": tensors["latent_var"]}


@pytest.fixture
def run(images, monkeypatch):
    """Run the command line in this process."""

    def run_command_line(*args, **settings) -> None:
        settings = {"data.path": images, "data.num_workers": 0, **settings}
        arguments = [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]
        monkeypatch.setattr("sys.argv", ["compute_latent_stats.py", *map(str, args), *arguments])
        run_main(compute_latent_stats.main)

    return run_command_line


def refused(run, capsys, code: int, *args, **settings) -> str:
    """The one line with which a command line ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*args, **settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit_.value.code == code and len(lines) == 1, lines
    return lines[0]


def folder_bytes(folder: Path) -> dict:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------ numbers


def test_two_processes(images, model, pixels, tmp_path):
    """The real command, on two processes, with a batch that does not divide: exact, in the folder and in the file."""
    before = RAEModel.from_pretrained(model)
    settings = {"model": model, "data.path": images, "data.num_workers": 1, "batch_size": 5}
    outputs = {"stats_file": tmp_path / "stats.pt", "json": tmp_path / "table.json"}
    done = run_command(
        "scripts/compute_latent_stats.py", *flags({**settings, **outputs}),
        processes=2,
    )  # fmt: skip
    expected = direct_stats(before, pixels)
    assert_same_stats(read_tensors(outputs["stats_file"], "stats_file"), expected)
    assert_same_stats(model_stats(model), expected)

    table = json.loads(outputs["json"].read_text())
    assert table["split"] == "train" and "split              train" in done.stdout
    assert table["num_images"] == 24 and table["num_unreadable"] == 0 and table["latent_shape"] == [16, 4, 4]
    assert table["std_min"] == pytest.approx(expected["var"].min().sqrt().item(), rel=1e-5)
    assert table["mean_max"] == pytest.approx(expected["mean"].max().item(), rel=1e-5)
    assert table["normalised"]["num_images"] == 24 and table["num_constant"] == 0
    assert abs(table["normalised"]["mean"]) < 1e-5 and table["normalised"]["mean_rms"] < 1e-5
    assert abs(table["normalised"]["std"] - 1) < 1e-2
    assert "24, each with its mirror image" in done.stdout and str(model) in done.stdout
    assert sorted(file.name for file in model.parent.iterdir()) == ["final"]  # nothing left beside


def read_config(images: Path, model: Path, **settings) -> LatentStatsConfig:
    settings = {"model": model, "data.path": images, "data.num_workers": 0, **settings}
    return parse(LatentStatsConfig, "compute_latent_stats.py", "", flags(settings), check=check)


def read_stats(config, rae):
    reader = LatentReader(load_images(config), config.data, config.batch_size, config.flip, Accelerator())
    return reader.stats(rae, config.num_samples)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("flip", [True, False])
def test_batch_size_does_not_matter(images, model, pixels, batch_size, flip):
    config = read_config(images, model, batch_size=batch_size, flip=flip)
    rae = RAEModel.from_pretrained(model)
    stats, num_images = read_stats(config, rae)
    assert num_images == 24
    assert_same_stats(stats, direct_stats(rae, pixels, flip))


def test_num_samples_are_spread(images, model, pixels):
    config = read_config(images, model, num_samples=6)
    rae = RAEModel.from_pretrained(model)
    stats, num_images = read_stats(config, rae)
    assert num_images == 6
    assert_same_stats(stats, direct_stats(rae, pixels[::4]))


# ------------------------------------------------------------------------------------------------------- model folder


def test_folder_stays_complete(run, encoder, pixels, tmp_path, capsys):
    """bfloat16 weights without the encoder, and other files: all stays, statistics come in, `encode` uses them."""
    folder = tmp_path / "final"
    small_rae(encoder).to(torch.bfloat16).save_pretrained(folder, include_encoder=False)
    (folder / "README.md").write_text("a card")
    shutil.copy(encoder / "preprocessor_config.json", folder)
    old_files, old = folder_bytes(folder), RAEModel.from_pretrained(folder, dtype=torch.float32)
    run(model=folder)

    files = folder_bytes(folder)
    assert files.keys() == old_files.keys()
    assert all(files[name] == old_files[name] for name in files if name not in ("config.json", "model.safetensors"))
    config, old_config = json.loads(files["config.json"]), json.loads(old_files["config.json"])
    for part in (config, old_config):
        del part["encoder_config"]["dtype"]  # transformers notes what it loaded the encoder in
    assert config == {**old_config, "use_latent_stats": True} and not config["encoder_bundled"]
    tensors = load_file(folder / "model.safetensors")
    stats = {name: tensors.pop(f"latent_{name}") for name in ("mean", "var")}
    assert all(value.dtype == torch.float32 for value in stats.values())
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    state = old.state_dict()
    assert all(torch.equal(value.float(), state[name]) for name, value in tensors.items())
    assert tensors.keys() == {name for name in state if not name.startswith("encoder.")}
    assert_same_stats(stats, direct_stats(old, pixels))

    new = RAEModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        latents = new.encode(torch.cat([pixels, pixels.flip(3)])).latent
        assert latents.mean(0).abs().max() < 1e-4
        assert (latents.std(0, correction=0) - 1).abs().max() < 1e-2  # the formula's 1e-5
        old_sample = old.decode(old.encode(pixels).latent).sample
        torch.testing.assert_close(new.decode(new.encode(pixels).latent).sample, old_sample, rtol=1e-4, atol=1e-4)

    run(model=folder)  # from latents without the statistics that are there now
    assert_same_stats(model_stats(folder), direct_stats(old, pixels))
    assert "24, each with its mirror image" in capsys.readouterr().out


def test_statistics_without_a_mean_get_one(run, encoder, pixels, tmp_path):
    """A model whose statistics have no mean, as the published ones of DINOv2-B: both are computed anew."""
    rae = small_rae(encoder, use_latent_stats=True)
    rae.set_latent_stats(None, torch.full((16, 1, 1), 0.5))
    rae.save_pretrained(tmp_path / "final")
    run(model=tmp_path / "final")
    assert_same_stats(model_stats(tmp_path / "final"), direct_stats(rae, pixels))
    assert RAEModel.from_pretrained(tmp_path / "final").config.latent_stats_have_mean


def test_output_folder(run, model, tmp_path, capsys):
    """Another folder takes the model; the old one, and another model's folder, stay as they are."""
    before = folder_bytes(model)
    run(model=model, output=tmp_path / "new" / "normalised")
    assert folder_bytes(model) == before
    assert RAEModel.from_pretrained(tmp_path / "new" / "normalised").config.use_latent_stats
    assert "new folder" in refused(run, capsys, 2, model=model, output=tmp_path / "new" / "normalised")
    assert "outside of the model" in refused(run, capsys, 2, model=model, output=model / "normalised")


def test_hub_model(run, encoder, tmp_path, capsys):
    """A model in the Hub's cache needs an output folder, and takes all its files there."""
    repository = Path(HF_HUB_CACHE) / "models--user--small-rae"
    snapshot = repository / "snapshots" / ("0" * 40)
    small_rae(encoder).save_pretrained(snapshot)
    (snapshot / "README.md").write_text("a card")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert "output: expected a new folder" in refused(run, capsys, 2, model="user/small-rae")
    run(model="user/small-rae", output=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").exists() and not (tmp_path / "out" / "README.md").is_symlink()
    assert RAEModel.from_pretrained(tmp_path / "out").config.use_latent_stats
    assert not RAEModel.from_pretrained(snapshot).config.use_latent_stats


def test_hub_cache_of_links(run, encoder, tmp_path):
    """As the Hub's cache is: snapshots/<commit>/ has links into blobs/. By its id and as a folder; files come out."""
    repository = Path(HF_HUB_CACHE) / "models--user--linked-rae"
    snapshot = repository / "snapshots" / ("1" * 40)
    small_rae(encoder).save_pretrained(snapshot)
    (snapshot / "README.md").write_text("a card")
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    for number, model in enumerate(("user/linked-rae", snapshot)):
        output = tmp_path / f"out-{number}"
        run(model=model, output=output)
        assert (output / "README.md").read_text() == "a card"
        assert not any(path.is_symlink() for path in output.iterdir())
        assert RAEModel.from_pretrained(output).config.use_latent_stats


def test_links_out_of_the_folder_are_refused(run, model, tmp_path, capsys):
    """Whatever is behind them: it would be copied. Nothing is written; a link within the folder becomes a file."""
    secret, disguise = tmp_path / "home/secret", tmp_path / "cache/snapshots/x"
    secret.parent.mkdir()
    secret.write_text("a key")
    (model / "inner.md").symlink_to("config.json")
    shutil.copytree(model, disguise, symlinks=True)
    (disguise.parents[1] / "blobs").symlink_to(secret.parent)  # looks like the Hub's cache
    (disguise / "key").symlink_to("../../blobs/secret")
    cases = {"absolute": secret, "relative": "../../home/secret", "folder": secret.parent, "nothing": tmp_path / "none",
             "up": ".."}  # fmt: skip
    for name, target in cases.items():
        (model / "deeper").mkdir(exist_ok=True)
        for link in (model / name, model / "deeper" / name):
            link.symlink_to(target)
            for output in (None, tmp_path / "out"):
                line = refused(run, capsys, 2, model=model, output=output)
                assert line.startswith(f"error: model: {link} is a link to /") and line.endswith(
                    "model's folder itself"
                )
            link.unlink()
    line = refused(run, capsys, 2, model=disguise, output=tmp_path / "out")
    assert f"model: {disguise}/key is a link to {secret}" in line
    assert not (tmp_path / "out").exists() and not RAEModel.from_pretrained(model).config.use_latent_stats
    run(model=model, output=tmp_path / "out")
    assert (tmp_path / "out/inner.md").is_file() and not (tmp_path / "out/inner.md").is_symlink()


def test_interrupted_run_leaves_the_old_folder(run, model, monkeypatch):
    before = folder_bytes(model)

    def interrupted(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RAEModel, "save_pretrained", interrupted)
        with pytest.raises(SystemExit, match=str(INTERRUPTED)):
            run(model=model)
    assert folder_bytes(model) == before
    run(model=model)
    assert model_stats(model)["var"].min() > 0
    assert [file.name for file in model.parent.iterdir()] == ["final"]


@pytest.mark.parametrize(
    "name, change",
    [
        ("mean", lambda mean: mean + 3),
        ("mean", lambda mean: mean.roll(1, dims=0)),
        ("var", lambda var: 100 * var),
        ("var", lambda var: -var),
    ],
)
def test_nonsense_replaces_nothing(run, model, tmp_path, monkeypatch, capsys, name, change):
    """Statistics that do not normalise what is read again end the run, before they take a place."""
    before, right = folder_bytes(model), LatentReader.stats

    def wrong(*arguments):
        stats, num_images = right(*arguments)
        return {**stats, name: change(stats[name])}, num_images

    monkeypatch.setattr(LatentReader, "stats", wrong)
    message = refused(run, capsys, 1, model=model, stats_file=tmp_path / "stats.pt")
    assert "expected about 0 and 1" in message
    assert folder_bytes(model) == before and not (tmp_path / "stats.pt").exists()


def test_equal_images_are_refused(run, model, images, tmp_path, capsys):
    """Latents that never change cannot be normalised to standard deviation 1: that is said, and nothing written."""
    (tmp_path / "same").mkdir()
    file = next((images / "train").glob("*/*.png"))
    for i in range(3):
        Image.open(file).convert("L").convert("RGB").resize((SIZE, SIZE)).save(tmp_path / "same" / f"{i}.png")
    before = folder_bytes(model)
    settings = {"model": model, "data.path": tmp_path / "same", "flip": False}
    assert "standard deviation" in refused(run, capsys, 1, **settings)
    assert folder_bytes(model) == before


def test_not_finite_is_refused(run, encoder, tmp_path, capsys):
    rae = small_rae(encoder)
    rae.encoder.embeddings.patch_embeddings.projection.bias.data[0] = torch.inf
    rae.save_pretrained(tmp_path / "final")
    before = folder_bytes(tmp_path / "final")
    assert "not finite" in refused(run, capsys, 1, model=tmp_path / "final")
    assert folder_bytes(tmp_path / "final") == before


# ---------------------------------------------------------------------------------------------------- before training


def test_statistics_for_training(run, images, tmp_path):
    """From a training config with a random encoder, into a file that the training with that config accepts: its own
    encoder's latents come out normalised."""
    mine = tmp_path / "mine.yaml"
    settings = {"noise_tau": 0.8, "decoder_num_hidden_layers": 2, "latent_stats": str(tmp_path / "later.safetensors")}
    mine.write_text(yaml.dump({"model": settings}))  # the file that is being made
    files = [ROOT / "configs/digits_tiny.yaml", mine]
    run("--train_config", *files, stats_file=tmp_path / "later.safetensors")

    config = parse_config([part for file in files for part in ("--config", str(file))])
    rae = build_rae(config.model, config.train.seed, build_rae_config(config.model)).eval()
    config.data.path = str(images)
    source = load_splits(config.data, 0, need_eval=False)[0]
    crops = [np.array(center_crop(source.load(i), 32)) for i in range(len(source))]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        latents = rae.encode(torch.cat([pixels, pixels.flip(3)])).latent
    assert latents.mean(0).abs().max() < 1e-3
    std = (rae.latent_var / (rae.latent_var + 1e-5)).sqrt()
    torch.testing.assert_close(latents.std(0, correction=0), std, rtol=1e-3, atol=1e-3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["later.safetensors", "mine.yaml"]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_unreadable_images(run, model, images, tmp_path, capsys):
    """Within the bound they are counted, above it they end the run; two images at least must be left."""
    shutil.copytree(images / "train", tmp_path / "few")
    files = sorted((tmp_path / "few").glob("*/*.png"))
    files[3].write_bytes(b"no image")
    table = tmp_path / "table.json"
    run(model=model, **{"data.path": tmp_path / "few", "json": table})
    table = json.loads(table.read_text())
    assert (table["num_images"], table["num_unreadable"], table["normalised"]["num_images"]) == (23, 1, 23)
    assert "23, each with its mirror image, 1 unreadable skipped" in capsys.readouterr().out
    settings = {"data.path": tmp_path / "few", "data.max_unreadable": 0}
    assert "data.max_unreadable: 1 images" in refused(run, capsys, 2, model=model, **settings)
    for file in files[1:]:
        file.write_bytes(b"no image")
    settings["data.max_unreadable"] = 100
    assert "1 images of" in refused(run, capsys, 2, model=model, **settings)
    for file in files[1:]:
        file.unlink()
    assert "has 1 training image, expected at least 2" in refused(run, capsys, 2, model=model, **settings)


def test_bad_models(run, model, tmp_path, capsys):
    from diffusers import AutoencoderKL  # slow to import

    assert "model: 'nothing/here' is no local folder" in refused(run, capsys, 2, model="nothing/here")
    assert "has no config.json" in refused(run, capsys, 2, model=tmp_path)
    AutoencoderKL(block_out_channels=(32,), latent_channels=2).save_pretrained(tmp_path / "kl")
    assert "is a AutoencoderKL, expected an RAE" in refused(run, capsys, 2, model=tmp_path / "kl")
    (model / "model.safetensors").unlink()
    assert refused(run, capsys, 2, model=model).startswith("error: model: ")


def test_bad_settings(run, model, tmp_path, capsys):
    train_config = ROOT / "configs/digits_tiny.yaml"
    stats_file = tmp_path / "stats.safetensors"
    for settings, message in (
        ({}, "model: expected either it or train_config"),
        ({"model": model, "train_config": train_config}, "model: expected either it or train_config"),
        ({"train_config": train_config}, "stats_file: expected a file, the only result with train_config"),
        ({"train_config": "none.yaml", "stats_file": stats_file}, "train_config: expected YAML files that exist"),
        ({"train_config": train_config, "stats_file": stats_file, "output": tmp_path / "o"}, "output: expected noth"),
        ({"model": model, "stats_file": "stats.npz"}, "stats_file: expected a name that ends in .safetensors or .pt"),
        ({"model": model, "stats_file": model / "config.json" / "s.pt"}, "stats_file: "),
        ({"model": model, "num_samples": 1}, "num_samples: expected at least 2 images, got 1"),
        ({"model": model, "batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"model": model, "data.train_split": "tarin"}, "data.train_split: there is no split 'tarin'"),
        ({"model": model, "data.path": None}, "data.path: found ''"),
        ({"model": model, "data.path": tmp_path / "none"}, "data.path: "),
        ({"model": model, "flop": "true"}, "flop"),
    ):
        assert message in refused(run, capsys, 2, **settings), settings
    assert not stats_file.exists() and not RAEModel.from_pretrained(model).config.use_latent_stats
