"""Train a diffusion transformer (stage 2) on the latents of a representation autoencoder: DiT-DH, or a plain DiT.

    accelerate launch train_dit.py --config configs/ditdh_xl.yaml --model.rae runs/dinov2_b/final --data.path ...

Any setting of rae_suite/settings_dit.py can be given as a flag; `--help` lists them. The same command continues a run
that was stopped. The method is that of arXiv 2510.11690, section on diffusion. `--config configs/ditdh_digits.yaml`
trains on handwritten digits, on the autoencoder of train_rae.py's demo, in about four minutes on two CPU cores;
configs/ has presets.
"""

# ruff: noqa: E402
import sys

from rae_suite.settings_dit import parse_config

if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv):
    parse_config()  # prints the help and ends the process: the imports below take seconds

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modeling_dit import RAEDiTModel
from modeling_rae import RAEModel
from rae_suite.autoencoders import RAE
from rae_suite.class_labels import balanced_labels
from rae_suite.cli import with_settings
from rae_suite.dit_card import card_of_run, sampling_words
from rae_suite.dit_evaluation import Comparison, held_out_loss, measure_drawn, run_comparison
from rae_suite.dit_folders import is_whole_pipeline, load_guide, save_pipeline
from rae_suite.dit_networks import (
    build_dit,
    compile_networks,
    compute_latent_stats,
    frozen_digests,
    keep_rae,
    model_settings,
    open_rae,
    plan_dit,
    read_start_weights,
    time_shift,
)
from rae_suite.ema import EMA
from rae_suite.errors import error_names_setting
from rae_suite.files import clear, write_folder
from rae_suite.flow import (
    Draws,
    draw_by_place,
    drop_labels,
    interpolate,
    prediction_loss,
    training_times,
    velocity_target,
)
from rae_suite.generation import draw_images
from rae_suite.hub import Publisher, check_hub
from rae_suite.images import training_resize_size
from rae_suite.labels import Classes, find_classes
from rae_suite.latent_stats import encoder_autocast
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
from rae_suite.loaders import UnreadableLog, eval_loader
from rae_suite.metric_names import DRAWN_METRICS, GENERATION_METRICS
from rae_suite.optimizers import build_optimizer, check_optimizer, optimizer_lines
from rae_suite.pictures import HEADING, GridLayout, class_grid
from rae_suite.randomness import batch_place
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
from rae_suite.settings_dit import Config
from rae_suite.sharding import gather_to_cpu, shard
from rae_suite.sources import ImageSource, evenly_spread
from rae_suite.start_notes import batch_line, start_notes
from rae_suite.steps import Steps, step_batches
from rae_suite.stored_latents import latent_reader, open_latents
from rae_suite.trackers import check_trackers, start_trackers
from rae_suite.training_data import TrainingData, evaluated_on, open_data, open_loader, write_shards
from rae_suite.updates import (
    StepRecord,
    apply_update,
    gradient_norm,
    learning_rate,
    mean_over_micro_batches,
    mean_over_processes,
    no_sync_except_last,
    set_learning_rate,
    stretched,
)

GRID_ROWS = 4  # images of each class in a sample grid


