"""What commands return. Field names are the JSON keys of the command-line contract."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from svdq_cli.records import LayerSearch

INLINE = {"json": None}  # a mapping whose keys are in the JSON object itself


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure over images: mean, population standard deviation, extremes, and the 95 % confidence interval of the
    mean (low, high), None for a single image."""

    mean: float
    std: float
    min: float
    max: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """What was written. `sha256`: of the weight files in their order; `tensors_sha256`: of what is in them (names,
    shapes, types and bytes of all tensors), which stays the same where another program writes them again."""

    format: str
    path: str
    bytes: int
    sha256: str
    tensors_sha256: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    family: str
    model_class: str = field(metadata={"json": "class"})
    parameters: int
    source_sha256: str | None


@dataclass(frozen=True, slots=True)
class RankFacts:
    requested: int | str
    min: int
    mean: float
    max: int


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Layers by what became of them; `w4a4` with and without a low-rank branch."""

    w4a4: int
    w4a16: int
    kept: int
    w4a8: int = 0


@dataclass(frozen=True, slots=True)
class TuningSearch:
    """Held-out noise over signal of a denoiser's output, summed over the steps, before and after it was tuned."""

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class OutputSearch:
    """Held-out noise over signal of the model's output, summed over the steps, before and after its last linear was
    fitted, and the ridge of the fit: None where it stayed as it was."""

    before: float
    after: float
    ridge: float | None


@dataclass(frozen=True, slots=True)
class SearchFacts:
    layers: Mapping[str, LayerSearch]
    tuning: Mapping[str, TuningSearch]  # by denoiser; empty but for effort best
    outputs: Mapping[str, OutputSearch]  # by the last linear; empty where the step `output` was not taken


@dataclass(frozen=True, slots=True)
class LayerSqnr:
    mean: float
    min: float
    per_layer: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ByteFacts:
    """Bytes of the quantized model component: input and output weights, and their ratio."""

    input: int
    output: int
    ratio: float


@dataclass(frozen=True, slots=True)
class HiddenSqnr:
    """SQNR in dB of a text encoder's hidden states for prompts that it was not rounded for: mean over its blocks, and
    of the last one."""

    mean: float
    last: float


@dataclass(frozen=True, slots=True)
class TextEncoderFacts:
    """A text encoder with 4-bit weights. `kept`: linear layers at 16 bits, with the reason. `layer_sqnr_db` is of
    outputs where it was calibrated, of weights where it was not; None where that is not known, of a plan or from the
    headers of a checkpoint. `hidden_sqnr_db`: None too where too few prompts were there to hold any out."""

    model_class: str = field(metadata={"json": "class"})
    bytes: ByteFacts
    w4a16: int
    kept: Mapping[str, str]
    calibrated: bool | None = None
    layer_sqnr_db: LayerSqnr | None = None
    hidden_sqnr_db: HiddenSqnr | None = None


@dataclass(frozen=True, slots=True)
class ConvertSeconds:
    calibrate: float
    solve: float
    pack: float
    check: float
    total: float


@dataclass(frozen=True, slots=True)
class PeakFacts:
    ram_bytes: int
    vram_bytes: int | None


@dataclass(frozen=True, slots=True)
class ConvertReport:
    status: str
    outputs: tuple[OutputFile, ...]
    model: ModelFacts
    read_as: str  # how the source was stored: "diffusers folder", "single file, original (BFL) names", ...
    precision: str
    effort: str
    data_free: bool
    rank: RankFacts
    layers: LayerCounts
    layer_sqnr_db: LayerSqnr
    search: SearchFacts
    bytes: ByteFacts
    seconds: ConvertSeconds
    peak: PeakFacts
    fingerprint: str
    svdq_version: str
    recipe: Mapping[str, object]
    warnings: tuple[str, ...]
    gates_missed: tuple[str, ...] = ()
    layers_taken_over: int = 0  # solved by an earlier run that this one went on from
    # versions, sha256 of all inputs
    provenance: Mapping[str, object] = field(default_factory=dict[str, object])
    text_encoders: Mapping[str, TextEncoderFacts] = field(default_factory=dict[str, TextEncoderFacts])
    command: str = "convert"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class PlanSeconds:
    """What each stage of a conversion is predicted to take."""

    prepare: float  # reading the model's headers, importing its class, the digest of its weights
    calibrate: float
    solve: float
    pack: float
    check: float
    total: float


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """The prompts that a run reads, and how many of them it uses."""

    read_from: str  # "column caption of p.csv"
    available: int
    used: int


