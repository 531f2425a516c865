"""Replay gives what greedy decoding gives, whatever the draft, and says when it cannot."""

import random
from dataclasses import replace

import pytest

MODES = ("base", "style", "instruct", "stacked")


def prompts_of(seed, count):
    from harness.completion import Prompt

    chance = random.Random(seed)
    letters = "abcdefghij klmnopq rstuvwxyz"
    return [
        Prompt(id=f"p{n}", text="".join(chance.choices(letters, k=chance.randint(1, 30))))
        for n in range(count)
    ]


def draft_of(completion, chance):
    """A right draft, one changed somewhere, cut short, gone on with, foreign, or none."""
    ids = list(completion.token_ids)
    place = chance.randrange(len(ids))
    match chance.randrange(8):
        case 0 | 1:
            return tuple(ids)
        case 2 | 3:
            return (*ids[:place], chance.randrange(250), *ids[place + 1 :])
        case 4:
            return tuple(ids[:place])
        case 5:
            return (*ids, *chance.choices(range(250), k=3))
        case 6:
            return (*ids[:place], 10**9, -3)
        case _:
            return None


def replayed_and_generated(engine, mode, prompts, settings, chance):
    """Pairs of what replay gives from drafts of every kind, and what generating gives."""
    from harness.replay import complete

    generated = engine.generate(prompts, mode, settings)
    drafts = [draft_of(completion, chance) for completion in generated]
    return complete(engine, prompts, mode, settings, drafts=drafts), generated, drafts


@pytest.fixture(scope="module")
def stack_of(tmp_path_factory):
    """`stack_of(seed)`: a loaded engine of a tiny stack of that seed."""
    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    def load(seed, **arguments):
        tiny = tiny_stack(tmp_path_factory.mktemp("seeded"), seed=seed, **arguments)
        return load_engine(resolve_stack(adapters=tiny.adapters), device="cpu")

    return load


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_whatever_the_draft_the_completion_is_the_greedy_one(stack_of, family):
    from harness.completion import GenerationSettings

    chance = random.Random(family)
    with stack_of(5, family=family) as engine:
        for mode in MODES:
            found, generated, drafts = replayed_and_generated(
                engine, mode, prompts_of(mode, 12), GenerationSettings(max_new_tokens=12), chance
            )
            for one, completion, draft in zip(found, generated, drafts, strict=True):
                assert one.completion == completion
                assert len(one.completion.evidence) == len(completion.token_ids)
                if draft == completion.token_ids:
                    assert (one.kept, one.generated) == (len(draft), 0)


def test_a_full_context_ends_a_replayed_completion_as_a_generated_one(stack_of):
    from harness.completion import GenerationSettings, StopReason

    with stack_of(5, max_position_embeddings=34) as engine:
        found, generated, _ = replayed_and_generated(
            engine, "base", prompts_of(1, 16), GenerationSettings(max_new_tokens=12),
            random.Random(1),
        )  # fmt: skip
        assert [one.completion for one in found] == list(generated)
        assert {c.stop_reason for c in generated} >= {StopReason.CONTEXT, StopReason.LENGTH}


