"""Run images through an autoencoder: reconstructions as PNG, a picture of both sides, the latents if asked.

    python scripts/reconstruct.py --model runs/dinov2_b/final --input photo.jpg --output out
    python scripts/reconstruct.py --model runs/dinov2_b/final --input a.png b/ c/ --output out --save_latents
    accelerate launch --multi_gpu scripts/reconstruct.py --model user/my-rae --input folder/ --output out
    python scripts/reconstruct.py --model stabilityai/sd-vae-ft-mse --image_size 512 --input folder/ --output out

The model is an RAE folder or Hub id, a run folder or a checkpoint, diffusers' AutoencoderRAE or AutoencoderKL, or a
decoder file of the published code (with --published.encoder). In --output:

    reconstructions/<name>.png      8-bit, clamped and rounded
    latents/<name>.safetensors      with --save_latents: `latent` (C, h, w), as a diffusion model sees it
    grid.png                        --grid_images of the inputs, spread evenly, over their reconstructions
    images.csv                      every reconstructed input, its <name> and PSNR

<name> is an image's path below its folder without the extension; of several folders each keeps its own name in front, a
file has its bare name. Where two inputs would get one name, the later one gets `_2`. An input given twice counts once.
Files of the same name from an earlier run are overwritten, others stay. Memory does not grow with the number of images,
as each is written as soon as it is there.

Images of another size than the model's S x S are cropped as in evaluation (--resize crop: shorter side to S, middle cut
out), or kept whole and undistorted (--resize pad: longer side to S, the rest grey; the grey is cut off again, so that
reconstructions have their image's shape), or given to the model as rectangles, one at a time (--resize keep: shorter
side to S, longer side to the nearest number that the decoder's patches divide; not every encoder can). An image that
cannot be read is skipped and named; more than --data.max_unreadable of them in a process end the run with exit code 2.

A GPU is used when there is one, in the precision that `accelerate launch --mixed_precision` says, else float32.
"""

import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository root
from rae_suite.autoencoders import DEFAULT_IMAGE_SIZE, Autoencoder
from rae_suite.cli import AT_LEAST_0, POSITIVE, Limit, parse, require, setting
from rae_suite.errors import DataError, RunError, UnreadableImage, renamed_settings
from rae_suite.files import check_folder, check_output_file, give_default_permissions, make_folder, writing
from rae_suite.images import DEFAULT_MEGAPIXELS, center_crop
from rae_suite.launch import (
    data_errors_end_this_process,
    measuring_accelerator,
    progress_bar,
    quiet_transformers,
    run_main,
    to_device,
)
from rae_suite.loaders import UnreadableLog, WorkerLoader, collate, start_worker
from rae_suite.metrics import image_metrics, to_8bit
from rae_suite.model_loading import load_autoencoder
from rae_suite.pictures import reconstruction_grid
from rae_suite.published_rae import PublishedOptions, check_options_used
from rae_suite.settings import FEW_TASKS
from rae_suite.sources import FileSource, ImageSource, evenly_spread, join_paths, shown_name
from rae_suite.splits import scan_folder
from rae_suite.values import PathText

GREY = 128  # value of the padding


@dataclass
class LoadingConfig:
    """How images are read."""

    max_unreadable: int = setting(10, AT_LEAST_0)
    """Unreadable images that a process skips before the run stops."""
    max_megapixels: float = setting(DEFAULT_MEGAPIXELS, POSITIVE)
    """Millions of pixels of the largest image that is read; a larger one counts as unreadable."""
    num_workers: int = setting(4, AT_LEAST_0, FEW_TASKS)
    """Data loading processes, and threads that write files, for each process."""


