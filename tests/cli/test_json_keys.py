"""The keys of every command's JSON, whole: scripts rely on them, so none is renamed, dropped or left out unnoticed."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from svdq_cli.cli import run

# Keys of these mappings are names of layers, stages, models and files.
NAMED = {
    "recipe",
    "per_layer",
    "layer_error",
    "noted_error",
    "missing",
    "provenance",
    "components",
    "gates",
    "steps_db",
    "steps_seconds",
}
NAMED_ABOVE = {"search.layers", "search.tuning", "search.outputs", "baselines"}
OUTPUTS = "outputs[]{bytes, format, path, sha256, tensors_sha256}"
MODEL = "model{class, family, parameters, source_sha256}"
LAYERS = "layers{kept, w4a16, w4a4, w4a8}"
RANK = "rank{max, mean, min, requested}"
SQNR = "layer_sqnr_db{mean, min, per_layer{}}"
SUMMARY = "{ci95[], max, mean, min, std}"
SEARCHED = (
    "{covariance_tokens, device, fallback[], rank, smoothing, steps_db{}, steps_seconds{}, steps_taken[]}"
)
KEYS = {
    "calibrate": "{bytes, command, covariances, digest, inputs, next, path, prompts, schema, seconds, status, steps, "
    "tokens_seen}",
    "check": "{command, format, layer_error{}, layers, loras[], noted_error{}, problems[], same_source, schema, "
    "status, text_encoders[], warnings[]}",
    "convert": "{bytes{input, output, ratio}, command, data_free, effort, fingerprint, gates_missed[], "
    f"{SQNR}, {LAYERS}, layers_taken_over, {MODEL}, {OUTPUTS}, peak{{ram_bytes, vram_bytes}}, precision, "
    f"provenance{{}}, {RANK}, read_as, recipe{{}}, schema, search{{layers{{*{SEARCHED}}}, outputs{{}}, tuning{{}}}}, "
    "seconds{calibrate, check, pack, solve, total}, status, svdq_version, text_encoders{}, warnings[]}",
    "eval": "{backend, baselines{*{clip, fid, image_reward, lpips, "
    f"machine_was_busy, processor_seconds_per_picture, psnr_db{SUMMARY}, seconds_per_picture, ssim{SUMMARY}, "
    "video}}, clip, command, fid, gates_missed[], image_reward, "
    f"images, {SQNR}, loras[], lpips, machine_was_busy, missing{{}}, next, noise_floor_psnr_db, "
    f"output_sqnr_db{{step, sum}}, own_noise_psnr_db, page, processor_seconds_per_picture, "
    f"psnr_db{SUMMARY}, reference{{clip, image_reward, machine_was_busy, processor_seconds_per_picture, "
    f"seconds_per_picture}}, same_source, "
    "schema, seconds, seconds_per_picture, sixteen_bit_images{alike, black, meaningless, nearly_uniform}, "
    f"ssim{SUMMARY}, status, verdict, video, warnings[]}}",
    "eval --plan": "{basis, command, frames, height, images, missing{}, "
    "passes[]{calls, images, key, seconds[], title, why}, "
    "schema, seconds[], status, steps, warnings[], width}",
    "export": f"{{command, layers, {OUTPUTS}, schema, seconds, source_format, status, warnings[]}}",
    "generate": "{audio_seconds, backend, command, fps, frames, height, loras[], path, schema, seconds, status, "
    "warnings[], width}",
    "inspect": "{bytes{input, output, ratio}, class, command, family, format, kind, "
    "layers[]{in, input, kept_because, name, out, rank, role}, loras[], parameters, precision, provenance{}, rank, "
    "read_as, schema, status, text_encoders{}, warnings[]}",
    "plan": "{bytes{input, output, ratio}, command, disk_bytes, disk_kept_bytes, effort, error, gpu{basis, "
    f"convert{{fits, lack, peak_bytes, seconds}}, generate{{fits, fits_with_offload, offload_peak_bytes, peak_bytes}}, "
    f"memory_bytes, name}}, {LAYERS}, {MODEL}, precision, "
    f"prompts{{available, read_from, used}}, ram_bytes, {RANK}, read_as, recipe{{}}, "
    "sampling{frames, height, steps, tokens, width}, schema, seconds, size_budget, "
    "stages{calibrate, check, pack, prepare, solve, total}, status, text_encoders{}, vram_bytes, warnings[]}",
}


def keys_of(value: object, place: str = "") -> str:
    """The keys of a JSON value, sorted, in one line: "a, b{c, d[]}"."""
    if isinstance(value, list):
        return f"[]{keys_of(value[0], place)}" if value else "[]"
    if not isinstance(value, dict):
        return ""
    if place.rpartition(".")[2] in NAMED:
        return "{}"
    if place in NAMED_ABOVE:
        inner = {keys_of(item, f"{place}.*") for item in value.values()}
        return "{" + " or ".join(f"*{keys}" for keys in sorted(inner)) + "}"
    inside = ", ".join(f"{key}{keys_of(value[key], f'{place}.{key}'.strip('.'))}" for key in sorted(value))
    return "{" + inside + "}"


def said(words: str) -> dict[str, object]:
    """The JSON of a command that ends well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run([*words.split(), "--json", "-q"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def reports(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("json")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    small = "--samples 2 --steps 1 --height 32 --width 32"
    out, calib = folder / "int4", folder / "calib"
    return {
        "plan": said(f"convert {tiny_flux} -o {out} --plan --prompts {prompts} --gpu 12GB"),
        "calibrate": said(f"calibrate {tiny_flux} -o {calib} --prompts {prompts} {small}"),
        "convert": said(f"convert {tiny_flux} -o {out} --calib {calib} --rank 16"),
        "inspect": said(f"inspect {out}"),
        "check": said(f"check {out} --against {tiny_flux}"),
        "eval": said(f"eval {out} --against {tiny_flux} --prompts {prompts} {small}"),
        "eval --plan": said(f"eval {out} --against {tiny_flux} --prompts {prompts} {small} --plan"),
        "generate": said(f"generate {out} --prompt x -o {folder / 'x.png'} --steps 1 --height 32 --width 32"),
        "export": said(f"export {out} --to comfy -o {folder / 'x.safetensors'}"),
    }


@pytest.mark.parametrize("command", KEYS)
def test_the_json_of_a_command_has_these_keys_and_no_others(
    command: str, reports: dict[str, dict[str, object]]
):
    assert keys_of(reports[command]) == KEYS[command]
