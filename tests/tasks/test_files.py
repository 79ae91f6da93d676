"""A user's own files: what is read, and what each kind of bad file is told."""

import json

import pytest

from subquad import tasks

LINES = "".join(f"{i}: häßlich, 日本 and 🙂\n" for i in range(300))


def everything(data):
    return sorted(document for split in ("train", "valid", "test") for document in data.documents(split))


def test_one_file_is_kept_byte_for_byte(tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(LINES.replace("\n", "\r\n").encode())
    data = tasks.text_files(path)
    assert data.split_by == "position"
    assert b"".join(data.tokens(split).tobytes() for split in ("train", "valid", "test")) == path.read_bytes()
    assert data.source == str(path)


def test_a_folder_gives_its_text_files(tmp_path):
    wanted = {f"part{i}/{i}{suffix}": f"text {i} " * 20 for i, suffix in enumerate((".txt", ".md", ".py", ".RST") * 20)}
    ignored = {"a.png": "picture", ".hidden.txt": "hidden", ".git/config.txt": "hidden", "x/__pycache__/b.py": "cache"}
    for name, text in (wanted | ignored).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    data = tasks.text_files(str(tmp_path))
    assert everything(data) == sorted(wanted.values())
    assert data.split_by == "document"


def test_json_lines(tmp_path):
    rows = [{"text": f"row {i} " * 9, "id": str(i)} for i in range(100)]
    rows += [{"content": f"other {i} 🙂" * 9, "id": i} for i in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    data = tasks.text_files([path])
    assert everything(data) == sorted(row.get("text", row.get("content")) for row in rows)
    assert data.split_by == "document"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"rows.jsonl, line 2 is not JSON: .* at column"),
        (b"[1]", "rows.jsonl, line 2 must be a JSON object with a field 'text'; it is list"),
        (b'{"text": 3}', "line 2: 'text' must be a string; it is int"),
        (b'{"a": "x", "b": "y"}', "line 2 needs a field 'text' or exactly one string field.*strings 'a', 'b'"),
        (b'{"a": 1}', "line 2 needs a field 'text' .* fields are 'a', of them strings none"),
        (b'{"text": "ab\\u0000"}', "line 2: character 2 of the text is NUL"),
        (b'{"text": "ab\\ud800"}', "line 2: character 2 of the text is half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=message):
        tasks.text_files(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text" * 10 + b"\0" + b"text", r"bad.txt is not UTF-8 text: byte 40 is NUL"),
        ("text" * 10 + "é", r"bad.txt is not UTF-8 text: byte 1 is NUL"),
        (b"caf\xe9 is Latin-1", r"bad.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"", "bad.txt holds no text: 0 bytes"),
        (b"abc", "bad.txt holds too little text"),
    ],
)
def test_files_that_are_not_text(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode("utf-16-le")
    (tmp_path / "bad.txt").write_bytes(content)
    for path in (tmp_path / "bad.txt",) if b"\0" not in content else (tmp_path / "bad.txt", tmp_path):
        with pytest.raises(ValueError, match=message):
            tasks.text_files(path)


def test_missing_paths_name_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text(LINES)
    with pytest.raises(FileNotFoundError, match=r"no .*shakespear.txt'; did you mean '.*shakespeare.txt'"):
        tasks.text_files(tmp_path / "shakespear.txt")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*shakespeare.txt'"):
        tasks.text_files(tmp_path / "shakespeare" / "sonnets.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is empty$"):
        tasks.text_files(tmp_path / "empty" / "a.txt")


def test_folders_without_text(tmp_path):
    with pytest.raises(ValueError, match=r"no file with a text suffix.*it has no files"):
        tasks.text_files(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"it has 1 others, such as 'a.png'"):
        tasks.text_files(tmp_path)
    with pytest.raises(ValueError, match="at least one path"):
        tasks.text_files([])


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    rows = [f"row {i} " * 20 for i in range(100)]
    datasets.Dataset.from_dict({"id": list(range(100)), "content": rows}).save_to_disk(tmp_path / "one")
    assert everything(tasks.text_files(tmp_path / "one")) == sorted(rows)

    parts = {"train": rows[:50], "validation": rows[50:60], "test": rows[60:]}
    table = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})
    table.save_to_disk(tmp_path / "three")
    data = tasks.text_files(tmp_path / "three")
    assert data.split_by == "given"
    assert data.documents("valid") == rows[50:60]
    assert data.documents("train") == rows[:50]

    datasets.Dataset.from_dict({"a": rows, "b": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="string column 'text' or exactly one string column; its columns are 'a', 'b'"):
        tasks.text_files(tmp_path / "two")


def test_a_saved_data_set_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        tasks.text_files(tmp_path)