@dataclass
class ReconstructConfig:
    """Settings of reconstruct.py."""

    model: PathText
    """Folder, checkpoint or Hub id of the autoencoder."""
    input: tuple[PathText, ...]
    """Image files and folders of them (with their sub-folders)."""
    output: PathText
    """Folder of the results; holds no input and lies in none."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    published: PublishedOptions = field(default_factory=PublishedOptions)
    """What a decoder file of the published code, as a model, does not hold."""
    save_latents: bool = False
    """Whether the latents are written too, a file for each image."""
    resize: Literal["crop", "pad", "keep"] = "crop"
    """What the model is given: an image's middle, the whole of it with grey beside, or the whole rectangle, where the
    model takes some."""
    image_size: Optional[int] = setting(None, POSITIVE)
    """Side in pixels, for models that take any size; none: 256."""
    batch_size: int = setting(32, POSITIVE)
    """Images of one batch in each process."""
    grid_images: int = setting(8, Limit(lambda value: 1 <= value <= 32, "a number from 1 to 32"))
    """Images in grid.png, at most 32."""
    data: LoadingConfig = field(default_factory=LoadingConfig)
    """How images are read."""
    json: Optional[PathText] = None
    """File for the printed table, for machines."""


def check(config: ReconstructConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    check_options_used(config.published, [config.model])
    require(len(config.input) > 0, "input", "image files or folders", list(config.input))
    output = Path(config.output).resolve()
    for place in config.input:
        path = Path(place).resolve()
        require(path.exists(), "input", "image files and folders that exist", place)
        apart = not path.is_relative_to(output) and not (path.is_dir() and output.is_relative_to(path))
        require(apart, "output", f"a folder apart from the input {place}", config.output)


# --------------------------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------------------------


def find_inputs(places: tuple) -> tuple[ImageSource, list]:
    """(all images of the files and folders `places`, each once; their names in the output). Raises DataError."""
    several = sum(os.path.isdir(place) for place in places) > 1
    names = {}  # by absolute path
    for place in places:
        if os.path.isdir(place):
            with renamed_settings("data.path", "input"):
                source = scan_folder(place)
            prefix = Path(place).resolve().name if several else ""
            files = (source.file(i) for i in range(len(source)))
            found = {file: os.path.join(prefix, os.path.relpath(file, place)) for file in files}
        else:
            found = {place: os.path.basename(place)}
        for file, name in found.items():
            names.setdefault(os.path.abspath(file), os.path.splitext(name)[0])
    return FileSource("", *join_paths(names)), distinct([shown_name(name) for name in names.values()])


def distinct(names: list) -> list:
    """The names, with _2, _3, ... after repeated ones. Case does not count: some file systems ignore it."""
    given, taken = {name.casefold() for name in names}, set()
    result = []
    for name in names:
        own, number = name, 1
        while own.casefold() in taken or (number > 1 and own.casefold() in given):
            number += 1
            own = f"{name}_{number}"
        taken.add(own.casefold())
        result.append(own)
    return result


def pad(image: Image.Image, size: int) -> tuple[Image.Image, tuple]:
    """The whole image in the middle of a grey square of size x size, its longer side resized to `size` (bicubic and
    antialiased), and its box there (left, top, right, bottom)."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    square = Image.new("RGB", (size, size), (GREY, GREY, GREY))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return square, (left, top, left + width, top + height)


def keep(image: Image.Image, size: int, step: int) -> tuple[Image.Image, tuple]:
    """The whole image, its shorter side resized to `size` and the longer one to the nearest multiple of `step` (bicubic
    and antialiased), and its box (0, 0, right, bottom)."""
    sides = tuple(max(size, step * round(side * size / min(image.size) / step)) for side in image.size)
    return image.resize(sides, Image.Resampling.BICUBIC), (0, 0, *sides)


