"""Ids of tokens: where text ends, what it is padded with, and whether the model knows them all."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which a model stops: those of its generation config, and the tokenizer's.

    Raises:
        ValueError: there is none that the model could draw, or one is no id.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    if not all(i is None or isinstance(i, int) for i in ids):
        raise ValueError(
            "eos_token_id in generation_config.json must be a token's id, or a list of them; got "
            f"{named!r}"
        )
    rows = embedding_rows(model)
    ends = {i for i in ids if i is not None and 0 <= i < rows}
    if not ends:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no eos_token that the model could "
            "draw, and generation_config.json no eos_token_id: no rollout would ever be finished. "
            "Set one of them"
        )
    return ends


def settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad with a token that the model has an embedding of: an end of text, where
    its own pad token is missing or lies outside. Which one is all the same, since it is masked."""
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < embedding_rows(model):
        tokenizer.pad_token_id = min(end_ids(model, tokenizer))


def check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]]
) -> None:
    """A tokenizer may know tokens that the model does not, as Gemma 3's knows one of images; but no
    prompt may have them.

    Raises:
        ValueError: one does.
    """
    rows = embedding_rows(model)
    if len(tokenizer) <= rows:
        return
    for ids in prompts:
        if (outside := max(ids, default=0)) >= rows:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} writes "
                f"{tokenizer.convert_ids_to_tokens(outside)!r} as {outside}, and the model has "
                f"embeddings of {rows} tokens: take the tokenizer that the model was trained with, "
                "or a model whose embeddings were resized to it"
            )


def embedding_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]
