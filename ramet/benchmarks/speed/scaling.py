"""`ramet bench scaling`: an update on 8 to 1,024 GPUs, by a model. docs/scaling.md says what it assumes.

What a GPU does is computed from its data sheet. What the controller does is measured on this machine, on trees of the assumed
size: bytes and seconds of pickling a tree (which is how Ray carries it), of its journal record, of its rows.

New weights cost more than their bytes: OpenRLHF sends them tensor by tensor, for each tensor calls every engine, one after another, and
waits for all before the next. So there is a time a tensor, and a time a tensor and engine (`Sending`), measured where Ray is
installed.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramet.agents.journal import Journal
from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn, price
from ramet.benchmarks.speed.cluster_sim import Hardware
from ramet.policy.training.rows import rows_of
from ramet.policy.training.runlog import STORED
from ramet.storage import meta, write_json
from ramet.terminal import Table, console

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Assumed:
    """The model, the trees and the machines.

    parameters   of the model; flops, bandwidth: of a GPU, a second; efficiency: share of flops that training reaches
    node, nodes  bytes a second of a GPU within a node and between nodes
    prompt, tokens, clones   of a tree: tokens of a branch's prompt, sampled tokens of a branch, clones
    longest      sampled tokens of an update's longest chain
    micro_batch  tokens of a trainer's batch
    tensors      of the model, each sent by itself; bucket: bytes, were they sent in pieces of that size
    """

    parameters: float = 4.02e9
    flops: float = 989e12
    efficiency: float = 0.35
    node: float = 400e9
    nodes: float = 50e9
    prompt: int = 1300
    tokens: int = 300
    clones: int = 4
    longest: int = 2048
    micro_batch: int = 8192
    tensors: int = 398
    bucket: float = 2**28


@dataclass(frozen=True)
class Sending:
    """Seconds that a piece of the weights takes besides its bytes: by itself, and for each engine. The defaults: docs/scaling.md."""

    piece: float = 0.0003
    engine: float = 0.0008


@dataclass(frozen=True)
class Measured:
    """Of one tree, on this machine: bytes that Ray carries, bytes of the journal, seconds of the controller.

    carry_seconds  from an actor of Ray to the controller; only to unpickle it, where Ray is not installed
    """

    carried: int
    journal: int
    carry_seconds: float
    journal_seconds: float
    rows_seconds: float
    sending: Sending = Sending()

    @property
    def controller_seconds(self) -> float:
        return self.carry_seconds + self.journal_seconds + self.rows_seconds


def tree_of(assumed: Assumed, seed: int) -> Tree:
    """A tree of the assumed size."""
    rng = np.random.default_rng(seed)

    def turn(tokens: int, clones: tuple[Branch, ...] = ()) -> Turn:
        logprobs = tuple(-rng.exponential(0.3, tokens))
        return Turn(ids(tokens), tuple(map(float, logprobs)), StopReason.END, appended=ids(40) if clones else (), clones=clones)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(0, 150_000, count)))

    clones = tuple(
        Branch(f"0.{n}", ids(assumed.prompt), (turn(assumed.tokens),), Status.ANSWERED, "an answer") for n in range(assumed.clones)
    )
    root = Branch("0", ids(assumed.prompt), (turn(assumed.tokens // 2, clones), turn(assumed.tokens // 2)), Status.ANSWERED, "an answer")
    return Tree("task", root, price(root))


def measure(assumed: Assumed, seed: int, count: int = 40) -> Measured:
    """The median over `count` trees."""
    trees = [tree_of(assumed, seed + n) for n in range(count)]
    pickled = [pickle.dumps(tree, protocol=5) for tree in trees]
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl", "job") as journal:

        def write(tree: Tree) -> None:
            journal.append({"group": 0, "number": 0, "tree": STORED.dump_json(tree).decode()}, keep=False)

        journal_seconds = _median(write, trees)
        size = journal.path.stat().st_size // count
    return Measured(
        int(np.median([len(p) for p in pickled])), size, _carried(trees) or _median(pickle.loads, pickled), journal_seconds,
        _median(lambda tree: rows_of(tree, [0.1] * len(tree.branches), 1.0), trees), _sent() or Sending(),
    )  # fmt: skip


def _carried(trees: list[Tree]) -> float | None:
    """Seconds of a tree from one of Ray's actors to this process, in batches as they come in a run; None without Ray."""
    try:
        import ray
    except ImportError:
        return None

    class Holder:
        def __init__(self, trees: list[Tree]) -> None:
            self._trees = trees

        def tree(self, number: int) -> Tree:
            return self._trees[number % len(self._trees)]

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        holder = ray.remote(Holder).remote(trees)
        ray.get([holder.tree.remote(n) for n in range(50)])
        return _median(lambda batch: ray.get([holder.tree.remote(n) for n in batch]), [range(100)] * 5) / 100
    finally:
        ray.shutdown()


def _sent(engines: Sequence[int] = (1, 2, 4, 8), count: int = 50) -> Sending | None:
    """From calls to so many of Ray's actors at once, each awaited before the next, as OpenRLHF does for a tensor; None without Ray."""
    try:
        import ray
    except ImportError:
        return None

    class Engine:
        def update_weight(self, name: str, shape: tuple[int, ...]) -> None:
            pass

    ray.init(num_cpus=max(engines), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(Engine).remote() for _ in range(max(engines))]

        def send(number: int) -> None:
            ray.get([actor.update_weight.remote("model.layers.0.mlp.up_proj.weight", (4, 4)) for actor in actors[:number]])

        send(max(engines))
        seconds = [_median(send, [number] * count) for number in engines]
    finally:
        ray.shutdown()
    slope, start = np.polyfit(engines, seconds, 1)
    return Sending(max(float(start), 0.0), float(slope))


def _median(call: Callable[[Any], object], arguments: list[Any]) -> float:
    found = []
    for argument in arguments:
        started = time.perf_counter()
        call(argument)
        found.append(time.perf_counter() - started)
    return float(np.median(found))


@dataclass(frozen=True)
class Point:
    """An update on so many GPUs. `limit` names what takes longest.

    staleness  0: sample, train, sample, which is the default of a run; 1: the next update is sampled meanwhile
    syncing    seconds of sending the weights tensor by tensor; bucketed: in pieces of `Assumed.bucket` bytes, which is not implemented
    """

    gpus: int
    engines: int
    trainers: int
    trees: int
    staleness: int
    sampling: float
    training: float
    syncing: float
    bucketed: float
    controller: float
    limit: str

    @property
    def seconds(self) -> float:
        sampled = max(self.sampling, self.controller)  # trees are received as they come
        return self.syncing + (max(sampled, self.training) if self.staleness else sampled + self.training)


def point(gpus: int, trees: int, assumed: Assumed, hardware: Hardware, measured: Measured, staleness: int = 0) -> Point:
    """The split into engines and trainers for which an update takes least."""
    shares = sorted({max(1, round(gpus * share)) for share in np.arange(0.1, 0.91, 0.05)})
    return min((_split(gpus, e, trees, staleness, assumed, hardware, measured) for e in shares if 0 < e < gpus), key=_slower)


def _slower(point: Point) -> tuple[float, float]:
    """Of two that take as long, the one whose halves are nearer to one another comes first."""
    return round(point.seconds, 2), abs(point.sampling - point.training)


