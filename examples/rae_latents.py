"""What an RAE's latents are, cell by cell: load, encode, look at them, decode, mix, normalise.

    python examples/rae_latents.py                                           (the demo's model and digits: make demo)
    python examples/rae_latents.py user/my-rae photo1.jpg photo2.jpg ...

Editors that know cells (VS Code, PyCharm, Spyder, jupytext) run it piece by piece. It needs torch, torchvision,
transformers and matplotlib, nothing of this repository: copy it. It runs the modeling_rae.py that lies beside the
weights (trust_remote_code): read that file first when the model is somebody else's. The picture is rae_latents.png, in
the working directory.
"""

# %% The model: a folder or a Hub id
import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torchvision.transforms import functional as F
from transformers import AutoModel

matplotlib.use("agg")  # a file, also where there is no screen; leave this out in a notebook
import matplotlib.pyplot as plt  # noqa: E402

model, *files = sys.argv[1:] or ["runs/digits_tiny/final"]
rae = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
device = "cuda" if torch.cuda.is_available() else "cpu"
rae.to(device)
config = rae.config
print(f"images {config.image_size} px, latents {config.latent_channels} x {config.latent_size} x {config.latent_size}")

# %% Images as the model takes them: (B, 3, S, S) in [0, 1], shorter side to S, the middle cut out
files = [Path(file) for file in files] or sorted(Path("data/digits/validation").glob("*/*.png"))[::30]


def read_image(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    image = F.center_crop(F.resize(image, config.image_size, F.InterpolationMode.BICUBIC), config.image_size)
    return F.to_tensor(image)


pixels = torch.stack([read_image(file) for file in files]).to(device)  # (B, 3, S, S)

# %% Encode and decode. Training noise is off in eval mode; the decoder's output is not clamped
with torch.no_grad():
    z = rae.encode(pixels).latent  # (B, C, h, w)
    reconstructed = rae.decode(z).sample.clamp(0, 1)  # (B, 3, S, S)
psnr = -10 * (reconstructed - pixels).square().mean(dim=(1, 2, 3)).log10()
print(f"PSNR {', '.join(f'{value:.1f}' for value in psnr.tolist())} dB")

# %% What a diffusion model needs to know: the range of the latents. Without statistics they are not normalised
mean, std = z.mean().item(), z.std().item()
print(f"latents: mean {mean:.3f}, standard deviation {std:.3f}, the model normalises: {config.use_latent_stats}")

# %% The latents as a picture: the three directions in which the tokens differ most are red, green and blue
tokens = z.permute(0, 2, 3, 1).reshape(-1, config.latent_channels).float()  # (B * h * w, C)
centred = tokens - tokens.mean(dim=0)
_, _, directions = torch.linalg.svd(centred, full_matrices=False)
rgb = centred @ directions[:3].T  # (B * h * w, 3)
rgb = (rgb - rgb.amin(dim=0)) / (rgb.amax(dim=0) - rgb.amin(dim=0)).clamp_min(1e-6)
rgb = rgb.view(len(z), config.latent_size, config.latent_size, 3)

# %% Noise on the latents, as a diffusion model's errors are: a decoder that was trained with noise stands up to it
with torch.no_grad():
    noisy = rae.decode(z + 0.5 * std * torch.randn_like(z)).sample.clamp(0, 1)

# %% Between the first image and the last: latents mix better than pixels do
steps = torch.linspace(0, 1, len(z), device=device).view(-1, 1, 1, 1)
with torch.no_grad():
    mixed = rae.decode((1 - steps) * z[:1] + steps * z[-1:]).sample.clamp(0, 1)

# %% All of it in one picture
rows = {"image": pixels, "latent": rgb, "reconstruction": reconstructed, "with noise": noisy, "first to last": mixed}
figure, axes = plt.subplots(len(rows), len(z), figsize=(1.5 * len(z) + 1, 1.5 * len(rows)), squeeze=False)
for axis_row, (name, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(axis_row, images.cpu(), strict=True):
        axis.imshow(image if image.shape[-1] == 3 else image.permute(1, 2, 0), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
    axis_row[0].set_ylabel(name)
figure.savefig("rae_latents.png", bbox_inches="tight", dpi=120)
print("picture: rae_latents.png")
