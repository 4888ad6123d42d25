"""Devices, the precision of matrix products, and RAM that is given back."""

from __future__ import annotations

import ctypes
import re

import torch

from utils import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device named, or the best one here: CUDA, else MPS, else the CPU."""
    # Counted are also those whose driver is too old for this PyTorch, which `is_available` tells.
    count = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    count |= {"mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, there in count.items() if there)
    kind, _, number = name.partition(":")
    if kind not in count or not re.fullmatch(r"\w+(:\d{1,3})?", name):
        raise UserError(f"DEVICE is {name!r}: use auto, cuda, mps or cpu")
    if int(number or 0) >= count[kind]:
        raise UserError(f"DEVICE is {name!r}, but torch sees no such device: use --device auto")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bf16 where the hardware multiplies it fast, else fp32."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"PRECISION is {precision!r}: use auto, bf16 or fp32")
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    if device.type == "cuda":
        with torch.cuda.device(device):  # of several GPUs this one is meant
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = precision == "bf16" or (precision == "auto" and fast)
    return torch.bfloat16 if chosen else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which matrix products are done in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def release_memory() -> None:
    """Give back to the system the RAM that was freed; only glibc has to be asked.

    Batches of many lengths leave holes between what lives on: without this, a training with
    questions grows from 2 to 3.5 GB in some epochs (docs/performance.md).
    """
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
