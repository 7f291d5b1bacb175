"""Prompts of random token ids, and how many blocks of keys and values they fill."""

import math
import random

import model
from engines import BLOCK_TOKENS

# Less than a block, its edges, several blocks, and much.
LENGTHS = (5, 31, 32, 33, 100, 257, 700)


def random_prompt(length, label):
    dice = random.Random(f"{label} {length}")
    return [dice.randrange(2, model.VOCABULARY) for _ in range(length)]


def blocks(*prompts):
    return sum(math.ceil(len(prompt) / BLOCK_TOKENS) for prompt in prompts)
