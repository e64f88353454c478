"""The transformers backend: same tokens as the plain model, whatever the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import anyio
import pytest
import torch
import transformers

from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import StopReason
from ramet.errors import PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.engines.sampler import truncate
from ramet.policy.training.rows import token_logprobs

pytestmark = pytest.mark.anyio


def requests(count: int, seed: int = 0, temperature: float = 1.0, longest: int = 60) -> list[SampleRequest]:
    rng = random.Random(seed)
    return [
        SampleRequest(
            tuple(rng.randrange(9, 200) for _ in range(rng.randint(1, longest))),
            rng.randint(1, 40),
            frozenset({2}),
            seed=i,
            sampling=Sampling(temperature),
        )
        for i in range(count)
    ]


async def sample_all(policy: HFPolicy, wanted: list[SampleRequest], stagger: bool = False) -> list[Sample]:
    results: dict[int, Sample] = {}

    async def one(i: int, request: SampleRequest) -> None:
        if stagger:
            for _ in range(i % 17):
                await anyio.lowlevel.checkpoint()
        results[i] = await policy.sample(request, Partial())

    async with anyio.create_task_group() as group:
        for i, request in enumerate(wanted):
            group.start_soon(one, i, request)
    return [results[i] for i in range(len(wanted))]


def slow_reference(model: torch.nn.Module, request: SampleRequest) -> tuple[list[int], list[float]]:
    """One request by itself, the whole context recomputed in float64 at every token."""
    from ramet.policy.engines.sampler import _draws

    model = model.double()
    ids, logprobs, draws = list(request.prompt), [], _draws(request.seed)
    with torch.no_grad():
        for _ in range(request.max_tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            temperature = request.sampling.temperature
            if temperature == 0:
                token, logprob = int(logits.argmax()), 0.0
            else:
                p = torch.log_softmax(logits / temperature, -1)
                token = int(torch.searchsorted(p.exp().cumsum(-1), torch.tensor(next(draws), dtype=torch.float64), right=True))
                logprob = float(p[token])
            ids.append(token)
            logprobs.append(logprob)
            if token in request.stop_ids:
                break
    return ids[len(request.prompt) :], logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_equals_the_plain_model(random_model, temperature):
    import copy

    wanted = requests(24, temperature=temperature)
    async with HFPolicy(random_model, max_batch=8) as policy:
        got = await sample_all(policy, wanted)
    exact = copy.deepcopy(random_model)
    for request, sample in zip(wanted, got, strict=True):
        ids, logprobs = slow_reference(exact, request)
        assert list(sample.ids) == ids
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert sample.stop is (StopReason.END if ids[-1] == 2 else StopReason.LENGTH)


async def test_tokens_do_not_depend_on_batch_mates(random_model):
    wanted = requests(40, seed=3)
    results = []
    for batch, stagger in ((1, False), (5, True), (40, False)):
        async with HFPolicy(random_model, max_batch=batch) as policy:
            results.append([s.ids for s in await sample_all(policy, wanted, stagger)])
    assert results[0] == results[1] == results[2]


async def test_prefixes_are_reused_by_later_turns_and_by_siblings(random_model):
    rng = random.Random(1)
    shared = tuple(rng.randrange(9, 200) for _ in range(100))
    siblings = [SampleRequest((*shared, 20 + i, 30 + i), 10, frozenset(), seed=i) for i in range(6)]
    async with HFPolicy(random_model) as policy:
        first = await sample_all(policy, siblings)
        assert sum(s.prefilled for s in first) <= 102 + 5 * 2
        assert sum(s.cached for s in first) == 5 * 100
        later = SampleRequest((*siblings[2].prompt, *first[2].ids, 50, 51), 10, frozenset(), seed=9)
        (again,) = await sample_all(policy, [later])
        assert again.prefilled == 3  # the last sampled token was never fed back, and two are new
    async with HFPolicy(random_model, prefix_bytes=0) as policy:
        (fresh,) = await sample_all(policy, [later])
        assert fresh.ids == again.ids and fresh.cached == 0


async def test_logprobs_are_those_of_training(random_model):
    wanted = requests(8, seed=5, temperature=0.8)
    async with HFPolicy(random_model) as policy:
        got = await sample_all(policy, wanted)
    for request, sample in zip(wanted, got, strict=True):
        ids = torch.tensor([[*request.prompt, *sample.ids]])
        with torch.no_grad():
            logprobs, _, _ = token_logprobs(random_model, ids, temperature=0.8)
        assert sample.logprobs == pytest.approx(logprobs[0, len(request.prompt) :].tolist(), abs=1e-4)


async def test_bfloat16_gives_finite_logprobs_close_to_float32(random_model):
    import copy

    wanted = requests(8, seed=2)
    async with HFPolicy(copy.deepcopy(random_model).bfloat16()) as policy:
        got = await sample_all(policy, wanted)
    for request, sample in zip(wanted, got, strict=True):
        ids = torch.tensor([[*request.prompt, *sample.ids]])
        with torch.no_grad():
            logprobs, _, _ = token_logprobs(random_model, ids)
        assert sample.logprobs == pytest.approx(logprobs[0, len(request.prompt) :].tolist(), abs=0.3)


async def test_cancelling_frees_the_slot_and_tells_what_was_generated(random_model):
    partial = Partial()
    async with HFPolicy(random_model, max_batch=1) as policy:
        async with anyio.create_task_group() as group:
            group.start_soon(policy.sample, SampleRequest((9, 10, 11), 400, frozenset()), partial)
            while len(partial.ids) < 5:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        count = len(partial.ids)
        sample = await policy.sample(SampleRequest((9, 10), 3, frozenset()), Partial())
        assert len(sample.ids) == 3 and len(partial.ids) == count < 400


async def test_requests_that_cannot_be_served_are_refused_by_name(random_model):
    async with HFPolicy(random_model) as policy:
        with pytest.raises(PolicyError, match="exceed the context of 512"):
            await policy.sample(SampleRequest((9,) * 500, 20, frozenset()), Partial())
        with pytest.raises(PolicyError, match="no vision"):
            await policy.sample(SampleRequest((9,), 2, frozenset(), media=("clip",)), Partial())
    with pytest.raises(PolicyError, match="not serving"):
        await policy.sample(SampleRequest((9,), 2, frozenset()), Partial())


async def test_broken_weights_are_an_error_and_not_a_token(random_model):
    import copy

    broken = copy.deepcopy(random_model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    async with HFPolicy(broken) as policy:
        with pytest.raises(PolicyError, match="not finite"):
            await policy.sample(SampleRequest((9,), 2, frozenset()), Partial())


async def test_a_failing_forward_fails_all_who_wait_and_the_engine_goes_on(random_model, monkeypatch):
    wanted = requests(12, seed=4, longest=400)
    async with HFPolicy(random_model, max_batch=16) as policy:
        calls = 0
        real = policy._forward

        def breaking(*arguments):
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("")
            return real(*arguments)

        monkeypatch.setattr(policy, "_forward", breaking)
        failed = 0

        async def one(request: SampleRequest) -> None:
            nonlocal failed
            try:
                await policy.sample(request, Partial())
            except PolicyError as error:
                assert "RuntimeError" in str(error)
                failed += 1

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for request in wanted:
                    group.start_soon(one, request)
        assert failed == len(wanted)
        assert len((await policy.sample(wanted[0], Partial())).ids) >= 1


async def test_closing_the_policy_wakes_those_who_wait(random_model):
    policy = HFPolicy(random_model)
    outcome: list[str] = []

    async def late() -> None:
        try:
            await policy.sample(SampleRequest((9, 10), 400, frozenset()), Partial())
        except PolicyError as error:
            outcome.append(str(error))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            async with policy:
                group.start_soon(late)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
    assert outcome == ["the policy was closed"]


async def test_padding_of_batch_mates_does_not_leave_the_context(random_model):
    rng = random.Random(0)
    long = tuple(rng.randrange(9, 200) for _ in range(480))
    async with HFPolicy(random_model) as policy:
        (first,) = await sample_all(policy, [SampleRequest(long, 8, frozenset(), seed=1)])
        again = SampleRequest((*long, *first.ids), 8, frozenset(), seed=2)
        fresh = SampleRequest(tuple(reversed(long)), 8, frozenset(), seed=3)
        together = await sample_all(policy, [again, fresh])
    async with HFPolicy(random_model, prefix_bytes=0) as policy:
        apart = [await policy.sample(request, Partial()) for request in (again, fresh)]
    assert [s.ids for s in together] == [s.ids for s in apart]


@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma3TextConfig"])
def test_models_without_full_attention_are_refused_by_name(kind):
    config = getattr(transformers, kind)(
        hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=32
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(PolicyError, match="sliding_attention layers; the transformers backend serves full attention only"):
        HFPolicy(model)


def tiny(kind: str, **given: object) -> torch.nn.Module:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, kind)(**shape | {"max_position_embeddings": 128} | given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=given.get("attention", "sdpa")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    return model


def small(lengths: Sequence[int]) -> list[SampleRequest]:
    rng = random.Random(0)
    return [SampleRequest(tuple(rng.randrange(2, 64) for _ in range(n)), 8, frozenset(), i, Sampling(1.0)) for i, n in enumerate(lengths)]


def assert_exact(model: torch.nn.Module, wanted: Sequence[SampleRequest], got: Sequence[Sample]) -> None:
    """The log-probabilities are those of the model's own pass over each row alone."""
    for request, sample in zip(wanted, got, strict=True):
        with torch.no_grad():
            logprobs, _, _ = token_logprobs(model, torch.tensor([[*request.prompt, *sample.ids]]))
        assert sample.logprobs == pytest.approx(logprobs[0, len(request.prompt) :].tolist(), abs=1e-4)


LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), [("DeepseekV2Config", {"q_lora_rank": None, "qk_rope_head_dim": 4}),
                                             ("DeepseekV3Config", {"q_lora_rank": 16, "qk_rope_head_dim": 8})])  # fmt: skip
async def test_latent_attention_is_served(kind, given):
    """Its values are of another size than its keys; stored prefixes too."""
    model = tiny(kind, **LATENT | given)
    wanted = small([3, 9, 40, 41])
    async with HFPolicy(model) as policy:
        got = await sample_all(policy, wanted)
        later = SampleRequest((*wanted[2].prompt, *got[2].ids, 5, 6), 8, frozenset(), 9, Sampling(1.0))
        (again,) = await sample_all(policy, [later])
    assert again.cached >= 40
    assert_exact(model, [*wanted, later], [*got, again])


async def test_rows_do_not_depend_on_longer_ones_where_angles_change_with_the_length():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 48}
    model = tiny("Phi3Config", pad_token_id=0, rope_parameters={"rope_theta": 10000.0, **rope}, original_max_position_embeddings=48)
    wanted = small([3, 9, 40])
    async with HFPolicy(model) as policy:
        assert policy.context == 48
        assert_exact(model, wanted, await sample_all(policy, wanted))
        with pytest.raises(PolicyError, match="exceed the context of 48"):
            await policy.sample(small([45])[0], Partial())
    with pytest.raises(PolicyError, match="context 2 to 48"):
        HFPolicy(model, context=100)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("BloomConfig", {"n_layer": 1, "n_head": 4, "attention": "eager"}),
        ("MptConfig", {"d_model": 32, "n_layers": 1, "n_heads": 4, "attention": "eager"}),
        ("FalconConfig", {"alibi": True}),
    ],
)
def test_attention_by_distance_is_refused_by_name_before_anything_is_sampled(kind, given):
    with pytest.raises(PolicyError, match=rf"{kind.removesuffix('Config')}ForCausalLM uses ALiBi"):
        HFPolicy(tiny(kind, **given))


