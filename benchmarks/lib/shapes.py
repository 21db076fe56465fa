"""Named models: the shapes of their LM heads, and of whole Qwen3s."""

from typing import Any

# Features D and vocabulary V.
MODELS: dict[str, tuple[int, int]] = {
    "qwen3-0.6b": (1024, 151936),
    "qwen3-1.7b": (2048, 151936),
    "qwen3-4b": (2560, 151936),
    "qwen3-8b": (4096, 151936),
    "qwen3-32b": (5120, 151936),
    "llama-3-8b": (4096, 128256),
    "gemma-3-27b": (5376, 262208),
}


def _qwen3(
    layers: int, D: int, intermediate: int, heads: int, kv: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "num_hidden_layers": layers,
        "hidden_size": D,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


# Arguments of transformers' Qwen3Config. The tiny one has the vocabulary of the others.
QWEN3: dict[str, dict[str, Any]] = {
    "tiny": _qwen3(2, 256, 768, 2, 1, True),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, 8, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, 8, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 8, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 8, False),
}
