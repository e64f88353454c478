"""Data sets in their own formats, through field maps; contexts of a chosen length; broken rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramet.config import RunConfig, load
from ramet.data import load_rows
from ramet.env.gym import GymEnvironment
from ramet.env.maths import MathsEnvironment, final_answer
from ramet.env.multihop import MultihopEnvironment, documents, words
from ramet.errors import ConfigError, TaskError

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


def test_the_three_formats_and_their_copies_read_alike(tmp_path):
    titles, sentences = zip(*hotpot(1)["context"], strict=True)
    rows = [
        hotpot(1),
        hotpot(1) | {"context": {"title": titles, "sentences": sentences}, "supporting_facts": {"title": titles[::2], "sent_id": [0, 1]}},
        hotpot(1) | {"context": json.dumps(hotpot(1)["context"]), "supporting_facts": json.dumps(hotpot(1)["supporting_facts"])},
    ]
    for row in rows:
        found, supporting = documents(row, {}, "row 1")
        assert found == {"Hall 1": "It was built. By Ann.", "Other 1": "Nothing.", "Ann 1": "A builder."}
        assert supporting == {"Hall 1", "Ann 1"}
    musique = {
        "id": "m", "question": "q", "answer": "a", "answer_aliases": ["b"], "answerable": True, "question_decomposition": [{}, {}, {}],
        "paragraphs": [
            {"idx": 0, "title": "T", "paragraph_text": "one", "is_supporting": True},
            {"idx": 1, "title": "t", "paragraph_text": "two", "is_supporting": False},
        ],
    }  # fmt: skip
    env = MultihopEnvironment({"iid": write(tmp_path / "m.jsonl", musique, musique | {"answerable": False})}, name="musique")
    [task] = env.tasks("iid", 10, 0)
    assert task.documents == {"T": "one two"} and task.reference == ("a", "b") and env.size(task) == 3
    assert env.grade(task, "B.") == 1.0 and env.grade(task, "b c", "f1") == pytest.approx(2 / 3)


def test_order_is_seeded_and_fewer_are_the_first_of_more(tmp_path):
    path = write(tmp_path / "h.jsonl", *map(hotpot, range(20)))
    env = MultihopEnvironment({"iid": path, "train": path}, name="hotpotqa")
    ids = [t.id for t in env.tasks("iid", 100, 3)]
    assert len(ids) == len(set(ids)) == 20
    twice = MultihopEnvironment({"iid": write(tmp_path / "t.jsonl", hotpot(1), hotpot(1))}, name="hotpotqa")
    assert len({t.id for t in twice.tasks("iid", 5, 0)}) == 2, "rows with the same id are different tasks"
    assert [t.id for t in env.tasks("iid", 7, 3)] == ids[:7]
    assert [t.id for t in env.tasks("iid", 100, 4)] != ids
    train = [t.id for t in env.tasks("train", 45, 0)]
    assert len(set(train)) == 45, "a row that comes again is another task"
    assert env.splits == ("iid",)
    with pytest.raises(ConfigError, match=r"env\.ood names no file"):
        env.tasks("ood", 1, 0)


@pytest.mark.parametrize("gold, place", [("start", 0.0), ("middle", 0.5), ("end", 1.0)])
def test_contexts_are_lengthened_and_the_support_is_where_it_is_wanted(tmp_path, gold, place):
    path = write(tmp_path / "h.jsonl", *map(hotpot, range(60)))
    env = MultihopEnvironment({"iid": path}, name="hotpotqa", tokens=400, gold=gold)
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
        (['{"question": "q"}'], "has no field 'answer'"),
        (['{"question": "", "answer": "a", "context": []}'], "its question is ''"),
        (['{"question": "q", "answer": "a", "context": []}'], "has no documents"),
        (['{"question": "q", "answer": "a", "context": [["t", "not a list"], 5]}'], "not as any of the sets"),
        (['{"question": "q", "answer": {"x": 1}, "context": [["t", ["s"]]]}'], "its answer is"),
        (["[1, 2]"], "not a list of rows"),
        ([""], "not a list of rows"),
    ],
)
def test_broken_rows_are_named(tmp_path, rows, message):
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

    path = tmp_path / "rows.parquet"
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
    split = MathsEnvironment({"iid": years, "train": years}, {"year": "Year"}, "aime", last_year=2020)
    assert {t.reference for t in split.tasks("iid", 20, 0)} == {"21", "22", "23", "24"}
    assert {t.reference for t in split.tasks("train", 6, 0)} == {"15", "16", "17", "18", "19", "20"}
    assert final_answer("work\n#### 1,234") == "1234"
    with pytest.raises(TaskError, match="neither"):
        final_answer("a\nb")
    floats = write(tmp_path / "amc.jsonl", *({"problem": "p", "answer": v} for v in (1234567.0, 3.14159265, 12, "7")))
    amc = MathsEnvironment({"iid": floats}, name="amc").tasks("iid", 9, 0)
    assert {t.reference for t in amc} == {"1234567", "3.14159265", "12", "7"}
    with pytest.raises(TaskError, match="its answer is 'nan'"):
        MathsEnvironment({"iid": write(tmp_path / "nan.jsonl", {"problem": "p", "answer": float("nan")})}, name="amc").tasks("iid", 1, 0)


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
    with pytest.raises(ConfigError, match="does not make 'nonsense'"):
        GymEnvironment("nonsense").tasks("iid", 1, 0)


def test_options_belong_to_their_environment():
    with pytest.raises(ConfigError, match="tokens does not belong to the environment gsm8k"):
        load(RunConfig, None, ["env.kind=gsm8k", "env.tokens=100"])
    with pytest.raises(ConfigError, match="names no task of reasoning-gym"):
        load(RunConfig, None, ["env.kind=gym"])


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
