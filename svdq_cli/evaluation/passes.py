"""The passes of an evaluation: what is sampled with which model, and why there are as many as there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.evaluation.image_store import ImageStore, keep_image, read_frames, read_image
from svdq_cli.evaluation.layer_sqnr import JudgedLayers, judge_layers, keep_layers, kept_layers
from svdq_cli.evaluation.outputs import OutputCall, keep_outputs, kept_outputs, output_sqnr, record_outputs
from svdq_cli.evaluation.own_noise import can_nudge, nudged_start
from svdq_cli.evaluation.pass_times import start_clock
from svdq_cli.evaluation.plausible import ImageProblems, look_at
from svdq_cli.inference.backend import Backend, compute_dtype
from svdq_cli.inference.load import load_16bit_pipeline, load_pipeline, replace_layers
from svdq_cli.pipelines.generate import generate_each
from svdq_cli.pipelines.joint import joint_model
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.pipelines.siblings import makes_sounds, reading_inputs
from svdq_cli.prepare.origin import Origin
from svdq_cli.recipe import Recipe
from svdq_cli.records import Event, LayerPlan, Observer, RotatedPlan, W4A4Plan, W4A16Plan
from svdq_cli.reports import OutputSqnr
from svdq_cli.runtime.cpu_fused import engine_linear
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.naive import naive_rotated, naive_solution
from svdq_cli.runtime.nf4 import nf4_linear, require_nf4
from svdq_cli.solve.modulation import solve_w4a16
from svdq_cli.source import Source, read_tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

SQNR_PROMPTS = 8  # of the judged prompts; rows come from all their timesteps
NOISE_IMAGES = 4  # sampled twice to see what chance does
OUTPUT_PROMPTS = 2  # whose denoiser calls are kept

# Ways of sampling: the folders of the images. Baselines are called by their JSON keys.
SIXTEEN_BIT, AGAIN, CONVERTED, NUDGED = "16bit", "16bit-again", "converted", "converted-nudged"
NAIVE, NF4 = "rtn", "nf4"
TITLES = {
    SIXTEEN_BIT: "16-bit",
    AGAIN: "16-bit again",
    CONVERTED: "SVDQuant",
    NUDGED: "SVDQuant, nudged",
    NAIVE: "naive 4-bit",
    NF4: "bitsandbytes NF4",
}


@dataclass(frozen=True, slots=True)
class Pass:
    """`way`: the folder of its images; None where it keeps none. `key`: how `--without` names it; None for what can't
    be left out. `most`: images at most; None: all. `four_bit`: whether 4-bit layers of svdq's run in it."""

    title: str
    why: str
    way: str | None = None
    key: str | None = None
    most: int | None = None
    four_bit: bool = False


PASSES = (
    Pass(TITLES[SIXTEEN_BIT], "the reference for all others", SIXTEEN_BIT),
    Pass(
        TITLES[AGAIN],
        "how far two runs of the 16-bit model differ: no conversion can be closer",
        AGAIN,
        key="floor",
        most=NOISE_IMAGES,
    ),
    Pass("layer inputs", "the input of every layer, for its own SQNR", most=SQNR_PROMPTS),
    Pass(
        "model outputs",
        "the whole model's output at equal inputs: the figure least affected by chance",
        key="outputs",
        most=OUTPUT_PROMPTS,
    ),
    Pass(
        TITLES[NAIVE],
        "the result of plain rounding: a conversion must be better",
        NAIVE,
        key="naive",
        four_bit=True,
    ),
    Pass(TITLES[NF4], "another 4-bit method, if it is installed", NF4, key="nf4"),
    Pass(TITLES[CONVERTED], "the checkpoint", CONVERTED, four_bit=True),
    Pass(
        TITLES[NUDGED],
        "with start noise off by one rounding: how much of a difference is chance",
        NUDGED,
        key="own-noise",
        most=NOISE_IMAGES,
        four_bit=True,
    ),
)
OPTIONAL_PASSES = tuple(each.key for each in PASSES if each.key)


def passes_of_text(texts: Sequence[str]) -> frozenset[str]:
    """`--without naive,floor`. Raises UsageError for a pass that does not exist or can't be left out."""
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in names:
        if name not in OPTIONAL_PASSES:
            raise UsageError(
                f"--without {name}: not a pass that can be skipped",
                hint=f"the passes that can be skipped are {', '.join(OPTIONAL_PASSES)}",
                where="--without",
            )
    return frozenset(names)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The models, prompts and settings of an evaluation."""

    path: Path
    checkpoint: Checkpoint
    source: Source  # the 16-bit model, with the LoRAs that the checkpoint holds
    origin: Origin  # whether that is what the checkpoint was made from
    recipe: Recipe  # how images are sampled, every setting named
    prompts: tuple[str, ...]
    settings: SamplingSettings
    device: torch.device
    backend: Backend  # of the 4-bit layers, and how it was asked for
    asked_backend: str


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What the passes left besides the images in the gallery. `missing`: what could not be measured, and why."""

    layers: JudgedLayers
    problems: ImageProblems  # of the 16-bit images
    converted_problems: ImageProblems
    outputs: OutputSqnr | None
    missing: dict[str, str] = field(default_factory=dict[str, str])


