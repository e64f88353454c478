"""What ramet takes for granted of OpenRLHF. If a test here fails, upstream has moved: read what it names before raising the version."""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-openrlhf")

from openrlhf.models import Actor, ValueLoss
from openrlhf.trainer.ppo_trainer import BasePPOTrainer, PPOTrainer
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer, PolicyModelActor
from openrlhf.trainer.ray.ppo_critic import CriticModelActor
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from openrlhf.utils.agent import AgentExecutorBase
from openrlhf.utils.deepspeed import DeepspeedStrategy

from ramet.policy.openrlhf import supported
from ramet.policy.openrlhf.actors import undecorated
from ramet.policy.openrlhf.cpu import CPUWorker
from ramet.policy.openrlhf.install import ENTRY

ENGINE, POLICY, CRITIC = undecorated(RolloutRayActor), undecorated(PolicyModelActor), undecorated(CriticModelActor)

TAKEN: list[tuple[Any, str, str]] = [
    (AgentExecutorBase, "execute", "self prompt label sampling_params max_length hf_tokenizer llm_engine images"),
    (ENGINE, "generate_responses", "self prompt label sampling_params max_length hf_tokenizer num_samples images"),
    (ENGINE, "pause_generation", "self"),
    (ENGINE, "resume_generation", "self"),
    (SamplesGenerator, "__init__", "self strategy prompts_dataloader eval_dataloader tokenizer vllm_engines"),
    (
        RemoteExperienceMaker,
        "__init__",
        "self actor_model_group critic_model_group reward_model_group initial_model_group kl_controller strategy tokenizer kwargs",
    ),
    (RemoteExperienceMaker, "make_experience_batch", "self rollout_samples"),
    (RemoteExperienceMaker, "_dispatch_forward", "self group sync_condition kwargs"),
    (RemoteExperienceMaker, "_flatten_results", "self refs duplicate_factor"),
    (POLICY, "init_model_from_pretrained", "self strategy pretrain max_steps vllm_engines"),
    (POLICY, "fit", "self kl_ctl"),
    (POLICY, "append", "self experience"),
    (POLICY, "broadcast_to_vllm", "self"),
    (POLICY, "get_checkpoint_states", "self"),
    (POLICY, "save_checkpoint", "self tag client_states metric_value metric_key"),
    (POLICY, "save_model", "self"),
    (CRITIC, "init_model_from_pretrained", "self strategy pretrain max_steps"),
    (CRITIC, "forward", "self sequences action_mask attention_mask packed_seq_lens"),
    (CRITIC, "save_checkpoint", "self tag metric_value metric_key"),
    (
        BasePPOTrainer,
        "__init__",
        "self strategy actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines tokenizer",
    ),
    (
        undecorated(PPOTrainer),
        "__init__",
        "self pretrain strategy actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines generate_kwargs",
    ),
    (RayActorGroup, "async_run_method", "self method_name args kwargs"),
    (RayActorGroup, "async_run_method_batch", "self method_name kwargs"),
    (
        Actor,
        "forward",
        "self sequences action_mask attention_mask return_output allgather_logits return_logprobs ring_attn_group packed_seq_lens "
        "return_entropy mm_inputs",
    ),
    (ValueLoss, "forward", "self values old_values returns action_mask dp_size batch_num_tokens global_batch_size"),
    (DeepspeedStrategy, "get_ds_eval_config", "self offload"),
    (ENGINE, "reset_prefix_cache", "self"),
    (WorkerWrap, "init_process_group", "self master_address master_port rank_offset world_size group_name backend use_ray"),
    (CPUWorker, "init_process_group", "self master_address master_port rank_offset world_size group_name backend use_ray"),
]


@pytest.mark.parametrize(("owner", "method", "expected"), TAKEN, ids=[f"{o.__name__}.{m}" for o, m, _ in TAKEN])
def test_signatures(owner, method, expected):
    # Ray adds a parameter of its own to the methods of its actors.
    found = " ".join(name for name in inspect.signature(getattr(owner, method)).parameters if name != "_ray_trace_ctx")
    assert found == expected, f"OpenRLHF's {owner.__name__}.{method} takes ({found}); ramet expects ({expected})"


def test_an_experience_has_what_is_filled_in():
    for name in ("sequences", "attention_mask", "action_mask", "rollout_log_probs", "advantages", "returns", "values", "info"):
        assert name in Experience.__dataclass_fields__


def test_the_entry_point_takes_the_classes_where_they_are_replaced():
    spec = find_spec(ENTRY)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")

    def imported(nodes: list[ast.stmt]) -> set[tuple[str | None, str]]:
        return {(n.module, a.name) for node in nodes for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for a in n.names}

    assert ("openrlhf.trainer.ppo_trainer", "PPOTrainer") in imported([train]), "the controller is imported where it is used"
    top = imported(tree.body)
    assert ("openrlhf.trainer.ray.ppo_actor", "PolicyModelActor") in top and ("openrlhf.trainer.ray.ppo_critic", "CriticModelActor") in top
    assert "RolloutRayActor.options(" in Path(inspect.getfile(ENGINE)).read_text(), "engines are made of the replaced class"


def test_the_first_trainer_and_the_workers_are_connected_where_buckets_are_sent():
    for owner in (ActorPPOTrainer._init_vllm_sync_group, WorkerWrap.init_process_group):
        assert "self._model_update_group = stateless_init_process_group(" in inspect.getsource(owner)


def test_this_release_is_the_supported_one():
    supported.check()
