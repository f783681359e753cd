"""What `svdq COMMAND --help` looks like: options in groups, examples, and where the manual page is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

# The headings in order, with the options of single commands under them; those of `options` name their own.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Model": ("--lora", "--against"),
    "Prompts and sampling": (
        "--prompt",
        "--image",
        "--mask",
        "--video",
        "--strength",
        "--calib",
    ),
    "Quantization": (),
    "Output": (
        "--output",
        "--format",
        "--to",
        "--report",
        "--plot",
        "--export",
        "--overwrite",
    ),
    "Run": (
        "--plan",
        "--gpu",
        "--device",
        "--backend",
        "--work",
        "--resume",
        "--max-ram",
        "--max-vram",
        "--without",
        "--dry-run",
    ),
    "Reporting": ("--fail-if", "--json", "--summary", "--events", "--quiet", "--verbose", "--help"),
}
REST = "Options"


@dataclass(frozen=True, slots=True)
class Manual:
    """What a command's help says besides its options. `page`: under docs/."""

    short: str  # fits next to the command's name in 80 columns
    page: str
    examples: tuple[str, ...]


def group_of(option: Any) -> str:
    """The heading that an option is listed under."""
    if (named := getattr(option, "rich_help_panel", None)) is not None:
        return str(named)
    return next((title for title, names in GROUPS.items() if set(names) & set(option.opts)), REST)


class ManualCommand(TyperCommand):
    """A command whose help is plain text, in groups."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(ctx.command_path, " ".join([*_arguments(self, ctx), "[OPTIONS]"]))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parameters = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        arguments = [
            (_shown_name(param), str(getattr(param, "help", "")))
            for param in parameters
            if param.param_type_name == "argument"
        ]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        options = [param for param in parameters if param.param_type_name == "option"]
        for title in (REST, *GROUPS):
            found = [
                record for param in options if group_of(param) == title and (record := _record(param, ctx))
            ]
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write("\n")
            formatter.write(self.epilog + "\n")


def epilog_of(manual: Manual) -> str:
    """The examples, ready to paste, and the address of the page."""
    lines = ["Examples:", *(f"  {line}" for line in manual.examples)]
    return "\n".join([*lines, "", f"Learn more: {page_address(manual.page)}"])


def page_address(page: str) -> str:
    """Where a page of the manual is on this machine; it goes with every installation."""
    from svdq_cli.storage.resources import data_root

    try:
        return str(data_root("docs") / page)
    except FileNotFoundError:
        return f"docs/{page} in svdq's repository"


def _arguments(command: TyperCommand, ctx: Any) -> Sequence[str]:
    found = [param for param in command.get_params(ctx) if param.param_type_name == "argument"]
    return [_shown_name(param) if param.required else f"[{_shown_name(param)}]" for param in found]


def _shown_name(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _record(param: Any, ctx: Any) -> tuple[str, str] | None:
    """An option's names and explanation. Types are named by the metavar alone."""
    record = param.get_help_record(ctx)
    if record is None:
        return None
    names, text = record
    for type_name, shown in ((" <int>", " N"), (" <float>", " X"), (" <path>", " PATH"), (" <str>", " TEXT")):
        names = names.replace(type_name, shown)
    return names, text
