"""latent_diffusion.py: what a copy of the file writes, the time shift, what is learnt, what is refused."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flags, run_command, tiny_rae
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from test_data import png, tiff

from examples import latent_diffusion
from examples.latent_diffusion import GRID_ROWS, build_transformer, choose_width, encode_images, list_images, read_image
from rae_suite.splits import scan_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    tiny_rae().save_pretrained(folder)
    return folder


def settings(**changes) -> SimpleNamespace:
    defaults = {"steps": 100, "batch_size": 16, "lr": 1e-2, "num_sampling_steps": 10, "guidance": 1.0, "seed": 0}
    return SimpleNamespace(**{**defaults, **changes})


def test_a_copy_of_the_file_trains_draws_and_saves(model, images, tmp_path):
    copy = shutil.copy(latent_diffusion.__file__, tmp_path)  # from there it finds no module of this repository
    arguments = {"model": model, "data": images / "train", "output": tmp_path / "out", "steps": 4, "batch_size": 8}
    arguments |= {"width": 64, "depth": 1, "num_sampling_steps": 3, "num_workers": 0, "seed": 5}
    lines = run_command(copy, *flags(arguments), "--trust_remote_code").stdout.splitlines()

    grid = tmp_path / "out" / "samples.png"
    assert "24 images of 4 classes, latents (16, 4, 4)" in lines
    assert any(line.startswith("step 4: loss ") for line in lines)
    assert lines[-1].endswith(str(grid))

    rae = tiny_rae().eval()
    latents, _ = encode_images(rae, list_images(images / "train"), batch_size=5, num_workers=0)
    stats = load_file(tmp_path / "out" / "latent_stats.safetensors")
    torch.testing.assert_close(stats["mean"].flatten(), latents.transpose(0, 1).flatten(1).mean(dim=1))
    torch.testing.assert_close(stats["std"].flatten(), latents.transpose(0, 1).flatten(1).std(dim=1))

    # what was saved draws the same picture
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.shift == 0.25  # sqrt(16 * 4 * 4 / 4096)
    labels = torch.arange(4).repeat(GRID_ROWS)
    z = latent_diffusion.sample(transformer, scheduler, labels, settings(num_sampling_steps=3, guidance=2.0, seed=5))
    with torch.no_grad():
        pixels = rae.decode(z * stats["std"] + stats["mean"]).sample.clamp(0, 1)
    drawn = np.asarray(Image.open(grid))
    assert drawn.shape == (GRID_ROWS * 34 + 2, 4 * 34 + 2, 3)
    tiles = drawn[2:, 2:].reshape(GRID_ROWS, 34, 4, 34, 3)[:, :32, :, :32].swapaxes(1, 2).reshape(-1, 32, 32, 3)
    assert np.abs(tiles - pixels.permute(0, 2, 3, 1).numpy() * 255).max() < 1
    assert tiles.std() > 1


@pytest.mark.parametrize("shape", [(64, 8), (768, 16), (1152, 27)])
def test_times_are_shifted_as_by_rae(shape):
    """t' = a*t / (1 + (a-1)*t), a = sqrt(C*h*w / 4096), both in training and in sampling."""
    a = math.sqrt(shape[0] * shape[1] ** 2 / 4096)
    assert latent_diffusion.time_shift(*shape) == a
    scheduler = FlowMatchEulerDiscreteScheduler(shift=latent_diffusion.time_shift(*shape))
    t = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(scheduler.sigmas, a * t / (1 + (a - 1) * t))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas)

    seen = []

    def transformer(z, timestep, labels):
        seen.append(timestep[0])
        return SimpleNamespace(sample=torch.zeros_like(z))

    transformer.config = SimpleNamespace(in_channels=2, sample_size=2, num_embeds_ada_norm=3)
    transformer.device = torch.device("cpu")
    latent_diffusion.sample(transformer, scheduler, torch.tensor([0]), settings(num_sampling_steps=50))
    t = torch.arange(50, 0, -1) / 50
    torch.testing.assert_close(torch.stack(seen), 1000 * a * t / (1 + (a - 1) * t))


