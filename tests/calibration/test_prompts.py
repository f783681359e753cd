from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from svdq_cli.calibration import choose_prompts, dataset_prompts, prompts_digest, read_prompts
from svdq_cli.errors import InputError, UsageError
from svdq_cli.records import Event

WriteText = Callable[[str, str], Path]


def test_blank_lines_and_comments_are_not_prompts(write_text: WriteText):
    path = write_text("p.txt", "\ufeff# made by hand\n\n  a red circle \r\n\ta café\n#no\n")
    assert read_prompts(path) == ("a red circle", "a café")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such"), (b"\xff\xfe\x00", "UTF-8"), (b"# only\n\n", "holds no prompt")]
)
def test_a_bad_prompt_file_is_refused_with_a_cure(tmp_path: Path, content: bytes | None, says: str):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_prompts(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_folder_is_not_a_prompt_file(tmp_path: Path):
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(tmp_path)


CAPTIONS = ["one", "two", "three"]


def test_parquet_and_a_folder_are_data_sets(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"prompt": [*CAPTIONS, None, "  "]}).to_parquet(tmp_path / "train.parquet")
    assert dataset_prompts(str(tmp_path / "train.parquet")).texts == tuple(CAPTIONS)
    assert dataset_prompts(str(tmp_path)).texts == tuple(CAPTIONS)
    assert dataset_prompts(str(tmp_path), split="train", limit=1).texts == ("one",)


def test_a_missing_column_is_answered_with_the_columns_there_are(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"n": [1], "title": ["one"]}).to_parquet(tmp_path / "p.parquet")
    path = str(tmp_path / "p.parquet")
    with pytest.raises(InputError, match="no column 'prompt'") as caught:
        dataset_prompts(path, column="prompt")
    assert "n, title" in str(caught.value.hint)
    with pytest.raises(InputError, match="'n' holds int"):
        dataset_prompts(path, column="n")


def test_a_bad_data_set_is_refused_with_a_cure(tmp_path: Path):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    cases = {
        str(tmp_path / "absent.parquet"): "no such data set file",
        str(tmp_path / "damaged.parquet"): "can't be read",
        "nobody/nothing": "can't be read",
    }
    for name, says in cases.items():
        with pytest.raises(InputError, match=says) as caught:
            dataset_prompts(name)
        assert caught.value.hint


def test_an_unknown_split_is_refused(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="split"):
        dataset_prompts(str(tmp_path / "d"), split="test")


def test_the_choice_of_prompts_is_seeded():
    texts = [f"prompt {i}" for i in range(50)]
    first = choose_prompts(texts, samples=8, seed=3)
    assert first == choose_prompts(texts, samples=8, seed=3)
    assert len(set(first)) == 8
    assert set(first) <= set(texts)
    assert set(first) != set(choose_prompts(texts, samples=8, seed=4))
    assert choose_prompts(texts, samples=4, seed=3) == first[:4]


def test_too_few_prompts_are_all_used_with_a_warning():
    events: list[Event] = []
    assert choose_prompts(["a", "b"], samples=2, seed=0, observe=events.append) == ("a", "b")
    assert not events
    assert choose_prompts(["a", "b"], samples=3, seed=0, observe=events.append) == ("a", "b")
    assert [event.kind for event in events] == ["warning"]
    with pytest.raises(UsageError):
        choose_prompts(["a"], samples=0, seed=0)


def test_the_digest_of_prompts_sees_where_one_ends():
    assert prompts_digest(["ab", "c"]) != prompts_digest(["a", "bc"])
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
    assert prompts_digest(["a", "b"]) == prompts_digest(("a", "b"))


def test_a_table_without_rows_says_so(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(InputError, match=r"empty\.parquet: can't be read: it has no rows"):
        dataset_prompts(str(file))
