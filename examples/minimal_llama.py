"""A Llama decoder in plain PyTorch on the FP16 cache: prefill in chunks, then decode, on a GPU in a CUDA graph.

    python examples/minimal_llama.py       # a small random model; below, one of some 7 billion weights
    python examples/minimal_llama.py --dtype float16 --layers 32 --hidden 4096 --heads 32 --kv-heads 32 --prompt 4096

The cache is all there is between the steps: its lengths live on the device and say which position comes next, so a
replayed graph needs nothing from the host.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if importlib.util.find_spec("kvcache_ext") is None:  # not installed: the one that was built in place
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kvcache_ext import StreamingKVCacheFp16


@dataclass
class Config:
    vocabulary: int = 1000
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions: `x` `[B, T, heads, D]`, `positions` `[B, T]`."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[..., None, None].float() * frequencies
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        kv = config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-5)
        self.qkv = nn.Linear(config.hidden, config.hidden + 2 * kv, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=1e-5)
        inner = 8 * config.hidden // 3 // 64 * 64
        self.gate_up = nn.Linear(config.hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: StreamingKVCacheFp16) -> Tensor:
        c = self.config
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, c.head_dim))  # [B, T, heads + 2 * kv_heads, D]
        query, key, value = heads.split((c.heads, c.kv_heads, c.kv_heads), dim=2)
        query, key = rotate(query, positions, c.rope_base), rotate(key, positions, c.rope_base)
        # The whole of caching: keys and values are rounded to FP16 and stored, and attended to where they lie.
        answer = cache.append_attend(self.index, query, key, value)
        assert isinstance(answer, Tensor)
        x = x + self.out(answer.flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-5)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, cache: StreamingKVCacheFp16) -> Tensor:
        """tokens: int64 `[B, T]`. The logits that follow the last of them, `[B, vocabulary]`."""
        # Where each sequence stands, before any layer appends: on the device, so that a graph's replay sees it too.
        start = cache.cache_seqlens[0].clone()
        positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, positions, cache)
        return self.head(self.norm(x[:, -1]))


class Decoder:
    """One greedy step, token in, token out, both in `self.token`; captured once where there is a GPU."""

    def __init__(self, model: Llama, cache: StreamingKVCacheFp16, token: Tensor) -> None:
        self.model, self.cache, self.token = model, cache, token.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if token.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first step outside the graph, which is then taken back
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            cache.truncate(len(cache) - 1)
            self.token.copy_(token)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()

    def _step(self) -> None:
        self.token.copy_(self.model(self.token, self.cache).argmax(-1, keepdim=True))

    def __call__(self) -> Tensor:
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.token.clone()


@torch.inference_mode()
def generate(model: Llama, cache: StreamingKVCacheFp16, prompt: Tensor, new_tokens: int, chunk: int = 512) -> Tensor:
    """Greedy: the prompt `[B, T]` and `new_tokens` more."""
    cache.clear()
    for piece in prompt.split(chunk, 1):
        logits = model(piece, cache)
    tokens = [prompt, logits.argmax(-1, keepdim=True)]
    step = Decoder(model, cache, tokens[-1])
    for _ in range(new_tokens - 1):
        tokens.append(step())
    return torch.cat(tokens, 1)


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "hidden", "heads", "kv_heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config, name))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt, which is random")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args(arguments)
    least = min(o.layers, o.hidden, o.heads, o.kv_heads, o.batch, o.prompt, o.tokens)
    if least < 1 or o.hidden % o.heads or o.heads % o.kv_heads:
        parser.error("numbers must be at least 1, hidden a multiple of heads, and heads one of kv-heads")

    torch.manual_seed(0)
    config = Config(layers=o.layers, hidden=o.hidden, heads=o.heads, kv_heads=o.kv_heads)
    with torch.device(o.device):
        model = Llama(config).to(getattr(torch, o.dtype)).eval()
        prompt = torch.randint(config.vocabulary, (o.batch, o.prompt))
    cache = StreamingKVCacheFp16(
        config.layers, o.prompt + o.tokens, config.kv_heads, config.head_dim, batch_size=o.batch, device=o.device
    )
    began = time.perf_counter()
    tokens = generate(model, cache, prompt, o.tokens)
    new = tokens[:, o.prompt :].tolist()  # waits for the device
    seconds = time.perf_counter() - began
    print(f"prompt of {o.prompt} tokens, then {new[0]}")
    print(f"{o.batch * o.tokens / seconds:.1f} tok/s, prompt included; keys and values: {cache.memory_mb():.2f} MB")
    return tokens


if __name__ == "__main__":
    main()
