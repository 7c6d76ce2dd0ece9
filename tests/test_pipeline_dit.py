"""The pipeline of modeling_dit.py, with tiny networks: calls, files, and a stranger who loads them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, same, tiny_dit, tiny_rae
from diffusers import FlowMatchEulerDiscreteScheduler

from modeling_dit import (
    RAEDiTModel,
    RAEDiTPipeline,
    autoguidance_velocity,
    cfg_velocity,
    find_class,
    sample_ode,
    sampling_times,
)
from rae_suite.dit_folders import is_whole_pipeline, latent_dim, save_pipeline
from rae_suite.flow import default_shift

NAMES = [f"class {letter}" for letter in "abcdefghij"]
SHIFT = 6.5


@pytest.fixture(scope="module")
def parts() -> dict:
    rae = tiny_rae(use_latent_stats=True).eval()
    generator = torch.Generator().manual_seed(0)
    stats = [torch.randn(16, 4, 4, generator=generator), torch.rand(16, 4, 4, generator=generator) + 0.5]
    rae.set_latent_stats(*stats)
    return {"transformer": tiny_dit(), "rae": rae, "guide": tiny_dit(1, num_layers=1)}


def build(parts: dict, guide: bool = False, **settings) -> RAEDiTPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    settings = {"class_names": dict(enumerate(NAMES)), **settings}
    own = parts["guide"] if guide else None
    pipe = RAEDiTPipeline(parts["transformer"], parts["rae"], scheduler, own, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 16, 4, 4, generator=torch.Generator().manual_seed(3))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 48**0.5, 192**0.5, 3.7])
@pytest.mark.parametrize("end", ["published", "zero"])
def test_the_scheduler_has_the_published_times(parts, shift, end):
    """Bit for bit, for every number of points, and so are its steps."""
    pipe = build(parts)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for points in (2, 3, 7, 25, 50, 100, 250):
        expected = sampling_times(points, shift, end)
        timesteps = pipe._set_times(points, end)
        assert len(timesteps) == len(expected) - 1 == pipe.num_timesteps
        assert torch.equal(pipe.scheduler.sigmas[: len(expected)], expected)
    x = noise()
    final = sample_ode(lambda x, t: torch.cos(3 * t) * x, x, sampling_times(50, shift, end))
    for i, timestep in enumerate(pipe._set_times(50, end)):
        v = torch.cos(3 * pipe.scheduler.sigmas[i]) * x
        x = pipe.scheduler.step(v, timestep, x).prev_sample
    assert torch.equal(x, final)


@pytest.mark.parametrize("end", ["published", "zero"])
@pytest.mark.parametrize("guided", ["not", "by labels", "by a guide"])
def test_latents_are_those_of_the_solver(parts, guided, end):
    """With each kind of guidance, in an interval: the same bits as the functions that scripts sample with."""
    pipe = build(parts, guide=guided == "by a guide")
    labels, scale, interval = torch.tensor([1, 7]), 1.0 if guided == "not" else 1.7, (0.2, 0.9)
    model, times = parts["transformer"], sampling_times(9, SHIFT, end)

    def velocity(x, t):
        if guided == "by a guide":
            return autoguidance_velocity(model, parts["guide"], x, t, labels, scale, interval)
        return cfg_velocity(model, x, t, labels, 10, scale, interval)

    expected = sample_ode(velocity, noise(), times)
    options = dict(guidance_scale=scale, guidance_interval=interval, num_inference_steps=9, end=end)
    found = pipe(["class b", 7], latents=noise(), output_type="latent", **options).images
    assert torch.equal(found, expected)
    unguided = pipe([1, 7], latents=noise(), output_type="latent", num_inference_steps=9, end=end).images
    assert torch.equal(unguided, found) == (guided == "not")


def test_outputs(parts):
    """The four kinds of output agree; a tuple if asked; one label alone is one image; labels may be a tensor."""
    pipe = build(parts, num_inference_steps=4)
    latents = pipe([1, 2], generator=seeded(), output_type="latent").images
    with torch.no_grad():
        pixels = parts["rae"].decode(latents).sample.clamp(0, 1)
    pt = pipe(torch.tensor([1, 2]), generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(pt, tuple) and torch.equal(pt[0], pixels) and pt[0].shape == (2, 3, 32, 32)
    array = pipe(["class b", "2"], generator=seeded(), output_type="np").images
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    pictures = pipe([1, 2], generator=seeded()).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), (array * 255).round().astype(np.uint8))
    assert len(pipe("class b", generator=seeded()).images) == len(pipe(1, generator=seeded()).images) == 1


def test_generators(parts):
    """One for all images, or one for each: then an image does not depend on the others."""
    pipe = build(parts, num_inference_steps=4)
    alone = [pipe(3, generator=torch.Generator().manual_seed(i), output_type="pt").images for i in (0, 1)]
    both = pipe([3, 3], generator=[torch.Generator().manual_seed(i) for i in (0, 1)], output_type="pt").images
    torch.testing.assert_close(both, torch.cat(alone))
    state = torch.get_rng_state()
    pipe(3, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert not torch.equal(pipe(3, output_type="pt").images, pipe(3, output_type="pt").images)


def test_callbacks(parts):
    """After each step, with the time; what they return replaces the latents; they can stop the run."""
    pipe, seen = build(parts, num_inference_steps=6), []

    def look(pipeline, step, timestep, given):
        seen.append((step, timestep.item(), given["latents"].clone()))
        return {"latents": given["latents"] * 0} if step == 4 else None

    latents = pipe(1, generator=seeded(), output_type="latent", callback_on_step_end=look).images
    times = sampling_times(6, SHIFT)
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([time for _, time, _ in seen], 1000 * times[:-1], rtol=1e-6)
    assert seen[0][2].any() and not latents.any()

    def stop(pipeline, step, timestep, given):
        pipeline._interrupt = step == 2
        return given

    stopped = pipe(1, generator=seeded(), output_type="latent", callback_on_step_end=stop).images
    assert torch.equal(stopped, seen[2][2])


def test_progress_bar(parts, capfd):
    pipe = build(parts)
    pipe.set_progress_bar_config(disable=False)
    pipe(1, num_inference_steps=5)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [10]}, "class 10: expected an index from 0 to 9"),
        ({"class_labels": [-1]}, "class -1: expected an index from 0 to 9"),
        ({"class_labels": ["klass c"]}, "'klass c'.*the nearest names are class c, "),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, got nan"),
        ({"guidance_interval": (0.9, 0.1)}, r"guidance_interval: expected .* got \(0.9, 0.1\)"),
        ({"guidance_interval": (0.5, 1.5)}, r"guidance_interval: expected .* got \(0.5, 1.5\)"),
        ({"guidance_interval": ()}, r"guidance_interval: expected two times .* got \(\)"),
        ({"num_inference_steps": 1}, "num_steps: expected at least 2 .* got 1"),
        ({"num_inference_steps": 0}, "num_steps: expected at least 2 .* got 0"),
        ({"end": "one"}, "end: expected published or zero, got 'one'"),
        ({"output_type": "jpg"}, "output_type: expected one of pil, np, pt, latent, got 'jpg'"),
        ({"latents": torch.zeros(2, 16, 4, 4)}, r"latents: expected shape \(1, 16, 4, 4\), got \(2, 16, 4, 4\)"),
        ({"generator": [torch.Generator()] * 2}, "generator: expected one for each of the 1 images, got 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"expected some of \['latents'\], got \['noise'\]"),
    ],
)
def test_wrong_calls(parts, arguments, message):
    """Are refused before the transformer runs."""
    pipe, calls = build(parts), []
    hook = parts["transformer"].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], **arguments})
    hook.remove()
    assert not calls


def test_guidance_that_cannot_be_had(parts):
    """A model that never dropped labels has no null label; one with a guide does not need it."""
    parts = {**parts, "transformer": tiny_dit(class_dropout_prob=0.0)}
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        build(parts)(1, guidance_scale=1.5)
    build(parts, guide=True)(1, guidance_scale=1.5, num_inference_steps=3)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"guide": tiny_dit(num_classes=9)}, r"guide: .*'num_classes': 10.*'num_classes': 9"),
        ({"guide": tiny_dit(sample_size=8)}, r"guide: .*'sample_size': 4.*'sample_size': 8"),
        ({"transformer": tiny_dit(in_channels=8)}, "rae: expected latents of 8 channels and side 4.* 16 channels"),
        ({"rae": None}, r'rae=AutoModel.from_pretrained\("user/rae", trust_remote_code=True\)'),
    ],
)
def test_parts_that_do_not_fit(parts, other, message):
    with pytest.raises(ValueError, match=message):
        build({**parts, **other}, guide="guide" in other, rae_id="user/rae")


def test_names_of_classes():
    """As they are; one of the words between commas, in any case; indices as text; never one of two."""
    names = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "7", 4: "Crane, machine"}
    found = [find_class(label, names, 9) for label in ("tench, Tinca tinca", "TENCH", " tinca tinca ", "7", "8", 7)]
    assert found == [0, 0, 0, 3, 8, 7]
    for label, message in (
        ("crane", r"expected the name of one class, got that of the classes \[1, 2\]"),
        ("tensh", "the nearest names are tench, "),
        ("9", "class 9: expected an index from 0 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            find_class(label, names, 9)
    with pytest.raises(ValueError, match="this model's classes have no names"):
        find_class("tench", {}, 9)
    with pytest.raises(TypeError):
        find_class(1.5, names, 9)


# Precision ------------------------------------------------------------------------------------------------------------


def test_bfloat16(parts):
    """Cast as a whole: constants and statistics keep their bits, the sampler's state is float32, and the images are
    close to those of float32."""
    expected = build(parts, guide=True)([1, 2], latents=noise(), output_type="pt", guidance_scale=1.5).images
    copies = {name: type(part).from_config(part.config) if name != "rae" else None for name, part in parts.items()}
    for name, copy in copies.items():
        if copy is not None:
            copy.load_state_dict(parts[name].state_dict())
    rae = tiny_rae(use_latent_stats=True).eval()
    rae.load_state_dict(parts["rae"].state_dict())
    low = build({**copies, "rae": rae}, guide=True).to("cpu", torch.bfloat16)
    kept = ("pos_embed", "t_embedder.W", "freqs_cos", "freqs_sin", "latent_mean", "latent_var")
    for name, part in parts.items():
        for key, tensor in getattr(low, name).state_dict().items():
            constant = key.endswith(kept) and "decoder_pos_embed" not in key
            assert tensor.dtype == (torch.float32 if constant else torch.bfloat16), key
            assert not constant or torch.equal(tensor, part.state_dict()[key]), key
    states = []
    options = dict(guidance_scale=1.5, callback_on_step_end=lambda *a: states.append(a[3]["latents"].dtype) or {})
    images = low([1, 2], latents=noise(), output_type="pt", **options).images
    assert set(states) == {torch.float32} and images.dtype == torch.float32
    assert 0 < (images - expected).norm() < 2e-2 * expected.norm()


def test_offloading(parts):
    """Each network has its hook, the guide its own: it takes turns with the transformer and must stay where it is."""
    pipe = build(parts, guide=True)
    expected = pipe(1, generator=seeded(), output_type="pt", guidance_scale=1.5, num_inference_steps=4).images
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = {id(network._hf_hook): name for name, network in parts.items()}
    chain = {hooks[id(n._hf_hook)]: n._hf_hook.prev_module_hook for n in parts.values()}
    assert chain["transformer"] is chain["guide"] is None and chain["rae"].model is parts["transformer"]
    found = pipe(1, generator=seeded(), output_type="pt", guidance_scale=1.5, num_inference_steps=4).images
    pipe.remove_all_hooks()
    assert torch.equal(found, expected)


# Files ----------------------------------------------------------------------------------------------------------------

FILES = {
    "model_index.json", "modeling_dit.py", "scheduler/scheduler_config.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/modeling_dit.py",
    "rae/config.json", "rae/model.safetensors", "rae/modeling_rae.py",
}  # fmt: skip
GUIDE = {"guide/config.json", "guide/diffusion_pytorch_model.safetensors", "guide/modeling_dit.py"}


def files_in(folder) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# what a stranger does, in an empty directory: argv are folders, the first is loaded, saved as the second, and so on
STRANGER = """
import sys, torch
from pathlib import Path
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for i, (source, target) in enumerate(zip(sys.argv[1:], sys.argv[2:])):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["class b", 7], generator=torch.Generator().manual_seed(5), output_type="pt").images
    print(type(pipe).__module__.split(".")[0], pipe.config.guidance_scale, images.double().sum().item())
    torch.save(images, f"{i}.pt")
    # what another model's code does to the file that this one's was loaded from
    Path(sys.modules[type(pipe).__module__].__file__).write_text("raise RuntimeError")
    pipe.save_pretrained(target)
low = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16)
assert low.rae.latent_mean.dtype == low.transformer.pos_embed.dtype == torch.float32
assert low.rae.decoder.decoder_embed.weight.dtype == low.transformer.dtype == low.guide.dtype == torch.bfloat16
low(1, num_inference_steps=2)
"""


def stranger(code: str, *arguments, cwd) -> subprocess.CompletedProcess:
    """Python without this repository, in a directory of its own, with an empty cache."""
    cwd.mkdir()
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_saved_loaded_saved_loaded(parts, tmp_path):
    """By a stranger, without this repository: the same images each time, and the same files; in 16 bits too."""
    pipe = build(parts, guide=True, guidance_scale=1.5, guidance_start=0.1, num_inference_steps=7, end="zero")
    pipe.save_pretrained(tmp_path / "a")
    assert files_in(tmp_path / "a") == FILES | GUIDE and is_whole_pipeline(tmp_path / "a")
    expected = pipe(["class b", 7], generator=seeded(), output_type="pt").images
    folders = [tmp_path / name for name in "abcd"]
    done = stranger(STRANGER, *folders, cwd=tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["diffusers_modules", "1.5"]] * 3
    for i in range(3):  # weights lie elsewhere in memory there, and sums of another alignment are rounded otherwise
        torch.testing.assert_close(torch.load(tmp_path / "empty" / f"{i}.pt"), expected)
    for folder in folders[1:]:
        assert files_in(folder) == FILES | GUIDE
        for name in FILES | GUIDE:
            if not name.endswith("config.json"):  # diffusers notes in them where the model came from
                assert (folder / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    for name in ("modeling_dit.py", "transformer/modeling_dit.py", "guide/modeling_dit.py"):
        assert (tmp_path / "d" / name).read_text() == (ROOT / "modeling_dit.py").read_text()
    assert str(tmp_path) not in (tmp_path / "d" / "model_index.json").read_text()


def test_a_compiled_transformer_is_saved_as_itself(parts, tmp_path):
    pipe = build(parts, num_inference_steps=3)
    expected = pipe(1, generator=seeded(), output_type="pt").images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(pipe(1, generator=seeded(), output_type="pt").images, expected)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["modeling_dit", "RAEDiTModel"] and is_whole_pipeline(tmp_path)


def test_rae_left_out(parts, tmp_path):
    """The folder says where it comes from; the error has the line that loads it; with that line it works. Without
    trust, nothing runs."""
    build(parts, rae_id=str(tmp_path / "rae")).save_pretrained(tmp_path / "slim", include_rae=False)
    parts["rae"].save_pretrained(tmp_path / "rae")
    assert files_in(tmp_path / "slim") == {name for name in FILES if not name.startswith("rae/")}
    assert is_whole_pipeline(tmp_path / "slim")
    with pytest.raises(ValueError, match="include_rae=False needs"):
        build(parts).save_pretrained(tmp_path / "none", include_rae=False)
    code = f"""
