"""Rows in, token ids out: sources, records, tokenization, layouts. Imports no model code."""

from __future__ import annotations
