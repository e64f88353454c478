"""Whole models: equal to dense where they must be, on every supported architecture and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ramet.attention.anchored import Selections
from ramet.attention.comm import RankGroup, simulated
from ramet.attention.hf import attach, extend, local_logits, prefill
from ramet.attention.methods import NAMES, Method
from ramet.errors import ConfigError

VOCABULARY = 61


def tiny(kind: str = "qwen2", heads: int = 4, kv_heads: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def dense(model: Any, sequence: list[int]) -> Tensor:
    """Logits of all rows, by the model's own attention."""
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([sequence])).logits[0]
    attach(model)
    return logits


def run(
    model: Any, method: Method, hosts: int, prompts: list[list[int]], query: list[int], more: list[list[list[int]]]
) -> list[list[Tensor]]:
    """Each rank's logits after the prompts and after each round of further tokens."""
    attach(model)

    def rank(group: RankGroup) -> list[Tensor]:
        sequences, logits = prefill(model, group, method, prompts, query)
        return [logits, *(extend(model, group, sequences, new, method) for new in more)]

    return simulated(hosts, rank)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_passing_everything_equals_dense(kind: str, hosts: int) -> None:
    """Query, decoding and chunked continuation, two sequences of different lengths in one batch."""
    model = tiny(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    prompts, more = [ids(1, 53), ids(2, 30)], [[[3], [5]], [[4], [6]], [[1, 2, 3], [7]]]
    ranks = run(model, Method("spava", anchor=5, passing=1000), hosts, prompts, [4, 7], more)
    for index, prompt in enumerate(prompts):
        whole = prompt + [token for new in more for token in new[index]]
        expected = dense(model, whole)
        ends = [len(prompt) - 1]
        for new in more:
            ends.append(ends[-1] + len(new[index]))
        for logits in ranks:
            for ours, end in zip(logits, ends, strict=True):
                assert (ours[index] - expected[end]).abs().amax() < 1e-5
    for logits in ranks[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(logits, ranks[0], strict=True)), "ranks differ"


@pytest.mark.parametrize("name", NAMES)
def test_exact_methods_are_exact_and_the_others_are_not(name: str) -> None:
    model, prompt = tiny(kv_heads=4), ids(3, 60)
    hosts = 1 if name == "dense" else 4
    method = Method(name, **({"anchor": 4, "passing": 2} if name in ("apb", "spava") else {}))  # type: ignore[arg-type]
    first, second = run(model, method, hosts, [prompt], [5], [[[7]]])[0]
    expected = dense(model, [*prompt, 7])
    error = max((first[0] - expected[-2]).abs().amax(), (second[0] - expected[-1]).abs().amax())
    assert error < 1e-5 if method.exact else 1e-3 < error < 10


@pytest.mark.parametrize("name", ["ring", "zigzag", "ulysses"])
def test_long_rows_can_be_trained(name: str) -> None:
    """Each rank's gradients of its own rows' loss sum to the dense gradients."""
    model, sequence = tiny(kv_heads=4), ids(4, 21)
    targets = torch.tensor(ids(5, 21))
    model.set_attn_implementation("eager")
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(input_ids=torch.tensor([sequence])).logits[0], targets, reduction="sum").backward()
    expected = [p.grad.clone() for p in model.parameters()]
    attach(model)
    method = Method(name)  # type: ignore[arg-type]

    def rank(group: RankGroup) -> list[Tensor]:
        rows = method.plan(20, 1, group.size).rows(group.rank)
        loss = torch.nn.functional.cross_entropy(local_logits(model, group, method, sequence), targets[rows], reduction="sum")
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for grads, theirs in zip(zip(*simulated(2, rank), strict=True), expected, strict=True):
        assert torch.allclose(sum(grads), theirs, atol=2e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("context", "hosts", "anchor", "passing"), [(0, 4, 0, 0), (3, 4, 1, 1), (40, 3, 0, 0), (40, 3, 6, 0)])
def test_short_and_bare_contexts(context: int, hosts: int, anchor: int, passing: int) -> None:
    model, prompt = tiny(), ids(6, context + 1)
    (logits, *_), *others = run(model, Method("spava", anchor, passing), hosts, [prompt], [1], [])
    assert logits.isfinite().all()
    if context < 4:
        assert (logits[0] - dense(model, prompt)[-1]).abs().amax() < (1e-5 if context == 0 else 10)
    assert all(torch.equal(other[0], logits) for other in others)


def test_cached_rows_sum_to_the_sequence_and_forks_share_it() -> None:
    model, prompt = tiny(), ids(7, 50)
    attach(model)
    method = Method("spava", 4, 3)

    def rank(group: RankGroup) -> tuple[int, int, Tensor, Tensor, bool]:
        sequences, _ = prefill(model, group, method, [prompt], [4])
        extend(model, group, sequences, [[9, 8, 7]])
        fork = sequences[0].fork(50)
        ours = extend(model, group, [fork], [[1, 2]])
        fresh, _ = prefill(model, group, method, [prompt], [4])
        theirs = extend(model, group, fresh, [[1, 2]])
        shared = fork.layers[0].keys.data_ptr() == sequences[0].layers[0].keys.data_ptr()
        return sequences[0].layers[1].rows, sequences[0].length, ours, theirs, shared

    results = simulated(4, rank)
    assert sum(rows for rows, *_ in results) == 53
    assert all(length == 53 and torch.equal(ours, theirs) and shared for _, length, ours, theirs, shared in results)


