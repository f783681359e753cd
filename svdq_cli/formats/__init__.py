"""Output formats: one module each, all in `FORMATS`."""

from __future__ import annotations

import difflib

from svdq_cli.errors import UsageError
from svdq_cli.formats.comfy import FORMAT as COMFY
from svdq_cli.formats.contract import Format
from svdq_cli.formats.nunchaku import FORMAT as NUNCHAKU
from svdq_cli.formats.nunchaku_lite import FORMAT as NUNCHAKU_LITE
from svdq_cli.formats.vllm_omni import FORMAT as VLLM_OMNI

FORMATS: tuple[Format, ...] = (NUNCHAKU_LITE, NUNCHAKU, COMFY, VLLM_OMNI)


def format_named(name: str) -> Format:
    """The format of that name. UsageError with the valid names."""
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    names = [known.name for known in FORMATS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
    raise UsageError(f"unknown format '{name}'", hint=hint)