def _split(gpus: int, engines: int, trees: int, staleness: int, a: Assumed, hardware: Hardware, measured: Measured) -> Point:
    trainers, branches = gpus - engines, 1 + a.clones
    generated, read = trees * branches * a.tokens, trees * branches * a.prompt
    rows = min(hardware.batch, max(1.0, trees * branches / engines / 2))
    step = hardware.step + rows * hardware.row_step
    # All engines together, but never sooner than the longest chain by itself.
    sampling = max(generated / engines * step / rows + read / engines / hardware.prefill, a.longest * step)
    trained = generated + read
    compute = 8 * a.parameters * trained / (trainers * a.flops * a.efficiency)
    wire = a.node if trainers <= 8 else a.nodes
    exchange = 3 * 2 * a.parameters / wire * max(1.0, trained / trainers / a.micro_batch)
    training = max(compute, exchange)
    controller = trees * measured.controller_seconds
    syncing, bucketed = (sending(pieces, engines, gpus, a, measured.sending) for pieces in (a.tensors, -int(-2 * a.parameters // a.bucket)))
    limits = {"sample": sampling, "train": compute, "exchange": exchange, "control": controller, "weights": syncing}
    limit = max(limits, key=lambda name: limits[name])
    return Point(gpus, engines, trainers, trees, staleness, sampling, training, syncing, bucketed, controller, limit)


def sending(pieces: int, engines: int, gpus: int, a: Assumed, cost: Sending) -> float:
    """Seconds until every engine has the weights."""
    return pieces * (cost.piece + engines * cost.engine) + 2 * a.parameters / (a.node if gpus <= 8 else a.nodes)


def bench_scaling(trees: int, fixed: bool, seed: int, out: Path | None) -> None:
    """`ramet bench scaling`."""
    started = time.perf_counter()
    assumed, hardware = Assumed(), Hardware()
    measured = measure(assumed, seed)
    branches = 1 + assumed.clones
    console.print(
        f"measured here, of a tree of {branches} branches of {assumed.prompt} and {assumed.tokens} tokens: "
        f"{measured.carried / 1024:.0f} KiB by Ray, {measured.journal / 1024:.0f} KiB of journal; controller "
        f"{1000 * measured.carry_seconds:.2f} ms to receive, {1000 * measured.journal_seconds:.2f} ms to journal, "
        f"{1000 * measured.rows_seconds:.2f} ms for rows; a tensor of weights {1000 * measured.sending.piece:.2f} ms and "
        f"{1000 * measured.sending.engine:.2f} ms for each engine"
    )
    points = [
        point(gpus, trees if fixed else trees * gpus // 8, assumed, hardware, measured, staleness) for staleness in (0, 1) for gpus in GPUS
    ]
    title = "seconds of an update, by openrlhf.staleness; engines + trainers; weights tensor by tensor (in buckets)"
    shown = Table(
        "staleness", "GPUs", "split", "trees", "sample", "train", "control", "weights", "update", "tokens/s", "limit", title=title
    )
    for column in shown.columns[:-1]:
        column.justify = "right"
    records = []
    for p in points:
        rate = p.trees * branches * assumed.tokens / p.seconds
        shown.add_row(
            str(p.staleness), str(p.gpus), f"{p.engines}+{p.trainers}", f"{p.trees:,}", f"{p.sampling:.1f}", f"{p.training:.1f}",
            f"{p.controller:.1f}", f"{p.syncing:.1f} ({p.bucketed:.1f})", f"{p.seconds:.1f}", f"{rate:,.0f}", p.limit,
        )  # fmt: skip
        traffic = {"ray_bytes": p.trees * measured.carried, "journal_bytes_per_second": p.trees * measured.journal / p.seconds}
        records.append({"record": "scaling", **asdict(p), "seconds": p.seconds, "tokens_per_second": rate, **traffic})
    if out is not None:
        sending_ = {f"sending_{name}_seconds": value for name, value in asdict(measured.sending).items()}
        carried = {name: value for name, value in asdict(measured).items() if name != "sending"}
        inputs = {"record": "inputs", **asdict(assumed), **asdict(hardware), **carried, **sending_}
        write_json(out, [meta("bench scaling", seed, time.perf_counter() - started), inputs, *records])
    console.print(shown)
