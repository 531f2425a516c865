"""A session's accepted snapshots: drafts to replay, the judgement of each case, what is left to
review.

Made when the first snapshot is asked for, when the stack is loaded anyway. Knows nothing of how the
completions are come by (`harness.plugin.completions`), nor of the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.completion import Application, Completion, Prompt
from harness.display.pieces import token_piece
from harness.errors import InputError
from harness.plugin.completions import Completions
from harness.preset import Preset
from harness.stack import Mode
from harness.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from harness.comparing import Comparison
    from harness.engines.peft import PeftEngine
    from harness.evidence import Evidence
    from harness.noise import NoiseFloor
    from harness.pending import Case, Position, Side
    from harness.snapshot import Found
    from harness.snapshot_form import Snapshot

__all__ = ["ACCEPTED", "Accepted", "Judged"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One compared case: what lay there, what is said now, and the verdict.

    Attributes:
        lay: SHA-256 of the text and of the sidecar that were compared (`""`: absent).
    """

    path: Path
    found: Found
    fresh: Snapshot
    comparison: Comparison
    floor: NoiseFloor | None
    how: str
    accepted_now: Evidence | None = None  # of the accepted tokens, from the model of today
    lay: tuple[str, str] = ("", "")
    written: bool = False  # the session has just accepted it
    unrecorded: str | None = None  # why it does not lie in .pending/ for the review

    @property
    def verdict(self) -> Verdict:
        return self.comparison.verdict


