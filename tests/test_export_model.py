"""scripts/export_model.py: programs that compute what the model does, for any batch, without this repository."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import error_line, run_command, tiny_rae

from rae_suite.errors import RunError
from scripts import export_model

ONNX_IS_THERE = all(importlib.util.find_spec(name) for name in export_model.ONNX_PACKAGES)


def saved(folder, **settings):
    model = tiny_rae(**settings).eval()
    if model.config.use_latent_stats:
        model.set_latent_stats(torch.randn(16, 4, 4), torch.rand(16, 4, 4) + 0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_latent_stats": True}])
def test_exported_programs_give_the_same_numbers(tmp_path, settings):
    """To the last bit, for batches that were not compared, and in a process that knows nothing of this repository."""
    model = saved(tmp_path / "rae", **settings)
    done = run_command("scripts/export_model.py", "--model", tmp_path / "rae", "--output", tmp_path / "out")
    assert done.stdout.count("differs from the model by 0\n") == 2, done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encode.pt2", "decode.pt2", "export.json"}
    pixels = torch.rand(5, 3, 32, 32)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import torch\n"
        "encode, decode = (torch.export.load(f'out/{n}.pt2').module() for n in ('encode', 'decode'))\n"
        "pixels = torch.load('pixels.pt')\n"
        "torch.save([(encode(p), decode(encode(p))) for p in (pixels, pixels[:1])], 'found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    with torch.no_grad():
        for batch, (latent, sample) in zip((pixels, pixels[:1]), torch.load(tmp_path / "found.pt"), strict=True):
            expected = model.encode(batch).latent
            assert torch.equal(latent, expected) and torch.equal(sample, model.decode(expected).sample)
    assert json.loads((tmp_path / "out/export.json").read_text())["latent_shape"] == [16, 4, 4]


def test_a_program_that_differs_is_not_written(monkeypatch, tmp_path):
    model = tiny_rae().eval()
    part = export_model.Decode(model)
    with torch.no_grad(), pytest.raises(RunError, match="decode.pt2 differs from the model by 0.0"):
        export_model.compared(lambda z: part(z) + 1e-3, part, torch.randn(3, 16, 4, 4), "decode.pt2")
    assert export_model.difference(torch.full((2,), torch.nan), torch.zeros(2)) == float("inf")


@pytest.mark.skipif(ONNX_IS_THERE, reason="the packages of requirements-extra.txt are installed")
def test_onnx_without_its_packages(tmp_path):
    """One line, before the model is looked for."""
    line = ("scripts/export_model.py", "--model", tmp_path / "absent", "--output", tmp_path / "out", "--onnx")
    done = run_command(*line, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert error_line(done.stderr).startswith("error: onnx: expected false, or its packages (pip install -r ")


@pytest.mark.skipif(not ONNX_IS_THERE, reason="the packages of requirements-extra.txt are not installed")
def test_onnx(tmp_path):
    model = saved(tmp_path / "rae")
    run_command("scripts/export_model.py", "--model", tmp_path / "rae", "--output", tmp_path / "out", "--onnx")
    import onnxruntime

    pixels = torch.rand(5, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(tmp_path / "out/encode.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model.encode(pixels).latent.detach(), atol=1e-5, rtol=1e-5)


def test_a_folder_of_other_files_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_command("scripts/export_model.py", "--model", tmp_path, "--output", tmp_path, check=False)
    assert "error: output: expected a new folder, or one of an earlier export" in done.stderr
