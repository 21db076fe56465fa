"""Steps of verl's FSDP engine on a tiny model, on a CPU: what it makes of a batch, its gradients
and its figures. Each run is in processes of its own, since verl replaces the forward of a class."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import _init_utils
from torch.distributed.tensor import DTensor
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer.config import CheckpointConfig
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    DistillationConfig,
    DistillationLossConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


class CPU(PlatformCUDA):
    """verl has no platform for a CPU."""

    device_name = "cpu"
    device_module = torch.cpu

    def current_device(self) -> Any:
        return "cpu"


set_platform(CPU())
transformer_impl.device_name = "cpu"
torch.cpu.empty_cache = lambda: None
# verl asks FSDP1 to broadcast the weights of rank 0, which otherwise wants them on a GPU.
_init_utils._check_module_states_for_sync_module_states = lambda _: None

V, K = 104, 5
PROMPTS, RESPONSES = (3, 5, 2, 4), (4, 2, 6, 3)  # lengths


# What makes the logits of a family, and what it needs to be as small as the others.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 2.5},
    "Phi": {},  # a bias
}


def save_model(folder: Path, family: str = "Qwen3", **options: Any) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | FAMILIES[family] | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    return folder


def make_engine(
    model: Path,
    *,
    strategy: str = "fsdp2",
    fused: bool = True,
    external_lib: str | None = None,
    sequence_parallel: int = 1,
    backend: str = "torch",
    remove_padding: bool = True,
    lora: int = 0,
    dtype: str = "fp32",
    **options: Any,
) -> FSDPEngineWithLMHead:
    """As a worker of verl makes its engine."""
    model_config = HFModelConfig(
        path=str(model),
        load_tokenizer=False,
        external_lib=external_lib,
        override_config={"attn_implementation": "sdpa"},
        use_fused_kernels=fused,
        use_remove_padding=remove_padding,
        fused_kernel_options={"impl_backend": backend},
        lora_rank=lora,
    )
    engine_config = FSDPEngineConfig(
        strategy=strategy,
        mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        ulysses_sequence_parallel_size=sequence_parallel,
        **options,
    )
    engine = FSDPEngineWithLMHead(
        model_config,
        engine_config,
        FSDPOptimizerConfig(lr=1e-3, total_training_steps=4, clip_grad=1e9),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_batch(rank: int, *, temperature: float = 0.8, k: int = K, **flags: Any) -> TensorDict:
    """Four sequences, each rank its own, with a teacher's k tokens at each position."""
    rng = torch.Generator().manual_seed(7 + rank)

    def nested(make: Callable[[int], Tensor], lengths: Any) -> Tensor:
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    def ids(n: int) -> Tensor:
        return torch.randint(0, V, (n,), generator=rng)

    prompts, responses = ([ids(n) for n in lengths] for lengths in (PROMPTS, RESPONSES))
    whole = [torch.cat(both) for both in zip(prompts, responses, strict=True)]
    lengths = [len(t) for t in whole]
    teacher = [torch.randn(n, V, generator=rng).mul(2).log_softmax(-1).topk(k) for n in lengths]

    def jagged(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    tensors = {
        "input_ids": jagged(whole),
        "position_ids": nested(torch.arange, lengths),
        "prompts": jagged(prompts),
        "responses": jagged(responses),
        "response_mask": nested(torch.ones, RESPONSES),
        "loss_mask": nested(torch.ones, RESPONSES),
        "old_log_probs": nested(lambda n: torch.full((n,), -3.0), RESPONSES),
        "advantages": nested(lambda n: torch.randn(n, generator=rng), RESPONSES),
        "teacher_ids": jagged([t.indices for t in teacher]),
        "teacher_logprobs": jagged([t.values for t in teacher]),
    }
    data = TensorDict(tensors, batch_size=[len(whole)])
    shared = {
        "temperature": temperature,
        "micro_batch_size_per_gpu": 2,
        "use_dynamic_bsz": False,
        "use_remove_padding": True,
        "global_batch_size": len(whole) * dist.get_world_size(),
        "distillation_use_topk": True,
        "return_model_output": True,
    }
    return tu.assign_non_tensor(data, **shared | flags)


def loss_function(
    strategy: str, *, mode: str = "forward_kl_topk", rewards: bool = False, **options: Any
) -> Any:
    distillation = DistillationLossConfig(
        loss_mode=mode,
        topk=K,
        use_task_rewards=rewards,
        use_policy_gradient=False,
        **options,
    )
    actor = ActorConfig(
        strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=2, entropy_coeff=0.1
    )
    made = DistillationConfig(enabled=False, distillation_loss=distillation)
    return functools.partial(distillation_ppo_loss, config=actor, distillation_config=made)


def step(
    rank: int,
    model: Path,
    engine_options: dict[str, Any],
    batch_options: dict[str, Any],
    loss_options: dict[str, Any],
    before: Callable[[], None] | None,
) -> dict[str, Any]:
    """One step of an engine: its figures, what it made of each token, its gradients.

    Args:
        before: called after the engine was made.
    """
    dist.init_process_group("gloo")
    engine = make_engine(model, **engine_options)
    if before is not None:
        before()
    warnings = record_warnings()
    fused = engine_options.get("fused", True)
    data = make_batch(rank, use_fused_kernels=fused, **batch_options)
    gradients: dict[str, Tensor] = {}

    def keep_gradients() -> float:
        for name, p in engine.module.named_parameters():
            if p.grad is not None:
                whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                gradients[name] = whole.clone()
        return 0.0

    engine.optimizer_step = keep_gradients
    loss = loss_function(engine.engine_config.strategy, **loss_options)
    with engine.train_mode():
        told = engine.train_batch(data, loss_function=loss)
    made = {name: value.values() for name, value in told["model_output"].items()}
    figures = {
        name: float(x.aggregate() if hasattr(x, "aggregate") else torch.tensor(x).float().mean())
        for name, x in told["metrics"].items()
    }
    return {
        "loss": told["loss"],
        "figures": figures,
        "made": made,
        "gradients": gradients,
        "warnings": warnings,
        "routes": routes(engine_options),
    }


def infer(_: int, model: Path, engine_options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """What an engine makes of a batch without a loss, as of that of the old policy."""
    dist.init_process_group("gloo")
    engine = make_engine(model, **engine_options)
    fused = engine_options.get("fused", True)
    flags = {"distillation_use_topk": False, "calculate_entropy": True, "k": 1}
    with engine.eval_mode():
        told = engine.infer_batch(make_batch(0, use_fused_kernels=fused, **flags))
    made = {name: value.values() for name, value in told["model_output"].items()}
    return made, routes(engine_options)


def routes(engine_options: dict[str, Any]) -> list[Any]:
    if engine_options.get("external_lib") is None:
        return []
    from opsd_kernels.verl import routes

    return [tuple(row) for row in routes()]


def record_warnings() -> list[str]:
    """What the adapter warns of from now on."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("opsd_kernels.verl").addHandler(Keep())
    return said
