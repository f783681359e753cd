"""What a pipeline gives its text encoder for some prompts: the pipeline runs up to that call, without any weights.

Chat templates, fixed lengths and masks differ from pipeline to pipeline; here they are the pipeline's own.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdq_cli.errors import UsageError
from svdq_cli.pipelines.batches import Batch
from svdq_cli.pipelines.first_call import first_call
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.source import Source, denoisers_of, pipeline_index, text_encoders_of
from svdq_cli.source.classes import arguments_of, empty_instance

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_LEFT_OUT = (
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
)  # decide what is returned
# Of images: what an encoder sees besides the prompt in pipelines that edit. Patches of all images lie one after another
# in PIXELS, and GRIDS says of each image how many it has.
PIXELS, GRIDS, IMAGE_TOKENS = "pixel_values", "image_grid_thw", "mm_token_type_ids"
_OTHER_IMAGES = (
    "pixel_values_videos",
    "video_grid_thw",
    "image_sizes",
)  # not taken apart here: left out, with all


@dataclass(frozen=True, slots=True)
class EncoderCall:
    """Arguments of one call of a text encoder, of several prompts at once, each with as many images as the others."""

    arguments: Mapping[str, Any]

    @property
    def ids(self) -> Tensor:
        """(B, T) token numbers."""
        return self.arguments["input_ids"]

    @property
    def has_images(self) -> bool:
        """Whether the encoder sees images too."""
        return PIXELS in self.arguments

    def taking(self, rows: Tensor) -> EncoderCall:
        """The same of some prompts, in the order of `rows` (n,), which may name one twice."""
        count = len(self.ids)

        def some(name: str, value: Any) -> Any:
            mine = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            return value[rows] if mine and name not in (PIXELS, GRIDS) else value

        found = {name: some(name, value) for name, value in self.arguments.items()}
        return EncoderCall(found | self._images_of(rows))

    def _images_of(self, rows: Tensor) -> dict[str, Tensor]:
        """The patches and grids of some prompts' images."""
        if not self.has_images:
            return {}
        grids, patches = self.arguments[GRIDS], self.arguments[PIXELS]
        images = list(patches.split(grids.prod(-1).tolist()))
        each = len(images) // len(self.ids)
        wanted = [row * each + image for row in rows.tolist() for image in range(each)]
        return {PIXELS: torch.cat([images[index] for index in wanted]), GRIDS: grids[wanted]}

    def cropped(self) -> EncoderCall:
        """The same without the columns that the mask hides in every prompt."""
        mask = self.arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != self.ids.shape:
            return self
        seen = mask.any(0).nonzero().flatten()
        columns = slice(int(seen[0]), int(seen[-1]) + 1)

        def some(value: Any) -> Any:
            mine = isinstance(value, Tensor) and value.shape == self.ids.shape
            return value[:, columns] if mine else value

        return EncoderCall({name: some(value) for name, value in self.arguments.items()})

    def token_weights(self) -> Tensor:
        """(B, T) float32: how much each token counts. 0 for what a mask hides; repetitions of the token before, which
        fill a prompt up or hold the place of an image, count at most as much together as all others."""
        ids = self.ids
        mask = self.arguments.get("attention_mask")
        seen = (
            mask.float()
            if isinstance(mask, Tensor) and mask.shape == ids.shape
            else torch.ones(ids.shape, dtype=torch.float32)
        )
        filling = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)
        own, filled = (seen * ~filling).sum(1, keepdim=True), (seen * filling).sum(1, keepdim=True)
        share = (own.clamp(min=1) / filled.clamp(min=1)).clamp(max=1)
        return torch.where(filling, seen * share, seen)


class _Recorded(Exception):
    """Ends the run."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _stub(model_class: Any, config: Any, *, wanted: bool) -> Any:
    """Stands in for a text encoder, of its class and without weights: ends the run where it is `wanted`, and answers
    with zeros where it is not."""
    names = list(inspect.signature(model_class.forward).parameters)[1:]
    projects = "WithProjection" in model_class.__name__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if wanted:
            raise _Recorded(given)
        text = config.get_text_config()
        ids = next(value for value in given.values() if isinstance(value, Tensor))
        projected = getattr(text, "projection_dim", 0) or text.hidden_size
        return _Zeros(len(ids), ids.shape[1], text.hidden_size, projected, projects)

    def start(self: Any) -> None:
        # its parts are there, since pipelines hook some of them before the call (Qwen-Image 2.1, JoyImage Edit)
        with torch.device("meta"):
            model_class.__init__(self, config)

    members = {"__init__": start, "forward": forward, "dtype": torch.float32, "device": torch.device("cpu")}
    return type(model_class.__name__, (model_class,), members)()


class _Zeros:
    """An answer with the fields of every class of transformers'."""

    def __init__(self, batch: int, tokens: int, width: int, projected: int, projects: bool) -> None:
        self.last_hidden_state = torch.zeros(batch, tokens, width, dtype=torch.float32)
        self.hidden_states = [self.last_hidden_state] * 256
        self.pooler_output = torch.zeros(batch, width, dtype=torch.float32)
        self.text_embeds = torch.zeros(batch, projected, dtype=torch.float32)
        self._first = self.text_embeds if projects else self.last_hidden_state

    def __getitem__(self, index: int) -> Any:
        return (self._first, self.pooler_output, self.hidden_states)[index]


