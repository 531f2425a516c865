"""The noise floor is measured, and tells rounding from change: on one prompt of 32 tokens."""

import random
import shutil
from dataclasses import replace

import pytest

from harness.verdict import Outcome

TOKENS = 32


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """`accepted(seed)`: a tiny stack on disk, and what it said in float32, as it was stored."""
    from harness.completion import GenerationSettings
    from harness.engines import load_engine
    from harness.replay import with_evidence
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack
    from harness.tests.test_replay import prompts_of

    def make(seed):
        tiny = tiny_stack(tmp_path_factory.mktemp("noise"), seed=seed)
        with load_engine(resolve_stack(adapters=tiny.adapters), device="cpu") as engine:
            said = engine.generate(
                prompts_of(seed, 8), "stacked", GenerationSettings(max_new_tokens=TOKENS)
            )
            long = [c for c in said if len(c.token_ids) == TOKENS]
            return tiny, with_evidence(engine, long, "stacked")

    return make


def verdicts(completions, *, base, adapters, dtype="float32", rows_at_once=None, threads=1):
    """The verdict on each accepted completion under another stack, by replay."""
    import torch

    from harness.comparing import judge_snapshot
    from harness.engines import load_engine
    from harness.engines.scoring import ScoreRow, score
    from harness.evidence import stored
    from harness.noise import coarser, measure_floor
    from harness.replay import replay_completions
    from harness.resolve import resolve_stack
    from harness.snapshot import snapshot_of

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stack = resolve_stack(adapters=adapters, base_model=str(base))
        with load_engine(stack, device="cpu", dtype=dtype) as engine:
            mode = engine.stack.mode("stacked")
            drafts = [completion.token_ids for completion in completions]
            found = replay_completions(
                engine,
                [completion.prompt for completion in completions],
                mode,
                completions[0].settings,
                drafts=drafts,
            )
            floor = measure_floor(
                engine, mode, [f.completion for f in found], dtype=coarser(dtype, "float32")
            )
            if rows_at_once is not None:
                rows = [
                    ScoreRow(prompt=c.prompt_token_ids, produced=c.token_ids) for c in completions
                ]
                again = score(engine, rows, mode, batch_size=rows_at_once)
                found = [
                    replace(f, completion=replace(c, evidence=e), draft_evidence=e)
                    for f, c, e in zip(found, completions, again, strict=True)
                ]
    finally:
        torch.set_num_threads(before)
    return [
        judge_snapshot(
            "case",
            snapshot_of(replace(c, evidence=stored(c.evidence, c.token_ids)), {}),
            snapshot_of(f.completion, {}),
            floor,
            accepted_now=f.draft_evidence,
        ).verdict
        for c, f in zip(completions, found, strict=True)
    ]


def scaled(tiny, folder):
    """The instruct adapter times 1.02."""
    return {"adapters": altered(tiny, folder, lambda name, tensor: tensor * 1.02)}


def dropped(tiny, folder):
    """The style adapter without its last layer."""
    return {
        "adapters": altered(
            tiny, folder, lambda name, t: t * 0 if ".layers.1." in name else t, "style"
        )
    }


