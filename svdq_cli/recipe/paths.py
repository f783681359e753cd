"""Where the files that a recipe names are looked for.

Inputs (the source, the prompts): as given from the current directory, then from the recipe's own folder; prompts last
among the lists that ship with svdq. Outputs always go where `-o` would put them: relative to the current directory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.storage.resources import data_root

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*")


def user_path(text: str | Path) -> Path:
    """A path as people write it, `~` for their home; as it is where no home is known."""
    return Path(os.path.expanduser(text))


def find_prompts(path: str | Path, beside: Path | None) -> Path:
    """The prompt file, or the folder of captions. `beside` is the recipe's folder (None: no recipe).
    `calib_prompts/NAME` is also looked up among the lists that ship with svdq. Raises InputError (kind "not-found")
    naming every place looked at."""
    places = _input_places(Path(path), beside)
    if Path(path).parts[:1] == ("calib_prompts",):
        places.append(data_root("calib_prompts").joinpath(*Path(path).parts[1:]))
    for place in places:
        if os.path.exists(
            place
        ):  # False, too, for what the system takes for no name: a prompt instead of a file
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    ships = "or calib_prompts/general.txt, which ships with svdq"
    if _reads_like_a_prompt(str(path)):
        raise InputError(
            f"no prompt file {str(path)!r}: this looks like a prompt, but a prompt file is expected",
            hint=f"save it in a text file, one prompt per line, and give that file, {ships}",
            where=str(path),
            kind="not-found",
        )
    hub = "; a data set on the Hub also needs --prompt-column" if _HUB_ID.fullmatch(str(path)) else ""
    raise InputError(
        f"no prompt file {str(path)!r} (looked in: {looked})",
        hint=f"give a text file with one prompt per line, a table, a folder of captions, {ships}{hub}",
        where=str(path),
        kind="not-found",
    )


def _reads_like_a_prompt(text: str) -> bool:
    """Words, and no name of a file: neither a folder nor a suffix."""
    return len(text.split()) > 1 and not re.search(r"[/\\]|\.\w{1,8}$", text)


def find_source(source: str, beside: Path | None) -> str:
    """The source with a relative path made good; a Hub id, `demo`, or a path that is nowhere comes back unchanged."""
    for place in _input_places(Path(source), beside):
        if os.path.exists(place):  # False, too, for what the system takes for no name
            return str(place)
    return source


def _input_places(path: Path, beside: Path | None) -> list[Path]:
    path = user_path(path)
    return [path] if path.is_absolute() or beside is None else [path, beside / path]