def record_call(
    source: Source, component: str, prompts: Sequence[str], settings: SamplingSettings
) -> EncoderCall | str:
    """The call of the text encoder `component` for all `prompts` at once; a reason where there is none to be had."""
    assert source.pipeline is not None
    try:
        pipe = _pipeline(source, component)
        try:
            found = _arguments(pipe, range(len(prompts)), prompts, settings)
            one_by_one = found is not None and len(found["input_ids"]) < len(prompts)
        except UsageError:  # it takes one at a time
            found, one_by_one = None, True
        if one_by_one:
            found = _merged([_arguments(pipe, [index], prompts, settings) for index in range(len(prompts))])
    except Exception as error:  # whatever keeps a pipeline of any kind from running this far
        return f"the pipeline could not be run up to it ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    return "the pipeline does not call it with token numbers" if found is None else EncoderCall(found)


def _pipeline(source: Source, component: str) -> DiffusionPipeline:
    import transformers

    assert source.pipeline is not None
    index = pipeline_index(source.pipeline)
    parts: dict[str, object] = {
        each.component: empty_instance(
            str(each.config["_class_name"]), arguments_of(each.config), str(each.path)
        )
        for each in denoisers_of(source)
    }
    for name in text_encoders_of(source.pipeline):
        entry = index[name]
        assert isinstance(entry, list)
        model_class = getattr(transformers, str(entry[1]))
        config = model_class.config_class.from_pretrained(str(source.pipeline / name), local_files_only=True)
        parts[name] = _stub(model_class, config, wanted=name == component)
    return load_source_pipeline(source.pipeline, dtype=torch.float32, device=None, components=parts)


def _arguments(
    pipe: DiffusionPipeline, indices: Sequence[int], prompts: Sequence[str], settings: SamplingSettings
) -> dict[str, Any] | None:
    """What the encoder is given first, for some of the prompts."""
    chosen = tuple(prompts[index] for index in indices)
    batch = Batch(indices[0], chosen, tuple(settings.seed_of(index) for index in indices))
    try:
        first_call(pipe, (), batch, settings=settings)
    except _Recorded as recorded:
        given = {name: value for name, value in recorded.arguments.items() if value is not None}
        if isinstance(given.get("input_ids"), Tensor) and given["input_ids"].ndim == 2:
            left_out = {
                *_LEFT_OUT,
                *(() if _images_divide(given) else (PIXELS, GRIDS, IMAGE_TOKENS, *_OTHER_IMAGES)),
            }
            return {name: value for name, value in given.items() if name not in left_out}
    return None


def _images_divide(given: Mapping[str, Any]) -> bool:
    """Whether images can be told apart, as many for each prompt. Those of other encoders are left out: weights are then
    rounded for the prompt alone."""
    grids, patches = given.get(GRIDS), given.get(PIXELS)
    if not isinstance(grids, Tensor) or not isinstance(patches, Tensor) or grids.ndim != 2:
        return False
    if any(name in given for name in _OTHER_IMAGES) or len(grids) % len(given["input_ids"]):
        return False
    return int(grids.prod(-1).sum()) == len(patches)


def _merged(calls: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Calls for one prompt each as one call, of as many as are alike in everything but what is written in them."""
    found = [call for call in calls if call is not None]
    shapes = [tuple((name, getattr(value, "shape", value)) for name, value in call.items()) for call in found]
    if not found:
        return None
    usual = Counter(shapes).most_common(1)[0][0]
    alike = [call for call, shape in zip(found, shapes, strict=True) if shape == usual]
    return {
        name: torch.cat([call[name] for call in alike]) if isinstance(value, Tensor) else value
        for name, value in alike[0].items()
    }