class ResizedImages(torch.utils.data.Dataset):
    """Images as the model takes them, indexed by int: squares of `size`, or with `resize` "keep" rectangles whose sides
    `step` divides. Item: pixels uint8 (3, H, W) or None, index, unreadable names, and the box (left, top, right,
    bottom) that the image fills."""

    def __init__(self, source: ImageSource, size: int, resize: str, step: int):
        self.source, self.size, self.resize, self.step = source, size, resize, step

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            image = self.source.load(index)
        except UnreadableImage as error:
            return {"pixels": None, "index": index, "label": -1, "unreadable": [str(error)], "box": None}
        if self.resize == "pad":
            image, box = pad(image, self.size)
        elif self.resize == "keep" and image.width != image.height:
            image, box = keep(image, self.size, self.step)
        else:
            image, box = center_crop(image, self.size), (0, 0, self.size, self.size)
        return {"pixels": pil_to_tensor(image), "index": index, "label": -1, "unreadable": [], "box": box}


def collate_with_boxes(samples: list) -> dict:
    """As loaders.collate, and `box`: a list of boxes."""
    boxes = [sample["box"] for sample in samples if sample["pixels"] is not None]
    return {**collate(samples), "box": boxes}


def build_loader(images: ResizedImages, config: ReconstructConfig, accelerator: Accelerator) -> Any:
    """DataLoader of this process's share: every image is in exactly one batch of one process."""
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    return WorkerLoader(
        torch.utils.data.Subset(images, mine),
        1 if images.resize == "keep" else config.batch_size,  # rectangles differ
        collate_fn=collate_with_boxes,
        num_workers=min(config.data.num_workers, len(mine)),
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=start_worker,
    )


def picture_size(config: ReconstructConfig, autoencoder: Autoencoder) -> int:
    """Side in pixels of what the autoencoder is given. Raises ConfigError when --image_size does not fit."""
    size = config.image_size or autoencoder.image_size or DEFAULT_IMAGE_SIZE
    autoencoder.check_size(size, "image_size")
    if config.resize == "keep":
        step = autoencoder.rectangle_step
        require(step is not None, "resize", f"crop or pad for {autoencoder.name}, which takes squares alone", "keep")
    return size


# --------------------------------------------------------------------------------------------------------------------
# Outputs
# --------------------------------------------------------------------------------------------------------------------


def write_image(output: Path, name: str, box: tuple, image: torch.Tensor, recon: torch.Tensor, latent: Any) -> float:
    """Write the files of one image; its PSNR in dB. Both sides are uint8 (3, H, W), `latent` is (C, h, w) or None."""
    left, top, right, bottom = box
    image, recon = image[:, top:bottom, left:right], recon[:, top:bottom, left:right]
    file = output / "reconstructions" / f"{name}.png"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(recon.permute(1, 2, 0).numpy()).save(file)  # (3, H, W) -> (H, W, 3)
    if latent is not None:
        file = output / "latents" / f"{name}.safetensors"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"latent": latent.contiguous()}, file)
            give_default_permissions(file)
    return image_metrics(image[None].float() / 255, recon[None].float() / 255, ["psnr"], None)["psnr"].item()


@torch.no_grad()
def reconstruct_all(
    config: ReconstructConfig, autoencoder: Autoencoder, images: ResizedImages, names: list, accelerator: Accelerator
) -> list:
    """Write the files of all images. (index, PSNR) of those that could be read, in order, the same on all processes."""
    output, unreadable, measured = Path(config.output), UnreadableLog(config.data.max_unreadable), []
    loader = build_loader(images, config, accelerator)
    with data_errors_end_this_process(accelerator), ThreadPoolExecutor(max(1, config.data.num_workers)) as pool:
        for batch in progress_bar(loader, accelerator):
            unreadable.add(batch["unreadable"])
            if len(batch["pixels"]) == 0:
                continue
            pixels = to_device(batch["pixels"], accelerator.device).float() / 255
            with accelerator.autocast():
                latents = autoencoder.encode(pixels)
                recons = autoencoder.decode(latents)
            if not recons.isfinite().all():
                names_here = ", ".join(names[i] for i in batch["index"].tolist())
                raise RunError(f"reconstructions are not finite, among {names_here}", everywhere=True)
            latents = latents.cpu() if config.save_latents else [None] * len(pixels)
            index = batch["index"].tolist()
            rows = ([names[i] for i in index], batch["box"], batch["pixels"], to_8bit(recons).cpu(), latents)
            psnr = pool.map(lambda *row: write_image(output, *row), *rows)  # Pillow's PNG does not hold the GIL
            measured += zip(index, psnr, strict=True)
    measured = sorted(gather_object(measured))
    if not measured:
        raise DataError(f"input: none of {len(images)} images can be read")
    return measured


