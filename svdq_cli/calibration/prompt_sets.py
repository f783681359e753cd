"""Prompt sets that published figures use, by their short names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svdq_cli.calibration.prompts import dataset_prompts
from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.recipe import user_path


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A data set on the Hub. `file`: the one of its files that holds all prompts by image, where its table holds
    images only; None: its table has a `column` of prompts."""

    name: str
    repository: str
    file: str | None = None
    column: str = "prompt"


PROMPT_SETS = (
    # Li et al. 2024 (arXiv 2402.17245): 30 000 prompts in 10 categories
    PromptSet("MJHQ-30K", "playgroundai/MJHQ-30K", file="meta_data.json"),
    # Urbanek et al. 2024 (arXiv 2312.08578), summarized; as the SVDQuant authors publish it
    PromptSet("sDCI", "mit-han-lab/svdquant-datasets", file="sDCI.yaml"),
    # Yu et al. 2022 (arXiv 2206.10789): 1632 prompts
    PromptSet("PartiPrompts", "nateraw/parti-prompts", column="Prompt"),
)


def find_prompt_set(name: str) -> PromptSet | None:
    """The prompt set of a short name, in upper or lower case; None if a file or folder has that name."""
    if os.path.exists(user_path(name)):
        return None
    return next((found for found in PROMPT_SETS if found.name.casefold() == name.casefold()), None)


def prompts_of_set(wanted: PromptSet) -> tuple[str, ...]:
    """All its prompts, from the Hub or its cache. Raises InputError where they can't be had."""
    if wanted.file is None:
        return dataset_prompts(wanted.repository, split="train", column=wanted.column).texts
    return prompts_by_image(_fetched(wanted.repository, wanted.file))


def prompts_by_image(path: Path) -> tuple[str, ...]:
    """The prompts of a JSON or YAML file {image: prompt} or {image: {prompt: ..., ...}}, in the file's order.

    Raises InputError for any other content.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    if not isinstance(content, Mapping) or not content:
        raise _unreadable(path, "expected prompts by image")
    prompts: list[str] = []
    for image, entry in content.items():
        prompt = entry.get("prompt") if isinstance(entry, Mapping) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise _unreadable(path, f"no prompt for {image!r}")
        prompts.append(" ".join(prompt.split()))
    return tuple(prompts)


def _fetched(repository: str, file: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise EnvironmentLacksError(
            f"{repository} comes from the Hub, but huggingface_hub is not installed",
            hint="pip install huggingface_hub, or give a text file with one prompt per line",
        ) from error
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # the Hub's client raises many kinds: offline, missing, rate limits
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{repository}: {file} could not be downloaded from the Hub: {reason}",
            hint=f"run `hf download {repository} {file} --repo-type dataset` where there is a connection",
            where=repository,
            kind="not-found",
        ) from error


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: not a list of prompts: {why}",
        hint="download the data set again, or give a text file with one prompt per line",
        where=str(path),
    )
