"""The recipe that `svdq init` writes: every key, with its meaning next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import yaml

from svdq_cli.recipe.schema import ALL_STEPS, Recipe, Section

_UNSET = {  # what a key that may be absent would look like
    "base": "black-forest-labs/FLUX.1-dev",
    "denoiser": "transformer_2",
    "revision": "main",
    "prompts": "calib_prompts/general.txt",
    "samples": 64,
    "steps": 20,
    "guidance": 3.5,
    "batch_size": 4,
    "true_cfg": 4.0,
    "height": 1024,
    "width": 1024,
    "max_sequence_length": 512,
    "image": "images/",
    "mask": "masks/",
    "video": "videos/",
    "strength": 0.6,
    "frames": 17,
    "fps": 16,
    "smoothing": "grid",
    "size_budget": "6.5GB",
    "search": list(ALL_STEPS),
}
_EXAMPLES = {
    "layers": ('- {match: "transformer_blocks.*.ff.net.2", rank: 64}', "- {match: proj_out, keep: true}"),
    "components": ("- text_encoder_2",),
    "outputs": ("- {format: nunchaku-lite, path: out/model-int4}",),
    "gates": ('psnr_db: ">= 20"', 'size_ratio: ">= 3.5"'),
}


def recipe_template(recipe: Recipe, *, schema: str | None = None) -> str:
    """The complete commented YAML of a recipe; it parses back to an equal recipe. `schema` is the path or address of
    the JSON Schema that editors should check it against."""
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += [f"version: {recipe.version}"]
    for name, field in list(Recipe.model_fields.items())[1:]:
        lines += ["", f"# {field.description}"]
        value = getattr(recipe, name)
        if isinstance(value, Section):
            lines += [f"{name}:", *_section(value)]
        elif isinstance(value, str):
            lines += [f"{name}: {_yaml(value)}"]
        elif name == "calibration":
            lines += ["# calibration:", "#   prompts: calib_prompts/general.txt"]
        else:
            lines += _collection(name, recipe.model_dump(mode="json")[name])
    return "\n".join(lines) + "\n"


def _section(section: Section) -> list[str]:
    """A section's keys with their meaning next to them; an absent one is commented out."""
    plain = section.model_dump(mode="json")
    entries: list[tuple[str, str]] = []
    for name, field in type(section).model_fields.items():
        absent = plain[name] is None
        entry = f"  # {name}: {_yaml(_UNSET[name])}" if absent else f"  {name}: {_yaml(plain[name])}"
        entries.append((entry, field.description or ""))
    width = min(40, max(len(entry) for entry, _ in entries))
    return [f"{entry:<{width}}  # {description}" for entry, description in entries]


def _collection(name: str, value: Mapping[str, object] | Sequence[object]) -> list[str]:
    """A list or mapping, one item a line; an empty one with examples to uncomment."""
    if not value:
        return [f"{name}: {_yaml(value)}", *(f"#  {line}" for line in _EXAMPLES[name])]
    if isinstance(value, Mapping):
        return [f"{name}:", *(f"  {key}: {_yaml(item)}" for key, item in value.items())]
    return [f"{name}:", *(f"  - {_yaml(item)}" for item in value)]


def _yaml(value: object) -> str:
    """A value in flow style on one line; a mapping without its absent keys."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value).items()
        value = {key: item for key, item in entries if item is not None}
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
