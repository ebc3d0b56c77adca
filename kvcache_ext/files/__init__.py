"""Saving caches to files and loading them.

`StreamingKVCacheFp16.save`, `load` and `load_sequences` are `save`, `load` and `load_sequences` here. `Fp16Cache.save`
and `Fp16Cache.load` call `save_layers` and `open_layers`.

A file is in the safetensors format (https://github.com/huggingface/safetensors), so any reader of that format can open
it. There are two kinds, told apart by "format" in its `__metadata__`:

- "kvcache_ext": one `StreamingKVCacheFp16`. All layers have one shape.
- "kvcache_ext.Fp16Cache": layers of several caches. Each layer has its own shape, and there are no sinks.

The tensors, in the order in which they lie, for `L` layers and `B` sequences:

- `seen`, `first`: int64 `[L, B]`, the state: positions ever appended, and the oldest one held that is not a sink.
- `lengths`: int64 `[L, B]`, positions held: `min(seen, sinks) + max(seen - first, 0)`.
- `overflow_counts`: int64 `[L]`.
- In files of several caches: the caller's own small tensors, the larger dtypes first, then by name; and `padding`,
  uint8 `[0]` to `[7]`, after which `keys.0` begins at a multiple of 8 bytes.
- `keys.0`, `values.0`, `keys.1` ...: FP16 `[rows, H, D]`, what the layer's sequences hold, oldest first, one sequence
  after the other: `keys.split(lengths[layer].tolist())` takes them apart. Nothing is padded, whatever the lengths.
- `checksums`: uint32 `[1 + blocks]`. The first is the CRC-32 of everything before `keys.0`, header included. Then comes
  one for each block of `block_bytes` of all that lies between there and `checksums` (the last block may be shorter).

`__metadata__` has "format", "version" (each kind counts its own), "writer", num_layers, batch_size and block_bytes. A
file of one cache also has max_positions, num_heads, head_dim, sink_positions and overflow. A file of several caches has
max_positions of each layer, separated by commas, and the caller's own metadata; heads and head_dim are in the shapes.

The modules: `layout` (a file's parts and their sizes), `header` (reading and checking all but keys and values), `rows`
(where rows lie in caches), `transfer` (bytes between files and memory, in threads), `paths` (arguments, replacing a
file, progress), `writing` and `reading` (the two directions), `core` and `layers` (the calls).
"""

from .core import load, load_sequences, save
from .layers import LayersFile, SavedLayer, open_layers, save_layers

__all__ = ["LayersFile", "SavedLayer", "load", "load_sequences", "open_layers", "save", "save_layers"]