@pytest.mark.parametrize(
    "changes",
    [
        {"do_sample": True, "seed": 3},
        {"repetition_penalty": 1.3},
        {"stop_strings": ("e",)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_replay_cannot_express_are_generated_and_said(tiny_engine, changes):
    from harness.completion import GenerationSettings
    from harness.replay import complete

    settings = replace(GenerationSettings(max_new_tokens=8), **changes)
    prompts = prompts_of(0, 4)
    generated = tiny_engine.generate(prompts, "stacked", settings)
    drafts = [completion.token_ids for completion in generated]
    found = complete(tiny_engine, prompts, "stacked", settings, drafts=drafts)
    assert [one.completion for one in found] == list(generated)
    assert all(next(iter(changes)) in str(one) for one in found)
    assert all(one.completion.evidence is not None for one in found)


def test_evidence_is_the_models_own_distribution_at_every_token(tiny_engine):
    import torch

    from harness.completion import GenerationSettings
    from harness.replay import complete

    prompts = prompts_of(2, 5)
    found = complete(
        tiny_engine, prompts, "stacked", GenerationSettings(max_new_tokens=9), drafts=[None] * 5
    )
    for one in found:
        row = one.completion.prompt_token_ids + one.completion.token_ids
        (logits,) = tiny_engine.logits([row], "stacked")
        expected = logits[len(one.completion.prompt_token_ids) - 1 : -1].double().log_softmax(-1)
        evidence = one.completion.evidence
        tokens = torch.tensor(one.completion.token_ids)[:, None]
        assert evidence.logprobs == pytest.approx(
            expected.gather(1, tokens)[:, 0].numpy(), abs=1e-5
        )
        assert (evidence.top_ids[:, 0] == expected.argmax(-1).numpy()).all()
        assert evidence.top_logprobs == pytest.approx(expected.topk(5).values.numpy(), abs=1e-5)


def test_few_tokens_at_a_time_or_many_give_the_same_evidence(tiny_engine, monkeypatch):
    from harness.engines import scoring
    from harness.engines.scoring import ScoreRow, score, score_stepwise

    rows = [
        ScoreRow(prompt=tuple(range(1, 2 + n)), produced=tuple(range(7, 12 + n % 3)))
        for n in range(9)
    ]
    whole = score(tiny_engine, rows, "stacked")
    monkeypatch.setitem(scoring._TOKENS, "cpu", 20)
    monkeypatch.setitem(scoring._LOGIT_BYTES, "cpu", 259 * 4 * 7)
    small = score(tiny_engine, rows, "stacked")
    stepwise = score_stepwise(tiny_engine, rows, "stacked")
    for one, two, three, row in zip(whole, small, stepwise, rows, strict=True):
        assert len(one) == len(row.produced)
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
        assert one.top_logprobs == pytest.approx(three.top_logprobs, abs=1e-5)


def test_a_flattened_mode_says_what_the_live_one_says_and_leaves_no_trace(tiny_engine):
    from harness.completion import Application, GenerationSettings

    prompts, settings = prompts_of(3, 4), GenerationSettings(max_new_tokens=8)
    live = tiny_engine.generate(prompts, "stacked", settings)
    flat = tiny_engine.generate(prompts, "stacked", settings, application=Application.FLATTENED)
    assert [c.token_ids for c in flat] == [c.token_ids for c in live]
    assert tiny_engine.generate(prompts, "stacked", settings) == live
    weighted = tiny_engine.generate(prompts, tiny_engine.stack.mode("base"), settings)
    assert [c.token_ids for c in weighted] != [c.token_ids for c in live]


@pytest.mark.slow
def test_replay_and_generating_give_the_same_verdicts_over_1000_seeds(stack_of):
    """A prompt a seed, in every mode, accepted as it is or otherwise: float32, 4,000 verdicts."""
    from harness.comparing import judge_snapshot
    from harness.completion import GenerationSettings
    from harness.noise import measure_floor
    from harness.replay import complete, with_evidence
    from harness.snapshot import snapshot_of

    settings = GenerationSettings(max_new_tokens=16)
    outcomes = {}
    for stack in range(10):
        prompts = [prompts_of(seed, 1)[0] for seed in range(stack * 100, stack * 100 + 100)]
        prompts = [replace(prompt, id=f"p{n}") for n, prompt in enumerate(prompts)]
        chance = random.Random(stack)
        with stack_of(stack) as engine:
            for name in MODES:
                mode = engine.stack.mode(name)
                generated = with_evidence(engine, engine.generate(prompts, mode, settings), mode)
                drafts = [draft_of(c, chance) or (1,) for c in generated]
                accepted = with_evidence(
                    engine,
                    [
                        replace(c, token_ids=tuple(t for t in d if 0 <= t < 256) or (1,))
                        for c, d in zip(generated, drafts, strict=True)
                    ],
                    mode,
                )
                found = complete(
                    engine, prompts, mode, settings, drafts=[c.token_ids for c in accepted]
                )
                floor = measure_floor(engine, mode, generated)
                for old, new, other in zip(accepted, generated, found, strict=True):
                    then = snapshot_of(old, {})
                    verdicts = [
                        judge_snapshot("case", then, snapshot_of(c, {}), floor).verdict
                        for c in (new, other.completion)
                    ]
                    assert other.completion == new
                    assert verdicts[0].outcome == verdicts[1].outcome
                    outcome = verdicts[0].outcome.value
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == 4000
    assert min(outcomes.get("held", 0), outcomes.get("changed", 0)) > 500
