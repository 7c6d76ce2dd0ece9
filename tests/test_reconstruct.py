"""reconstruct.py: files and their names, crop and padding, latents, what is skipped and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, run_command, tiny_rae
from PIL import Image
from safetensors.torch import load_file

from modeling_rae import RAEModel
from rae_suite.images import center_crop
from rae_suite.launch import run_main
from rae_suite.metrics import to_8bit
from rae_suite.model_loading import load_autoencoder
from scripts import reconstruct
from scripts.reconstruct import GREY, distinct

SIZE = 32  # pixels


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An RAE with statistics, whose untrained decoder gives every image another reconstruction."""
    rae = tiny_rae(use_latent_stats=True)
    rae.set_latent_stats(torch.full((16, 4, 4), 0.5), torch.full((16, 4, 4), 4.0))
    rae.encoder.embeddings.patch_embeddings.projection.weight.data *= 10
    rae.decoder.decoder_pred.weight.data *= 3  # contrast, some of it out of range
    folder = tmp_path_factory.mktemp("model") / "final"
    rae.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, monkeypatch, capsys):
    """Run the command line in this process; gives what it printed."""

    def run_command_line(*inputs, **settings) -> str:
        settings = {"model": model, "data.num_workers": 0, **settings}
        arguments = ["--input", *map(str, inputs), *flags(settings)]
        monkeypatch.setattr("sys.argv", ["reconstruct.py", *arguments])
        capsys.readouterr()
        run_main(reconstruct.main)
        return capsys.readouterr().out

    return run_command_line


