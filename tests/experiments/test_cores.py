"""Cores are counted on systems other than Linux, too."""

import os
import shutil

from experiments.cores import available_cores, default_workers


def test_there_is_at_least_one(monkeypatch):
    assert 1 <= available_cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_a_gpu_is_shared_by_two(monkeypatch):
    monkeypatch.setattr("experiments.cores.available_cores", lambda: 16)
    assert default_workers() == 16  # tests are on the CPU
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": "/bin/nvidia-smi"}.get)
    assert default_workers() == 2
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert default_workers() == 16
