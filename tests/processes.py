"""Jobs that run once in a pair of processes, and the tests that look at what each process got of them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from ranks import RANKS

LIMIT = 300  # seconds, for the processes
TWO_GPUS = HAS_GPU and torch.cuda.device_count() >= RANKS
WITH_GPUS = [pytest.mark.gpu, pytest.mark.skipif(not TWO_GPUS, reason=f"needs {RANKS} GPUs")]
BACKENDS = ["gloo", pytest.param("nccl", marks=WITH_GPUS)]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")


def same_on_all(got: list[dict[str, Any]], what: str, device: torch.device) -> torch.Tensor:
    for of_rank in got[1:]:
        assert torch.equal(of_rank[what], got[0][what])
    return got[0][what].to(device)


class Outcomes:
    """What the ranks got: started when first asked for, once for all processes of pytest-xdist.

    `run(rank, backend, folder, graphs)` is what each process runs. It leaves a dict of jobs in the folder, as
    `ranks.RANK.pt`, or with `graphs` as `graphs.RANK.pt`. `prepare(folder)` comes before, in this process.
    """

    def __init__(
        self, run: Callable[..., None], prepare: Callable[[Path], None], backend: str, factory: pytest.TempPathFactory
    ) -> None:
        self.run, self.prepare, self.backend = run, prepare, backend
        base = factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        self.folder = base / f"{run.__module__}-{backend}"
        self.of_graphs: dict[bool, list[dict[str, Any]]] = {}

    def __call__(self, job: str, *, graphs: bool = False) -> list[dict[str, Any]]:
        """What each rank got of a job. An error on one of them is a failure."""
        if graphs not in self.of_graphs:
            self.of_graphs[graphs] = self._run(graphs)
        got = [of_rank[job] for of_rank in self.of_graphs[graphs]]
        for rank, of_rank in enumerate(got):
            assert not isinstance(of_rank, str), f"rank {rank}: {of_rank}"
        return got

    def _run(self, graphs: bool) -> list[dict[str, Any]]:
        self.folder.mkdir(exist_ok=True)
        paths = [self.folder / f"{'graphs' if graphs else 'ranks'}.{rank}.pt" for rank in range(RANKS)]
        failed = self.folder / f"failed.{graphs}"
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if failed.exists():
                pytest.fail(failed.read_text())
            if not all(path.exists() for path in paths):
                self.prepare(self.folder)
                try:
                    self._start(graphs)
                except BaseException as error:
                    failed.write_text(f"{type(error).__name__}: {error}")
                    raise
        return [torch.load(path) for path in paths]

    def _start(self, graphs: bool) -> None:
        """Runs the processes. Raises if one fails, or if they take too long."""
        arguments = self.backend, self.folder, graphs
        processes = torch.multiprocessing.spawn(self.run, arguments, nprocs=RANKS, join=False)
        end = time.monotonic() + LIMIT
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"the ranks were not done after {LIMIT} s")
        finally:
            for process in processes.processes:
                process.kill()
