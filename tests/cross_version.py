"""Folders written with the oldest supported transformers and diffusers load with the newest, and the other way round.

    make cross-version        (makes .venv-oldest with transformers 5.0.0 and diffusers 0.37.0 on the packages of .venv;
                              6 minutes)

For every encoder family a tiny RAE is written by one Python, with the latents and reconstructions that it computes, and
loaded by the other as a stranger does: AutoModel with trust_remote_code, in an empty directory. So is one for each of
the settings that change which tensors a file has, and a tiny stage-2 pipeline, with DiffusionPipeline, from its folder
and from a Hub on loopback, then saved and loaded once more. Prints a table; exit code 1 when one differs by more than
1e-6.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import HubServer, Repository

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32  # pixels
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
FAMILIES = {
    "clip_vision_model": {**VIT, "intermediate_size": 32},
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "dinov3_vit": {**VIT, "intermediate_size": 32, "num_register_tokens": 2},
    "ijepa": {**VIT, "intermediate_size": 32},
    "siglip_vision_model": {**VIT, "intermediate_size": 32},
    "vit": {**VIT, "intermediate_size": 32},
    "vit_mae": {**VIT, "intermediate_size": 32},
}
# name: family, and settings of RAEConfig
CASES = {family: (family, {}) for family in FAMILIES} | {
    "statistics without mean": ("dinov2_with_registers", {"latent_stats_have_mean": False}),
    "final norm with affine": ("siglip_vision_model", {"encoder_keep_final_affine": True}),
}

WRITE = """
import sys, torch
root, folder, family, settings, changes = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4]), eval(sys.argv[5])
sys.path.insert(0, root)
from modeling_rae import RAEConfig, RAEModel
torch.manual_seed(0)
rae = RAEModel(RAEConfig(
    encoder_config={"model_type": family, **settings}, encoder_input_size=32, encoder_layers=[0, 1],
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
    decoder_patch_size=8, use_latent_stats=True, **changes)).eval()
for parameter in rae.encoder.parameters():
    parameter.data += 0.1 * torch.randn(parameter.shape)
mean = torch.randn(16, 4, 4) if rae.config.latent_stats_have_mean else None
rae.set_latent_stats(mean, torch.rand(16, 4, 4) + 0.5)
rae.save_pretrained(folder)
pixels = torch.rand(2, 3, 32, 32)
with torch.no_grad():
    latent = rae.encode(pixels).latent
    torch.save({"pixels": pixels, "latent": latent, "sample": rae.decode(latent).sample}, folder + "/expected.pt")
"""

READ = """
import sys, torch
from transformers import AutoModel
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
rae = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    latent = rae.encode(expected["pixels"]).latent
    sample = rae.decode(expected["latent"]).sample
print((latent - expected["latent"]).abs().max().item(), (sample - expected["sample"]).abs().max().item())
"""


WRITE_PIPELINE = """
import sys, torch
root, folder = sys.argv[1:]
sys.path.insert(0, root)
from diffusers import FlowMatchEulerDiscreteScheduler
from modeling_dit import RAEDiTModel, RAEDiTPipeline
from modeling_rae import RAEConfig, RAEModel
torch.manual_seed(0)
encoder = dict(model_type="dinov2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
               patch_size=8)
rae = RAEModel(RAEConfig(
    encoder_config=encoder, encoder_input_size=32, decoder_hidden_size=32, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=64, decoder_patch_size=8, use_latent_stats=True)).eval()
rae.set_latent_stats(torch.randn(16, 4, 4), torch.rand(16, 4, 4) + 0.5)
models = []
for layers in (2, 1):
    model = RAEDiTModel(sample_size=4, in_channels=16, hidden_size=32, num_layers=layers, num_attention_heads=2,
                        head_hidden_size=48, head_num_layers=1, head_num_attention_heads=4, num_classes=10).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    models.append(model)