@dataclass(frozen=True, slots=True)
class GpuConversion:
    """Whether a conversion fits a card, and what it is predicted to take there."""

    fits: bool
    seconds: tuple[float, float] | None  # the better end of the range, then the worse; None without rates
    peak_bytes: int  # what it takes; the least that it needs, where that does not fit
    lack: str | None = None  # of host memory, where `--max-ram` allows too little


@dataclass(frozen=True, slots=True)
class GpuGeneration:
    """Whether generating one image with the converted model fits a card."""

    fits: bool  # all components on the card at once
    fits_with_offload: bool  # one component at a time
    peak_bytes: int  # at once
    offload_peak_bytes: int  # one at a time


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What `--plan --gpu` predicts for a card that this machine need not have."""

    name: str
    memory_bytes: int
    convert: GpuConversion
    generate: GpuGeneration
    basis: str  # where the figures come from


@dataclass(frozen=True, slots=True)
class SizeBudgetFacts:
    """`size_budget`, in bytes of an output's weight files with their headers: `least` are needed, and what is left goes
    to the layers that gain the most by it, which is measured while converting."""

    wanted: int
    least: int
    left: int


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """A refusal as scripts read it: the exit code, a stable kind, what and where, and what to do."""

    code: int
    kind: str
    message: str
    hint: str | None
    where: str | None


class Refusal(Protocol):
    """What every error of svdq says of itself."""

    message: str
    hint: str | None
    where: str | None

    @property
    def kind(self) -> str: ...


def error_facts(error: Refusal, code: int) -> ErrorFacts:
    """A refusal's facts. `code`: its exit code."""
    return ErrorFacts(code, error.kind, error.message, error.hint, error.where)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `--plan` predicts. Bytes are peaks: of the process, of torch's GPU allocator (None without a GPU), and of
    the disk, work folder included; `disk_kept_bytes` of these are there, of the run that `--resume` goes on with."""

    model: ModelFacts
    read_as: str  # how the source was stored: "diffusers folder", "single file, original (BFL) names", ...
    precision: str
    effort: str
    rank: RankFacts
    layers: LayerCounts
    bytes: ByteFacts
    disk_bytes: int
    seconds: float
    ram_bytes: int
    vram_bytes: int | None
    recipe: Mapping[str, object]
    warnings: tuple[str, ...]
    stages: PlanSeconds
    prompts: PromptFacts | None = None  # None: it uses none
    sampling: SampledFacts | None = None  # None: it samples nothing
    gpu: GpuFacts | None = None  # of the card that --gpu names
    size_budget: SizeBudgetFacts | None = None
    text_encoders: Mapping[str, TextEncoderFacts] = field(default_factory=dict[str, TextEncoderFacts])
    disk_kept_bytes: int = 0
    error: ErrorFacts | None = None  # for want of what the conversion would refuse to begin on this machine
    command: str = "convert"
    status: str = "planned"  # or "error", with an error
    schema: int = 1


@dataclass(frozen=True, slots=True)
class SampledFacts:
    """What a conversion samples for each prompt. `frames`: 1 of an image. `tokens`: of the image or video in the
    denoiser, without the text's."""

    width: int
    height: int
    frames: int
    steps: int
    tokens: int


