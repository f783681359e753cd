"""The demo model's tokenizers and text encoders: a small vocabulary of words, and single characters for the rest."""

# diffusers' and transformers' classes are loosely typed where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from svdq_cli.demo.world import (
    BACKGROUNDS,
    OBJECT_COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption_of,
)

WIDTH = 128  # of both encoders
CLIP_LENGTH = 77  # FluxPipeline pads the CLIP prompt to model_max_length


@cache
def words() -> tuple[str, ...]:
    """Every word a caption can hold, in a fixed order."""
    phrases = [
        *SIZES,
        *OBJECT_COLORS,
        *SHAPES,
        *PLACES,
        *RELATIONS,
        *BACKGROUNDS,
        "a an on background to the",
    ]
    return tuple(dict.fromkeys(" ".join(phrases).split()))


def new_t5_tokenizer() -> T5TokenizerFast:
    """Unigram: a whole word beats its characters; a character outside printable ASCII becomes <unk>."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in words()]
    # "▁a" is a word already; every other character costs more than any whole word
    vocabulary += [
        (mark, -20.0) for mark in ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    ]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def new_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges build exactly the words of the captions; other text falls to its bytes."""
    alphabet, lasts = _byte_marks()
    merges = merges_of(words())
    tokens = [*alphabet, *(f"{mark}</w>" for mark in lasts), *(first + second for first, second in merges)]
    # CLIPTextModel pools at the end-of-text token; the highest id keeps old argmax pooling right too
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def _byte_marks() -> tuple[list[str], list[str]]:
    """The letters that stand for bytes of UTF-8 text, and those of them that can end a word.

    Left out, because every row of the embedding costs 256 bytes: bytes that UTF-8 never uses, white space and
    control characters, and as the end of a word the first bytes of longer characters.
    """
    unused = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    # ByteLevel writes bytes 0 to 32 as U+0100 to U+0120 and byte 127 as U+0121
    unused |= {chr(0x100 + byte) for byte in range(0x22)}
    marks = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - unused)
    return marks, [mark for mark in marks if not 0xC2 <= ord(mark) <= 0xF4]


def merges_of(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (Sennrich et al. 2016, algorithm 1) until every word is one token.

    Ties go to the pair that sorts first: the trainer of `tokenizers` breaks them by memory order, so its ids
    differ from run to run.
    """
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in texts]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = [_merged(word, best) for word in parts]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """`word` with every occurrence of `pair` joined, left to right."""
    joined: list[str] = []
    for part in word:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def new_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Untrained two-layer T5 encoder."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        num_layers=2,
        d_ff=256,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    with torch.no_grad():
        # T5 starts embeddings at deviation 1, slow to move at our learning rate
        model.shared.weight.mul_(0.5)
    return model


def new_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Untrained two-layer CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=256,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], *, length: int) -> Tensor:
    """(len(texts), length) ids, padded as FluxPipeline pads them. Raises ValueError where a text does not fit."""
    longest = max(len(ids) for ids in tokenizer(texts).input_ids)
    if longest > length:
        raise ValueError(f"a caption takes {longest} tokens, more than {length}")
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


@dataclass(frozen=True, slots=True)
class Captions:
    """Token ids of every training picture in both wordings, and of the empty prompt as the last row."""

    clip: Tensor  # (2 * count + 1, longest)
    t5: Tensor  # (2 * count + 1, longest)
    t5_pad: int

    def batch(self, rows: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
        """CLIP ids (B, longest) and T5 ids (B, length).

        CLIP is causal and pools at the first end of text, so the padding after it changes nothing and is left out.
        """
        t5 = F.pad(self.t5[rows], (0, max(0, length - self.t5.shape[1])), value=self.t5_pad)
        return self.clip[rows], t5


def tokenize(
    clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, scenes: tuple[Scene, ...]
) -> Captions:
    """Token ids of the captions of `scenes`: wording 0 of picture i in row 2 i, wording 1 in row 2 i + 1."""
    texts = [caption_of(scene, long=long) for scene in scenes for long in (False, True)] + [""]
    clip = token_ids(clip_tokenizer, texts, length=CLIP_LENGTH)
    t5 = token_ids(t5_tokenizer, texts, length=32)
    clip_longest = int((clip != clip_tokenizer.eos_token_id).sum(dim=1).max()) + 1
    t5_longest = int((t5 != t5_tokenizer.pad_token_id).sum(dim=1).max())
    return Captions(clip[:, :clip_longest], t5[:, :t5_longest], int(t5_tokenizer.pad_token_id))