def rounded(tiny, folder):
    """The base's weights through bfloat16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.base, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"base": folder}


def altered(tiny, folder, change, which="instruct"):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.adapters[which], folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(
        {name: change(name, t) if "lora_B" in name else t for name, t in weights.items()}, file
    )
    return {**tiny.adapters, which: folder}


def check_planted(accepted, seed, folder):
    tiny, said = accepted(seed)
    told = 0
    for number, plant in enumerate((scaled, dropped, rounded)):
        stack = {"base": tiny.base, "adapters": tiny.adapters}
        stack |= plant(tiny, folder / f"{seed}-{number}")
        for verdict in verdicts(said, **stack):
            assert verdict.outcome in (Outcome.DRIFT, Outcome.CHANGED), (plant, verdict)
            told += 1
    return told


def check_harmless(accepted, seed):
    tiny, said = accepted(seed)
    stack = {"base": tiny.base, "adapters": tiny.adapters}
    told = 0
    for arguments in (
        {"rows_at_once": 1},
        {"rows_at_once": 3, "threads": 2},
        {"threads": 2},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "rows_at_once": 1},
    ):
        for verdict in verdicts(said, **stack, **arguments):
            assert verdict.passed, (arguments, verdict)
            told += 1
    return told


def test_planted_changes_are_drift_or_changed_every_time(accepted, tmp_path):
    assert check_planted(accepted, 0, tmp_path) > 0


def test_batches_threads_padding_and_bfloat16_are_never_a_change(accepted):
    assert check_harmless(accepted, 1) > 0


@pytest.mark.slow
def test_planted_changes_are_told_from_rounding_over_many_stacks(accepted, tmp_path):
    planted = sum(check_planted(accepted, seed, tmp_path) for seed in range(2, 14))
    harmless = sum(check_harmless(accepted, seed) for seed in range(2, 14))
    assert planted > 120
    assert harmless > 240


@pytest.mark.slow
def test_planted_changes_in_the_trained_stack_are_told_though_no_text_changes(tmp_path):
    """Peaked distributions, as trained models have them: what moved is in the alternatives."""
    from types import SimpleNamespace

    from harness.engines import load_engine
    from harness.preset import choose_preset
    from harness.replay import with_evidence
    from harness.resolve import StackOptions, stack_from_options

    stack = stack_from_options(StackOptions())
    preset = choose_preset(None, None, standing=stack.preset)
    files = SimpleNamespace(base=stack.base.path, adapters={a.name: a.path for a in stack.adapters})
    with load_engine(stack, device="cpu") as engine:
        said = engine.generate(preset.prompts, "stacked", preset.settings)
        said = with_evidence(engine, said, "stacked")
    trained = {"base": files.base, "adapters": files.adapters}
    for number, plant in enumerate((scaled, dropped, rounded)):
        for verdict in verdicts(said, **(trained | plant(files, tmp_path / str(number)))):
            assert verdict.outcome in (Outcome.DRIFT, Outcome.CHANGED), (plant, verdict)
    for arguments in ({"rows_at_once": 1}, {"threads": 2}, {"dtype": "bfloat16"}):
        assert all(verdict.passed for verdict in verdicts(said, **trained, **arguments))


def test_floor_is_remembered_by_the_contents_it_was_measured_on(tiny_engine, monkeypatch, tmp_path):
    from harness import noise
    from harness.completion import GenerationSettings
    from harness.noise import noise_floor
    from harness.tests.test_replay import prompts_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mode = tiny_engine.stack.mode("stacked")
    said = tiny_engine.generate(prompts_of(0, 4), mode, GenerationSettings(max_new_tokens=4))
    measured = noise_floor(tiny_engine, mode, said, contents={"base": "1"})
    assert 0 < measured.chosen <= measured.worst < 1e-4
    assert measured.ways == ("one by one", "with a cache, padded left", "flattened", "float64")
    calls = []
    real = noise.measure_floor
    monkeypatch.setattr(noise, "measure_floor", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert noise_floor(tiny_engine, mode, said, contents={"base": "1"}) == measured
    assert calls == []
    other = noise_floor(tiny_engine, mode, said, contents={"base": "1"}, recorded_dtype="bfloat16")
    assert other.dtype == "bfloat16"
    assert other.chosen > 100 * measured.chosen
    noise_floor(tiny_engine, mode, said, contents={"base": "2"})
    assert len(calls) == 2
    for file in (tmp_path / "lora-stack" / "noise").iterdir():
        file.write_text(random.Random(0).choice(["", "{}", '{"ways": [], "chosen": NaN}']))
    assert noise_floor(tiny_engine, mode, said, contents={"base": "1"}).ways == measured.ways


@pytest.fixture
def measuring(tiny_engine, monkeypatch, tmp_path):
    """What `stacked` says to four prompts, and a function that tells of how many tokens the floor
    of some of it is, and whether it was measured for it."""
    from harness import noise
    from harness.completion import GenerationSettings
    from harness.tests.test_replay import prompts_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mode = tiny_engine.stack.mode("stacked")
    said = tiny_engine.generate(prompts_of(0, 4), mode, GenerationSettings(max_new_tokens=4))
    calls, real = [], noise.measure_floor
    monkeypatch.setattr(noise, "measure_floor", lambda *a, **k: calls.append(1) or real(*a, **k))

    def measured(some):
        calls.clear()
        floor = noise.noise_floor(tiny_engine, mode, some, contents={"base": "1"})
        return floor.tokens, len(calls)

    return said, measured


def test_a_floor_of_a_few_tokens_does_not_stand_for_a_larger_run(measuring):
    said, measured = measuring
    few, many = len(said[0].token_ids), sum(len(c.token_ids) for c in said)
    assert measured(said[:1]) == (few, 1)
    assert measured(said) == (many, 1)
    assert measured(said[:1]) == (many, 0)
    assert measured(said) == (many, 0)


def test_a_floor_is_that_of_the_instructions_it_was_measured_with(measuring, monkeypatch):
    import torch

    said, measured = measuring
    assert [measured(said)[1] for _ in range(2)] == [1, 0]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert measured(said)[1] == 1


def test_another_precision_leaves_no_trace(tiny_engine):
    from harness.engines.scoring import ScoreRow, in_precision, score

    rows = [ScoreRow(prompt=(1, 2, 3), produced=(4, 5, 6, 7))]
    before = score(tiny_engine, rows, "stacked")[0].logprobs
    parameters = {name: id(p) for name, p in tiny_engine.model.named_parameters()}
    with in_precision(tiny_engine, "bfloat16"):
        coarse = score(tiny_engine, rows, "stacked")[0].logprobs
    assert 1e-4 < abs(coarse - before).max() < 0.5
    assert (score(tiny_engine, rows, "stacked")[0].logprobs == before).all()
    assert {name: id(p) for name, p in tiny_engine.model.named_parameters()} == parameters
