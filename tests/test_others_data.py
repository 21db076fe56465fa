"""Data files and tokenizers as other people make them: read, or refused by name."""

import json
import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
from tiny_qwen3 import config
from tokenizers.processors import TemplateProcessing

from opsd_train.data import Context, Contexts, join, left_pad, load_problems, those_that_fit
from opsd_train.grading import load_benchmark
from opsd_train.models import load_tokenizer
from opsd_train.records import Problem

ROWS = [{"problem": "1+1?", "solution": "2"}, {"problem": 'Größe, "m"\n?', "solution": "3"}]
READ = [Problem(row["problem"], row["solution"]) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'problem,solution\n1+1?,2\n"Größe, ""m""\n?",3\n'


def load(tmp_path, name, contents, **options):
    path = tmp_path / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return load_problems(config(tmp_path, data=str(path), **options))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.rstrip("\n")),
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", "\n \n" + LINES.replace("\n", "\n\n")),
        ("a.JSONL", LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("a.json", LINES),  # as many call them
        ("a.csv", CSV),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", 'solution,problem\n\n2,1+1?\n3,"Größe, ""m""\n?"\n'),
        ("a.tsv", CSV.replace(",", "\t").replace("Größe\t", "Größe,")),
    ],
)
def test_files_that_are_read(tmp_path, name, contents):
    assert load(tmp_path, name, contents) == READ


def test_lines_that_end_as_windows_has_them(tmp_path):
    problems = load(tmp_path, "a.csv", CSV.split('"')[0].replace("\n", "\r\n"))
    assert problems == READ[:1]
    assert problems[0].place.endswith("a.csv, line 2")


