"""The command line keeps its contract: commands, JSON keys, exit codes, and nothing on stdout but the result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from svdq_cli.cli import run
from svdq_cli.cli.app import COMMANDS
from svdq_cli.cli.render import show
from svdq_cli.entrypoints.doctor import DoctorReport, MachineFacts, SelfTest, summary_of
from svdq_cli.experimental.hopper.selftest import kernel_cases
from svdq_cli.gpu.architectures import architecture

PROMPTS = "a red circle\na blue square\na green star\n"
CONVERT_KEYS = {
    *(
        "schema",
        "command",
        "status",
        "outputs",
        "model",
        "precision",
        "effort",
        "data_free",
        "rank",
        "layers",
    ),
    *("layer_sqnr_db", "bytes", "seconds", "peak", "fingerprint", "svdq_version", "recipe", "warnings"),
}
EVAL_KEYS = {
    *("schema", "command", "images", "psnr_db", "ssim", "lpips", "clip", "baselines", "layer_sqnr_db"),
    *("noise_floor_psnr_db", "missing"),
}
SMALL = "--height 32 --width 32 -q"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def converted(tiny_flux: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "int4"
    words = f"convert {tiny_flux} -o {out} --prompts {prompts} --samples 2 --steps 1 --rank 16 {SMALL}"
    assert run(words.split()) == 0
    return out


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], words: str, code: int) -> dict[str, str]:
    """Run with --json; the failure object must carry the exit code."""
    assert run([*words.split(), "--json"]) == code
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["status"] == "error"
    assert report["error"]["code"] == code
    assert report["error"]["message"] in captured.err
    assert "Traceback" not in captured.err
    return report["error"]


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from svdq_cli.cli import run; run(['--help']); "
        "heavy = 'torch diffusers transformers pydantic numpy matplotlib'.split(); "
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    for command in (
        "demo",
        "init",
        "inspect",
        "calibrate",
        "convert",
        "check",
        "eval",
        "generate",
        "bench",
        "doctor",
    ):
        assert f"  {command} " in out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_takes_what_a_script_gives_to_all_of_them(
    command: str, capsys: pytest.CaptureFixture[str]
):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--json", "--events", "-q, --quiet", "-v, --verbose"):
        assert option in text


@pytest.mark.parametrize("command", ["convert", "eval", "calibrate"])
def test_every_option_of_a_command_is_explained(command: str, capsys: pytest.CaptureFixture[str]):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--json", "--events", "--device", "--seed", "--overwrite", "--quiet"):
        assert option in text


def test_convert_prints_one_json_object_with_every_key(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    events = tmp_path / "events.jsonl"
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 --json --events {events}"
    assert run(words.split()) == 0
    report = said(capsys)
    assert report.keys() >= CONVERT_KEYS
    assert report["outputs"][0].keys() == {"format", "path", "bytes", "sha256", "tensors_sha256"}
    assert report["model"].keys() == {"family", "class", "parameters", "source_sha256"}
    assert report["data_free"] is True
    assert json.loads((tmp_path / "out/svdq_report.json").read_text()) == report
    kinds = {(event["kind"], event["stage"]) for event in map(json.loads, events.read_text().splitlines())}
    assert {
        ("start", "solve"),
        ("advance", "solve"),
        ("end", "solve"),
        ("end", "pack"),
        ("end", "check"),
    } <= kinds


def test_plan_predicts_and_writes_nothing(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(f"convert {tiny_flux} -o {tmp_path / 'out'} --plan --json".split()) == 0
    report = said(capsys)
    assert report["status"] == "planned"
    assert report["layers"] == {"w4a4": 17, "w4a16": 3, "kept": 8, "w4a8": 0}
    assert list(tmp_path.iterdir()) == []


def test_calibrate_then_convert_from_it(
    tiny_flux: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calib = tmp_path / "calib"
    words = f"calibrate {tiny_flux} -o {calib} --prompts {prompts} --samples 2 --steps 1 --json {SMALL}"
    assert run(words.split()) == 0
    report = said(capsys)
    assert report["inputs"] == 13
    assert report["next"] == f"svdq convert {tiny_flux} --calib {calib} -o {tiny_flux.name}-int4"
    for precision in ("int4", "nvfp4"):
        out = tmp_path / precision
        words = f"convert {tiny_flux} -o {out} --calib {calib} --precision {precision} --rank 16 --json -q"
        assert run(words.split()) == 0
        report = said(capsys)
        assert report["precision"] == precision
        assert report["data_free"] is False


def test_inspect_shows_a_source_and_a_checkpoint(
    tiny_flux: Path, converted: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["inspect", str(tiny_flux), "--json"]) == 0
    source = said(capsys)
    assert source["kind"] == "source"
    assert source["provenance"] is None
    keys = {"name", "in", "out", "role", "rank", "input", "kept_because"}
    assert source["layers"][0].keys() == keys
    assert run(["inspect", str(converted), "--json"]) == 0
    made = said(capsys)
    assert (made["kind"], made["format"]) == ("checkpoint", "nunchaku-lite")
    assert (made["precision"], made["rank"]) == ("int4", 16)
    assert made["provenance"]["recipe"]["quantization"]["rank"] == 16


def test_check_and_eval_and_their_gates(
    tiny_flux: Path, converted: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["check", str(converted), "--against", str(tiny_flux), "--json"]) == 0
    checked = said(capsys)
    errors, noted = checked["layer_error"], checked["noted_error"]
    assert len(errors) == 20
    assert run(["check", str(converted), "--against", str(tiny_flux)]) == 0
    shown = capsys.readouterr().out
    worst = max(errors, key=errors.__getitem__)
    assert f"{errors[worst]:7.4f}  {noted[worst]:7.4f}  {worst}" in shown
    words = f"eval {converted} --against {tiny_flux} --prompts {prompts} --samples 1 --json -q"
    assert run(words.split()) == 0
    report = said(capsys)
    assert report["lpips"] is None
    assert set(report["baselines"]) - {"nf4"} == {"rtn"}  # NF4 where bitsandbytes is installed
    assert report.keys() >= EVAL_KEYS
    assert report["psnr_db"].keys() >= {"mean", "std", "min"}
    assert run([*words.split(), "--fail-if", "psnr_db<99"]) == 6
    assert said(capsys)["status"] == "gate-missed"


def test_eval_takes_prompts_from_a_table_and_gates_from_a_recipe(
    tiny_flux: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table, recipe = tmp_path / "captions.csv", tmp_path / "gates.yaml"
    table.write_text('caption,id\n"a cat, sitting",1\n')
    recipe.write_text(f"version: 1\nmodel: {{source: {tiny_flux}}}\ngates: {{psnr_db: '>= 99'}}\n")
    words = f"eval {converted} --against {recipe} --prompts {table} --prompt-column caption --samples 1 -q"
    assert run([*words.split(), "--report", str(tmp_path / "report")]) == 6
    out = capsys.readouterr().out
    assert "95 % interval" in out
    assert "no clip: CLIP score needs" in out
    assert f"HTML report: {tmp_path / 'report' / 'report.html'}" in out
    assert (tmp_path / "report" / "prompts.txt").read_text() == "a cat, sitting\n"


def test_a_missed_gate_keeps_and_marks_the_output(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = f"convert {tiny_flux} -o {out} --effort datafree --rank 16 --json -q --fail-if size_ratio<50"
    assert run(words.split()) == 6
    assert said(capsys)["status"] == "gate-missed"
    assert json.loads((out / "svdq_report.json").read_text())["gates_missed"]


def test_init_writes_a_recipe_that_converts(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "recipe.yaml"
    assert run(["init", str(tiny_flux), "-o", str(recipe), "--rank", "16", "--precision", "nvfp4"]) == 0
    assert "height: 32" in recipe.read_text() or "height:" in recipe.read_text()
    capsys.readouterr()
    assert run(["convert", str(recipe), "--plan", "--json"]) == 0
    assert said(capsys)["precision"] == "nvfp4"


def test_doctor_tests_the_reference_backend(capsys: pytest.CaptureFixture[str]):
    code = run(["doctor", "--json"])
    report = said(capsys)
    results = {(test["op"], test["precision"]): test["status"] for test in report["tests"]}
    assert results[("w4a4 linear", "int4")] == results[("w4a4 linear", "nvfp4")] == "ok"
    assert code == (0 if report["status"] == "ok" else 4)


def test_doctor_lists_every_kernel_in_every_precision_and_mode(capsys: pytest.CaptureFixture[str]):
    run(["doctor", "--json"])
    tests = [test for test in said(capsys)["tests"] if test["backend"] == "kernels"]
    listed = {(test["op"], test["precision"], test["mode"]) for test in tests}
    assert listed == {
        *(("quantize_down", "int4", mode) for mode in ("signed", "unsigned")),
        *(("w4a4_gemm", "int4", mode) for mode in ("signed", "unsigned")),
        *(("w4a4_gelu_quantize", "int4", mode) for mode in ("to signed", "to unsigned")),
        *(("quantize_down", "nvfp4", "signed"), ("w4a4_gemm", "nvfp4", "signed")),
        *(("w4a4_gelu_quantize", "nvfp4", "to signed"), ("w4a16_linear", "int4", "-")),
        # Without a GPU Hopper's are compiled with all others; another GPU than a Hopper doesn't list them
        *(("hopper_quantize_down", "int4", mode) for mode in ("exact", "w4a8", "fp8")),
        *(
            ("hopper_gemm", "int4", mode + tile)
            for mode in ("exact", "w4a8", "fp8")
            for tile in ("", ", 128 tokens")
        ),
        ("hopper_gelu_quantize", "int4", "exact"),
    }
    for test in tests:
        assert test["status"] in ("ok", "unavailable")
        if test["status"] == "unavailable":  # no GPU
            assert "torch sees no NVIDIA GPU; " in test["detail"]


def test_the_table_of_doctor_names_every_operation_at_80_columns_and_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    tests = tuple(
        SelfTest(case.op, case.precision, case.mode, "kernels", "unavailable", "no GPU; " * 20, 0.0)
        for case in kernel_cases(torch.bfloat16, architecture("sm_90a"))
    )
    report = diagnosed(tests)
    show(report, json=False, verbose=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for test in tests:
        assert [test.op, test.precision, *test.mode.split(), test.backend, test.status] in rows
    # Kernels of a GPU that is not here say nothing of this machine
    show(report, json=False)
    text = capsys.readouterr().out
    assert tests[0].op not in text
    assert f"{len(tests)} more can't run on this machine; -v shows them" in text
    assert text.endswith("\nThis machine can.\n")


def diagnosed(tests: Sequence[SelfTest]) -> DoctorReport:
    return DoctorReport(
        svdq_version="0",
        python="3",
        packages={"torch": "2"},
        optional={"lpips": None, "peft": "0.18"},
        device={"name": "a card", "sm": None},
        machine=MachineFacts(2, 8 << 30, 4 << 30, None, None, {"/": 1 << 30}),
        hub_login=False,
        tests=tuple(tests),
        summary="this machine can",
        status="ok",
    )


@pytest.mark.parametrize(
    ("backend", "sm", "says"),
    [
        (
            "kernels",
            "89",
            r"generates with them on a card, 12\.88 GB, by svdq's 4-bit kernels; 4\.29 GB of RAM free",
        ),
        ("cpu", None, "by svdq's 4-bit engine; torch sees no NVIDIA GPU"),
        ("reference", "61", r"reference backend, which is slow; its GPU \(a card\) can't run svdq's kernels"),
    ],
)
def test_doctor_ends_in_a_sentence_on_what_the_machine_can_do(backend: str, sm: str | None, says: str):
    machine = MachineFacts(2, 8 << 30, 4 << 30, 12 << 30 if sm else None, 1 << 30 if sm else None, {})
    device = {"name": "a card", "sm": sm, "backend": backend}
    assert re.search(says, summary_of(device, machine, []))
    broken = SelfTest("w4a4 linear", "int4", "-", backend, "failed", "2.1 dB", 0.0)
    assert "1 of 1 self-tests failed, the first w4a4 linear" in summary_of(device, machine, [broken])


def test_doctor_looks_at_memory_disk_optional_packages_and_the_hub_login(capsys: pytest.CaptureFixture[str]):
    run(["doctor", "--json"])
    report = said(capsys)
    assert 0 < report["machine"]["ram_free_bytes"] <= report["machine"]["ram_bytes"]
    assert report["machine"]["disk_free_bytes"]
    assert {"peft", "lpips", "bitsandbytes", "gguf", "kernels"} <= report["optional"].keys()
    assert report["hub_login"] in (True, False)
    assert report["summary"]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        ("convert", 2, "usage"),
        ("conver SOURCE", 2, "usage"),
        ("convert SOURCE -o OUT --rank 17", 2, "usage"),
        ("convert SOURCE -o OUT --rank auto", 2, "usage"),
        ("convert SOURCE -o OUT --precision int3", 2, "usage"),
        ("convert SOURCE -o OUT --format ggml", 2, "usage"),
        ("convert SOURCE -o OUT --family sdxxl", 2, "unknown-family"),
        ("convert SOURCE -o OUT --fail-if psnr<3", 2, "usage"),
        ("convert SOURCE -o OUT --samples 3", 2, "usage"),
        ("convert SOURCE", 2, "usage"),
        ("convert SOURCE -o .", 2, "usage"),
        ("convert SOURCE -o / --overwrite", 2, "usage"),
        ("convert SOURCE other -o OUT", 2, "usage"),
        ("init SOURCE -o OUT", 2, "usage"),
        ("init OUT.yaml -o OUT.yaml", 2, "usage"),
        ("bench --shapes demo --plot OUT.xyz", 2, "usage"),
        ("convert SOURCE -o OUT --device tpu", 2, "usage"),
        ("convert nowhere/at/all -o OUT", 3, "not-found"),
        ("convert SOURCE -o OUT --prompts missing.txt", 3, "not-found"),
        ("convert SOURCE -o OUT --calib missing", 3, "input"),
        ("convert SOURCE -o OUT --device cuda:99", 4, "environment"),
        ("check SOURCE", 3, "input"),
        ("generate SOURCE --prompt x -o OUT.png", 3, "input"),
    ],
)
def test_refusals_have_their_exit_code_and_a_cure(
    tiny_flux: Path, tmp_path: Path, words: str, code: int, kind: str, capsys: pytest.CaptureFixture[str]
):
    filled = words.replace("SOURCE", str(tiny_flux)).replace("OUT", str(tmp_path / "out"))
    error = refused(capsys, filled, code)
    assert error["kind"] == kind
    assert error["hint"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_key_is_named_with_its_line(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nmodel: {{source: {tiny_flux}}}\nquantization:\n  smoth: grid\n")
    error = refused(capsys, f"convert {recipe} -o {tmp_path / 'out'}", 2)
    assert f"{recipe}:4" in error["message"]
    assert "smoothing" in error["hint"]


@pytest.mark.parametrize("command", ["convert RECIPE -o OUT", "convert RECIPE --plan", "inspect RECIPE"])
def test_a_layer_rule_that_matches_nothing_is_named_with_its_line(
    command: str, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{source: {tiny_flux}}}\nlayers:\n  - {{match: proj_out, keep: true}}\n"
        "  - {match: transformer_block.0.ff.net.2, keep: true}\n"
    )
    words = command.replace("RECIPE", str(recipe)).replace("OUT", str(tmp_path / "out"))
    error = refused(capsys, words, 2)
    assert error["message"].startswith(f"{recipe}:5: ")
    assert error["where"] == f"{recipe}:5"
    assert "transformer_blocks.0.ff.net.2" in error["hint"]


def test_another_model_than_the_checkpoints_is_named(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for command in ("check", "eval"):
        error = refused(capsys, f"{command} {converted} --against demo -q", 3)
        assert error["kind"] == "shape-mismatch"
        assert "transformer_blocks.0.attn.to_q has 256 x 256 weights" in error["message"]


def test_a_calibration_that_datafree_does_not_use_is_a_warning(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calib = tmp_path / "calib"
    calib.mkdir()
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --calib {calib} --effort datafree --rank 16 --json"
    assert run(words.split()) == 0
    assert f"{calib}: not used, because effort datafree takes no calibration" in said(capsys)["warnings"]


def test_svdq_alone_shows_its_help(capsys: pytest.CaptureFixture[str]):
    assert run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: svdq ")


def test_an_unknown_family_a_truncated_file_and_a_quantized_model_are_input_errors(
    tiny_flux_copy: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    error = refused(capsys, f"convert {converted} -o {out}", 3)
    assert error["kind"] == "already-quantized"
    config = tiny_flux_copy / "transformer/config.json"
    known = config.read_text()
    config.write_text(json.dumps({"_class_name": "MysteryModel"}))
    assert refused(capsys, f"convert {tiny_flux_copy} -o {out}", 3)["kind"] == "unknown-family"
    config.write_text(known)
    weights = tiny_flux_copy / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert refused(capsys, f"convert {tiny_flux_copy} -o {out}", 3)["kind"] == "damaged-file"
    assert not out.exists()


def test_a_full_disk_is_exit_code_5(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Usage:
        free = 10

    monkeypatch.setattr("svdq_cli.checkpoint.writer.shutil.disk_usage", lambda path: Usage)
    error = refused(capsys, f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree -q", 5)
    assert error["kind"] == "disk-full"


def test_a_failed_check_is_exit_code_7(
    tiny_flux: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = "transformer_blocks.0.ff.net.2.smooth_factor"
    save_file({**tensors, name: (1 / tensors[name].float()).to(tensors[name].dtype)}, weights)
    assert run(["check", str(copy), "--against", str(tiny_flux), "--json", "-q"]) == 7
    report = said(capsys)
    assert report["status"] == "failed"
    assert report["problems"][0]["layer"] == "transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_cleanly(tiny_flux: Path, prompts: Path, tmp_path: Path, number: int, code: int):
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --prompts {prompts} --steps 5000 --height 32 --width 32 --json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    events = tmp_path / "events.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "svdq_cli", *words.split(), "--events", str(events)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # a shell starts what it puts into the background with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300  # importing torch and diffusers takes long on a busy machine
    while time.monotonic() < deadline and not (events.is_file() and "advance" in events.read_text()):
        time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr.decode()
    assert b"Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl"]


def test_the_step_after_a_calibration_is_typed_as_the_model_or_the_recipe_was():
    from svdq_cli.cli.pages.conversion import after_calibration
    from svdq_cli.recipe import Output, default_recipe

    bare = default_recipe("org/model")
    file = bare.model_copy(
        update={"model": bare.model.model_copy(update={"source": "my/tune.v2.safetensors"})}
    )
    assert after_calibration("my/tune.v2.safetensors", file, "c").endswith("--calib c -o tune.v2-int4")
    assert after_calibration("org/model", bare, "a b") == "svdq convert org/model --calib 'a b' -o model-int4"
    named = default_recipe("org/model", outputs=(Output(format="comfy-core", path="m.safetensors"),))
    assert after_calibration("mine.yaml", named, "calib") == "svdq convert mine.yaml --calib calib"


def test_bench_refuses_a_seed_out_of_range_and_its_help_has_no_range_of_twenty_digits(
    capsys: pytest.CaptureFixture[str],
):
    assert run(["bench", "--seed", "-1"]) == 2
    assert "give a seed of 0 to" in capsys.readouterr().err
    assert run(["bench", "--help"]) == 0
    assert "18446744073709551615" not in capsys.readouterr().out
