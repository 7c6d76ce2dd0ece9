"""train.deterministic: two runs are equal bit for bit, and nothing in a training step raises under it on a GPU."""

import os

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, checkpoint_state, run_ranks, same
from test_train import take_steps, tiny_run
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rae_suite.launch import compute_deterministically

# Operations without a deterministic algorithm on a GPU, from the documentation of torch.use_deterministic_algorithms
# (2.14) and the names that libtorch_cuda.so has for its errors. Those of a training step that one might look for here
# and that are deterministic: gather's backward (DiffAug's shift) goes through index_put, circular padding is copies,
# max_pool2d's backward (VGG16) sums without atomics, attention's backward has deterministic algorithms.
RAISING = (
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "_embedding_bag_backward",
    "put_",
    "histc",
    "bincount",
    "median",
    "kthvalue",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "scatter_reduce",
)


class Recorder(TorchDispatchMode):
    """Names of the operations that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    compute_deterministically()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_two_runs_are_equal(images, tmp_path):
    """Every tensor of the last checkpoint, after runs with two threads and two processes that load the data."""
    settings = {
        **TINY,
        "train.deterministic": "true",
        "train.cpu_threads": "2",
        "train.max_steps": "4",
        "data.path": images,
        "data.num_workers": "2",
        "data.resize_size": "18",
        "model.image_size": "16",  # VGG16 is slow
        "model.encoder_input_size": "16",
        "eval.metrics": "[psnr]",
    }
    runs = [tmp_path / name for name in ("a", "b")]
    argvs = [["train_rae.py", {**settings, "train.output_dir": run}] for run in runs]
    results = run_ranks(*({"folder": tmp_path / "said", "processes": 1, "argv": argv} for argv in argvs))
    assert all(result["ends"] == [{"code": 0, "seconds": 0}] for result in results), results
    assert same(*(checkpoint_state(run) for run in runs))


def test_no_operation_of_a_step_raises_on_a_gpu(images, deterministic):
    """All operations of steps with every loss on, compared with what torch says to be without a deterministic
    algorithm. The discriminator's resizing is the one among them: torch replaces it on a GPU, see below."""
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    settings = {
        "perceptual.weight": "1",
        "perceptual.start_step": "0",
        "gan.start_step": "0",
        "gan.update_start_step": "0",
        "gan.augment_cutout": "0.2",
        "train.clip_grad_norm": "1",
    }
    run = tiny_run(images, Accelerator(cpu=True), **settings)
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Recorder() as recorder:
        (record,), _ = take_steps(run, pixels, 2, steps=1)
    assert record["nonfinite"] is None and record["gan"] != 0 and record["lpips"] > 0 and record["disc_loss"] > 0
    seen = recorder.names
    assert {
        "gather",
        "max_pool2d_with_indices_backward",
        "convolution_backward",
    } <= seen  # backward passes are seen too
    assert seen & set(RAISING) == {"upsample_bilinear2d_backward"}


def test_the_discriminators_resizing_is_replaced(deterministic):
    """On a GPU (here tensors that claim to be on one) F.interpolate then computes with indices, whose backward pass is
    deterministic; the numbers stay."""
    with FakeTensorMode(), Recorder() as recorder:
        F.interpolate(torch.empty(1, 3, 32, 32, device="cuda"), size=(48, 48), mode="bilinear", align_corners=False)
    assert "upsample_bilinear2d" not in recorder.names and {"_unsafe_index", "index"} & recorder.names
    replacement = torch._decomp.decompositions._upsample_linear_vec
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    usual = F.interpolate(images, size=(48, 48), mode="bilinear", align_corners=False)
    with Recorder() as recorder:
        replaced = replacement(images, [48, 48], False, None)
        (gradient,) = torch.autograd.grad((replaced * weights).sum(), images)
    torch.testing.assert_close(replaced, usual)
    torch.testing.assert_close(gradient, torch.autograd.grad((usual * weights).sum(), images)[0])
    assert not recorder.names & set(RAISING)
