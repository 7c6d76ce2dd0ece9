"""losses.py, discriminator.py, ema.py and metrics.py: formulas, gradients and error messages. Seconds on a CPU."""

import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from modeling_rae import RAEConfig, RAEModel
from rae_suite.discriminator import DiffAug, DinoDiscriminator, SpectralConv1d, diff_augment, load_backbone
from rae_suite.ema import EMA
from rae_suite.errors import ConfigError
from rae_suite.losses import (
    generator_gradient,
    generator_loss,
    hinge_discriminator_loss,
    l1,
    perceptual_loss,
    to_discriminator_range,
    vanilla_discriminator_loss,
)
from rae_suite.lpips_vgg16 import build_lpips, random_vgg16_state
from rae_suite.metric_names import PSNR_CAP
from rae_suite.metrics import Evaluator, image_metrics, quantize

BACKBONE = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, patch_size=8, image_size=32
)
TERMS = ("loss", "recon", "lpips", "gan", "adaptive_weight")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=seeded(seed))


def vit(seed=0):
    torch.manual_seed(seed)
    network = load_backbone("", "random", BACKBONE)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval()


def discriminator(**changes):
    network = vit()
    torch.manual_seed(1)
    return DinoDiscriminator(network, **{"key_depths": (0, 2), "kernel_size": 3, **changes})


@pytest.fixture(scope="module")
def lpips():
    return build_lpips("random")


@pytest.fixture
def rae():
    """16 tokens to 32 px."""
    torch.manual_seed(0)
    encoder = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RAEConfig(
        encoder_config={**encoder, "image_size": 16, "patch_size": 4, "mlp_ratio": 1},
        encoder_input_size=16,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        decoder_patch_size=8,
        attn_implementation="eager",
    )
    model = RAEModel(config)
    for parameter in model.decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


# The generator's gradient ---------------------------------------------------------------------------------------------


def published_step(rae, latent, pixels, perceptual, perceptual_weight, adversary, gan_weight, maximum):
    """The definition: one differentiable loss; the last layer's weight is differentiated for the adaptive weight, then
    everything again. Fills the decoder's gradients; returns the terms."""
    reconstruction = rae.decode(latent).sample
    zero = torch.zeros((), dtype=latent.dtype)
    recon = (reconstruction - pixels).abs().mean()
    perceived = perceptual(2 * pixels - 1, 2 * reconstruction - 1).mean() if perceptual else zero
    base = recon + perceptual_weight * perceived
    gan, w = zero, zero
    if adversary:
        gan = -adversary(2 * reconstruction - 1).mean()
        last = rae.decoder.decoder_pred.weight
        (base_gradient,) = torch.autograd.grad(base, last, retain_graph=True)
        (gan_gradient,) = torch.autograd.grad(gan, last, retain_graph=True)
        w = torch.clamp(base_gradient.norm() / (gan_gradient.norm() + 1e-6), 0, maximum).detach()
    total = base + gan_weight * w * gan
    total.backward()
    return dict(zip(TERMS, (total, recon, perceived, gan, w), strict=True))


def one_pass_step(rae, latent, pixels, lpips=None, perceptual_weight=1.0, *adversarial, **options):
    out = rae.decode(latent, return_last_layer=True)
    losses = {"recon": (1.0, l1), "lpips": (perceptual_weight, None if lpips is None else perceptual_loss(lpips))}
    gradient, terms = generator_gradient(
        out.patches, out.last_hidden_state, rae.patches_to_pixels, pixels, losses, *adversarial, **options
    )
    out.patches.backward(gradient)
    return terms


def take_gradients(rae):
    gradients = {name: p.grad for name, p in rae.decoder.named_parameters() if p.grad is not None}
    rae.zero_grad()
    return gradients


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("maximum, perceptual_weight", [(1e4, 0.3), (0.005, 1.0)])
def test_generator_gradient_is_the_published_double_backward(rae, lpips, maximum, perceptual_weight):
    """One backward through each network gives the terms, the adaptive weight (also where its clamp binds) and every
    decoder gradient of the published two passes; the discriminator and LPIPS collect no gradient."""
    judge = discriminator().eval()
    latent, pixels = torch.randn(2, 16, 4, 4, generator=seeded()), images()
    arguments = (lpips, perceptual_weight, judge, 0.75, maximum)
    terms = one_pass_step(rae, latent, pixels, *arguments)
    ours = take_gradients(rae)
    assert all(parameter.grad is None for parameter in [*judge.parameters(), *lpips.parameters()])
    expected = published_step(rae, latent, pixels, *arguments)
    reference = take_gradients(rae)
    assert (expected["adaptive_weight"] == maximum) == (maximum == 0.005) and expected["lpips"] > 0
    for name in TERMS:
        value = terms[name]
        assert not value.requires_grad and value.shape == ()
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-7, msg=name)
    assert ours.keys() == reference.keys() and len(ours) == sum(p.requires_grad for p in rae.decoder.parameters())
    largest = max(gradient.norm() for gradient in reference.values())
    for name, gradient in reference.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * largest, name


