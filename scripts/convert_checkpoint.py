"""Convert checkpoints of representation autoencoders between the published code, diffusers and this suite, with proof.

    python scripts/convert_checkpoint.py --from published --to rae --input model.pt --stats stat.pt \\
            --encoder facebook/dinov2-with-registers-base --output rae_dinov2_b
        A published decoder, and its latent statistics, around a pretrained encoder. The decoder's sizes follow from its
        tensors, its number of heads from the known sizes (ViT-B, L, XL) or from --decoder_num_attention_heads. As with
        the published code, statistics without a mean (that of DINOv2-B is None) subtract nothing.

    python scripts/convert_checkpoint.py --to rae --input siglip2_decoder.pt \\
            --encoder google/siglip2-large-patch16-256 --encoder_input_size 256 --encoder_layers 11 13 15 17 19 21 23 \\
            --encoder_add_spatial_mean --encoder_keep_final_affine --image_mean 0.485 0.456 0.406 \\
            --image_std 0.229 0.224 0.225 --no_denormalize_output --output raev2_siglip2
        RAEv2's decoders are for other latents of the same encoders: SigLIP2's need all of these flags, DINOv3's neither
        --encoder_keep_final_affine nor a mean and std, DINOv2's not --encoder_add_spatial_mean either.

    python scripts/convert_checkpoint.py --to rae --input ep-0000016.pt --weights ema \\
            --encoder facebook/dinov2-with-registers-base --output rae_dinov2_b
        A training checkpoint of the published code, its averaged (ema) or raw weights. The encoder is the pretrained
        one: the checkpoint's averaged copy of it may differ by rounding, and is refused when it differs by more.

    python scripts/convert_checkpoint.py --to rae --input my_autoencoder_rae --output my_rae
    python scripts/convert_checkpoint.py --to diffusers --input runs/dinov2_b_vitb/final --output my_diffusers
        What AutoencoderRAE cannot hold (a latent grid other than 16 x 16, a learnt position table, latents from several
        blocks, ...) is named and stops the conversion; --force converts the rest.

    python scripts/convert_checkpoint.py --to published --input runs/dinov2_b/final --output published
        Writes model.pt and, for a model with latent statistics, stat.pt. What the published code fixes otherwise (the
        decoder's activation, ...) is named and stops the conversion, as above.

    python scripts/convert_checkpoint.py --to rae --input runs/dinov2_b/checkpoints/step-00010000 --output my_rae
        A checkpoint of train_rae.py, its averaged or raw weights; of a run folder its final/, else the newest one.

    python scripts/convert_checkpoint.py --to dit --input stage2_model.pt --rae rae_dinov2_b --output ditdh_xl
    python sample_dit.py --model ditdh_xl --num_samples 16
        A published diffusion transformer (stage 2) and the RAE on whose latents it was trained, with the published
        statistics (--stats stat.pt, if the RAE was converted without them), as a pipeline. Its sizes follow from its
        tensors. Without --rae, as for a guide, a transformer's folder. RAEv2's checkpoint.pt is read in the same way.

    python scripts/convert_checkpoint.py --to published --input runs/ditdh_xl/final --output published
        Writes stage2_model.pt, stage2_params.yaml (the published class and its parameters) and stat.pt, for a run its
        averaged weights unless --weights raw. A stage-2 model is compared by its tensors and by its velocities for
        random latents.

What --input is, is found out; --from says it where it must not be something else. Any two different sides of a stage
can be combined. Weights are written in float32. The result is written beside --output, loaded from there and compared
with the source: tensor by tensor, and on two photographs and a noise image where both sides can run (this suite's
decoder stands for the published one). Only when nothing differs by more than 1e-4 is it put in its place; else the exit
code is 1 and nothing is left. With --force, differences that were named beforehand are printed and stop nothing. Bad
input ends with one line and exit code 2. A CPU is enough: two minutes and 7 GB of memory for a ViT-XL decoder.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root
from modeling_rae import RAEModel
from rae_suite.autoencoders import RAE
from rae_suite.comparison import compare_images, compare_tensors
from rae_suite.diffusers_rae import (
    diffusers_differences,
    diffusers_notes,
    diffusers_source,
    encoder_type_of,
    read_diffusers,
    why_not_built,
    write_diffusers,
)
from rae_suite.dit_conversion import (
    DIT_OPTIONS,
    STAGE_2,
    check_dit_arguments,
    check_dit_proof,
    describe_dit,
    dit_differences,
    dit_rows,
    is_stage_2,
    read_dit,
    side_of_stage_2,
)
from rae_suite.errors import ConfigError, OneLineParser, RunError
from rae_suite.files import check_output_file, read_saved, write_folder
from rae_suite.launch import quiet_transformers, run_main
from rae_suite.model_loading import FoundModel, find_model, folder_of, load_autoencoder, rae_of
from rae_suite.model_sources import SIDES, ModelSource, read_json
from rae_suite.position_tables import table_kind
from rae_suite.published_dit import (
    compare_dits,
    is_converted_dit,
    load_written_dit,
    write_own_dit,
    write_published_dit,
)
from rae_suite.published_rae import (
    PublishedOptions,
    published_differences,
    read_decoder,
    read_training,
    reading_flags,
    write_published,
)
from rae_suite.rae_networks import read_latent_stats, save_rae

TOLERANCE = 1e-4  # largest difference of a conversion that counts as right


def main(argv: Optional[list] = None) -> None:
    args = parse_arguments(argv)
    quiet_transformers()
    side = side_of_stage_2(args.input)
    args.source = args.source or side
    if is_stage_2(args):
        report = convert_dit(args)
    elif side is None:
        report = convert_rae(args)
    else:
        raise ConfigError(
            f"--input: {args.input} is a stage-2 model, expected {SIDES[args.source]}: use --to {STAGE_2}"
        )
    print(f"{args.output} is written")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def convert_rae(args: argparse.Namespace) -> dict:
    """Convert an autoencoder and return the report; nothing is written unless what was written, loaded again, is the
    same."""
    found = find_source(args)
    check_arguments(args)
    source = read_source(args, found)
    if args.target == "diffusers":
        source.differences += diffusers_differences(source.model, "--to diffusers")
        source.notes += diffusers_notes(source.model)
    if args.target == "published":
        source.differences += published_differences(source.model)
    if source.differences and not args.force:
        reasons = "; ".join(text for _, text in source.differences)
        raise ConfigError(f"--to {args.target}: {reasons}; --force converts nevertheless")
    with new_folder(args.output) as folder:
        WRITERS[args.target](source.model, folder)
        report = {**describe(args, source), **compare(source, folder, args.target)}
        print_rows(rae_rows(report))
        check_proof(report)
        write_folder(args.output, lambda partial: folder.rename(partial), True, lambda: None)
    return report


def convert_dit(args: argparse.Namespace) -> dict:
    """Convert a stage-2 model and return the report; nothing is written unless what was written, loaded again, has the
    same velocities."""
    check_arguments(args)
    if not args.input.exists():
        raise ConfigError(f"--input: {args.input} does not exist, expected a stage-2 model")
    source, rae = read_dit(args)
    differences = dit_differences(args, source, rae)
    if differences and not args.force:
        raise ConfigError(f"{'; '.join(differences)}; --force converts nevertheless")
    if differences and args.target == "published":
        raise ConfigError(f"{'; '.join(differences)}: --force cannot help, there is no published class for it")
    with new_folder(args.output) as folder:
        write = write_own_dit if args.target == STAGE_2 else write_published_dit
        write(source, rae, folder)
        try:
            written = load_written_dit(folder, args.target, source.model, "--output")
        except ConfigError as error:
            raise RunError(f"the converted model cannot be loaded, nothing was written: {error}") from error
        report = {**describe_dit(args, source, rae, differences), **compare_dits(source.model, written)}
        print_rows(dit_rows(report))
        check_dit_proof(report)
        write_folder(args.output, lambda partial: folder.rename(partial), True, lambda: None)
    return report


def parse_arguments(argv: Optional[list]) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = [*(side for side in SIDES if side != "kl"), STAGE_2]
    parser.add_argument("--from", dest="source", choices=sides, help="what --input must be (default: what it is)")
    parser.add_argument("--to", dest="target", required=True, choices=[*WRITERS, STAGE_2], help="what to write")
    parser.add_argument("--input", type=Path, required=True, help="file or folder to convert")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model that is in --output")
    parser.add_argument("--force", action="store_true", help="convert also what the other side cannot hold entirely")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    published = parser.add_argument_group("published decoders and training checkpoints, which have no config")
    published.add_argument("--weights", choices=["ema", "raw"], help="which of a checkpoint (default: ema)")
    published.add_argument(
        "--stats", type=Path, metavar="FILE", help="stat.pt: latent variance, and mean if it has one, as (C, h, w)"
    )
    published.add_argument("--encoder", help="Hub id or folder of the encoder")
    published.add_argument("--encoder_revision", help="revision of the encoder on the Hub")
    published.add_argument("--encoder_input_size", type=int, help="pixels of the encoder's input (default: 224)")
    published.add_argument(
        "--encoder_layers", type=int, nargs="+", help="blocks (0-based) whose mean is the latent (default: the last)"
    )
    published.add_argument(
        "--encoder_add_spatial_mean",
        action="store_true",
        help="add the last block's mean token to each token (RAEv2: with several blocks of DINOv3 or SigLIP2)",
    )
    published.add_argument(
        "--encoder_keep_final_affine",
        action="store_true",
        help="keep the weight and bias of the encoder's final LayerNorm (RAEv2: SigLIP2)",
    )
    for name in ("image_mean", "image_std"):
        published.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help="of pixels in [0, 1] (default: the encoder's image processor's; RAEv2's SigLIP2: ImageNet's)",
        )
    published.add_argument(
        "--no_denormalize_output", action="store_true", help="the decoder's output is in [0, 1] already (RAEv2)"
    )
    published.add_argument("--decoder_num_attention_heads", type=int, help="of decoders other than ViT-B, L and XL")
    stage_2 = parser.add_argument_group("published stage-2 models (--to dit)")
    stage_2.add_argument("--rae", help="folder or Hub id of the RAE that goes with the model")
    stage_2.add_argument("--num_classes", type=int, help="rows of the label table (default: one fewer, the null label)")
    for name in DIT_OPTIONS[1:]:
        stage_2.add_argument(f"--{name}", type=int, help="where the tensors do not show it")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for a command line that no conversion can use."""
    check_dit_arguments(args)
    published = args.source in ("published", "training") and not is_stage_2(args)
    for name in (
        "weights stats encoder encoder_revision encoder_input_size encoder_layers encoder_add_spatial_mean "
        "encoder_keep_final_affine image_mean image_std no_denormalize_output decoder_num_attention_heads"
    ).split():
        used = published or (name == "weights" and args.source == "checkpoint")
        if is_stage_2(args) and name in ("weights", "stats"):
            continue
        if not used and getattr(args, name) not in (None, False):
            raise ConfigError(f"--{name}: expected nothing for {SIDES[args.source]}, got {getattr(args, name)}")
    if args.source == args.target:
        raise ConfigError(f"--to: expected another side than that of --input, got {args.target} for {args.target}")
    if published and args.encoder is None:
        raise ConfigError(f"--encoder: expected a Hub id or folder for {SIDES[args.source]}, which has none")
    for name in ("encoder_input_size", "decoder_num_attention_heads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name}: expected a positive number, got {value}")
    if args.image_std is not None and min(args.image_std) <= 0:
        raise ConfigError(f"--image_std: expected positive numbers, got {args.image_std}")
    check_output(args)
    check_output_file(args.json, "--json")


