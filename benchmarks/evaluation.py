"""What an evaluation costs beyond the networks: Evaluator against bare forward passes, in one run.

    python benchmarks/evaluation.py                                        (CPU: ViT-B decoder, 32 images, 5 minutes)
    python benchmarks/evaluation.py --decoder xl --batch_size 64 --num_images 2048 --mixed_precision bf16   (one GPU)

Networks of the published sizes with random weights: DINOv2-B with registers, the decoder, and Inception (torchvision's
layers behind the interface of the 2015 file). Bare: encoder, decoder and Inception on images and reconstructions, on
batches that are on the device already. Evaluation: the same from PNG files of 400 px, with decoding and cropping, 8-bit
rounding, PSNR, SSIM, rFID statistics and distance. Both are timed alternately; `--json FILE` writes the numbers.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import inception_v3

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite.frechet import inception_metrics  # noqa: E402
from rae_suite.launch import share_cores  # noqa: E402
from rae_suite.loaders import eval_loader  # noqa: E402
from rae_suite.metrics import Evaluator  # noqa: E402
from rae_suite.splits import scan_folder  # noqa: E402

DECODERS = {"b": (768, 12, 12, 3072), "xl": (1152, 28, 16, 4096)}  # width, blocks, heads, MLP


class Inception(nn.Module):
    """torchvision's Inception with the interface that clean-fid expects of the 2015 file."""

    def __init__(self):
        super().__init__()
        network = inception_v3(weights=None, aux_logits=False, init_weights=False, transform_input=False)
        network.fc, network.dropout = nn.Identity(), nn.Identity()
        self.layers = torch.jit.trace(network.eval(), torch.zeros(2, 3, 299, 299))

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(F.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False) / 128 - 1)


def build_rae(decoder: str) -> RAEModel:
    width, blocks, heads, mlp = DECODERS[decoder]
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12}
    config = RAEConfig(
        encoder_config={**encoder, "num_attention_heads": 12, "image_size": 518, "patch_size": 14},
        decoder_hidden_size=width,
        decoder_num_hidden_layers=blocks,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=mlp,
    )
    return RAEModel(config).eval()


def write_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((400, 400), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decoder", choices=list(DECODERS), default="b")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    share_cores(accelerator)
    device = accelerator.device
    rae = build_rae(args.decoder).to(device)

    def reconstruct(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return rae.decode(rae.encode(pixels).latent).sample.float()

    def synchronize() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        torch.jit.script(Inception().eval()).save(f"{folder}/inception.pt")
        write_images(Path(folder), args.num_images)
        source = scan_folder(folder)
        loader = eval_loader(source, 256, args.batch_size, args.num_workers)
        batches = [(batch["pixels"].to(device), batch["index"]) for batch in loader]
        times = {"bare forward passes": [], "evaluation": []}
        for _ in range(args.repeats + 1):
            (metric,) = inception_metrics(["rfid"], f"{folder}/inception.pt", "inception", accelerator)
            start = synchronize()
            for images, index in batches:
                reconstructions = reconstruct(images.float() / 255, index).clamp(0, 1) * 255
                metric.features(images)
                metric.features(reconstructions)
            middle = synchronize()
            Evaluator(loader, accelerator, ["psnr", "ssim"], distances=[metric])(reconstruct)
            times["evaluation"].append(synchronize() - middle)
            times["bare forward passes"].append(middle - start)

    seconds = {name: min(values[1:]) for name, values in times.items()}  # without the first, which warms up
    ratio = seconds["evaluation"] / seconds["bare forward passes"]
    for name, value in seconds.items():
        print(f"{name:<22}{value:>9.2f} s{args.num_images / value:>10.2f} images/s")
    print(f"evaluation costs {ratio:.3f} times the bare forward passes")
    if args.json:
        result = {**vars(args), "device": str(device), "torch": torch.__version__, "seconds": seconds, "ratio": ratio}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