class Accepted:
    """The snapshots of a session's stack and preset.

    Attributes:
        snapshots: the folder of all; `folder` the profile's where one is named.
        judged: by path, of every case compared so far.
    """

    def __init__(
        self,
        *,
        engine: PeftEngine,
        preset: Preset,
        root: Path,
        snapshots: Path,
        folder: Path,
        replaying: bool,
        drift_fails: bool,
    ) -> None:
        self.engine, self.preset, self.root, self.snapshots = engine, preset, root, snapshots
        self.folder = folder
        self.drift_fails = drift_fails
        self.judged: dict[Path, Judged] = {}
        self.completions = Completions(engine, preset, self.drafts if replaying else None)
        self._floors: dict[tuple[str, str, str | None], NoiseFloor | None] = {}
        self._pieces: dict[int, str] = {}
        self._run_recorded = False

    @cached_property
    def contents(self) -> dict[str, str]:
        """Digests of what the completions are made from; the base's weights are read once."""
        from harness.provenance import contents_of

        return contents_of(self.engine)

    def drafts(self, mode: Mode) -> list[tuple[int, ...] | None]:
        """What is accepted for each prompt in *mode*, whichever test module holds it."""
        from harness.snapshot import draft_tokens

        folders = sorted(path for path in self.folder.glob("*") if path.is_dir())
        drafts: list[tuple[int, ...] | None] = []
        for prompt in self.preset.prompts:
            files = (folder / f"{self.name(prompt, mode)}.toml" for folder in folders)
            found = (draft_tokens(file) for file in files if file.is_file())
            drafts.append(next((tokens for tokens in found if tokens), None))
        return drafts

    def name(self, prompt: Prompt, mode: Mode) -> str:
        """The snapshot's file name without suffix."""
        from harness.snapshot import snapshot_name

        return snapshot_name(self.preset.name, prompt.id, mode.name)

    def taken(self, completion: Completion) -> Snapshot:
        """The snapshot of *completion*, stamped with what it was made with."""
        from harness.provenance import made_with
        from harness.snapshot import snapshot_of

        mode = self.engine.stack.mode(completion.mode)
        return snapshot_of(completion, made_with(self.engine, mode), self.contents)

    def judge(self, path: Path, found: Found, fresh: Snapshot) -> tuple[str, ...]:
        """Lines of evidence if *fresh* does not pass; none if it does."""
        verdict = self.compare(path, found, fresh).verdict
        if verdict.passed or (verdict.outcome is Outcome.DRIFT and not self.drift_fails):
            return ()
        lines = [f"{verdict.outcome}: {verdict.name}", *verdict.evidence]
        return tuple([*lines, f"→ {verdict.remedy}"] if verdict.remedy else lines)

    def compare(self, path: Path, found: Found, fresh: Snapshot) -> Judged:
        """The comparison, kept in `judged`."""
        from harness.comparing import judge_snapshot

        known = self.judged.get(path)
        if known is not None and known.found is found and known.fresh is fresh:
            return known
        floor = self._floor(found, fresh)
        replayed = self.completions.known(fresh)
        accepted_now = None
        if replayed is not None and replayed.draft == getattr(found, "token_ids", None):
            accepted_now = replayed.draft_evidence
        comparison = judge_snapshot(
            path.relative_to(self.snapshots).with_suffix("").as_posix(),
            self._from_root(found) if isinstance(found, InputError) else found,
            fresh,
            floor,
            accepted_now=accepted_now,
            piece=self.piece,
        )
        judged = Judged(
            path=path,
            found=found,
            fresh=fresh,
            comparison=comparison,
            floor=floor,
            how=str(replayed) if replayed is not None else "made by the test",
            accepted_now=accepted_now,
        )
        self.judged[path] = judged
        return judged

    def _from_root(self, fault: InputError) -> InputError:
        """*fault* with its path from the root folder: evidence is read in pull requests, too."""
        if fault.where is None or not Path(fault.where).is_relative_to(self.root):
            return fault
        where = Path(fault.where).relative_to(self.root)
        return InputError(fault.fault, where=where, remedy=fault.remedy)

    def _floor(self, found: Found, fresh: Snapshot) -> NoiseFloor | None:
        """The noise floor of this run against what was recorded; measured when first needed."""
        from harness.noise import noise_floor
        from harness.snapshot_form import Snapshot

        if not isinstance(found, Snapshot) or found.evidence is None or fresh.evidence is None:
            return None
        recorded = str(found.made_with.get("dtype", "")) or None
        key = (fresh.mode, fresh.application, recorded)
        if key not in self._floors:
            mode = self.engine.stack.mode(fresh.mode)
            completions = self.completions.of(mode, Application(fresh.application))
            self._floors[key] = noise_floor(
                self.engine,
                mode,
                completions,
                contents=self.contents,
                recorded_dtype=recorded,
            )
        return self._floors[key]

    def piece(self, token: int) -> str:
        """A token as text, bytes that are no character by name."""
        if token not in self._pieces:
            self._pieces[token] = token_piece(self.engine.tokenizer, token)
        return self._pieces[token]

    def record(self, judged: Judged) -> None:
        """Leave the case in `.pending/` for `lora-stack review`."""
        from harness.pending import Run, record_case, record_run

        if not self._run_recorded:
            modes = tuple(mode.name for mode in self.engine.stack.modes)
            conditions = self._conditions(judged.fresh)
            record_run(self.root, Run(conditions=conditions, modes=modes))
            self._run_recorded = True
        record_case(self.root, self._case(judged))

    def _case(self, judged: Judged) -> Case:
        from harness.pending import Case
        from harness.snapshot_files import sidecar_of
        from harness.snapshot_form import Snapshot

        verdict, fresh, found = judged.verdict, judged.fresh, judged.found
        if judged.written:
            verdict = Verdict(name=verdict.name, outcome=Outcome.HELD, evidence=("just accepted",))
            found = fresh
        accepting = {} if verdict.passed else self._accepting(judged)
        place = judged.path.relative_to(self.root)
        lay = dict(zip((place, sidecar_of(place)), judged.lay, strict=True))
        return Case(
            name=judged.path.relative_to(self.snapshots).with_suffix("").as_posix(),
            snapshot=place,
            preset=self.preset.name,
            prompt=fresh.prompt,
            prompt_text=fresh.prompt_text,
            mode=fresh.mode,
            verdict=verdict,
            first=None if judged.written else judged.comparison.first,
            noise_floor=judged.floor.chosen if judged.floor is not None else None,
            then=self._side(found) if isinstance(found, Snapshot) else None,
            now=self._with_accepted(self._side(fresh), judged),
            accepting=accepting,
            accepted_sha256={path: lay[path] for path in accepting},
        )

    def _accepting(self, judged: Judged) -> dict[Path, bytes]:
        from harness.snapshot import stored_form
        from harness.snapshot_files import sidecar_bytes, sidecar_of

        try:
            form = stored_form(judged.fresh)
        except InputError:  # a model of NaN: there is nothing to accept
            return {}
        text = str(form).encode("utf-8")
        place = judged.path.relative_to(self.root)
        return {sidecar_of(place): sidecar_bytes(text, form.evidence), place: text}

    def _side(self, snapshot: Snapshot) -> Side:
        from harness.pending import Side

        return Side(
            text=snapshot.text,
            stop_reason=snapshot.stop_reason.value,
            positions=self._positions(snapshot.token_ids, snapshot.evidence),
            conditions=self._conditions(snapshot),
        )

    def _with_accepted(self, side: Side, judged: Judged) -> Side:
        """*side* with the accepted token among the alternatives where the two part."""
        first, scored = judged.comparison.first, judged.accepted_now
        if scored is None or first is None or first >= min(len(scored), len(side.positions)):
            return side
        from harness.pending import Alternative

        assert not isinstance(judged.found, InputError | None)
        token, here = judged.found.token_ids[first], side.positions[first]
        if token in {other.token_id for other in here.alternatives}:
            return side
        added = Alternative(
            token_id=token, piece=self.piece(token), logprob=float(scored.logprobs[first])
        )
        here = replace(here, alternatives=(*here.alternatives, added))
        return replace(
            side, positions=(*side.positions[:first], here, *side.positions[first + 1 :])
        )

    @staticmethod
    def _conditions(snapshot: Snapshot) -> dict[str, str]:
        made = {"application": snapshot.application, **snapshot.made_with}
        contents = {
            "base_sha256" if key == "base" else key: value
            for key, value in snapshot.contents.items()
        }
        return {key: str(value) for key, value in (made | contents).items()}

    def _positions(
        self, token_ids: Sequence[int], evidence: Evidence | None
    ) -> tuple[Position, ...]:
        from harness.pending import Alternative, Position

        def alternatives(place: int) -> tuple[Alternative, ...]:
            assert evidence is not None
            return tuple(
                Alternative(token_id=int(token), piece=self.piece(int(token)), logprob=float(value))
                for token, value in zip(
                    evidence.top_ids[place], evidence.top_logprobs[place], strict=True
                )
            )

        return tuple(
            Position(
                token_id=token,
                piece=self.piece(token),
                logprob=float(evidence.logprobs[place]) if evidence is not None else None,
                alternatives=alternatives(place) if evidence is not None else (),
            )
            for place, token in enumerate(token_ids)
        )

    def conclude(self, results: Mapping[int, Any]) -> list[Judged]:
        """Judge what syrupy asserted, a missing snapshot too, and record it; by what it found."""
        from harness.snapshot import StoredForm

        concluded = []
        for result in results.values():
            fresh = result.asserted_data
            if result.exception is not None:  # said by syrupy; nothing was compared
                continue
            if not isinstance(fresh, StoredForm) or fresh.snapshot is None:
                continue
            path = Path(result.snapshot_location)
            recalled = result.recalled_data
            found = None if recalled is None else recalled.fault or recalled.snapshot
            judged = self.compare(path, found, fresh.snapshot)
            judged = replace(
                judged, lay=_lay(path, recalled), written=result.created or result.updated
            )
            try:
                self.record(judged)
            except InputError as error:  # a read-only folder: the verdict stands all the same
                judged = replace(judged, unrecorded=str(error))
            concluded.append(judged)
        return concluded


def _lay(path: Path, recalled: Any) -> tuple[str, str]:
    """The digests of what was compared. What came there since, while the noise floor was measured
    perhaps, is somebody else's, and a review must not overwrite it."""
    from harness.snapshot_files import sidecar_of

    if recalled is None:  # there was no text
        return "", _sha256(sidecar_of(path))
    read: tuple[str, str] | None = recalled.sha256
    return read or (_sha256(path), _sha256(sidecar_of(path)))


def _sha256(path: Path) -> str:
    from harness.snapshot_files import file_sha256

    try:
        return file_sha256(path)
    except OSError:
        return ""


ACCEPTED = pytest.StashKey[Accepted]()
