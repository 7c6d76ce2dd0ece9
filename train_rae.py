"""Train a representation autoencoder (stage 1): a ViT decoder for a frozen vision encoder, with L1 + LPIPS + GAN.

    accelerate launch train_rae.py --config configs/dinov2_b.yaml --data.path /data/imagenet

Any setting of rae_suite/settings_rae.py can be given as a flag; `--help` lists them. The same command continues a run
that was stopped. The method is that of arXiv 2510.11690. `--config configs/digits_tiny.yaml`, which is also read where
there is no --config, trains on handwritten digits (`python scripts/prepare_data.py digits --output data/digits`) in
about three minutes on two CPU cores and ends at 30 dB PSNR on held-out digits; configs/dinov2_b.yaml has the settings
as published.
"""

# ruff: noqa: E402
import sys

from rae_suite.settings_rae import parse_config

if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv):
    parse_config()  # prints the help and ends the process: the imports below take seconds

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modeling_rae import RAEConfig, RAEModel
from rae_suite.digests import weights_digest
from rae_suite.discriminator import DiffAug
from rae_suite.ema import EMA
from rae_suite.errors import error_names_setting
from rae_suite.evaluation_sets import build_evaluator, open_sets
from rae_suite.files import clear, is_whole_model, write_folder
from rae_suite.frechet import FrechetMetric, encoder_metric, inception_metrics
from rae_suite.hub import Publisher, check_hub
from rae_suite.images import training_resize_size
from rae_suite.launch import (
    build_accelerator,
    compute_deterministically,
    data_errors_end_this_process,
    is_sharded,
    micro_batch_size,
    quiet_transformers,
    run_main,
    say,
)
from rae_suite.loaders import UnreadableLog, chosen_images, images_to_show
from rae_suite.losses import (
    DISCRIMINATOR_LOSSES,
    generator_gradient,
    l1,
    perceptual_loss,
    to_discriminator_range,
)
from rae_suite.lpips_vgg16 import build_lpips
from rae_suite.metric_names import FID_MODES, metric_of
from rae_suite.metrics import Evaluator, quantize
from rae_suite.model_loading import CODE
from rae_suite.pictures import RECONSTRUCTIONS, reconstruction_grid, save_pairs
from rae_suite.rae_networks import (
    backbone_source,
    build_discriminator,
    build_rae,
    build_rae_config,
    compile_networks,
    encoder_source,
    frozen_digests,
    save_rae,
)
from rae_suite.randomness import step_generator
from rae_suite.run_folder import (
    check_run_folder,
    check_shared_folder,
    continue_run,
    errors_name_checkpoint,
    is_finished,
    resolve_config,
    save_run,
    take_run_folder,
)
from rae_suite.run_log import RunLog, upload
from rae_suite.settings_rae import Config, measured_names
from rae_suite.sharding import gather_to_cpu, shard
from rae_suite.sources import ImageSource, evenly_spread
from rae_suite.start_notes import batch_line, start_notes
from rae_suite.start_weights import NEW_WEIGHTS, StartWeights, read_start_weights
from rae_suite.steps import Steps, step_batches
from rae_suite.trackers import check_trackers, start_trackers
from rae_suite.training_data import TrainingData, evaluated_on, open_data, open_loader, write_shards
from rae_suite.updates import (
    StepRecord,
    Update,
    apply_update,
    gradient_norm,
    learning_rate,
    mean_over_micro_batches,
    mean_over_processes,
    no_sync_except_last,
    set_learning_rate,
    starting_step,
    stretched,
)

