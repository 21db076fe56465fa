"""The LM heads of named models: features D and vocabulary V."""

MODELS: dict[str, tuple[int, int]] = {
    "qwen3-0.6b": (1024, 151936),
    "qwen3-1.7b": (2048, 151936),
    "qwen3-4b": (2560, 151936),
    "qwen3-8b": (4096, 151936),
    "qwen3-32b": (5120, 151936),
    "llama-3-8b": (4096, 128256),
    "gemma-3-27b": (5376, 262208),
}