def test_several_files(tmp_path):
    for name in ("a.jsonl", "b, c.jsonl"):
        (tmp_path / name).write_text(LINES)
    (tmp_path / "d.csv").write_text(CSV)
    one, comma, two = (str(tmp_path / name) for name in ("a.jsonl", "b, c.jsonl", "d.csv"))
    for data in (f"{one}, {two}", [one, two]):
        assert load_problems(config(tmp_path, data=data)) == READ + READ
    assert load_problems(config(tmp_path, data=comma)) == READ
    with pytest.raises(OSError, match=r"z\.jsonl"):
        load_problems(config(tmp_path, data=[one, str(tmp_path / "z.jsonl")]))


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", "", "has no row"),
        ("a.json", "", "has no row"),
        ("a.json", "[]", "has no row"),
        ("a.csv", "", "has no row"),
        ("a.csv", "problem,solution\n", "has no row"),
        ("a.jsonl", LINES.encode("latin-1"), "line 2: not UTF-8 (byte 0xf6 at 15); convert the fi"),
        ("a.jsonl", LINES.encode("utf-16"), "a.jsonl: not UTF-8"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("latin-1"), "iconv -f ISO-8859-1"),
        ("a.csv", CSV.encode("latin-1"), "a.csv: not UTF-8"),
        ("a.csv", CSV.encode("utf-16"), "iconv -f UTF-16"),
        ("a.jsonl", LINES.replace("}\n{", "},\n{"), "line 1: not JSON (Extra data"),
        ("a.json", json.dumps(ROWS)[:-1] + ",]", "a.json: not JSON"),
        ("a.json", '{"data": [\n]}', "must hold a list of objects, got dict with keys data"),
        ("a.json", "[1]", "object 1: must be an object, got int"),
        ("a.jsonl", LINES + '{"problem": "x", "problem": "y", "solution": "z"}', "key problem is"),
        ("a.json", '[{"problem": "x", "problem": "y", "solution": "z"}]', "object 1: key problem"),
        ("a.jsonl", '{"problem": "x", "solution": 42}', "column solution must hold text"),
        ("a.jsonl", '{"problem": {"text": "x"}, "solution": "y"}', "column problem must hold text"),
        ("a.jsonl", r'{"problem": "x \ud800", "solution": "y"}', "is no text that UTF-8 can hold"),
        ("a.jsonl", '{"problems": "x", "solution": "y"}', "no column problem; it has problems, s"),
        ("a.jsonl", '{"problems": "x", "solution": "y"}', "did you mean problems?"),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.csv", "problem,solution\nx,y,z\n", "line 2: has 3 cells, and the first line 2"),
        ("a.csv", "problem,problem\nx,y\n", "line 1: column problem is there twice"),
        ("a.csv", 'problem,solution\nx,"y\n', "line 2: not csv: unexpected end of data"),
        ("a.csv", "problem;solution\nx;y\n", "no column problem; it has problem;solution"),
        ("a.txt", LINES, "a.txt must be one of .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.jsonl.gz", LINES, "must be one of"),
    ],
)
def test_files_that_are_refused(tmp_path, name, contents, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(tmp_path, name, contents)
    assert name in str(error.value)


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        load_problems(config(tmp_path, data=str(tmp_path / "empty")))


def test_all_bad_rows_at_once_or_without_them(tmp_path):
    bad = ["{", '{"problem": "x"}', '{"problem": null, "solution": "y"}', '{"problem": "x",}', "3"]
    lines = LINES + "\n".join(bad * 3) + "\n" + LINES
    with pytest.raises(ValueError, match="15 of 19 rows cannot be used:") as error:
        load(tmp_path, "a.jsonl", lines)
    message = str(error.value)
    for number in range(3, 13):
        assert f"a.jsonl, line {number}: " in message
    assert "line 13" not in message
    assert "and 5 more" in message
    assert "--skip-bad-rows" in message
    said = []
    asked = config(tmp_path, data=str(tmp_path / "a.jsonl"), skip_bad_rows=True)
    assert load_problems(asked, said.append) == READ + READ
    assert said == ["Left out: " + message.partition("\nCorrect")[0]]
    answers = {"problem_column": "problem", "answer_column": "solution"}
    with pytest.raises(ValueError, match="15 of 19 rows"):
        load_benchmark(str(tmp_path / "a.jsonl"), **answers)
    kept = load_benchmark(str(tmp_path / "a.jsonl"), skip_bad_rows=True, **answers)
    assert len(kept) == 4


def test_where_of_a_table_whose_cells_are_text(tmp_path):
    lines = "problem,solution,level,ok\n1+1?,2,5,True\nx,y,4,False\n"
    for where in ({"level": 5}, {"level": [5, 6]}, {"ok": True}, {"level": "5"}):
        assert load(tmp_path, "a.csv", lines, where=where) == READ[:1]
    with pytest.raises(ValueError, match="has no row with where"):
        load(tmp_path, "a.csv", lines, where={"level": 50})


@pytest.mark.parametrize("answer", ["NaN", "null", "true", '" "', "[]", "Infinity"])
def test_what_is_no_answer(tmp_path, answer):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"problem": "x", "answer": {answer}}}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1: column answer must hold text or a num"
    ):
        load_benchmark(str(path))


def test_a_column_that_no_row_has_is_named_once(tmp_path):
    with pytest.raises(ValueError, match="no column answer") as error:
        load(tmp_path, "a.jsonl", LINES * 50, solution_column="answer", skip_bad_rows=True)
    assert str(error.value).count("no column answer; it has problem, solution") == 1
    assert "in all 100 rows" in str(error.value)


def test_a_split_of_a_file(tmp_path):
    with pytest.raises(ValueError, match="split has an effect only on data sets"):
        load(tmp_path, "a.jsonl", LINES, split="test")


# Tokenizers

P = Problem("2+2?", "4")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_qwen3.save_tokenizer(path, None)
    return path


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


