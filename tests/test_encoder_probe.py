"""linear_probe.py on a vision encoder alone, its CLS token and some of the images; encoders that end in an RMSNorm."""

import json

import pytest
import torch
from conftest import error_line, flags, run_command, tiny_rae
from torch.nn import functional as F
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoModel, Dinov2Config, SiglipVisionConfig

from modeling_rae import RAEConfig, RAEModel
from rae_suite.autoencoders import is_encoder, load_encoder
from rae_suite.errors import ConfigError
from rae_suite.features import image_features
from rae_suite.model_loading import load_autoencoder

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
PROBE = {"train.min_steps": 20, "train.epochs": 1, "data.num_workers": 0}


def saved(folder, config):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return encoder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "dinov2"
    return folder, saved(folder, Dinov2Config(**SIZES))


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def test_features_of_an_encoder_alone(dinov2):
    """Its own tokens and CLS token, the affine part of its last norm included; an RAE's CLS token has none."""
    folder, encoder = dinov2
    assert is_encoder(str(folder)) and not is_encoder(str(folder / "absent"))
    model, pixels = load_encoder(str(folder), None), torch.rand(2, 3, 224, 224)
    assert (model.kind, model.image_size) == ("Dinov2Model", 224)
    tokens = encoder(normalised(pixels)).last_hidden_state
    for kind, expected in (("mean", tokens[:, 1:].mean(1)), ("tokens", tokens[:, 1:].mean(1)), ("cls", tokens[:, 0])):
        torch.testing.assert_close(image_features(model, pixels, kind), expected, rtol=1e-4, atol=1e-5)
    rae = RAEModel.from_encoder(str(folder), encoder_input_size=32, decoder_hidden_size=16, decoder_patch_size=8,
                                decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
                                decoder_intermediate_size=16)  # fmt: skip
    rae.save_pretrained(folder.parent / "rae")
    small = torch.rand(2, 3, 32, 32)
    hidden = encoder(normalised(small)).last_hidden_state[:, 0]
    plain = (hidden - encoder.layernorm.bias) / encoder.layernorm.weight
    found = image_features(load_autoencoder(str(folder.parent / "rae")), small, "cls")
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


def test_an_encoder_without_cls_token(tmp_path):
    saved(tmp_path / "siglip", SiglipVisionConfig(**SIZES, intermediate_size=32))
    with pytest.raises(ConfigError, match="has no CLS token"):
        load_encoder(str(tmp_path / "siglip"), 32).cls(torch.rand(1, 3, 32, 32))


def test_probe_of_an_encoder_on_some_images(dinov2, images, tmp_path):
    """From the command line, with the head evaluated again; the results say how many images there were."""
    folder, _ = dinov2
    settings = {**PROBE, "model": folder, "data.path": images, "features.kind": "cls", "features.image_size": 32,
                "num_samples": 16, "output_dir": tmp_path / "probe"}  # fmt: skip
    run_command("linear_probe.py", *flags(settings))
    results = json.loads((tmp_path / "probe/results.json").read_text())
    assert results["num_samples"] == 8 and results["feature_width"] == 16
    assert (results["model_kind"], results["image_size"]) == ("Dinov2Model", 32)
    head = json.loads((tmp_path / "probe/head/config.json").read_text())
    assert head["num_train_samples"] == 16 and head["features"] == "cls"
    again = run_command("linear_probe.py", "--eval_only", "--head", tmp_path / "probe/head", "--data.path", images,
                        "--data.num_workers", 0, "--output_dir", tmp_path / "again", "--num_samples", 4)  # fmt: skip
    assert "evaluation split: 4 of 8 images of validation" in again.stdout
    done = run_command("linear_probe.py", *flags({**settings, "features.image_size": 33}), check=False)
    assert done.returncode == 2 and "(33) must be a multiple of the encoder's patch size (8)" in error_line(done.stderr)


# RMSNorm --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_latents_of_an_encoder_that_ends_in_an_rms_norm(tmp_path, layers):
    """AIMv2's: normalised by their root mean square, without its weight, and back from a folder."""
    encoder = saved(tmp_path / "aimv2", Aimv2VisionConfig(**SIZES, intermediate_size=32, use_head=False))
    assert isinstance(encoder, Aimv2VisionModel)
    decoder = dict(decoder_hidden_size=16, decoder_patch_size=8, decoder_num_hidden_layers=1,
                   decoder_num_attention_heads=1, decoder_intermediate_size=16)  # fmt: skip
    rae = RAEModel.from_encoder(str(tmp_path / "aimv2"), encoder_input_size=32, encoder_layers=layers, **decoder)
    pixels = torch.rand(2, 3, 32, 32)
    outputs = []
    for block in encoder.encoder.layers:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    encoder(normalised(pixels))
    chosen = outputs if layers else outputs[-1:]
    eps = encoder.config.rms_norm_eps
    expected = torch.stack([F.rms_norm(hidden, (16,), eps=eps) for hidden in chosen]).mean(0)
    latent = rae.eval().encode(pixels).latent
    torch.testing.assert_close(latent, expected.transpose(1, 2).unflatten(2, (4, 4)), rtol=1e-4, atol=1e-5)
    rae.save_pretrained(tmp_path / "rae")
    assert torch.equal(RAEModel.from_pretrained(tmp_path / "rae").encode(pixels).latent, latent)


def test_a_norm_of_another_kind_is_refused():
    config = dict(tiny_rae().config.encoder_config.to_dict())
    with pytest.raises(ValueError, match=r"the LayerNorm or RMSNorm after the last block of .*\['layernorm'\]"):
        RAEModel(RAEConfig(encoder_config=config, encoder_input_size=32, encoder_final_norm="embeddings",
                           decoder_hidden_size=16, decoder_num_attention_heads=1, decoder_patch_size=8))  # fmt: skip
