"""Which column of a table holds prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdq_cli.errors import InputError

# What it is called in the data sets and trainers of the field, the likeliest first
USUAL_COLUMNS = (
    "prompt",
    "prompts",
    "caption",
    "captions",
    "text",
    "description",
    "positive_prompt",
    "txt",
    "instruction",  # data sets of edits
    "edit_instruction",
    "edit_prompt",
    "messages",  # chats, as fine-tuning libraries keep them
    "conversations",
)
_USERS = ("user", "human")
# where a chat's image goes into the text: LLaVA's, LLaMA-Factory's and ms-swift's data sets have it in the text itself
_PLACEHOLDER = re.compile(r"<(?:image|video)>")


def column_of(
    path: Path | str, columns: Sequence[str], wanted: str | None, *, sole_is_enough: bool = True
) -> str:
    """The column that holds the prompts. InputError, naming those that there are, where it can't be told.

    `sole_is_enough`: a table with one column of text needs no usual name (of a CSV file, that name could be a prompt).
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise InputError(
            f"{path}: no column {wanted!r}",
            hint=f"set column to one of {', '.join(columns)}",
            where=str(path),
        )
    by_name = {name.strip().casefold(): name for name in reversed(columns)}
    usual = next((by_name[name] for name in USUAL_COLUMNS if name in by_name), None)
    if usual is not None:
        return usual
    if len(columns) == 1 and sole_is_enough:
        return columns[0]
    raise InputError(
        f"{path}: no column is named {', '.join(USUAL_COLUMNS[:-1])} or {USUAL_COLUMNS[-1]}",
        hint=f"name the column that holds the prompts with --prompt-column; the columns are {', '.join(columns)}"
        + ("; a list without a header is a .txt file" if len(columns) == 1 else ""),
        where=str(path),
    )


def text_of(cell: object) -> str | None:
    """The prompt in a table's cell, or None where there is none.

    A text is itself; of several captions of one image the first counts, and of a chat what the user says first: lists
    of `{"role", "content"}` or `{"from", "value"}`, whose content may be a list of parts of which some are text.
    Placeholders of images, `<image>`, are left out.
    """
    text = _first_text(cell)
    return None if text is None else _PLACEHOLDER.sub("", text).strip()


def _first_text(cell: object) -> str | None:
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, list) or not cell:
        return None
    if isinstance(cell[0], str):
        return next((text for text in cell if isinstance(text, str) and text.strip()), "")
    turns = [turn for turn in cell if isinstance(turn, Mapping)]
    said = next((turn for turn in turns if turn.get("role", turn.get("from")) in _USERS), None)
    return None if said is None else _content_of(said.get("content", said.get("value")))


def _content_of(content: object) -> str | None:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return " ".join(text for text in texts if isinstance(text, str)) or None
