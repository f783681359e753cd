"""The parsers against made-up input: each answers or refuses by name, within five seconds, whatever it reads.

In the suite a few hundred cases run. More, with other cases every time:

    python -m tests.hostile.fuzz 100000            # of each parser
    python -m tests.hostile.fuzz 100000 header     # of one: recipe, header, lora
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from svdq_cli.adapters.names import ModelShapes
from svdq_cli.adapters.read import read_adapter
from svdq_cli.errors import InputError, RecipeError, SvdqError
from svdq_cli.recipe import Recipe, parse_recipe, resolved
from svdq_cli.source.headers import Header, read_whole_header
from svdq_cli.source.markers import told_by, without_markers
from svdq_cli.source.prefixes import find_model
from svdq_cli.source.upconverted import upconverted

HANG = 5_000  # milliseconds that one case may take

# ------------------------------------------------------------------------------------------------- recipes

RECIPE = """\
version: 1
model: {source: demo, family: auto, dtype: bfloat16, loras: [{path: a.safetensors, weight: 0.5}]}
calibration: {prompts: calib_prompts/general.txt, samples: 64, steps: 20, guidance: 3.5, height: 1024, seed: 0}
quantization:
  precision: int4
  effort: balanced
  rank: 32
layers:
  - {match: "transformer_blocks.*.ff.net.2", rank: 64}
  - {match: proj_out, keep: true}
  - {match: "blocks.*.attn", group: [to_q, to_k]}
