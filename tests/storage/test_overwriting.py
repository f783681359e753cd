"""`--overwrite` replaces what svdq has written, never a folder of someone's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdq_cli.cli import run

COMMANDS = {
    "convert": "convert SOURCE -o OUT --effort datafree --rank 16",
    "calibrate": "calibrate SOURCE -o OUT --prompts PROMPTS --samples 1 --steps 1",
    "export to a file": "export CKPT --to nunchaku -o OUT",
    "export to a folder": "export FILE --to nunchaku-lite --base SOURCE -o OUT",
    "lora": "lora CKPT --lora LORA -o OUT",
    "lora for Nunchaku": "lora FILE --lora LORA --format nunchaku -o OUT",
    "eval": "eval CKPT --against SOURCE --prompts PROMPTS --samples 1 --report OUT",
    "generate": "generate CKPT --prompt x -o OUT.png",
    "demo": "demo -o OUT",
    "demo --lora": "demo --lora -o OUT",
    "demo --export": "demo --export OUT",
    "init": "init SOURCE -o OUT.yaml",
}
OTHER_TOOLS_FILES = ("run.json", "report.json", "README.md", "config.json")


@pytest.fixture
def command(
    tiny_flux: Path, converted_flux: Callable[[str], Path], tmp_path: Path
) -> Callable[[str, Path], list[str]]:
    """A command of `COMMANDS` with its places filled in."""
    lora, prompts = tmp_path / "lora.safetensors", tmp_path / "prompts.txt"
    layer = "transformer.transformer_blocks.0.attn.to_q"
    factors = {"lora_A": torch.ones(4, 128), "lora_B": torch.ones(128, 4)}
    save_file({f"{layer}.{name}.weight": tensor for name, tensor in factors.items()}, lora)
    prompts.write_text("a cat\n")
    made = converted_flux("int4")
    places = {
        "SOURCE": tiny_flux,
        "CKPT": made / "lite",
        "FILE": made / "nunchaku.safetensors",
        "LORA": lora,
        "PROMPTS": prompts,
    }

    def filled(text: str, out: Path) -> list[str]:
        for name, place in {**places, "OUT": out}.items():
            text = text.replace(name, str(place))
        return [*text.split(), "--overwrite"]

    return filled


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_someone_elses_stays_as_it_is(
    name: str,
    command: Callable[[str, Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    words = command(COMMANDS[name], tmp_path / "mine")
    folder = next(Path(word) for word in words if Path(word).stem == "mine")
    folder.mkdir()
    for file in OTHER_TOOLS_FILES:
        (folder / file).write_text("{}")
    assert run(words) == 2
    assert str(folder) in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == set(OTHER_TOOLS_FILES)


@pytest.mark.parametrize("name", ["export to a file", "export to a folder", "lora", "demo --export", "init"])
def test_what_the_command_has_written_is_replaced(
    name: str, command: Callable[[str, Path], list[str]], tmp_path: Path
):
    words = command(COMMANDS[name], tmp_path / "out")
    assert run(words[:-1]) == 0
    assert run(words[:-1]) == 2
    assert run(words) == 0


@pytest.mark.parametrize("name", ["export to a file", "export to a folder", "lora", "lora for Nunchaku"])
def test_an_input_is_not_written_over(
    name: str, command: Callable[[str, Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = command(COMMANDS[name], tmp_path / "out")
    words[words.index("-o") + 1] = words[1]
    assert run(words) == 2
    assert "is read by this command" in capsys.readouterr().err


def test_an_export_has_its_report_beside_it(command: Callable[[str, Path], list[str]], tmp_path: Path):
    assert run(command(COMMANDS["export to a file"], tmp_path / "out.safetensors")) == 0
    assert (tmp_path / "out.safetensors.report.json").is_file()
    assert run(command(COMMANDS["export to a folder"], tmp_path / "out")) == 0
    assert (tmp_path / "out/svdq_report.json").is_file()
