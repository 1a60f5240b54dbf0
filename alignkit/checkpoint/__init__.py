"""Checkpoints that are whole or absent: written aside, sealed by a manifest, renamed, and verified before use."""