# --------------------------------------------------------------------------------------------------------------------
# What a run is made of
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The networks, the optimizer and resolved numbers that a training step needs."""

    config: Config
    accelerator: Accelerator
    model: nn.Module  # prepared
    rae: RAEModel  # frozen, on the device
    optimizer: Any
    ema: EMA
    classes: Classes  # of the training images
    shift: float  # factor of flow.shift_times
    guide: Optional[RAEDiTModel]  # of sampling
    steps_per_epoch: int
    frozen: dict  # digests of the networks that do not learn, by the setting that names them

    @property
    def dit(self) -> RAEDiTModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def parts(self) -> dict:
        """What changes while the run goes on, by its name in a checkpoint."""
        return {"model": self.dit, "ema": self.ema, "optimizer": self.optimizer}


def build_run(
    config: Config,
    accelerator: Accelerator,
    rae: RAEModel,
    classes: Classes,
    steps_per_epoch: int,
    start: dict,
    guide: Optional[RAEDiTModel],
) -> Run:
    """Build the transformer, with the weights `start` in it, and its optimizer, and prepare them for the devices at
    hand."""
    rae = rae.to(accelerator.device).eval()
    dit = build_dit(config.model, model_settings(config.model, rae, classes), start, config.train.seed)
    sharded = is_sharded(accelerator)
    model = shard(dit, accelerator) if sharded else accelerator.prepare(dit)
    dit = accelerator.unwrap_model(model)
    optimizer = accelerator.prepare(build_optimizer(dit, config.optimizer))
    if config.train.compile:
        compile_networks(dit, rae.encoder)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        rae=rae,
        optimizer=optimizer,
        ema=EMA(dit, config.ema.decay, config.ema.warmup),
        classes=classes,
        shift=time_shift(config.flow, rae),
        guide=None if guide is None else guide.to(accelerator.device),
        steps_per_epoch=steps_per_epoch,
        frozen=frozen_digests(rae),
    )


# --------------------------------------------------------------------------------------------------------------------
# One training step
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(run: Run, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, S, S) in [0, 1] to normalised latents (B, C, h, w), float32, outside of the run's own autocast."""
    with encoder_autocast(run.config.latents.encoder_precision, pixels.device):
        return run.rae.encode(pixels, add_noise=False).latent.float()


def prepare(run: Run, batches: list, step: int) -> list:
    """A step's micro-batches, (pixels or stored latents, labels) as batches have them, as `train_step` takes them."""
    config, prepared = run.config, []
    for i, (given, labels) in enumerate(batches):
        latents = encode(run, given) if config.data.latents is None else run.rae.normalize(given)
        place = batch_place(run.accelerator, config.train, config.data.streaming, i) * len(latents)
        draws = draw_by_place(latents, place, config.train.seed, step)
        prepared.append((latents, run.classes.of(labels).to(latents.device), draws))
    return prepared


