"""Say how many drawn digits look like the digit that was asked for, in the eyes of a classifier of real ones.

    python sample_dit.py --model runs/ditdh_digits/final --num_samples 200 --output_dir samples/digits
    python scripts/judge_digits.py --samples samples/digits --at_least 0.95

A support vector machine learns scikit-learn's handwritten digits, pixels alone, on four of five of them; how many of
the others it names rightly is printed beside the result, because no drawn digit can be judged better than a real one.
Exit code 1 when the share is below --at_least. Bad input ends with one line on stderr and exit code 2.
"""

import csv
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository root
from rae_suite.cli import SHARE, parse, setting
from rae_suite.errors import ConfigError, RunError
from rae_suite.launch import run_main
from rae_suite.values import PathText

SIDE, LEVELS = 8, 16  # of scikit-learn's digits: pixels, and the value of white


@dataclass
class JudgeConfig:
    """Settings of judge_digits.py."""

    samples: PathText
    """Folder that sample_dit.py wrote: images/ and labels.csv."""
    at_least: float = setting(0.0, SHARE)
    """Share of the images that must be named as asked for."""


def pixels(image: Image.Image) -> np.ndarray:
    """(64,) in [0, 16], as scikit-learn's digits are."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel() * (LEVELS / 255)


def read_samples(folder: Path) -> tuple[np.ndarray, list]:
    """Pixels (N, 64) of drawn images and the digit that each was asked to be. Raises ConfigError."""
    try:
        rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
        asked = [int(row["name"] or row["label"]) for row in rows]
        drawn = [pixels(Image.open(folder / "images" / row["file"])) for row in rows]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"samples: {folder} cannot be read ({type(error).__name__} {error}), expected a folder of sample_dit.py "
            "with images of the classes 0 to 9"
        ) from error
    if not asked:
        raise ConfigError(f"samples: {folder}/labels.csv names no images, expected at least one")
    return np.stack(drawn), asked


def main(argv: Optional[list] = None) -> None:
    config = parse(JudgeConfig, "judge_digits.py", __doc__.split("\n")[0], argv)
    drawn, asked = read_samples(Path(config.samples))

    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    digits = load_digits()
    learned, held_out, names, right = train_test_split(
        digits.data, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    judge = SVC(gamma=0.001).fit(learned, names)
    share = float((judge.predict(drawn) == asked).mean())
    print(f"{judge.score(held_out, right):.1%} of {len(right)} real digits that the classifier has not seen")
    print(f"{share:.1%} of {len(asked)} drawn digits are named as asked for")
    wrong = Counter((a, int(p)) for a, p in zip(asked, judge.predict(drawn), strict=True) if a != p)
    for (digit, named), count in wrong.most_common(5):
        print(f"  {digit} named {named}: {count}")
    if share < config.at_least:
        raise RunError(f"{share:.1%} are named as asked for, expected at least {config.at_least:.1%}")


if __name__ == "__main__":
    run_main(main)