# By key of `svdq_cli.metrics`: over the images, or of all of them in one. None: not measured.
Figures = Mapping[str, Summary | float | None]


@dataclass(frozen=True, slots=True)
class ReferenceFacts:
    """Figures of the 16-bit images themselves, which need no other image to compare with.

    `seconds_per_picture`: of the clock; `processor_seconds_per_picture`: of all processors together.
    `machine_was_busy`: the clock's say nothing of the model, because a CPU worked on other things meanwhile; None on a
    GPU.
    """

    figures: Figures = field(metadata=INLINE)
    seconds_per_picture: float | None
    processor_seconds_per_picture: float | None
    machine_was_busy: bool | None


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """Figures of videos against the 16-bit ones, over the videos; PSNR and SSIM elsewhere are means over their frames.

    `frames`: of each video. `worst_frame_psnr_db`, `worst_frame_ssim`: of each video's worst frame. `temporal_psnr_db`:
    PSNR of the differences between frames that follow each other. `audio_snr_db`: of the sound; None where there is
    none.
    """

    frames: int
    fps: float
    worst_frame_psnr_db: Summary
    worst_frame_ssim: Summary
    temporal_psnr_db: Summary
    audio_snr_db: Summary | None


# Figures of `VideoFacts` as tables have them: heading, digits after the point
VIDEO_FIGURES: Mapping[str, tuple[str, int]] = {
    "worst_frame_psnr_db": ("worst frame PSNR (dB)", 2),
    "worst_frame_ssim": ("worst frame SSIM", 4),
    "temporal_psnr_db": ("frame to frame PSNR (dB)", 2),
    "audio_snr_db": ("sound SNR (dB)", 2),
}


def video_columns(video: VideoFacts | None) -> tuple[tuple[str, Summary, int], ...]:
    """What was measured of videos, for tables: heading, figure, digits after the point. Nothing of images."""
    found = {key: getattr(video, key, None) for key in VIDEO_FIGURES}
    return tuple(
        (*VIDEO_FIGURES[key][:1], value, VIDEO_FIGURES[key][1]) for key, value in found.items() if value
    )


# What the other 4-bit models of an evaluation are called, by their names in JSON
BASELINE_TITLES: Mapping[str, str] = {"rtn": "naive 4-bit", "nf4": "bitsandbytes NF4"}


@dataclass(frozen=True, slots=True)
class BaselineFacts:
    """Images of one origin against the 16-bit ones. None: not measured, `EvalReport.missing` says why; `video` is None
    of images. Times: see `ReferenceFacts`."""

    figures: Figures = field(metadata=INLINE)
    seconds_per_picture: float | None
    processor_seconds_per_picture: float | None
    machine_was_busy: bool | None
    video: VideoFacts | None = None

    def summary(self, key: str) -> Summary:
        """Of a figure that is always measured."""
        return _summary(self.figures, key)


@dataclass(frozen=True, slots=True)
class OutputSqnr:
    """Signal to quantization noise in dB of the whole model's output, on the inputs of the 16-bit trajectory: `step`
    over all steps, `sum` of the outputs summed over the steps, as a sampler adds them up."""

    step: float
    sum: float


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the 16-bit images look like. `meaningless`: too many are black or uniform for metrics to have a meaning."""

    black: int
    nearly_uniform: int
    alike: bool
    meaningless: bool


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The checkpoint's figures, those of the 16-bit model and of the baselines. `missing`: what could not be measured,
    with the reason and the cure.

    `noise_floor_psnr_db`: the 16-bit model against itself. `own_noise_psnr_db`: the 4-bit model against itself, its
    start noise off by one rounding; the intervals of PSNR and SSIM include it. `verdict`, `next`: sentences. `video`:
    None of images.
    """

    images: int
    figures: Figures = field(metadata=INLINE)
    reference: ReferenceFacts
    baselines: Mapping[str, BaselineFacts]
    layer_sqnr_db: LayerSqnr
    noise_floor_psnr_db: float | None
    own_noise_psnr_db: float | None
    output_sqnr_db: OutputSqnr | None
    sixteen_bit_images: ImageFacts
    verdict: str
    next: str
    missing: Mapping[str, str]
    seconds_per_picture: float | None
    processor_seconds_per_picture: float | None  # these two: see `ReferenceFacts`
    machine_was_busy: bool | None
    seconds: float
    backend: str  # of the 4-bit layers, and why
    video: VideoFacts | None = None
    page: str | None = None  # the HTML report
    same_source: bool | None = None  # see CheckReport; what speaks against it is in `warnings`
    loras: tuple[str, ...] = ()  # the same
    warnings: tuple[str, ...] = ()
    gates_missed: tuple[str, ...] = ()
    command: str = "eval"
    status: str = "ok"
    schema: int = 1

    @property
    def psnr_db(self) -> Summary:
        return _summary(self.figures, "psnr_db")

    @property
    def ssim(self) -> Summary:
        return _summary(self.figures, "ssim")