def sample_all(run: Run, image_store: ImageStore, without: Collection[str], observe: Observer) -> Sampled:
    """All passes but those in `without`, as far as their images are not in the gallery yet."""
    missing = {FIGURES[key]: f"skipped by --without {key}" for key in without}
    layers, problems, calls = _sixteen_bit_and_naive(run, image_store, without, observe)
    if "nf4" not in without and (lack := _generate_nf4(run, image_store, observe)):
        missing[NF4] = lack
    outputs = _converted(run, image_store, calls, without, missing, observe)
    different = len(set(run.prompts)) > 1
    converted = look_at(
        _images(run, image_store, CONVERTED), different_prompts=different, kind=_kind(image_store, CONVERTED)
    )
    if converted.black and not problems.black:
        for sentence in converted.sentences("4-bit")[:1]:
            observe(Event("warning", "evaluate", detail=sentence))
    if "outputs" not in without and outputs is None:
        missing.setdefault("output_sqnr_db", "the denoiser's calls can't be compared step by step")
    return Sampled(layers, problems, converted, outputs, missing)


FIGURES = {  # of the report, by the pass that they need
    "floor": "noise_floor_psnr_db",
    "outputs": "output_sqnr_db",
    "naive": NAIVE,
    "nf4": NF4,
    "own-noise": "own_noise_psnr_db",
}


def generate_missing(
    image_store: ImageStore,
    way: str,
    run: Run,
    load: Callable[[], DiffusionPipeline],
    observe: Observer,
    *,
    count: int | None = None,
    inside: Callable[[DiffusionPipeline], AbstractContextManager[None]] = lambda pipe: nullcontext(),
) -> None:
    """The images that are not there yet, of the first `count` prompts, sampled `inside` a context of the pipeline.
    `load` is called only where some are missing.

    They are sampled in the batches of the whole run, which on some machines decide the last bits.
    """
    missing = set(image_store.missing(way, len(run.prompts[:count])))
    if not missing:
        return
    pipe = load()
    clock = start_clock(run.device)
    kept = 0
    with inside(pipe):
        generated = generate_each(
            pipe,
            run.prompts,
            settings=run.settings,
            stage=f"generate {TITLES.get(way, way)}",
            observe=observe,
            wanted=missing.__contains__,
        )
        for index, made in generated:
            keep_image(image_store, way, index, made)
            kept += 1
    clock.note(image_store.folder, way, images=kept)


def _images(run: Run, image_store: ImageStore, way: str) -> Iterator[Image]:
    return (read_image(image_store, way, index) for index in range(len(run.prompts)))


def _kind(image_store: ImageStore, way: str) -> str:
    """What was generated, in a word."""
    return "video" if sum(1 for _ in islice(read_frames(image_store, way, 0), 2)) > 1 else "image"


def _sixteen_bit_and_naive(
    run: Run, image_store: ImageStore, without: Collection[str], observe: Observer
) -> tuple[JudgedLayers, ImageProblems, list[OutputCall] | None]:
    """What the 16-bit pipeline is loaded for: its images, its noise, what its layers read, its outputs (None where
    these are not needed), and the naive baseline, for which it is taken apart at last."""
    pipe: DiffusionPipeline | None = None

    def loaded() -> DiffusionPipeline:
        nonlocal pipe
        pipe = pipe or _sixteen_bit_pipeline(run)
        return pipe

    def naive() -> DiffusionPipeline:
        with_naive = loaded()
        _replace(with_naive, run, _naive_layer)
        return with_naive

    generate_missing(image_store, SIXTEEN_BIT, run, loaded, observe)
    problems = look_at(
        _images(run, image_store, SIXTEEN_BIT),
        different_prompts=len(set(run.prompts)) > 1,
        kind=_kind(image_store, SIXTEEN_BIT),
    )
    for sentence in problems.sentences("16-bit"):
        # now, so that a run of hours can be stopped
        observe(Event("warning", "evaluate", detail=sentence))
    if "floor" not in without:
        generate_missing(image_store, AGAIN, run, loaded, observe, count=NOISE_IMAGES)
    layers = _judged(run, image_store, loaded, observe)
    calls: list[OutputCall] | None = None
    if "outputs" not in without and not _outputs_file(image_store).is_file():
        prompts = run.prompts[:OUTPUT_PROMPTS]
        calls = record_outputs(loaded(), run.source.components, prompts, run.settings, observe)
    if "naive" not in without:
        generate_missing(image_store, NAIVE, run, naive, observe)
    return layers, problems, calls