def flow_loss(run: Run, latents: torch.Tensor, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The loss of each sample (B,): latents (B, C, h, w), class indices (B,), and what was drawn for them."""
    dropout = run.config.model.class_dropout_prob
    if dropout > 0:
        labels = drop_labels(labels, draws.u_drop, dropout, run.dit.null_label)
    t = training_times(draws.u_time, run.config.flow.time_distribution, run.shift).to(latents.device)
    noisy = interpolate(latents, draws.noise, t)
    with run.accelerator.autocast():
        output = run.model(noisy, t, labels)
    return prediction_loss(output, velocity_target(latents, draws.noise, t, run.dit.config.prediction))


def train_step(run: Run, batches: list, step: int, stop: bool = False) -> StepRecord:
    """One whole step: forward and backward passes, the update, the moving average. The host does not wait for the
    device anywhere in it. An update with a loss or a gradient that is nan or inf is not made, which is decided on the
    device.

    Args:
        batches: this process's micro-batches: normalised latents (B, C, h, w), class indices (B,), Draws.
        step: 0-based; decides the learning rate.
        stop: whether this process was asked to stop; the record's answer is the same on all processes.

    Returns:
        StepRecord of loss, grad_norm, lr.
    """
    config, accelerator = run.config, run.accelerator
    lr = learning_rate(step, config.optimizer.lr, config.lr_schedule, run.steps_per_epoch)
    set_learning_rate(run.optimizer, lr)
    run.model.train()
    terms = []
    for i, (latents, labels, draws) in enumerate(batches):
        with no_sync_except_last(accelerator, run.model, i, len(batches)):
            loss = flow_loss(run, latents, labels, draws).mean()
            accelerator.backward(loss / len(batches))
        terms.append({"loss": loss.detach()})
    accelerator.unscale_gradients(run.optimizer)
    parameters = [p for p in run.dit.parameters() if p.requires_grad]
    grad_norm = gradient_norm(parameters)
    if config.train.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.train.clip_grad_norm, grad_norm)
    asked = torch.full((), float(stop), device=accelerator.device)
    values = mean_over_processes(accelerator, mean_over_micro_batches(terms) | {"stop": asked, "grad_norm": grad_norm})
    update = apply_update(accelerator, run.optimizer, values, ("loss",), "grad_norm", {"lr": lr})
    run.ema.update(step, unless=update.failed)
    return StepRecord(step + 1, [update])


# --------------------------------------------------------------------------------------------------------------------
# Evaluation, pictures, models
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What a run is evaluated with: held-out images and their classes, classes of the images that are drawn, and how
    these are measured."""

    loader: Iterable
    classes: Classes
    labels: torch.Tensor  # (N,) of the drawn images
    comparison: Comparison


def build_evaluation(run: Run, images: ImageSource, classes: Classes, comparison: Comparison) -> Evaluation:
    config, accelerator, size = run.config, run.accelerator, run.rae.config.image_size
    batch, workers, num_samples = config.eval.batch_size, config.data.num_workers, config.eval.num_samples
    processes = accelerator.process_index, accelerator.num_processes
    loader = eval_loader(images, size, batch, workers, *processes, num_samples)
    return Evaluation(
        loader,
        classes,
        balanced_labels(config.eval.num_generated, range(run.classes.num), config.train.seed),
        comparison,
    )


def draw(run: Run, labels: torch.Tensor, indices: list) -> torch.Tensor:
    """Images, uint8 (B, 3, H, W), of classes `labels` (B,) with the present weights; the noise of an image is that of
    its index."""
    seed, autocast = run.config.train.seed, run.accelerator.autocast
    return draw_images(
        run.dit, run.rae, labels, indices, seed, run.config.sampling, run.shift, run.guide, "round", autocast
    )


@torch.compiler.set_stance("force_eager")  # evaluation has shapes of its own: no graphs for them
def evaluate(run: Run, evaluation: Evaluation, log: RunLog) -> None:
    """Evaluate the averaged weights, and the raw ones if asked; the best averaged ones go to best/."""
    run.model.eval()
    if run.config.eval.raw:
        measure(run, evaluation, log, "raw")
    values = measure(run, evaluation, log, "ema")
    shown = ", ".join(f"{name} {values[name]:.4f}" for name in run.config.eval.metrics)
    held_out, drawn = f"{values['num_samples']} images", f"{values.get('num_generated')} drawn images"
    measured = [held_out, *([drawn] if evaluation.comparison.metrics else [])]
    say(run.accelerator, f"step {log.state.step}: {shown} (EMA, {', '.join(measured)})")
    best, sampling = run.config.eval.best_metric, asdict(run.config.sampling)
    of = f"{drawn}, {sampling_words(sampling, run.dit.has_base_head)}" if best in DRAWN_METRICS else held_out
    if log.is_best(best, values[best], GENERATION_METRICS[best].higher_is_better, of):
        export(run, log, log.run_dir / "best")


def measure(run: Run, evaluation: Evaluation, log: RunLog, weights: str) -> dict:
    """Evaluate the "raw" or the averaged weights ("ema"), and write the line. Returns the metrics and `num_samples`."""
    config, accelerator = run.config, run.accelerator
    times = partial(training_times, distribution=config.flow.time_distribution, shift=run.shift)
    with run.ema.applied() if weights == "ema" else nullcontext():
        held_out, seed, unreadable = (evaluation.loader, evaluation.classes), config.train.seed, log.unreadable.add
        encoder = partial(encode, run)
        values = held_out_loss(run.dit, encoder, *held_out, times, seed, accelerator, unreadable, run.sharded)
        if evaluation.comparison.metrics:
            size, drawn = config.eval.batch_size, partial(draw, run)
            values |= measure_drawn(evaluation.comparison, drawn, evaluation.labels, size, accelerator)
    log.write("eval", {"model": weights, **values})
    return values


@torch.compiler.set_stance("force_eager")
def draw_samples(run: Run, log: RunLog) -> None:
    """Write a grid with a column for each of some classes, drawn with the averaged weights, and the curves; show the
    grid to the trackers."""
    run.model.eval()
    classes = torch.tensor(evenly_spread(range(run.classes.num), run.config.logging.num_samples))
    labels = classes.repeat(GRID_ROWS)
    indices, layout, raw = list(range(len(labels))), GridLayout(rows=GRID_ROWS, shown=0, heading=HEADING), None
    with run.ema.applied():
        images = draw(run, labels, indices)  # on all processes: a sharded model takes them all
    if log.state.step > 0 and run.ema.lags(log.state.step):
        raw, layout = draw(run, labels, indices), layout.with_raw(GRID_ROWS)
    if run.accelerator.is_main_process:
        names = [run.classes.names[i] if run.classes.names else str(i) for i in classes.tolist()]
        log.picture("samples", class_grid(images, names, raw).numpy(), layout)


def export(run: Run, log: RunLog, folder: Path) -> None:
    """Write the averaged weights as a pipeline folder, with a card of what was last measured."""
    main, config = run.accelerator.is_main_process, run.config

    def write(beside: Path) -> None:
        with run.ema.applied():  # gathering on a CPU copies nothing: the file is written before the weights change back
            state = gather_to_cpu(run.dit.state_dict(), main)
            if main:
                sampling = {**asdict(config.sampling), "shift": run.shift}
                card, picture = card_of_run(config, folder, log.run_dir, log.state.step, run.dit.config, run.rae.config)
                about = {"class_names": run.classes.names, "sampling": sampling, "rae_id": config.model.rae}
                about |= {"card": card, "picture": picture}
                save_pipeline(beside, run.dit, run.rae, state=state, guide=run.guide, **about)

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
        draw_samples(run, log)
    steps = Steps(config, accelerator, state, total_steps, run.steps_per_epoch, log.run_dir)
    accumulation = config.train.gradient_accumulation_steps
    batches = step_batches(loader, accumulation, accelerator.device, log.unreadable.add)
    save = partial(save_run, accelerator, log.run_dir, state, run.parts(), loader, config.train.keep_last)
    while state.step < total_steps:
        step_batch = steps.next(batches, save)
        if step_batch is None:  # the run was asked to stop while it waited for images
            break
        steps.add(train_step(run, prepare(run, step_batch, state.step), state.step, steps.stop_asked))

        due = steps.due()
        record = steps.read(everything=any(due))  # what is written down is of steps that are known to be good
        if due.logging:
            log.train(record, steps.images_per_second(record["loss"]))
        with steps.paused():
            if due.evaluation:
                evaluate(run, evaluation, log)
            if due.samples:
                draw_samples(run, log)
            if state.step == total_steps:
                export(run, log, log.run_dir / "final")  # before the checkpoint that says the run is finished
            elif due.upload:
                upload(accelerator, publisher, log, partial(export, run, log))
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
    check_optimizer(config.optimizer, is_sharded(accelerator))
    micro_batch = micro_batch_size(config.train, accelerator.num_processes)
    data = open_data(config.data, config.train, config.eval.num_samples, accelerator, micro_batch)
    rae = open_rae(config.model, config.latents, Path(config.train.output_dir))
    data.latents = open_latents(config, rae, data.images)
    classes = find_classes(data.images, config.model.num_classes, config.model.class_names, "data.train_split")
    config = with_settings(config, {"model.num_classes": classes.num, "model.class_names": classes.names})
    eval_classes = find_classes(data.eval_images, classes.num, classes.names, "data.eval_split")
    training_resize_size(rae.config.image_size, config.data.resize_size)
    planned = plan_dit(model_settings(config.model, rae, classes))
    check_hub(config.hub, rae.config.encoder_id)
    with error_names_setting("train.output_dir"):
        run_dir = check_run_folder(config)
    total_steps, final = data.total_steps(config.train), run_dir / "final"
    if is_finished(accelerator, run_dir, total_steps, is_whole_pipeline, config.hub):
        return

    check_trackers(config.logging.report_to, accelerator)
    guide = load_guide(config.sampling.guide, None, planned, rae, "sampling.guide")
    start = read_start_weights(config.model.init_from, planned, classes, run_dir)
    named_rae = RAE(config.model.rae, rae)
    comparison = run_comparison(config.eval, config.data, data.eval_images, named_rae, accelerator)
    publisher = Publisher(config.hub, run_dir) if config.hub.push and accelerator.is_main_process else None
    lock = take_run_folder(config, run_dir) if accelerator.is_main_process else None
    check_shared_folder(run_dir, lock)

    # networks, and the state of an earlier part of this run
    if config.latents.stats == "compute":
        reader = latent_reader(config, data.images, data.latents, accelerator)
        compute_latent_stats(rae.to(accelerator.device), reader, run_dir, config.train.fork_from)
    config_now = replace(config, lr_schedule=stretched(config.lr_schedule, total_steps))
    run = build_run(config_now, accelerator, rae, classes, data.steps_per_epoch, start, guide)
    del start
    run.frozen["data.latents"] = data.latents and data.latents.digest
    state, continued = continue_run(accelerator, config, run_dir, data, run.parts(), run.frozen)
    keep_rae(rae, run_dir, accelerator)
    write_shards(run_dir, data, accelerator.is_main_process)
    size, lanes = rae.config.image_size, (state.stream or {}).get("lanes")
    loader = open_loader(data, config.data, config.train, accelerator, size, state.step, total_steps, lanes)
    unreadable = UnreadableLog(config.data.max_unreadable)
    log = RunLog(accelerator, run_dir, state, data.steps_per_epoch, unreadable, config.logging.report_to)
    evaluation = build_evaluation(run, data.eval_images, eval_classes, comparison)
    log.forget_after(state.step if continued else -1)
    start_trackers(config, accelerator, run_dir, state.step)
    say(accelerator, describe(run, data, micro_batch, total_steps))

    if state.step < total_steps and accelerator.is_main_process:
        clear(final)  # of this run when it was shorter

    with data_errors_end_this_process(accelerator), errors_name_checkpoint(run_dir):
        finished = train(run, evaluation, log, publisher, loader, total_steps)
        # it may be damaged, or the checkpoints reach further than train.max_steps now does
        if finished and not is_whole_pipeline(final):
            export(run, log, final)
    if finished and accelerator.is_main_process:
        say(accelerator, log.summary(config.eval.metrics, evaluated_on(config.data)))
    accelerator.end_training()
    if finished and publisher is not None:
        publisher.finish(final)  # the other processes are not kept waiting
    if lock is not None:
        lock.close()


def describe(run: Run, data: TrainingData, micro_batch: int, total_steps: int) -> str:
    """What is about to happen, in a few lines."""
    c, latents = run.config, run.rae.config
    dit = sum(p.numel() for p in run.dit.parameters()) / 1e6
    kind = "DiT-DH" if run.dit.has_head else "DiT"
    shape = f"{latents.latent_channels} x {latents.latent_size} x {latents.latent_size}"
    normalised = "normalised" if latents.use_latent_stats else "NOT normalised"
    return "\n".join(
        [
            f"{kind} {dit:.1f}M on latents {shape} of {c.model.rae}, {normalised}, {latents.image_size} px",
            f"{data.num_images or 'streamed'} training and {len(data.eval_images)} evaluation images of "
            f"{run.classes.num} classes, {run.steps_per_epoch} steps an epoch, {total_steps} steps; "
            f"times {c.flow.time_distribution}, shift {run.shift:.4g}; latents "
            f"{'encoded in each step' if data.latents is None else f'read from {data.latents}'}",
            batch_line(c.train, run.accelerator, micro_batch, run.sharded),
            *optimizer_lines(run.dit, c.optimizer),
            *start_notes(c, run.ema, run.steps_per_epoch, total_steps, {}),
        ]
    )


if __name__ == "__main__":
    run_main(main)