def _summary(figures: Figures, key: str) -> Summary:
    found = figures[key]
    assert isinstance(found, Summary)
    return found


@dataclass(frozen=True, slots=True)
class PassFacts:
    """One pass of an evaluation. `key`: how `--without` names it; None for what can't be left out. `calls` of the
    denoiser. `seconds`: the range; None where nothing is known of the speed."""

    title: str
    key: str | None
    why: str
    images: int
    calls: int
    seconds: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class EvalPlanReport:
    """What `svdq eval --plan` predicts. `missing`: passes that would be left out, with the reason."""

    images: int
    steps: int
    width: int
    height: int
    frames: int  # 1 of an image
    passes: tuple[PassFacts, ...]
    seconds: tuple[float, float] | None
    basis: str
    missing: Mapping[str, str]
    warnings: tuple[str, ...]
    command: str = "eval"
    status: str = "planned"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class CheckProblem:
    layer: str
    what: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """`layer_error`: relative Frobenius error of the reconstructed weight per layer; None without a source.
    `noted_error`: what the conversion measured of it and noted in the file (before LoRAs were folded in); None without
    a source, and where the file has no such record.
    `same_source`: whether the source is the one that the checkpoint was made from, by its digest; None without a
    source, and where the checkpoint records no digest. `loras`: LoRAs (FILE:WEIGHT) that were found by the checkpoint's
    own record and merged into the source."""

    status: str
    format: str
    layers: int
    problems: tuple[CheckProblem, ...]
    layer_error: Mapping[str, float] | None
    noted_error: Mapping[str, float] | None = None
    same_source: bool | None = None
    loras: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    text_encoders: tuple[str, ...] = ()  # components with 4-bit weights, which were checked too
    command: str = "check"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class InspectLayer:
    name: str
    in_features: int = field(metadata={"json": "in"})
    out_features: int = field(metadata={"json": "out"})
    role: Literal["w4a4", "w4a8", "w4a16", "kept"]
    rank: int | None
    input: str | None = None  # the layer whose input it shares (itself, where it is alone); None where kept
    kept_because: str | None = (
        None  # why it stays at 16 bits; None where it does not, or where a checkpoint is silent
    )


