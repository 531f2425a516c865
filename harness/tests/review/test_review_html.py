"""The review's page: inert, self-contained, and driven by keys in a real browser."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.pending import read_records
from harness.report.review_html import as_html
from harness.tests.review.browser import SCHEMES, driven, photographed
from harness.tests.review.factory import HOSTILE, a_grid, case, positions, recorded
from harness.verdict import Outcome

foreign = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=12)),
    min_size=1, max_size=3,
).map("".join)  # fmt: skip


class _Page(HTMLParser):
    """Every tag with its attributes, and what stands in the script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def page(root: Path) -> Path:
    path = root / "review.html"
    main(["review", "--root", str(root), "--html", str(path)])
    return path


def structure(text: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in _Page(text).tags]


def hostile(root: Path, text: str, other: str) -> str:
    """The page of three cases in which every foreign text is *text* or *other*."""
    changed = dataclasses.replace(
        case(then="a b", now="a c"), prompt_text=text, preset=text, snapshot=Path(f"x{text}")
    )
    then = dataclasses.replace(changed.now, stop_reason=text)
    piece = positions("a")[0]
    alternatives = tuple(dataclasses.replace(a, piece=text) for a in piece.alternatives)
    said = tuple(
        dataclasses.replace(piece, piece=word, token_id=place, alternatives=alternatives)
        for place, word in enumerate((text, other))
    )
    verdict = dataclasses.replace(changed.verdict, evidence=(text, other), remedy=other)
    recorded(
        root,
        dataclasses.replace(
            changed,
            verdict=verdict,
            first=1,
            then=dataclasses.replace(then, positions=said),
            now=dataclasses.replace(changed.now, positions=said[::-1]),
            mode=other,
            prompt=text,
        ),
    )
    return as_html(read_records(root))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=foreign, other=foreign)