def test_generator_gradient_in_float64(rae):
    """With smooth stand-ins for the networks: equal to 1e-8, the float32 norms of the adaptive weight apart."""
    rae = rae.double()
    torch.manual_seed(2)
    judge = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Tanh(), nn.Conv2d(4, 1, 3)).double()
    look = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()).double().requires_grad_(False)
    latent, pixels = torch.randn(2, 16, 4, 4, generator=seeded()).double(), images().double()

    def perceptual(first, second):
        return (look(first) - look(second)).square().mean(dim=(1, 2, 3))

    arguments = (perceptual, 0.5, judge, 0.75, 1e4)
    terms = one_pass_step(rae, latent, pixels, *arguments)
    ours = take_gradients(rae)
    assert all(parameter.grad is None for parameter in judge.parameters())
    expected = published_step(rae, latent, pixels, *arguments)
    w = expected["adaptive_weight"].item()
    assert terms["adaptive_weight"].item() == pytest.approx(w, rel=1e-6)
    for name in ("recon", "lpips", "gan"):
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-12), name
    rae.zero_grad()
    # gradients of the definition with the adversarial term's factor as it was applied
    factor = (0.75 * terms["adaptive_weight"]).item()
    published_step(rae, latent, pixels, perceptual, 0.5, judge, factor / w, 1e4)
    for name, gradient in take_gradients(rae).items():
        assert relative(ours[name], gradient) < 1e-8, name


@pytest.mark.parametrize("use_perceptual, use_gan", [(False, False), (True, False), (False, True)])
def test_terms_that_are_off_are_zero(rae, lpips, use_perceptual, use_gan):
    """A term that is off is 0, weighs nothing and leaves the gradient of the others."""
    judge = discriminator().eval()
    latent, pixels = torch.randn(2, 16, 4, 4, generator=seeded()), images()
    arguments = (lpips if use_perceptual else None, 1.0, judge if use_gan else None, 0.75, 1e4)
    terms = one_pass_step(rae, latent, pixels, *arguments)
    ours = take_gradients(rae)
    assert (terms["lpips"] != 0) == use_perceptual
    assert (terms["gan"] != 0) == (terms["adaptive_weight"] != 0) == use_gan
    expected = published_step(rae, latent, pixels, *arguments)
    torch.testing.assert_close(terms["loss"], expected["loss"].detach())
    for name, gradient in take_gradients(rae).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_loss_scaling_scales_the_gradient_alone(rae):
    """With fp16's loss scale the gradient is scaled, terms and adaptive weight are not."""
    network = discriminator().eval()

    def judge(x):
        return 1e-5 * network(x)  # so weak that the epsilon of the adaptive weight counts

    latent, pixels = torch.randn(2, 16, 4, 4, generator=seeded()), images()
    plain = one_pass_step(rae, latent, pixels, adversary=judge)
    expected = take_gradients(rae)
    scaled = one_pass_step(rae, latent, pixels, adversary=judge, scale_loss=lambda loss: loss * 1024)
    for name in TERMS:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-6, atol=0, msg=name)
    for name, gradient in take_gradients(rae).items():
        torch.testing.assert_close(gradient / 1024, expected[name], rtol=1e-5, atol=1e-8, msg=name)


def test_adversarial_losses():
    """Hinge, vanilla and generator loss against numbers worked out by hand, for logits of any shape."""
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [1.0, -0.5]])
    # relu(1 - real) = 0, .5, 2, 0; relu(1 + fake) = 0, 1, 2, .5
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    expected = 0.5 * (np.log1p(np.exp(-real.double())).mean() + np.log1p(np.exp(fake.double())).mean())
    assert vanilla_discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-6)
    assert hinge_discriminator_loss(real.flatten(), fake.flatten()) == hinge_discriminator_loss(real, fake)
    assert generator_loss(fake).item() == pytest.approx(1.5 / 4)


