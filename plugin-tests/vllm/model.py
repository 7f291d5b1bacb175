"""Makes a model for the vLLM tests: a two-layer Llama with random weights, and a byte-level tokenizer. Nothing is downloaded.

    <vLLM's python> plugin-tests/vllm/model.py <folder>

The weights are drawn from a fixed seed and are far larger than those of a fresh model: the next token then depends on the
whole prompt, by a wide margin, so that a key or value in the wrong place changes the answer, and rounding does not.
"""

import sys
from pathlib import Path

SEED = 7
LAYERS = 2
KV_HEADS = 4
HEAD_DIM = 64
VOCABULARY = 512
POSITIONS = 1024
WEIGHT_SPREAD = 0.15


def make(folder):
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
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, initializer_range=WEIGHT_SPREAD,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
