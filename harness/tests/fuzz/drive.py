"""Coverage-guided fuzzing of the readers.

    python -m harness.tests.fuzz.drive header|json [libFuzzer options] [a folder for new inputs]

Needs atheris (`pip install lora-stack-harness[fuzz]`). What crashes is written to the working
folder; put into `corpus/header/` or `corpus/json/` it is replayed in the fast tests. New inputs are
forgotten unless a folder for them is named; the corpus itself is only read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
_WORDS = {
    "json": [
        "{", "}", "[", "]", ":", ",", '"', "NaN", "Infinity", "-0", "1e999", "true", "false",
        "null", "\\\\u", "\\\\ud800", "\\xef\\xbb\\xbf",
    ],
    "header": [
        '"dtype":"F32"', '"dtype":"BF16"', '"shape":[2,2]', '"shape":[]', '"data_offsets":[0,16]',
        '"__metadata__"', "\\x0a\\x0a", "[0,0]", "[1,", '"a":{', "}}", "18446744073709551615",
    ],
}  # fmt: skip


def main() -> None:
    target, *arguments = sys.argv[1:]
    import atheris

    # The reference is imported first: only the harness' own readers guide the fuzzer.
    import safetensors  # noqa: F401

    with atheris.instrument_imports(include=["harness"]):
        import harness.files.strict_json
        import harness.files.tensor_files  # noqa: F401
        from harness.tests.fuzz.readers import TARGETS

    check = TARGETS[target]
    with tempfile.TemporaryDirectory() as room:
        scratch = Path(room)
        words = scratch / "words.dict"
        words.write_text(
            "".join('"' + word.replace('"', "\\x22") + '"\n' for word in _WORDS[target])
        )

        fresh = scratch / "new"  # libFuzzer writes into the first folder that it is given
        fresh.mkdir()
        named = any(not argument.startswith("-") for argument in arguments)
        folders = [str(CORPUS / target)] if named else [str(fresh), str(CORPUS / target)]

        def once(data: bytes) -> None:
            check(data, scratch)

        atheris.Setup([sys.argv[0], f"-dict={words}", "-max_len=2048", *arguments, *folders], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
