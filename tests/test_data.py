"""Data sets named by text."""

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_ext.data import load_dataset_spec, refuse_missing_columns, rename_columns
from trl_ext.errors import ConfigurationError

ROWS = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4"}]


@pytest.fixture
def data() -> Dataset:
    return Dataset.from_list(ROWS)


def write(data: Dataset, path) -> None:
    writers = {
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
        ".json": lambda: path.write_text(json.dumps(ROWS)),
        ".csv": lambda: data.to_csv(path),
        ".parquet": lambda: data.to_parquet(path),
    }
    writers[path.suffix]()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_data_file_is_read_by_its_ending(data, tmp_path, suffix):
    write(data, tmp_path / f"data{suffix}")
    loaded = load_dataset_spec({"path": str(tmp_path / f"data{suffix}")})
    assert [{key: str(value) for key, value in row.items()} for row in loaded] == ROWS


def test_a_text_file_is_read_by_lines(tmp_path):
    (tmp_path / "data.txt").write_text("one\ntwo\n")
    assert load_dataset_spec({"path": str(tmp_path / "data.txt")})["text"][:] == ["one", "two"]


def test_a_slice_may_be_asked_for_and_columns_renamed(data, tmp_path):
    write(data, tmp_path / "data.jsonl")
    spec = {"path": str(tmp_path / "data.jsonl"), "split": "train[1:]", "columns": {"question": "prompt"}}
    assert load_dataset_spec(spec).to_list() == [{"prompt": "2+2", "answer": "4"}]


def test_a_folder_of_files_is_read(data, tmp_path):
    write(data, tmp_path / "train.jsonl")
    write(data, tmp_path / "test.jsonl")
    assert load_dataset_spec({"path": str(tmp_path), "split": "test"}).to_list() == ROWS
    assert load_dataset_spec({"path": str(tmp_path), "data_files": "train.jsonl"}).to_list() == ROWS


def test_a_folder_saved_by_datasets_is_read(data, tmp_path):
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert load_dataset_spec({"path": str(tmp_path / "one")}).to_list() == ROWS
    assert load_dataset_spec({"path": str(tmp_path / "two")}).to_list() == ROWS
    assert load_dataset_spec({"path": str(tmp_path / "two"), "split": "test"}).to_list() == ROWS[1:]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"path": "absent.jsonl"}, "there is no file 'absent.jsonl'"),
        ({"path": "data.jsonl", "split": "validation"}, "validation"),
        ({"path": "saved", "split": "validation"}, "validation"),
        (
            {"path": "data.jsonl", "columns": {"quest": "prompt"}},
            "columns: no column 'quest' in the data set. Did you mean 'question'? It has question,",
        ),
    ],
)
def test_what_does_not_exist_is_named(data, tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    write(data, tmp_path / "data.jsonl")
    DatasetDict(train=data).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigurationError) as raised:
        load_dataset_spec(spec)
    assert expected in str(raised.value)


def test_columns_are_renamed_in_every_split(data):
    renamed = rename_columns(DatasetDict(train=data, test=data), {"question": "prompt", "answer": "completion"})
    assert renamed.column_names == {"train": ["prompt", "completion"], "test": ["prompt", "completion"]}


def test_columns_may_swap_names(data):
    swapped = rename_columns(data, {"question": "answer", "answer": "question"})
    assert swapped[0] == {"answer": "1+1", "question": "2"}


def test_no_renaming_leaves_the_data_set_as_it_is(data):
    assert rename_columns(data, None) is data


def test_a_name_that_is_taken_is_refused(data):
    with pytest.raises(ConfigurationError, match="the data set already has a column 'answer'; rename that one too"):
        rename_columns(data, {"question": "answer"})


def test_a_streamed_data_set_is_renamed_too(data):
    renamed = rename_columns(data.to_iterable_dataset(), {"question": "prompt"})
    assert next(iter(renamed)) == {"prompt": "1+1", "answer": "2"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_empty_file_is_refused(tmp_path, suffix):
    (tmp_path / f"data{suffix}").write_text("")
    with pytest.raises(ConfigurationError, match=rf"data set: .*data\{suffix}.* (is empty|cannot be loaded: .+)"):
        load_dataset_spec({"path": str(tmp_path / f"data{suffix}")})


def test_a_reward_function_gets_the_columns_that_it_wants():
    def ours(prompts, completions, *, answer, scale=1.0, **kwargs):
        """Never called."""

    refuse_missing_columns(ours, ["prompt", "answer", "level"], "ours")
    refuse_missing_columns(lambda **columns: [], [], "any")
    with pytest.raises(
        ConfigurationError, match=r"reward ours wants the column\(s\) answer, .* it has prompt, level\."
    ):
        refuse_missing_columns(ours, ["prompt", "level"], "ours")
    with pytest.raises(ConfigurationError, match="answer"):  # TRL passes `completions` in place of this column
        refuse_missing_columns(lambda completion, answer: [], ["completion"], "ours")


def only_answers(prompts, completions, completion_ids, answer):
    """Takes no other column."""


def positional(prompts, completions, completion_ids, answer, /):
    """Takes nothing by name."""


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (only_answers, ["prompt", "answer", "level"], r"'level'\. Add \*\*kwargs"),
        (positional, ["answer"], "positional"),
        (lambda **columns: [], ["completions"], r"rename the column\(s\)"),
    ],
)
def test_a_reward_function_takes_what_it_is_given(function, columns, message):
    refuse_missing_columns(only_answers, ["prompt", "completion", "answer"], "ours")
    with pytest.raises(ConfigurationError, match=message):
        refuse_missing_columns(function, columns, "ours")


def test_what_is_wrong_with_a_data_set_is_said_without_a_traceback(tmp_path):
    """The command line shows the traceback of an error that has a cause other than a refusal."""
    with pytest.raises(ConfigurationError, match="there is no file") as caught:
        load_dataset_spec({"path": str(tmp_path / "none.jsonl")})
    assert caught.value.__cause__ is None