import re, torch
from diffusers import DiffusionPipeline
from transformers import AutoModel
torch.set_num_threads(1)
slim = {str(tmp_path / "slim")!r}
try:
    DiffusionPipeline.from_pretrained(slim, trust_remote_code=True)
except ValueError as error:
    line = re.search(r"rae=(AutoModel.*True\\))\\)", str(error))[1]
print(line)
pipe = DiffusionPipeline.from_pretrained(slim, rae=eval(line), trust_remote_code=True)
torch.save(pipe(1, generator=torch.Generator().manual_seed(5), output_type="pt").images, "image.pt")
pipe.save_pretrained("whole")
pipe.save_pretrained("slim", include_rae=False)
assert pipe.config.rae[0] is not None
DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)
try:
    DiffusionPipeline.from_pretrained("whole")
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code ran without trust_remote_code")
"""
    done = stranger(code, cwd=tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'AutoModel.from_pretrained("{tmp_path / "rae"}", trust_remote_code=True)'
    expected = build(parts)(1, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "empty" / "image.pt"), expected)
    assert files_in(tmp_path / "empty" / "whole") == FILES
    for name in ("model_index.json", "modeling_dit.py"):
        assert (tmp_path / "empty" / "slim" / name).read_text() == (tmp_path / "slim" / name).read_text()


def test_save_pipeline(parts, tmp_path):
    """With the weights of a gathered state that lacks the rotary tables, names, defaults, card and picture."""
    other = tiny_dit(2)
    state = {name: tensor for name, tensor in other.state_dict().items() if "feat_rope" not in name}
    (tmp_path / "grid.png").write_bytes(b"picture")
    sampling = {"shift": SHIFT, "num_inference_steps": 8, "end": "zero", "solver": "heun2", "guide": "x",
                "guidance_scale": 2.0, "guidance_interval": (0.1, 0.8)}  # fmt: skip
    folder = tmp_path / "final"
    save_pipeline(
        folder,
        parts["transformer"],
        parts["rae"],
        state=state,
        class_names=NAMES,
        sampling=sampling,
        card="# card",
        picture=tmp_path / "grid.png",
    )
    assert files_in(folder) == FILES | {"README.md", "samples.png", "rae/preprocessor_config.json"}
    loaded = RAEDiTPipeline.from_pretrained(folder, trust_remote_code=True)
    assert same(dict(loaded.transformer.state_dict()), dict(other.state_dict()))
    assert loaded.class_names == dict(enumerate(NAMES)) and loaded.get_label_ids("class c") == [2]
    assert loaded.scheduler.config.shift == SHIFT
    config = loaded.config
    assert (config.num_inference_steps, config.end, config.guidance_scale) == (8, "zero", 2.0)
    assert (config.guidance_start, config.guidance_end, loaded.guide) == (0.1, 0.8, None)
    with pytest.raises(ValueError, match="sampling: expected .* got .'steps'"):
        save_pipeline(tmp_path / "x", parts["transformer"], parts["rae"], sampling={"steps": 3})
    with pytest.raises(ValueError, match="weights do not fit .*s_projector"):
        del state["s_projector.bias"]
        save_pipeline(tmp_path / "x", parts["transformer"], parts["rae"], state=state, sampling={})
    save_pipeline(tmp_path / "default", parts["transformer"], parts["rae"], sampling={})
    index = json.loads((tmp_path / "default" / "model_index.json").read_text())
    assert index["num_inference_steps"] == 50 and index["class_names"] is None
    shift = json.loads((tmp_path / "default" / "scheduler" / "scheduler_config.json").read_text())["shift"]
    assert shift == 1.0  # latents of 256 numbers


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "model_index.json").write_text("[1]"),
        lambda folder: (folder / "modeling_dit.py").unlink(),
        lambda folder: (folder / "transformer" / "modeling_dit.py").unlink(),
        lambda folder: (folder / "guide" / "config.json").unlink(),
        lambda folder: shutil.rmtree(folder / "guide"),
        lambda folder: shutil.rmtree(folder / "scheduler"),
        lambda folder: os.truncate(folder / "transformer" / "diffusion_pytorch_model.safetensors", 5000),
        lambda folder: os.truncate(folder / "rae" / "model.safetensors", 5000),
    ],
)
def test_whole_pipelines_are_told_from_others(parts, tmp_path, damage):
    folder = tmp_path / "a"
    build(parts, guide=True).save_pretrained(folder)
    assert is_whole_pipeline(folder)
    damage(folder)
    assert not is_whole_pipeline(folder)


def test_size_of_real_models():
    """The published model's shift follows from its latents."""
    with torch.device("meta"):
        assert default_shift(latent_dim(RAEDiTModel(num_layers=1))) == 48**0.5
