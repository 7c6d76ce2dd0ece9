"""What must agree between two results before their figures of generated images compare, as far as it is known.

Figures of the same samples differ by reference statistics, network and resize, number of images, balance of labels,
rounding to 8 bit and compression, precision, sampler, guidance, which weights, and the decoder. A result says all of
them; what cannot be known is "unknown".
"""

import json
from pathlib import Path
from typing import Optional

from cleanfid.downloads_helper import inception_url

from rae_suite.errors import ConfigError
from rae_suite.generation_metrics import GenerationReference
from rae_suite.image_sets import ImageSet

# how samples were drawn, in the words of the results.json that sample_dit.py writes
SAMPLING = (
    "labels", "quantize", "precision", "sampler", "points", "end", "guidance", "weights", "epochs", "decoder", "seed",
)  # fmt: skip
PUBLISHED_SAMPLES, PUBLISHED_REFERENCE_IMAGES = 50_000, 10_000
LOSSLESS = {"npz", "png", "bmp", "tif", "tiff", "ppm"}
# (what is known, a part of its value, what the published figures are)
NOT_AS_PUBLISHED = (
    ("quantize", "round", "truncated to 8 bit"),
    ("labels", "random", "of balanced labels, about 0.1 lower"),
    ("precision", "16", "sampled in float32"),
    ("weights", "raw", "of averaged weights"),
)


def read_sampling(samples: str) -> tuple:
    """(how samples were drawn, the folder whose results.json says so or None).

    The results.json of sample_dit.py lies in the samples' folder or the one above it; another command's is passed over.
    All that it says is given, and "unknown" for what it lacks of SAMPLING. Raises ConfigError, about the setting
    `samples`, for a results.json that cannot be read.
    """
    place = Path(samples).absolute()
    for folder in (place, place.parent) if place.is_dir() else (place.parent,):
        file = folder / "results.json"
        if not file.is_file():
            continue
        try:
            written = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"samples: {file} cannot be read ({error}), expected how samples were drawn") from error
        if isinstance(written, dict) and set(SAMPLING) & set(written):
            said = {key: value for key, value in written.items() if not key.startswith("_")}
            return {**dict.fromkeys(SAMPLING, "unknown"), **said}, folder
    return dict.fromkeys(SAMPLING, "unknown"), None


def what_decides(
    samples: ImageSet, reference: Optional[GenerationReference], sampling: dict, networks: dict, measuring: dict
) -> dict:
    """What decides whether a result compares. `networks`: digests by kind of features; `measuring`: the conventions of
    the metrics that were chosen."""
    named = dict(networks)
    if "inception" in named:
        named["inception"] = f"{Path(inception_url).name} {named['inception']}"
    return {
        "reference": "none" if reference is None else reference.facts,
        "network": named,
        "resize": "legacy_tensorflow, inside the network" if "inception" in named else "none",
        **measuring,
        "num_samples": samples.count,
        "image_size": [samples.height, samples.width],
        "file_format": ", ".join(samples.endings),
        **{key: sampling[key] for key in SAMPLING},
    }


def differences(decides: dict, names: list) -> list:
    """A line for each thing that is known to make the figures `names` others than published ones."""
    lines = []
    if decides["num_samples"] != PUBLISHED_SAMPLES:
        lines.append(f"{decides['num_samples']} samples: published figures are of {PUBLISHED_SAMPLES}")
    if not set(decides["file_format"].split(", ")) <= LOSSLESS:
        lines.append(f"samples in {decides['file_format']}: published figures are of images without lossy compression")
    for key, part, published in NOT_AS_PUBLISHED:
        if part in str(decides[key]).lower():
            lines.append(f"{key} {decides[key]}: published figures are {published}")
    reference = decides["reference"]
    if reference == "none":
        return lines
    for name, source in reference["statistics"].items():
        if name in ("fid", "sfid") and source["num_images"] is not None:  # ADM's file does not say how many
            of = f"{source['num_images']} images of {reference['path']}"
            lines.append(f"{name}: the reference's statistics are of {of}, published figures are of ADM's file")
    if {"precision", "recall"} & set(names) and reference["num_images"] != PUBLISHED_REFERENCE_IMAGES:
        found = f"{reference['num_images']} reference images"
        lines.append(f"precision, recall: {found}, published figures are of {PUBLISHED_REFERENCE_IMAGES}")
    if reference["image_size"] not in ("unknown", decides["image_size"]):
        sizes = ["{} x {}".format(*size) for size in (decides["image_size"], reference["image_size"])]
        lines.append(f"samples are {sizes[0]} pixels, the reference's images {sizes[1]}")
    return lines
