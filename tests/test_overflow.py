"""What FP16 cannot hold: policy and counters through every call that appends, and what becomes of a model's text.

One value after the other is tests/test_conversion.py's affair.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache, needs_gpu
from torch import Tensor, nn
from torch.nn import functional as F

from kvcache_ext import StreamingKVCacheFp16

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
# Below what rounds to infinity, at it, beyond; the largest of FP32 and of BF16; and what is no overflow.
SPECIAL = [65504.0, 65519.99, -65519.99, 65520.0, -65520.0, 7e4, -1e6, 3.4e38, -3.3e38, INF, -INF, NAN]


def spiked(*shape: int, dtype: torch.dtype, share: float = 0.1, finite: bool = False) -> Tensor:
    """N(0, 1) with special values in random places. (FP16 has no overflow: there they are infinite.)"""
    x = torch.randn(shape)
    special = torch.tensor([s for s in SPECIAL if math.isfinite(s) or not finite])
    chosen = special[torch.randint(len(special), shape)]
    return torch.where(torch.rand(shape) < share, chosen, x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("length", [5, 8, 17, 33])
def test_every_special_value_in_every_place(backend: Backend, dtype: torch.dtype, overflow: str, length: int) -> None:
    """A position for each value and each place in a row: vector loops and their tails."""
    places = torch.eye(length, dtype=torch.bool).repeat(len(SPECIAL), 1)
    values = torch.tensor(SPECIAL).repeat_interleave(length)[:, None]
    key = torch.where(places, values, torch.randn(places.shape)).to(dtype)[None, :, None]
    twin = Twin(backend, num_layers=1, max_positions=len(places), num_heads=1, head_dim=length, overflow=overflow)
    twin.append(0, key.to(backend.device), -key.to(backend.device))
    twin.check()
    # BF16 has nothing between 65,280 and 65,536, which 65,504 and 65,519.99 become; 3.4e38 becomes infinite.
    overflowing, infinite = (6, 2) if dtype == torch.float32 else (8, 3)
    assert twin.overflow_counts.tolist() == [2 * length * overflowing]
    assert twin.k_cache.isinf().sum() == length * (infinite if overflow == "saturate" else infinite + overflowing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_every_way_to_append(backend: Backend, dtype: torch.dtype, overflow: str) -> None:
    """Rows that a longer append overwrites are counted, as they would be one by one; padding is not."""
    twin = Twin(backend, num_layers=3, batch_size=3, sink_positions=2, overflow=overflow)
    device = backend.device
    lengths = torch.tensor([2, 0, 9], device=device)
    for count in (1, 4, 21):
        rows = [spiked(3, 3, count, 2, 8, dtype=dtype).to(device) for _ in range(2)]
        twin.append(1, rows[0][0], rows[1][0])
        twin.append(2, rows[0][1].transpose(1, 2).contiguous().transpose(1, 2), rows[1][1], lengths)
        twin.append_all(*rows)
        twin.append_all(*rows, lengths)
        twin.append(1, rows[0][2, :2], rows[1][2, :2], lengths[:2], [2, 0])
        twin.append_all(rows[0][:, :2], rows[1][:, :2], sequences=torch.tensor([1, 7], device=device))
        twin.check()
    counts = twin.overflow_counts.tolist()
    assert counts == [0, 0, 0] if dtype == torch.float16 else all(count > 0 for count in counts)
    twin.clear()
    twin.check()


def append_attend_both(
    twin: Twin, query: Tensor, key: Tensor, value: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The cache's answer and the reference's, on the CPU; `check` compares the rest."""
    precision = options.pop("precision", "fp32")
    got = twin.cache.append_attend(1, query, key, value, precision=precision, **options)  # type: ignore[arg-type]
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else torch.tensor(v) for k, v in options.items()}
    want, _ = twin.reference.append_attend(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 1, query.cpu(), key.cpu(), value.cpu(),
        **on_cpu, **twin._settings,
    )  # fmt: skip
    return got.cpu(), want


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [*((1, dtype) for dtype in DTYPES), (3, torch.float32), (3, torch.bfloat16), (20, torch.float32)],
)
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_append_attend(backend: Backend, rows: int, dtype: torch.dtype, overflow: str) -> None:
    """Storage and counters are those of appends, through each of attention's kernels.

    The answer is that over what is stored, also in what is NaN or infinite.
    """
    twin = Twin(backend, batch_size=3, sink_positions=1, head_dim=16, overflow=overflow)
    device = backend.device
    lengths = torch.tensor([rows - 1, 1, rows + 3], dtype=torch.int32, device=device)
    kinds: dict[str, int] = {}
    for heads, options in (
        (2, {}),
        (6, {"new_lengths": lengths}),
        (2, {"new_lengths": lengths[:2], "sequences": [2, 0]}),
        (2, {"sequences": torch.tensor([1, -1, 2], device=device)}),
        (2, {"precision": "fp16"}),
    ):
        batch = 2 if options.get("sequences") == [2, 0] else 3
        # Small, so that scores are not all one key's; without 0, which times an infinity is NaN.
        query = ((torch.rand(batch, rows, heads, 16) + 0.01) * 1e-3).to(dtype).to(device)
        key, value = (spiked(batch, rows, 2, 16, dtype=dtype, share=0.02).to(device) for _ in range(2))
        got, want = append_attend_both(twin, query, key, value, **options)
        twin.check()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf, torch.isfinite):
            assert torch.equal(kind(got), kind(want.to(dtype)))
            kinds[kind.__name__] = kinds.get(kind.__name__, 0) + int(kind(want).sum())
        finite = want.to(dtype).isfinite()
        rounding = {torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        atol = rounding * 100
        if "precision" in options and finite.any():  # weights are rounded, and large values may cancel each other out
            atol = max(atol, 2e-3 * float(want[finite].abs().max()))
        torch.testing.assert_close(got[finite].double(), want[finite], rtol=rounding, atol=atol)
    assert kinds["isfinite"] > 100 and kinds["isnan"] > 0
    assert kinds["isposinf"] + kinds["isneginf"] > 0
    assert twin.overflow_counts[0] == 0
    assert (twin.overflow_counts[1] > 0) == (dtype != torch.float16)


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_saturated_answers_are_finite_and_right(backend: Backend, rows: int) -> None:
    """Finite keys and values of any size under "saturate": attention over what is stored, in FP32."""
    twin = Twin(backend, sink_positions=1, max_positions=32, head_dim=16)
    for step in range(3):
        query = torch.randn(1, rows, 4, 16, device=backend.device) * 1e-3  # scores that are not all one key's
        key, value = (spiked(1, rows, 2, 16, dtype=torch.float32, finite=True).to(backend.device) for _ in range(2))
        got, want = append_attend_both(twin, query, key, value)
        assert got.isfinite().all(), step
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1.0)  # of values up to 65504
    twin.check()
    assert twin.overflow_counts[1] > 0


