"""Prompts as people have them: every kind of file gives its prompts, and a wrong kind says what to give instead."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from svdq_cli.calibration.prompt_files import prompts_in
from svdq_cli.cli import run
from svdq_cli.errors import InputError, SvdqError, UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.recipe import Calibration, DatasetPrompts, default_recipe, find_prompts
from svdq_cli.records import Event, ignore_events

WriteText = Callable[[str, str], Path]
PROMPTS = ("a red circle, on white", "a blue square")


@pytest.mark.parametrize(
    ("name", "content", "origin"),
    [
        ("p.txt", "# by hand\na red circle, on white\n\na blue square\n", "one per line"),
        ("p.csv", 'prompt,seed\n"a red circle, on white",1\na blue square,2\n', "column prompt of"),
        (
            "p.csv",
            '\ufeffseed,Caption\r\n1,"a red circle, on white"\r\n2,a blue square\r\n',
            "column Caption of",
        ),
        ("p.csv", "prompt;seed\na red circle, on white;1\na blue square;2\n", "column prompt of"),
        ("p.tsv", "id\ttext\n1\ta red circle, on white\n2\ta blue square\n", "column text of"),
        ("p.json", json.dumps(PROMPTS), ""),
        ("p.json", json.dumps([{"prompt": text, "seed": 1} for text in PROMPTS]), "column prompt of"),
        ("p.json", json.dumps({"caption": PROMPTS, "seed": [1, 2]}), "column caption of"),
        ("p.json", json.dumps(dict(zip("ab", PROMPTS, strict=True))), "by image"),
        (
            "p.json",
            json.dumps({key: {"prompt": text} for key, text in zip("ab", PROMPTS, strict=True)}),
            "prompt",
        ),
        ("p.json", "".join(json.dumps({"text": text}) + "\n" for text in PROMPTS), "column text of"),
        (
            "p.jsonl",
            "".join(json.dumps({"n": 1, "caption": text}) + "\n" for text in PROMPTS),
            "column caption of",
        ),
        ("p.jsonl", "".join(json.dumps(text) + "\n" for text in PROMPTS), ""),
        ("p.yaml", f"a: {PROMPTS[0]!r}\nb: {PROMPTS[1]}\n", "by image"),
    ],
)
def test_every_kind_of_file_gives_its_prompts(write_text: WriteText, name: str, content: str, origin: str):
    """A header row is no prompt, a quoted comma does not part one, and empty cells are skipped."""
    found = prompts_in(write_text(name, content))
    assert found.texts == PROMPTS
    assert origin in found.origin
    assert name in found.origin


def test_parquet_gives_its_prompts(tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_dict({"id": [1, 2, 3], "caption": [PROMPTS[0], None, PROMPTS[1]]})
    table.to_parquet(tmp_path / "p.parquet")
    found = prompts_in(tmp_path / "p.parquet")
    assert (found.texts, found.origin) == (PROMPTS, f"column caption of {tmp_path / 'p.parquet'}")


def test_the_column_that_is_asked_for_goes_before_the_usual_names(write_text: WriteText):
    path = write_text("p.csv", "prompt,long\na,one of many\nb,another\n")
    assert prompts_in(path, column="long").texts == ("one of many", "another")
    with pytest.raises(InputError, match="no column 'short'") as caught:
        prompts_in(path, column="short")
    assert "prompt, long" in str(caught.value.hint)


def test_a_folder_of_captions_as_trainers_keep_them(tmp_path: Path):
    """The .txt next to an image is one prompt; other text files are none."""
    folder = tmp_path / "10_cat"
    folder.mkdir()
    for name, caption in (("1.png", "a red circle,\n on white\n"), ("2.JPG", "a blue square")):
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(caption)
    (folder / "3.webp").touch()
    (tmp_path / "notes.txt").write_text("learning rate 1e-4\nbatch 4\n")
    found = prompts_in(tmp_path)
    assert found.texts == PROMPTS
    assert found.origin == f"captions in {tmp_path}; 1 images have none"


def test_captions_of_videos_may_have_several_lines(tmp_path: Path):
    for name, text in zip("ab", PROMPTS, strict=True):
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(text.replace(" ", "\n", 1))
    assert prompts_in(tmp_path).texts == PROMPTS


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"prompt": list(PROMPTS), "id": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert prompts_in(tmp_path / "saved").texts == PROMPTS


def test_captions_without_their_images_and_an_image_folder_s_metadata(tmp_path: Path):
    (tmp_path / "captions").mkdir()
    for name, text in zip("ab", PROMPTS, strict=True):
        (tmp_path / "captions" / f"{name}.caption").write_text(text)
    assert prompts_in(tmp_path / "captions").texts == PROMPTS
    (tmp_path / "images").mkdir()
    rows = [json.dumps({"file_name": "1.png", "text": text}) for text in PROMPTS]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    assert prompts_in(tmp_path / "images").texts == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "what", "cure"),
    [
        (
            "p.csv",
            "prompt,seed\na red circle, on white,1\n",
            r"p.csv:2: 3 cells, and the header has 2",
            "quotes",
        ),
        (
            "p.csv",
            "a red circle\na blue square\n",
            "no column is named prompt",
            "without a header is a .txt file",
        ),
        ("p.csv", "title,year\nx,1\n", "no column is named prompt", "title, year"),
        ("p.csv", 'prompt\n"a red circle\n', "can't be read", "fix the file"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'", "fix the file"),
        ("p.csv", "prompt\n\n", "holds no prompt", "one prompt per line"),
        ("p.csv", "", "holds no prompt", "one prompt per line"),
        ("p.json", "{", "can't be read", "fix the file"),
        ("p.json", "3", "int instead of a list", "fix the file"),
        ("p.json", "[" * 100_000, "can't be read", "fix the file"),
        ("p.json", '{"prompt": 3}', "neither columns nor prompts", "fix the file"),
        ("p.json", '[{"prompt": 3}]', "column 'prompt' holds int", "--prompt-column"),
        ("p.jsonl", '{"prompt": "a"}\n[[[', "line 2", "fix the file"),
        ("p.jsonl", '{"prompt": "a"}\n"b"\n', "entry 2 is str", "fix the file"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "entry 2 has no 'prompt'", "fix the file"),
        ("p.json", json.dumps(["x" * 30_000]), "30000 characters", "plain text"),
        ("circle.png", "", "an image, not a file of prompts", "one prompt per line"),
        ("style.safetensors", "", "a model or a LoRA", "--lora"),
        ("p.xlsx", "", "a spreadsheet", "CSV"),
        ("p.jsonl.zst", "", "an archive", "unpack it"),
        ("p.rtf", "", "a document, not a file of prompts", "plain text"),
        ("w.json", '{"6": {"class_type": "CLIPTextEncode"}}', "a ComfyUI workflow", "one prompt per line"),
        ("w.json", '{"nodes": [{"id": 6}], "links": []}', "a ComfyUI workflow", "one prompt per line"),
        ("p.toml", "[prompt]\nwidth = 512\n", "settings, not a file of prompts", "one per line"),
        ("recipe.yaml", "version: 1\nmodel: {source: demo}\n", "a recipe, not", "svdq convert"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused_with_a_cure(
    write_text: WriteText, name: str, content: str, what: str, cure: str
):
    path = write_text(name, content)
    with pytest.raises(InputError, match=what) as caught:
        prompts_in(path)
    assert cure in str(caught.value.hint)
    assert str(path) in str(caught.value.where)


def test_folders_without_captions_are_refused_with_a_cure(tmp_path: Path):
    (tmp_path / "1.png").touch()
    with pytest.raises(InputError, match="holds images without captions") as caught:
        prompts_in(tmp_path)
    assert "next to it" in str(caught.value.hint)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "many.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="which file") as caught:
        prompts_in(tmp_path / "lists")
    assert "many.txt" in str(caught.value.hint)


def test_a_list_has_no_columns(write_text: WriteText):
    with pytest.raises(UsageError, match="--prompt-column"):
        prompts_in(write_text("p.txt", "a\n"), column="prompt")


def test_a_prompt_instead_of_a_file_of_prompts_is_told_so():
    with pytest.raises(InputError, match="looks like a prompt") as caught:
        find_prompts("a red circle on white", None)
    assert "text file" in str(caught.value.hint)
    with pytest.raises(InputError, match="no prompt file") as caught:
        find_prompts("owner/prompts", None)
    assert "--prompt-column" in str(caught.value.hint)


def test_a_run_says_what_it_read(write_text: WriteText):
    path = write_text("p.csv", "caption\n" + "".join(f"prompt {i}\n" for i in range(5)))
    events: list[Event] = []
    recipe = default_recipe("demo", calibration=Calibration(prompts=str(path), samples=3))
    found = chosen_prompts(recipe, RunOptions(), events.append)
    assert (len(found.texts), found.facts.available, found.facts.used) == (3, 5, 3)
    (note,) = events
    assert (note.kind, note.detail) == ("note", f"3 of 5 prompts from column caption of {path}")


def test_a_recipe_s_local_data_set_is_found_next_to_it(tmp_path: Path):
    (tmp_path / "p.csv").write_text("caption,prompt\nthe caption,the prompt\n")
    wanted = DatasetPrompts(dataset="p.csv", column="caption")
    recipe = default_recipe("demo", calibration=Calibration(prompts=wanted, samples=1))
    assert chosen_prompts(recipe, RunOptions(beside=tmp_path), ignore_events).texts == ("the caption",)


# ------------------------------------------------------------------------------------------------- the commands


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object]]:
    capsys.readouterr()
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_reads_checks_and_counts_the_prompts(
    tiny_flux: Path, write_text: WriteText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = ("convert", tiny_flux, "-o", tmp_path / "out", "--plan")
    table = write_text("p.csv", "n,caption\n1,one\n2,two\n3,three\n")
    code, report = said(capsys, *plan, "--prompts", table)
    assert code == 0
    assert report["prompts"] == {"read_from": f"column caption of {table}", "available": 3, "used": 3}
    assert any("3 prompts found" in str(text) for text in report["warnings"])  # type: ignore[union-attr]
    code, report = said(capsys, *plan, "--prompts", tmp_path / "nope.txt")
    assert (code, report["status"]) == (3, "error")
    code, report = said(capsys, *plan, "--prompts", table, "--prompt-column", "n")
    assert (code, report["prompts"]["available"]) == (0, 3)  # type: ignore[index]
    code, report = said(capsys, *plan)
    assert (code, report["prompts"]) == (0, None)


def test_prompts_for_a_conversion_that_would_not_read_them_are_an_error(
    tiny_flux: Path, write_text: WriteText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_text("p.txt", "one\n")
    command = ("convert", tiny_flux, "-o", tmp_path / "out", "--effort", "datafree", "--prompts", path)
    code, report = said(capsys, *command)
    error = report["error"]
    assert isinstance(error, dict)
    assert (code, error["where"]) == (2, "--prompts")
    assert "datafree does not calibrate" in error["message"]
    assert not (tmp_path / "out").exists()


def test_a_file_of_prompts_is_read_once_in_a_run(
    tiny_flux: Path, write_text: WriteText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its digest, the images, the search for ranks and the tuning of blocks all see the same prompts."""
    from svdq_cli.prepare import prompts as chosen

    reads: list[Path] = []
    real = chosen.prompts_in

    def counted(path: Path, *, column: str | None = None):
        reads.append(path)
        return real(path, column=column)

    monkeypatch.setattr(chosen, "prompts_in", counted)
    path = write_text("p.txt", "one\ntwo\n")
    drawn = ["--samples", "2", "--steps", "1", "--width", "32", "--height", "32"]
    kept = ["-o", str(tmp_path / "out"), "--effort", "best", "--rank", "16", "--prompts", str(path)]
    assert run(["convert", str(tiny_flux), "--device", "cpu", "-q", *kept, *drawn]) == 0
    assert reads == [path]


