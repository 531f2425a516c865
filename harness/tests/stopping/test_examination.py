"""The examination: what it costs, what it leaves behind, and what its figures are."""

import json
from contextlib import nullcontext

import pytest

from harness import stopping
from harness.completion import GenerationSettings
from harness.errors import InputError
from harness.snapshot import snapshot_of
from harness.verdict import Outcome

STOPS = {"base": "never", "style": "never", "stacked": "always"}


@pytest.fixture(scope="module")
def prompts(held_out):
    return held_out.prompts[:12]


@pytest.fixture(scope="module")
def report(embedded_engine, prompts, held_out):
    return stopping.examine_stopping(
        embedded_engine, prompts=prompts, settings=held_out.settings, stops=STOPS
    )


@pytest.fixture
def no_generation(embedded_engine, monkeypatch):
    """The embedded engine, which fails a test that generates with it."""

    def refuse(*_, **__):
        raise AssertionError("something was generated")

    monkeypatch.setattr(embedded_engine, "generate", refuse)
    monkeypatch.setattr(embedded_engine.model, "generate", refuse)
    return embedded_engine


def test_stages_show_the_expected_pattern(report):
    rates = {mode: figures.rate for mode, figures in report.modes.items()}
    assert (rates["base"], rates["style"], rates["stacked"]) == (0, 0, 1)
    ends = {mode: summary.at_end_probability[1] for mode, summary in report.evidence.items()}
    assert ends["stacked"] > 1000 * ends["base"]
    assert report.evidence["stacked"].at_end_rank == (1, 1, 1)
    assert report.evidence["base"].at_end_rank[0] > 100
    # 12 prompts prove no rate.
    assert {verdict.outcome for verdict in report.verdicts} == {Outcome.UNDECIDED}
    assert not report.passed


def test_traces_replay_what_was_generated(report):
    for mode, summary in report.evidence.items():
        assert summary.replayed == summary.tokens, mode
    for trace, ending in zip(
        report.traces["stacked"], report.modes["stacked"].endings, strict=True
    ):
        assert trace.tokens == ending.tokens
        # Greedy decoding stops where EOS first is the likeliest.
        assert trace.rank[-1] == 1
        assert all(rank > 1 for rank in trace.rank[:-1])
        assert trace.margin[-1] > 0 > max(trace.margin[:-1])


def test_snapshots_cost_no_generation(report, no_generation, embedded_engine, prompts, held_out):
    from harness.completion import Application, Completion

    snapshots = []
    for mode, figures in report.modes.items():
        for prompt, ending in zip(prompts, figures.endings, strict=True):
            assert prompt.id == ending.prompt
            ids = embedded_engine.token_ids(prompt)
            snapshots.append(
                snapshot_of(
                    Completion(
                        prompt=prompt, mode=mode, application=Application.LIVE,
                        prompt_token_ids=ids, token_ids=(5,) * ending.tokens, text="A word.",
                        stop_reason=ending.stop_reason, settings=held_out.settings,
                    ),
                    {},
                )
            )  # fmt: skip
    bare = stopping.examine_stopping(snapshots, stack=no_generation.stack, stops=STOPS)
    assert bare.generated == 0
    assert {m: f.stopped for m, f in bare.modes.items()} == {
        m: f.stopped for m, f in report.modes.items()
    }
    assert bare.findings
    traced = stopping.examine_stopping(snapshots, engine=no_generation, stops=STOPS)
    assert traced.generated == 0
    assert traced.evidence["stacked"].tokens == sum(
        len(s.token_ids) for s in snapshots if s.mode == "stacked"
    )


