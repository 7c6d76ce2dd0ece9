"""Train a small diffusion transformer on the latents of an RAE, and draw images with it.

    make demo  # an RAE of handwritten digits, runs/digits_tiny/final
    python examples/latent_diffusion.py --trust_remote_code
        the digits, 2,000 steps: about 4 minutes on 2 CPU cores; loss from 1.2 to 0.13, and columns of readable digits

    python examples/latent_diffusion.py --model user/my-rae --data /data/flowers/train --output runs/flowers \\
            --depth 12 --batch_size 128 --steps 50000 --lr 2e-4 --trust_remote_code
        any RAE, a folder or a Hub id, whose modeling_rae.py is run (--trust_remote_code allows it), and any images
        <data>/<class>/**/*.png; where images lie in <data> itself, all are of one class. A GPU is used when there is
        one, in float32.

Written in --output: samples.png, a column for each of the first ten classes; transformer/ and scheduler/, for the
`from_pretrained` of diffusers; latent_stats.safetensors, `mean` and `std` (1, C, 1, 1): the RAE decodes z * std + mean.

This file needs torch, torchvision, transformers and diffusers: copy it. The latents of all images are kept in memory:
0.8 GB for each 1,000 images with DINOv2-B; for more than fit, encode in the training loop instead.

Method: flow matching with RAE's time shift (arXiv 2510.11690), a DiT (arXiv 2212.09748) with classifier-free guidance
(arXiv 2207.12598).
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn, Optional

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision import transforms
from torchvision.utils import save_image
from transformers import AutoModel

HEAD_WIDTH = 64  # channels of an attention head
LABEL_DROPOUT = 0.1  # share of the training images whose class the transformer is not told, for guidance
GRID_CLASSES, GRID_ROWS = 10, 6
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which is a program
ENDINGS = {ending for ending, format in Image.registered_extensions().items() if format in (*FORMATS, "MPO")}
TEXT = {".txt", ".json", ".csv", ".xml", ".md"}  # beside the images
# what network drives, archives and systems leave among them, beside names with a dot in front
SYSTEM = ("@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", "system volume information", "lost+found",
          "thumbs.db", "desktop.ini")  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    path = os.path.expanduser
    parser.add_argument("--model", type=path, default="runs/digits_tiny/final", help="folder or Hub id of an RAE")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the modeling_rae.py of --model")
    parser.add_argument("--data", type=path, default="data/digits/train", help="folder of images, <data>/<class>/*.png")
    parser.add_argument("--output", type=path, default="runs/latent_diffusion", help="folder for the results")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a batch")
    parser.add_argument("--width", type=int, help="the transformer's channels; none: at least the latents'")
    parser.add_argument("--depth", type=int, default=4, help="the transformer's blocks")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--num_sampling_steps", type=int, default=50, help="steps from noise to an image")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance; 1: none")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that read images")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, noise and samples")
    args = parser.parse_args()
    args.output = Path(args.output)
    least = {"steps": 1, "batch_size": 1, "depth": 1, "lr": 0, "num_sampling_steps": 1, "num_workers": 0}
    for name, value in least.items():
        if getattr(args, name) < value:
            fail(f"--{name}: expected a number of at least {value}, got {getattr(args, name)}")
    return args


def fail(message: str) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class Images(NamedTuple):
    paths: list
    labels: list  # places in `classes`
    classes: list


def visible_files(folder: Path) -> list:
    """All files below a folder, sorted, but hidden and system ones."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name.lower() not in SYSTEM:
            found += visible_files(path) if path.is_dir() else [path]
    return found


def list_images(folder: Path) -> Images:
    """The images below a folder, each of the class that its first folder names; all of one class where an image lies
    in the folder itself. Says what other files there are."""
    try:
        files = visible_files(folder)
    except OSError as error:
        fail(f"--data: expected images in {folder}/<class>/ ({error})")
    paths = [path for path in files if path.suffix.lower() in ENDINGS]
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in ENDINGS | TEXT)
    if others:
        print("left out:", ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.items()))
    if not paths:
        fail(f"--data: expected images in {folder}/<class>/, found none")
    if any(path.is_dir() for path in Path(folder, "train").glob("*")):
        fail(f"--data: expected one split, such as {folder}/train, got the folder of all splits {folder}")
    names = [path.relative_to(folder).parts for path in paths]
    if any(len(parts) == 1 for parts in names):
        return Images(paths, [0] * len(paths), [folder.name])
    classes = sorted({parts[0] for parts in names})
    return Images(paths, [classes.index(parts[0]) for parts in names], classes)