def _converted(
    run: Run,
    image_store: ImageStore,
    calls: list[OutputCall] | None,
    without: Collection[str],
    missing: dict[str, str],
    observe: Observer,
) -> OutputSqnr | None:
    """The checkpoint's images, its own noise and its outputs on the 16-bit model's inputs."""
    pipe: DiffusionPipeline | None = None

    def loaded() -> DiffusionPipeline:
        nonlocal pipe
        pipe = pipe or _converted_pipeline(run)
        return pipe

    generate_missing(image_store, CONVERTED, run, loaded, observe)
    if "own-noise" not in without and image_store.missing(NUDGED, len(run.prompts[:NOISE_IMAGES])):
        if can_nudge(loaded()):
            generate_missing(
                image_store, NUDGED, run, loaded, observe, count=NOISE_IMAGES, inside=nudged_start
            )
        else:
            missing["own_noise_psnr_db"] = (
                f"{type(loaded()).__name__} does not show where its start noise is generated"
            )
    if "outputs" in without:
        return None
    path = _outputs_file(image_store)
    if not path.is_file():
        models = {name: getattr(loaded(), name) for name in run.source.components}
        keep_outputs(path, output_sqnr(models, calls or [], run.device, steps=run.settings.steps))
    return kept_outputs(path)


def _outputs_file(image_store: ImageStore) -> Path:
    return image_store.folder / "outputs.json"


def _judged(
    run: Run, image_store: ImageStore, loaded: Callable[[], DiffusionPipeline], observe: Observer
) -> JudgedLayers:
    path = image_store.folder / "layers.safetensors"
    prompts = run.prompts[:SQNR_PROMPTS]
    if (found := kept_layers(path, run.checkpoint, run.source, prompts=len(prompts))) is not None:
        return found
    pipe = loaded()
    model = joint_model(pipe, run.source.components)

    def named(event: Event) -> None:
        observe(replace(event, stage="layer inputs"))

    found = judge_layers(pipe, model, run.checkpoint, run.source, prompts, run.settings, named)
    keep_layers(path, found, prompts=len(prompts))
    return found


def _generate_nf4(run: Run, image_store: ImageStore, observe: Observer) -> str | None:
    """The baseline of bitsandbytes, or why there is none."""
    try:
        require_nf4(run.device)
    except EnvironmentLacksError as lack:
        return f"{lack.message}; {lack.hint}"

    def nf4() -> DiffusionPipeline:
        pipe = _sixteen_bit_pipeline(run)
        _replace(pipe, run, _nf4_layer)
        return pipe

    generate_missing(image_store, NF4, run, nf4, observe)
    return None


def _sixteen_bit_pipeline(run: Run) -> DiffusionPipeline:
    pipe = load_16bit_pipeline(run.source, class_name=run.checkpoint.model_class, device=run.device)
    if makes_sounds(pipe):
        raise UsageError(
            f"{type(pipe).__name__} makes sounds, and svdq eval compares images and videos",
            hint="listen to what svdq generate -o NAME.wav makes; svdq check --against SOURCE compares the weights",
        )
    return reading_inputs(pipe, run.settings)


def _converted_pipeline(run: Run) -> DiffusionPipeline:
    # a single file has no other components of its own
    base = run.checkpoint.source.pipeline or run.source.pipeline
    pipe = load_pipeline(
        run.path,
        device=run.device,
        dtype=compute_dtype(run.device),
        backend=run.asked_backend,
        base=base,
    )
    return reading_inputs(pipe, run.settings)


MakeLayer = Callable[[Run, LayerPlan, Tensor, Tensor | None], nn.Module]


def _replace(pipe: DiffusionPipeline, run: Run, make: MakeLayer) -> None:
    """The layers that the checkpoint converts, made from the 16-bit weights in another way."""
    layers: dict[str, nn.Module] = {}
    for plan in run.checkpoint.layers:
        weight = read_tensor(run.source, f"{plan.name}.weight").flatten(1)
        bias = read_tensor(run.source, f"{plan.name}.bias") if plan.linear.bias else None
        layers[plan.name] = make(run, plan, weight, bias).to(run.device)
    replace_layers(pipe, run.source.components, layers)


def _naive_layer(run: Run, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Rounded to nearest, nothing else."""
    dtype = run.checkpoint.dtype
    match plan:
        case W4A4Plan():
            solution = naive_solution(plan, weight, bias, dtype)
        case RotatedPlan():
            solution = naive_rotated(plan, weight, bias, dtype)
        case W4A16Plan():
            bias = None if bias is None else bias.float()
            solution = solve_w4a16(plan, weight.float(), bias, dtype=dtype)
    return (engine_linear(solution) if run.backend.name == "cpu" else None) or quantized_linear(solution)


def _nf4_layer(run: Run, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> nn.Module:
    return nf4_linear(weight, bias, dtype=compute_dtype(run.device))
