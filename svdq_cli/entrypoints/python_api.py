"""The commands as Python functions: `svdq_cli.convert` and its siblings.

Each function takes what the command of its name takes, does the same work, and returns the report that the command
prints with `--json` as a record (`svdq_cli.reports`). Nothing is printed. What goes wrong is raised as an `SvdqError`
(`svdq_cli.errors`) with the command's message, hint and exit code. Torch and diffusers are imported inside, so that
importing a function costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from svdq_cli.errors import UsageError
from svdq_cli.prepare.from_command_line import (
    files_of_loras,
    outputs_of,
    override,
    recipe_of,
    refuse_unused_prompts,
    rules_named,
    with_default_calibration,
)
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import SIZE_HINT, Lora, Recipe, bytes_of_size, lora_of
from svdq_cli.records import Observer, ignore_events

if TYPE_CHECKING:
    from svdq_cli.entrypoints.generate import Inputs
    from svdq_cli.reports import (
        CalibrateReport,
        CheckReport,
        ConvertReport,
        EvalReport,
        LoraReport,
        RepackReport,
    )

Source = str | Path | Recipe
Loras = str | Path | Mapping[str, float] | Mapping[Path, float] | Sequence[Lora]


def convert(
    source: Source,
    out: str | Path | None = None,
    *,
    precision: Literal["int4", "nvfp4"] | None = None,
    effort: Literal["datafree", "fast", "balanced", "best"] | None = None,
    rank: int | Literal["auto"] | None = None,
    formats: str | Sequence[str] | None = None,
    calibration: str | Path | None = None,
    prompts: str | Path | None = None,
    prompt_column: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    family: str | None = None,
    base: str | Path | None = None,
    denoiser: str | None = None,
    loras: Loras | None = None,
    device: str = "auto",
    work: str | Path | None = None,
    resume: bool = False,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    overwrite: bool = False,
    on_event: Observer = ignore_events,
) -> ConvertReport:
    """Convert a 16-bit diffusion model to a 4-bit SVDQuant checkpoint, as `svdq convert` does.

    `source` is a recipe (`.yaml` file, name of a ready recipe, or `Recipe`), a diffusers pipeline folder, a
    `.safetensors` or `.gguf` file, a Hub id, or `"demo"`. A bare model without `prompts` and `calibration` is
    converted data-free. Everything that is None is the recipe's or the default.

    Args:
        out: Where to write; the recipe's outputs when None.
        rank: Of the 16-bit branch: a multiple of 16, or "auto" (searched for each layer).
        formats: One or more of the output formats; "nunchaku-lite" (a diffusers folder) by default.
        calibration: A folder that `calibrate` wrote, instead of prompts.
        prompts: A file or folder of prompts, or the name of a prompt set.
        frames, fps: Of videos: frames of each, and how many of them make a second.
        seed: Of calibration and search.
        base: Pipeline (folder or Hub id) with the parts that a single-file source lacks.
        loras: Merged into the model first: one path, strengths by path, or `svdq_cli.Lora` records, which say for
            which of several denoisers each is.
        work: Folder for unfinished work; hidden next to the output when None. `resume` continues from it.
        max_ram, max_vram: Bytes, or text such as "16GiB".
        on_event: Called with every step of progress (`svdq_cli.records.Event`).

    Returns:
        The report, whose `status` is "ok", or "gate-missed" where a gate of the recipe was missed (the outputs are
        kept).

    Raises:
        UsageError, RecipeError: Arguments or recipe are wrong.
        InputError: The model is missing, damaged, not supported or already quantized.
        OutOfResourcesError: Memory or disk ran out; continue with `resume=True`.
        CheckFailedError: The self-check failed; nothing is under the output's name.
    """
    from svdq_cli.conversion.convert import convert as run

    options = _options(device, overwrite, work=work, resume=resume, max_ram=max_ram, max_vram=max_vram)
    given = {
        "outputs.path": _path(out),
        "outputs.format": [formats] if isinstance(formats, str) else list(formats or []),
        "quantization.precision": precision,
        "quantization.effort": effort,
        "quantization.rank": rank,
        "quantization.seed": seed,
        "model.family": family,
        "model.base": _text(base),
        "model.denoiser": denoiser,
        **_sampling(prompts, prompt_column, samples, steps, width, height, frames, fps, batch_size, seed),
    }
    recipe, options = _recipe(source, options, loras)
    recipe = override(recipe, given)
    refuse_unused_prompts(recipe, given)
    with _rules_named(source):
        return run(
            recipe, outputs_of(recipe), calibration=_path(calibration), options=options, observe=on_event
        )


def calibrate(
    source: Source,
    out: str | Path,
    *,
    prompts: str | Path | None = None,
    prompt_column: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    family: str | None = None,
    base: str | Path | None = None,
    denoiser: str | None = None,
    loras: Loras | None = None,
    device: str = "auto",
    work: str | Path | None = None,
    resume: bool = False,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    overwrite: bool = False,
    on_event: Observer = ignore_events,
) -> CalibrateReport:
    """Run prompts through a 16-bit model and keep its activation statistics, as `svdq calibrate` does.

    `out` becomes a folder that any number of conversions of this model take as `calibration`. Arguments mean what they
    mean in `convert`. Prompts that suit the model are chosen when none are named.

    Raises:
        UsageError, RecipeError: Arguments or recipe are wrong.
        InputError: The model or the prompts are missing, damaged or not supported.
        OutOfResourcesError: Memory or disk ran out; continue with `resume=True`.
    """
    from svdq_cli.conversion.calibrate import calibrate as run

    options = _options(device, overwrite, work=work, resume=resume, max_ram=max_ram, max_vram=max_vram)
    recipe, options = _recipe(source, options, loras)
    given = {
        "model.family": family,
        "model.base": _text(base),
        "model.denoiser": denoiser,
        **_sampling(prompts, prompt_column, samples, steps, width, height, frames, fps, batch_size, seed),
    }
    recipe = override(with_default_calibration(recipe), given)
    with _rules_named(source):
        return run(recipe, Path(out), options=options, observe=on_event)


def check(
    checkpoint: str | Path,
    *,
    against: Source | None = None,
    base: str | Path | None = None,
    loras: Loras | None = None,
    on_event: Observer = ignore_events,
) -> CheckReport:
    """Check a checkpoint's structure and finite values and, with `against`, the reconstruction error of every layer.

    `against` is the 16-bit model (or recipe) that the checkpoint was made from, `loras` what was merged into it. `base`
    is the pipeline with the parts that a single file lacks.

    Returns:
        The report, whose `status` is "ok" or "failed"; `problems` says what is wrong, by layer.

    Raises:
        InputError: `checkpoint` is not one, or `against` is a different model than it was made from.
    """
    from svdq_cli.checkpoint.check import check as run
    from svdq_cli.entrypoints.check import check_against
    from svdq_cli.prepare.locate import locate_base

    if against is None:
        pipeline = locate_base(str(base)) if base is not None else None
        return run(Path(checkpoint), base=pipeline, observe=on_event)
    recipe, options = _recipe(against, _options("cpu"), loras)
    recipe = override(recipe, {"model.base": _text(base)})
    return check_against(Path(checkpoint), recipe, options=options, observe=on_event)


def evaluate(
    checkpoint: str | Path,
    against: Source,
    *,
    report: str | Path | None = None,
    prompts: str | Path | None = None,
    prompt_column: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    video: str | Path | None = None,
    strength: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    without: Sequence[str] = (),
    backend: str = "auto",
    base: str | Path | None = None,
    loras: Loras | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_event: Observer = ignore_events,
) -> EvalReport:
    """Generate with a checkpoint and with the 16-bit model at equal seeds, and compare the images, as `svdq eval` does.

    Args:
        against: The 16-bit model that the checkpoint was made from, or a recipe that names it.
        report: Folder that keeps images, figures and `report.html`; a second run adds what is missing.
        samples: Number of prompts; 16 when None.
        image, mask, video, strength: What pipelines that edit, fill in or animate start from.
        without: Passes to leave out, of "naive", "floor", "own-noise", "outputs" and "nf4".
        backend, base, loras, frames, fps: As in `load_pipeline` and `convert`; base, loras of the 16-bit model.

    Returns:
        PSNR in dB, SSIM and installed metrics against the 16-bit images, those of the baselines, a verdict in words.

    Raises:
        UsageError, InputError: Arguments are wrong; a model is missing, damaged or not a whole pipeline.
    """
    from svdq_cli.entrypoints.evaluate import recipe_against
    from svdq_cli.evaluation.passes import passes_of_text
    from svdq_cli.evaluation.run import evaluate as run

    named, options = _recipe(against, _options(device, overwrite), loras)
    named = override(named, {"model.base": _text(base)})
    given = _sampling(prompts, prompt_column, samples, steps, width, height, frames, fps, batch_size, seed)
    inputs = _inputs(image, mask, video, strength)
    recipe = recipe_against(Path(checkpoint), named, given, inputs=inputs, options=options)
    return run(
        *(Path(checkpoint), recipe),
        report_folder=_path(report),
        without=passes_of_text(list(without)),
        backend=backend,
        options=options,
        observe=on_event,
    )


def export(
    checkpoint: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    on_event: Observer = ignore_events,
) -> RepackReport:
    """Pack a checkpoint for another runtime without quantizing again, as `svdq export` does.

    `to` is an output format. `base` is a pipeline (folder or Hub id) with the parts that a single file lacks, where
    the target is a pipeline folder. The quantized layers keep their bits.

    Raises:
        UsageError: The format is unknown, or cannot hold exactly what the checkpoint holds.
        InputError: The checkpoint is missing or damaged.
    """
    from svdq_cli.entrypoints.export import export as run
    from svdq_cli.prepare.locate import locate_base

    pipeline = locate_base(str(base)) if base is not None else None
    options = _options("cpu", overwrite)
    return run(Path(checkpoint), to, Path(out), base=pipeline, options=options, observe=on_event)


def fold_lora(
    checkpoint: str | Path,
    loras: Loras,
    out: str | Path,
    *,
    max_rank: int | None = None,
    approximate_rank: int | None = None,
    skip_w4a16: bool = False,
    overwrite: bool = False,
    on_event: Observer = ignore_events,
) -> LoraReport:
    """Fold LoRAs into the low-rank branch of a checkpoint without quantizing again, as `svdq lora` does.

    Args:
        loras: One path, strengths by path (`{"style.safetensors": 0.8}`), or `svdq_cli.Lora` records, which say for
            which of several denoisers each is.
        max_rank: Compress each branch to this rank by SVD; the report has every layer's error.
        approximate_rank: Rank that DoRA, whole differences, and LoHa or LoKr of a higher rank are cut to; 64 when None.
        skip_w4a16: Leave modulation layers as they are.

    Raises:
        UsageError, InputError: A LoRA does not fit the model, or the format has no place for it; nothing is written.
    """
    from svdq_cli.lora.fold import FoldSettings, fold

    settings = FoldSettings(max_rank=max_rank, skip_w4a16=skip_w4a16)
    if approximate_rank is not None:
        settings = replace(settings, approximate_rank=approximate_rank)
    files = files_of_loras(_loras(loras))
    options = _options("cpu", overwrite)
    return fold(Path(checkpoint), files, Path(out), settings=settings, options=options, observe=on_event)


def _recipe(source: Source, options: RunOptions, loras: Loras | None) -> tuple[Recipe, RunOptions]:
    """The recipe that `source` is or implies, with its LoRAs, and where its relative paths start."""
    recipe, beside = (source, None) if isinstance(source, Recipe) else recipe_of(str(source))
    if loras is not None:
        model = recipe.model.model_copy(update={"loras": (*recipe.model.loras, *_loras(loras))})
        recipe = recipe.model_copy(update={"model": model})
    return recipe, replace(options, beside=beside)


def _sampling(
    prompts: str | Path | None,
    prompt_column: str | None,
    samples: int | None,
    steps: int | None,
    width: int | None,
    height: int | None,
    frames: int | None,
    fps: float | None,
    batch_size: int | None,
    seed: int | None,
) -> dict[str, object]:
    """How the 16-bit model is sampled, by the recipe's keys."""
    return {
        "calibration.prompts": _text(prompts),
        "calibration.prompts.column": prompt_column,
        "calibration.samples": samples,
        "calibration.steps": steps,
        "calibration.width": width,
        "calibration.height": height,
        "calibration.frames": frames,
        "calibration.fps": fps,
        "calibration.batch_size": batch_size,
        "calibration.seed": seed,
    }