@pytest.mark.parametrize("deaf", ["positions", "mask", "cache"])
def test_a_model_that_goes_its_own_way_is_refused_before_anything_is_sampled(random_model, monkeypatch, deaf):
    real = random_model.forward

    def forward(**inputs):
        if deaf == "cache" and "past_key_values" in inputs:
            raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")
        if deaf == "positions" and "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] * 2
        if deaf == "mask" and inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        return real(**inputs)

    monkeypatch.setattr(random_model, "forward", forward)
    with pytest.raises(PolicyError, match=r"cannot serve LlamaForCausalLM: (it ignores some|forward\(\) got).*choose another backend"):
        HFPolicy(random_model)


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"prefix_bytes": -1}, {"context": 1}, {"context": 513}])
def test_settings_under_which_nothing_could_be_sampled_are_refused(random_model, wrong):
    with pytest.raises(PolicyError, match="max_batch must be 1 or more, context 2 to 512"):
        HFPolicy(random_model, **wrong)


async def test_a_long_prompt_is_read_in_pieces(random_model, monkeypatch):
    """So the mask grows with its length, not with the square of it."""
    monkeypatch.setattr("ramet.policy.engines.hf.PREFILL_TOKENS", 64)
    rng = random.Random(0)
    wanted = [
        SampleRequest(tuple(rng.randrange(9, 200) for _ in range(n)), 4, frozenset(), i, Sampling(1.0)) for i, n in enumerate((450, 64, 5))
    ]
    masks = []
    with monkeypatch.context() as patched:
        real = random_model.forward

        def forward(**inputs):
            masks.append(inputs["attention_mask"].numel() if inputs.get("attention_mask") is not None else 0)
            return real(**inputs)

        patched.setattr(random_model, "forward", forward)
        async with HFPolicy(random_model) as policy:
            got = await sample_all(policy, wanted)
    assert max(masks) <= 64 * 450 and [sample.prefilled for sample in got] == [450, 64, 5]
    assert_exact(random_model, wanted, got)


def test_evicting_a_prefix_leaves_the_others_reachable():
    from ramet.policy.engines.kv import PrefixStore

    def memory(n: int) -> list[torch.Tensor]:
        return [torch.zeros(n, dtype=torch.uint8)]

    shared = tuple(range(16))
    a, b, c = (*shared, *[100] * 16), (*shared, *[200] * 16), tuple(range(300, 332))
    store = PrefixStore(64)
    store.add(a, memory(32))
    store.add(b, memory(32))
    assert store.find(a)[0] == 32
    store.add(c, memory(32))  # b is now the least recently used
    assert store.find(a)[0] == 32 and store.find(b)[0] == 16 and store.find(c)[0] == 32


def test_truncation_keeps_what_it_says_and_normalises():
    logprobs = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert truncate(logprobs, [Sampling(top_k=2)]).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncate(logprobs, [Sampling(top_p=0.81)]).exp()[0].tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert truncate(logprobs, [Sampling(top_p=1e-9)]).exp()[0].tolist() == pytest.approx([1, 0, 0, 0])
