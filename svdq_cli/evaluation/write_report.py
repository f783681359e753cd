"""What an evaluation leaves in its folder: figures, grid, plots, and the HTML report."""

from __future__ import annotations

import json
from pathlib import Path

from svdq_cli import __version__
from svdq_cli.evaluation.compare import Evaluation
from svdq_cli.evaluation.grid import image_grid
from svdq_cli.evaluation.image_store import SHOWN_FRAMES, read_image
from svdq_cli.evaluation.page import PAGE_IMAGE_BYTES, Page, render_page
from svdq_cli.evaluation.passes import CONVERTED, NAIVE, SIXTEEN_BIT, TITLES
from svdq_cli.evaluation.plot import Search, plot_evaluation
from svdq_cli.evaluation.report_page import description, section_of
from svdq_cli.reports import json_text
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.images import write_image

GRID_ROWS = 8  # images shown in the image grid; a video shows several of its frames
PAGE_FILE = "report.html"


def write_report(folder: Path, found: Evaluation, *, search: Search) -> None:
    """`write_figures`, a grid of images, and report.html."""
    write_figures(folder, found, search=search)
    _write_grid(folder / "grid.png", found)
    title = found.run.path.name
    section = section_of(found, plots=folder, title=title, budget=PAGE_IMAGE_BYTES, page_folder=folder)
    page = Page(f"{title}: 4-bit against 16-bit", description(found), [section], [], footer())
    write_text(folder / PAGE_FILE, render_page(page))


def write_figures(folder: Path, found: Evaluation, *, search: Search) -> None:
    """report.json, images.json (the figures of every image), prompts.txt and the plots."""
    write_text(folder / "report.json", json_text(found.report) + "\n")
    write_text(folder / "pictures.json", json.dumps(_image_figures(found), indent=1, ensure_ascii=False))
    write_text(folder / "prompts.txt", "\n".join(found.run.prompts) + "\n")
    plot_evaluation(folder, found.layers, search=search)


def footer() -> str:
    return (
        f"Written by svdq {__version__}. This file needs no network: images, plots and script are part of it."
    )


def _image_figures(found: Evaluation) -> list[dict[str, object]]:
    return [
        {
            "index": index,
            "prompt": prompt,
            "seed": found.run.settings.seed_of(index),
            **{
                way: {
                    **{metric: figures[index] for metric, figures in scores.per_image.items()},
                    **(scores.video.plain(index) if scores.video else {}),
                }
                for way, scores in found.scores.items()
            },
        }
        for index, prompt in enumerate(found.run.prompts)
    ]


def _write_grid(path: Path, found: Evaluation) -> None:
    naive = found.report.baselines.get(NAIVE)
    columns = {
        SIXTEEN_BIT: TITLES[SIXTEEN_BIT],
        **({NAIVE: f"{TITLES[NAIVE]}\n{naive.summary('psnr_db').mean:.1f} dB"} if naive else {}),
        CONVERTED: f"{TITLES[CONVERTED]}\n{found.report.psnr_db.mean:.1f} dB",
    }
    rows_of = GRID_ROWS // SHOWN_FRAMES if found.report.video else GRID_ROWS
    rows = range(min(rows_of, len(found.run.prompts)))
    grid = image_grid(
        [
            (title, [read_image(found.image_store, way, row) for row in rows])
            for way, title in columns.items()
        ],
        [found.run.prompts[row] for row in rows],
    )
    write_image(path, grid)