def refused(run, capsys, *inputs, **settings) -> str:
    """The one line with which a command line ends, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        run(*inputs, **settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit_.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def names(folder: Path, suffix: str = ".png") -> set:
    return {str(file.relative_to(folder)) for file in folder.rglob(f"*{suffix}")}


def read_list(output: Path) -> list:
    with (output / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_picture(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return np.array(image)


@torch.no_grad()
def expected(autoencoder, square: Image.Image) -> tuple:
    """(reconstruction uint8 (S, S, 3), latent (C, h, w)) of a square picture."""
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
    latent = autoencoder.encode(pixels)
    return to_8bit(autoencoder.decode(latent))[0].permute(1, 2, 0).numpy(), latent[0]


def close(picture: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are the same but for rounding; a batch of another size changes the last digits."""
    return picture.shape == other.shape and np.abs(picture.astype(int) - other).max() <= 1


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Sub-folders, two images of one stem, wide and high ones, a broken one."""
    folder = tmp_path / "photos"
    for i, (name, size) in enumerate(
        {
            "top.png": (SIZE, SIZE),
            "day 1/beach.jpg": (90, 45),
            "day 1/beach.png": (45, 90),
            "day 1/night/beach.png": (40, 40),
            "day 2/sky.v1.webp": (200, 131),
        }.items()
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(*size, seed=i).save(folder / name)
    (folder / "day 2/broken.png").write_bytes(b"no image")
    return folder


def test_two_processes(model, photos, tmp_path):
    """The real command on two processes: every readable image once, under its name, with its latent."""
    output = tmp_path / "out"
    single = tmp_path / "top.png"  # of the same name as one in the folder
    photo(50, 50, seed=9).save(single)
    settings = {"model": model, "output": output, "batch_size": 2, "data.num_workers": 1}
    done = run_command(
        "scripts/reconstruct.py", "--input", photos, single, single, "--save_latents", *flags(settings),
        "--json", output / "table.json",
        processes=2,
    )  # fmt: skip

    files = {
        "top": photos / "top.png",
        "top_2": single,
        "day 1/beach": photos / "day 1/beach.jpg",
        "day 1/beach_2": photos / "day 1/beach.png",
        "day 1/night/beach": photos / "day 1/night/beach.png",
        "day 2/sky.v1": photos / "day 2/sky.v1.webp",
    }
    assert names(output / "reconstructions") == {f"{name}.png" for name in files}
    assert names(output / "latents", "") - {"day 1", "day 1/night", "day 2"} == {f"{n}.safetensors" for n in files}
    assert {path.name for path in output.iterdir()} == {
        "reconstructions", "latents", "grid.png", "images.csv", "table.json",
    }  # fmt: skip
    autoencoder, rows = load_autoencoder(str(model)), {row["name"]: row for row in read_list(output)}
    assert rows.keys() == files.keys()
    for name, file in files.items():
        square = center_crop(Image.open(file).convert("RGB"), SIZE)
        picture, latent = expected(autoencoder, square)
        found = read_picture(output / "reconstructions" / f"{name}.png")
        assert close(found, picture), name
        saved = load_file(output / "latents" / f"{name}.safetensors")
        torch.testing.assert_close(saved, {"latent": latent}, rtol=1e-4, atol=1e-5)
        error = np.square((found.astype(float) - np.array(square)) / 255).mean()
        assert float(rows[name]["psnr"]) == pytest.approx(-10 * np.log10(error), abs=1e-3)
        assert rows[name]["input"] == str(file)

    table = json.loads((output / "table.json").read_text())
    assert (table["num_images"], table["num_unreadable"], table["image_size"]) == (6, 1, SIZE)
    assert table["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows.values()]), abs=1e-3)
    assert "6, 1 unreadable skipped" in done.stdout and f"{table['psnr']:.2f} dB" in done.stdout
    assert done.stdout.count("mean PSNR") == 1 and "day 2/broken.png" in done.stderr
    assert Image.open(output / "grid.png").size == (6 * 100 + 4, 2 * 100 + 4)


def test_padded(run, model, photos, tmp_path):
    """Nothing of an image is lost, its shape stays, and the grey beside it is neither written nor measured."""
    output = tmp_path / "out"
    run(photos, output=output, resize="pad")
    wide = read_picture(output / "reconstructions" / "day 1/beach.png")
    high = read_picture(output / "reconstructions" / "day 1/beach_2.png")
    square = read_picture(output / "reconstructions" / "top.png")
    assert (wide.shape, high.shape, square.shape) == ((16, 32, 3), (32, 16, 3), (32, 32, 3))

    small = Image.open(photos / "day 1/beach.jpg").resize((32, 16), Image.Resampling.BICUBIC)
    padded = np.full((32, 32, 3), GREY, dtype=np.uint8)
    padded[8:24] = np.array(small)
    picture, _ = expected(load_autoencoder(str(model)), Image.fromarray(padded))
    assert close(wide, picture[8:24])
    error = np.square((wide.astype(float) - np.array(small)) / 255).mean()
    row = next(row for row in read_list(output) if row["name"] == "day 1/beach")
    assert float(row["psnr"]) == pytest.approx(-10 * np.log10(error), abs=1e-3)
    grid = read_picture(output / "grid.png")
    assert grid.shape == (2 * 100 + 4, 5 * 100 + 4, 3)
    tiles = grid[4:, 4:].reshape(2, 100, 5, 100, 3)[:, :96:3, :, :96:3]  # (row, 32, column, 32, 3), enlarged 3 times
    shown = [row["name"] for row in read_list(output)].index("day 1/beach")
    assert np.array_equal(tiles[0, :, shown], padded)
    assert np.array_equal(tiles[1, 8:24, shown], wide) and (tiles[1, :8, shown] == GREY).all()


def test_thin_image(run, tmp_path):
    """The shorter side of a resized image is at least one pixel."""
    photo(330, 4, seed=0).save(tmp_path / "thin.png")
    run(tmp_path / "thin.png", output=tmp_path / "out", resize="pad")
    assert read_picture(tmp_path / "out" / "reconstructions" / "thin.png").shape == (1, 32, 3)


def test_single_image_and_second_run(run, photos, tmp_path):
    """One image in, one out; a later run overwrites what it names and leaves the rest."""
    output = tmp_path / "out"
    stdout = run(photos / "day 1/beach.jpg", output=output)
    assert names(output / "reconstructions") == {"beach.png"} and not (output / "latents").exists()
    assert Image.open(output / "grid.png").size == (104, 204)
    assert str(output / "reconstructions") in stdout and "latents" not in stdout
    old = read_picture(output / "reconstructions" / "beach.png")
    run(photos / "day 1/beach.png", photos / "top.png", output=output)
    assert names(output / "reconstructions") == {"beach.png", "top.png"}
    assert not np.array_equal(read_picture(output / "reconstructions" / "beach.png"), old)
    assert [row["name"] for row in read_list(output)] == ["beach", "top"]
    run(photos / "day 1/beach.jpg", output=output)
    assert np.array_equal(read_picture(output / "reconstructions" / "beach.png"), old)
    assert names(output / "reconstructions") == {"beach.png", "top.png"}


def test_several_folders_and_batches(run, images, tmp_path):
    """Folders keep their own names beside each other; the batch size does not matter, the grid is bounded."""
    folders = images / "train", images / "validation"
    run(*folders, output=tmp_path / "one", batch_size=1, grid_images=3)
    run(*folders, output=tmp_path / "seven", batch_size=7)
    found = names(tmp_path / "one" / "reconstructions")
    assert found == {str(file.relative_to(images)) for folder in folders for file in folder.rglob("*.png")}
    assert found == names(tmp_path / "seven" / "reconstructions") and len(found) == 32
    pictures = {}
    for name in found:
        pictures[name] = read_picture(tmp_path / "one" / "reconstructions" / name)
        assert close(pictures[name], read_picture(tmp_path / "seven" / "reconstructions" / name))
    different = {picture.tobytes() for picture in pictures.values()}
    assert len(different) == 32  # no image in another's place
    assert Image.open(tmp_path / "one" / "grid.png").size == (3 * 100 + 4, 204)
    assert Image.open(tmp_path / "seven" / "grid.png").size == (8 * 100 + 4, 204)


def test_any_name(run, tmp_path, monkeypatch):
    """Names on the command line are text, whatever they look like to YAML."""
    monkeypatch.chdir(tmp_path)
    found = {"3", "1e3", "null", "a, b.png", "it's: #1.png", "snö 😀.png"}
    for i, name in enumerate(sorted(found)):
        photo(SIZE, SIZE, seed=i).save(name, format="PNG")
    Path("12").mkdir()
    photo(SIZE, SIZE, seed=9).save("12/x.png")
    run(*sorted(found), "12", output=tmp_path / "out")
    expected_names = {f"{name.removesuffix('.png')}.png" for name in found} | {"x.png"}
    assert names(tmp_path / "out" / "reconstructions") == expected_names


def test_distinct_names():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a_2", "a_3"]
    assert distinct(["a", "a", "a_2"]) == ["a", "a_3", "a_2"]  # an image's own name is not given to another
    assert distinct(["x/A", "x/a", "a"]) == ["x/A", "x/a_2", "a"]


def test_kl(run, photos, tmp_path, capsys):
    """diffusers' AutoencoderKL takes the size that is asked for, if its stages can halve it."""
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kl = AutoencoderKL(block_out_channels=(32, 32), latent_channels=2, **blocks)
    kl.save_pretrained(tmp_path / "kl")
    settings = {"model": tmp_path / "kl", "output": tmp_path / "out"}
    run(photos, image_size=48, save_latents="true", **settings)
    assert read_picture(tmp_path / "out" / "reconstructions" / "top.png").shape == (48, 48, 3)
    assert load_file(tmp_path / "out" / "latents" / "top.safetensors")["latent"].shape == (2, 24, 24)
    assert "image_size: expected a multiple of 2" in refused(run, capsys, photos, image_size=49, **settings)


