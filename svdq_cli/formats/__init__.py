"""Output formats, one module each. A new format is its module and its name in `NAMES`.

Nothing is imported before it is asked for: recipes and the command line need the names only.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from typing import TYPE_CHECKING

from svdq_cli.errors import UsageError

if TYPE_CHECKING:
    from svdq_cli.formats.contract import Format

# As users write them. The module has the same name with underscores, and holds `FORMAT`.
NAMES = ("nunchaku-lite", "nunchaku", "comfy", "comfy-core", "vllm-omni")
DEFAULT = "nunchaku-lite"


def format_named(name: str) -> Format:
    """The format of that name. UsageError with the valid names."""
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").FORMAT
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(NAMES)}"
    raise UsageError(f"unknown format '{name}'", hint=hint)


@functools.cache
def all_formats() -> tuple[Format, ...]:
    """Every format, in the order of `NAMES`."""
    return tuple(map(format_named, NAMES))
