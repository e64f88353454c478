"""What a run grew can be read again, exactly, whatever it says and however deep it goes."""

from __future__ import annotations

import dataclasses
import enum
import errno
import functools
import gzip
import json
import logging
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet.agents import tree as records
from ramet.agents.scripted import PlainFormat
from ramet.agents.transcripts import Transcript, Transcripts, full, read_transcripts
from ramet.agents.tree import Branch, BranchText, Segment, Status, StopReason, ToolCall, ToolResult, ToolStatus, Tree, Turn, Usage, price
from ramet.errors import CheckpointError, StorageError

HOSTILE = (
    "\x1b]0;title\x07\x1b[2J", "\r\n\n0: answered '42'", "a\u2028b\x85c\x0bd", "\u202egnp.exe", "\ud800", "\x00", '{"place":',
    "</tool_call>", "[red]markup[/red]", "\U000e0041", "é😀",
)  # fmt: skip
TEXT = st.sampled_from(HOSTILE) | st.text(max_size=8)


@functools.cache
def any_of(hint: Any, depth: int) -> st.SearchStrategy[Any]:
    """Any value of a type, found from its annotations alone: a field that is new is filled as well, or its type is one to add here."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (str, int, bool, type(None)):
        return {str: TEXT, int: st.integers(), bool: st.booleans(), type(None): st.none()}[hint]
    if hint is float:
        return st.floats(allow_nan=False)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(any_of(each, depth) for each in arguments))
    if origin is tuple and arguments[-1] is ...:
        return st.lists(any_of(arguments[0], depth), max_size=2).map(tuple) if arguments[0] is not Branch or depth else st.just(())
    if origin is tuple:
        return st.tuples(*(any_of(each, depth) for each in arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if dataclasses.is_dataclass(hint):
        return every_field(hint, depth - (hint is Branch))
    if origin is Mapping or hint is Any:
        inside = TEXT | st.integers() | st.floats(allow_nan=False) | st.none() | st.booleans()
        named = st.dictionaries(TEXT, inside, max_size=3)
        return named if origin is Mapping else named | inside | st.lists(named | inside, max_size=2)
    raise AssertionError(f"no values of {hint} are known")


@functools.cache
def every_field(kind: Any, depth: int = 2) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    values = st.fixed_dictionaries({field.name: any_of(hints[field.name], depth) for field in dataclasses.fields(kind)})

    def made(given: dict[str, Any]) -> Any:
        if kind is Turn:
            given["logprobs"] = tuple(-0.1 * n for n in range(len(given["sampled"])))
        if kind is Segment:
            start = abs(given["start"]) if math.isfinite(given["start"]) else 0.0
            given |= {"start": start, "end": None if given["end"] is None else start * 2 + 1.5}
        return kind(**given)

    return values.map(made)


def placed(branch: Branch, name: str = "0") -> Branch:
    """With the ids that the places in the tree give its branches."""
    count, turns = 0, []
    for turn in branch.turns:
        turns.append(replace(turn, clones=tuple(placed(clone, f"{name}.{count + n}") for n, clone in enumerate(turn.clones))))
        count += len(turn.clones)
    return replace(branch, id=name, turns=tuple(turns))


TREES_OF_ALL_KINDS = every_field(Tree).map(lambda tree: replace(tree, root=placed(tree.root)))
SLOW = settings(max_examples=30, suppress_health_check=list(HealthCheck))


@SLOW
@given(TREES_OF_ALL_KINDS)
def test_every_field_of_a_tree_comes_back_from_json(tree):
    again = Tree.of(json.loads(json.dumps(tree.record())))
    assert again == tree and hash(again) == hash(tree) and again.root == tree.root


@SLOW
@given(every_field(Transcript), TREES_OF_ALL_KINDS)
def test_every_field_of_a_transcript_comes_back_from_its_file(tmp_path_factory, transcript, tree):
    path = tmp_path_factory.mktemp("t") / "t.gz"
    said = [BranchText(transcript.error, ((transcript.task, transcript.error),) * len(branch.turns)) for branch in tree.branches]
    kept = replace(transcript, tree=tree, texts=tuple(said))
    Transcripts(path).append([kept])
    assert list(read_transcripts(path)) == [kept]


def one(name: str = "t0", said: str = "7", clones: tuple[Branch, ...] = (), **also: Any) -> Tree:
    turn = Turn(tuple(map(ord, said)), (-0.25,) * len(said), StopReason.END, appended=(10,), clones=clones)
    root = Branch("0", (63, 10), (turn,), Status.ANSWERED, said, **also)
    return Tree(name, root, price(root, 1.5))


def transcript(number: int = 0, tree: Tree | None = None) -> Transcript:
    tree = tree or one(f"t{number}")
    return Transcript({"update": number}, tree.task_id, tree, tuple(tree.texts(PlainFormat())), "7", {"reward": 0.5})


def chain(depth: int = 2000) -> Tree:
    branch = None
    for level in reversed(range(depth + 1)):
        turn = Turn((1,), (-1.0,), StopReason.END, clones=() if branch is None else (branch,))
        branch = Branch("0" + ".0" * level, (2,), (turn,), Status.ANSWERED, "x")
    return Tree("deep", branch, Usage())


def test_two_thousand_nested_clones_are_stored_compared_and_shown(tmp_path):
    tree = chain()
    tree.save(tmp_path / "tree.json")
    Transcripts(tmp_path / "t.gz").append([transcript(tree=tree)])
    (kept,) = read_transcripts(tmp_path / "t.gz")
    assert Tree.load(tmp_path / "tree.json") == kept.tree == tree != chain(1999)
    assert kept.text() == tree.text(PlainFormat()) and kept.text().count("model | ") == 2001
    assert repr(tree) == "Tree('deep': answered 'x', 2001 branches, 0 tokens)"
    assert hash(chain()) == hash(tree) and {chain().root: 1}[tree.root] == 1 and tree.root.turns == chain().root.turns


def test_a_tree_is_described_on_one_line_and_shown_with_all_that_it_read_and_wrote():
    call = ToolCall("search", '{"query": "x"}', ToolResult(ToolStatus.TIMED_OUT, ""), seconds=2.0)
    clone = Branch("0.0", (ord("?"),), (Turn((52,), (0.0,), StopReason.END, calls=(call,)),), Status.FAILED, None, "503", "find x")
    tree = one(clones=(clone,))
    assert repr(tree) == "Tree('t0': answered '7', 2 branches, 2 tokens, failed: '503')"
    assert tree.text(PlainFormat()).splitlines() == [
        "Tree('t0': answered '7', 2 branches, 2 tokens, failed: '503')",
        "",
        "0: answered '7', 1 tokens",
        "   prompt | ?",
        "          | ",
        "    model | 7",
        "  runtime | ",
        "          | ",
        "",
        "0.0: failed ('503'), 1 tokens",
        "objective | find x",
        "   prompt | ?",
        "    model | 4",
        '     call | search {"query": "x"} -> timed out, 2 seconds',
    ]
    assert "\n" not in repr(one("t\n0", "a\nb" * 1000)) and len(repr(one(said="x" * 10_000))) < 200


@pytest.mark.parametrize("said", HOSTILE)
def test_what_a_model_says_acts_on_no_terminal_and_passes_for_nothing_else(said):
    branch = Branch("0", (1,), (Turn((1,), (0.0,), StopReason.END),), Status.FAILED, said, said, said, role=said)
    text = records.written(Tree(said, branch, Usage(), error=said), [BranchText(said, ((said, said),))])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff\U000e0000-\U000e007f]", text)
    headings = [line for line in text.splitlines() if line and not re.match(r" *\w* \| ", line)]
    assert len(headings) == 2 and headings[0].startswith("Tree(") and headings[1].startswith("0 as ")


def test_what_is_not_a_saved_tree_is_one_line(tmp_path):
    path = tmp_path / "tree.json"
    one().save(path)
    good = json.loads(path.read_text())
    for text, said in (
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[1]", "is not a tree that was saved"),
        (json.dumps({**good, "version": 2}), "a tree of version '2', where this ramet reads version 1"),
        (json.dumps({**good, "tree": {**good["tree"], "mood": 1}}), "can read: mood: "),
        (json.dumps({**good, "clones": [[0, {**good["tree"]["root"], "id": "0.4.1"}]]}), "a clone has no parent"),
        (json.dumps({"record": "meta"}), "can read: "),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            Tree.load(path)
        assert "tree.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"cannot read tree .*none: No such file"):
        Tree.load(tmp_path / "none")


def written(path: Path, count: int = 4) -> bytes:
    kept = Transcripts(path)
    for number in range(count):
        kept.append([transcript(number)])
    return path.read_bytes()


def test_a_crash_anywhere_cuts_only_the_last_and_the_run_goes_on(tmp_path):
    whole, path = written(tmp_path / "whole"), tmp_path / "cut"
    members = [found.start() for found in re.finditer(b"\x1f\x8b\x08", whole)]
    assert len(members) == 5
    borders = {at + near for at in (*members, len(whole)) for near in (-1, 0, 1, 2)}
    for cut in sorted(borders.union(range(0, len(whole), 13)) - {-1}):
        path.write_bytes(whole[:cut])
        before = list(read_transcripts(path))
        assert before == [transcript(number) for number in range(len(before))]
        kept = Transcripts(path)
        for number in range(len(before), 4):
            kept.append([transcript(number)])
        assert path.read_bytes() == whole


def test_a_tail_that_a_dead_machine_left_empty_is_dropped(tmp_path):
    whole = written(tmp_path / "t.gz")
    (tmp_path / "t.gz").write_bytes(whole + bytes(4096))
    assert len(list(read_transcripts(tmp_path / "t.gz"))) == 4
    assert written(tmp_path / "t.gz", 0) == whole + bytes(4096)
    Transcripts(tmp_path / "t.gz").append([transcript(4)])
    assert len(list(read_transcripts(tmp_path / "t.gz"))) == 5


def test_what_is_done_again_is_dropped_and_nothing_else(tmp_path):
    whole = written(tmp_path / "t.gz")
    Transcripts(tmp_path / "t.gz").forget(lambda place: place["update"] != 2)
    assert [kept.place["update"] for kept in read_transcripts(tmp_path / "t.gz")] == [0, 1, 3]
    Transcripts(tmp_path / "t.gz").forget(lambda place: place["update"] < 2)
    kept = Transcripts(tmp_path / "t.gz")
    kept.append([transcript(2)])
    kept.append([transcript(3)])
    assert (tmp_path / "t.gz").read_bytes() == whole and [path.name for path in tmp_path.iterdir()] == ["t.gz"]


def test_the_file_is_lines_of_json_for_anything_that_reads_gzip(tmp_path):
    written(tmp_path / "t.gz")
    with gzip.open(tmp_path / "t.gz", "rt", encoding="utf-8") as file:
        header, *lines = map(json.loads, file)
    assert header["transcripts"] == 1
    assert [(line["task"], line["reward"], line["texts"][0]["turns"]) for line in lines[:1]] == [("t0", {"reward": 0.5}, [["7", "\n"]])]


def test_what_is_damaged_or_something_else_is_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "t.gz"
    whole = written(path)
    second = whole.index(b"\x1f\x8b", 1)
    other = gzip.compress(json.dumps({"transcripts": 7, "ramet": "9.1"}).encode())
    for data, said in (
        (whole[: second + 30] + bytes([whole[second + 30] ^ 255]) + whole[second + 31 :], rf"damaged at byte {second}: move it away"),
        (b'{"journal": 1}\n', "is not a file of transcripts; .* moved away"),
        (gzip.compress(b"something"), "is not a file of transcripts; .* moved away"),
        (gzip.compress(b"[" * 10**5), "is not a file of transcripts; .* moved away"),
        (other, r"has version 7 of transcripts, of ramet 9\.1, and this ramet reads version 1"),
    ):
        path.write_bytes(data)
        for use in (lambda: list(read_transcripts(path)), lambda: Transcripts(path).append([transcript()])):
            with pytest.raises(CheckpointError, match=said):
                use()
        assert path.read_bytes() == data and [each.name for each in tmp_path.iterdir()] == ["t.gz"]
    with pytest.raises(CheckpointError, match=r"cannot read .*none: No such file"):
        list(read_transcripts(tmp_path / "none"))


def test_any_byte_that_changes_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "t.gz"
    whole = written(path, 3)
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            kept = list(read_transcripts(path))
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert kept == [transcript(number) for number in range(len(kept))] and len(kept) >= 2


@pytest.mark.parametrize(
    "line",
    [
        '{"place":', '{"place":{}', '{"place":3}', '{"place":{}}', '{"place":{}} {}', '{"place":{},"texts":7}', '{"place":' + "[" * 10**5,
        '{"place":"\ud800"}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_line_that_is_no_transcript_is_one_line(tmp_path, line):
    written(tmp_path / "t.gz", 1)
    with (tmp_path / "t.gz").open("ab") as file:
        file.write(gzip.compress(line.encode("utf-8", "surrogatepass") + b"\n"))
    with pytest.raises(CheckpointError, match=r"t\.gz has a line that this ramet cannot read") as caught:
        list(read_transcripts(tmp_path / "t.gz"))
    assert "\n" not in str(caught.value)


def test_the_limit_is_kept_and_said_once_in_the_log_and_once_in_the_file(tmp_path, caplog):
    limit = len(written(tmp_path / "t.gz", 3))
    (tmp_path / "t.gz").unlink()
    with caplog.at_level(logging.WARNING):
        kept = Transcripts(tmp_path / "t.gz", limit)
        for number in range(9):
            kept.append([transcript(number)])
    assert len(caplog.records) == 1 and "has reached its limit" in caplog.text
    assert len(list(read_transcripts(tmp_path / "t.gz"))) == 3 and full(tmp_path / "t.gz")
    # With more room, the run goes on.
    Transcripts(tmp_path / "t.gz").append([transcript(9)])
    assert [k.place["update"] for k in read_transcripts(tmp_path / "t.gz")] == [0, 1, 2, 9] and not full(tmp_path / "t.gz")
    Transcripts(tmp_path / "none.gz", 0).append([transcript()])
    assert not (tmp_path / "none.gz").exists()


def test_a_disk_that_is_full_is_one_line_and_what_was_kept_is_whole(tmp_path, monkeypatch):
    whole = written(tmp_path / "t.gz")
    kept = Transcripts(tmp_path / "t.gz")
    kept.forget(lambda place: True)
    monkeypatch.setattr("ramet.agents.transcripts._put", lambda file, data: file.write(data[:5]) and _no_space())
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device; free space and run again"):
        kept.append([transcript(4)])
    assert (tmp_path / "t.gz").read_bytes() == whole


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_references_and_values_of_other_types_are_kept_as_json_has_them_or_as_their_description(tmp_path):
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for given_, kept in (
        ({(1, 2): 3}, {"1,2": 3}), ((1, Status.EMPTY), [1, "empty"]), (one, repr(one)), (b"\xff", repr(b"\xff")), (cyclic, "[[...]]"),
        (ToolResult(ToolStatus.DONE, "x"), {"status": "done", "text": "x"}),
    ):  # fmt: skip
        read_again = Transcript.of(json.loads(json.dumps(replace(transcript(tree=one(value=given_)), reference=given_).record())))
        assert read_again.reference == read_again.tree.value == kept