def test_sampling_ends_at_the_guided_latent():
    """With the exact velocity (z - target) / sigma of one latent for each label, Euler steps end at it; with guidance,
    at the one as much further from the latent without a label."""
    targets = torch.tensor([1.0, -2.0, 0.5])  # of labels 0 and 1, and of no label

    def transformer(z, timestep, labels):
        return SimpleNamespace(sample=(z - targets[labels].view(-1, 1, 1, 1)) / (timestep.view(-1, 1, 1, 1) / 1000))

    transformer.config = SimpleNamespace(in_channels=2, sample_size=2, num_embeds_ada_norm=2)
    transformer.device = torch.device("cpu")
    for guidance, expected in ((1.0, [1.0, -2.0]), (3.0, [2.0, -7.0])):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
        z = latent_diffusion.sample(transformer, scheduler, torch.tensor([0, 1]), settings(guidance=guidance))
        torch.testing.assert_close(z, torch.tensor(expected).view(2, 1, 1, 1).expand(2, 2, 2, 2), atol=1e-4, rtol=0)


def test_classes_are_learnt(capsys):
    """Latents that are 1 in the one class and -1 in the other, with a little noise: samples have their class's sign."""
    torch.manual_seed(0)
    labels = torch.arange(2).repeat(32)
    latents = (1 - 2.0 * labels).view(-1, 1, 1, 1) + 0.1 * torch.randn(64, 4, 2, 2)
    config = SimpleNamespace(latent_channels=4, latent_size=2)
    transformer = build_transformer(config, num_classes=2, width=64, depth=1)
    assert not transformer(latents, torch.full((64,), 500.0), labels).sample.any()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    latent_diffusion.train(transformer, scheduler, latents, labels, settings(steps=200, lr=3e-3))
    z = latent_diffusion.sample(transformer, scheduler, labels[:16], settings())
    assert (z.mean(dim=(1, 2, 3)) - (1 - 2.0 * labels[:16])).abs().max() < 0.3
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines())
    assert last < first


