"""Every kind of hostile and broken input that is tried: what is damaged, which words are run, what is said to it.

In the words `FOLDER` is the damaged pipeline, `HERE` the folder that holds it and everything else, `OUT` a free name.
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass

import torch

from tests.hostile.damage import (
    CONFIG,
    EVIL,
    LINEAR,
    MINIMAL,
    WEIGHTS,
    Damage,
    diary,
    entry,
    filled,
    folder,
    header,
    huge_header,
    js,
    linked,
    longer,
    nothing,
    pickled_shards,
    pipe_in_a_component,
    prompts,
    raw,
    recipe,
    rule,
    socket_in_a_component,
    sparse_header,
    swapped,
    tensor,
    twice,
    zipped_pickle,
)

CONVERT = "convert FOLDER -o OUT --effort datafree --rank 16 -q"
PROMPTS = "convert FOLDER -o OUT --prompts HERE/prompts.txt --samples 1 --steps 1 --height 32 --width 32 -q"
RECIPE = "convert HERE/recipe.yaml -o OUT -q"


@dataclass(frozen=True)
class Case:
    name: str
    damage: Damage  # of the folder that holds `flux/`
    code: int
    kind: str
    says: str  # part of the message
    words: str = CONVERT


HEADERS = (
    Case("empty file", raw(f"flux/{WEIGHTS}", b""), 3, "damaged-file", "shorter than a safetensors header"),
    Case("seven bytes", raw(f"flux/{WEIGHTS}", b"\x10" * 7), 3, "damaged-file", "shorter than"),
    Case(
        "header of 2^63 bytes",
        raw(f"flux/{WEIGHTS}", struct.pack("<Q", 1 << 63) + b"{}"),
        3,
        "damaged-file",
        "longer",
    ),
    Case("header of a terabyte in a file of a terabyte", sparse_header, 3, "damaged-file", "longer"),
    Case("100 MB that is no JSON", huge_header, 3, "damaged-file", "unreadable header"),
    Case(
        "100 MB of brackets", header(lambda found: b"[" * 99_000_000), 3, "damaged-file", "unreadable header"
    ),
    Case("deep nesting", header(lambda found: b'{"a":' * 20_000), 3, "damaged-file", "unreadable header"),
    Case(
        "a number of 5000 digits",
        header(lambda found: b'{"a":' + b"9" * 5000 + b"}"),
        3,
        "damaged-file",
        "unreadable",
    ),
    Case("not UTF-8", header(lambda found: b'{"\xff\xfe": 1}'), 3, "damaged-file", "unreadable header"),
    Case("header that is a list", header(lambda found: b"[1, 2]"), 3, "damaged-file", "not a JSON object"),
    Case("a key twice", header(twice), 3, "damaged-file", "occurs twice"),
    Case("two tensors on the same bytes", header(swapped), 3, "damaged-file", "overlap"),
    Case(
        "offsets beyond the file",
        entry("data_offsets", [10**9, 10**9 + 32768]),
        3,
        "damaged-file",
        "beyond the end",
    ),
    Case(
        "offsets of 2^62", entry("data_offsets", [2**62, 2**62 + 32768]), 3, "damaged-file", "beyond the end"
    ),
    Case("offsets of 2^63", entry("data_offsets", [2**63, 2**63 + 32768]), 3, "damaged-file", "malformed"),
    Case(
        "offsets backwards", entry("data_offsets", [32768, 0]), 3, "damaged-file", "disagrees with its shape"
    ),
    Case("negative offsets", entry("data_offsets", [-32768, 0]), 3, "damaged-file", "malformed"),
    Case("three offsets", entry("data_offsets", [0, 1, 2]), 3, "damaged-file", "malformed"),
    Case("a shape of 2^62", entry("shape", [2**62, 128]), 3, "damaged-file", "disagrees with its shape"),
    Case("a shape of 2^63", entry("shape", [2**63, 128]), 3, "damaged-file", "malformed"),
    Case("a negative shape", entry("shape", [-128, -128]), 3, "damaged-file", "malformed"),
    Case("a shape of fractions", entry("shape", [128.0, 128.5]), 3, "damaged-file", "malformed"),
    Case("a shape of truths", entry("shape", [True, 128]), 3, "damaged-file", "malformed"),
    Case("a dtype that nobody has", entry("dtype", "Q9_K"), 3, "", LINEAR),
    Case("a dtype that is a list", entry("dtype", ["BF16"]), 3, "damaged-file", "malformed"),
    Case(
        "an entry that is a word",
        header(lambda f: f.update({LINEAR: "weight"})),
        3,
        "damaged-file",
        "malformed",
    ),
    Case(
        "metadata that is a list",
        header(lambda f: f.update({"__metadata__": [1]})),
        3,
        "damaged-file",
        "metadata",
    ),
    Case(
        "metadata that is no text",
        header(lambda f: f.update({"__metadata__": {"a": 1}})),
        3,
        "damaged-file",
        "metadata",
    ),
    Case(
        "half a character as a name",
        header(lambda f: f.update({"\ud800": f.pop(LINEAR)})),
        3,
        "damaged-file",
        "malformed",
    ),
    Case("a name that moves the cursor", header(lambda f: f.update({EVIL: f.pop(LINEAR)})), 3, "", LINEAR),
    Case("bytes behind the last tensor", longer, 3, "damaged-file", "belong to no tensor"),
)
TENSORS = (
    Case("a weight with NaN", filled(float("nan")), 3, "not-finite", LINEAR),
    Case("a weight with infinity", filled(float("inf")), 3, "not-finite", LINEAR),
    Case("a weight without rows", tensor(lambda w: w[:0].contiguous()), 3, "", LINEAR),
    Case("a weight that is one number", tensor(lambda w: w.flatten()[0].clone()), 3, "", LINEAR),
    Case("a weight of integers", tensor(lambda w: w.to(torch.int32)), 3, "", LINEAR),
    Case("a weight of another size", tensor(lambda w: w[:, :64].contiguous()), 3, "", LINEAR),
    Case(
        "a bias that is one number",
        tensor(lambda w: w[0].clone(), LINEAR.replace("weight", "bias")),
        3,
        "",
        LINEAR.replace("weight", "bias"),
    ),
)
FILES = (
    Case("a pickle in the folder", pickled_shards, 3, "pickle", "could run code"),
    Case("a zipped pickle under another name", zipped_pickle, 3, "pickle", "could run code"),
    *(
        Case(
            f"a {suffix} file",
            raw(f"model.{suffix}", pickle.dumps([1])),
            3,
            "pickle",
            "could run code",
            f"convert HERE/model.{suffix} -o OUT",
        )
        for suffix in ("ckpt", "pt", "pth", "bin", "pkl")
    ),
    Case(
        "GGUF that is none",
        raw("model.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64),
        3,
        "damaged-file",
        "GGUF",
        "convert HERE/model.gguf -o OUT",
    ),
    Case(
        "GGUF that is cut",
        raw("model.gguf", b"GGUF"),
        3,
        "damaged-file",
        "GGUF",
        "convert HERE/model.gguf -o OUT",
    ),
    Case(
        "a picture",
        raw("model.safetensors", b"\x89PNG\r\n\x1a\n" + b"\x00" * 64),
        3,
        "input",
        "an image, not safetensors",
        "convert HERE/model.safetensors -o OUT",
    ),
    Case("a link to itself", linked("loop", "loop"), 3, "not-found", "loop", "convert HERE/loop -o OUT"),
    Case("a link to nowhere", linked("gone", "nowhere"), 3, "not-found", "gone", "convert HERE/gone -o OUT"),
    Case("a device", nothing, 3, "not-found", "/dev/zero", "convert /dev/zero -o OUT"),
    Case(
        "a component linked to its pipeline",
        linked("flux/vae/again", ".."),
        3,
        "not-a-file",
        "a folder that contains it",
    ),
    Case(
        "a component with a link to nowhere",
        linked("flux/vae/weights", "nowhere"),
        3,
        "not-a-file",
        "a broken link",
    ),
    Case(
        "a component with a link to a device", linked("flux/vae/zero", "/dev/zero"), 3, "not-a-file", "device"
    ),
    Case("a component with a pipe", pipe_in_a_component, 3, "not-a-file", "pipe"),
    Case("a component with a socket", socket_in_a_component, 3, "not-a-file", "pipe"),
    Case("a name with a line feed", nothing, 3, "not-found", "no\nwhere", "convert no\nwhere -o OUT"),
    Case("no name at all", nothing, 2, "usage", "SOURCE must not be empty", "convert  -o OUT"),
    Case("a name that is not UTF-8", nothing, 2, "usage", r"'\udcff'", "convert \udcff -o OUT"),
)
JSON = (
    *(
        Case(
            f"a component called {name!r}",
            js("flux/model_index.json", lambda f, n=name: f.update({n: ["a", "b"]})),
            3,
            "unsafe-path",
            "not a valid folder name",
        )
        for name in ("../evil", "/etc", "a/b", "..", "a\\b", "a\0b", "")
    ),
    Case(
        "an index that is a list", raw("flux/model_index.json", b"[]"), 3, "input", "expected a JSON object"
    ),
    Case(
        "an index that is nested",
        raw("flux/model_index.json", b'{"a":' * 20_000),
        3,
        "input",
        "not readable JSON",
    ),
    Case(
        "an index that is not UTF-8",
        raw("flux/model_index.json", b"\xff\xfe\x00"),
        3,
        "input",
        "not readable JSON",
    ),
    Case(
        "an index without a model",
        raw("flux/model_index.json", b"{}"),
        3,
        "unknown-family",
        "neither a transformer",
    ),
    Case("a config that is a folder", folder(f"flux/{CONFIG}"), 3, "", "config.json"),
    Case(
        "a config of a gigabyte",
        lambda here: os.truncate(here / "flux" / CONFIG, 1 << 30),
        3,
        "input",
        "larger than",
    ),
    Case(
        "a billion layers",
        js(f"flux/{CONFIG}", lambda f: f.update(num_layers=10**9)),
        3,
        "input",
        "num_layers",
    ),
    Case(
        "heads of 2^60",
        js(f"flux/{CONFIG}", lambda f: f.update(attention_head_dim=2**60)),
        3,
        "input",
        "can't build",
    ),
    Case(
        "less than no layers",
        js(f"flux/{CONFIG}", lambda f: f.update(num_attention_heads=-2)),
        3,
        "input",
        "can't build",
    ),
    Case(
        "a width that is a word",
        js(f"flux/{CONFIG}", lambda f: f.update(attention_head_dim="wide")),
        3,
        "input",
        "can't build",
    ),
    Case(
        "a class that is a module",
        js(f"flux/{CONFIG}", lambda f: f.update(_class_name="attention")),
        3,
        "",
        "attention",
    ),
    Case(
        "a class that is a list",
        js(f"flux/{CONFIG}", lambda f: f.update(_class_name=["os", "system"])),
        3,
        "unknown-family",
        "os",
    ),
    Case(
        "shards outside of the folder",
        raw(
            "flux/transformer/diffusion_pytorch_model.safetensors.index.json",
            b'{"weight_map": {"a": "../../../etc/passwd"}}',
        ),
        3,
        "not-found",
        "transformer/passwd",
    ),
    Case(
        "shards that are no map",
        raw("flux/transformer/diffusion_pytorch_model.safetensors.index.json", b'{"weight_map": [1]}'),
        3,
        "damaged-file",
        "weight_map",
    ),
)
RECIPES = (
    Case(
        "a bomb of aliases",
        recipe("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        2,
        "recipe",
        "aliases",
        RECIPE,
    ),
    Case(
        "a tag", recipe("version: !!python/object/apply:os.system ['true']\n"), 2, "recipe", "the tag", RECIPE
    ),
    Case("nested lists", recipe("layers: " + "[" * 50_000), 2, "recipe", "nested deeper", RECIPE),
    Case(
        "nested indents",
        recipe("".join(" " * n + "a:\n" for n in range(200))),
        2,
        "recipe",
        "nested deeper",
        RECIPE,
    ),
    Case("ten megabytes", raw("recipe.yaml", b"#" * 10_000_000), 2, "recipe", "larger than", RECIPE),
    Case("not UTF-8", raw("recipe.yaml", b"version: \xff"), 2, "recipe", "not UTF-8", RECIPE),
    Case("NUL", raw("recipe.yaml", b"version: 1\0"), 2, "recipe", "not YAML", RECIPE),
    Case("half a character", recipe('version: "\\ud800"\n'), 2, "recipe", "half a character", RECIPE),
    Case("a rule that is nothing", recipe(MINIMAL + "layers: [~]\n"), 2, "recipe", "layers[0]", RECIPE),
    Case("a folder", folder("recipe.yaml"), 3, "input", "can't read the recipe", RECIPE),
    Case("two documents", recipe(MINIMAL + "---\n" + MINIMAL), 2, "recipe", "not YAML", RECIPE),
    Case("a key twice", recipe(MINIMAL + "version: 1\n"), 2, "recipe", "given twice", RECIPE),
    Case("a merge", recipe(MINIMAL + "<<: {version: 1}\n"), 2, "recipe", "not a valid key", RECIPE),
    Case("a pattern of a megabyte", rule("*a" * 400_000), 2, "recipe", "layers[0].match", RECIPE),
    Case("a pattern that backtracks", rule("*a" * 60 + "b"), 2, "recipe", "matches", RECIPE),
    Case("a pattern with a range backwards", rule("x[z-a]"), 2, "recipe", "matches", RECIPE),
    Case("a pattern of brackets", rule("[[!]--&&||~~"), 2, "recipe", "matches", RECIPE),
    Case(
        "an encoder that climbs",
        recipe(MINIMAL + "components: {../model/text_encoder_2: w4a16}\n"),
        3,
        "input",
        "../model/text_encoder_2",
        RECIPE,
    ),
    Case(
        "an output with NUL",
        recipe(MINIMAL + 'outputs: [{path: "a\\0b"}]\n'),
        2,
        "recipe",
        "outputs[0].path: must not hold a NUL character",
        "convert HERE/recipe.yaml",
    ),
    Case("an endless number", recipe(MINIMAL + "quantization: {rank: 1e999}\n"), 2, "recipe", "rank", RECIPE),
)
PROMPT_FILES = (
    Case("prompts that are not UTF-8", prompts(b"\xff\xfe a cat"), 3, "input", "not UTF-8", PROMPTS),
    Case("prompts with NUL", prompts(b"a cat\na \0dog\n"), 3, "input", ":2: a control character", PROMPTS),
    Case(
        "prompts that move the cursor", prompts(EVIL.encode()), 3, "input", ":1: a control character", PROMPTS
    ),
    Case("a prompt of a megabyte", prompts(b"cat " * 250_000), 3, "input", ":1: a prompt of", PROMPTS),
    Case("no prompts", prompts(b"\n# nothing\n"), 3, "input", "holds no prompt", PROMPTS),
    Case(
        "prompts that are a folder",
        folder("prompts.txt"),
        3,
        "",
        "prompts.txt",
        PROMPTS,
    ),
)
OUTPUTS = (
    Case(
        "an output below a file",
        nothing,
        2,
        "",
        "FOLDER/model_index.json",
        "convert FOLDER -o FOLDER/model_index.json/out --effort datafree --rank 16 -q",
    ),
    Case(
        "an output in /proc",
        nothing,
        2,
        "",
        "/proc/self/svdq",
        "convert FOLDER -o /proc/self/svdq --effort datafree --rank 16 -q",
    ),
    Case(
        "an output with an endless name",
        nothing,
        2,
        "",
        "aaaa",
        f"convert FOLDER -o HERE/{'a' * 300} --effort datafree --rank 16 -q",
    ),
    Case(
        "an output that is a link to itself",
        linked("self", "self"),
        2,
        "",
        "self",
        "convert FOLDER -o HERE/self/out --effort datafree --rank 16 -q",
    ),
    Case(
        "an output that is its source",
        nothing,
        2,
        "usage",
        "FOLDER",
        "convert FOLDER -o FOLDER --overwrite --effort datafree --rank 16 -q",
    ),
    Case(
        "an output that holds its source",
        nothing,
        2,
        "usage",
        "HERE",
        "convert FOLDER -o HERE --overwrite --effort datafree --rank 16 -q",
    ),
    Case(
        "an output inside its source",
        nothing,
        2,
        "usage",
        "FOLDER/out",
        "convert FOLDER -o FOLDER/out --effort datafree --rank 16 -q",
    ),
    Case(
        "an output over a folder that svdq has not written",
        diary,
        2,
        "usage",
        "keep",
        "convert FOLDER -o HERE/keep --overwrite --effort datafree --rank 16 -q",
    ),
)
CASES = (*HEADERS, *TENSORS, *FILES, *JSON, *RECIPES, *PROMPT_FILES, *OUTPUTS)
