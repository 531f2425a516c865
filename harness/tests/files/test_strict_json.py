"""JSON that json.loads lets through and that is refused here."""

import errno
import os

import pytest

from harness.errors import InputError
from harness.files.strict_json import (
    parse_json_object,
    read_json_object,
    read_small_text,
    read_toml,
)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"r": 1, "r": 2}', "names the key 'r' twice"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "Infinity"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        ("{}".encode("utf-16"), "byte-order mark"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b'{"r": 1,\n "s": }', "line 2, column 7"),
        (b"[]", "holds a list, not an object"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "levels deep"),
        (b'{"r": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_loose_json_is_refused(data, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_json_object(data, where="config")


def test_brackets_in_strings_are_not_depth():
    text = '{"a": "' + "[" * 500 + '\\""}'
    assert parse_json_object(text.encode(), where="x")["a"].startswith("[[")


def test_error_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: line 1"):
        read_json_object(file, what="config")


def test_folder_and_dangling_link_are_no_files(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, complaint in [
        (tmp_path, "not a regular file"),
        (tmp_path / "link", "points nowhere"),
    ]:
        with pytest.raises(InputError, match=complaint):
            read_json_object(path, what="config")


def test_toml_error_names_the_line(tmp_path):
    file = tmp_path / "stack.toml"
    file.write_text("a = 1\nb = \n")
    with pytest.raises(InputError, match="line 2"):
        read_toml(file, what="stack")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1,\n "b": NaN}', "line 2, column 7: holds NaN"),
        ('{"a": "NaN",\n "b": NaNa}', "line 2, column 7: holds NaN"),
        ('{"a": [1.5,\n\t-1e999]}', "line 2, column 2: -1e999 is beyond every number"),
        ('{"a": "1e999", "b": 1e999}', "line 1, column 21: 1e999 is beyond"),
        ('{"x": ["x", "x"], "y": {"x": 1},\n"x": 2}', "line 2, column 1: names the key 'x' twice"),
        (
            '{"y": [{"b": 1, "c": "b"}, {"b": 1,\n  "\\u0062": 2}]}',
            "line 2, column 3: names .* 'b'",
        ),
        ('{"a": {"b": 1, "b": 2}, ]', "line 1, column 16: names the key 'b' twice"),
    ],
)
def test_what_is_refused_is_named_where_it_stands(text, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_json_object(text.encode(), where="x")


def test_file_that_the_disk_does_not_give_is_said(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("{}")

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pathlib.Path.open", broken)
    for read in (read_json_object, read_small_text, read_toml):
        with pytest.raises(InputError, match=r"config\.json: cannot be read: Input/output error"):
            read(file, what="config")