def test_foreign_text_makes_no_tag_no_attribute_and_no_script(
    tmp_path: Path, text: str, other: str
):
    # Whatever the words are, the page has the tags that harmless words give it.
    assert structure(hostile(tmp_path, text, other)) == structure(
        hostile(tmp_path, "harmless", "words")
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(then=foreign, now=foreign)
def test_words_that_changed_make_only_marks(tmp_path: Path, then: str, now: str):
    recorded(tmp_path, case(then=then, now=now), case(mode="style", outcome=Outcome.MISSING,
                                                     then=None, now=then))  # fmt: skip
    text = as_html(read_records(tmp_path))
    text.encode()  # no lone surrogate
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    allowed = {tag for tag, _ in structure(as_html(read_records(a_grid(tmp_path / "harmless"))))}
    assert {tag for tag, _ in structure(text)} <= allowed | {"ins", "del"}


def test_the_page_names_no_address_and_a_policy_forbids_every_connection(tmp_path: Path):
    text = page(a_grid(tmp_path)).read_text()
    for tag, attributes in _Page(text).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "action", "srcset"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "script-src 'nonce-" in policy[1]
    assert "url(" not in text
    assert "@import" not in text


def test_every_case_is_in_the_grid_and_beside_its_other_modes(tmp_path: Path):
    text = page(a_grid(tmp_path)).read_text()
    assert text.count('class="cell ') == text.count('<article class="card ') == 12
    assert text.count('<section class="prompt') == 3
    assert text.count("data-pending>") == 4


# ---- in a browser


@pytest.mark.slow
def test_keys_move_through_the_changes_and_back_to_the_grid(tmp_path: Path):
    found = driven(
        page(a_grid(tmp_path)),
        """
        const at = () => $(".card.current")?.id ?? null;
        const seen = [at()];
        for (const name of ["j", "j", "j", "j", "j", "k"]) { await key(name); seen.push(at()); }
        const counter = $("#counter").textContent;
        await key("ArrowRight"); const right = at();
        await key("ArrowUp"); const up = at();
        await key("g"); const cell = document.activeElement.dataset.case;
        await key("ArrowDown"); await key("ArrowLeft");
        const other = document.activeElement.dataset.case;
        await key("Enter");
        return { seen, counter, right, up, cell, other, opened: at(), hash: location.hash, faults,
                 pending: $$(".card[data-pending]").map(card => card.id) };
        """,
    )
    changes = found["pending"]
    assert len(changes) == 4
    assert found["seen"] == [None, *changes, changes[3], changes[2]]
    assert found["counter"] == "3 of 4 changes"
    assert found["right"] == "c7"  # the next mode of fox-home
    assert found["up"] == "c3"  # the same mode of black-tea-taste
    assert found["cell"] == "3"
    assert found["other"] == "6"
    assert found["opened"] == "c6"
    assert found["hash"] == "#c6"
    assert found["faults"] == []


@pytest.mark.slow
def test_tokens_are_coloured_by_probability_and_by_drift_and_tell_their_alternatives(
    tmp_path: Path,
):
    found = driven(
        page(a_grid(tmp_path)),
        """
        const amounts = () => $$(".card.current .side:last-child .t")
          .map(span => Number(span.style.getPropertyValue("--amount")));
        await key("j"); await key("t");
        const probability = amounts();
        const fork = $$(".card.current .t.fork").map(span => span.textContent);
        $(".card.current .t.fork").dispatchEvent(
          new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
        const tip = $(".tip").innerText;
        await key("h");
        const still = amounts();
        await key("j"); await key("j");
        const drift = amounts();
        const cold = $$(".card.current .side:last-child .t.cold").length;
        await key("t");
        return { probability, fork, tip, still, drift, cold, faults,
                 words: !$(".card.current .text").hidden,
                 legend: $$(".legend:not([hidden])").length };
        """,
    )
    # More colour where the model was less sure: -0.05 nats, then -0.85, then -0.53.
    assert found["probability"][0] < found["probability"][2] < found["probability"][1]
    assert found["fork"] == [" unfolds", " offers"]
    assert "58.9 %" in found["tip"]
    assert "offers" in found["tip"]
    assert set(found["still"]) == {0}  # nothing drifted before the fork
    assert min(found["drift"]) > 0.3  # the drifting case: 0.3 nats at every token, all downwards
    assert found["cold"] == 0
    assert found["words"] is True
    assert found["legend"] == 0
    assert found["faults"] == []


@pytest.mark.slow
def test_hostile_words_run_nothing_and_nothing_is_fetched(tmp_path: Path):
    for number, text in enumerate(HOSTILE):
        recorded(tmp_path, case(prompt=f"p{number}", then=text, now=f"{text} x", prompt_text=text))
    found = driven(
        page(tmp_path),
        """
        let alerts = 0;
        window.alert = () => alerts++;
        await key("j"); await key("t");
        for (const span of $$(".t").slice(0, 40))
          span.dispatchEvent(
            new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
        for (const name of ["h", "h", "a", "a"]) await key(name);
        for (const span of $$("details")) span.open = true;
        await pause();
        return { alerts, faults, fetched: performance.getEntriesByType("resource").map(e => e.name),
                 images: document.images.length, tokens: $$(".t").length,
                 links: $$("a").filter(a => !a.getAttribute("href").startsWith("#")).length,
                 scripts: $$("script:not([type])").length };
        """,
    )
    assert found == {
        "alerts": 0, "faults": [], "fetched": [], "images": 0, "links": 0,
        "tokens": found["tokens"], "scripts": 2,  # the page's own and this test's
    }  # fmt: skip
    assert found["tokens"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int):
    root = a_grid(tmp_path)
    long = "Donaudampfschifffahrtsgesellschaft" * 12
    recorded(root, case(prompt="a-long-one" * 8, then=long, now=long + "x", prompt_text=long))
    found = driven(
        page(root),
        """
        // A frame of the phone's width: the window itself has a least width.
        document.documentElement.style.width = WIDTH + "px";
        await key("j"); await key("t"); await pause();
        const wide = $$("main > *, .card, .card > *, .t").filter(element =>
          !element.closest(".scroll") && element.getBoundingClientRect().right > WIDTH + 1);
        const out = $$(".at table").filter(table => table.getBoundingClientRect().right >
          table.closest(".card").getBoundingClientRect().right);
        return { wide: wide.map(element => element.className).slice(0, 5), faults,
                 out: out.length, tables: $$(".at table").length,
                 scroll: document.documentElement.scrollWidth };
        """.replace("WIDTH", str(width)),
        f"--window-size={width},800",
    )
    assert found["wide"] == []
    assert found["out"] == 0
    assert found["tables"] > 0
    assert found["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_picture_of_it_is_light_or_dark_as_the_system_is(
    tmp_path: Path, scheme: str, size: tuple[int, int]
):
    path = page(a_grid(tmp_path))
    greys = photographed(path, tmp_path / f"{scheme}-{size[0]}.png", size=size, scheme=scheme)
    ground = max(set(greys), key=greys.count)
    assert ground > 240 if scheme == "light" else ground < 40
    drawn = sum(abs(grey - ground) > 100 for grey in greys) / len(greys)
    assert 0.005 < drawn < 0.3, "words on a quiet ground"
    right = [row[-1] for row in zip(*[iter(greys)] * size[0], strict=True)]
    assert right.count(ground) > 0.8 * size[1], "nothing runs out of the window"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_its_ground(tmp_path: Path, scheme: str):
    found = driven(
        page(a_grid(tmp_path)),
        """
        await key("j"); await key("t");
        // A colour as the browser paints it, whatever words CSS has for it.
        const brush = document.createElement("canvas").getContext("2d");
        const painted = colour => {
          brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
          return [...brush.getImageData(0, 0, 1, 1).data];
        };
        const over = ([r, g, b, a], [R, G, B]) =>
          [r, g, b].map((v, n) => v * a / 255 + [R, G, B][n] * (1 - a / 255));
        const ground = element => {
          if (!element) return painted("Canvas");
          const own = painted(getComputedStyle(element).backgroundColor);
          return own[3] === 255 ? own : over(own, ground(element.parentElement));
        };
        const light = colour => { const [r, g, b] = colour.slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const worded = $$("body *").filter(element => element.checkVisibility()
          && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
        const faint = worded.map(element => {
          const under = ground(element);
          const ink = over(painted(getComputedStyle(element).color), under);
          const [low, high] = [light(under), light(ink)].sort((a, b) => a - b);
          return [(high + 0.05) / (low + 0.05), element.className + " " + element.textContent];
        }).sort((a, b) => a[0] - b[0]);
        return { dark: matchMedia("(prefers-color-scheme: dark)").matches, count: faint.length,
                 least: faint[0], faults };
        """,
        SCHEMES[scheme],
    )
    assert found["dark"] == (scheme == "dark")
    assert found["faults"] == []
    assert found["count"] > 50
    # https://www.w3.org/TR/WCAG22/#contrast-minimum
    assert found["least"][0] >= 4.5, found["least"]


@pytest.mark.slow
def test_many_prompts_open_on_those_that_differ(tmp_path: Path):
    held = [case(prompt=f"quiet-{n}", outcome=Outcome.HELD) for n in range(30)]
    recorded(tmp_path, *held, case(prompt="loud"))
    found = driven(
        page(tmp_path),
        """
        const visible = () => $$(".prompt").filter(section => !section.hidden).length;
        const before = visible();
        await key("a"); const all = visible();
        await key("?"); const help = $("#help").open;
        return { before, all, help, faults };
        """,
    )
    assert found == {"before": 1, "all": 31, "help": True, "faults": []}
