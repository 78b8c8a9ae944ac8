"""docs/ppo-details.md names code and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ppo-details.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w./]+\.py):(\w+)`", PAGE)


def test_every_function_and_test_exists() -> None:
    missing = [
        f"{file}:{name}"
        for file, name in NAMED
        if not (ROOT / file).is_file()
        or name
        not in {
            node.name
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
    ]
    assert not missing
    assert len(NAMED) >= 60


def test_every_detail_has_a_number_code_and_a_test() -> None:
    items = re.split(r"^(\d+)\. ", re.sub(r"^## .*$", "", PAGE, flags=re.MULTILINE), flags=re.MULTILINE)[1:]
    assert [int(number) for number in items[::2]] == list(range(1, len(items) // 2 + 1))
    for number, text in zip(items[::2], items[1::2], strict=True):
        files = [file for file, _ in re.findall(r"`([\w./]+\.py):(\w+)`", text)]
        assert any(file.startswith("tests/") for file in files), number
        assert any(not file.startswith("tests/") for file in files), number


def test_settings_in_brackets_exist() -> None:
    text = (ROOT / "ppo" / "config.py").read_text(encoding="utf-8")
    text += (ROOT / "src" / "llama2_chat" / "settings.py").read_text(encoding="utf-8")
    named = {
        setting.rsplit(".", 1)[-1]
        for brackets in re.findall(r"\(((?:§3\.2\.3, )?`[\w.`, ]+`)\)", PAGE)
        for setting in re.findall(r"`([\w.]+)`", brackets)
    }
    assert {"kl_coefficient", "gae_lambda", "clip_range"} <= named
    assert [name for name in sorted(named) if not re.search(rf"\b{name}: ", text)] == []