def test_images_are_those_of_the_suite(tmp_path, capsys):
    """All of them, in subfolders and beside them, without a system's files, and pixel for pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image, deep = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    exif = Image.Exif()
    exif[274] = 6
    made = {
        "alpha.png": lambda file: image.save(file),
        "a/turned.jpg": lambda file: image.convert("RGB").save(file, exif=exif),
        "a/deep.png": lambda file: deep.save(file),
        "a/b/palette.gif": lambda file: image.convert("RGB").quantize(16).save(file),
        "grey.pgm": lambda file: deep.save(file),
        "c/ink.tiff": lambda file: image.convert("RGB").convert("CMYK").save(file),
        "c/new.avif": lambda file: image.convert("RGB").save(file),
        "a/@eaDir/alpha.png/thumb.jpg": lambda file: image.convert("RGB").save(file),
        "a/._turned.jpg": lambda file: file.write_bytes(b"x"),
        "a/x.heic": lambda file: file.write_bytes(b"x"),
        "a/x.txt": lambda file: file.write_bytes(b"x"),
    }
    for name, make in made.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        make(tmp_path / "data" / name)
    found = list_images(tmp_path / "data")
    assert {str(path.relative_to(tmp_path / "data")) for path in found.paths} == set(list(made)[:7])
    assert found.classes == ["data"] and capsys.readouterr().out == "left out: 1 .heic\n"
    suite = scan_folder(str(tmp_path / "data"))
    assert {suite.name(i) for i in range(len(suite))} == {str(path) for path in found.paths}
    for i in range(len(suite)):
        assert np.array_equal(np.asarray(read_image(suite.name(i))), np.asarray(suite.load(i))), suite.name(i)
    for name in ("alpha.png", "grey.pgm"):
        (tmp_path / "data" / name).unlink()
    found = list_images(tmp_path / "data")
    assert found.classes == ["a", "c"] and sorted(found.labels) == [0, 0, 0, 1, 1]


def test_images_that_the_example_cannot_read_are_refused(tmp_path):
    """Rather than read otherwise than by the suite."""
    made = {
        "white_is_zero.tif": tiff(np.zeros((4, 4), np.uint16), True),
        "float.tif": tiff(np.zeros((4, 4), np.float32)),
        "signed.tif": tiff(np.zeros((4, 4), np.int8)),
        "key.png": png(4, 0, [0, 5, 15], 5),
    }
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="^a (TIFF|PNG) (of mode|signed|with a transparent)"):
            read_image(tmp_path / name)


def test_width_follows_from_the_latents():
    assert [choose_width(None, channels) for channels in (16, 64, 384, 768, 1000)] == [128, 128, 384, 768, 1024]
    assert choose_width(1152, 768) == 1152


def test_code_of_a_model_folder_runs_when_it_is_asked_for(model, images, tmp_path, monkeypatch, capsys):
    """Else it is not run, nobody is asked whether it may, and one line says so. Paths in the home folder are found."""
    shutil.copytree(model, tmp_path / "hostile")
    (tmp_path / "hostile/modeling_rae.py").write_text(f"import os\n\nos.mkdir('{tmp_path}/SPRUNG')\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"model": "~/hostile", "data": images / "train", "output": "~/out"}
    monkeypatch.setattr("sys.argv", ["latent_diffusion.py", *flags(settings)])
    with pytest.raises(SystemExit) as exit_:
        latent_diffusion.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and not (tmp_path / "SPRUNG").exists()
    assert error == (
        f"error: --model: {tmp_path}/hostile has code of its own, modeling_rae.py, which is run with "
        "--trust_remote_code only"
    )
    monkeypatch.setattr("sys.argv", ["latent_diffusion.py", "--trust_remote_code", *flags(settings)])
    with pytest.raises(Exception):  # noqa: B017  whatever comes of such a module
        latent_diffusion.main()
    assert (tmp_path / "SPRUNG").exists()


def test_bad_input_ends_in_one_line(model, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "bad.png").write_text("not an image")
    tiny_rae().encoder.save_pretrained(tmp_path / "encoder")
    good = {"model": model, "data": images / "train", "output": tmp_path / "out"}
    cases = (
        ({"data": tmp_path / "nowhere"}, "--data: expected images in"),
        ({"data": tmp_path / "empty"}, "--data: expected images in"),
        ({"data": tmp_path / "broken"}, f"{tmp_path}/broken/a/bad.png"),
        ({"data": images}, f"--data: expected one split, such as {images}/train"),
        ({"model": tmp_path / "nowhere"}, f"--model: expected the folder or Hub id of an RAE, got {tmp_path}/nowhere"),
        ({"model": "user/nowhere"}, "--model: expected the folder or Hub id of an RAE, got user/nowhere"),
        ({"model": tmp_path / "encoder"}, "a model of type dinov2_with_registers"),
        ({"output": tmp_path / "file"}, "--output: expected a folder"),
        ({"width": 100}, "--width: expected a multiple of 64, at least the latents' 16, got 100"),
        ({"width": 0}, "--width: expected a multiple of 64, at least the latents' 16, got 0"),
        ({"steps": 0}, "--steps: expected a number of at least 1, got 0"),
        ({"num_workers": -1}, "--num_workers: expected a number of at least 0, got -1"),
    )
    for change, message in cases:
        monkeypatch.setattr("sys.argv", ["latent_diffusion.py", "--trust_remote_code", *flags({**good, **change})])
        with pytest.raises(SystemExit) as exit_:
            latent_diffusion.main()
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert exit_.value.code == 2 and len(errors) == 1 and message in errors[0], (change, output)
        assert "images of" not in output.out  # nothing was encoded
    with pytest.raises(SystemExit):
        choose_width(64, 768)