# --------------------------------------------------------------------------------------------------------------------
# What a run is made of
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The networks, optimizers and resolved numbers that a training step needs."""

    config: Config
    accelerator: Accelerator
    rae: nn.Module  # prepared: the forward pass with gradients goes through it
    discriminator: Optional[nn.Module]  # prepared; None when the GAN is off
    optimizer: Any
    disc_optimizer: Any
    perceptual: Optional[nn.Module]
    augment: DiffAug
    ema: EMA
    steps_per_epoch: int
    lpips_start: int
    gan_start: int
    disc_start: int  # step of the discriminator's first update
    frozen: dict  # digests of the networks that do not learn, by the setting that names them

    @property
    def model(self) -> RAEModel:
        return self.accelerator.unwrap_model(self.rae)

    @property
    def sharded(self) -> bool:
        return isinstance(self.rae, FSDPModule)

    def parts(self) -> dict:
        """What changes while the run goes on, by its name in a checkpoint."""
        parts = {"decoder": self.model.decoder, "ema": self.ema, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts["discriminator"] = self.accelerator.unwrap_model(self.discriminator).heads
            parts["disc_optimizer"] = self.disc_optimizer
        return parts


def with_stretched_schedules(config: Config, steps_per_epoch: int, total_steps: int) -> Config:
    """The config with schedules that end with the run, where they are asked to."""
    gan = config.gan
    steps = total_steps - starting_step(gan.update_start_step, gan.update_start_epoch, steps_per_epoch)
    gan = replace(gan, lr_schedule=stretched(gan.lr_schedule, max(0, steps) * gan.updates_per_step))
    return replace(config, lr_schedule=stretched(config.lr_schedule, total_steps), gan=gan)


def build_run(
    config: Config,
    accelerator: Accelerator,
    rae_config: RAEConfig,
    steps_per_epoch: int,
    start: StartWeights = NEW_WEIGHTS,
) -> Run:
    """Build all networks and optimizers and prepare them for the devices at hand. `start`: trained weights."""

    def adamw(parameters: Iterator, settings: Any) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.AdamW(trained, **asdict(settings), fused=True)

    gan, perceptual, seed = config.gan, config.perceptual, config.train.seed
    lpips = disc_optimizer = None
    if perceptual.weight > 0 or "lpips" in config.eval.metrics:
        with error_names_setting("perceptual.vgg_path"):
            lpips = build_lpips(perceptual.weights, perceptual.vgg_path)
        on_gpu = accelerator.device.type == "cuda"  # its convolutions in half precision want channels-last tensors
        lpips.to(accelerator.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
    discriminator = build_discriminator(gan, config.model.attn_implementation, seed) if gan.weight > 0 else None
    rae = build_rae(config.model, seed, rae_config)
    start.fill(rae.decoder, discriminator)
    frozen = frozen_digests(rae)
    if discriminator is not None:
        frozen["gan.backbone"] = weights_digest(discriminator.backbone)
    if perceptual.weight > 0:
        frozen["perceptual.vgg_path"] = weights_digest(lpips)
    sharded = is_sharded(accelerator)
    rae = shard(rae, accelerator, ("encode",)) if sharded else accelerator.prepare(rae)
    decoder = accelerator.unwrap_model(rae).decoder
    optimizer = accelerator.prepare(adamw(decoder.parameters(), config.optimizer))  # of the sharded parameters
    with error_names_setting(*encoder_source(config.model)), torch.no_grad(), accelerator.autocast():
        blank = torch.zeros(1, 3, rae_config.image_size, rae_config.image_size, device=accelerator.device)
        accelerator.unwrap_model(rae).encode(blank, add_noise=False)  # whether the encoder gives the tokens it should
    if discriminator is not None:
        disc_optimizer = adamw(discriminator.parameters(), gan.optimizer)
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)
        with error_names_setting(*backbone_source(gan)), torch.no_grad(), accelerator.autocast():
            accelerator.unwrap_model(discriminator).eval()(blank)  # whether the backbone takes images
    if config.train.compile:
        networks = [None if network is None else accelerator.unwrap_model(network) for network in (rae, discriminator)]
        compile_networks(*networks, lpips)
    return Run(
        config=config,
        accelerator=accelerator,
        rae=rae,
        discriminator=discriminator,
        optimizer=optimizer,
        disc_optimizer=disc_optimizer,
        perceptual=lpips,
        augment=DiffAug(gan.augment_prob, gan.augment_cutout),
        ema=EMA(decoder, config.ema.decay, config.ema.warmup),
        steps_per_epoch=steps_per_epoch,
        lpips_start=starting_step(perceptual.start_step, perceptual.start_epoch, steps_per_epoch),
        gan_start=starting_step(gan.start_step, gan.start_epoch, steps_per_epoch),
        disc_start=starting_step(gan.update_start_step, gan.update_start_epoch, steps_per_epoch),
        frozen=frozen,
    )


# --------------------------------------------------------------------------------------------------------------------
# One training step
# --------------------------------------------------------------------------------------------------------------------


# what a record has of the discriminator, None where it does not train yet or the decoder's update failed
DISC_NAMES = ("disc_loss", "logits_real", "logits_fake", "accuracy", "disc_grad_norm", "lr_disc")


def train_step(run: Run, batches: list, step: int, stop: bool = False) -> StepRecord:
    """One whole step of the method: decoder update, moving average, discriminator updates. The host does not wait for
    the device anywhere in it.

    An update with a term that is nan or inf is not made, and those after it neither, which is decided on the device: a
    term of the decoder leaves everything as it was; one of the discriminator comes after the decoder's update, which
    stands. Gradients that overflow in fp16 only keep their own optimizer from its step.

    Args:
        batches: this process's micro-batches of pixels, each (B, 3, S, S) in [0, 1] on the device.
        step: 0-based; decides learning rates, which losses are on, and the noise.
        stop: whether this process was asked to stop; the record's answer is the same on all processes.

    Returns:
        StepRecord of loss, recon, lpips, gan, adaptive_weight, grad_norm, lr; disc_loss, logits_real, logits_fake,
        accuracy, disc_grad_norm, lr_disc.
    """
    config = run.config
    generators = [
        step_generator(run.accelerator, config.train, config.data.streaming, step, i) for i in range(len(batches))
    ]
    with torch.no_grad(), run.accelerator.autocast():
        latents = [run.model.encode(pixels, add_noise=False).latent for pixels in batches]
    update, reconstructions = decoder_step(run, batches, latents, generators, step, stop)
    run.ema.update(step, unless=update.failed)
    updates = [update]
    if run.discriminator is not None and step >= run.disc_start:
        count = (step - run.disc_start) * config.gan.updates_per_step  # the discriminator's own step counter
        for i in range(config.gan.updates_per_step):
            failed = updates[-1].failed
            update = discriminator_step(run, batches, latents, reconstructions, generators, count + i, failed)
            updates.append(update)
    return StepRecord(step + 1, updates, absent=DISC_NAMES)


def pixel_losses(run: Run, step: int) -> dict:
    """The loss terms that compare reconstructions with images, see generator_gradient. A new term is one entry here."""
    perceptual = run.config.perceptual
    lpips_is_on = perceptual.weight > 0 and step >= run.lpips_start
    return {
        "recon": (1.0, l1),
        "lpips": (perceptual.weight, perceptual_loss(run.perceptual) if lpips_is_on else None),
    }


def decoder_step(run: Run, batches: list, latents: list, generators: list, step: int, stop: bool) -> tuple:
    """Update the decoder. Arguments as in `train_step`; latents are clean. Returns the Update and, where the
    discriminator takes them, the reconstructions of each micro-batch, from noisy latents and before the update."""
    config, accelerator, model = run.config, run.accelerator, run.model
    lr = learning_rate(step, config.optimizer.lr, config.lr_schedule, run.steps_per_epoch)
    set_learning_rate(run.optimizer, lr)
    losses = pixel_losses(run, step)
    use_gan = run.discriminator is not None and step >= run.gan_start
    if use_gan:
        discriminator = accelerator.unwrap_model(run.discriminator).eval()

    def judge(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return discriminator(run.augment(images, generator))

    scale_loss = (lambda loss: loss) if accelerator.scaler is None else accelerator.scaler.scale
    model.train()
    terms, reconstructions = [], []
    for i, (pixels, latent, generator) in enumerate(zip(batches, latents, generators, strict=True)):
        with no_sync_except_last(accelerator, run.rae, i, len(batches)):
            noisy = model.add_noise(latent, generator)
            out = run.rae(latent=noisy, return_last_layer=True)
            with accelerator.autocast():
                gradient, values = generator_gradient(
                    out.patches,
                    out.last_hidden_state,
                    model.patches_to_pixels,
                    pixels,
                    losses,
                    partial(judge, generator=generator) if use_gan else None,
                    config.gan.weight,
                    config.gan.max_adaptive_weight,
                    scale_loss,
                )
            out.patches.backward(gradient / len(batches))
            if config.gan.disc_input == "reuse":
                reconstructions.append(out.sample.detach())
            terms.append(values)
    accelerator.unscale_gradients(run.optimizer)
    parameters = [p for p in model.decoder.parameters() if p.requires_grad]
    grad_norm = gradient_norm(parameters)
    if config.train.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.train.clip_grad_norm, grad_norm)
    asked = torch.full((), float(stop), device=accelerator.device)
    values = {**mean_over_micro_batches(terms), "stop": asked, "grad_norm": grad_norm}
    values = mean_over_processes(accelerator, values)
    # `loss` is not watched: when it is nan, one of its terms is, and that name says more. In fp16 the adaptive weight
    # is not watched either: it becomes inf when gradients overflow, which the loss scaler handles
    watched = [name for name in values if name not in ("loss", "stop", "grad_norm")]
    if accelerator.scaler is not None:
        watched.remove("adaptive_weight")
    update = apply_update(accelerator, run.optimizer, values, watched, "grad_norm", {"lr": lr})
    return update, reconstructions


def discriminator_step(
    run: Run,
    batches: list,
    latents: list,
    reconstructions: list,
    generators: list,
    count: int,
    failed: torch.Tensor,
) -> Update:
    """Update the discriminator on images and on reconstructions of clean latents with the updated decoder, or on the
    given `reconstructions` (gan.disc_input). `count`: updates of the discriminator so far. `failed`: whether an update
    of this step before it failed."""
    config, accelerator = run.config, run.accelerator
    lr = learning_rate(count, config.gan.optimizer.lr, config.gan.lr_schedule, run.steps_per_epoch)
    set_learning_rate(run.disc_optimizer, lr)
    heads = accelerator.unwrap_model(run.discriminator).train().heads
    spectral_vectors = {name: buffer.clone() for name, buffer in heads.named_buffers()}  # each forward pass moves them
    loss_function = DISCRIMINATOR_LOSSES[config.gan.loss]
    terms = []
    for i, (pixels, latent, generator) in enumerate(zip(batches, latents, generators, strict=True)):
        with no_sync_except_last(accelerator, run.discriminator, i, len(batches)):
            with torch.no_grad(), accelerator.autocast():
                fresh = config.gan.disc_input == "fresh"
                fake = run.rae(latent=latent).sample if fresh else reconstructions[i]
                fake = run.augment(to_discriminator_range(fake.to(pixels.dtype)), generator)
                real = run.augment(2 * pixels - 1, generator)
            fake_logits, real_logits = run.discriminator(fake, real)
            loss = loss_function(real_logits.float(), fake_logits.float())
            accelerator.backward(loss / len(batches))
            real_logits, fake_logits = real_logits.detach(), fake_logits.detach()
            values = {"disc_loss": loss.detach(), "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
            terms.append({**values, "accuracy": (real_logits > fake_logits).float().mean()})
    accelerator.unscale_gradients(run.disc_optimizer)
    values = {**mean_over_micro_batches(terms), "disc_grad_norm": gradient_norm(heads.parameters())}
    values = mean_over_processes(accelerator, values)
    update = apply_update(
        accelerator, run.disc_optimizer, values, ("disc_loss",), "disc_grad_norm", {"lr_disc": lr}, failed
    )
    for name, buffer in heads.named_buffers():
        torch.where(update.failed, spectral_vectors[name], buffer, out=buffer)
    return update


# --------------------------------------------------------------------------------------------------------------------
# Evaluation, pictures, models
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What a run is evaluated with: the images, what is measured, and which of them are shown."""

    evaluator: Evaluator
    sets: dict  # evaluators of further images, by their names in eval.sets
    pairs: set  # indices of images that are written with their reconstructions
    shown: torch.Tensor  # images of the sample grid, (N, 3, S, S) in [0, 1]


