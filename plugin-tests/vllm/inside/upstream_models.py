"""Stands in for the models that vLLM's tests name, as a cache of their hub would hold them. Nothing is downloaded.

    <vLLM's python> plugin-tests/vllm/inside/upstream_models.py <folder, to be HF_HOME> <folder of the tests' model>

Of two models only the configuration is read; the third is asked a question, and gets small random weights and our tokenizer.
"""

import shutil
import sys
from pathlib import Path

VOCABULARY = 512


def snapshot(home, name):
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("stand-in")
    return folder / "snapshots" / "stand-in"


def make(home, tokenizer):
    import torch
    from transformers import OPTConfig, Qwen3Config, Qwen3ForCausalLM

    opt = {"architectures": ["OPTForCausalLM"]}
    # The class's defaults are those of the small one.
    OPTConfig(**opt).save_pretrained(snapshot(home, "facebook/opt-125m"))
    OPTConfig(**opt, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, ffn_dim=4096, word_embed_proj_dim=512).save_pretrained(
        snapshot(home, "facebook/opt-350m"))

    torch.manual_seed(7)
    folder = snapshot(home, "Qwen/Qwen3-0.6B")
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, max_position_embeddings=1024)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