def write_grid(config: ReconstructConfig, images: ResizedImages, names: list, measured: list) -> None:
    """grid.png from the inputs and the written files."""
    both = []
    for index, _ in evenly_spread(measured, config.grid_images):
        item = images[index]
        left, top, right, bottom = item["box"]
        recon = torch.full_like(item["pixels"], GREY)
        with Image.open(Path(config.output) / "reconstructions" / f"{names[index]}.png") as file:
            recon[:, top:bottom, left:right] = pil_to_tensor(file)
        sides = [item["pixels"], recon]
        if config.resize == "keep":
            sides = [pil_to_tensor(pad(to_pil_image(side), images.size)[0]) for side in sides]
        both.append(torch.stack(sides).float() / 255)
    inputs, recons = torch.stack(both, dim=1)
    file = Path(config.output) / "grid.png"
    with writing(file):
        Image.fromarray(reconstruction_grid(inputs, recons).numpy()).save(file)


def report(config: ReconstructConfig, loaded: str, images: ResizedImages, names: list, measured: list) -> None:
    """Write images.csv and grid.png, print the table. `loaded`: the model in words."""
    output = Path(config.output)
    listed = output / "images.csv"
    with writing(listed), listed.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["input", "name", "psnr"])
        table.writerows([images.source.name(i), names[i], f"{psnr:.4f}"] for i, psnr in measured)
    write_grid(config, images, names, measured)
    results = {
        "model": config.model,
        "loaded": loaded,
        "num_images": len(measured),
        "num_unreadable": len(images) - len(measured),
        "image_size": images.size,
        "resize": config.resize,
        "psnr": sum(psnr for _, psnr in measured) / len(measured),
        "reconstructions": str(output / "reconstructions"),
        "latents": str(output / "latents") if config.save_latents else None,
        "grid": str(output / "grid.png"),
        "list": str(output / "images.csv"),
    }
    if config.json is not None:
        with writing(Path(config.json)):
            Path(config.json).write_text(json.dumps(results, indent=2) + "\n")
    skipped = f", {results['num_unreadable']} unreadable skipped" if results["num_unreadable"] else ""
    print(f"{'images':<18}{results['num_images']}{skipped}")
    print(f"{'mean PSNR':<18}{results['psnr']:.2f} dB")
    for what in ("reconstructions", "latents", "grid", "list"):
        if results[what] is not None:
            print(f"{what:<18}{results[what]}")


def main() -> None:
    config = parse(ReconstructConfig, "reconstruct.py", "Run images through an autoencoder.", check=check)
    quiet_transformers()
    accelerator = measuring_accelerator()
    source, names = find_inputs(config.input)
    source.max_megapixels = config.data.max_megapixels
    check_folder(config.output, "output")
    check_output_file(config.json, "json")
    autoencoder = load_autoencoder(config.model, "model", config.weights, config.published)
    size = picture_size(config, autoencoder)
    images = ResizedImages(source, size, config.resize, autoencoder.rectangle_step or size)
    make_folder(f"{config.output}/reconstructions", "output")
    autoencoder.to(accelerator.device)
    measured = reconstruct_all(config, autoencoder, images, names, accelerator)
    if accelerator.is_main_process:
        report(config, autoencoder.loaded, images, names, measured)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
