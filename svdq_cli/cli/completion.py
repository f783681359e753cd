"""Completion of commands, options and names of recipes in bash, zsh, fish and PowerShell, by typer's scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from svdq_cli.errors import EnvironmentLacksError

VARIABLE = "_SVDQ_COMPLETE"  # set by the scripts when they ask for completions
SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def answer(command: Any, instruction: str) -> int:
    """Print what a shell's script asks for, as `complete_bash`. Returns the exit code."""
    from typer.completion import completion_init, shell_complete

    completion_init()
    return shell_complete(command, {}, "svdq", VARIABLE, instruction)


def script() -> str:
    """What `install` would install, for the shell that svdq was started from."""
    from typer.completion import get_completion_script

    return get_completion_script(prog_name="svdq", complete_var=VARIABLE, shell=_shell())


def install() -> str:
    """Install it for that shell. Returns what to tell the user."""
    from typer.completion import install as install_script

    shell, path = install_script(shell=_shell(), prog_name="svdq", complete_var=VARIABLE)
    return f"{shell} completion is installed in {path}; open a new terminal to use it"


def _shell() -> str:
    """The shell above this process; where none is, the user's login shell. EnvironmentLacksError for another one."""
    import shellingham

    try:
        name = shellingham.detect_shell()[0]
    except (shellingham.ShellDetectionFailure, NotImplementedError):
        name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise EnvironmentLacksError(
            f"can't complete commands in {name or 'this unknown shell'}",
            hint=f"start svdq from {', '.join(SHELLS[:3])} or PowerShell",
        )
    return name
