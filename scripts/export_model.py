"""Write an RAE's encode and decode as programs of torch.export, and as ONNX, for code without this repository.

    python scripts/export_model.py --model runs/dinov2_b/final --output exported
    python scripts/export_model.py --model user/my-rae --output exported --onnx    # needs requirements-extra.txt

In --output, for any number of images in a batch, float32, on a CPU or GPU:

    encode.pt2, encode.onnx    pixels (B, 3, S, S) in [0, 1]  ->  latent (B, C, h, w), normalised, without noise
    decode.pt2, decode.onnx    latent (B, C, h, w)  ->  sample (B, 3, S, S), about [0, 1], not clamped
    export.json                shapes, and how far each is from the model

A .pt2 file is read with `torch.export.load(file).module()`, an .onnx file with onnxruntime. Before the folder takes its
place, each is compared with the model on batches of 1, 2 and 3: a difference over 1e-5 (torch.export gives the same
numbers, to the last bit) ends the command with exit code 1, and nothing is written.
"""

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository root
from modeling_rae import RAEModel
from rae_suite.autoencoders import RAE
from rae_suite.cli import parse, require
from rae_suite.errors import ConfigError, RunError, one_line
from rae_suite.files import check_folder, write_folder
from rae_suite.launch import quiet_transformers, run_main
from rae_suite.model_loading import load_autoencoder
from rae_suite.values import PathText

MOST_DIFFERENCE = 1e-5  # absolute, of pixels in [0, 1], and relative to the largest latent
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 2, 3)


@dataclass
class ExportConfig:
    """Settings of export_model.py."""

    model: PathText
    """Folder or Hub id of the RAE."""
    output: PathText
    """Folder of the results, which is replaced as a whole when it is one of an earlier export."""
    onnx: bool = False
    """Whether ONNX files are written too; needs the packages of requirements-extra.txt."""


def check(config: ExportConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    missing = [name for name in ONNX_PACKAGES if config.onnx and importlib.util.find_spec(name) is None]
    expected = "false, or its packages (pip install -r requirements-extra.txt)"
    require(not missing, "onnx", f"{expected}; {', '.join(missing)} not installed", config.onnx)
    output = Path(config.output)
    filled = output.is_dir() and any(output.iterdir()) and not (output / "export.json").is_file()
    require(not filled, "output", "a new folder, or one of an earlier export", config.output)
    check_folder(str(output.absolute().parent), "output")


class Encode(nn.Module):
    """Pixels to latents."""

    def __init__(self, rae: RAEModel):
        super().__init__()
        self.rae = rae

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.rae.encode(pixels, add_noise=False).latent


class Decode(nn.Module):
    """Latents to pixels."""

    def __init__(self, rae: RAEModel):
        super().__init__()
        self.rae = rae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.rae.decode(latent).sample


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def compared(program: Callable, part: nn.Module, inputs: torch.Tensor, name: str) -> float:
    """The largest difference between a program and the model's part on batches of the inputs. Raises RunError where it
    is too large."""
    largest = max(difference(program(inputs[:count]), part(inputs[:count])) for count in BATCHES)
    if not largest <= MOST_DIFFERENCE:
        raise RunError(f"{name} differs from the model by {largest:.2g}, expected at most {MOST_DIFFERENCE:g}")
    return largest


def exported_program(part: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    [name] = part.forward.__annotations__.keys() - {"return"}
    shapes = {name: {0: torch.export.Dim("batch", min=1, max=4096)}}
    try:
        return torch.export.export(part, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export's are many; what they say begins with the reason
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else error)
        raise RunError(f"torch.export cannot export {type(part).__name__.lower()}: {reason}") from error


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> Callable:
    """Write an ONNX file; returns what computes with it."""
    import onnxruntime

    torch.onnx.export(program, f=str(file), dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [name] = [item.name for item in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


@torch.no_grad()
def export(rae: RAEModel, folder: Path, onnx: bool) -> dict:
    """Write all files. Returns what export.json says."""
    size = rae.config.image_size
    pixels = torch.rand(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))
    latent = rae.encode(pixels, add_noise=False).latent  # also keeps constants that must not be made while it is traced
    rae.decode(latent)
    about = {"image_size": size, "latent_shape": list(latent.shape[1:]), "dtype": "float32", "difference": {}}
    for part, inputs in ((Encode(rae), pixels), (Decode(rae), latent)):
        name = type(part).__name__.lower()
        program = exported_program(part.eval(), inputs[:2])
        about["difference"][f"{name}.pt2"] = compared(program.module(), part, inputs, f"{name}.pt2")
        torch.export.save(program, folder / f"{name}.pt2")
        if onnx:
            run = write_onnx(program, folder / f"{name}.onnx")
            about["difference"][f"{name}.onnx"] = compared(run, part, inputs, f"{name}.onnx")
    (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def main() -> None:
    config = parse(ExportConfig, "export_model.py", "Export an RAE's encode and decode.", check=check)
    quiet_transformers()
    warnings.filterwarnings("ignore", category=FutureWarning)
    autoencoder = load_autoencoder(config.model)
    if not isinstance(autoencoder, RAE):
        raise ConfigError(f"model: expected an RAE, got {config.model}, a {autoencoder.kind}")
    output, about = Path(config.output), {}

    def write(beside: Path) -> None:
        beside.mkdir()
        about.update(export(autoencoder.model, beside, config.onnx))

    write_folder(output, write, main_process=True, wait=lambda: None)
    channels, height, width = about["latent_shape"]
    print(f"pixels (B, 3, {about['image_size']}, {about['image_size']}), latents (B, {channels}, {height}, {width})")
    for name, value in about["difference"].items():
        print(f"{output / name}   differs from the model by {value:.2g}")


if __name__ == "__main__":
    run_main(main)
