"""Cores are counted on systems other than Linux, too."""

import os
import shutil
import subprocess

import pytest

from experiments.cores import available_cores, default_workers, visible_gpus


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


TWO = "GPU 0: NVIDIA H100 (UUID: GPU-4d)\nGPU 1: NVIDIA H100 (UUID: GPU-5e)\n"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (TWO, ("0", "1")),
        (f"{TWO}  MIG 1g.10gb     Device  0: (UUID: MIG-6f)\n", ()),
        ("No devices found.\n", ()),
        (FileNotFoundError(), ()),
        (subprocess.CalledProcessError(9, "nvidia-smi"), ()),
    ],
)
def test_gpus_are_those_that_are_listed(listed, expected, monkeypatch):
    def run(command, **options):
        assert command == ["nvidia-smi", "-L"]
        if isinstance(listed, Exception):
            raise listed
        return subprocess.CompletedProcess(command, 0, listed)

    monkeypatch.setattr(subprocess, "run", run)
    assert visible_gpus() == ()  # tests are on the CPU
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("named", "expected"),
    [("2, GPU-4d", ("2", "GPU-4d")), ("3", ("3",)), ("", ()), ("-1", ())],
)
def test_gpus_that_are_named_count_alone(named, expected, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected
