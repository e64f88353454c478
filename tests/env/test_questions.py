"""Data sets in their own formats, through field maps; contexts of a chosen length; broken rows are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ramet.agents.tree import Task
from ramet.cli.main import app
from ramet.data import load_rows
from ramet.env.gym import GymEnvironment
from ramet.env.maths import MathsEnvironment, final_answer
from ramet.env.multihop import MultihopEnvironment, documents, words
from ramet.env.registry import env_settings
from ramet.errors import ConfigError, TaskError
from ramet.runs.build import learning_problem
from ramet.runs.settings import RunConfig, load

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hotpot(number: int) -> dict:
    hall, other, ann = f"Hall {number}", f"Other {number}", f"Ann {number}"
    return {
        "_id": f"h{number}",
        "question": f"Who built hall {number}?",
        "answer": ann,
        "supporting_facts": [[hall, 0], [ann, 1]],
        "context": [[hall, ["It was built.", " By Ann."]], [other, ["Nothing."]], [ann, ["A builder."]]],
    }


def musique(**more: object) -> dict:
    return {
        "id": "m", "question": "q", "answer": "a", "answer_aliases": ["b"], "answerable": True, "question_decomposition": [{}, {}, {}],
        "paragraphs": [
            {"idx": 0, "title": "T", "paragraph_text": "one", "is_supporting": True},
            {"idx": 1, "title": "t", "paragraph_text": "two", "is_supporting": False},
        ],
    } | more  # fmt: skip


def read(path: Path, kind: str, *rows: object, **options: object) -> list[Task]:
    """The tasks that a configuration makes of the rows, in their order."""
    tasks = env_settings(kind=kind, data=write(path / "rows.jsonl", *rows), **options).build().tasks("iid", 100, 0)
    return sorted(tasks, key=lambda task: int(task.id.rpartition("-")[2]))


def prompt(path: Path, kind: str, row: object, **options: object) -> str:
    [task] = read(path, kind, row, **options)
    return task.messages[-1].content


def test_the_three_formats_and_their_copies_read_alike(tmp_path):
    titles, sentences = (list(column) for column in zip(*hotpot(1)["context"], strict=True))
    rows = [
        hotpot(1),
        hotpot(1) | {"context": {"title": titles, "sentences": sentences}, "supporting_facts": {"title": titles[::2], "sent_id": [0, 1]}},
        hotpot(1) | {"context": json.dumps(hotpot(1)["context"]), "supporting_facts": json.dumps(hotpot(1)["supporting_facts"])},
        hotpot(1) | {"supporting_facts": titles[::2]},
        hotpot(1) | {"context": [{"title": t, "sentences": s} for t, s in hotpot(1)["context"]]},
    ]
    for row in rows:
        texts, supporting = documents(row, {}, "row 1")
        assert texts == {"Hall 1": "It was built. By Ann.", "Other 1": "Nothing.", "Ann 1": "A builder."}
        assert supporting == {"Hall 1", "Ann 1"}
    env = MultihopEnvironment({"iid": write(tmp_path / "m.jsonl", musique(), musique(answerable=False))}, name="musique")
    [task] = env.tasks("iid", 10, 0)
    assert task.documents == {"T": "one two"} and task.reference == ("a", "b") and env.size(task) == 3
    assert env.grade(task, "B.") == 1.0 and env.grade(task, "b c", "f1") == pytest.approx(2 / 3)


def test_documents_are_the_text_as_it_is(tmp_path):
    """A text in the place of a list of sentences is one sentence; what says false is false."""
    assert "T1: abc def\n" in prompt(tmp_path, "hotpotqa", hotpot(1) | {"context": [["T1", "abc def"]], "supporting_facts": [["T1", 0]]})
    for no in (False, "False", "false", 0, "0"):
        row = musique(
            paragraphs=[
                {"title": "T", "paragraph_text": "x", "is_supporting": True},
                {"title": "U", "paragraph_text": "y", "is_supporting": no},
            ]
        )
        assert "U: y" not in prompt(tmp_path, "musique", row, only_gold=True)
        assert len(read(tmp_path, "musique", musique(), musique(answerable=no))) == 1


@pytest.mark.parametrize(
    "spelling, title_meant", [("Tom &amp; Jerry", "Tom & Jerry"), ("Cafe\u0301", "Caf\u00e9"), ("SAO  Paulo ", "sao\u00a0paulo")]
)
def test_what_supports_an_answer_is_found_however_its_title_is_spelled(tmp_path, spelling, title_meant):
    for title, fact in ((spelling, title_meant), (title_meant, spelling)):
        row = hotpot(1) | {"context": [[title, ["a"]], ["U", ["b"]]], "supporting_facts": [[fact, 0]]}
        [task] = read(tmp_path, "hotpotqa", row, only_gold=True)
        assert list(task.documents) == [title.strip()] and task.meta["supporting"] == (title.strip(),)


PARAGRAPH = {"title": "T", "paragraph_text": "x", "is_supporting": True}


@pytest.mark.parametrize(
    "kind, row, options, message",
    [
        ("hotpotqa", hotpot(1) | {"question": None}, {}, "row 1, column 'question': should be text (got null); correct the row"),
        ("hotpotqa", hotpot(1) | {"question": ""}, {}, "column 'question': is empty"),
        ("hotpotqa", hotpot(1) | {"answer": {"x": 1}}, {}, 'column \'answer\': should be text (got {"x": 1})'),
        ("hotpotqa", hotpot(1) | {"answer": True}, {}, "column 'answer': should be text (got true)"),
        ("hotpotqa", {"question": "q", "context": []}, {}, "row 1 has no field 'answer'; it has question, context; name the right one"),
        ("hotpotqa", hotpot(1) | {"context": []}, {}, "row 1 has no documents"),
        ("hotpotqa", hotpot(1) | {"context": None}, {}, "row 1 has no documents"),
        ("hotpotqa", hotpot(1) | {"context": [["t", ["s"]], 5]}, {}, "column 'context', item 2"),
        ("hotpotqa", hotpot(1) | {"context": [["t"]]}, {}, "column 'context': item 1 should be a list of title and sentences"),
        ("hotpotqa", hotpot(1) | {"context": [["t", [None]]]}, {}, "column 'context', item 1, sentences, item 1"),
        ("hotpotqa", hotpot(1) | {"context": [[None, ["s"]]]}, {}, "column 'context', item 1, title: should be text"),
        ("hotpotqa", hotpot(1) | {"context": "no list"}, {}, "column 'context': should be a list, but is text that is not a JSON list"),
        ("hotpotqa", hotpot(1) | {"context": {"title": ["t"], "sentences": []}}, {}, "title and sentences, lists of the same length"),
        ("hotpotqa", hotpot(1) | {"supporting_facts": [["Nowhere", 0]]}, {}, "'Nowhere', which supports its answer, is not among its"),
        ("hotpotqa", hotpot(1) | {"supporting_facts": None}, {"only_gold": True}, "row 1 names no supporting documents, which env"),
        ("hotpotqa", hotpot(1) | {"supporting_facts": []}, {"gold_position": "middle"}, "row 1 names no supporting documents"),
        ("hotpotqa", hotpot(1), {"fields": {"answer_aliases": "others"}}, "row 1 has no field 'others'"),
        ("musique", musique(paragraphs=[PARAGRAPH | {"paragraph_text": None}]), {}, "column 'paragraphs', item 1, paragraph_text"),
        ("musique", musique(paragraphs=[PARAGRAPH | {"is_supporting": "maybe"}]), {}, "is_supporting: should be true or false"),
        ("musique", musique(paragraphs=[PARAGRAPH | {"is_supporting": None}]), {}, "is_supporting: should be true or false (got null)"),
        ("musique", musique(answerable=2), {}, "column 'answerable': should be true or false (got 2)"),
        ("musique", musique(answer_aliases="b"), {}, "column 'answer_aliases'"),
        ("musique", musique(answer_aliases=["b", ""]), {}, "column 'answer_aliases', item 2: is empty"),
        ("gsm8k", {"question": "q", "answer": "work\n#### "}, {}, "row 1: its solution ends in an empty answer"),
        ("gsm8k", {"question": "q", "answer": "work\nand more"}, {}, "neither `####` nor a box; name the column of the answer"),
        ("math", {"problem": "p", "solution": "\\boxed{ }"}, {}, "its solution ends in an empty answer"),
        ("math", {"problem": "p", "solution": None}, {}, "row 1, column 'solution': should be text (got null)"),
        ("math", {"problem": "p", "solution": "5", "level": "hard"}, {"levels": (5,)}, "column 'level': should be a level, such as 5"),
        ("math", {"problem": "p", "solution": "5"}, {"levels": (5,)}, "row 1 has no field 'level'"),
        ("math", {"problem": "p", "solution": "5", "Level": 5}, {"levels": (5,), "fields": {"level": "grade"}}, "has no field 'grade'"),
        ("aime", {"Problem": "p", "Answer": None}, {}, "row 1, column 'Answer': should be text (got null)"),
        ("aime", {"Problem": "p", "Answer": 3, "Year": None}, {"last_year": 2020}, "column 'Year': should be a year"),
        ("aime", {"Problem": "p", "Answer": 3}, {"last_year": 2020}, "row 1 has no field 'year'"),
        ("amc", {"problem": "p", "answer": float("nan")}, {}, "column 'answer': should be text (got NaN)"),
    ],
)  # fmt: skip
def test_a_broken_row_is_one_line_with_file_row_and_column(tmp_path, kind, row, options, message):
    with pytest.raises(TaskError) as error:
        read(tmp_path, kind, row, **options)
    assert message in str(error.value) and str(tmp_path / "rows.jsonl") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("gold", ["The", "a an", "A", "...", "?"])
def test_an_answer_of_articles_or_punctuation_is_earned_by_saying_it_and_not_by_silence(tmp_path, gold):
    for row in (musique(answer=gold, answer_aliases=[]), musique(answer="Ann", answer_aliases=[gold])):
        [task] = read(tmp_path, "musique", row)
        env = env_settings(kind="musique").build()
        for metric in ("em", "f1"):
            assert [env.grade(task, answer, metric) for answer in (gold, gold.lower(), "", " ", ",", None)] == [1, 1, 0, 0, 0, 0]


def test_order_is_seeded_and_fewer_are_the_first_of_more(tmp_path):
    path = write(tmp_path / "h.jsonl", *map(hotpot, range(20)))
    env = MultihopEnvironment({"iid": path}, name="hotpotqa")
    ids = [t.id for t in env.tasks("iid", 100, 3)]
    assert len(ids) == len(set(ids)) == 20
    assert [t.id for t in env.tasks("iid", 7, 3)] == ids[:7]
    assert [t.id for t in env.tasks("iid", 100, 4)] != ids
    assert env.splits == ("iid",)
    for split, message in (
        ("ood", r"env\.ood names no file"),
        ("train", r"env\.train names"),
        ("tune", r"env\.train names .* one in 10 .* for tuning"),
    ):
        with pytest.raises(ConfigError, match=message):
            env.tasks(split, 1, 0)


@pytest.mark.parametrize("env", [MultihopEnvironment({"iid": "x"}), MathsEnvironment({"iid": "x"}), GymEnvironment("gcd")])
def test_a_split_that_there_is_not_is_an_error_that_names_those_that_there_are(env):
    for split in ("test", "validation", "", "iid "):
        with pytest.raises(ConfigError, match=r"no split .* there are train, tune, "):
            env.tasks(split, 1, 0)


def sums(*numbers: int) -> list[dict]:
    return [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in numbers]


def prompts(tasks: list[Task]) -> list[str]:
    return [task.messages[0].content for task in tasks]


def test_training_draws_every_row_before_any_again(tmp_path):
    """Update after update: epochs of all rows, each in another order, which the seed gives."""
    path = write(tmp_path / "train.jsonl", *sums(*range(100)))
    config = load(RunConfig, "nano", ["env.kind=gsm8k", f"env.train={path}", "train.tasks=9", "train.minibatches=1", "seed=3"])
    draw = learning_problem(config, len).sample_tasks
    epochs = [[q for update in range(10 * e, 10 * e + 10) for q in prompts([task for task, _ in draw(update)])] for e in range(3)]
    env = config.env.build()
    assert all(len(set(epoch)) == 90 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [task for task, _ in draw(7)] == [task for task, _ in draw(7)]
    assert len({t.id for t in env.tasks("train", 200, 0)}) == 200, "a row that comes again is another task"
    assert env.tasks("train", 200, 0)[50:170] == env.training(50, 120, 0) != env.training(50, 120, 1)


def test_what_is_trained_on_tuned_on_and_measured_differs(tmp_path):
    rows = sums(*range(200))
    train, data = write(tmp_path / "train.jsonl", *rows, *rows[:20]), write(tmp_path / "data.jsonl", *sums(*range(1000, 1050)))
    env = env_settings(kind="gsm8k", train=train, data=data).build()
    trained, tuned, measured = (set(prompts(env.tasks(split, 500, 0))) for split in ("train", "tune", "iid"))
    assert (len(trained), len(tuned), len(measured)) == (180, 20, 50)
    assert not trained & tuned and not (trained | tuned) & measured
    assert tuned == set(prompts(env.tasks("tune", 500, 9))), "whatever the seed"
    shuffled = write(tmp_path / "shuffled.jsonl", *rows[::-1])
    assert tuned == set(prompts(env_settings(kind="gsm8k", train=shuffled).build().tasks("tune", 500, 0))), "by content, whatever the order"
    few = env_settings(kind="gsm8k", train=write(tmp_path / "few.jsonl", *rows[:9])).build()
    assert len(set(prompts(few.tasks("train", 20, 0)))) == 9
    with pytest.raises(TaskError, match="too few questions"):
        few.tasks("tune", 1, 0)


def test_tuning_tasks_of_the_longer_split_are_as_long(tmp_path):
    train, data = (write(tmp_path / f"{name}.jsonl", *map(hotpot, numbers)) for name, numbers in (("t", range(60)), ("d", range(60, 80))))
    env = env_settings(kind="hotpotqa", train=train, data=data, ood_tokens=200).build()
    short, long = env.tasks("tune", 9, 0), env.tasks("tune_ood", 9, 0)
    assert {t.meta["question"] for t in short} == {t.meta["question"] for t in long} and len(short) == 6
    assert all(len(b.documents) > len(a.documents) for a in short for b in long)


ALIKE = [
    lambda q: q,
    lambda q: f"  {q.upper()}\n",
    lambda q: q.removesuffix("?").replace(" ", "\u00a0"),
    lambda q: q.replace(" and ", " &#97;nd "),
]


@pytest.mark.parametrize("change", ALIKE)
def test_a_question_in_both_files_is_refused_unless_it_is_asked_for(tmp_path, change):
    """By what it asks, however it is spelled and whatever its id; training says so as well as measuring."""
    train, rows = write(tmp_path / "train.jsonl", *sums(*range(40))), sums(*range(30, 60))
    data = write(tmp_path / "data.jsonl", *({"id": n, **row, "question": change(row["question"])} for n, row in enumerate(rows)))
    for split in ("train", "iid", "tune"):
        with pytest.raises(
            ConfigError, match=r"10 of the 30 rows of \S+data.jsonl ask .*train.jsonl, .* row 1 and row 31 there.*env\.allow_overlap=true"
        ):
            env_settings(kind="gsm8k", train=train, data=data).build().tasks(split, 5, 0)
    env = env_settings(kind="gsm8k", train=train, data=data, allow_overlap=True).build()
    assert len(env.tasks("iid", 99, 0)) == 30 and env.row_counts("iid") == {"rows": 30, "duplicates": 0, "trained_on": 10}
    measured = {" ".join(q.split()).casefold().removesuffix("?") for q in prompts(env.tasks("iid", 99, 0))}
    assert not measured & {q.casefold().removesuffix("?") for q in prompts(env.tasks("tune", 99, 0))}, "what is tuned on is never measured"


def test_one_file_is_not_trained_on_and_measured(tmp_path):
    path = write(tmp_path / "h.jsonl", *map(hotpot, range(12)))
    with pytest.raises(ConfigError, match="12 of the 12 rows"):
        env_settings(kind="hotpotqa", train=path, data=path).build().tasks("iid", 5, 0)
    years = write(tmp_path / "aime.jsonl", *({"Problem": f"p{y}", "Answer": 1, "Year": y} for y in range(2015, 2025)))
    split = env_settings(kind="aime", train=years, data=years, last_year=2020).build()
    assert set(prompts(split.tasks("iid", 20, 0))) == {f"p{y}" for y in range(2021, 2025)}, "but for years that part it"


def test_a_row_that_is_there_twice_is_measured_once(tmp_path):
    """Twice: with the same question, answer and support. The same question about other documents is another."""
    same_question = hotpot(1) | {"_id": "copy", "question": "who built HALL 1 ?".replace(" ?", "?"), "context": hotpot(1)["context"][::-1]}
    other = hotpot(1) | {"context": [["Hall 1", ["Another hall."]], ["Ann 1", ["Another."]]]}
    env = MultihopEnvironment({"iid": write(tmp_path / "t.jsonl", hotpot(1), same_question, hotpot(2), other, hotpot(2))}, name="hotpotqa")
    assert [t.id for t in sorted(env.tasks("iid", 9, 0), key=lambda t: t.id)] == ["hotpotqa-iid-0", "hotpotqa-iid-2", "hotpotqa-iid-3"]
    assert env.row_counts("iid") == {"rows": 5, "duplicates": 2, "trained_on": 0}


@pytest.mark.parametrize(
    ("question", "same_question"),
    [
        ("Find $x=5$.", "Find $x = 5$"), ("Find \\(x\\).", "Find $x$."), ("Is $\\dfrac{1}{2}$ odd?", "Is \\frac12 odd?"),
        ("Find x", "Find\u200b x"),
    ],
)  # fmt: skip
def test_a_question_is_the_same_however_its_formulas_are_set(tmp_path, question, same_question):
    """And its answer, however the number is written: one outcome counts once, and none is trained on and measured."""
    rows = {"question": question, "answer": "#### 0.5"}, {"question": same_question, "answer": "#### 1/2"}
    twice = env_settings(kind="gsm8k", data=write(tmp_path / "twice.jsonl", *rows)).build()
    assert len(twice.tasks("iid", 9, 0)) == 1
    both = env_settings(kind="gsm8k", train=write(tmp_path / "t.jsonl", rows[0]), data=write(tmp_path / "d.jsonl", rows[1])).build()
    with pytest.raises(ConfigError, match="trained on and measured"):
        both.tasks("iid", 9, 0)


def test_eval_says_what_is_in_the_file_and_refuses_before_it_begins(tmp_path, caplog):
    caplog.set_level("INFO", "ramet")
    train, data = write(tmp_path / "t.jsonl", *sums(1, 2)), write(tmp_path / "d.jsonl", *sums(2, 3, 3))
    common = ["--runs", str(tmp_path), "--set", f"env.train={train}"]
    command = ["eval", "--env", "gsm8k", "--data", data, "--limit", "5", "--budgets", "24", *common]
    bare = ["train", "--set", "env.kind=gsm8k", "--set", f"env.data={data}"]
    for given in (command, ["frontier", "--policy", "nano", *command[1:]], [*bare, *common]):
        refused = CliRunner().invoke(app, given)
        assert "they would be both trained on and measured" in str(refused.exception), refused.output
    nothing = CliRunner().invoke(app, [*bare, *common[:2]])
    assert "env.train names no file" in str(nothing.exception)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing was begun"
    more = ["--set", "env.allow_overlap=true", "--set", "threads=1", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, command + more)
    assert done.exit_code == 0, done.output + repr(done.exception)
    records = json.loads((tmp_path / "out.json").read_text())
    assert [r for r in records if r["record"] == "data"] == [
        {"record": "data", "split": "iid", "rows": 3, "duplicates": 1, "trained_on": 1}
    ]
    assert {r["n"] for r in records if r["record"] == "point"} == {2}
    assert "1 of 3 rows repeat another" in caplog.text


def test_the_field_map_holds_for_every_column_and_names_only_those(tmp_path):
    rows = [{"p": f"p{n}", "s": str(n), "grade": n % 5 + 1, "when": 2018 + n} for n in range(5)]
    names = {"question": "p", "answer": "s", "level": "grade", "year": "when"}
    [task] = read(tmp_path, "math", *rows, fields=names, levels=(5,))
    assert (task.reference, task.meta["size"]) == ("4", 5)
    assert [t.reference for t in read(tmp_path, "aime", *rows, fields=names, last_year=2020)] == ["3", "4"]
    with pytest.raises(ConfigError, match=r"env\.fields names 'anwser', which gsm8k does not read; it reads question, answer, level, year"):
        read(tmp_path, "gsm8k", *rows, fields={"anwser": "s"})
    assert (
        len(
            read(
                tmp_path,
                "musique",
                musique(),
                {**musique(), "ok": False},
                {**musique(question="r"), "ok": True},
                fields={"answerable": "answerable"},
            )
        )
        == 2
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.JSONL", '\ufeff{"question": "q", "answer": "1"}\n'),
        ("rows.jsonl", '\ufeff{"question": "q", "answer": "1"}\r\n\r\n'),
        ("rows.json", '{"question": "q",\n "answer": "1"}'),
        ("rows.Json", '\ufeff[{"question": "q", "answer": "1"}]'),
        ("rows.json", '{"question": "q", "answer": "1"}\n'),
    ],
)
def test_files_are_read_whatever_wrote_them(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    [task] = env_settings(kind="gsm8k", data=str(tmp_path / name)).build().tasks("iid", 5, 0)
    assert (task.messages[0].content, task.reference) == ("q", "1")


@pytest.mark.parametrize("gold, place", [("start", 0.0), ("middle", 0.5), ("end", 1.0)])
def test_contexts_are_lengthened_and_the_support_is_where_it_is_wanted(tmp_path, gold, place):
    path = write(tmp_path / "h.jsonl", *map(hotpot, range(60)))
    env = MultihopEnvironment({"iid": path}, name="hotpotqa", tokens=400, gold_position=gold)
    for task in env.tasks("iid", 10, 0):
        length = sum(words(f"{k}: {v}\n") for k, v in task.documents.items())
        assert 380 <= length <= 400
        keys = list(task.documents)
        at = sorted(keys.index(key) for key in task.meta["supporting"])
        assert at[1] == at[0] + 1
        assert abs(at[0] / (len(keys) - 2) - place) < 0.03
        assert all(f"{key}: " in task.messages[0].content for key in keys)
    assert env.tasks("iid", 10, 0)[3].documents == env.tasks("iid", 10, 0)[3].documents


def test_titles_only_and_support_only(tmp_path):
    path = write(tmp_path / "h.jsonl", hotpot(1))
    [titles] = MultihopEnvironment({"iid": path}, show="titles").tasks("iid", 1, 0)
    assert "- Hall 1\n" in titles.messages[0].content and "built." not in titles.messages[0].content
    env = MultihopEnvironment({"iid": path}, only_gold=True)
    [gold] = env.tasks("iid", 1, 0)
    assert list(gold.documents) == ["Hall 1", "Ann 1"]
    assert "By Ann" in env.with_documents(titles, ["Hall 1"]).messages[0].content


@pytest.mark.parametrize(
    "rows, message",
    [
        (["{not json"], "line 1: not valid JSON"),
        (["[1, 2]"], "not a list of rows"),
        ([""], "not a list of rows"),
        (["{}", "3"], "not a list of rows"),
    ],
)
def test_files_that_are_no_rows_are_named(tmp_path, rows, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(TaskError, match=message):
        MultihopEnvironment({"iid": str(path)}, name="hotpotqa").tasks("iid", 5, 0)


def test_sources_that_do_not_exist_are_named(tmp_path):
    for source, message in (("missing.jsonl", "cannot read"), ("nothing", "neither a"), ("missing.parquet", "there is no file")):
        with pytest.raises(TaskError, match=message):
            load_rows(source)


def test_parquet_and_field_maps(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows[1].Parquet"
    pyarrow.parquet.write_table(pyarrow.table({"asked": ["1+1?"], "meta": [{"solved": "#### 2"}]}), path)
    env = MathsEnvironment({"iid": str(path)}, {"question": "asked", "answer": "meta.solved"}, "gsm8k")
    [task] = env.tasks("iid", 5, 0)
    assert task.messages[0].content == "1+1?" and env.grade(task, "2.0") == 1.0


def test_maths_sets(tmp_path):
    rows = [
        {"problem": "p1", "solution": "so \\boxed{\\frac{1}{2}}", "level": "Level 5", "type": "Algebra"},
        {"problem": "p2", "solution": "\\boxed{3}", "level": "Level 1", "type": "Algebra"},
    ]
    path = write(tmp_path / "math.jsonl", *rows)
    env = MathsEnvironment({"iid": path}, name="math", levels=(5,))
    [hard] = env.tasks("iid", 5, 0)
    assert hard.reference == "\\frac{1}{2}" and env.size(hard) == 5 and env.grade(hard, "0.5") == 1.0
    assert env.canonical("$0.5$") == env.canonical("\\frac12".replace("12", "{1}{2}"))
    years = write(tmp_path / "aime.jsonl", *({"Problem": f"p{y}", "Answer": y % 1000, "Year": y} for y in range(2015, 2025)))
    split = MathsEnvironment({"iid": years, "train": years}, name="aime", last_year=2020)
    assert {t.reference for t in split.tasks("iid", 20, 0)} == {"21", "22", "23", "24"}
    assert {t.reference for t in split.tasks("train", 6, 0)} == {"15", "16", "17", "18", "19", "20"}
    assert final_answer("work\n#### 1,234") == "1234"
    with pytest.raises(TaskError, match="neither"):
        final_answer("a\nb")
    floats = write(tmp_path / "amc.jsonl", *({"problem": "p", "answer": v} for v in (1234567.0, 3.14159265, 12, "7")))
    amc = MathsEnvironment({"iid": floats}, name="amc").tasks("iid", 9, 0)
    assert {t.reference for t in amc} == {"1234567", "3.14159265", "12", "7"}


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("work\n#### 1,234", "1234"), ("#### $1,234,567.50", "$1234567.50"), ("#### -1,000", "-1000"), ("#### 3, 5", "3, 5"),
        ("#### 3,5", "3,5"), ("#### (1,200)", "(1,200)"), ("#### 1,2,3", "1,2,3"),
        ("so \\boxed{1,234}", "1234"), ("\\boxed{1, 234}", "1, 234"), ("12", "12"),
    ],
)  # fmt: skip
def test_commas_between_thousands_go_and_others_stay(solution, answer):
    assert final_answer(solution) == answer


def test_reasoning_gym_is_graded_by_comparison_and_never_runs_an_answer():
    env = GymEnvironment("leg_counting")
    tasks = env.tasks("iid", 4, 0)
    assert [env.grade(t, f" {t.reference} ") for t in tasks] == [1.0] * 4
    assert [t.messages for t in tasks] == [t.messages for t in env.tasks("iid", 4, 0)]
    assert [t.messages for t in tasks] != [t.messages for t in env.tasks("iid", 4, 1)]
    assert env.grade(tasks[0], None) == 0.0
    for name in ("string_insertion", "n_queens", "countdown", "puzzle24", "binary_matrix", "simple_integration"):
        with pytest.raises(ConfigError, match="which may run answers as code"):
            GymEnvironment(name).tasks("iid", 1, 0)
    with pytest.raises(ConfigError, match="cannot generate 'nonsense'"):
        GymEnvironment("nonsense").tasks("iid", 1, 0)


def test_what_reasoning_gym_makes_to_train_on_tune_on_and_measure_differs_in_its_prompts():
    env = GymEnvironment("lcm")
    trained = {q for update in range(20) for q in prompts(env.tasks("train", 100, update))}
    tuned, measured = (prompts(env.tasks(split, 150, 0)) for split in ("tune", "iid"))
    assert len(set(tuned)) == len(set(measured)) == 150 and len(trained) > 1000
    assert not trained & set(tuned) and not trained & set(measured) and not set(tuned) & set(measured)
    assert prompts(env.tasks("iid", 40, 0)) == measured[:40]
    small = GymEnvironment("lcm", {"max_value": 9})
    with pytest.raises(ConfigError, match=r"there are only \d+ different tasks for the split iid"):
        small.tasks("iid", 300, 0)
    assert len(prompts(small.tasks("train", 300, 0))) == 300


REPEATED = """
import json, sys
from ramet.env.gym import GymEnvironment
from ramet.errors import ConfigError
for name in sys.argv[1:]:
    try:
        print(json.dumps([[t.messages[0].content, t.reference] for t in GymEnvironment(name).tasks("train", 10, 0)]))
    except ConfigError as error:
        print(error)
"""


def test_tasks_are_the_same_in_every_process():
    """Whatever the order of its sets; where a generator draws from that, it is refused."""
    names = ["number_sequence", "letter_counting", "string_synthesis", "syllogism", "course_schedule", "isomorphic_strings", "ransom_note"]
    one, other = (
        subprocess.run(
            [sys.executable, "-c", REPEATED, *names], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for seed in ("1", "2")
    )
    assert one == other and len(one) == len(names)
    for name, message in zip(names, one, strict=True):
        assert ("differ from process to process" in message) == (name in ("isomorphic_strings", "ransom_note"))


@pytest.mark.parametrize("name", ["rotate_matrix", "modulo_grid"])
def test_a_task_whose_own_reference_is_not_graded_right_is_refused(name):
    for split in ("train", "iid"):
        with pytest.raises(ConfigError, match=f"20 tasks of {name} in a row are unusable: its reference .* would not be graded as right"):
            GymEnvironment(name).tasks(split, 1, 0)


def test_a_task_that_its_generator_does_not_manage_is_passed_over():
    assert len({*prompts(GymEnvironment("maze").tasks("iid", 60, 1))}) == 60


def test_an_entry_whose_own_reference_is_not_graded_right_is_left_out():
    """A string is now and then cut down to nothing."""
    options = {"min_string_length": 5, "max_string_length": 5, "min_num_rules": 8, "max_num_rules": 12}
    reasoning_gym = pytest.importorskip("reasoning_gym")
    made = reasoning_gym.create_dataset("string_manipulation", size=1000, seed=0, **options)
    assert not all(entry["answer"] for entry in made)
    env = GymEnvironment("string_manipulation", options)
    assert all(task.reference and env.grade(task, task.reference) == 1 for task in env.tasks("train", 1000, 0))


def test_options_belong_to_their_environment():
    with pytest.raises(ConfigError, match="tokens does not belong to the environment gsm8k"):
        load(RunConfig, "nano", ["env.kind=gsm8k", "env.tokens=100"])
    with pytest.raises(ConfigError, match="names no task of reasoning-gym"):
        load(RunConfig, "nano", ["env.kind=gym"])


@pytest.mark.skipif(not SHARED.exists(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize("name, hops", [("hotpotqa", {2, 3, 4}), ("2wikimultihopqa", {2, 4}), ("musique", {2, 3, 4})])
def test_real_rows(name, hops):
    env = MultihopEnvironment({"iid": str(SHARED / "qa" / f"{name}_dev.jsonl")}, name=name)
    tasks = env.tasks("iid", 1000, 0)
    assert len(tasks) >= 100
    assert {env.size(t) for t in tasks} <= hops
    assert all(env.grade(t, t.reference[0]) == env.grade(t, t.reference[0], "f1") == 1.0 for t in tasks)
    assert all(t.meta["supporting"] for t in tasks)
    gsm = MathsEnvironment({"iid": str(SHARED / "math" / "gsm8k_test.jsonl")}, name="gsm8k")
    assert all(gsm.grade(t, t.reference) == 1.0 for t in gsm.tasks("iid", 1000, 0))
