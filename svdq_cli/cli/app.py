"""`svdq` and its commands, in the order in which `--help` lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli.commands import (
    bench,
    calibrate,
    check,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    init,
    inspect,
    lora,
    push,
)

app = typer.Typer(
    name="svdq",
    help="Convert diffusion models to 4-bit SVDQuant checkpoints: weights and activations in 4 bits, "
    "outliers in a 16-bit low-rank branch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from svdq_cli import __version__

        print(f"svdq {__version__}")
        raise typer.Exit


COMMANDS = {  # what `svdq --help` says of each has to fit beside its name in 80 columns
    "demo": (demo.demo, "The whole job on the embedded model, with pictures and a table."),
    "init": (init.init, "Write a complete, commented recipe for a model."),
    "inspect": (inspect.inspect, "Show what a model or a checkpoint holds: layers and sizes."),
    "calibrate": (calibrate.calibrate, "Draw prompts with the 16-bit model; keep the statistics."),
    "convert": (convert.convert, "A 16-bit model becomes a 4-bit checkpoint."),
    "export": (export.export, "Pack a checkpoint for another runtime, bit for bit."),
    "lora": (lora.lora, "Fold LoRAs into a checkpoint without quantizing again."),
    "check": (check.check, "Structure, finite values, weights against the source's."),
    "eval": (evaluate.evaluate, "Draw with both models: PSNR, SSIM and more; a report."),
    "generate": (generate.generate, "Draw one picture with a converted checkpoint."),
    "push": (push.push, "Upload a checkpoint to the Hugging Face hub."),
    "bench": (bench.bench, "Measure the speed of linear layers beside torch's own."),
    "doctor": (doctor.doctor, "Show versions, GPU and backends, with self-tests."),
}
for _name, (_command, _short) in COMMANDS.items():
    app.command(name=_name, short_help=_short)(_command)
