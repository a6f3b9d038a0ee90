"""The page of `trl-dllm trace`: the JSON in it against the rollout that it is of, and what a browser makes of it."""

import html.parser
import json
import math
from dataclasses import replace

import pytest
import torch
from cases import rollout_for_tests, sample
from helpers_browser import Browser
from oracles import sharp_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_dllm.likelihood import ExactTrajectory, MeanField, token_logps
from trl_dllm.models.tiny import create_tiny_tokenizer
from trl_dllm.reports.gaps import estimate_all
from trl_dllm.tasks import get_task
from trl_dllm.tasks.base import Grid
from trl_dllm.trace import Estimate, Traced, page_data, read_page, token_texts, write_page


TOKENIZER = create_tiny_tokenizer()
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<img src=x onerror=alert(2)>",
    "]]>",
    "&lt;b&gt;",
    "{{data}}",
    '"\\u003c',
    "`${alert(3)}`",
    "\n",
    "\t",
    " two  spaces ",
    "\x00\x07\x1b[31m",
    "\u2028\u2029",
    "\u202egnp.exe",
    "\u200b",
    "\ufeff",
    "e\u0301\u0321" * 9,
    "𝒳",
    "עברית",
    "x" * 300,
    "'; DROP TABLE",
    "%s%n{0}",
]


def traced(rollout, **more) -> Traced:
    return Traced("a model", rollout, TOKENIZER, **more)


# -------------------------------------------------------------------------------------------------- what stands in it


def test_the_page_has_every_token_step_probability_and_cut(tmp_path):
    rollout = rollout_for_tests(dtype=torch.float32).validate()
    rollout.logps[0, 2] = torch.nan  # of an engine that says nothing of it
    rewards = [{"cells": 0.5, "correct": True, "none": None, "nan": math.nan} for _ in range(len(rollout))]
    data = page_data("title", [traced(rollout, block_length=4, facts={"temperature": 0.8}, rewards=rewards)])
    assert write_page(tmp_path / "new" / "page.html", data) == len(rollout)
    page = read_page(tmp_path / "new" / "page.html")
    assert page == json.loads(json.dumps(data)) and page["title"] == "title" and page["left_out"] == 0
    (model,) = page["models"]
    assert model["name"] == "a model" and model["facts"] == {"temperature": 0.8}
    assert {model["vocab"][str(token)] for token in model["special"]} <= {"<mask>", "<eos>", "<pad>", "<bos>", "<unk>"}
    assert len(page["examples"]) == len(rollout)
    for i, (row,) in enumerate(page["examples"]):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        assert (row["prompt"], row["ids"]) == (prompt, rollout.completion_ids[i].tolist())
        assert [model["vocab"][str(token)] for token in row["ids"]] == TOKENIZER.convert_ids_to_tokens(row["ids"])
        assert row["step"] == rollout.unmask_step[i].tolist()
        assert row["counted"] == rollout.counted[i].int().tolist() and row["blocks"] == [0, 4, 8]
        for j, logp in enumerate(row["logp"]):
            if not rollout.revealed[i, j] or (i, j) == (0, 2):
                assert logp is None
            else:
                assert logp == pytest.approx(rollout.logps[i, j].item(), abs=6e-5)
        assert row["rewards"] == {"cells": 0.5, "correct": True, "none": None, "nan": None}
        assert row["grid"] is None and row["estimates"] == []


@pytest.mark.parametrize("alignment", ["position", "canvas"])
def test_the_blocks_of_a_block_causal_model_are_its_own(alignment):
    """The first block of the canvas may hold the end of the prompt."""
    model = sharp_model("sdar", block_size=4)
    model.config.block_alignment = alignment
    rollout = sample(model, block_length=4, diffusion_steps=12, max_new_tokens=12)
    rows = [row for (row,) in page_data("", [traced(rollout)])["examples"]]
    for row, prompt in zip(rows, rollout.prompt_mask.sum(dim=1).tolist(), strict=True):
        first = 4 - prompt % 4 if alignment == "position" else 4
        assert row["blocks"] == [0, *range(first, 12, 4)]