def build_evaluation(
    run: Run, images: ImageSource, sets: dict, unreadable: UnreadableLog, distances: list
) -> Evaluation:
    """`sets`: images of eval.sets. `distances`: FrechetMetrics on Inception features; that on the encoder's is made
    here."""
    config, accelerator, size = run.config, run.accelerator, run.model.config.image_size
    if "rfdd" in config.eval.metrics:
        distances = [*distances, encoder_distance(run)]
    others = accelerator, run.perceptual, distances, unreadable, run.sharded
    evaluator = build_evaluator(images, config, size, *others)
    sets = {name: build_evaluator(source, config, size, *others) for name, source in sets.items()}
    pairs = set(evenly_spread(chosen_images(images, config.eval.num_samples), config.eval.save_pairs))
    return Evaluation(evaluator, sets, pairs, images_to_show(images, size, config.logging.num_samples, unreadable))


def encoder_distance(run: Run) -> FrechetMetric:
    """rfdd of the run's own encoder, in float32 as eval_rfid.py measures it (in TF32 with train.tf32)."""

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return run.model.encode(pixels, add_noise=False, normalize=False).latent

    return encoder_metric(tokens, run.model, run.model.config.latent_channels, run.accelerator)


def reconstruct(run: Run, pixels: torch.Tensor, index: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Pixels (B, 3, S, S) in [0, 1] to their reconstructions, without noise; the images' numbers do not matter."""
    with torch.no_grad(), run.accelerator.autocast():
        return run.rae(latent=run.model.encode(pixels, add_noise=False).latent).sample.float()


@torch.compiler.set_stance("force_eager")  # evaluation has shapes of its own: no graphs for them
def evaluate(run: Run, evaluation: Evaluation, log: RunLog) -> None:
    """Evaluate the averaged model, and the raw one if asked; the best averaged one goes to best/."""
    run.model.eval()
    if run.config.eval.raw:
        measure(run, evaluation, log, "raw")
    values = measure(run, evaluation, log, "ema")
    shown = ", ".join(f"{name} {values[name]:.4f}" for name in measured_names(run.config.eval))
    say(run.accelerator, f"step {log.state.step}: {shown} (EMA, {values['num_samples']} images)")
    best = run.config.eval.best_metric
    count = values["/".join([*best.split("/")[:-1], "num_samples"])]
    if log.is_best(best, values[best], metric_of(best).higher_is_better, f"{count} images"):
        export(run, log.run_dir / "best")


def measure(run: Run, evaluation: Evaluation, log: RunLog, model: str) -> dict:
    """Evaluate the "raw" or the averaged model ("ema"), and write the line. Returns the metrics and `num_samples`."""
    folder = log.run_dir / "pairs" / f"step-{log.state.step:08d}-{model}"
    with run.ema.applied() if model == "ema" else nullcontext():
        found = evaluation.evaluator(partial(reconstruct, run), partial(save_pairs, folder, evaluation.pairs))
        values = found.summary()
        for name, evaluator in evaluation.sets.items():
            found = evaluator(partial(reconstruct, run)).summary()
            values |= {f"{name}/{key}": value for key, value in found.items()}
    log.write("eval", {"model": model, **values})
    return values


@torch.compiler.set_stance("force_eager")
def draw_samples(run: Run, evaluation: Evaluation, log: RunLog) -> None:
    """Write the sample grid of the averaged model, the curves and the strip; show the grid to the trackers."""
    run.model.eval()
    images, layout, raw = evaluation.shown.to(run.accelerator.device), RECONSTRUCTIONS, None
    with run.ema.applied():
        reconstructions = quantize(reconstruct(run, images))  # on all processes: a sharded model takes them all
    if log.state.step > 0 and run.ema.lags(log.state.step):
        raw, layout = quantize(reconstruct(run, images)), layout.with_raw(1)
    if run.accelerator.is_main_process:
        log.picture("reconstructions", reconstruction_grid(images, reconstructions, raw).numpy(), layout)


def export(run: Run, folder: Path) -> None:
    """Write the averaged model as a from_pretrained folder."""
    main = run.accelerator.is_main_process

    def write(beside: Path) -> None:
        with run.ema.applied():  # gathering on a CPU copies nothing: the file is written before the weights change back
            state = gather_to_cpu(run.model.state_dict(), main)
            if main:
                save_rae(run.model, state, beside)

    write_folder(folder, write, main, run.accelerator.wait_for_everyone)


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def train(
    run: Run, evaluation: Evaluation, log: RunLog, publisher: Optional[Publisher], loader: Any, total_steps: int
) -> bool:
    """The training loop. Returns whether it came to its end (and was not asked to stop)."""
    config, accelerator, state = run.config, run.accelerator, log.state
    if state.step == 0:
        evaluate(run, evaluation, log)
        draw_samples(run, evaluation, log)
    steps = Steps(config, accelerator, state, total_steps, run.steps_per_epoch, log.run_dir)
    accumulation = config.train.gradient_accumulation_steps
    batches = step_batches(loader, accumulation, accelerator.device, log.unreadable.add)
    save = partial(save_run, accelerator, log.run_dir, state, run.parts(), loader, config.train.keep_last)
    while state.step < total_steps:
        step_batch = steps.next(batches, save)
        if step_batch is None:  # the run was asked to stop while it waited for images
            break
        pixels = [images for images, _ in step_batch]  # labels play no part here
        steps.add(train_step(run, pixels, state.step, steps.stop_asked))

        due = steps.due()
        record = steps.read(everything=any(due))  # what is written down is of steps that are known to be good
        if due.logging:
            log.train(record, steps.images_per_second(record["loss"]))
        with steps.paused():
            if due.evaluation:
                evaluate(run, evaluation, log)
            if due.samples:
                draw_samples(run, evaluation, log)
            if state.step == total_steps:
                export(run, log.run_dir / "final")  # before the checkpoint that says the run is finished
            elif due.upload:
                upload(accelerator, publisher, log, partial(export, run))
            if due.checkpoint or steps.stopping:
                save()
        if steps.stopped_early():
            break
    steps.bar.close()
    return state.step >= total_steps


def main() -> None:
    config = parse_config()
    quiet_transformers()
    if config.train.deterministic:
        compute_deterministically()

    # everything that can be wrong is looked at before anything expensive starts
    accelerator = build_accelerator(config.train, config.logging.report_to)
    config = resolve_config(config, accelerator)
    with error_names_setting("train.output_dir"):
        run_dir = check_run_folder(config)
    micro_batch = micro_batch_size(config.train, accelerator.num_processes)
    training_resize_size(config.model.image_size, config.data.resize_size)
    data = open_data(config.data, config.train, config.eval.num_samples, accelerator, micro_batch)
    sets = open_sets(config.eval.sets, config.data)
    rae_config = build_rae_config(config.model)  # here the network may be needed
    check_hub(config.hub, rae_config.encoder_id)
    start = read_start_weights(config, rae_config, run_dir)
    total_steps, final = data.total_steps(config.train), run_dir / "final"
    if is_finished(accelerator, run_dir, total_steps, partial(is_whole_model, code=CODE), config.hub):
        return
    check_trackers(config.logging.report_to, accelerator)
    inception = [name for name in config.eval.metrics if name in FID_MODES]
    distances = inception_metrics(inception, config.eval.inception_path, "eval.inception_path", accelerator)
    publisher = Publisher(config.hub, run_dir) if config.hub.push and accelerator.is_main_process else None

    # networks, and the state of an earlier part of this run
    stretched_config = with_stretched_schedules(config, data.steps_per_epoch, total_steps)
    run = build_run(stretched_config, accelerator, rae_config, data.steps_per_epoch, start)
    del start
    lock = take_run_folder(config, run_dir) if accelerator.is_main_process else None  # nothing is left of a bad start
    check_shared_folder(run_dir, lock)
    state, continued = continue_run(accelerator, config, run_dir, data, run.parts(), run.frozen)
    write_shards(run_dir, data, accelerator.is_main_process)
    size, lanes = config.model.image_size, (state.stream or {}).get("lanes")
    loader = open_loader(data, config.data, config.train, accelerator, size, state.step, total_steps, lanes)
    unreadable = UnreadableLog(config.data.max_unreadable)
    log = RunLog(accelerator, run_dir, state, data.steps_per_epoch, unreadable, config.logging.report_to)
    evaluation = build_evaluation(run, data.eval_images, sets, unreadable, distances)
    log.forget_after(state.step if continued else -1)
    start_trackers(config, accelerator, run_dir, state.step)
    say(accelerator, describe(run, data, micro_batch, total_steps))

    if state.step < total_steps and accelerator.is_main_process:
        clear(final)  # of this run when it was shorter

    with data_errors_end_this_process(accelerator), errors_name_checkpoint(run_dir):
        finished = train(run, evaluation, log, publisher, loader, total_steps)
        # it may be damaged, or the checkpoints reach further than train.max_steps now does
        if finished and not is_whole_model(final, CODE):
            export(run, final)
    if finished and accelerator.is_main_process:
        say(accelerator, log.summary(measured_names(config.eval), evaluated_on(config.data)))
    accelerator.end_training()
    if finished and publisher is not None:
        publisher.finish(final)  # the other processes are not kept waiting
    if lock is not None:
        lock.close()


def describe(run: Run, data: TrainingData, micro_batch: int, total_steps: int) -> str:
    """What is about to happen, in a few lines."""
    c = run.config
    decoder = sum(p.numel() for p in run.model.decoder.parameters()) / 1e6
    encoder = sum(p.numel() for p in run.model.encoder.parameters()) / 1e6
    starts = {"LPIPS": run.lpips_start} if c.perceptual.weight > 0 else {}
    if run.discriminator is not None:
        starts |= {"the discriminator": run.disc_start, "the adversarial loss": run.gan_start}
    return "\n".join(
        [
            f"encoder {c.model.encoder} {encoder:.1f}M frozen, decoder {decoder:.1f}M, {c.model.image_size} px",
            f"{data.num_images or 'streamed'} training and {len(data.eval_images)} evaluation images, "
            f"{run.steps_per_epoch} steps an epoch, {total_steps} steps"
            + "".join(f"; {what} from step {step}" for what, step in starts.items()),
            batch_line(c.train, run.accelerator, micro_batch, run.sharded),
            *start_notes(c, run.ema, run.steps_per_epoch, total_steps, starts),
        ]
    )


if __name__ == "__main__":
    run_main(main)
