"""Turns a Qwen2.5-VL into the language model of a new BLIP3-o: the added tokens and their embeddings.

As the original's training script: the tables shrink to the tokenizer's size (Qwen's have spare rows), and the added
tokens are embedded as the mean of all others. The language model stays frozen, so they keep this value.
"""

import torch

ADDED_TOKENS = ("[IMG]", "[/IMG]", "<image>")


def extended_table(table: torch.Tensor, rows: int, added: int) -> torch.Tensor:
    """The input embeddings of a vocabulary of `rows` tokens, the last `added` of which are new.

    Args:
        table: (N, hidden) with at least `rows` rows.

    Raises ValueError if the table is too small.
    """
    kept = shrunk_table(table, rows).clone()
    kept[rows - added :] = kept[: rows - added].mean(dim=0, keepdim=True)
    return kept


def shrunk_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` rows of a table. Raises ValueError if it has fewer."""
    if len(table) < rows:
        raise ValueError(f"The table has {len(table)} rows, and the tokenizer with the added tokens {rows}.")
    return table[:rows]


def set_up_vocabulary(language_model, tokenizer) -> None:
    """Add BLIP3-o's tokens to a Qwen2.5-VL and its tokenizer, in place. Tokens that are there already stay.

    Raises ValueError if the tables have too few spare rows.
    """
    known = tokenizer.get_vocab()
    new = [token for token in ADDED_TOKENS if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    rows = len(tokenizer)
    tied = language_model.config.tie_word_embeddings
    with torch.no_grad():
        table = extended_table(language_model.get_input_embeddings().weight, rows, len(new))
        head = table if tied else shrunk_table(language_model.get_output_embeddings().weight, rows).clone()
        language_model.resize_token_embeddings(rows, mean_resizing=False)
        language_model.get_input_embeddings().weight.copy_(table)
        language_model.get_output_embeddings().weight.copy_(head)
