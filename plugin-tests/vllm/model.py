"""Makes a model for the vLLM tests: a two-layer Llama with random weights, and a byte-level tokenizer. Nothing is downloaded.

    <vLLM's python> plugin-tests/vllm/model.py <shape> <folder>

The weights are drawn from a fixed seed and are far larger than those of a fresh model: the next token then depends on the
whole prompt, by a wide margin, so that a key or value in the wrong place changes the answer, and rounding does not.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 7
LAYERS = 2
VOCABULARY = 512
WEIGHT_SPREAD = 0.15


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    head_dim: int
    # Tokens that a prompt and its answer may have.
    positions: int

    def block_bytes(self, tokens):
        """Keys and values of one block, in float32."""
        return 2 * LAYERS * self.kv_heads * self.head_dim * tokens * 4


# For CPUs, and for GPUs: there a block of 32 tokens is 1 MiB.
SHAPES = {"small": Shape(4, 64, 1024), "wide": Shape(16, 128, 8192)}


def make(shape, folder):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=shape.kv_heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, max_position_embeddings=shape.positions,
        initializer_range=WEIGHT_SPREAD, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    make(SHAPES[sys.argv[1]], Path(sys.argv[2]))
