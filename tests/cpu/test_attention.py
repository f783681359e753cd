"""Attention on the CPU engine: near float64's, the same bits however it is called, and only where it suits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.cpu.engine import Engine, engine, lack_of_engine
from svdq_cli.runtime.cpu_attention import attention_bias, use_engine_attention
from svdq_cli.runtime.cpu_definition import exact_attention

pytestmark = pytest.mark.skipif(
    lack_of_engine() is not None or not engine().has_attention,
    reason="needs a C++ compiler and a processor with bfloat16 products",
)

SHAPES = [  # batch, heads, queries, keys, size of a head
    (1, 2, 100, 77, 40),
    (2, 3, 49, 300, 128),
    (1, 1, 1, 1, 2),
    (1, 3, 257, 511, 72),
    (2, 2, 48, 256, 64),
    (1, 1, 5, 513, 256),
    (1, 2, 97, 33, 90),
]


def _drawn(
    batch: int, heads: int, queries: int, keys: int, size: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a linear layer leaves them, heads side by side."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(batch, rows, heads, size, generator=generator) for rows in (queries, keys, keys))
    q, k, v = (each.bfloat16().transpose(1, 2) for each in made)
    return 3 * q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.ops.svdq.cpu_attention(q, k, v, attention_bias(mask, q, k), scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_float64s_but_for_the_rounding_of_weights_and_results(
    shape: tuple[int, int, int, int, int], masked: bool
):
    q, k, v = _drawn(*shape)
    mask = torch.arange(shape[3])[None, None, None] % 3 != 1 if masked else None
    bias, scale = attention_bias(mask, q, k), shape[-1] ** -0.5
    wanted, most = exact_attention(q, k, v, bias, scale=scale)
    assert bool(((_attended(q, k, v, mask).double() - wanted).abs() <= most).all())


def test_the_same_bits_for_any_number_of_threads_batch_and_rows(monkeypatch: pytest.MonkeyPatch):
    q, k, v = _drawn(2, 3, 301, 700, 64)
    whole = _attended(q, k, v)
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(_attended(q, k, v), whole)
    assert torch.equal(_attended(q[1:], k[1:], v[1:]), whole[1:])
    assert torch.equal(_attended(q[:, :, 50:51], k, v), whole[:, :, 50:51])
    assert torch.equal(_attended(q.contiguous(), k.contiguous(), v.contiguous()), whole)


def test_a_row_without_a_key_is_zero_as_torchs_is_and_blocks_of_masked_keys_count_for_nothing():
    q, k, v = _drawn(2, 2, 7, 600, 32)
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool)
    mask[0] = False
    mask[1, ..., :300] = False  # the whole first block, and more
    found = _attended(q, k, v, mask)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], _attended(q[1:], k[1:, :, 300:], v[1:, :, 300:]), atol=0.02, rtol=0)
    # rounding each to bfloat16 apart: one of 8 bits
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=0.02, rtol=0
    )


def test_a_number_that_is_none_stays_none():
    q, k, v = _drawn(1, 1, 8, 40, 32)
    q[0, 0, 3, 0] = torch.nan
    found = _attended(q, k, v)
    assert bool(found[0, 0, 3].isnan().all())
    assert bool(found[0, 0, 4:].isfinite().all())


class _Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        if options.pop("fail", False):
            raise RuntimeError("out of memory")
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call of the engine."""
    seen: list[int] = []
    run = Engine.attention

    def counted(*arguments, **options):
        seen.append(1)
        return run(*arguments, **options)

    monkeypatch.setattr(Engine, "attention", counted)
    return seen


def test_a_model_attends_on_the_engine_while_it_runs_and_a_copy_of_it_does(calls: list[int]):
    q, k, v = _drawn(1, 2, 200, 200, 64)
    model = _Attends()
    use_engine_attention(model)
    torch.testing.assert_close(model(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=0.02, rtol=0)
    assert len(calls) == 1
    copy.deepcopy(model)(q, k, v, scale=0.5)
    assert len(calls) == 2
    with pytest.raises(RuntimeError):
        model(q, k, v, fail=True)
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 2, "outside the model attention is torch's own"


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.ones(200, 200, dtype=torch.bool).tril()},
        {"dropout_p": 0.5},
    ],
    ids=["causal", "a mask of its own for each query", "dropout"],
)
def test_what_the_engine_does_not_know_stays_torchs(calls: list[int], options: dict[str, object]):
    model = _Attends()
    use_engine_attention(model)
    model(*_drawn(1, 2, 200, 200, 64), **options)
    model(*(each.float() for each in _drawn(1, 2, 200, 200, 64)))
    assert not calls


def test_a_compiled_model_keeps_one_graph(calls: list[int]):
    q, k, v = _drawn(1, 2, 200, 200, 64)
    model = _Attends()
    use_engine_attention(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v), atol=0.02, rtol=0)
