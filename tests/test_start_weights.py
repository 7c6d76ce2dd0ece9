"""model.init_from and gan.init_from of train_rae.py: whatever a decoder can be read from, of this grid or another."""

import json
import shutil

import pytest
import torch
from conftest import PLAIN, error_line, flags, run_command, same, tiny_rae
from diffusers import AutoencoderRAE
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_rae import RAEConfig
from rae_suite.checkpoints import checkpoints
from rae_suite.errors import ConfigError
from rae_suite.position_tables import interpolated_table
from rae_suite.start_weights import read_decoder_start


def train(images, run_dir, check=True, **settings):
    settings = {**PLAIN, "data.path": images, "train.output_dir": run_dir, "train.max_steps": "1", **settings}
    return run_command("train_rae.py", *flags(settings), check=check)


@pytest.fixture(scope="module")
def run_dir(images, tmp_path_factory):
    """A finished run of two steps, whose discriminator has learnt."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(images, folder, **{"train.max_steps": "2", "gan.update_start_step": "0"})
    return folder


def test_a_run_from_a_checkpoint_of_another_grid(run_dir, images, tmp_path):
    """The averaged decoder, its table interpolated, which is said; and the discriminator. The run then goes on where
    the checkpoint is gone."""
    source = shutil.copytree(run_dir, tmp_path / "source")
    [last] = checkpoints(source)[-1:]
    settings = {"model.init_from": last, "gan.init_from": source, "optimizer.lr": "1.0e-20", "lr_schedule.final_lr": 0,
                "gan.update_start_step": "9", "gan.start_step": "9", "model.encoder_input_size": "64",
                "model.image_size": "64", "data.resize_size": "none"}  # fmt: skip
    done = train(images, tmp_path / "large", **settings)
    assert f"note: the position table of {last} is interpolated from 8 x 8 to 16 x 16 tokens" in done.stdout
    assert f"gan.init_from {source}: checkpoint {last}" in done.stdout
    [own] = checkpoints(tmp_path / "large")
    found, start = load_file(own / "decoder.safetensors"), load_file(last / "ema.safetensors")
    assert same(found, {**start, "decoder_pos_embed": interpolated_table(start["decoder_pos_embed"], 16)})
    heads = load_file(last / "discriminator.safetensors")
    assert same(load_file(own / "discriminator.safetensors"), heads)

    shutil.rmtree(source)
    train(images, tmp_path / "large", **{**settings, "train.max_steps": "2"})
    done = train(images, tmp_path / "new", check=False, **settings)
    assert f"model.init_from: {last} is no checkpoint in a run folder" in error_line(done.stderr)


def test_an_interpolated_table():
    """Bicubic on the grid, row by row, CLS apart; constants stay, and the same grid is the same table."""
    table = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    found = interpolated_table(table, 6)
    assert found.shape == (1, 37, 8) and torch.equal(found[:, 0], table[:, 0])
    channel = F.interpolate(table[0, 1:, 5].view(1, 1, 4, 4), size=(6, 6), mode="bicubic")
    torch.testing.assert_close(found[0, 1:, 5].view(6, 6), channel[0, 0])
    torch.testing.assert_close(interpolated_table(table, 4), table)
    torch.testing.assert_close(interpolated_table(torch.ones(1, 17, 8), 9), torch.ones(1, 82, 8))


def test_decoders_of_every_kind(tmp_path, capsys):
    """A folder, a published decoder, the average in a published training checkpoint, diffusers' AutoencoderRAE."""
    model = tiny_rae()
    expected = dict(model.decoder.state_dict())
    model.save_pretrained(tmp_path / "rae")
    torch.save(expected, tmp_path / "model.pt")
    raw = {f"decoder.{name}": tensor + 1 for name, tensor in expected.items()}
    torch.save({"model": raw, "ema": {name: t - 1 for name, t in raw.items()}}, tmp_path / "ep-0000002.pt")
    for name in ("rae", "model.pt", "ep-0000002.pt"):
        found = read_decoder_start(str(tmp_path / name), model.config)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, msg=key)
    torch.manual_seed(1)
    sizes = dict(encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14, encoder_input_size=224)
    decoder = dict(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3)
    theirs = AutoencoderRAE("dinov2", **sizes, **decoder, decoder_intermediate_size=40, patch_size=2)
    theirs.save_pretrained(tmp_path / "theirs")
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 64, "num_attention_heads": 1, "patch_size": 14}
    config = RAEConfig(encoder, decoder_patch_size=2, **decoder, decoder_intermediate_size=40)
    found = read_decoder_start(str(tmp_path / "theirs"), config)
    assert torch.equal(found["decoder_embed.weight"], theirs.decoder.decoder_embed.weight)
    capsys.readouterr()
    config.encoder_input_size = 112
    assert read_decoder_start(str(tmp_path / "theirs"), config)["decoder_pos_embed"].shape == (1, 65, 24)
    assert "interpolated from 16 x 16 to 8 x 8 tokens" in capsys.readouterr().out


def test_decoders_that_do_not_fit(run_dir, tmp_path):
    """The first difference, with both values, whatever the decoder is read from."""
    model, last = tiny_rae(), checkpoints(run_dir)[-1]
    model.save_pretrained(tmp_path / "rae")
    torch.save(dict(model.decoder.state_dict()), tmp_path / "model.pt")

    def refused(source, **changes) -> str:
        config = RAEConfig(**{**model.config.to_dict(), **changes})
        with pytest.raises(ConfigError, match="^model.init_from: ") as caught:
            read_decoder_start(str(source), config)
        return str(caught.value)

    for source in (tmp_path / "rae", tmp_path / "model.pt"):
        message = refused(source, decoder_num_hidden_layers=3)
        assert message.endswith(
            f"{source} is of another architecture: its decoder_num_hidden_layers is 1, this run's is 3"
        )
    assert "its decoder_num_attention_heads is 2, this run's is 4" in refused(
        tmp_path / "rae", decoder_num_attention_heads=4
    )
    assert "its denormalize_output is True, this run's is False" in refused(tmp_path / "rae", denormalize_output=False)
    assert "its latent_channels is 64, this run's is 16" in refused(last)
    (tmp_path / "notes").mkdir()
    assert "has no config.json" in refused(tmp_path / "notes")


def test_discriminators_that_do_not_fit(run_dir, images, tmp_path):
    """Of other heads, of another backbone, and where there is none: before the first step."""
    last = checkpoints(run_dir)[-1]

    def refused(source, **settings) -> str:
        done = train(images, tmp_path / "run", check=False, **{"gan.init_from": source, **settings})
        assert not (tmp_path / "run").exists()
        return error_line(done.stderr)

    line = refused(last, **{"gan.kernel_size": 3})
    assert "gan.init_from: '" in line and "of the discriminator of this checkpoint has shape" in line
    assert "gan.init_from: expected nothing unless gan.weight is above 0" in refused(last, **{"gan.weight": 0})
    assert "is no checkpoint or run folder of train_rae.py" in refused(run_dir / "final")
    other = shutil.copytree(run_dir, tmp_path / "other")
    state = json.loads((checkpoints(other)[-1] / "state.json").read_text())
    state["frozen"]["gan.backbone"] = "another"
    (checkpoints(other)[-1] / "state.json").write_text(json.dumps(state))
    assert "expected a discriminator on this run's gan.backbone, it is on another" in refused(other)
    (checkpoints(other)[-1] / "discriminator.safetensors").unlink()
    assert "has no discriminator: gan.weight was 0 in its run" in refused(other)
