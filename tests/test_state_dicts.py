"""rae_suite/state_dicts.py: the first tensor that does not fit, in one line with the setting's name."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from rae_suite.errors import ConfigError
from rae_suite.model_loading import load_autoencoder
from rae_suite.state_dicts import check_loading_info, check_names, check_shapes


@pytest.mark.parametrize(
    "info, words",
    [
        ({"missing_keys": {"b", "a"}}, "key: the file lacks 2 keys, the first is 'a'"),
        ({"unexpected_keys": ["c"], "missing_keys": []}, "key: the file has unexpected 1 keys, the first is 'c'"),
        (
            {"mismatched_keys": [("w", torch.Size([2]), torch.Size([3]))], "missing_keys": ["a"]},
            "key: 'w' of the file has shape (2,), expected (3,)",
        ),
    ],
)
def test_loading_info(info, words):
    with pytest.raises(ConfigError) as caught:
        check_loading_info(info, "the file", "key")
    assert str(caught.value) == words
    check_loading_info({"missing_keys": [], "unexpected_keys": set(), "mismatched_keys": []}, "the file", "key")


def test_names_and_shapes():
    expected = {"a": torch.ones(2), "b": torch.ones(3)}
    check_names(set(expected), set(expected), "it", "key")
    check_shapes({"a": torch.zeros(2).half()}, expected, "it", "key")
    for found, words in (({"a"}, "lacks 1 keys, the first is 'b'"), ({"a", "b", "c"}, "has unexpected 1 keys")):
        with pytest.raises(ConfigError, match=words):
            check_names(found, set(expected), "it", "key")
    for tensor, words in (
        (torch.ones(3), r"key: 'a' of it has shape \(3,\), expected \(2,\)"),
        (torch.ones(2, dtype=torch.int64), "key: 'a' of it is no tensor of floating-point numbers"),
        (1.0, "key: 'a' of it is no tensor"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_shapes({"a": tensor}, expected, "it", "key")


def test_a_model_of_diffusers_with_other_tensors(tmp_path):
    """Loading is strict, and says what is missing or too much."""
    AutoencoderKL(block_out_channels=(32,), latent_channels=2).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"^model: {tmp_path} lacks 1 keys, the first is '{first}'$"):
        load_autoencoder(str(tmp_path))
    save_file({**tensors, "extra": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"^model: {tmp_path} has unexpected 1 keys, the first is 'extra'$"):
        load_autoencoder(str(tmp_path))