def test_estimates_are_those_of_token_logps(models, family):
    model, rollout = models(family), rollout_for_tests(dtype=torch.float64)
    chosen = {"mean field": MeanField()}
    estimates = estimate_all(model, rollout, ExactTrajectory(), chosen, batch_size=2)
    data = page_data("", [traced(rollout, estimates=estimates)])
    for name, forwards, estimator in (("exact", 9, ExactTrajectory()), ("mean field", 1, MeanField())):
        with torch.no_grad():
            scores = token_logps(model, rollout, estimator)
        for i, (row,) in enumerate(data["examples"]):
            (line,) = [line for line in row["estimates"] if line["name"] == name]
            assert line["forwards"] == forwards and line["per_token"]
            for j, logp in enumerate(line["logps"]):
                if rollout.counted[i, j]:
                    assert logp == pytest.approx(scores.logps[i, j].item(), abs=6e-5)
                else:
                    assert logp is None


def test_what_an_estimator_leaves_out_is_no_number():
    rollout = rollout_for_tests(dtype=torch.float32)
    scored = rollout.counted.clone()
    scored[:, 0] = False
    line = Estimate("some", 3, torch.full(rollout.logps.shape, -1.5), scored, per_token=False)
    for i, (row,) in enumerate(page_data("", [traced(rollout, estimates=[line])])["examples"]):
        (found,) = row["estimates"]
        assert found["logps"] == [-1.5 if yes else None for yes in scored[i].tolist()] and not found["per_token"]


def test_each_model_needs_a_completion_of_each_example():
    rollout = rollout_for_tests(dtype=torch.float32)
    data = page_data("", [traced(rollout), replace(traced(rollout), name="another")])
    assert [model["name"] for model in data["models"]] == ["a model", "another"]
    assert all(first == second for first, second in data["examples"])
    with pytest.raises(ValueError, match=r"models have \[5, 2\] completions"):
        page_data("", [traced(rollout), traced(rollout[:2])])
    with pytest.raises(ValueError, match="at least one"):
        page_data("", [traced(rollout[:0])])


def test_a_page_that_would_be_too_large_leaves_out_its_last_completions(tmp_path):
    data = page_data("", [traced(rollout_for_tests(dtype=torch.float32))])
    write_page(tmp_path / "all.html", data)
    size = (tmp_path / "all.html").stat().st_size
    assert write_page(tmp_path / "some.html", data, largest=size - 1) == 4
    assert (tmp_path / "some.html").stat().st_size < size
    page = read_page(tmp_path / "some.html")
    assert page["left_out"] == 1 and page["examples"] == json.loads(json.dumps(data["examples"][:4]))
    assert write_page(tmp_path / "one.html", data, largest=10) == 1, "one is always there"