def test_blame_adds_up_and_puts_every_scale_back(embedded_engine, report, prompts):
    from harness.engines.loading import lora_layers
    from harness.stopping.blame import blame_adapters

    engine = embedded_engine
    before = {name: dict(layer.scaling) for name, layer in lora_layers(engine.model).items()}
    rows = [
        [*engine.token_ids(prompt), *engine.tokenizer("A fox.")["input_ids"]]
        for prompt in prompts[:4]
    ]
    logits = engine.logits(rows, "stacked")
    blame = blame_adapters(engine, engine.stack.mode("stacked"), rows, {639})
    for effect in blame.adapters:
        assert set(effect.layers) == {0, 1, 2, 3}
        assert sum(effect.layers.values()) == pytest.approx(effect.effect, abs=1e-3)
    effects = sum(effect.effect for effect in blame.adapters)
    assert blame.full - blame.base == pytest.approx(effects + blame.interplay, abs=1e-3)
    after = {name: dict(layer.scaling) for name, layer in lora_layers(engine.model).items()}
    assert after == before
    for a, b in zip(logits, engine.logits(rows, "stacked"), strict=True):
        assert (a == b).all()


def test_blame_puts_scales_back_when_a_pass_fails(embedded_engine, prompts, monkeypatch):
    from harness.engines.loading import lora_layers
    from harness.stopping import blame

    engine = embedded_engine
    before = {name: dict(layer.scaling) for name, layer in lora_layers(engine.model).items()}
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > 6:
            raise RuntimeError("out of memory")
        return real(*arguments)

    real = blame._last_logits
    monkeypatch.setattr(blame, "_last_logits", failing)
    rows = [list(engine.token_ids(prompts[0]))]
    with pytest.raises(RuntimeError, match="out of memory"):
        blame.blame_adapters(engine, engine.stack.mode("stacked"), rows, {639})
    after = {name: dict(layer.scaling) for name, layer in lora_layers(engine.model).items()}
    assert after == before


def test_log_odds_are_those_of_the_softmax():
    import torch

    from harness.stopping.evidence import eos_log_odds

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).double()
    share = logits.softmax(-1)[:, [4, 7]].sum(-1)
    expected = (share / (1 - share)).log()
    assert torch.allclose(eos_log_odds(logits, {7, 4}), expected)
    assert torch.allclose(eos_log_odds(logits + 100, {7, 4}), expected)


@pytest.mark.slow
def test_samples_are_seeded_and_counted_a_prompt(embedded_engine, prompts, held_out):
    found = [
        stopping.examine_stopping(
            embedded_engine, prompts=prompts[:2], modes=["stacked"], settings=held_out.settings,
            stops={"stacked": "always"}, samples=2, blame=False,
        ).sampled["stacked"]
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0].counts) == 2
    assert found[0].interval.high - found[0].interval.low > 0.6  # 2 prompts, not 4 trials


@pytest.mark.slow
def test_sweep_finds_the_region_that_stops(embedded_engine, prompts, held_out):
    from harness.stopping.sweep import sweep_weights

    sweep = sweep_weights(
        embedded_engine, prompts[:4], held_out.settings, adapters=("style", "instruct"),
        target=0.95, weights=(0.0, 1.0),
    )  # fmt: skip
    assert [cell.meets for cell in sweep.cells] == [False, True, False, True]
    assert sweep.at(1.0, 1.0).retention > 0.9
    assert sweep.at(0.0, 1.0).retention < 0.3
    assert sweep.at(1.0, 0.0).retention == pytest.approx(1.0, abs=1e-4)
    assert sweep.at(0.0, 0.0).retention == pytest.approx(0.0, abs=1e-4)


def test_report_is_written_whole_and_inert(report, tmp_path):
    from harness.report.stopping import as_json, write_stopping
    from harness.stopping.plots import stopping_plots

    plots = stopping_plots(report)
    assert [plot.name for plot in plots] == ["eos-by-step", "survival", "blame-by-layer"]
    folder = write_stopping(report, tmp_path / "out", plots=plots)
    values = json.loads((folder / "stopping.json").read_text())
    assert values["verdict"] == "undecided"
    assert values["modes"]["stacked"]["completions"][0]["eos_rank"][-1] == 1
    assert values == json.loads(json.dumps(as_json(report), allow_nan=False))
    html = (folder / "report.html").read_text()
    assert "instruct raises EOS by" in html
    assert "<script>alert" not in html
    assert (folder / "plots" / "survival.svg").is_file()
    assert "# stopping of" in (folder / "report.md").read_text()