def test_not_finite_is_refused(run, model, photos, tmp_path, capsys):
    rae = RAEModel.from_pretrained(model)
    rae.decoder.decoder_pred.bias.data[0] = torch.nan
    rae.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        run(photos, model=tmp_path / "model", output=tmp_path / "out")
    assert exit_.value.code == 1 and "error: reconstructions are not finite, among top" in capsys.readouterr().err


def test_bad_input(run, model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = photos / "day 2/broken.png"
    shutil.copy(broken, photos / "broken_2.png")
    output = tmp_path / "out"
    for inputs, settings, message in (
        ([photos / "nothing.png"], {}, "input: expected image files and folders that exist"),
        ([tmp_path / "empty"], {}, f"input: {tmp_path / 'empty'} holds no image files"),
        ([broken], {}, "input: none of 1 images can be read"),
        ([photos], {"data.max_unreadable": 1}, "data.max_unreadable: 2 images cannot be read, expected at most 1"),
        ([photos], {"output": photos / "out"}, "output: expected a folder apart from the input"),
        ([photos], {"output": photos}, "output: expected a folder apart from the input"),
        ([photos / "top.png"], {"output": photos}, "output: expected a folder apart from the input"),
        ([photos], {"output": photos / "top.png" / "out"}, "output: "),
        ([photos], {"model": tmp_path / "none"}, "model: "),
        ([photos], {"model": photos}, "has no config.json"),
        ([photos], {"image_size": 64}, "image_size: expected 32 px for"),
        ([photos], {"resize": "squash"}, "resize"),
        ([photos], {"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ([photos], {"grid_images": 33}, "grid_images: expected a number from 1 to 32, got 33"),
        ([], {}, "input"),
    ):
        assert message in refused(run, capsys, *inputs, **{"output": output, **settings}), message
    assert names(photos) == {"top.png", "day 1/beach.png", "day 1/night/beach.png", "day 2/broken.png", "broken_2.png"}


def test_rectangles_are_kept_whole(tmp_path):
    """Against cropping: a wide image keeps what a crop cuts off, and a square is computed as ever."""
    model, folder = tmp_path / "model", tmp_path / "images"
    tiny_rae().save_pretrained(model)
    folder.mkdir()
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :16, 0] = wide[:, 48:, 1] = 255  # what a crop does not see
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "square.png")
    Image.new("RGB", (40, 90), "blue").save(folder / "tall.png")
    results = {}
    for resize in ("crop", "keep"):
        out = tmp_path / resize
        run_command("scripts/reconstruct.py", "--model", model, "--input", folder, "--output", out, "--resize", resize,
                    "--save_latents", "--data.num_workers", 0)  # fmt: skip
        results[resize] = {
            name: np.asarray(Image.open(out / f"reconstructions/{name}.png")) for name in ("wide", "square", "tall")
        }
        assert (out / "grid.png").is_file()
    assert {name: image.shape for name, image in results["keep"].items()} == {
        "wide": (32, 64, 3), "square": (32, 32, 3), "tall": (72, 32, 3)}  # fmt: skip
    assert np.array_equal(results["crop"]["square"], results["keep"]["square"])
    latent = load_file(tmp_path / "keep/latents/wide.safetensors")["latent"]
    assert latent.shape == (16, 4, 8)
    ends = [latent[:, :, side].mean(1) for side in (0, -1)]  # of the red and the green end
    assert not torch.allclose(*ends, atol=1e-3)
