"""Runs of fake stages, here and in another process."""

from __future__ import annotations

from fake_runs import _fake_kinds, change, cli, other_process, workspace  # noqa: F401
