"""The report: what is recorded of tokens is what happened, the page holds all it needs, and nothing
that a model wrote runs in it."""

import html
import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from statistics import fmean

import pytest
import tiny_qwen3
import torch
import yaml
from browser import Browser, find_chromium
from training_runs import contents, metrics, run, shrunk

from opsd_train.data import join
from opsd_train.opsd import score
from opsd_train.report import as_data, write_report
from opsd_train.report.__main__ import main
from opsd_train.run import recording
from opsd_train.run.recording import observe_tokens
from opsd_train.sampling import roll_out

# What is recorded


def tokens_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "tokens.jsonl").read_text().splitlines()]


def record_every_4() -> None:
    recording.EVERY = 4


def test_recorded_tokens_are_those_of_the_metrics(folder, tmp_path):
    """The means over a whole batch's rollouts are what metrics.jsonl says of the step."""
    output = tmp_path / "run"
    options = ["--beta", 0, "--entry-clip", 1e-3, "--record-rollouts", 9]
    run(tmp_path / "log", *shrunk(folder, output, *options), before=record_every_4)
    rows = tokens_of(output)
    assert [row["step"] for row in rows] == [1] * 4 + [4] * 4 + [6] * 4
    completions = [json.loads(x) for x in (output / "completions.jsonl").read_text().splitlines()]
    by_step = {m["step"]: m for m in metrics(output)}
    for step in (1, 4, 6):
        mine = [row for row in rows if row["step"] == step]
        for name in ("loss", "forward_kl", "reverse_kl", "clipped_share", "entropy_student"):
            mean = fmean(fmean(row[name]) for row in mine)
            assert mean == pytest.approx(by_step[step][name], rel=2e-3, abs=1e-6), name
        texts = [c["completion"] for c in completions if c["step"] == step]
        assert ["".join(row["tokens"]) for row in mine] == texts
    assert by_step[1]["clipped_share"] > 0
    for row in rows:
        assert row["length"] == len(row["tokens"])
        for name in ("loss", "logp_student", "logp_teacher", "student", "teacher"):
            assert len(row[name]) == row["length"]
        # The sampled token is among the choices with the probability that it was sampled with.
        for side in ("student", "teacher"):
            for text, log_p, choices in zip(
                row["tokens"], row[f"logp_{side}"], row[side], strict=True
            ):
                texts, log_ps = choices[::2], choices[1::2]
                assert log_ps == sorted(log_ps, reverse=True)
                assert len(texts) == 5
                if text in texts:
                    assert log_ps[texts.index(text)] == pytest.approx(log_p, rel=2e-3)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Phi"])
def test_choices_are_the_models_own(tmp_path, family, monkeypatch):
    """Of the student with its adapter, at the temperature of the loss, head and all."""
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", family=family)
    tiny_qwen3.save_problems(tmp_path / "problems.jsonl", 4)
    options = tiny_qwen3.adapter_options(family) | {"temperature": 0.7}
    setup = tiny_qwen3.with_adapter(tiny_qwen3.prepared(tmp_path, **options))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:2], [1, 2])
    scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    monkeypatch.setattr("opsd_train.run.recording.MAX_TOKENS", 3)
    statistics, choices = observe_tokens(setup, scores, row=1)
    ids, mask, predicts = join(rollout.prompts[1:], rollout.completions[1:], 0)
    with torch.no_grad():
        z = setup.model(input_ids=ids, attention_mask=mask).logits[predicts][:3]
    top = torch.log_softmax(z / 0.7, dim=-1).topk(5)
    seen = torch.tensor(choices["student"])
    assert seen[..., 0].tolist() == top.indices.tolist()
    torch.testing.assert_close(seen[..., 1], top.values, atol=1e-4, rtol=0)
    assert choices["teacher"] != choices["student"]
    assert all(len(values) == 3 for values in statistics.values())