pipe = RAEDiTPipeline(models[0], rae, FlowMatchEulerDiscreteScheduler(shift=2.5), models[1], guidance_scale=1.5,
                      class_names={3: "crane"})
pipe.save_pretrained(folder)
noise = torch.randn(2, 16, 4, 4)
images = pipe(["crane", 7], latents=noise, output_type="pt").images
torch.save({"noise": noise, "images": images}, folder + "/expected.pt")
"""

READ_PIPELINE = """
import sys, torch
from diffusers import DiffusionPipeline
expected, source = torch.load(sys.argv[1]), sys.argv[2]
for place in (source, "again"):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.to(torch.bfloat16)
    assert pipe.transformer.pos_embed.dtype == pipe.rae.latent_mean.dtype == torch.float32
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    images = pipe(["crane", 7], latents=expected["noise"], output_type="pt").images
    print((images - expected["images"]).abs().max().item())
    pipe.save_pretrained("again")
"""


def run(python: str, code: str, *args, cwd: str, **variables) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{cwd}/home", "PYTHONPATH": "", **variables}
    command = [python, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    return done.stdout.strip()


def pipelines(pythons: dict, folder: str) -> bool:
    """The table's part about pipelines. Returns whether all are the same."""
    print(f"{'pipeline':<24}{'written with':>14}{'read with':>12}{'loaded':>10}{'again':>10}")
    whole = True
    for writer, reader in (list(pythons), list(pythons)[::-1]):
        place = Path(folder) / f"pipeline-{writer}"
        said = run(pythons[writer], WRITE_PIPELINE, ROOT, place, cwd=folder)
        with HubServer() as server:
            files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
            server.repositories["user/dit"] = Repository(False, files)
            for source, variables in (
                (str(place), {}),
                ("user/dit", server.environment(Path(folder) / f"home-{reader}", token="")),
            ):
                here = Path(folder) / f"{reader}-{source.rpartition('/')[2]}"
                here.mkdir()
                text = said or run(
                    pythons[reader], READ_PIPELINE, place / "expected.pt", source, cwd=str(here), **variables
                )
                try:
                    loaded, again = map(float, text.split())
                except ValueError:
                    loaded = again = float("inf")
                    print(text)
                whole &= loaded <= 1e-6 and again <= 1e-6  # nan is not
                name = "Hub" if variables else "folder"
                print(f"{name:<24}{writer:>14}{reader:>12}{loaded:>10.1e}{again:>10.1e}")
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("oldest", help="Python of an environment with the oldest supported transformers and diffusers")
    oldest = str(Path(parser.parse_args().oldest).absolute())  # not resolved: a link says which environment it is
    pythons = {}
    with tempfile.TemporaryDirectory() as folder:
        for python in (sys.executable, oldest):
            pythons[run(python, "import transformers; print(transformers.__version__)", cwd=folder)] = python
            versions = "import diffusers; print('diffusers', diffusers.__version__)"
            print(f"transformers {list(pythons)[-1]} with {run(python, versions, cwd=folder)}")
        assert len(pythons) == 2, f"expected two versions of transformers, got {list(pythons)}"
        print(f"{'case':<24}{'written with':>14}{'read with':>12}{'latent':>10}{'sample':>10}")
        failed = False
        for name, (family, changes) in CASES.items():
            for writer, reader in (list(pythons), list(pythons)[::-1]):
                place = f"{folder}/{name.replace(' ', '_')}-{writer}"
                said = run(pythons[writer], WRITE, ROOT, place, family, FAMILIES[family], changes, cwd=folder)
                said = said or run(pythons[reader], READ, place, cwd=folder)
                try:
                    latent, sample = map(float, said.split())
                except ValueError:
                    latent = sample = float("inf")
                    print(said)
                if not (latent <= 1e-6 and sample <= 1e-6):  # nan included
                    failed = True
                print(f"{name:<24}{writer:>14}{reader:>12}{latent:>10.1e}{sample:>10.1e}")
        failed |= not pipelines(pythons, folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