def read_image(path: Path) -> Image.Image:
    """An image as the suite's rae_suite/images.py reads it: RGB, upright, its first frame, transparent pixels on white,
    grey of 16 bits scaled. Raises ValueError for what that reads in ways that are left out here."""
    with Image.open(path, formats=FORMATS) as image:
        deep = image.mode.startswith("I") and image.format in ("PNG", "PPM")  # 16 bits, 0 is black
        known = deep or image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
        signed = image.format == "TIFF" and 2 in image.tag_v2.get(339, ())
        keyed = image.mode != "P" and "transparency" in image.info
        if signed or keyed or not known:
            which = "signed" if signed else "with a transparent colour" if keyed else f"of mode {image.mode}"
            raise ValueError(f"a {image.format} {which}")
        image = ImageOps.exif_transpose(image)
    if deep:
        return Image.fromarray(((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_rae(name: str, trust_remote_code: bool, device: torch.device):
    try:
        rae = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            fail(f"--model: {name} has code of its own, modeling_rae.py, which is run with --trust_remote_code only")
        fail(f"--model: expected the folder or Hub id of an RAE, got {name} ({error})")
    if rae.config.model_type != "rae":
        fail(f"--model: expected an RAE, got {name}, a model of type {rae.config.model_type}")
    return rae.to(device)


@torch.no_grad()
def encode_images(rae, images: Images, batch_size: int, num_workers: int) -> tuple:
    """All latents (N, C, h, w), on the CPU, and their class indices (N,)."""
    size = rae.config.image_size
    transform = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]  # (3, S, S) in [0, 1]
    )

    def read(path: Path) -> torch.Tensor:
        try:
            return transform(read_image(path))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path} ({error})") from error

    latents = []
    with ThreadPoolExecutor(max(1, num_workers)) as threads:
        for start in range(0, len(images.paths), batch_size):
            try:
                pixels = torch.stack(list(threads.map(read, images.paths[start : start + batch_size])))
            except ValueError as error:
                fail(f"--data: an image cannot be read: {error}")
            latents.append(rae.encode(pixels.to(rae.device)).latent.cpu())
    return torch.cat(latents), torch.tensor(images.labels)


def choose_width(asked: Optional[int], latent_channels: int) -> int:
    """The transformer's channels follow from the latents': each token of a noisy latent has as many degrees of freedom
    as it has channels, and a narrower transformer loses some of them, however deep (RAE paper, section on width)."""
    width = max(128, math.ceil(latent_channels / HEAD_WIDTH) * HEAD_WIDTH) if asked is None else asked
    if width % HEAD_WIDTH or width < latent_channels:
        fail(f"--width: expected a multiple of {HEAD_WIDTH}, at least the latents' {latent_channels}, got {width}")
    return width


def time_shift(latent_channels: int, latent_size: int) -> float:
    """The more numbers a latent has, the more noise it takes to hide it: RAE (section on the noise schedule) moves each
    time t to a*t / (1 + (a-1)*t) with this a. The scheduler's `shift` is the same a, in the same formula."""
    return math.sqrt(latent_channels * latent_size**2 / 4096)


def build_transformer(config, num_classes: int, width: int, depth: int) -> DiTTransformer2DModel:
    """A DiT that takes each token of the latent as a patch. `config` is the RAE's."""
    transformer = DiTTransformer2DModel(
        in_channels=config.latent_channels,
        sample_size=config.latent_size,
        patch_size=1,
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        num_layers=depth,
        num_embeds_ada_norm=num_classes,  # and one more, for an image whose class is not told
    )
    # DiT's adaLN-Zero, which diffusers leaves to the caller: each block starts as the identity, the output as 0
    for layer in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # in training mode, each block would drop labels of its own; train() does it for all blocks alike
    return transformer.eval()


