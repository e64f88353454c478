"""`ramet bench scaling`: the time of an update on 8 to 1,024 GPUs, by a model whose assumptions are in docs/scaling.md.

What a GPU does is computed from its data sheet. What the controller does is measured on this machine, on trees of the assumed
size: bytes and seconds of pickling a tree (which is how Ray carries it), of its journal record, of its rows.

New weights cost more than their bytes: for each piece that is sent every engine is called and all are awaited before the next. So
there is a time a piece, and a time a piece and engine (`TransferCost`), measured where Ray is installed, by what a run sends them with
(`ramet.policy.openrlhf.weights`): in buckets, and tensor by tensor, as OpenRLHF does by itself.
"""

from __future__ import annotations

import json
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ramet.agents.journal import Journal
from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn, price
from ramet.benchmarks.speed.cluster_sim import EngineHardware
from ramet.policy.openrlhf.cpu import Gloo
from ramet.policy.openrlhf.weights import Named, buckets, receive, send
from ramet.policy.training.rows import rows_of
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TREES = 40
"""Over so many trees the costs of one are measured."""


@dataclass(frozen=True)
class Assumptions:
    """The model, the trees and the machines.

    parameters   of the model; flops, bandwidth: of a GPU, a second; efficiency: share of flops that training reaches
    node, nodes  bytes a second of a GPU within a node and between nodes
    prompt, tokens, clones   of a tree: tokens of a branch's prompt, sampled tokens of a branch, clones
    longest      sampled tokens of an update's longest chain
    micro_batch  tokens of a trainer's batch
    tensors      of the model; buckets: in which they are sent
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
    buckets: int = 30


@dataclass(frozen=True)
class TransferCost:
    """Seconds that a piece of the weights takes besides its bytes: by itself, and for each engine. The defaults: docs/scaling.md."""

    piece: float = 0.0019
    engine: float = 0.0008


@dataclass(frozen=True)
class WeightTransfer:
    """Weights of so many bytes to so many engines, by gloo on this machine: pieces, and seconds of the median of several times."""

    engines: int
    tensors: int
    bytes: int
    pieces: int
    seconds: float


@dataclass(frozen=True)
class TreeCosts:
    """Of one tree, on this machine: bytes that Ray carries, bytes of the journal, seconds of the controller.

    carry_seconds  from an actor of Ray to the controller; only to unpickle it, where Ray is not installed
    """

    carried: int
    journal: int
    carry_seconds: float
    journal_seconds: float
    rows_seconds: float
    sending: TransferCost = TransferCost()
    sent: tuple[WeightTransfer, ...] = ()

    @property
    def controller_seconds(self) -> float:
        """Seconds that the controller needs for one tree."""
        return self.carry_seconds + self.journal_seconds + self.rows_seconds


def tree_of(assumed: Assumptions, seed: int) -> Tree:
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


def measure_tree(assumed: Assumptions, seed: int) -> TreeCosts:
    """The costs of one tree, the median over `TREES` trees."""
    trees = [tree_of(assumed, seed + n) for n in range(TREES)]
    sent = tuple(_transfers())
    pickled = [pickle.dumps(tree, protocol=5) for tree in trees]
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl", "job") as journal:

        def write(tree: Tree) -> None:
            journal.append({"group": 0, "number": 0, "tree": json.dumps(tree.record())}, keep=False)

        journal_seconds = _median(write, trees)
        size = journal.path.stat().st_size // TREES
    return TreeCosts(
        int(np.median([len(p) for p in pickled])), size, _carried(trees) or _median(pickle.loads, pickled), journal_seconds,
        _median(lambda tree: rows_of(tree, [0.1] * len(tree.branches), 1.0), trees), transfer_cost(sent) if sent else TransferCost(), sent,
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


def _transfers() -> list[WeightTransfer]:
    """Weights to so many of Ray's actors, tensor by tensor and in buckets; nothing without Ray."""
    try:
        import ray
    except ImportError:
        return []
    engines, tensors, numel, repeats = (1, 2, 4), 256, 2**16, 5
    weights = [(f"model.layers.{n}.mlp.up_proj.weight", torch.rand(numel)) for n in range(tensors)]
    total = tensors * numel * 4
    # So that 64 MiB are a few buckets, as a model of 8 GB is.
    cut = {size: buckets(weights, size) for size in (0, total // 4)}
    ray.init(num_cpus=max(engines), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        transfers = []
        for number in engines:
            actors, group = _receivers(number)

            def update(parts: list[Named], group: Gloo = group, actors: list[Any] = actors) -> None:
                for index, part in enumerate(parts, 1):
                    send(part, index == len(parts), group, actors)

            update(cut[0])
            transfers += [WeightTransfer(number, tensors, total, len(parts), _median(update, [parts] * repeats)) for parts in cut.values()]
            for actor in actors:
                ray.kill(actor)
        return transfers
    finally:
        ray.shutdown()


def _receivers(number: int) -> tuple[list[Any], Gloo]:
    """Actors that take weights as an engine's worker does, but have no model to put them into; and the group with them."""
    import ray

    class Receiver:
        def connect(self, port: int, rank: int, world: int) -> None:
            self._group = Gloo("127.0.0.1", port, rank, world)

        def update_bucket(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, last: bool) -> None:
            receive(names, shapes, dtype, self._group, "cpu")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    actors = [ray.remote(Receiver).remote() for _ in range(number)]
    refs = [actor.connect.remote(port, rank, number + 1) for rank, actor in enumerate(actors, 1)]
    group = Gloo("127.0.0.1", port, 0, number + 1)
    ray.get(refs)
    return actors, group


def transfer_cost(sent: Sequence[WeightTransfer]) -> TransferCost:
    """What a piece costs besides its bytes: from the same bytes in many pieces and in few, by a line through the numbers of engines."""
    by = {(s.engines, s.pieces): s for s in sent}
    many, few = max(s.pieces for s in sent), min(s.pieces for s in sent)
    engines = sorted({s.engines for s in sent})
    slope, start = np.polyfit(engines, [(by[n, many].seconds - by[n, few].seconds) / (many - few) for n in engines], 1)
    return TransferCost(max(float(start), 0.0), max(float(slope), 0.0))


def _median(call: Callable[[Any], object], arguments: list[Any]) -> float:
    seconds = []
    for argument in arguments:
        started = time.perf_counter()
        call(argument)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


@dataclass(frozen=True)
class UpdateEstimate:
    """An update on so many GPUs. `limit` names what takes longest.

    staleness  0: sample, train, sample, which is the default of a run; 1: the next update is sampled meanwhile
    syncing    seconds of sending the weights in buckets; unbucketed: of sending them tensor by tensor, which is what OpenRLHF does
    """

    gpus: int
    engines: int
    trainers: int
    trees: int
    staleness: int
    sampling: float
    training: float
    syncing: float
    unbucketed: float
    controller: float
    limit: str

    @property
    def seconds(self) -> float:
        """Seconds of the whole update."""
        sampled = max(self.sampling, self.controller)  # trees are received as they come
        return self.syncing + (max(sampled, self.training) if self.staleness else sampled + self.training)


def estimate(
    gpus: int, trees: int, assumed: Assumptions, hardware: EngineHardware, measured: TreeCosts, staleness: int = 0
) -> UpdateEstimate:
    """The estimate for the split into engines and trainers with the shortest update."""
    shares = sorted({max(1, round(gpus * share)) for share in np.arange(0.1, 0.91, 0.05)})
    return min((_split(gpus, e, trees, staleness, assumed, hardware, measured) for e in shares if 0 < e < gpus), key=_slower)


def _slower(point: UpdateEstimate) -> tuple[float, float]:
    """Sort key: the time of an update; of equal ones, the one whose halves take more similar times comes first."""
    return round(point.seconds, 2), abs(point.sampling - point.training)


def _split(
    gpus: int, engines: int, trees: int, staleness: int, a: Assumptions, hardware: EngineHardware, measured: TreeCosts
) -> UpdateEstimate:
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
    syncing, unbucketed = (sending(pieces, engines, gpus, a, measured.sending) for pieces in (a.buckets, a.tensors))
    limits = {"sample": sampling, "train": compute, "exchange": exchange, "control": controller, "weights": syncing}
    limit = max(limits, key=lambda name: limits[name])
    return UpdateEstimate(gpus, engines, trainers, trees, staleness, sampling, training, syncing, unbucketed, controller, limit)


def sending(pieces: int, engines: int, gpus: int, a: Assumptions, cost: TransferCost) -> float:
    """Seconds until every engine has the weights."""
    return pieces * (cost.piece + engines * cost.engine) + 2 * a.parameters / (a.node if gpus <= 8 else a.nodes)


def bench_scaling(trees: int, fixed: bool, seed: int, out: Path | None) -> None:
    """`ramet bench scaling`: measure one tree, estimate an update for each number of GPUs, print and write the records."""
    started = time.perf_counter()
    assumed, hardware = Assumptions(), EngineHardware()
    measured = measure_tree(assumed, seed)
    branches = 1 + assumed.clones
    show(
        f"measured here, of a tree of {branches} branches of {assumed.prompt} and {assumed.tokens} tokens: "
        f"{measured.carried / 1024:.0f} KiB by Ray, {measured.journal / 1024:.0f} KiB of journal; controller "
        f"{1000 * measured.carry_seconds:.2f} ms to receive, {1000 * measured.journal_seconds:.2f} ms to journal, "
        f"{1000 * measured.rows_seconds:.2f} ms for rows; a piece of the weights {1000 * measured.sending.piece:.2f} ms and "
        f"{1000 * measured.sending.engine:.2f} ms for each engine"
    )
    for transfer in measured.sent:
        show(
            f"measured here: {transfer.bytes / 2**20:.0f} MiB as {transfer.pieces} pieces to {transfer.engines} engines: "
            f"{transfer.seconds:.3f} s"
        )
    estimates = [
        estimate(gpus, trees if fixed else trees * gpus // 8, assumed, hardware, measured, staleness)
        for staleness in (0, 1)
        for gpus in GPUS
    ]
    title = "seconds of an update, by openrlhf.staleness; engines + trainers; weights in buckets (tensor by tensor)"
    shown = Table(
        "staleness", "GPUs", "split", "trees", "sample", "train", "control", "weights", "update", "tokens/s", "limit", title=title
    )
    for column in shown.columns[:-1]:
        column.justify = "right"
    records = []
    for p in estimates:
        rate = p.trees * branches * assumed.tokens / p.seconds
        shown.add_row(
            str(p.staleness), str(p.gpus), f"{p.engines}+{p.trainers}", f"{p.trees:,}", f"{p.sampling:.1f}", f"{p.training:.1f}",
            f"{p.controller:.1f}", f"{p.syncing:.1f} ({p.unbucketed:.1f})", f"{p.seconds:.1f}", f"{rate:,.0f}", p.limit,
        )  # fmt: skip
        traffic = {"ray_bytes": p.trees * measured.carried, "journal_bytes_per_second": p.trees * measured.journal / p.seconds}
        records.append({"record": "scaling", **asdict(p), "seconds": p.seconds, "tokens_per_second": rate, **traffic})
    if out is not None:
        sending_ = {f"sending_{name}_seconds": value for name, value in asdict(measured.sending).items()}
        carried = {name: value for name, value in asdict(measured).items() if name not in ("sending", "sent")}
        inputs = {"record": "inputs", **asdict(assumed), **asdict(hardware), **carried, **sending_}
        sent = [{"record": "sent", **asdict(transfer)} for transfer in measured.sent]
        write_json(out, [meta("bench scaling", seed, time.perf_counter() - started), inputs, *sent, *records])
    show(shown)
