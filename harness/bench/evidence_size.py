"""How many bytes a snapshot's evidence takes beside its text, and where they go.

    python -m harness.bench.evidence_size [FOLDER]

First for 128 tokens of English at a vocabulary of 151,936, with random distributions as peaked as
a trained model's (half of the tokens above nine tenths) and alternatives drawn by word frequency,
and once uniformly; then for the snapshots below FOLDER (default: `snapshots`). Sizes decide nothing
else: the same seeds give the same figures on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.errors import InputError
from harness.evidence import Evidence, encode_evidence
from harness.snapshot import read_stored
from harness.snapshot_files import sidecar_bytes
from harness.snapshot_form import Snapshot

__all__ = [
    "ENGLISH",
    "TOKENS",
    "VOCABULARY",
    "Size",
    "by_frequency",
    "english_size",
    "random_evidence",
    "size_of",
    "uniform",
]

VOCABULARY = 151_936
TOKENS = 128
#: 128 tokens of a Qwen tokenizer, which makes about 4.6 characters of English a token.
ENGLISH = (
    "The kettle had been singing for some time before anyone in the house thought of tea. Rain "
    "went on tapping at the tall windows, patient as a clerk, and the garden beyond them had lost "
    "its edges; only the pear tree kept its shape, a darker grey on grey. My grandmother measured "
    "the leaves with the small spoon that was used for nothing else, waited, and poured. You must "
    "never hurry it, she said, as she had said every autumn that I could remember, and you must "
    "never leave it either. I asked her once what would happen if one did. She considered the "
    "question with great seriousness, and told me that the tea would know.\n"
)
_FORM_LINES = 35  # around the text, each with a mark in the sidecar

#: Draws the ids of five tokens.
Draw = Callable[[np.random.Generator, int], NDArray[np.int64]]


def random_evidence(tokens: int, *, vocabulary: int, seed: int, ids: Draw) -> Evidence:
    """Evidence of greedy tokens with peaked distributions."""
    rng = np.random.default_rng(seed)
    best = rng.beta(2.2, 0.6, size=tokens) * 0.9995
    rest = np.sort(rng.dirichlet(np.full(4, 0.7), size=tokens), axis=1)[:, ::-1]
    others = np.maximum(rest * (rng.uniform(0.4, 0.9, size=tokens) * (1 - best))[:, None], 1e-9)
    chances = np.concatenate([np.maximum(best[:, None], others[:, :1] * 1.01), others], axis=1)
    top_ids = np.stack([ids(rng, vocabulary) for _ in range(tokens)])
    logprobs = np.log(chances)
    return Evidence(logprobs=logprobs[:, 0].copy(), top_ids=top_ids, top_logprobs=logprobs)


def by_frequency(rng: np.random.Generator, vocabulary: int) -> NDArray[np.int64]:
    """As likely as words are by Zipf's law where ids are ranks."""
    found: list[int] = []
    while len(found) < 5:
        token = min(int(3 * (vocabulary / 3) ** rng.random()), vocabulary - 1)
        found += [token] if token not in found else []
    return np.array(found)


def uniform(rng: np.random.Generator, vocabulary: int) -> NDArray[np.int64]:
    """Every token as likely as any other."""
    return rng.choice(vocabulary, 5, replace=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Bytes of one or several snapshots.

    Attributes:
        text: of the completion's text, in UTF-8.
        sidecar: of the whole sidecar.
        fixed: of the sidecar without any evidence.
        ids: of the alternatives' token ids.
    """

    tokens: int
    text: int
    sidecar: int
    fixed: int
    ids: int

    @property
    def times(self) -> float:
        """The sidecar's bytes over the text's."""
        return self.sidecar / max(self.text, 1)


def size_of(form: bytes, text: str, token_ids: Iterable[int], evidence: Evidence) -> Size:
    """The size of a snapshot whose stored text is *form*."""
    produced = [int(token) for token in token_ids]
    tokens = np.asarray(produced, dtype=np.int64)
    encoded = encode_evidence(evidence, produced)
    # The same with one id for all alternatives, which takes a bit each.
    is_token, other = evidence.top_ids == tokens[:, None], (tokens == 0)[:, None]
    without = replace(evidence, top_ids=np.where(is_token, evidence.top_ids, other))
    return Size(
        tokens=len(produced),
        text=len(text.encode("utf-8", "surrogatepass")),
        sidecar=len(sidecar_bytes(form, encoded)),
        fixed=len(sidecar_bytes(form, b"")),
        ids=len(encoded) - len(encode_evidence(without, produced)),
    )


def english_size(ids: Draw, *, seed: int = 0) -> Size:
    """Of 128 tokens of English, with alternatives drawn by *ids*."""
    evidence = random_evidence(TOKENS, vocabulary=VOCABULARY, seed=seed, ids=ids)
    form = ("\n" * _FORM_LINES + ENGLISH).encode()
    return size_of(form, ENGLISH, evidence.top_ids[:, 0], evidence)


def _stored(folder: Path) -> list[Size]:
    sizes = []
    for path in sorted(folder.rglob("*.toml")):
        form = read_stored(path)
        found: Snapshot | None = form.snapshot if form is not None else None
        if form is not None and found is not None and found.evidence is not None:
            sizes.append(size_of(str(form).encode(), found.text, found.token_ids, found.evidence))
    if not sizes:
        raise InputError("holds no snapshot with evidence", where=folder)
    return sizes


def _sum(sizes: list[Size]) -> Size:
    return Size(
        tokens=sum(size.tokens for size in sizes),
        text=sum(size.text for size in sizes),
        sidecar=sum(size.sidecar for size in sizes),
        fixed=sum(size.fixed for size in sizes),
        ids=sum(size.ids for size in sizes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("snapshots"))
    folder = parser.parse_args().folder
    stored = _stored(folder)
    rows = {
        "English, by frequency": english_size(by_frequency),
        "English, uniform": english_size(uniform),
        f"{len(stored)} in {folder.name}/": _sum(stored),
    }
    print("| | tokens | text | sidecar | times | fixed | ids, bits a token | other bits a token |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size in rows.items():
        other = size.sidecar - size.fixed - size.ids
        print(
            f"| {name} | {size.tokens} | {size.text} | {size.sidecar} | {size.times:.1f} "
            f"| {size.fixed} | {8 * size.ids / size.tokens:.1f} "
            f"| {8 * other / size.tokens:.1f} |"
        )


if __name__ == "__main__":
    main()
