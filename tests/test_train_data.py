"""From a data set on the disk to prompts as token ids; what is refused on the way."""

import json

import datasets
import pytest
import tiny_qwen3
from tiny_qwen3 import config, prepared

from opsd_train.data import Context, Contexts, join, load_problems, pack
from opsd_train.models import load_tokenizer
from opsd_train.records import Problem

# Data


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_and_parquet_give_the_same_problems(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"problem": f"p{i}", "solution": f"s{i}", "level": i % 3} for i in range(9)]
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    parquet = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    for data in (jsonl, parquet):
        every = load_problems(config(folder, data=data))
        assert every == [Problem(f"p{i}", f"s{i}") for i in range(9)]
        some = load_problems(config(folder, data=data, where={"level": [0, 2]}, max_problems=3))
        assert [p.question for p in some] == ["p0", "p2", "p3"]


def test_a_data_set_by_name(folder, tmp_path, monkeypatch):
    """A folder is read as a data set on the hub is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "named").mkdir()
    for split in ("train", "test"):
        rows = [{"problem": f"{split} {i}", "solution": "s"} for i in range(3)]
        write_rows(tmp_path / "named" / f"{split}.jsonl", rows)
    problems = load_problems(config(folder, data=str(tmp_path / "named"), split="test"))
    assert [p.question for p in problems] == ["test 0", "test 1", "test 2"]
    with pytest.raises(OSError, match="no-such-set"):
        load_problems(config(folder, data=str(tmp_path / "no-such-set")))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"torn.parquet cannot be read"):
        load_problems(config(folder, data=str(tmp_path / "torn.parquet")))


def test_columns_and_chat_messages(folder, tmp_path):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    rows = [{"question": "2+2?", "answer": "4", "messages": chat}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    columns = {"problem_column": "question", "solution_column": "answer"}
    assert load_problems(config(folder, data=data, **columns)) == [Problem("2+2?", "4")]
    columns = {"problem_column": "messages", "solution_column": "messages"}
    assert load_problems(config(folder, data=data, **columns)) == [Problem("1+1?", "2")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "x"', "line 2: not JSON"),
        ("[1]", "line 2: must be an object, got list"),
        ('{"problem": "x"}', "line 2: no column solution; it has problem. Set solution_column"),
        ('{"problem": null, "solution": "s"}', "line 2: column problem must hold text"),
        (
            '{"problem": "x", "solution": " "}',
            "Correct or remove these rows, or go on without them",
        ),
        ('{"problem": [{"role": "assistant"}], "solution": "s"}', "one of the user"),
    ],
)
def test_a_malformed_row_is_named(folder, tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "x", "solution": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2") as error:
        load_problems(config(folder, data=str(path)))
    assert message in str(error.value)


def test_no_row_left(folder):
    with pytest.raises(ValueError, match="no column level"):
        load_problems(config(folder, where={"level": 1}))
    with pytest.raises(ValueError, match="no row with where="):
        load_problems(config(folder, where={"problem": "no such problem"}))


def test_a_long_problem_is_dropped_whole(folder):
    problems = load_problems(config(folder))
    assert len(problems) == 20
    kept = prepared(folder).problems
    assert kept == [p for p in problems if len(p.question) < 100]
    assert len(kept) == 19
    with pytest.raises(ValueError, match="all 20 problems exceed max_prompt_tokens=9"):
        prepared(folder, max_prompt_tokens=9)


# Prompts

PROBLEM = Problem("What is {solution} in \\boxed{}?", "{problem} is 4")


def test_prompts_through_the_chat_template(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    plain = Context(tokenizer, "Q: {problem} \\boxed{}")
    content = "Q: What is {solution} in \\boxed{}? \\boxed{}"
    text = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert plain.text(PROBLEM) == text
    thinking = Context(tokenizer, "Q: {problem} \\boxed{}", thinking=True)
    assert thinking.text(PROBLEM) == text
    off = Context(tokenizer, "Q: {problem} \\boxed{}", thinking=False)
    assert off.text(PROBLEM) == text + "<think>\n\n</think>\n\n"
    teacher = Context(tokenizer, "{problem} | {solution}")
    assert "What is {solution} in \\boxed{}? | {problem} is 4<|im_end|>" in teacher.text(PROBLEM)
    (ids,) = off.token_ids([PROBLEM])
    assert tokenizer.decode(ids) == off.text(PROBLEM)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q: {problem}"},
    {"role": "assistant", "content": "{solution}"},
    {"role": "user", "content": "Again."},
)


def test_a_template_of_several_messages(folder, tmp_path):
    """A system line, and the solution as an answer already given."""
    context = Context(load_tokenizer(str(folder / "model")), MESSAGES)
    assert context.text(Problem("1+1?", "2")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nAgain.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="only the teacher may see"):
        Contexts(context, context)
    tiny_qwen3.save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="teacher_template is a list of chat messages, and the"):
        Context(load_tokenizer(str(tmp_path)), MESSAGES, name="teacher_template")


def test_without_a_chat_template_the_template_is_the_prompt(tmp_path):
    tiny_qwen3.save_tokenizer(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert Context(tokenizer, "Q: {problem}\nA:").text(Problem("1+1?", "2")) == "Q: 1+1?\nA:"
    with pytest.raises(ValueError, match="has no such switch"):
        Context(tokenizer, "{problem}", thinking=False)


def test_templates_are_checked(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    with pytest.raises(ValueError, match=r"must contain \{problem\}"):
        Context(tokenizer, "hello")
    teacher = Context(tokenizer, "{problem} {solution}")
    with pytest.raises(ValueError, match="only the teacher may see"):
        Contexts(teacher, teacher)


def test_a_position_predicts_the_token_after_it():
    ids, mask, predicts = join([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7, 9, 10, 0], [0, 0, 8, 11, 12, 13]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert ids[predicts].tolist() == [7, 9, 8, 11, 12]
    assert ids.roll(-1, dims=1)[predicts].tolist() == [9, 10, 11, 12, 13]


def test_sequences_one_after_the_other():
    ids, mask, predicts, positions = pack([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]])
    assert mask is None
    assert ids.tolist() == [[5, 6, 7, 9, 10, 8, 11, 12, 13]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert ids[predicts].tolist() == [7, 9, 8, 11, 12]
    assert ids.roll(-1, dims=1)[predicts].tolist() == [9, 10, 11, 12, 13]