outputs: [{format: nunchaku-lite, path: out/model}]
gates: {psnr_db: ">= 20", size_ratio: ">= 3.5"}
"""
_MARKS = [
    "&a",
    "*a",
    "!!python/name:os.system",
    "<<:",
    "---",
    "...",
    "? ",
    "|",
    ">",
    "%YAML 9.9",
    "\t",
    "\0",
    "\x85",
    "﻿",
]
_VALUES = [
    "~",
    ".nan",
    ".inf",
    "-1",
    "0x1F",
    "0o9",
    "1e999",
    "12:30:45",
    "2001-01-01",
    "yes",
    "[]",
    "{}",
    "''",
    "9" * 400,
]
_KEYS = [
    "version",
    "model",
    "layers",
    "match",
    "rank",
    "keep",
    "group",
    "gates",
    "outputs",
    "path",
    "search",
    "size_budget",
]
pieces = st.one_of(
    st.sampled_from(_MARKS + _VALUES),
    st.sampled_from(_KEYS).map(lambda key: f"\n{key}: "),
    st.sampled_from("[]{}:,-#\"'\n "),
    st.text(max_size=8),
    st.recursive(st.just("x"), lambda inner: inner.map(lambda text: f"[{text}]"), max_leaves=4),
)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(_VALUES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def spoiled_texts(draw: st.DrawFn) -> str:
    """The recipe with pieces put in, and parts left out."""
    text = RECIPE
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from((0, 0, 1, 2, 5, 20)))
        text = text[:start] + draw(pieces) + text[stop:]
    return text


@st.composite
def spoiled_values(draw: st.DrawFn) -> str:
    """The recipe as JSON, which is YAML, with another value somewhere, a key more or a key less."""
    content = draw(st.sampled_from((_content(), {"version": 1, "model": {"source": "demo"}})))
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        node = content
        while isinstance(node, dict | list) and node:
            key: Any = draw(
                st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1)
            )
            inner = node[key]  # type: ignore[index]
            if not isinstance(inner, dict | list) or draw(st.integers(0, 3)) == 0:
                node[key] = draw(plain)  # type: ignore[index]
                break
            node = inner
        if isinstance(node, dict) and draw(st.booleans()):
            node[draw(st.sampled_from(_KEYS))] = draw(plain)
    return json.dumps(content)


def _content() -> Any:
    import yaml

    return yaml.safe_load(RECIPE)


def try_recipe(text: str) -> None:
    """What is read can be written down and read again."""
    try:
        recipe = parse_recipe(text, "r.yaml")
    except RecipeError as error:
        _require("r.yaml", error)
        return
    Recipe.model_validate(json.loads(json.dumps(resolved(recipe))))


def _require(place: str, error: SvdqError) -> None:
    """A refusal says where it is."""
    assert place in error.message, error.message


# ------------------------------------------------------------------------------------------------- headers

numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from((2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, True, None, "8", [8])),
)
dtypes = st.one_of(
    st.sampled_from(("F32", "BF16", "F16", "F64", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "")), st.none()
)
names = st.one_of(
    st.sampled_from(("a", "b", "a.b", "", "\0", "\x1b[2J", "\ud800", "__metadata__")),
    st.lists(st.sampled_from(("model", "module", "_orig_mod", "vae", "a", "weight")), max_size=4).map(
        ".".join
    ),
    st.sampled_from(
        ("v_pred", "module.scaled_fp8", "edm_vpred.sigma_max", "a.scale_weight", "a.comfy_quant")
    ),
    st.text(max_size=6),
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file of a few small tensors, of which one thing or another may be untrue."""
    entries: list[tuple[str, Any]] = []
    last = 0
    spoiled = draw(st.integers(0, 3))  # which of the tensors; most often none of them
    for index, name in enumerate(draw(st.lists(names, max_size=4, unique=draw(st.integers(0, 9)) > 0))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from((("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E4M3", 1), ("F64", 8))))
        size = dtype[1] * torch.Size(shape).numel()
        facts: dict[str, Any] = {"dtype": dtype[0], "shape": shape, "data_offsets": [last, last + size]}
        last += size
        match draw(st.integers(0, 6)) if index == spoiled else None:
            case 0:
                facts["dtype"] = draw(dtypes)
            case 1:
                facts["shape"] = draw(st.lists(numbers, max_size=3) | numbers)
            case 2:
                facts["data_offsets"] = draw(st.lists(numbers, max_size=3) | numbers)
            case 3:
                facts.pop(draw(st.sampled_from(sorted(facts))))
            case 4:
                facts = draw(st.none() | st.integers() | st.text(max_size=3))  # type: ignore[assignment]
            case _:
                pass
        entries.append((name, facts))
    if draw(st.booleans()):
        entries.append(
            (
                "__metadata__",
                draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2) | numbers),
            )
        )
    text = (
        "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries) + "}"
    ).encode()
    if draw(st.integers(0, 19)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.binary(max_size=4)) + text[cut + draw(st.integers(0, 3)) :]
    length = len(text) + draw(st.sampled_from((*[0] * 20, 1, -1, 2**40, 2**63 - len(text))))
    data = bytes(max(0, last + draw(st.sampled_from((*[0] * 20, 1, -1)))))
    return struct.pack("<Q", max(0, length)) + text + data


def try_header(content: bytes) -> None:
    """What svdq takes for a safetensors file, the safetensors library takes for one too."""
    path = _file()
    path.write_bytes(content)
    try:
        header = read_whole_header(path)
    except InputError as error:
        _require(str(path), error)
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.tensors)
    for entry in header.tensors.values():
        try:
            tensor = entry.read()
        except InputError:  # a dtype that torch does not have
            continue
        assert tuple(tensor.shape) == entry.shape
    try:
        _read_as_model(path, header)
    except InputError as error:
        _require(str(path), error)


def _read_as_model(path: Path, header: Header) -> None:
    """What is left of a file without wrappers and markers is read, or refused."""
    part = find_model(header.tensors, [{"a.weight"}], beside=("vae.",))
    assert len(part.tensors) + len(part.rest) == len(header.tensors)
    weights, markers = without_markers(part.tensors, "UNet2DConditionModel")
    told_by(markers, header.metadata, "UNet2DConditionModel")
    for entry in upconverted(path, weights).tensors.values():
        assert tuple(entry.read().shape) == entry.shape