def test_eight_bit_grids():
    """to_discriminator_range maps all 256 grey values onto themselves in [-1, 1], clamps, and rounds to the nearest;
    quantize does the same in [0, 1]."""
    grid = torch.arange(256) / 255
    torch.testing.assert_close(to_discriminator_range(grid), 2 * grid - 1, rtol=0, atol=1e-6)
    off = torch.tensor([-0.3, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.2])
    expected = torch.tensor([0, 0, 1, 254, 255.0])
    torch.testing.assert_close((to_discriminator_range(off) + 1) * 127.5, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(quantize(off) * 255, expected, rtol=0, atol=1e-4)
    assert torch.equal(quantize(grid), grid) and quantize(grid.bfloat16()).dtype == torch.float32


# Discriminator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, out_channels", [(1, 6), (9, 6), (1, 1)])
def test_spectral_convolution_is_torchs(kernel, out_channels):
    """Outputs, gradients, u and v of torch.nn.utils.spectral_norm on a circular Conv1d, forward by forward; nothing
    moves in eval mode; two forwards before one backward are allowed."""
    ours = SpectralConv1d(6, out_channels, kernel)
    conv = nn.Conv1d(6, out_channels, kernel, padding=kernel // 2, padding_mode="circular")
    theirs = nn.utils.spectral_norm(conv, n_power_iterations=1, eps=1e-12, dim=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    for step, training in enumerate([True, True, False, False, True, True]):
        x, y = torch.randn(2, 6, 12), torch.randn(3, 6, 12)
        before = ours.weight_u.clone()
        outputs, gradients = [], []
        for module in (ours, theirs):
            module.train(training).zero_grad()
            first, second = module(x), module(y)
            (first.square().sum() + second.sum()).backward()
            outputs += [first, second]
            gradients += [module.weight_orig.grad, module.bias.grad]
        torch.testing.assert_close(outputs[:2], outputs[2:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-4, atol=1e-4)
        for name in ("weight_u", "weight_v"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(before, ours.weight_u) == (not training) or out_channels == 1, step


@pytest.mark.parametrize("norm", ["per_sample", "group"])
def test_discriminator(norm):
    """A logit for each token of each map; only heads learn and train() leaves the backbone alone; a pair gives what two
    single calls give, spectral vectors included; per-sample norm does not mix samples."""
    judge = discriminator(norm=norm).train()
    assert judge.training and judge.heads.training
    assert not any(module.training for module in judge.backbone.modules())
    assert {name.split(".")[0] for name, p in judge.named_parameters() if p.requires_grad} == {"heads"}
    fake, real = 2 * images(seed=1) - 1, 2 * images(3, seed=2) - 1
    start = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    pair = judge(fake, real)
    assert pair[0].shape == (2, 3 * 16) and pair[1].shape == (3, 3 * 16)
    hinge_discriminator_loss(pair[1], pair[0]).backward()
    assert all(p.grad is not None for p in judge.heads.parameters())
    assert all(p.grad is None for p in judge.backbone.parameters())
    after = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    judge.load_state_dict(start)
    for logits, single in zip(pair, (judge(fake), judge(real)), strict=True):
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, dict(judge.state_dict()), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in after.items())  # power iterations happened

    judge.eval()
    torch.testing.assert_close(judge(real)[:1], judge(real[:1]), rtol=1e-4, atol=1e-5)
    kind = nn.GroupNorm if norm == "group" else type(judge.heads[0][0][1])
    norms = [module for module in judge.heads.modules() if isinstance(module, kind)]
    assert len(norms) == 6  # two a head
    x = 3 * torch.randn(2, 32, 50) + 1
    torch.testing.assert_close(norms[0](x).mean(dim=2), torch.zeros(2, 32), rtol=0, atol=1e-5)  # 32 groups of one
    torch.testing.assert_close(norms[0](x).var(dim=2, correction=0), torch.ones(2, 32), rtol=0, atol=1e-4)


def test_discriminator_heads_by_hand():
    """A head is conv(1) - norm - LeakyReLU, a residual block divided by sqrt(2), conv(1); images are resized and
    normalised with ImageNet's mean and std; without spectral norm the convolutions are plain."""
    judge = discriminator(spectral_norm=False, key_depths=(1,)).eval()
    x = 2 * images(size=48) - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    small = F.interpolate((x + 1) / 2, (32, 32), mode="bilinear", align_corners=False)
    normalised = (small - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    hidden = judge.backbone.vit(normalised, output_hidden_states=True).hidden_states
    logits = []
    for head, tokens in zip(judge.heads, (hidden[3], hidden[2]), strict=True):
        state = head.state_dict()

        def block(x, prefix, kernel, state=state):
            x = torch.cat([x[..., x.shape[-1] - kernel // 2 :], x, x[..., : kernel // 2]], dim=-1) if kernel > 1 else x
            x = F.conv1d(x, state[f"{prefix}.0.weight"], state[f"{prefix}.0.bias"])
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
            return F.leaky_relu(x * state[f"{prefix}.1.weight"][:, None] + state[f"{prefix}.1.bias"][:, None], 0.2)

        y = block(tokens[:, 1:].transpose(1, 2), "0", 1)
        y = (block(y, "1.fn", 3) + y) / 2**0.5
        logits.append(F.conv1d(y, state["2.weight"], state["2.bias"]).squeeze(1))
    torch.testing.assert_close(judge(x), torch.cat(logits, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key_depths": (0, 3)}, "gan.key_depths.*3.*has 3"),
        ({"key_depths": (-1,)}, "gan.key_depths.*-1"),
    ],
)
def test_discriminator_settings_that_cannot_be(changes, message):
    """Errors name the setting and the value."""
    with pytest.raises(ValueError, match=message):
        discriminator(**changes)


def test_group_norm_needs_a_width_that_divides():
    """32 groups do not divide a width of 48."""
    network = load_backbone("", "random", {**BACKBONE, "hidden_size": 48})
    with pytest.raises(ValueError, match="gan.norm.*32.*48"):
        DinoDiscriminator(network, (0,), norm="group")


def timm_state(network):
    """The ViT's weights under timm's names, with the classifier that published files have."""
    state = network.state_dict()
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
        "head.weight": torch.zeros(10, 32),
    }
    for i in range(network.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            source = {name.removeprefix(f"layers.{i}."): t for name, t in state.items() if f"layers.{i}." in name}
            qkv = [source[f"attention.{part}_proj.{kind}"] for part in "qkv"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            out[f"blocks.{i}.attn.proj.{kind}"] = source[f"attention.o_proj.{kind}"]
            out[f"blocks.{i}.norm1.{kind}"] = source[f"layernorm_before.{kind}"]
            out[f"blocks.{i}.norm2.{kind}"] = source[f"layernorm_after.{kind}"]
            out[f"blocks.{i}.mlp.fc1.{kind}"] = source[f"mlp.fc1.{kind}"]
            out[f"blocks.{i}.mlp.fc2.{kind}"] = source[f"mlp.fc2.{kind}"]
    return out


def test_backbone_files(tmp_path):
    """A .pth and a .safetensors file with timm's names, and a transformers folder, are the same network; frozen
    settings win over a folder's config."""
    network = vit()
    state = timm_state(network)
    torch.save(state, tmp_path / "dino.pth")
    save_file(state, tmp_path / "dino.safetensors")
    network.config.hidden_act = "gelu"  # as facebook/dino-vits8 says
    network.save_pretrained(tmp_path / "folder")
    x = images()
    expected = network(x).last_hidden_state
    for source in ("dino.pth", "dino.safetensors", "folder"):
        loaded = load_backbone(str(tmp_path / source), num_attention_heads=2).eval()
        assert (loaded.config.hidden_act, loaded.config.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
        assert loaded.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(t, network.state_dict()[name]) for name, t in loaded.state_dict().items()), source
        torch.testing.assert_close(loaded(x).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [load_backbone, lambda path: build_lpips("pretrained", path)])
def test_weight_files_run_no_code(tmp_path, load):
    """A .pth with a pickled object is refused before anything in it runs."""
    torch.save({"pos_embed": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="(gan.backbone|perceptual.vgg_path): .*trap.pth is no file of tensors"):
        load(str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()
    with open(tmp_path / "trap.pth", "rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_broken_weight_files(tmp_path):
    """Text, a cut-off file and a list are one line that names setting and file, not a traceback of the reader."""
    (tmp_path / "text.pth").write_text("no weights")
    save_file({"a": torch.zeros(100)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-40])
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, found in (("text.pth", "no file"), ("cut.safetensors", "no file"), ("list.pth", "holds a list")):
        with pytest.raises(ValueError, match=f"gan.backbone: .*{name} .*{found}|gan.backbone: .*{name} {found}"):
            load_backbone(str(tmp_path / name))
        with pytest.raises(ValueError, match=f"perceptual.vgg_path: .*{name}"):
            build_lpips("pretrained", str(tmp_path / name))


def test_backbone_files_that_cannot_be_used(tmp_path):
    """A file of something else, a file with lost weights and no file at all name gan.backbone."""
    state = timm_state(vit())
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="gan.backbone.*other.pth"):
        load_backbone(str(tmp_path / "other.pth"))
    lost = "blocks.1.norm1.bias"
    save_file({name: t for name, t in state.items() if name != lost}, tmp_path / "lost.safetensors")
    with pytest.raises(ValueError, match="gan.backbone.*layernorm_before.bias"):
        load_backbone(str(tmp_path / "lost.safetensors"), num_attention_heads=2)
    distilled = {**state, "pos_embed": torch.cat([state["pos_embed"], state["pos_embed"][:, :1]], dim=1)}
    save_file(distilled, tmp_path / "distilled.safetensors")
    with pytest.raises(ValueError, match="gan.backbone: 'embeddings.position_embeddings'.*shape"):
        load_backbone(str(tmp_path / "distilled.safetensors"), num_attention_heads=2)
    with pytest.raises(ValueError, match="gan.backbone.*wide, expected a multiple of 64"):
        load_backbone(str(tmp_path / "lost.safetensors"))
    other = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1))
    other.save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="gan.backbone: .*model_type 'dinov2', expected 'vit'"):
        load_backbone(str(tmp_path / "dinov2"))
    vit().save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    with pytest.raises(ValueError, match="gan.backbone: .*has shape.*expected"):
        load_backbone(str(tmp_path / "vit"))
    with pytest.raises(OSError, match="gan.backbone.*nowhere.pth"):
        load_backbone(str(tmp_path / "nowhere.pth"))
    with pytest.raises(OSError, match="no_folder"):
        load_backbone(str(tmp_path / "no_folder"))


# DiffAug --------------------------------------------------------------------------------------------------------------


def test_diffaug_coins_and_randomness():
    """Probability 0 is the identity and draws nothing; 1 is a function of the generator; between, each transform is
    switched by a coin of its own."""
    x = images(4)
    generator = seeded(3)
    assert DiffAug(0.0)(x, generator) is x and torch.equal(generator.get_state(), seeded(3).get_state())
    augment = DiffAug(1.0, cutout=0.25)
    assert torch.equal(augment(x, seeded(3)), augment(x, seeded(3)))
    assert not torch.equal(augment(x, seeded(3)), augment(x, seeded(4)))
    ones = torch.ones(1, 3, 16, 16)
    outcomes = set()
    for seed in range(60):  # on a white image: shifted and cut out leave zeros, colour changes the value
        out = DiffAug(0.5)(ones, seeded(seed))
        outcomes.add((bool((out[0, 0] != out[0, 0, 8, 8]).any()), out[0, 0, 8, 8].item() != 1))
    assert outcomes == {(False, False), (False, True), (True, False), (True, True)}
    weights, seen = images(4, seed=1), set()
    for seed in range(20):  # to the bit, in gradients too, what the coins' transforms alone give
        generator = seeded(seed)
        uniforms, coins = torch.rand(7, 4, 1, 1, generator=generator), torch.rand(3, generator=generator) < 0.5
        translate, color, cut = coins.tolist()
        seen.add((translate, color, cut))
        x, y = (images(4).requires_grad_() for _ in range(2))
        out = DiffAug(0.5, cutout=0.25)(x, seeded(seed))
        expected = diff_augment(y, uniforms, translate, color, 0.25 if cut else 0.0)
        assert torch.equal(out, expected)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert len(seen) == 8


@pytest.mark.parametrize("size, reach", [(32, 4), (20, 2), (28, 4)])
def test_diffaug_moves_by_at_most_an_eighth(size, reach):
    """All shifts from -round(size/8) to round(size/8) occur, no other; zeros come in from outside."""
    x = torch.zeros(600, 3, size, size)
    x[:, :, size // 2, size // 2] = 1
    out = diff_augment(x, torch.rand(7, 600, 1, 1, generator=seeded()), color=False)
    assert (out.sum(dim=(1, 2, 3)) == 3).all()
    _, rows, columns = (out[:, 0] == 1).nonzero().t()
    for positions in (rows, columns):
        assert set((positions - size // 2).tolist()) == set(range(-reach, reach + 1))
    white = diff_augment(torch.ones(600, 3, size, size), torch.zeros(7, 600, 1, 1), color=False)
    assert (white[:, :, :reach] == 0).all() and (white[:, :, reach:, reach:] == 1).all()


def test_diffaug_is_differentiable():
    """Its gradient is the numerical one, and cutout's square takes the stated share of the image."""
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    uniforms = torch.rand(7, 2, 1, 1, dtype=torch.float64, generator=seeded(5))
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, uniforms, cutout=0.3), (x,))
    middle = torch.full((7, 1, 1, 1), 0.5)
    cut = diff_augment(torch.ones(1, 3, 16, 16), middle, translate=False, color=False, cutout=0.5)
    assert (cut == 0).sum() == 3 * 8 * 8 and (cut[:, :, 4:12, 4:12] == 0).all()


# LPIPS ----------------------------------------------------------------------------------------------------------------


def test_lpips_from_a_file_and_from_nowhere(tmp_path, lpips):
    """The random network is the same each time and frozen; a saved state dict with torchvision's names gives it too,
    classifier or not; a file of something else is refused."""
    x, y = 2 * images() - 1, 2 * images(seed=1) - 1
    expected = lpips(x, y)
    assert expected.shape == (2, 1, 1, 1) and (expected > 0).all() and lpips(x, x).abs().max() == 0
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    torch.manual_seed(99)
    assert torch.equal(build_lpips("random")(x, y), expected)
    path = tmp_path / "vgg16.pth"
    torch.save({**random_vgg16_state(), "classifier.0.weight": torch.zeros(1)}, path)
    assert torch.equal(build_lpips("pretrained", str(path))(x, y), expected)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="perceptual.vgg_path.*vgg16.pth"):
        build_lpips("pretrained", str(path))
    with pytest.raises(ConfigError, match="perceptual.vgg_path.*nowhere.pth"):
        build_lpips("pretrained", str(tmp_path / "nowhere.pth"))


def test_lpips_offline_says_what_to_do(tmp_path, monkeypatch, lpips):
    """Without the file and without a network: the file, where it was looked for, and the setting; a file in TORCH_HOME
    is taken."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*arguments, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("rae_suite.downloads.urlopen", offline)
    with pytest.raises(ConfigError) as caught:
        build_lpips("pretrained")
    for part in (str(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"), "perceptual.vgg_path", "no network"):
        assert part in str(caught.value)
    torch.save(random_vgg16_state(), tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    x, y = 2 * images() - 1, 2 * images(seed=1) - 1
    assert torch.equal(build_lpips("pretrained")(x, y), lpips(x, y))


# EMA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema(dtype):
    """ema = d * ema + (1 - d) * parameter in float32; applied() lends it to the module, also through an exception;
    the module keeps training where it was; another module's state is refused with the name and both shapes."""
    module = nn.Linear(3, 2).to(dtype)
    ema = EMA(module, 0.9)
    expected = module.weight.detach().float().clone()
    for step in range(3):
        module.weight.data += 1
        ema.update(step)
        expected = 0.9 * expected + 0.1 * module.weight.detach().float()
    torch.testing.assert_close(ema.shadow["weight"], expected)
    assert ema.shadow["weight"].dtype == torch.float32
    kept = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    ema.update(3, unless=torch.tensor(True))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ema.shadow.items())
    ema.update(3, unless=torch.tensor(False))
    expected = 0.9 * expected + 0.1 * module.weight.detach().float()
    torch.testing.assert_close(ema.shadow["weight"], expected)
    before, parameter = module.weight.detach().clone(), module.weight
    x = torch.randn(4, 3).to(dtype)
    with ema.applied():
        torch.testing.assert_close(module(x), F.linear(x, expected.to(dtype), module.bias))
        assert module.weight is parameter
    assert torch.equal(module.weight, before)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert torch.equal(module.weight, before)

    other = EMA(nn.Linear(3, 2), 0.5)
    state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(other.shadow["weight"], expected)
    other.update(0)
    assert torch.equal(state["weight"], ema.shadow["weight"])  # a loaded state is copied
    with pytest.raises(ValueError, match=r"weight.*\(3, 3\).*\(2, 3\)"):
        other.load_state_dict({**state, "weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="bias"):
        other.load_state_dict({"weight": state["weight"]})


# Metrics --------------------------------------------------------------------------------------------------------------


def direct_ssim(x, y):
    """Wang et al. 2004 in float64: 11 x 11 Gaussian of sigma 1.5, borders reflected, mean over pixels and channels."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = (np.pad(a.double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for a in (x, y))

    def blur(a):
        return (np.lib.stride_tricks.sliding_window_view(a, (11, 11), axis=(1, 2)) * window).sum(axis=(-1, -2))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_image_metrics(lpips):
    """PSNR, SSIM and LPIPS of each image by their formulas; an exact reconstruction has the cap's PSNR."""
    x = quantize(images(3, 24))
    y = quantize(x + 0.1 * torch.randn(x.shape, generator=seeded(1)))
    y[2] = x[2]
    values = image_metrics(x, y, ("psnr", "ssim", "lpips"), lpips)
    assert values.keys() == {"psnr", "ssim", "lpips"} and all(value.shape == (3,) for value in values.values())
    for i in range(2):
        mse = (x[i].double() - y[i].double()).square().mean().item()
        assert values["psnr"][i].item() == pytest.approx(10 * np.log10(1 / mse), rel=1e-5)
        assert values["ssim"][i].item() == pytest.approx(direct_ssim(x[i], y[i]), rel=1e-4)
        assert values["lpips"][i].item() == pytest.approx(lpips(2 * x[i : i + 1] - 1, 2 * y[i : i + 1] - 1).item())
    assert PSNR_CAP == 100 and values["psnr"][2] == 100
    assert values["ssim"][2].item() == pytest.approx(1) and values["lpips"][2] == 0
    assert image_metrics(x, y, ("psnr",), None).keys() == {"psnr"}


def test_evaluation_counts_every_image_once():
    """Uneven batches, empty ones and unreadable images: means are over images, on 8 bit, and names are handed on."""
    pixels = (images(7, 16) * 255).round().to(torch.uint8)
    batches = [
        {"pixels": pixels[:4], "index": torch.tensor([2, 4, 6, 8]), "unreadable": []},
        {"pixels": pixels[4:4], "index": torch.tensor([], dtype=torch.int64), "unreadable": ["a.png", "b.png"]},
        {"pixels": pixels[4:6], "index": torch.tensor([1, 7]), "unreadable": ["c.png"]},
        {"pixels": pixels[6:], "index": torch.tensor([9]), "unreadable": []},
    ]
    seen = []

    def reconstruct(x, index=None):
        return (1.05 * x + 0.1 * torch.arange(3).view(3, 1, 1)).bfloat16()  # leaves [0, 1] and the grid

    accelerator = Accelerator(cpu=True)
    evaluation = Evaluator(batches, accelerator, ("ssim", "psnr"), on_unreadable=seen.extend)(reconstruct)
    found = evaluation.summary()
    x = pixels.float() / 255
    values = image_metrics(x, quantize(reconstruct(x)), ("psnr", "ssim"), None)
    assert found.keys() == {"num_samples", "psnr", "ssim"} and found["num_samples"] == 7
    assert values["psnr"].std() > 0.01  # else a mean of batch means would pass too
    for name in ("psnr", "ssim"):
        assert found[name] == pytest.approx(values[name].double().mean().item(), rel=1e-6)
        in_order = values[name][[4, 0, 1, 2, 5, 3, 6]].double()  # of their index
        torch.testing.assert_close(evaluation.values[name], in_order, rtol=1e-6, atol=0)
    assert evaluation.index.tolist() == [1, 2, 4, 6, 7, 8, 9]
    assert seen == ["a.png", "b.png", "c.png"]
    with pytest.raises(ValueError, match="data.eval_split: none"):
        Evaluator(batches[1:2], Accelerator(cpu=True), ("psnr",))(reconstruct)
