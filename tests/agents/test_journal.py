"""The journal: a crash at any byte leaves a readable prefix, and everything else is refused."""

from __future__ import annotations

import errno
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet.agents.journal import Journal, fingerprint
from ramet.errors import CheckpointError, StorageError

RECORDS = [{"n": i, "text": "é\n" * i, "nested": {"x": [1, 2.5, None]}} for i in range(6)]


def written(path, records=RECORDS) -> bytes:
    with Journal(path, "job") as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_what_is_appended_is_read_back(tmp_path):
    written(tmp_path / "j")
    with Journal(tmp_path / "j", "job") as journal:
        assert list(journal) == RECORDS


def test_a_crash_at_every_byte_leaves_a_prefix_that_goes_on(tmp_path):
    whole = written(tmp_path / "whole")
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        with Journal(path, "job") as journal:
            kept = list(journal)
            assert kept == RECORDS[: len(kept)]
            for record in RECORDS[len(kept) :]:
                journal.append(record)
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_refused_by_line(tmp_path):
    whole = bytearray(written(tmp_path / "j"))
    lines = bytes(whole).splitlines(keepends=True)
    at = len(lines[0]) + len(lines[1]) + 12
    whole[at] ^= 1
    (tmp_path / "j").write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="damaged at line 3; move it away"):
        Journal(tmp_path / "j", "job")


def test_another_jobs_journal_is_refused_and_left_alone(tmp_path):
    before = written(tmp_path / "j")
    with pytest.raises(CheckpointError, match="another configuration or version"):
        Journal(tmp_path / "j", "other")
    assert (tmp_path / "j").read_bytes() == before


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    with Journal(tmp_path / "j", "job") as journal:
        journal.append(RECORDS[1])
        real = journal._file

        class Full:
            def write(self, data: bytes) -> int:
                real.write(data[:7])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(real, name)

        journal._file = Full()
        with pytest.raises(StorageError, match="No space left on device; free space"):
            journal.append(RECORDS[2])
        journal._file = real
        journal.append(RECORDS[3])
    with Journal(tmp_path / "j", "job") as journal:
        assert list(journal) == [RECORDS[1], RECORDS[3]]


def test_fingerprints_tell_configurations_apart():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_journal_is_a_prefix_or_refused(data, tmp_path):
    whole = bytearray(written(tmp_path / "whole") if not (tmp_path / "whole").exists() else (tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        kind = data.draw(st.sampled_from(("cut", "flip", "insert", "drop")))
        if kind == "cut":
            del whole[at:]
        elif kind == "flip" and at < len(whole):
            whole[at] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            del whole[at : at + 7]
    path = tmp_path / "mangled"
    path.write_bytes(bytes(whole))
    try:
        with Journal(path, "job") as journal:
            assert list(journal) == RECORDS[: len(journal.records)]
    except CheckpointError:
        assert path.read_bytes() == bytes(whole)


def test_nesting_that_breaks_the_reader_is_damage(tmp_path):
    head = written(tmp_path / "j", [])
    body = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    line = b"%08x %b\n" % (zlib.crc32(body), body)
    (tmp_path / "j").write_bytes(head + line + line)
    with pytest.raises(CheckpointError, match="damaged at line 2"):
        Journal(tmp_path / "j", "job")


def test_errors_that_ended_a_run_are_not_replayed_for_ever(tmp_path):
    """A run that gave up asks again; one that was interrupted is given its failures with what they cost."""
    import anyio

    from ramet.agents.resume import JournaledPolicy
    from ramet.agents.sampling import Partial, Sample, SampleRequest
    from ramet.agents.tree import StopReason
    from ramet.errors import PolicyError, TransientPolicyError

    class Server:
        version, context, down = 0, None, 3

        async def sample(self, request, partial):
            if self.down:
                self.down -= 1
                partial.ids += [1]
                partial.logprobs += [0.0]
                raise PolicyError("404") if request.seed else TransientPolicyError("503", 0.0)
            return Sample((5,), (0.0,), StopReason.END)

    async def ask(policy, seed):
        partial = Partial()
        try:
            return (await policy.sample(SampleRequest((1,), 4, frozenset(), seed), partial)).ids
        except PolicyError as error:
            return f"{error} after {len(partial.ids)}"

    def run(name, down, seed, times):
        server = Server()
        server.down = down
        with Journal(tmp_path / f"{name}{seed}", "job") as journal:
            policy = JournaledPolicy(server, journal)

            async def main():
                return [await ask(policy, seed) for _ in range(times)]

            answers = anyio.run(main)
            if "give up" in name:
                policy.give_up()
            return answers, policy.replayed

    assert run("interrupted", 2, 0, 2) == (["503 after 1"] * 2, 0)
    assert run("interrupted", 0, 0, 3) == (["503 after 1", "503 after 1", (5,)], 2)
    for seed, error in ((0, "503"), (7, "404")):
        assert run("give up", 2, seed, 2) == ([f"{error} after 1"] * 2, 0)
        assert run("give up", 0, seed, 1) == ([(5,)], 0)
        assert run("give up", 0, seed, 1) == ([(5,)], 1), "what was sampled is kept"
