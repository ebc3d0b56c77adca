"""One text over several GPUs: a cache whose positions are dealt out to the ranks of a process group.

    from kvcache_ext.distributed import ShardedKVCacheFp16

`cache` has the class, `exchange` how ranks merge their answers, `collect` how they read each other's rows, `store`
files. docs/multi-gpu.md says when to use it.
"""

from .cache import ShardedKVCacheFp16

__all__ = ["ShardedKVCacheFp16"]