def _loras(given: Loras) -> list[Lora]:
    if isinstance(given, Mapping):
        return [lora_of(str(path), float(strength)) for path, strength in given.items()]
    return [lora_of(str(given))] if isinstance(given, str | Path) else list(given)


def _rules_named(source: Source) -> AbstractContextManager[None]:
    """Errors about a layer rule name the line of the recipe's file, where there is one."""
    return nullcontext() if isinstance(source, Recipe) else rules_named(str(source))


def _options(
    device: str,
    overwrite: bool = False,
    *,
    work: str | Path | None = None,
    resume: bool = False,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
) -> RunOptions:
    return RunOptions(
        device=device,
        overwrite=overwrite,
        work=_path(work),
        resume=resume,
        max_ram=_bytes("max_ram", max_ram),
        max_vram=_bytes("max_vram", max_vram),
    )


def _bytes(name: str, size: int | str | None) -> int | None:
    if not isinstance(size, str):
        return size
    if (found := bytes_of_size(size)) is None:
        raise UsageError(f"{name}={size!r}: not a size", hint=SIZE_HINT, where=name)
    return found


def _inputs(
    image: str | Path | None, mask: str | Path | None, video: str | Path | None, strength: float | None
) -> Inputs:
    from svdq_cli.entrypoints.generate import Inputs

    return Inputs(_path(image), _path(mask), _path(video), strength)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