def test_selections_are_recorded_by_layer() -> None:
    model, prompt = tiny(), ids(8, 50)
    attach(model)
    selections = [[Selections() for _ in range(3)]]
    simulated(2, lambda group: prefill(model, group, Method("spava", 4, 3), [prompt], [4], selections=selections))
    assert all(set(layer.rows) == {0, 1, 2, 3} for layer in selections[0])


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("mistral", {"sliding_window": 16}, "a sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_attention"),
        ("gemma2", {}, "sliding_attention and attention soft caps"),
        ("gpt_oss", {}, "sliding_attention"),
        ("mamba", {}, "linear_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "dynamic NTK positions"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, more: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        attach(tiny(kind, **more))


GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2}
ROTARY = {"rotary_dim": 4, "n_positions": 512, **GPT}
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8, "head_dim": 4}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 3}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": False}),
        ("gptj", ROTARY),
        ("codegen", ROTARY),
        ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
        ("xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48}),
        ("diffllama", {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}),
        ("deepseek_v2", {"hidden_size": 32, **LATENT, **EXPERTS, "topk_method": "greedy"}),
        ("deepseek_v3", {"hidden_size": 32, **LATENT, **EXPERTS}),
    ],
)
def test_decoders_that_do_not_come_to_their_own_logits_are_refused_by_name(kind: str, settings: dict[str, Any]) -> None:
    """And keep the attention that they had."""
    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **settings, **special)).eval()
    prompt = torch.tensor([ids(1, 12)])
    with torch.no_grad():
        before = model(input_ids=prompt).logits
        with pytest.raises(ConfigError, match=f"sequence-parallel attention does not support .*{kind}"):
            attach(model)
        assert torch.equal(model(input_ids=prompt).logits, before)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_rounding_and_several_end_tokens_are_no_reason_to_refuse(kind: str) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    model = tiny(kind, **experts)
    model.config.eos_token_id = [1, 2]
    attach(model.to(torch.bfloat16))


def test_attaching_leaves_a_model_in_training() -> None:
    model = tiny().train()
    model.lm_head.eval()
    attach(model)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 1e4, "factor": 16.0}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize("name", NAMES)
def test_angles_that_depend_on_the_length_are_those_of_each_whole_sequence(name: str) -> None:
    """Of a long and a short prompt in one batch, before and after one another."""
    hosts, settings = 1 if name == "dense" else 4, {"anchor": 4, "passing": 1000} if name == "spava" else {}
    model, method = tiny("llama", kv_heads=4, rope_parameters=LONGROPE), Method(name, **settings)  # type: ignore[arg-type]
    prompts, more = [ids(3, 60), ids(4, 20)], [[[7], [8]]]
    if method.exact or name == "spava":
        expected = [dense(model, [*prompt, *new])[-2:] for prompt, new in zip(prompts, more[0], strict=True)]
    else:
        alone = [run(model, method, hosts, [prompt], [4], [[new]])[0] for prompt, new in zip(prompts, more[0], strict=True)]
        expected = [torch.cat(logits) for logits in alone]
    for read, decoded in run(model, method, hosts, prompts, [4, 4], more):
        for i, theirs in enumerate(expected):
            assert (torch.stack([read[i], decoded[i]]) - theirs).abs().amax() < 1e-5


@pytest.mark.parametrize("name", ["ring", "zigzag", "ulysses", "spava"])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_fewer_rows_than_hosts(name: str, length: int) -> None:
    """Some ranks hold no rows; what follows is decoded all the same."""
    settings: dict[str, Any] = {"anchor": 0, "passing": 1000} if name == "spava" else {}
    model, prompt, method = tiny(kv_heads=4), ids(6, length), Method(name, **settings)  # type: ignore[arg-type]
    expected = dense(model, [*prompt, 7, 8])
    for logits, after in run(model, method, 4, [prompt], [1], [[[7, 8]]]):
        assert (logits[0] - expected[-3]).abs().amax() < 1e-5
        assert (after[0] - expected[-1]).abs().amax() < 1e-5


@pytest.mark.parametrize("name", ["ring", "zigzag", "ulysses"])
def test_gradients_of_fewer_rows_than_hosts(name: str) -> None:
    model, sequence, method = tiny(kv_heads=4), ids(4, 3), Method(name)  # type: ignore[arg-type]
    model.set_attn_implementation("eager")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(input_ids=torch.tensor([sequence])).logits.square().sum(), parameters)
    attach(model)

    def rank(group: RankGroup) -> list[Tensor]:
        return list(torch.autograd.grad(local_logits(model, group, method, sequence).square().sum(), parameters))

    for grads, theirs in zip(zip(*simulated(4, rank), strict=True), expected, strict=True):
        assert torch.allclose(sum(grads), theirs, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_misuse_is_explained() -> None:
    model = tiny()
    attach(model)
    with pytest.raises(ConfigError, match=r"ramet\.attention\.hf"):
        model(input_ids=torch.tensor([[1, 2]]))
    model.train()
    with pytest.raises(ConfigError, match="no backward pass; train with ring"):
        simulated(2, lambda group: local_logits(model, group, Method("spava"), ids(9, 20)))
    with pytest.raises(ConfigError, match="unknown attention method 'sparse'"):
        Method("sparse")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dense attention runs on one host"):
        Method("dense").plan(10, 1, 2)