def test_what_fits_onto_a_page_is_found_by_halving(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("trl_dllm.trace._embedded", lambda data: made.append(data) or "x" * len(data["examples"]))
    data = page_data("", [traced(rollout_for_tests(dtype=torch.float32))])
    write_page(tmp_path / "one.html", data, largest=10)
    empty = (tmp_path / "one.html").stat().st_size - 1
    made.clear()
    assert write_page(tmp_path / "some.html", {**data, "examples": data["examples"] * 100}, largest=empty + 123) == 123
    assert (tmp_path / "some.html").stat().st_size == empty + 123 and len(made) < 15
    assert made[-1]["left_out"] == 377


# ---------------------------------------------------------------------------------------------------------- its tokens


def word_level(words: list[str], **special) -> PreTrainedTokenizerFast:
    """A tokenizer of the tokens that are given, whatever they are."""
    named = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}
    vocabulary = {token: i for i, token in enumerate([*named.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = special.get("decoder", decoders.Fuse())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def test_tokens_keep_the_space_that_they_begin_with():
    pieces = word_level(["▁the", "re", "▁"], decoder=decoders.Metaspace())
    assert token_texts(pieces, [4, 5, 6]) == {4: " the", 5: "re", 6: " "}
    # Bytes of a character by themselves are no text: the token's own name is shown. An id of no token has a number.
    bytes_of = word_level(["Ġthe", "Ã", "©"], decoder=decoders.ByteLevel())
    assert token_texts(bytes_of, [4, 5, 5, 6, 99]) == {4: " the", 5: "Ã", 6: "©", 99: "<99>"}


def page_of(words: list[str], ids: list[int], layout=None, steps: list[int] | None = None, **more) -> dict:
    """A page of one completion that was revealed in two steps, from the right, or in those given (-1: never)."""
    tokens = torch.tensor([ids])
    taken = torch.tensor([steps or [1] * (len(ids) // 2) + [0] * (len(ids) - len(ids) // 2)])
    base = rollout_for_tests(dtype=torch.float32)[:1]
    rollout = replace(
        base,
        prompt_ids=tokens[:, :0],
        prompt_mask=tokens[:, :0].bool(),
        completion_ids=tokens,
        unmask_step=taken,
        logps=torch.zeros(tokens.shape),
        counted=(tokens != 3) & (taken >= 0),
        mask_token_id=1,
    )
    model = Traced("m", rollout, word_level(words), layout=layout, rows=[more] if layout else None)
    return page_data("", [model])


def test_cells_know_the_position_that_they_show():
    """A token may have several cells, or none; special ones have no text. The first position is not counted."""
    seen = []

    def layout(text, row):
        seen.append((text, row))
        return Grid(2, (0, 2, None, 4), ("1", None, None, None), (None, "3", "4", "5"), (1, 1))

    data = page_of(["12", "3", "45"], [3, 4, 2, 5, 6], layout, puzzle="p")
    assert seen == [("12345", {"puzzle": "p"})], "without what is special or not counted"
    assert data["examples"][0][0]["grid"] == {
        "columns": 2,
        "box": (1, 1),
        "cells": [
            {"at": 1, "text": "1", "given": "1", "expected": None},
            {"at": 3, "text": "3", "given": None, "expected": "3"},
            {"at": None, "text": None, "given": None, "expected": "4"},
            {"at": 4, "text": "5", "given": None, "expected": "5"},
        ],
    }
    assert page_of(["1"], [4, 4], lambda text, row: None, puzzle="p")["examples"][0][0]["grid"] is None


class Scripts(html.parser.HTMLParser):
    """What an HTML parser takes for elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


def test_hostile_tokens_stay_text(tmp_path):
    ids = list(range(4, 4 + len(HOSTILE)))
    data = page_of(HOSTILE, ids)
    data["models"][0]["name"] = data["title"] = "</title></script><script>alert(0)</script>"
    data["models"][0]["facts"] = {"<b>": ["</script>", "\ud800"]}
    write_page(tmp_path / "hostile.html", data)
    text = (tmp_path / "hostile.html").read_text()
    assert [read_page(tmp_path / "hostile.html")["models"][0]["vocab"][str(i)] for i in ids] == HOSTILE
    write_page(tmp_path / "tame.html", page_of(["a"], [4]))
    assert Scripts(text).tags == Scripts((tmp_path / "tame.html").read_text()).tags
    assert text.count("<script") == 2 and "http://" not in text and "https://" not in text


# -------------------------------------------------------------------------------------------------------- in a browser

# What is to be seen of a canvas: each position's text, or None where it is masked.
CANVAS = """[...document.querySelectorAll('.canvas .token')].map((node) =>
    getComputedStyle(node.firstChild).visibility === 'visible' ? node.firstChild.textContent : null)"""
BOXES = """[...document.querySelectorAll('.token, .grid td, .order li, .estimates tr, .bar button, #scale, h2, h3')]
    .map((node) => { const b = node.getBoundingClientRect(); return [b.x, b.y + scrollY, b.width, b.height]; })"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def silent(browser):
    """The browser, after which nothing was logged and nothing fetched but the page."""
    browser.events.clear()
    yield browser
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith("file:///")] == []
    assert {url.split("#")[0].rsplit(".", 1)[1] for url in browser.requests()} == {"html"}


@pytest.fixture
def sudoku(tmp_path, models):
    """A page of two models' boards, in blocks of 6, with estimates; its path, and the rollouts."""
    task = get_task("sudoku")
    rows = list(task.load("test", 2))
    ids = TOKENIZER([row["prompt"] for row in rows])["input_ids"]
    both = []
    for steps in (8, 6):
        rollout = sample(models("llada", torch.float32), ids, torch.tensor([3, 9]), diffusion_steps=steps)
        digits = torch.tensor(TOKENIZER.convert_tokens_to_ids(list("1234")))  # so that there is a board
        tokens = digits[rollout.completion_ids % 4].where(rollout.revealed, rollout.completion_ids)
        counted = rollout.revealed & (torch.arange(12) < torch.tensor([[12], [7]]))
        rollout = replace(rollout, completion_ids=tokens, counted=counted)
        estimates = estimate_all(models("llada", torch.float32), rollout, ExactTrajectory(), {"d1": MeanField()})
        rewards = [{"cells": -0.25}, {"cells": None}]
        more = {"layout": task.layout, "rows": rows, "rewards": rewards, "estimates": estimates}
        both.append(traced(rollout, block_length=6, **more))
    write_page(tmp_path / "page.html", page_data("Boards", both))
    return tmp_path / "page.html", [model.rollout for model in both], rows


def canvas_at(rollout, row: int, step: int) -> list[str | None]:
    """What a canvas shows once `step` steps were taken."""
    tokens = zip(rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist(), strict=True)
    return [TOKENIZER.convert_ids_to_tokens(token) if 0 <= taken < step else None for token, taken in tokens]


def test_the_slider_moves_the_canvas_step_by_step_and_nothing_else(silent, sudoku):
    path, rollouts, _ = sudoku
    silent.open(path)
    last = max(int(rollout.num_steps[0]) for rollout in rollouts)
    assert silent.run("[+slider.min, +slider.max, +slider.value]") == [0, last, last], "all is revealed at first"
    boxes = silent.run(BOXES)
    for step in [*range(last + 1), 3]:
        silent.run(f"slider.value = {step}; slider.dispatchEvent(new Event('input'))")
        assert silent.run(CANVAS) == [text for rollout in rollouts for text in canvas_at(rollout, 0, step)]
        assert silent.run("document.getElementById('step').textContent") == f"step {step} of {last}"
        new = silent.run("[...document.querySelectorAll('.token.new')].map((node) => +node.dataset.position)")
        assert new == [i for rollout in rollouts for i in (rollout.unmask_step[0] == step - 1).nonzero().flatten()]
        assert silent.run(BOXES) == boxes, "nothing moves"
    assert silent.run("slider.getAttribute('aria-valuetext')").startswith(f"step 3 of {last}, ")


def test_keys_buttons_and_the_address_choose_step_completion_and_colour(silent, sudoku):
    path, rollouts, _ = sudoku
    shown = "[state.example, state.step, state.colour, Boolean(state.timer)]"
    silent.open(path, "#completion=2&step=3&colour=probability")
    assert silent.run(shown) == [1, 3, "probability", False]
    assert silent.run(CANVAS) == [text for rollout in rollouts for text in canvas_at(rollout, 1, 3)]
    for key, expected in [
        ("ArrowRight", [1, 4, "probability", False]),
        ("ArrowLeft", [1, 3, "probability", False]),
        ("Home", [1, 0, "probability", False]),
        ("ArrowLeft", [1, 0, "probability", False]),
        ("c", [1, 0, "step", False]),
        (" ", [1, 1, "step", True]),
        (" ", [1, 1, "step", False]),
        ("p", [0, max(int(rollout.num_steps[0]) for rollout in rollouts), "step", False]),
        ("p", [0, max(int(rollout.num_steps[0]) for rollout in rollouts), "step", False]),
    ]:
        silent.press(key)
        assert silent.run(shown) == expected, key
    silent.run("slider.focus()")
    silent.press("ArrowLeft")
    assert silent.run("state.step") == max(int(rollout.num_steps[0]) for rollout in rollouts) - 1, "one step, not two"
    silent.run("document.getElementById('next').click()")
    assert silent.run("[state.example, which.value]") == [1, "1"]
    silent.run("document.querySelector('input[value=probability]').click()")
    assert silent.run("state.colour") == "probability"
    silent.run("document.querySelectorAll('.order button')[1].click()")
    assert silent.run("state.step") == 2
    unnamed = "[...document.querySelectorAll('button, input, select')].filter((node) =>"
    unnamed += " !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length)).length"
    assert silent.run(unnamed) == 0, "each control has a name"


def test_colours_numbers_blocks_cut_and_rewards(silent, sudoku):
    path, (rollout, _), _ = sudoku
    silent.open(path, "#completion=2&step=2")
    section = "document.querySelector('section')"
    assert silent.run(f"{section}.querySelector('.rewards').textContent") == "cells none"
    silent.open(path, "#completion=1")
    assert silent.run(f"{section}.querySelector('.rewards').textContent") == "cells −0.25"
    assert silent.run(f"{section}.querySelectorAll('.canvas .block').length") == 2
    assert silent.run(f"{section}.querySelectorAll('.canvas .cut').length") == 0
    colours = f"[...{section}.querySelectorAll('.token')].map((node) => getComputedStyle(node).backgroundColor)"
    labels = f"[...{section}.querySelectorAll('.token .sub')].map((node) => node.textContent)"
    steps, found = rollout.unmask_step[0].tolist(), silent.run(colours)
    pairs = {(step, colour) for step, colour in zip(steps, found, strict=True)}
    assert len(pairs) == len({step for step, _ in pairs}) == len({colour for _, colour in pairs}), "a colour a step"
    assert found[steps.index(0)] == "rgb(68, 1, 84)" and found[steps.index(max(steps))] == "rgb(253, 231, 37)"
    assert silent.run(labels) == [str(step + 1) for step in steps]
    silent.press("c")
    probabilities = rollout.logps[0].exp().tolist()
    assert silent.run(labels) == [f"{p:.2f}" for p in probabilities]
    alphas = [float(colour[:-1].split(",")[-1]) for colour in silent.run(colours)]
    assert alphas == pytest.approx([0.85 * (1 - p) for p in probabilities], abs=5e-3)

    silent.open(path, "#completion=2")
    assert silent.run(f"{section}.querySelector('.canvas .cut').textContent").startswith("✂ cut at EOS; 5 revealed")
    around = f"[...{section}.querySelector('.canvas').children].map((n) => n.dataset.position ?? n.className)"
    assert silent.run(around)[:10] == ["block", *"012345", "block", "6", "cut"]
    assert silent.run(f"{section}.querySelectorAll('.token.outside').length") == 5


def test_the_grid_shows_the_order_and_tells_what_was_given(silent, sudoku):
    path, (rollout, _), rows = sudoku
    silent.open(path, "#completion=1&step=3")
    cells = """[...document.querySelectorAll('section:first-child .grid td')].map((node) => [
        getComputedStyle(node.firstChild).visibility === 'visible' ? node.firstChild.textContent : null,
        node.children[1].textContent, node.classList.contains('given'),
        node.children[2] ? getComputedStyle(node.children[2]).visibility === 'visible' : null])"""
    found, steps = silent.run(cells), rollout.unmask_step[0].tolist()
    drawn = TOKENIZER.convert_ids_to_tokens(rollout.completion_ids[0].tolist())
    assert len(found) == 16
    for n, (text, step, given, flag) in enumerate(found):
        clue = rows[0]["puzzle"][n]
        assert given is (clue != "0")
        if n >= len(drawn):  # a board that is too short
            assert (text, step, flag) == (clue if given else None, "", None)
            continue
        assert step == str(steps[n] + 1), "also of those that are still masked"
        assert text == (clue if given else drawn[n] if steps[n] < 3 else None)
        wrong = drawn[n] != rows[0]["solution"][n]
        assert flag == ((steps[n] < 3) if wrong else None)


def test_estimates_show_gaps_and_numbers_appear_under_the_pointer(silent, sudoku):
    path, (rollout, _), _ = sudoku
    silent.open(path, "#completion=1")
    data = read_page(path)["examples"][0][0]
    exact, mean = (torch.tensor(line["logps"]).double() for line in data["estimates"])
    table = "document.querySelector('section .estimates')"
    rows = silent.run(f"[...{table}.rows].slice(1).map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert [row[0] for row in rows] == ["exact", "d1"] and [row[1] for row in rows] == ["8", "1"]
    assert [float(row[2].replace("−", "-")) for row in rows] == pytest.approx(
        [exact.mean().item(), mean.mean().item()], abs=6e-4
    )
    shown = [float(value.replace("−", "-")) for value in rows[1][3:]]
    gaps = exact - mean
    assert shown == pytest.approx([gaps.mean().item(), *gaps.tolist()], abs=5.1e-3)
    silent.point("section .canvas .token:nth-child(3)")
    token = TOKENIZER.convert_ids_to_tokens(int(rollout.completion_ids[0, 1]))
    text = silent.run("tip.hidden ? null : tip.textContent")
    assert f"“{token}”" in text and "position 2, block 1" in text
    assert f"revealed in step {int(rollout.unmask_step[0, 1]) + 1} of 8" in text
    silent.run("document.querySelector('section .estimates').scrollIntoView({ block: 'center' })")
    silent.point("section .estimates tbody tr:nth-child(2) td:nth-child(5)")
    text = silent.run("tip.textContent").replace("−", "-")
    assert f"exact {exact[0]:.4f}" in text and f"gap {gaps[0]:.4f}" in text


def test_positions_that_were_never_revealed_stay_masked_and_the_rest_is_drawn(silent, tmp_path):
    """A row that stopped at its EOS: `silent` sees that nothing fails behind it."""
    data = page_of(["a", "b", "c"], [4, 5, 6, 1, 1], steps=[0, 2, 1, -1, -1])
    write_page(tmp_path / "page.html", data)
    silent.open(tmp_path / "page.html", "#step=2")
    assert silent.run(CANVAS) == ["a", None, "c", None, None]
    painted = "[...document.querySelectorAll('.canvas .token')].map((node) => node.style.backgroundColor !== '')"
    assert silent.run(painted) == [True, True, True, False, False]
    assert silent.run("document.querySelector('#scale i').style.background").startswith("linear-gradient"), "the end"


def test_hostile_tokens_are_seen_and_do_nothing(silent, tmp_path):
    ids = list(range(4, 4 + len(HOSTILE)))
    data = page_of(HOSTILE, ids)
    data["models"][0]["name"] = data["title"] = "</title></script><script>alert(0)</script>"
    data["models"][0]["facts"] = {"<b>": ["</script>"]}
    write_page(tmp_path / "hostile.html", data)
    silent.open(tmp_path / "hostile.html")
    assert silent.run("document.title") == data["title"]
    assert not [event for event in silent.events if event["method"] == "Page.javascriptDialogOpening"]
    assert silent.run("[document.scripts.length, document.images.length, document.querySelectorAll('b').length]") == [
        2,
        0,
        0,
    ]
    seen = silent.run(CANVAS)
    assert seen[:8] == [text.replace(" ", "·") for text in HOSTILE[:8]]
    assert seen[8:16] == [
        "↵",
        "⇥",
        "·two··spaces·",
        "U+0000U+0007U+001B[31m",
        "U+2028U+2029",
        "U+202Egnp.exe",
        "U+200B",
        "U+FEFF",
    ]
    assert seen[16:] == [*HOSTILE[16:20], "';·DROP·TABLE", HOSTILE[21]]
    width = silent.run("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "a long token makes the page no wider"
