"""One token as text, exactly: bytes that are no character of their own are written as `<0xE7>`.

A byte-level vocabulary splits characters of several bytes over tokens; decoding one such token
alone gives U+FFFD, whichever bytes it stands for. They are written as SentencePiece and llama.cpp
name them. Knows nothing of models or of who shows the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["joined_pieces", "token_piece"]

_REPLACEMENT = "\ufffd"
_KEPT = (*range(33, 127), *range(161, 173), *range(174, 256))
#: GPT-2's characters for bytes (github.com/openai/gpt-2, src/encoder.py, `bytes_to_unicode`).
_BYTE_OF = {chr(byte): byte for byte in _KEPT} | {
    chr(256 + place): byte
    for place, byte in enumerate(byte for byte in range(256) if byte not in _KEPT)
}
_NO_CHARACTER = re.compile("[\udc80-\udcff]")
_BYTE_NAMES = re.compile(r"(?:<0x[89A-F][0-9A-F]>){2,}")


def token_piece(tokenizer: Any, token: int) -> str:
    """What *token* stands for; `<id>` where it is none of *tokenizer*'s."""
    try:
        text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        name: object = tokenizer.convert_ids_to_tokens(token)
    except (OverflowError, ValueError, TypeError, KeyError, IndexError):
        return f"<{token}>"
    if name is None:
        return f"<{token}>"
    if isinstance(name, str) and name.startswith("▁") and not text.startswith(" "):
        return f" {text}"  # SentencePiece's decoding takes the blank for the text's first
    if _REPLACEMENT not in text:
        return text
    if isinstance(name, bytes):
        return _spelled(name)
    if not isinstance(name, str):
        return text
    if _BYTE_NAMES.fullmatch(name * 2):  # a byte is a token, by this very name
        return name
    known = [_BYTE_OF.get(character) for character in name]
    return text if None in known else _spelled(bytes(byte for byte in known if byte is not None))


def joined_pieces(pieces: Iterable[str]) -> str:
    """The text of neighbouring tokens: bytes that make characters together become these."""
    return _BYTE_NAMES.sub(_characters, "".join(pieces))


def _characters(names: re.Match[str]) -> str:
    return _spelled(bytes.fromhex(re.sub("<0x|>", "", names[0])))


def _spelled(data: bytes) -> str:
    """*data* as UTF-8, every byte that belongs to no character by name."""
    text = data.decode("utf-8", "surrogateescape")
    return _NO_CHARACTER.sub(lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)
