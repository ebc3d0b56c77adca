"""`python -m kvcache_ext env`: what it says of several GPUs, and of variables."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvcache_ext.__main__ import main

REACH = "GPUs reach each other's memory"


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["env"]) == 0
    pairs = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    return {name.rstrip(": "): value.strip() for name, _, value in pairs}


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, apart: set[tuple[int, int]]) -> None:
    """So many GPUs, of which some do not reach another's memory."""
    properties = SimpleNamespace(name="GPU", total_memory=24e9, major=8, minor=9, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in apart)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def test_gpus_that_reach_each_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2, set())
    got = rows(capsys)
    assert got["GPU 1"].startswith("GPU, 24.0 GB")
    assert got[REACH] == "all of them: an exchange through symmetric memory is possible"
    assert got["NCCL of torch"] == "2.28.9"


def test_gpus_that_do_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 3, {(0, 1), (2, 1)})  # one direction is not enough
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    got = rows(capsys)
    assert got[REACH] == "not 0 and 1, 1 and 2: a group with such a pair exchanges by NCCL"
    assert got["NCCL of torch"] == "none: between GPUs there is no exchange"


def test_one_gpu_has_nobody_to_exchange_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 1, set())
    assert REACH not in rows(capsys)


def test_the_exchange_that_is_forced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCACHE_EXT_EXCHANGE", raising=False)
    assert "KVCACHE_EXT_EXCHANGE" not in rows(capsys)
    monkeypatch.setenv("KVCACHE_EXT_EXCHANGE", "gather")
    assert rows(capsys)["KVCACHE_EXT_EXCHANGE"] == "gather"
