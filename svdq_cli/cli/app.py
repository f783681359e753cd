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


_COMMANDS = {
    "demo": demo.demo,
    "init": init.init,
    "inspect": inspect.inspect,
    "calibrate": calibrate.calibrate,
    "convert": convert.convert,
    "export": export.export,
    "lora": lora.lora,
    "check": check.check,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "push": push.push,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)
