"""`ShardedKVCacheFp16`: in processes over gloo, and over NCCL where there are two GPUs.

All that needs several processes runs once for each number of ranks (sharded_jobs.py); here is what came of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
import sharded_jobs
import torch
import torch.distributed as dist
from conftest import HAS_GPU
from sharded_jobs import Config

from kvcache_ext.distributed import ShardedKVCacheFp16

LIMIT = 240  # seconds, for the processes
TWO_GPUS = HAS_GPU and torch.cuda.device_count() >= 2
WITH_GPUS = [pytest.mark.gpu, pytest.mark.skipif(not TWO_GPUS, reason="needs 2 GPUs")]
CONFIGS = [
    Config("gloo", 2, "gather"),
    Config("gloo", 3, "gather"),
    Config("nccl", 2, "symmetric"),
    Config("nccl", 2, "gather"),
]
CASES = [
    pytest.param(config, job, id=f"{config.name}-{job}", marks=WITH_GPUS if config.backend == "nccl" else [])
    for config in CONFIGS
    for job in config.jobs()
]


def start(config: Config, folder: Path) -> None:
    """Runs the processes. Raises if they take too long."""
    processes = torch.multiprocessing.spawn(sharded_jobs.run, (config, folder), nprocs=config.ranks, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"the ranks were not done after {LIMIT} s")
    finally:
        for process in processes.processes:
            process.kill()


def outcomes(config: Config, factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what its jobs raised. The ranks are started once for all processes of pytest-xdist."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"sharded-{config.name}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            (folder / "done").touch()
            start(config, folder)
    paths = [folder / f"{rank}.json" for rank in range(config.ranks)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


@pytest.mark.parametrize(("config", "job"), CASES)
def test_ranks(config: Config, job: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for rank, of_rank in enumerate(outcomes(config, tmp_path_factory)):
        assert job in of_rank, f"rank {rank} did not come to it"
        assert not of_rank[job], f"rank {rank}: {of_rank[job]}"


def test_without_process_groups() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"ShardedKVCacheFp16: call torch\.distributed\.init_process_group first"):
        ShardedKVCacheFp16(1, 8, 1, 8, device="cpu")
