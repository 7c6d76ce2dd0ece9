"""Names and shapes of a checkpoint's tensors against those of a network: one line for what does not fit."""

import torch

from rae_suite.errors import ConfigError


def check_loading_info(info: dict, what: str, key: str) -> None:
    """Raise ConfigError, about `what` in the setting `key`, unless from_pretrained's loading `info` says that every
    tensor was there in its shape, and no other. Keys that `info` lacks are taken as empty."""
    for name, *shapes in sorted(info.get("mismatched_keys", ())):
        raise ConfigError(f"{key}: '{name}' of {what} has shape {tuple(shapes[0])}, expected {tuple(shapes[1])}")
    for kind, names in (("lacks", info.get("missing_keys")), ("has unexpected", info.get("unexpected_keys"))):
        if names:
            raise ConfigError(f"{key}: {what} {kind} {len(names)} keys, the first is '{min(names)}'")


def check_names(found: set, expected: set, what: str, key: str) -> None:
    """Raise ConfigError, about `what` in the setting `key`, unless it has exactly the expected names."""
    check_loading_info({"missing_keys": expected - found, "unexpected_keys": found - expected}, what, key)


def check_shapes(tensors: dict, expected: dict, what: str, key: str) -> None:
    """Raise ConfigError, about `what` in the setting `key`, unless all tensors have the expected ones' shapes and are
    numbers with a fraction."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ConfigError(f"{key}: '{name}' of {what} is no tensor of floating-point numbers")
        if tensor.shape != expected[name].shape:
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            raise ConfigError(f"{key}: '{name}' of {what} has shape {shapes[0]}, expected {shapes[1]}")