def check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError unless --output is free, or --overwrite was given and may replace it."""
    output = args.output
    if above := next((path for path in output.absolute().parents if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"--output: {above} is a file, expected a folder")
    if not os.access(existing_parent(output), os.W_OK):
        raise ConfigError(f"--output: {existing_parent(output)} cannot be written to")
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir() or not args.overwrite:
        raise ConfigError(f"--output: {output} exists, expected a new or empty folder (or --overwrite)")
    known = (output / "config.json").is_file() or (output / "model.pt").is_file() or is_converted_dit(output)
    if not known:
        raise ConfigError(f"--output: {output} is no converted model, --overwrite replaces nothing else")
    if output.resolve() in (args.input.resolve(), *args.input.resolve().parents):
        raise ConfigError(f"--output: {output} holds --input {args.input}, expected another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, gone with all that is left in it at the end."""
    place = {"prefix": ".convert-", "dir": existing_parent(output), "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**place) as beside:
        folder = Path(beside) / "model"
        folder.mkdir()
        yield folder


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there: what fails in it leaves no empty folders behind."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


def find_source(args: argparse.Namespace) -> FoundModel:
    """What --input is, which args.source then says. Raises ConfigError where it is not what --from says."""
    found = find_model(str(args.input), "--input", args.weights or "ema")
    if found.side == "kl":
        raise ConfigError(f"--input: {args.input} is {SIDES['kl']}, expected an RAE")
    if args.source not in (None, found.side):
        raise ConfigError(
            f"--input: {args.input} is {SIDES[found.side]}, expected {SIDES[args.source]}: use --from {found.side}, or "
            "no --from"
        )
    args.source = found.side
    return found


def read_source(args: argparse.Namespace, found: FoundModel) -> ModelSource:
    """What was found, as an RAE. Raises ConfigError where it cannot be read."""
    path, options = Path(found.place), published_options(args)
    if found.side == "diffusers":
        return read_diffusers(folder_of(found, "--input"), found.held, "--input")
    if found.side == "training":
        return read_training(found.held, path, found.weights, options, "--input", "--")
    if found.side == "published":
        return read_decoder(found.held, path, options, "--input", "--")
    model = rae_of(found, "--input")
    return ModelSource(model, RAE(found.name, model))


def published_options(args: argparse.Namespace) -> PublishedOptions:
    return PublishedOptions(
        encoder=args.encoder,
        encoder_revision=args.encoder_revision,
        encoder_input_size=args.encoder_input_size or 224,
        encoder_layers=args.encoder_layers,
        encoder_add_spatial_mean=args.encoder_add_spatial_mean,
        encoder_keep_final_affine=args.encoder_keep_final_affine,
        image_mean=args.image_mean,
        image_std=args.image_std,
        denormalize_output=not args.no_denormalize_output,
        decoder_num_attention_heads=args.decoder_num_attention_heads,
        stats=args.stats,
    )


def write_rae(model: RAEModel, folder: Path) -> None:
    save_rae(model, model.state_dict(), folder)


WRITERS = {"rae": write_rae, "diffusers": write_diffusers, "published": write_published}


# ----------------------------------------------------------------------------------------------------------------------
# Proof


def compare(source: ModelSource, folder: Path, target: str) -> dict:
    """What was written in `folder`, loaded afresh, beside the source: all tensors, and images where both can run."""
    try:
        model, autoencoder = load_written(source.model, folder, target)
    except ConfigError as error:
        raise RunError(f"the converted {target} model cannot be loaded, nothing was written: {error}") from error
    report = {"tensors": compare_tensors(source.model, model), "images": None}
    if source.autoencoder is not None and autoencoder is not None:
        report["images"] = compare_images(source.autoencoder, autoencoder, source.model.config.image_size)
    return report


def load_written(model: RAEModel, folder: Path, target: str) -> tuple:
    """The written model as an RAE, and what runs it by its own side's code (None where nothing here can)."""
    if target == "published":  # has no encoder and no config
        twin = copy.deepcopy(model)
        twin.decoder.load_state_dict(read_saved(folder / "model.pt", "--output"))
        if model.config.use_latent_stats:
            twin.set_latent_stats(**read_latent_stats(folder / "stat.pt", model.config, "--stats"))
        return twin, RAE(str(folder), twin)
    if target == "rae":
        autoencoder = load_autoencoder(str(folder), "--output")
        return autoencoder.model, autoencoder
    twin = diffusers_source(folder, read_json(folder / "config.json", "--output"), "--output").model
    reason = why_not_built(encoder_type_of(model.config))
    return twin, None if reason else load_autoencoder(str(folder), "--output")


def check_proof(report: dict) -> None:
    """Raise RunError when the written model is not the source, beyond the differences that --force accepted. Images may
    differ by TOLERANCE, of the largest value where that is over 1: without statistics diffusers divides latents, which
    go up to the square root of their number of channels, by 1.00001."""
    wrong = [item["name"] for item in report["tensors"]["different"] if not item["rounding"]]
    if wrong:
        raise RunError(f"{len(wrong)} tensors changed, the first is '{wrong[0]}': nothing was written")
    accepted = {item["in"] for item in report["differences"]}
    for name in ("latents", "reconstructions"):
        if report["images"] is None or accepted & {"latents", name}:
            continue
        difference, value = (report["images"][name][f"largest_{kind}"] for kind in ("difference", "value"))
        if not difference <= TOLERANCE * max(1, value):  # nan included
            raise RunError(
                f"{name} differ by {difference:.3g} (largest value {value:.3g}), more than {TOLERANCE}: nothing was "
                "written"
            )


def describe(args: argparse.Namespace, source: ModelSource) -> dict:
    """The report's first part: what is converted to what."""
    config, encoder = source.model.config, source.model.config.encoder_config
    notes = list(source.notes)
    if args.target == "published":
        notes.append(f"to read it back: {' '.join(reading_flags(config))}")
    return {
        "from": args.source,
        "weights": (args.weights or "ema") if args.source in ("training", "checkpoint") else None,
        "to": args.target,
        "input": str(args.input),
        "output": str(args.output),
        "encoder": {
            "model_type": encoder.model_type,
            "hidden_size": encoder.hidden_size,
            "num_hidden_layers": encoder.num_hidden_layers,
            "patch_size": config.encoder_patch_size,
            "input_size": config.encoder_input_size,
        },
        "decoder": {
            "hidden_size": config.decoder_hidden_size,
            "num_hidden_layers": config.decoder_num_hidden_layers,
            "num_attention_heads": config.decoder_num_attention_heads,
            "intermediate_size": config.decoder_intermediate_size,
            "patch_size": config.decoder_patch_size,
            "image_size": config.image_size,
        },
        "position_table": table_kind(source.model.decoder.decoder_pos_embed),
        "latent_stats": config.use_latent_stats,
        "latent_mean": config.use_latent_stats and config.latent_stats_have_mean,
        "differences": [{"in": part, "what": text} for part, text in source.differences],
        "notes": notes,
    }


def rae_rows(report: dict) -> list:
    """The lines of the report, (name, text)."""
    encoder, decoder, tensors, images = (report[name] for name in ("encoder", "decoder", "tensors", "images"))
    statistics = "mean and variance" if report["latent_mean"] else "variance, no mean"
    rows = [
        ("from", f"{report['from']} {report['input']}" + (f", {report['weights']}" if report["weights"] else "")),
        ("to", report["to"]),
        (
            "encoder",
            "{model_type}, width {hidden_size}, {num_hidden_layers} blocks, {input_size} px in patches of "
            "{patch_size}".format(**encoder),
        ),
        (
            "decoder",
            "width {hidden_size}, {num_hidden_layers} blocks, {num_attention_heads} heads, MLP {intermediate_size}, "
            "patches of {patch_size}, {image_size} px".format(**decoder),
        ),
        ("position table", report["position_table"]),
        ("latent statistics", statistics if report["latent_stats"] else "none"),
        ("tensors", f"{tensors['number'] - len(tensors['different'])} of {tensors['number']} equal bit for bit"),
    ]
    for item in tensors["different"][:3]:
        rows.append(("", f"{item['name']} {'differs by rounding' if item['rounding'] else 'DIFFERS'}"))
    for name in ("latents", "reconstructions"):
        text = "not compared on images"
        if images is not None:
            text = "largest difference {largest_difference:.3g}, largest value {largest_value:.3g}, {number} images"
            text = text.format(number=images["number"], **images[name])
        rows.append((name, text))
    rows += [("differs", item["what"]) for item in report["differences"]]
    return rows + [("note", text) for text in report["notes"]]


def print_rows(rows: list) -> None:
    for name, text in rows:
        print(f"{name:<18}{text}")


if __name__ == "__main__":
    run_main(main)
