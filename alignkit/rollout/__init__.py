"""From prompts to scored completions: engines that generate, and sources that reward."""

from __future__ import annotations