def put(tokenizer, single):
    """Special tokens around every text: $A."""
    ids = [
        (t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>", "<think>")
    ]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "prompt"),
    [
        ("$A <|im_end|>", "2+2?"),
        ("<|im_start|> $A", "<|im_start|>2+2?"),
        ("<|im_start|> <think> $A <|im_end|>", "<|im_start|><think>2+2?"),
        ("$A", "2+2?"),
    ],
)
def test_a_tokenizer_that_closes_every_text(tokenizer, single, prompt):
    """Its opening is kept, what is behind the text is not; a chat template writes both itself."""
    put(tokenizer, single)
    (ids,) = Context(tokenizer, "{problem}").token_ids([P])
    assert tokenizer.decode(ids) == prompt
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }} A:"
    (ids,) = Context(tokenizer, "{problem}").token_ids([P])
    assert tokenizer.decode(ids) == "<|im_start|>2+2? A:"


def test_an_opening_is_not_doubled(tokenizer):
    put(tokenizer, "<|im_start|> $A <|im_end|>")
    (ids,) = Context(tokenizer, "<|im_start|>{problem}").token_ids([P])
    assert tokenizer.decode(ids) == "<|im_start|>2+2?"
    assert Context(tokenizer, "{problem}").token_ids([]) == []


TURN = "{% for m in messages %}{{ m.content }}|{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ({"default": TURN, "tool_use": "no"}, "Q: 2+2? \n|"),
        ("sys: be brief|{% for m in messages %}{{ m.content }}|{% endfor %}", None),
        (TURN.replace("m.content", "m.content | trim"), "Q: 2+2?|"),
        (TURN.replace("m.content", "m.content | lower"), ValueError("changes it: of 'Q: 2+2?")),
        (TURN.replace("m.content", "m.content | replace(' ', '')"), ValueError("changes it")),
        ("hello", ValueError("leaves out a text of a template")),
        ("", ValueError("leaves out a text of a template")),
        ("{{ raise_exception('no users') }}", ValueError("fails on a template: no users")),
        ("{% for %}", ValueError("chat template fails")),
        ("{{ messages[3].content }}", ValueError("chat template fails")),
        ("{{ messages[0].content + 1 }}", ValueError("chat template fails")),
        ("{{ messages[0].content }}<|im_end|>\n", ValueError("must not end in the end token")),
        ("{{ strftime_now('%d %b %Y') }}: " + TURN, "26 Jul 2024: Q: 2+2? \n|"),
        ({"rag": TURN, "tools": TURN}, ValueError("named rag, tools, and none named default")),
    ],
)
def test_chat_templates(tokenizer, template, text):
    tokenizer.chat_template = template
    if isinstance(text, ValueError):
        with pytest.raises(ValueError, match=re.escape(str(text))):
            Context(tokenizer, "Q: {problem} \n").text(P)
    else:
        made = Context(tokenizer, "Q: {problem} \n").text(P)
        assert made == (text or "sys: be brief|Q: 2+2? \n|")


def test_thinking_is_looked_for_in_the_template_that_is_used(tokenizer):
    tokenizer.chat_template = {"default": tiny_qwen3.CHAT_TEMPLATE, "other": TURN}
    assert "<think>" in Context(tokenizer, "{problem}", thinking=False).text(P)
    tokenizer.chat_template = {"default": TURN, "enable_thinking": tiny_qwen3.CHAT_TEMPLATE}
    with pytest.raises(ValueError, match="has no such switch"):
        Context(tokenizer, "{problem}", thinking=False)


def test_a_template_that_ends_in_the_end_token(tokenizer):
    with pytest.raises(ValueError, match="a template makes it so"):
        Context(tokenizer, "{problem}<|im_end|>").text(P)


def test_neither_pad_nor_end_token(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = None
    contexts = Contexts(Context(tokenizer, "{problem}"), Context(tokenizer, "{problem}{solution}"))
    assert those_that_fit([P], contexts, 5) == [P]
    ids, mask = left_pad([[5, 6], [7]], tokenizer.pad_token_id)
    assert (ids * mask).tolist() == [[5, 6], [0, 7]]
    ids, mask, predicts = join([[5, 6], [7]], [[8], [9, 9]], tokenizer.pad_token_id)
    assert ids[predicts].tolist() == [6, 7, 9]
    assert mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