def test_a_column_without_prompts_is_a_usage_error(tiny_flux: Path, tmp_path: Path):
    from svdq_cli.prepare.from_command_line import override

    with pytest.raises(SvdqError, match="there is no --prompts"):
        override(default_recipe("demo"), {"calibration.prompts.column": "caption"})


def test_a_model_given_as_prompts_is_called_a_model(tiny_flux: Path):
    with pytest.raises(InputError, match="not prompts"):
        prompts_in(tiny_flux)


def test_a_traceback_shows_the_hint_below_the_message(tiny_flux: Path):
    with pytest.raises(InputError) as caught:
        prompts_in(tiny_flux)
    assert caught.value.hint in caught.value.__notes__


# ------------------------------------------------------------------------------------------ as trainers keep them


def shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """A webdataset shard with these files in it, in their order."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPTS[0]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]}
            ]
        },
        {"conversations": [{"from": "human", "value": PROMPTS[0]}, {"from": "gpt", "value": "done"}]},
        {"instruction": PROMPTS[0], "input_image": "a.png", "edited_image": "b.png"},
        {"edit_prompt": PROMPTS[0], "original_image": "a.png", "edited_image": "b.png"},
        {"conversations": [{"from": "human", "value": f"<image>\n{PROMPTS[0]}"}], "image": "a.png"},
        {"instruction": f"<image>{PROMPTS[0]}", "images": ["a.png"]},
        {"captions": [PROMPTS[0], "another caption of the image"]},
    ],
    ids=[
        "chat",
        "chat with an image",
        "chat of from and value",
        "edit",
        "edit_prompt",
        "placeholder in a chat",
        "placeholder in an edit",
        "several captions",
    ],
)
def test_chats_edits_and_several_captions_give_the_first_text_of_the_user(row: object, write_text: WriteText):
    assert prompts_in(write_text("p.jsonl", json.dumps(row))).texts == PROMPTS[:1]


def test_a_prompt_file_of_kohya_s_trainers_loses_its_sampling_options(write_text: WriteText):
    lines = f"{PROMPTS[0]} --n blurry, bad hands --w 512 --h 768 --l 7.5 --s 28\n{PROMPTS[1]} --d 1\n"
    assert prompts_in(write_text("sample_prompts.txt", lines)).texts == PROMPTS
    dashes = "a house -- blue -- by the sea, --style raw"
    assert prompts_in(write_text("p.txt", dashes)).texts == (dashes,)


def test_webdataset_shards_give_the_captions_of_their_samples(tmp_path: Path):
    first = {
        "a/0001.jpg": b"jpg",
        "a/0001.txt": PROMPTS[0].encode(),
        "a/0001.json": b"{}",
        "a/0002.jpg": b"jpg",
    }
    shard(tmp_path / "00000.tar", first)
    shard(tmp_path / "00001.tar", {"0003.seg.png": b"png", "0003.caption": PROMPTS[1].encode()})
    assert prompts_in(tmp_path / "00000.tar").texts == PROMPTS[:1]
    found = prompts_in(tmp_path)
    assert (found.texts, found.origin) == (PROMPTS, f"captions in {tmp_path} (2 shards)")


def test_a_shard_whose_captions_are_in_its_json_is_read_by_column(tmp_path: Path):
    facts = [json.dumps({"caption": text, "url": "u"}).encode() for text in PROMPTS]
    path = shard(
        tmp_path / "s.tar", {"1.json": facts[0], "1.jpg": b"jpg", "2.json": facts[1], "2.txt": b"other"}
    )
    assert prompts_in(path, column="caption").texts == PROMPTS


def test_captions_of_a_shard_are_found_under_other_names(tmp_path: Path):
    texts = [text.encode() for text in PROMPTS]
    for kinds in (("cap", "prompt"), ("instruction.txt", "instruction.txt"), ("short.txt", "short.txt")):
        path = shard(
            tmp_path / "s.tar",
            {f"{i}.{k}": text for i, (k, text) in enumerate(zip(kinds, texts, strict=True))},
        )
        assert prompts_in(path).texts == PROMPTS
    edits = {"1.edited_prompt.txt": b"a cat", "1.instruction.txt": texts[0], "2.instruction.txt": texts[1]}
    assert prompts_in(shard(tmp_path / "s.tar", edits)).texts == PROMPTS
    assert prompts_in(tmp_path / "s.tar", column="edited_prompt.txt").texts == ("a cat",)


def test_a_shard_without_captions_says_what_texts_it_has(tmp_path: Path):
    path = shard(tmp_path / "s.tar", {"1.long.txt": b"a", "1.ocr.txt": b"b"})
    with pytest.raises(InputError, match="none of them called a caption") as caught:
        prompts_in(path)
    assert "--prompt-column long.txt; there is .long.txt, .ocr.txt" in str(caught.value.hint)
    with pytest.raises(InputError, match=r"no text \.tags\.txt"):
        prompts_in(path, column="tags.txt")
    with pytest.raises(InputError, match="have no text") as caught:
        prompts_in(shard(path, {"1.jpg": b"jpg"}))
    assert ".txt, .caption, .cap" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("members", "message"),
    [({"1.txt": b"\xff\xfe\x00"}, "not a caption"), ({"1.json": b"{"}, "not readable JSON")],
)
def test_a_shard_that_is_damaged_names_the_member(tmp_path: Path, members: Mapping[str, bytes], message: str):
    path = shard(tmp_path / "s.tar", members)
    with pytest.raises(InputError, match=message) as caught:
        prompts_in(path)
    assert caught.value.where == f"{path}:{next(iter(members))}"


def test_a_compressed_archive_is_no_shard(tmp_path: Path):
    (tmp_path / "s.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(InputError, match="tar archive"):
        prompts_in(tmp_path / "s.tar")


def test_a_table_that_is_refused_does_not_take_python_with_it(tmp_path: Path):
    """Arrow reads ahead in threads; one that is still there when Python ends ends it with a signal."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"caption": [1, 2], "width": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    program = (
        "from pathlib import Path; from svdq_cli.calibration.prompt_files import prompts_in\n"
        f"try: prompts_in(Path({str(tmp_path / 'p.parquet')!r}))\n"
        "except Exception as error: kept = error; print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert "holds int, not text" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
