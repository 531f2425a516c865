"""What was found sound is known again, and only while nothing that it depends on has changed."""

import os

import pytest

from harness.files import soundness
from harness.files.soundness import forget, known_sound, remember_sound, stamp_of


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "lora-stack" / "sound"
    forget()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file worth remembering; however young, it counts as settled."""
    monkeypatch.setattr(soundness, "_SETTLED_NS", -(1 << 62))
    path = tmp_path / "shard"
    path.write_bytes(b"a" * (1 << 20))
    return path


def known_again(*given):
    """In this process, and in another one."""
    here = known_sound(stamp_of(*given))
    forget()
    return here, known_sound(stamp_of(*given))


def test_what_was_found_sound_is_known_in_the_next_process_too(file, memory):
    assert known_again("values", [file]) == (False, False)
    remember_sound(stamp_of("values", [file]))
    assert known_again("values", [file]) == (True, True)
    assert len(list(memory.iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "time", "replaced", "gone"])
def test_a_file_that_changed_is_not_known(file, change):
    remember_sound(stamp_of("values", [file]))
    if change == "content":
        file.write_bytes(b"b" * (1 << 20) + b"c")
    elif change == "time":
        os.utime(file, ns=(5, 5))
    else:
        content = file.read_bytes()
        file.unlink()
        if change == "replaced":
            file.write_bytes(content)
    assert known_again("values", [file]) == (False, False)


def test_a_file_that_came_changes_the_verdict(file, tmp_path):
    files = [file, tmp_path / "added_tokens.json", file / "below a file"]
    remember_sound(stamp_of("tokenizer", files))
    assert known_again("tokenizer", files) == (True, True)
    files[1].write_text("{}")
    assert known_again("tokenizer", files) == (False, False)


def test_another_check_or_other_terms_are_another_verdict(file):
    remember_sound(stamp_of("values", [file], True))
    assert known_again("values", [file], False) == (False, False)
    assert known_again("tokenizer", [file], True) == (False, False)
    assert known_again("values", [file], True) == (True, True)


def test_what_a_small_file_holds_is_known_in_this_process_alone(file, memory):
    file.write_bytes(b"small")
    remember_sound(stamp_of("values", [file]))
    assert known_again("values", [file]) == (True, False)
    assert not memory.exists()


def test_a_text_alone_is_remembered_by_its_digest(memory):
    remember_sound(stamp_of("template", (), "digest"))
    assert known_again("template", (), "digest") == (True, True)
    assert known_again("template", (), "another") == (False, False)


def test_a_file_written_just_now_is_not_remembered(file, memory, monkeypatch):
    monkeypatch.setattr(soundness, "_SETTLED_NS", 1 << 62)
    remember_sound(stamp_of("values", [file]))
    assert known_again("values", [file]) == (False, False)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '["values"]', "[" * 100_000, "3"])
def test_a_damaged_memory_is_none(file, memory, damage):
    remember_sound(stamp_of("values", [file]))
    forget()
    next(memory.iterdir()).write_text(damage)
    assert not known_sound(stamp_of("values", [file]))


def test_without_a_place_for_the_memory_it_lasts_as_long_as_the_process(file, memory):
    memory.parent.parent.write_text("a file in the way")
    remember_sound(stamp_of("values", [file]))
    assert known_again("values", [file]) == (True, False)