def test_recording_changes_nothing(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    said = run(tmp_path / "log", *shrunk(folder, output, "--record-rollouts", 0))
    assert f"Report: {output / 'report.html'}" in said
    assert not (output / "tokens.jsonl").exists()
    (output / "tokens.jsonl").write_text((undisturbed / "tokens.jsonl").read_text())
    assert contents(output) == contents(undisturbed)
    steps = [row["step"] for row in tokens_of(undisturbed)]
    assert steps == [1, 1, 6, 6]


# The page

HOSTILE = [
    "</script><script>document.title = 'run'</script>",
    "<img src=ADDRESS/image onerror=\"document.title = 'run'\">",
    "<!--<script>",
    "]]></script><svg onload=fetch('ADDRESS/svg')>",
    "<style>@import url(ADDRESS/style)</style><link rel=stylesheet href=ADDRESS/link>",
    "<iframe src=ADDRESS/frame></iframe><base href=ADDRESS>",
    "<!-- data --><!-- script -->",
    "\u2028\u2029\u0000\ud800 &lt;b&gt; {{constructor}} ${1} __proto__",
]


def hostile_run(folder: Path, address: str = "http://127.0.0.1:9") -> Path:
    """The folder of a run that a model, a data set and a config have written their worst into."""
    folder.mkdir(parents=True)
    texts = [text.replace("ADDRESS", address) for text in HOSTILE]
    n = len(texts)
    values = [0.1 * i for i in range(n - 1)]
    row = {
        **{"step": 1, "prompt": texts[0], "reference": texts[1], "length": n, "finished": True},
        "tokens": texts,
        **{
            name: [*values, None]
            for name in (
                *("loss", "forward_kl", "reverse_kl", "entropy_student", "entropy_teacher"),
                *("clipped_share", "logp_student", "logp_teacher"),
            )
        },
        "student": [[texts[0], -0.1, texts[1], -2]] * n,
        "teacher": [[texts[2], -0.1, texts[3], None]] * n,
    }
    (folder / "tokens.jsonl").write_text(json.dumps(row) + "\n")
    step = {"step": 1, "loss": 0.5, texts[1]: 1, "seconds": {texts[1]: 1.0}}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    config = {"model": texts[0], "data": texts[1], "student_template": texts[4], texts[1]: texts[2]}
    (folder / "config.yaml").write_text(f"# {texts[1]}\n" + yaml.safe_dump(config))
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    model = {"scores": {texts[1]: score}, "problems": 1, "samples": 1}
    model |= {"tokens": 1, "truncated": 0, "no_answer": 0}
    (folder / "evaluation").mkdir()
    scores = {texts[1]: {"models": {texts[0]: model}}}
    (folder / "evaluation" / "scores.json").write_text(json.dumps(scores))
    return folder


def data_of(page: Path) -> dict:
    found = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert len(found) == 1
    return json.loads(found[0])


def test_a_run_ends_with_its_report(undisturbed):
    page = undisturbed / "report.html"
    (shown,) = data_of(page)["runs"]
    assert shown["name"] == "run"
    assert shown["divergence"] == "JSD(β=0.5 on the teacher)"
    assert shown["rollouts"] == tokens_of(undisturbed)
    assert [m["step"] for m in shown["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert {"model", "steps", "learning_rate"} <= set(shown["changed"])
    assert "beta" not in shown["changed"]
    text = page.read_text()
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in text
    assert len(re.findall("<script", text)) == 2
    assert "innerHTML" not in text


def test_hostile_text_stays_in_its_block(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    page = tmp_path / "report.html"
    write_report([hostile_run(tmp_path / name)], page)
    text = page.read_text()
    assert len(re.findall("<script", text)) == 2
    assert "<img" not in text
    assert f"<title>{html.escape(name)}</title>" in text
    (shown,) = data_of(page)["runs"]
    assert shown["rollouts"][0]["tokens"][:7] == [
        t.replace("ADDRESS", "http://127.0.0.1:9") for t in HOSTILE[:7]
    ]
    assert json.loads(as_data(HOSTILE)) == HOSTILE
    assert as_data("é").isascii()


def test_the_policy_names_the_script_that_is_there(undisturbed):
    import base64
    import hashlib

    text = (undisturbed / "report.html").read_text()
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in text


def test_several_runs(undisturbed, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(undisturbed, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("beta: 0.5", "beta: 0.0"))
    monkeypatch.chdir(tmp_path)
    main([str(undisturbed), str(other)])
    assert capsys.readouterr().out == "report.html\n"
    shown = data_of(tmp_path / "report.html")["runs"]
    assert [r["name"] for r in shown] == ["run", "other"]
    assert [r["config"]["beta"] for r in shown] == [0.5, 0.0]
    # Two of one name go by their paths.
    main([str(undisturbed), str(undisturbed), "--output", "two.html"])
    assert data_of(tmp_path / "two.html")["runs"][0]["name"] == str(undisturbed.resolve())


def test_a_run_under_way_or_broken(undisturbed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"is no run folder: it has no config\.yaml"):
        main([str(folder)])
    shutil.copy(undisturbed / "config.yaml", folder)
    main([str(folder)])  # before its first step
    assert data_of(folder / "report.html")["runs"][0]["metrics"] == []
    lines = (undisturbed / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[:-20])  # cut by a kill
    main([str(folder)])
    assert len(data_of(folder / "report.html")["runs"][0]["metrics"]) == 5
    (folder / "metrics.jsonl").write_text("{\n" + lines)
    with pytest.raises(SystemExit, match=r"metrics\.jsonl, line 1: not JSON .*; remove the line"):
        main([str(folder)])


def test_a_long_run_makes_no_longer_page(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    row = tokens_of(undisturbed)[0]
    rows = [row | {"step": step} for step in range(10, 2001, 10) for _ in range(2)]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(folder)])
    steps = [r["step"] for r in data_of(folder / "report.html")["runs"][0]["rollouts"]]
    assert len(steps) == 24
    assert steps == sorted(steps)
    assert {10, 2000} <= set(steps)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("needs chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    def open_page(page: Path) -> Browser:
        browser.requests.clear()
        browser.errors.clear()
        browser.open(page)
        return browser

    return open_page


@pytest.fixture
def server():
    """Its address, and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_hostile_text_does_nothing_in_a_browser(open_page, tmp_path, server):
    address, asked = server
    page = tmp_path / "report.html"
    write_report([hostile_run(tmp_path / "name", address)], page)
    browser = open_page(page)
    for i in range(len(HOSTILE)):  # each token's details
        browser.run(f"pointAt({i})")
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.run("document.getElementById('different').click()")
    shown = browser.run("document.getElementById('tokens').innerText")
    elements = "img, iframe, base, link:not([rel=icon]), main script, main style"
    assert browser.run(f"document.querySelectorAll('{elements}').length") == 0
    assert browser.run("document.title") == "name"
    assert asked == []
    assert browser.requests == [page.as_uri()]
    assert browser.errors == []
    for text in HOSTILE[:7]:
        assert text.replace("ADDRESS", address) in shown


def test_a_script_that_got_in_would_not_run(open_page, undisturbed, tmp_path, server):
    """The policy, should the escaping fail."""
    address, asked = server
    text = (undisturbed / "report.html").read_text()
    inserted = f"<script>document.title = 'taken'</script><img src={address}/x>"
    page = tmp_path / "report.html"
    page.write_text(text.replace("<main>", f"<main>{inserted}"))
    browser = open_page(page)
    assert browser.run("document.title") == "run"
    assert len([e for e in browser.errors if "Content Security Policy" in e]) >= 2
    assert asked == []


def test_it_is_read_with_the_keyboard(open_page, undisturbed):
    browser = open_page(undisturbed / "report.html")
    assert browser.errors == []
    at = "document.activeElement.id"
    visited = []
    for _ in range(40):
        browser.press("Tab")
        visited.append(browser.run(at))
        if visited[-1] == "tokens":
            break
    assert [v for v in visited if v] == ["log", "sample", "next", "colour", "largest", "tokens"]
    heading = "document.querySelector('#detail h3').textContent"
    assert browser.run(heading).startswith("Token 0: ")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.run(heading).startswith("Token 2: ")
    assert browser.run("document.querySelectorAll('[aria-selected=true]').length") == 1
    browser.press("End", "ArrowLeft")
    last = len(tokens_of(undisturbed)[0]["tokens"]) - 1
    assert browser.run(heading).startswith(f"Token {last - 1}: ")
    # A panel, step by step.
    browser.run("document.querySelector('#panels svg[tabindex]').focus()")
    browser.press("Home")
    reading = "document.querySelector('#panels .reading').textContent"
    loss = metrics(undisturbed)[0]["loss"]
    assert browser.run(reading) == f"step 1: {loss:.4g}"
    browser.press("ArrowRight")
    assert browser.run(reading).startswith("step 2: ")


def test_what_it_shows_of_a_token(open_page, undisturbed):
    browser = open_page(undisturbed / "report.html")
    row = tokens_of(undisturbed)[0]
    detail = browser.run("document.getElementById('detail').innerText")
    assert f"Divergence\t{row['loss'][0]:g}" in detail
    assert f"{100 * math.exp(row['logp_student'][0]):.1f}%" in detail
    assert f"{100 * math.exp(row['teacher'][0][1]):.1f}%" in detail
    # The most coloured token is the one with the largest divergence, and is coloured most.
    alpha = "Number(getComputedStyle(current.spans[{}]).backgroundColor.split(',')[3].slice(0, -1))"
    largest = row["loss"].index(max(row["loss"]))
    browser.run("document.getElementById('largest').click()")
    assert browser.run("current.at") == largest
    alphas = [browser.run(alpha.format(i)) for i in range(len(row["loss"]))]
    assert max(alphas) == pytest.approx(0.85, abs=0.01)
    assert alphas[largest] == max(alphas)
    browser.run("document.getElementById('next').click()")
    text = browser.run("document.getElementById('tokens').innerText")
    assert text.replace("↵\n", "\n").replace("∅", "") == "".join(
        tokens_of(undisturbed)[1]["tokens"]
    )


def test_a_teacher_on_servers_has_fewer_figures(open_page, undisturbed, tmp_path):
    """Alone, and beside a run that has all."""
    whole = ("forward_kl", "reverse_kl", "entropy_teacher", "clipped_share", "logp_teacher")
    masses = {"mass_student": 0.7, "mass_teacher": 0.9}
    folder = tmp_path / "servers"
    shutil.copytree(undisturbed, folder)
    for name in ("metrics", "tokens"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            of_row = {
                k: [v] * len(row["loss"]) if name == "tokens" else v for k, v in masses.items()
            }
            row |= of_row
            for absent in whole:
                row.pop(absent, None)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "report.html"
    for folders in ([folder], [undisturbed, folder]):
        write_report(folders, page)
        browser = open_page(page)
        for index in range(browser.run("document.getElementById('sample').length")):
            browser.run(f"showRollout({index})")
        assert browser.errors == []
        assert "Mass of the tokens" in browser.run("document.getElementById('panels').innerText")
        detail = browser.run("document.getElementById('detail').innerText")
        assert ("Student's mass on the tokens sent\t0.7" in detail) == (len(folders) == 1)
        assert "Sampled token, to the student" in detail
        assert "Sampled token, to the teacher" not in detail


def luminance(colour: str) -> float:
    r, g, b = (int(x) / 255 for x in re.findall(r"\d+", colour)[:3])
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (r, g, b)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(open_page, undisturbed, theme):
    """Contrast as WCAG AA wants it of text."""
    browser = open_page(undisturbed / "report.html")
    browser.set_theme(theme)
    ground = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.1) == (theme == "dark")
    for selector in ("body", ".hint", "header p", "a", "td.other", "#detail"):
        colour = browser.run(f"getComputedStyle(document.querySelector('{selector}')).color")
        lighter, darker = sorted([luminance(colour), ground], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


def test_runs_side_by_side_in_a_browser(open_page, undisturbed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(undisturbed, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("beta: 0.5", "beta: 0.0"))
    page = tmp_path / "report.html"
    write_report([undisturbed, other], page)
    browser = open_page(page)
    assert browser.errors == []
    options = browser.run("document.getElementById('config-table').innerText")
    assert "beta\t0.5\t0" in options
    assert "temperature" not in options
    browser.run("document.getElementById('different').click()")
    options = browser.run("document.getElementById('config-table').innerText")
    assert "temperature\t1.2\t1.2" in options
    lines = "document.querySelector('#panels figure').querySelectorAll('.series').length"
    assert browser.run(lines) == 2
    assert browser.run("document.getElementById('sample').length") == 8
    browser.run("document.getElementById('log').click()")
    assert browser.errors == []