# ------------------------------------------------------------------------------------------------- LoRA files

WIDTH = 8
MODEL = ModelShapes(
    Path("model"),
    "FluxTransformer2DModel",
    {
        **{f"transformer_blocks.0.attn.to_{x}.weight": (WIDTH, WIDTH) for x in ("q", "k", "v", "out.0")},
        "transformer_blocks.0.ff.net.2.weight": (WIDTH, 4 * WIDTH),
        "transformer_blocks.0.attn.to_q.bias": (WIDTH,),
        "single_transformer_blocks.0.proj_out.weight": (WIDTH, 5 * WIDTH),
        "proj_out.weight": (WIDTH, WIDTH),
        "transformer_blocks.0.attn.norm_q.weight": (WIDTH,),
    },
)
_LAYERS = {name.removesuffix(".weight"): shape for name, shape in MODEL.shapes.items() if len(shape) == 2} | {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
}
_STRANGE = (
    "double_blocks.0.processor.qkv_lora1",
    "text_model.encoder.layers.0.self_attn.q_proj",
    "nothing",
    "",
    "unet:3",
    "transformer_blocks.0.attn.norm_q",
)
_PREFIXES = (
    "transformer.",
    "",
    "diffusion_model.",
    "base_model.model.",
    "lora_unet_",
    "lora_te1_",
    "lycoris_",
    ".",
)
_ENDINGS = (
    *(
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_A.default.weight",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    *(".down.weight", ".up.weight", "_lora.down.weight", "_lora.up.weight", ".lora_linear_layer.down.weight"),
    *(
        ".lora_magnitude_vector",
        ".dora_scale",
        ".lokr_w1",
        ".lokr_w2",
        ".lokr_w1_a",
        ".lokr_w1_b",
        ".lokr_t2",
    ),
    *(
        ".hada_w1_a",
        ".hada_w1_b",
        ".hada_w2_a",
        ".hada_w2_b",
        ".oft_blocks",
        ".vera_lambda_b",
        ".diff",
        ".diff_b",
        ".w_norm",
        ".reshape_weight",
        ".lora_B.bias",
        "",
        ":up",
    ),
)
_SIZES = (0, 1, 2, 4, WIDTH, 3 * WIDTH, 5 * WIDTH)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool)
_CONFIGS = (
    "",
    "{",
    "[]",
    "[" * 3000,
    '{"lora_alpha": "x"}',
    '{"lora_alpha": {}}',
    '{"alpha_pattern": 5}',
    '{"lora_alpha": 2}',
    '{"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"to_[qk]": 2, "(.*)*!": 1}}',
    '{"transformer.alpha_pattern": {"(": 1}}',
    '{"transformer.rank_pattern": {"a{9999}{9999}{9999}": 1}, "transformer.alpha_pattern": [1]}',
    '{"peft_type": "LOKR", "alpha": 1e400, "r": 0}',
    '{"peft_type": ["LORA"]}',
    '{"peft_type": "OFT"}',
    '{"r": 2, "init_lora_weights": "pissa"}',
    '{"r": 2, "init_lora_weights": "olora", "lora_alpha": 0}',
    '{"r": 2, "init_lora_weights": {"a": []}}',
    '{"modules_to_save": [null]}',
)


