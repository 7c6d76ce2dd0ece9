"""rae_latents.py: a copy of the file, in an empty folder, loads a model and draws the picture."""

import shutil
import subprocess

import numpy as np
from conftest import ROOT, command, tiny_rae
from PIL import Image


def test_a_copy_of_the_file_draws_the_picture(images, tmp_path):
    """All cells run on three images of a model with code beside it; the printed PSNR is that of this repository's."""
    tiny_rae().save_pretrained(tmp_path / "model")
    copy = shutil.copy(ROOT / "examples" / "rae_latents.py", tmp_path)  # finds no module of this repository there
    files = sorted((images / "train").rglob("*.png"))[:3]
    line = command(copy, tmp_path / "model", *files)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "images 32 px, latents 16 x 4 x 4" in lines and lines[-1] == "picture: rae_latents.png"
    [psnr] = [line for line in lines if line.startswith("PSNR ")]
    assert psnr.count(",") == 2 and psnr.endswith(" dB") and "nan" not in psnr
    picture = np.asarray(Image.open(tmp_path / "rae_latents.png").convert("RGB"))
    assert picture.shape[0] > picture.shape[1] * 0.8 and picture.std() > 10  # five rows of three