@dataclass(frozen=True, slots=True)
class InspectReport:
    """`loras`: of a checkpoint, those merged before the conversion and folded in after it, as --lora names them."""

    kind: Literal["source", "checkpoint"]
    family: str
    model_class: str = field(metadata={"json": "class"})
    format: str | None
    precision: str | None
    rank: int | None
    parameters: int
    layers: tuple[InspectLayer, ...]
    bytes: ByteFacts
    provenance: Mapping[str, object] | None
    read_as: str | None = None  # of a source: how its weights are stored
    loras: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    text_encoders: Mapping[str, TextEncoderFacts] = field(default_factory=dict[str, TextEncoderFacts])
    command: str = "inspect"
    status: str = "ok"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class CalibrateReport:
    """`covariances`: inputs of which there is the covariance of more tokens than they have rows. `next`: the command
    that converts with it; empty where there was no command line."""

    path: str
    inputs: int
    prompts: int
    steps: int
    tokens_seen: int
    bytes: int
    digest: str
    seconds: float
    covariances: int = 0
    next: str = ""
    command: str = "calibrate"
    status: str = "ok"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """`width`, `height` and `frames` are 0 of a sound alone. `fps`: of a video's file. `audio_seconds`: of the sound in
    the file, alone or with its video; None where there is none. `loras`: those that ran next to the checkpoint; what
    was merged or folded into it is the checkpoint's own."""

    path: str
    backend: str
    seconds: float
    width: int
    height: int
    frames: int = 1  # more of a video
    fps: float | None = None
    audio_seconds: float | None = None
    loras: tuple[LoraFacts, ...] = ()
    warnings: tuple[str, ...] = ()
    command: str = "generate"
    status: str = "ok"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class RepackReport:
    source_format: str
    outputs: tuple[OutputFile, ...]
    layers: int
    warnings: tuple[str, ...]
    seconds: float
    command: str = "export"
    status: str = "ok"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """A LoRA that was folded or run: its file, the weight that it was given, and the sha256 of the file. `component`:
    the denoiser that it is for; None where there is one, or the names in the file tell."""

    path: str
    weight: float
    sha256: str
    component: str | None = None


@dataclass(frozen=True, slots=True)
class LoraKey:
    """What became of one layer of a LoRA file. `applied`: it is in the low-rank branch; `merged`: added to a 16-bit
    weight. `error`: of what had to be cut to a rank, relative to the change (Frobenius norm)."""

    lora: str
    key: str
    layers: tuple[str, ...]  # of the model
    kind: str | None
    rank: int | None
    how: Literal["applied", "merged", "not applicable"]
    error: float | None
    why: str | None


@dataclass(frozen=True, slots=True)
class LoraReport:
    """`layer_error`: what --max-rank cut off each layer's branch, relative to it (Frobenius norm). `next`: a command
    that looks at the result, ready to be pasted but for names in capitals; None of a LoRA file for another engine."""

    source_format: str
    outputs: tuple[OutputFile, ...]
    loras: tuple[LoraFacts, ...]
    keys: tuple[LoraKey, ...]
    rank: Mapping[str, int]  # "before" and "after": the largest of the file
    bytes: Mapping[str, int]  # "before" and "after", of the weight file
    layer_error: Mapping[str, float]
    warnings: tuple[str, ...]
    seconds: float
    peak: PeakFacts
    next: str | None = None
    command: str = "lora"
    status: str = "ok"
    schema: int = 1


Report = (
    ConvertReport
    | RepackReport
    | LoraReport
    | PlanReport
    | EvalReport
    | EvalPlanReport
    | CheckReport
    | InspectReport
    | CalibrateReport
    | GenerateReport
)


def to_json(report: object) -> dict[str, object]:
    """A report record as the JSON object of the contract (`schema` and `command` first)."""
    plain = _fields(report)
    first = {key: plain.pop(key) for key in ("schema", "command", "status") if key in plain}
    return {**first, **plain}


def json_text(report: object) -> str:
    """JSON that every parser reads: a figure that is not a finite number is null, a file name that is not a UTF-8
    a file name that is not UTF-8 is escaped."""
    text = json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _fields(record: object) -> dict[str, object]:
    known = cast("dict[str, Field[object]]", getattr(record, "__dataclass_fields__", {}))
    plain: dict[str, object] = {}
    for name, about in known.items():
        key, value = about.metadata.get("json", name), _plain(getattr(record, name))
        plain |= cast("dict[str, object]", value) if key is None else {str(key): value}
    return plain


def _plain(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in cast("tuple[object, ...]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
