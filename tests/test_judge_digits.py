"""scripts/judge_digits.py: real digits are named as asked for, others are not."""

import numpy as np
import pytest
from conftest import error_line, run_command
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def samples(tmp_path):
    """Writes a folder as sample_dit.py does, of 60 real digits that are said to be `asked`."""
    digits = load_digits()

    def write(asked):
        folder = tmp_path / "samples"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = ["file,label,name"]
        for i in range(60):
            pixels = (digits.images[i] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"images/{i:06d}.png")
            rows.append(f"{i:06d}.png,{asked(digits.target[i])},")
        (folder / "labels.csv").write_text("\n".join(rows) + "\n")
        return folder

    return write


def test_digits_are_judged(samples, tmp_path):
    done = run_command("scripts/judge_digits.py", "--samples", samples(lambda digit: digit), "--at_least", "0.95")
    assert "of 60 drawn digits are named as asked for" in done.stdout
    wrong = samples(lambda digit: (digit + 1) % 10)
    done = run_command("scripts/judge_digits.py", "--samples", wrong, "--at_least", "0.95", check=False)
    assert done.returncode == 1 and "named as asked for, expected at least 95.0%" in error_line(done.stderr)
    assert "0 named 9" not in done.stdout and "1 named 0: " in done.stdout
    done = run_command("scripts/judge_digits.py", "--samples", tmp_path / "none", check=False)
    assert done.returncode == 2 and "expected a folder of sample_dit.py" in error_line(done.stderr)