def train(transformer, scheduler, latents: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> None:
    """Teach `transformer` the velocity, noise - latent, at latents on the line between the two."""
    device, no_label = transformer.device, transformer.config.num_embeds_ada_norm
    optimizer = torch.optim.AdamW(transformer.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    # falls to 0, which does what an average of the weights (EMA) would do
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    dataset = TensorDataset(latents, labels)
    order = RandomSampler(dataset, num_samples=args.steps * args.batch_size)  # one epoch after the other
    start, losses = time.perf_counter(), []
    for step, batch in enumerate(DataLoader(dataset, args.batch_size, sampler=order), start=1):
        z, y = (part.to(device) for part in batch)  # (B, C, h, w), (B,)
        y = torch.where(torch.rand(len(y), device=device) < LABEL_DROPOUT, no_label, y)
        index = torch.randint(len(scheduler.timesteps), (len(z),))
        t = scheduler.timesteps[index].to(device)  # (B,), shifted already, 1000 is noise
        sigma = scheduler.sigmas[index].to(device).view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        velocity = transformer((1 - sigma) * z + sigma * noise, t, y).sample
        loss = F.mse_loss(velocity, noise - z)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {torch.stack(losses).mean():.4f}, {seconds:.0f} s", flush=True)
            losses.clear()


@torch.no_grad()
def sample(transformer, scheduler, labels: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Latents (B, C, h, w) of the classes `labels` (B,), from noise."""
    config, device = transformer.config, transformer.device
    labels, no_label = labels.to(device), torch.full_like(labels, config.num_embeds_ada_norm, device=device)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    times = torch.arange(args.num_sampling_steps, 0, -1) / args.num_sampling_steps  # 1 to 1/n, before the shift
    scheduler.set_timesteps(sigmas=times.tolist(), device=device)
    for t in scheduler.timesteps:
        velocity = transformer(z, t.expand(len(z)), labels).sample
        if args.guidance != 1:
            unconditional = transformer(z, t.expand(len(z)), no_label).sample
            velocity = unconditional + args.guidance * (velocity - unconditional)
        z = scheduler.step(velocity, t, z).prev_sample
    return z


def main() -> None:
    args, start = parse_args(), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = list_images(Path(args.data))
    rae = load_rae(args.model, args.trust_remote_code, device)
    width = choose_width(args.width, rae.config.latent_channels)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output: expected a folder, got {args.output} ({error})")
    torch.manual_seed(args.seed)

    latents, labels = encode_images(rae, images, args.batch_size, args.num_workers)
    print(f"{len(labels)} images of {len(images.classes)} classes, latents {tuple(latents.shape[1:])}", flush=True)
    # Diffusion wants mean 0 and standard deviation 1. Latents of an RAE with statistics (config.use_latent_stats) are
    # so already, and this changes next to nothing; without statistics, this is what normalises them.
    std, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    std = std.clamp(min=1e-5)  # of a channel that never changes
    latents.sub_(mean).div_(std)  # in place: there may be many

    transformer = build_transformer(rae.config, len(images.classes), width, args.depth).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=time_shift(rae.config.latent_channels, rae.config.latent_size))
    train(transformer, scheduler, latents, labels, args)
    transformer.save_pretrained(args.output / "transformer")
    scheduler.save_pretrained(args.output / "scheduler")
    save_file({"mean": mean, "std": std}, args.output / "latent_stats.safetensors")

    classes = torch.arange(min(len(images.classes), GRID_CLASSES))
    z = sample(transformer, scheduler, classes.repeat(GRID_ROWS), args).cpu() * std + mean
    with torch.no_grad():
        pixels = rae.decode(z.to(device)).sample.clamp(0, 1)  # (B, 3, H, W)
    grid = args.output / "samples.png"
    save_image(pixels, grid, nrow=len(classes))
    print(f"{time.perf_counter() - start:.0f} s, samples of {', '.join(images.classes[:GRID_CLASSES])}: {grid}")


if __name__ == "__main__":
    main()
