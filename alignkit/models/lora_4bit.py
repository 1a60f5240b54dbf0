"""The 4-bit twin of `FusedLoraLinear`, apart because importing it needs bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

from alignkit.models.lora import FusedForward


class FusedLoraLinear4bit(FusedForward, PeftLinear4bit):
    """PEFT's LoRA layer over a frozen bitsandbytes 4-bit layer."""
