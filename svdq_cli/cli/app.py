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
    recipes,
)
from svdq_cli.cli.help import Manual, ManualCommand, epilog_of, page_address
from svdq_cli.cli.options import with_home_expanded

app = typer.Typer(
    name="svdq",
    help="Convert diffusion models to 4-bit SVDQuant checkpoints: weights and activations in 4 bits, "
    "outliers in a 16-bit low-rank branch.",
    no_args_is_help=True,
    add_completion=False,  # of typer's own, which says nothing where it can't tell the shell
    epilog=f"Learn more: {page_address('quick-start.md')}",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    install_completion: Annotated[
        bool,
        typer.Option("--install-completion", help="Install completion of svdq's commands for this shell."),
    ] = False,
    show_completion: Annotated[
        bool, typer.Option("--show-completion", help="Print the completion script.")
    ] = False,
) -> None:
    if version:
        from svdq_cli import __version__

        print(f"svdq {__version__}")
        raise typer.Exit
    if install_completion or show_completion:
        from svdq_cli.cli.completion import install, script

        print(install() if install_completion else script())
        raise typer.Exit


COMMANDS = {
    "demo": (
        demo.demo,
        Manual(
            "Run the whole job on the embedded model, with images and a table.",
            "quick-start.md",
            ("svdq demo -o svdq-demo", "svdq demo --export model"),
        ),
    ),
    "init": (
        init.init,
        Manual(
            "Write a complete, commented recipe for a model.",
            "quick-start.md",
            ("svdq init black-forest-labs/FLUX.1-dev -o flux.yaml", "svdq init flux1-dev-int4 -o mine.yaml"),
        ),
    ),
    "recipes": (
        recipes.recipes,
        Manual(
            "List the recipes that ship with svdq.",
            "using.md",
            ("svdq recipes", "svdq convert flux1-dev-int4"),
        ),
    ),
    "inspect": (
        inspect.inspect,
        Manual(
            "Show what a model or a checkpoint holds: layers and sizes.",
            "inputs.md",
            ("svdq inspect my-finetune.safetensors", "svdq inspect out/model-int4 -v"),
        ),
    ),
    "calibrate": (
        calibrate.calibrate,
        Manual(
            "Run prompts through the 16-bit model and save the activation statistics.",
            "calibration.md",
            (
                "svdq calibrate model -o calib",
                "svdq calibrate model --prompts captions.csv --samples 128 -o calib",
            ),
        ),
    ),
    "convert": (
        convert.convert,
        Manual(
            "Convert a 16-bit model to a 4-bit checkpoint.",
            "using.md",
            (
                "svdq convert model -o out/model-int4",
                "svdq convert flux1-dev-int4 --plan",
                "svdq convert my-finetune.safetensors --base model --prompts captions/ -o out/mine-int4",
                "svdq convert configs/flux1-dev-int4.yaml configs/flux1-dev-nvfp4.yaml --resume",
            ),
        ),
    ),
    "export": (
        export.export,
        Manual(
            "Re-pack a checkpoint for another runtime, bit for bit.",
            "formats/README.md",
            ("svdq export out/model-int4 --to comfy -o model.safetensors",),
        ),
    ),
    "lora": (
        lora.lora,
        Manual(
            "Fold LoRAs into a checkpoint without quantizing again.",
            "lora.md",
            ("svdq lora out/model-int4 --lora style.safetensors:0.8 -o out/model-int4-style",),
        ),
    ),
    "check": (
        check.check,
        Manual(
            "Check structure, finite values, and weights against the source's.",
            "using.md",
            ("svdq check out/model-int4", "svdq check out/model-int4 --against model"),
        ),
    ),
    "eval": (
        evaluate.evaluate,
        Manual(
            "Compare images of both models: PSNR, SSIM and more, with a report.",
            "evaluation.md",
            (
                "svdq eval out/model-int4 --against model --report report",
                'svdq eval out/model-int4 --against model --prompts captions.csv --fail-if "psnr_db<20"',
            ),
        ),
    ),
    "generate": (
        generate.generate,
        Manual(
            "Generate an image with a converted checkpoint.",
            "using.md",
            (
                'svdq generate out/model-int4 --prompt "a lighthouse at dusk" -o image.png',
                'svdq generate out/model-int4 --prompt "an oil painting" --image photo.jpg --strength 0.6 -o image.png',
            ),
        ),
    ),
    "push": (
        push.push,
        Manual(
            "Upload a checkpoint to the Hugging Face Hub.",
            "using.md",
            ("svdq push out/model-int4 owner/model-int4 --dry-run",),
        ),
    ),
    "bench": (
        bench.bench,
        Manual(
            "Measure the speed of linear layers against torch's own.",
            "gpu.md",
            ("svdq bench", "svdq bench out/model-int4 --plot speed.png"),
        ),
    ),
    "doctor": (
        doctor.doctor,
        Manual(
            "Show what this machine can do, with self-tests.",
            "troubleshooting.md",
            ("svdq doctor", "svdq doctor -v"),
        ),
    ),
}
for _name, (_command, _manual) in COMMANDS.items():
    app.command(name=_name, short_help=_manual.short, epilog=epilog_of(_manual), cls=ManualCommand)(
        with_home_expanded(_command)
    )