def _factors(kind: str, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The keys of one layer and their shapes, as they should be."""
    match kind:
        case "lora":
            return {".lora_A.weight": (rank, columns), ".lora_B.weight": (rows, rank)}
        case "dora":
            return {**_factors("lora", rows, columns, rank), ".lora_magnitude_vector": (rows,)}
        case "columns":
            return {**_factors("lora", rows, columns, rank), ".dora_scale": (1, columns)}
        case "whole":
            return {".diff": (rows, columns), ".diff_b": (rows,)}
        case "kohya":
            return {".lora_down.weight": (rank, columns), ".lora_up.weight": (rows, rank), ".alpha": ()}
        case "loha":
            return {
                f".hada_w{i}_{half}": (rows, rank) if half == "a" else (rank, columns)
                for i in (1, 2)
                for half in "ab"
            }
        case _:
            return {".lokr_w1": (2, 2), ".lokr_w2_a": (rows // 2, rank), ".lokr_w2_b": (rank, columns // 2)}


@st.composite
def loras(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA that fits, of which one thing or another may be wrong."""
    shapes: dict[str, tuple[int, ...]] = {}
    prefix = draw(st.sampled_from(_PREFIXES[:4]))
    for layer in draw(st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=2, unique=True)):
        kind = draw(st.sampled_from(("lora", "dora", "columns", "whole", "kohya", "loha", "lokr")))
        name = f"lora_unet_{layer.replace('.', '_')}" if kind == "kohya" else prefix + layer
        for ending, shape in _factors(kind, *_LAYERS[layer], rank=draw(st.sampled_from((1, 2, 4)))).items():
            shapes[name + ending] = shape
    values = {key: draw(st.sampled_from((*[0.5] * 20, 0.0, float("nan"), 3e38))) for key in shapes}
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        match draw(st.integers(0, 2)):
            case 0:
                shapes.pop(draw(st.sampled_from(sorted(shapes) or [""])), None)
            case 1 if shapes:
                shapes[draw(st.sampled_from(sorted(shapes)))] = tuple(
                    draw(st.lists(st.sampled_from(_SIZES), max_size=4))
                )
            case _:
                layer = draw(st.sampled_from((*_LAYERS, *_STRANGE)))
                key = draw(st.sampled_from(_PREFIXES)) + layer + draw(st.sampled_from(_ENDINGS))
                shapes[key] = tuple(draw(st.lists(st.sampled_from(_SIZES), max_size=3)))
    dtype = draw(st.sampled_from((*_DTYPES[:1] * 8, *_DTYPES)))
    tensors = {key: torch.full(shape, values.get(key, 1.0)).to(dtype) for key, shape in shapes.items()}
    said = draw(st.sampled_from(("", "", "", *_CONFIGS)))
    return tensors, {"lora_adapter_metadata": said} if said else {}


def try_lora(made: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    from safetensors.torch import save_file

    path = _file()
    save_file(made[0], path, metadata=made[1])
    try:
        adapter = read_adapter(path, MODEL)
        read = {name: change.read(_no_rows) for name, change in adapter.weights.items()}
    except InputError as error:
        _require(str(path), error)
        return
    changed = read.keys() | adapter.vectors.keys()
    assert changed
    assert changed <= MODEL.shapes.keys() | {f"{layer}.bias" for layer in _LAYERS}


def _no_rows(name: str, start: int, stop: int) -> torch.Tensor:
    return torch.zeros(stop - start, *MODEL.shapes[name][1:])


# ------------------------------------------------------------------------------------------------- all three

PARSERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "recipe": (spoiled_texts() | spoiled_values(), try_recipe),
    "header": (headers(), try_header),
    "lora": (loras(), try_lora),
}


@lru_cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _file() -> Path:
    return Path(_folder().name) / "case.safetensors"


def fuzz(parser: str, cases: int, *, fresh: bool) -> None:
    """Raises what the parser should not have, with the smallest input that does it. `fresh`: other cases every time."""
    strategy, attempt = PARSERS[parser]

    @settings(
        max_examples=cases,
        deadline=HANG,
        derandomize=not fresh,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
    )
    @given(strategy)
    def attempts(made: Any) -> None:
        attempt(made)

    attempts()


def main(words: list[str]) -> None:
    for parser in words[1:] or PARSERS:
        started = time.monotonic()
        fuzz(parser, int(words[0]), fresh=True)
        print(
            f"{parser}: {words[0]} cases, no crash and no hang, {time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