def step_of_layers(cache: StreamingKVCacheFp16, x: Tensor, lengths: Tensor) -> Tensor:
    """Every call that appends, to layers of which each has outliers of its own number."""
    key = x[:, :, :2]
    cache.append(0, key, -key)
    cache.append(0, key * 0.25, key, new_lengths=lengths)
    answer = cache.append_attend(1, x.clamp(-1, 1), key * 4, key, new_lengths=lengths)
    one = x[:, :1]
    answer = answer[:, :1] + cache.append_attend(2, one.clamp(-1, 1), one[:, :, :2], one[:, :, 2:])
    cache.append_all(torch.stack([key, key * 2, key * 0.5]), torch.stack([key, key, key]), new_lengths=lengths)
    return answer


def test_the_policy_is_that_of_construction() -> None:
    cache = make_cache(torch.device("cpu"), overflow="inf")
    with pytest.raises(AttributeError):
        cache.overflow = "saturate"  # type: ignore[misc]
    assert cache.overflow == "inf"


@pytest.mark.long
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_compiled(device: torch.device, overflow: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (
        make_cache(device, num_layers=3, batch_size=2, sink_positions=1, overflow=overflow) for _ in range(2)
    )
    step = torch.compile(step_of_layers, fullgraph=True)
    for i in range(6):
        x = torch.randn(2, 3, 4, 8, device=device) * (1 if i % 2 else 40_000)
        lengths = torch.tensor([i % 4, 3], device=device)
        torch.testing.assert_close(
            step(compiled, x, lengths), step_of_layers(eager, x, lengths), rtol=1e-4, atol=1e-4, equal_nan=True
        )
        assert torch.equal(compiled.overflow_counts(), eager.overflow_counts())
    assert_same_bits(compiled.k_cache, eager.k_cache)
    assert_same_bits(compiled.v_cache, eager.v_cache)
    counts = eager.overflow_counts().tolist()
    assert len(set(counts)) == 3 and min(counts) > 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_in_a_graph(overflow: str) -> None:
    """Every replay counts; reading the counters does not wait for the device, and capturing counts nothing."""
    gpu = torch.device("cuda")
    eager, captured = (make_cache(gpu, num_layers=3, batch_size=2, overflow=overflow) for _ in range(2))
    x, lengths = torch.zeros(2, 3, 4, 8, device=gpu), torch.zeros(2, dtype=torch.int64, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step_of_layers(captured, x, lengths)
        counts = captured.overflow_counts()
    assert captured.overflow_counts().tolist() == [0, 0, 0]
    for i in range(40):
        x.normal_().mul_(1 if i % 2 else 40_000)
        lengths.copy_(torch.tensor([i % 4, 3]))
        graph.replay()
        assert_same_bits(answer, step_of_layers(eager, x, lengths))
        assert torch.equal(counts, eager.overflow_counts())
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert len(set(counts.tolist())) == 3 and min(counts.tolist()) > 0


class Model(nn.Module):
    """A decoder without frills: three layers, four query heads on two KV heads, greedy."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.qkv = nn.ModuleList(nn.Linear(64, 8 * 16) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 50)
        with torch.no_grad():
            # Large language models have such channels: one element of layer 1's keys is always about the same number.
            self.qkv[1].bias[4 * 16 + 5] = outlier
            self.qkv[1].weight[4 * 16 + 5] = 0

    def forward(self, tokens: Tensor, cache: StreamingKVCacheFp16 | None, past: list[Tensor]) -> Tensor:
        """tokens: `[T]`. The last one's logits, of keys and values from a cache, or in FP32 from `past`."""
        x = self.embedding(tokens)[None]
        for layer in range(3):
            query, key, value = self.qkv[layer](F.rms_norm(x, (64,))).unflatten(-1, (8, 16)).split((4, 2, 2), dim=2)
            if cache is not None:
                answer = cache.append_attend(layer, query, key, value)
            else:
                past[layer] = torch.cat((past[layer], torch.stack((key, value)).to(past[layer])), dim=2)
                keys, values = past[layer].double().transpose(2, 3)
                mask = torch.ones(len(tokens), keys.shape[2], dtype=torch.bool, device=x.device)
                answer = F.scaled_dot_product_attention(
                    query.double().transpose(1, 2), keys, values, enable_gqa=True,
                    attn_mask=mask.tril(keys.shape[2] - len(tokens)),
                ).transpose(1, 2).float()  # fmt: skip
            x = x + self.out[layer](answer.flatten(2))
        return self.head(F.rms_norm(x[0, -1], (64,)))

    @torch.inference_mode()
    def generate(self, prompt: Tensor, steps: int, cache: StreamingKVCacheFp16 | None) -> tuple[list[int], Tensor]:
        past = [torch.empty(2, 1, 0, 2, 16, device=prompt.device) for _ in range(3)]
        tokens, logits = prompt, []
        generated: list[int] = []
        for _ in range(steps):
            logits.append(self(tokens, cache, past))
            tokens = logits[-1].nan_to_num(-1e9).argmax()[None]
            generated.append(int(tokens))
        return generated, torch.stack(logits)


@pytest.mark.parametrize("prompt_length", [10, 40])
def test_text(device: torch.device, prompt_length: int) -> None:
    """Keys with an outlier channel: the text under "saturate" is that of FP32, and under "inf" it is lost."""
    model = Model(outlier=70_000.0).to(device)
    prompt = torch.randint(50, (prompt_length,)).to(device)
    steps = 20
    want, want_logits = model.generate(prompt, steps, None)
    assert len(set(want)) > 3  # no text that anything would come to
    texts = {}
    for overflow in ("saturate", "inf"):
        cache = StreamingKVCacheFp16(3, 64, 2, 16, device=device, overflow=overflow)
        texts[overflow], logits = model.generate(prompt, steps, cache)
        # Which layer, and how much: one element of every position.
        assert cache.overflow_counts().tolist() == [0, prompt_length + steps - 1, 0]
        if overflow == "saturate":
            assert logits.isfinite().all()
            torch.testing.assert_close(logits, want_logits, rtol=1e-2, atol=1e-2)
        else:
            assert logits.isnan().any(dim=-1).all()
    assert texts["saturate"] == want != texts["inf"]


def test_text_without_outliers(device: torch.device) -> None:
    """The same model with a key that FP16 can hold: both policies give FP32's text, and nothing is counted."""
    model = Model(outlier=60_000.0).to(device)
    prompt = torch.randint(50, (10,)).to(device)
    want, _ = model.generate(prompt, 20, None)
    for overflow in ("saturate", "inf"):
        cache = StreamingKVCacheFp16(3, 64, 2, 16, device=device, overflow=overflow)
        assert model.generate(prompt, 20, cache)[0] == want
        assert cache.overflow_counts().tolist() == [0, 0, 0]