def test_modes_that_declare_nothing_are_said_to_be_unjudged(no_generation, report):
    said = {"stacked": ()}
    for stops, noted in (({}, True), ({"stacked": "always"}, False)):
        found = stopping.examine_stopping(said, stack=no_generation.stack, stops=stops)
        assert any("not judged" in note for note in found.notes) == noted
    found = stopping.examine_stopping(said, stack=no_generation.stack)
    assert "not examined, though declared: base, style" in found.notes
    assert not any("not judged" in note for note in report.notes)


def test_what_is_refused_is_refused_before_anything_is_generated(no_generation, prompts, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    for wrong in (
        {"dataset": tmp_path / "nowhere.jsonl"},
        {"dataset": tmp_path / "data.jsonl", "labels": "asistant"},
        {"merged": tmp_path / "nowhere"},
    ):
        with pytest.raises(InputError):
            stopping.examine_stopping(no_generation, prompts=prompts, **wrong)


def test_sweep_of_a_single_adapter_is_said_to_need_two(prompts, held_out):
    from harness.embedded import embedded_folder
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    stages = embedded_folder() / "stages"
    adapters = {"lora": stages / "stage2_instruct_new_adapter"}
    stack = resolve_stack(base_model=stages / "base", adapters=adapters)
    with load_engine(stack, device="cpu", dtype="float32") as engine:
        report = stopping.examine_stopping(
            engine, prompts=prompts[:1], settings=held_out.settings, modes=["lora"], sweep=True
        )
    assert report.sweep is None
    assert "a weight sweep needs two adapters" in report.notes


def test_engine_without_prompts_is_refused(embedded_engine):
    for more in ({"samples": 2}, {"sweep": True}):
        with pytest.raises(InputError, match="give an engine, and prompts"):
            stopping.examine_stopping({"stacked": ()}, engine=embedded_engine, **more)
    with pytest.raises(InputError, match="needs prompts"):
        stopping.examine_stopping(embedded_engine)
    with pytest.raises(InputError, match="NoneType is neither an engine"):
        stopping.examine_stopping(None)
    with pytest.raises(InputError, match="neither an engine"):
        stopping.examine_stopping([GenerationSettings()])


@pytest.fixture
def interrupted(embedded_engine, monkeypatch, capsys, tmp_path):
    """`interrupted(n)`: the command's output, and its report's folder, where Ctrl-C came when *n*
    modes were generated; `interrupted(4)`: in the examination after them."""
    import harness.engines
    from harness.cli import main

    given, generated = embedded_engine.generate, []

    def generate(prompts, mode, *rest, **named):
        if len(generated) == at:
            raise KeyboardInterrupt
        generated.append(mode)
        return given(prompts[:1], mode, *rest, **named)

    def scored(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_engine, "generate", generate)
    monkeypatch.setattr("harness.stopping.evidence.eos_traces", scored)
    monkeypatch.setattr(
        harness.engines, "load_engine", lambda *_, **__: nullcontext(embedded_engine)
    )
    at = 0

    def run(modes):
        nonlocal at
        at = modes
        code = main(["stopping", "--preset", "elegant_style", "--output", str(tmp_path / "out")])
        assert code == 130
        return capsys.readouterr(), tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("modes", "told"),
    [
        (2, "interrupted: 2 of 4 modes were generated"),
        (4, "interrupted: 4 of 4 modes were generated; their examination did not get to its end"),
    ],
)
def test_an_interrupt_leaves_the_modes_that_are_through_undecided(interrupted, modes, told):
    said, folder = interrupted(modes)
    assert told in said.out
    report = json.loads((folder / "stopping.json").read_text())
    assert report["verdict"] == "undecided"
    assert report["checks"][0]["verdict"] == "undecided"
    assert report["checks"][0]["evidence"] == [told]
    assert list(report["modes"]) == ["base", "style", "instruct", "stacked"][:modes]
    assert told in (folder / "report.md").read_text()


def test_an_interrupt_before_a_mode_is_through_writes_nothing(interrupted):
    said, folder = interrupted(0)
    assert said.err.endswith("error: interrupted; 0 of 4 modes were generated\n")
    assert not folder.exists()
